//! What an image holds, and where it lies.

use core::fmt;
use core::ops::Deref;

use memlayer_core::Element;
use memlayer_core::element::Format;

use super::codec::{CRC_LEN, ENTRY_LEN, HEADER_LEN, format_code};
use super::config::CONFIG_LEN;
use super::{ALIGN, MAX_SECTIONS};

/// The name of a section: 1 to 64 bytes of UTF-8 without control characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Name {
    /// Filled up with zeros.
    bytes: [u8; Self::MAX],
}

impl Name {
    /// Bytes of the longest name.
    pub const MAX: usize = 64;

    /// `name`, if it is one.
    ///
    /// # Errors
    /// [`LayoutError::Name`].
    pub fn new(name: &str) -> Result<Self, LayoutError> {
        let bad = LayoutError::Name { len: name.len() };
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(bad);
        }
        let mut bytes = [0; Self::MAX];
        bytes.get_mut(..name.len()).ok_or(bad)?.copy_from_slice(name.as_bytes());
        Ok(Self { bytes })
    }

    /// The name in a field of an entry.
    pub(super) fn decode(field: &[u8; Self::MAX]) -> Result<Self, LayoutError> {
        let len = field.iter().position(|&b| b == 0).unwrap_or(Self::MAX);
        let bad = LayoutError::Name { len };
        let name = Self::new(core::str::from_utf8(&field[..len]).map_err(|_| bad)?)?;
        if name.bytes == *field { Ok(name) } else { Err(bad) }
    }

    /// As much of `name` as can be one, for messages.
    pub(super) fn clipped(name: &str) -> Self {
        let mut bytes = [0; Self::MAX];
        for (at, c) in name.char_indices() {
            let c = if c.is_control() { '?' } else { c };
            match bytes.get_mut(at..at + c.len_utf8()) {
                Some(field) => c.encode_utf8(field),
                None => break,
            };
        }
        Self { bytes }
    }

    pub(super) fn field(&self) -> &[u8; Self::MAX] {
        &self.bytes
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let len = self.bytes.iter().position(|&b| b == 0).unwrap_or(Self::MAX);
        core::str::from_utf8(&self.bytes[..len]).unwrap_or_default()
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(feature = "defmt")]
impl defmt::Format for Name {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "{=str}", self.as_str());
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Content {
    /// Packed rows: codes, and a scale for each `group` values of a row.
    Rows {
        /// What the codes are.
        format: Format,
        /// Rows.
        rows: u64,
        /// Values in a row.
        dim: u32,
        /// Values that share a scale.
        group: u32,
    },
    /// Rows without scales: matrices, vectors, unpacked tables.
    Dense {
        /// What the values are.
        format: Format,
        /// Rows.
        rows: u64,
        /// Values in a row.
        dim: u32,
    },
    /// Anything else: a tokenizer, a model's configuration, a text.
    Bytes {
        /// How many.
        len: u64,
    },
    /// A [`memlayer_core::Config`].
    Config,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Rows { format, rows, dim, group } if group == dim => {
                write!(f, "{rows} {format} rows of {dim} values")
            }
            Self::Rows { format, rows, dim, group } => {
                write!(f, "{rows} {format} rows of {dim} values in groups of {group}")
            }
            Self::Dense { format, rows, dim } => write!(f, "{rows} dense {format} rows of {dim} values"),
            Self::Bytes { len } => write!(f, "{len} bytes"),
            Self::Config => f.write_str("a layer's configuration"),
        }
    }
}

/// Bytes that a value of `format` takes.
const fn width(format: Format) -> u64 {
    match format {
        Format::F64 => 8,
        Format::F32 => 4,
        Format::F16 | Format::Bf16 => 2,
        _ => 1,
    }
}

impl Content {
    /// What the values are; `None` if it holds none.
    #[must_use]
    pub const fn format(&self) -> Option<Format> {
        match *self {
            Self::Rows { format, .. } | Self::Dense { format, .. } => Some(format),
            Self::Bytes { .. } | Self::Config => None,
        }
    }

    /// Bytes of data and of scales; `None` if they exceed 64 bits.
    pub(super) fn lens(&self) -> Option<(u64, u64)> {
        match *self {
            Self::Rows { format, rows, dim, group } => {
                let scales = rows.checked_mul(u64::from(dim.div_ceil(group.max(1))))?.checked_mul(4)?;
                Some((rows.checked_mul(u64::from(dim))?.checked_mul(width(format))?, scales))
            }
            Self::Dense { format, rows, dim } => {
                Some((rows.checked_mul(u64::from(dim))?.checked_mul(width(format))?, 0))
            }
            Self::Bytes { len } => Some((len, 0)),
            Self::Config => Some((CONFIG_LEN as u64, 0)),
        }
    }

    /// Fails unless a section called `name` could hold this.
    pub(super) fn check(&self, name: Name) -> Result<(), LayoutError> {
        let (format, rows, dim) = match *self {
            Self::Rows { format, rows, dim, group } => {
                if group == 0 || group > dim {
                    return Err(LayoutError::Size { section: name, field: "group", found: u64::from(group) });
                }
                (format, rows, dim)
            }
            Self::Dense { format, rows, dim } => (format, rows, dim),
            Self::Bytes { .. } | Self::Config => return Ok(()),
        };
        if format_code(format).is_none() {
            return Err(LayoutError::Format { section: name, format });
        }
        if dim == 0 {
            return Err(LayoutError::Size { section: name, field: "dim", found: 0 });
        }
        if rows > 1 << 32 {
            return Err(LayoutError::Size { section: name, field: "rows", found: rows });
        }
        Ok(())
    }
}

/// A section to be written: its name and what it will hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Section {
    pub(super) name: Name,
    pub(super) content: Content,
    /// Known once the section is written.
    pub(super) checksum: u32,
}

impl Section {
    /// A section with `content`.
    ///
    /// # Errors
    /// [`LayoutError`] if `name` is no name or there can be no such content.
    pub fn new(name: &str, content: Content) -> Result<Self, LayoutError> {
        let name = Name::new(name)?;
        content.check(name)?;
        Ok(Self { name, content, checksum: 0 })
    }

    /// `rows` packed rows of `dim` values with one scale for each `group` of them.
    ///
    /// # Errors
    /// As [`Section::new`].
    pub fn rows<E: Element>(name: &str, rows: usize, dim: usize, group: usize) -> Result<Self, LayoutError> {
        let (dim, group) = (narrow(name, "dim", dim)?, narrow(name, "group", group)?);
        Self::new(name, Content::Rows { format: E::FORMAT, rows: rows as u64, dim, group })
    }

    /// `rows` rows of `dim` values without scales.
    ///
    /// # Errors
    /// As [`Section::new`].
    pub fn dense<E: Element>(name: &str, rows: usize, dim: usize) -> Result<Self, LayoutError> {
        Self::new(name, Content::Dense { format: E::FORMAT, rows: rows as u64, dim: narrow(name, "dim", dim)? })
    }

    /// `len` bytes.
    ///
    /// # Errors
    /// As [`Section::new`].
    pub fn bytes(name: &str, len: usize) -> Result<Self, LayoutError> {
        Self::new(name, Content::Bytes { len: len as u64 })
    }

    /// A layer's configuration.
    ///
    /// # Errors
    /// As [`Section::new`].
    pub fn config(name: &str) -> Result<Self, LayoutError> {
        Self::new(name, Content::Config)
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the section holds.
    #[must_use]
    pub fn content(&self) -> Content {
        self.content
    }
}

fn narrow(name: &str, field: &'static str, size: usize) -> Result<u32, LayoutError> {
    u32::try_from(size).map_err(|_| LayoutError::Size { section: Name::clipped(name), field, found: size as u64 })
}

/// Where a section lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) data: u64,
    pub(super) data_len: u64,
    pub(super) scales: u64,
    pub(super) scales_len: u64,
    /// Where the next section lies.
    pub(super) end: u64,
}

impl Place {
    /// The place of `content` from byte `at` on; `None` if it ends beyond 64 bits.
    pub(super) fn of(content: &Content, at: u64) -> Option<Self> {
        let (data_len, scales_len) = content.lens()?;
        let data_end = at.checked_add(data_len)?.checked_next_multiple_of(ALIGN as u64)?;
        let end = data_end.checked_add(scales_len)?.checked_next_multiple_of(ALIGN as u64)?;
        let scales = if matches!(content, Content::Rows { .. }) { data_end } else { 0 };
        Some(Self { data: at, data_len, scales, scales_len, end })
    }
}

/// The bytes of an image whose table is at `table`.
pub(super) fn total_len(table: u64, sections: u64) -> Option<u64> {
    table.checked_add(sections.checked_mul(ENTRY_LEN as u64)?)?.checked_add(CRC_LEN as u64)
}

/// Where the table of an image of these sections is.
pub(super) fn table_at(sections: &[Section]) -> Result<u64, LayoutError> {
    if sections.len() > MAX_SECTIONS {
        return Err(LayoutError::TooMany { sections: sections.len() });
    }
    let mut at = HEADER_LEN as u64;
    for (i, section) in sections.iter().enumerate() {
        if sections[..i].iter().any(|s| s.name == section.name) {
            return Err(LayoutError::Duplicate { section: section.name });
        }
        at = Place::of(&section.content, at).ok_or(LayoutError::TooLarge { section: section.name })?.end;
    }
    Ok(at)
}

/// The bytes of an image of these sections.
///
/// # Errors
/// [`LayoutError`] if there can be no such image.
pub fn encoded_len(sections: &[Section]) -> Result<u64, LayoutError> {
    let table = table_at(sections)?;
    total_len(table, sections.len() as u64).ok_or(LayoutError::TooMany { sections: sections.len() })
}

/// Why there can be no such image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum LayoutError {
    /// A name is empty, longer than 64 bytes, not UTF-8, or has control characters.
    Name {
        /// Its length in bytes.
        len: usize,
    },
    /// Two sections have the same name.
    Duplicate {
        /// The name.
        section: Name,
    },
    /// A size is zero or greater than the format can say.
    Size {
        /// The section.
        section: Name,
        /// `rows`, `dim` or `group`.
        field: &'static str,
        /// The size.
        found: u64,
    },
    /// Images have no rows of this format.
    Format {
        /// The section.
        section: Name,
        /// The format.
        format: Format,
    },
    /// A section ends beyond 64 bits.
    TooLarge {
        /// The section.
        section: Name,
    },
    /// There are more than [`MAX_SECTIONS`] sections.
    TooMany {
        /// How many.
        sections: usize,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Name { len } => {
                write!(f, "a name of {len} bytes is not 1 to 64 bytes of UTF-8 without control characters")
            }
            Self::Duplicate { section } => write!(f, "two sections are called {section}"),
            Self::Size { section, field, found } => write!(f, "section {section}: {field} cannot be {found}"),
            Self::Format { section, format } => write!(f, "section {section}: an image has no rows of {format}"),
            Self::TooLarge { section } => write!(f, "section {section} ends beyond 2^64 bytes"),
            Self::TooMany { sections } => write!(f, "{sections} sections exceed the {MAX_SECTIONS} an image may have"),
        }
    }
}

impl core::error::Error for LayoutError {}
