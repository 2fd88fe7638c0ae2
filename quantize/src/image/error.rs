//! What can be wrong with an image.

use core::fmt;

use memlayer_core::ConfigError;
use memlayer_core::element::Format;

use super::section::{Content, LayoutError, Name};
use super::{IN_PLACE_ALIGN, VERSION};

/// A part of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Part {
    /// The first 64 bytes.
    Header,
    /// The list of sections.
    Table,
    /// A section, or its entry in the table.
    Section(Name),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::Table => f.write_str("the table of sections"),
            Self::Section(name) => write!(f, "section {name}"),
        }
    }
}

/// Why bytes are no image, or an image does not hold what was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ImageError {
    /// Images are little-endian and read in place; this machine is neither.
    BigEndianHost,
    /// The first bytes are not those of an image.
    Magic {
        /// What they are.
        found: [u8; 8],
    },
    /// The image is of another version of the format.
    Version {
        /// Its version.
        found: u32,
        /// The version that can be read.
        supported: u32,
    },
    /// The bytes are more or fewer than the image says it has.
    Length {
        /// What it says, or the length of the header if there is not even that.
        stated: u64,
        /// How many there are.
        found: u64,
    },
    /// The bytes do not lie at a multiple of [`IN_PLACE_ALIGN`].
    Alignment {
        /// The remainder.
        off_by: usize,
    },
    /// A checksum is wrong: the part is damaged.
    Checksum {
        /// The part.
        part: Part,
        /// The checksum in the image.
        stated: u32,
        /// The checksum of the bytes.
        computed: u32,
    },
    /// Bytes that have no meaning yet are not zero.
    Reserved {
        /// Where.
        part: Part,
    },
    /// The table cannot be where the header says it is, or has too many sections.
    TableRange {
        /// Where it says it is.
        table: u64,
        /// The length it says the image has.
        total: u64,
    },
    /// There can be no such section.
    Layout(LayoutError),
    /// A section is of an unknown kind.
    Kind {
        /// The section.
        section: Name,
        /// The kind's code.
        code: u16,
    },
    /// A section is in an unknown format.
    Format {
        /// The section.
        section: Name,
        /// The format's code.
        code: u16,
    },
    /// A section does not lie where its sizes and the sections before put it.
    Range {
        /// The section.
        section: Name,
        /// What is wrong.
        field: &'static str,
        /// What it must be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// A section reaches into the table, or there is room between the two.
    End {
        /// Where the sections end.
        end: u64,
        /// Where the table is.
        table: u64,
    },
    /// A byte between sections is not zero.
    Padding {
        /// The section before.
        section: Name,
        /// Where the byte is.
        at: u64,
        /// Its value.
        found: u8,
    },
    /// A scale is infinite or not a number.
    Scale {
        /// The section.
        section: Name,
        /// The row.
        row: u64,
        /// The scale.
        value: f32,
    },
    /// A field of a configuration has a value that means nothing.
    ConfigField {
        /// The section.
        section: Name,
        /// The field.
        field: &'static str,
        /// Its value.
        found: u64,
    },
    /// The sizes of a configuration make no layer.
    Config {
        /// The section.
        section: Name,
        /// Why.
        error: ConfigError,
    },
    /// There is no such section.
    Missing {
        /// The name asked for, as much of it as a name may have.
        section: Name,
    },
    /// A section holds something else than was asked for.
    Mismatch {
        /// The section.
        section: Name,
        /// What was asked for: `rows`, `dense`, `bytes` or `config`.
        asked: &'static str,
        /// The format that was asked for.
        format: Option<Format>,
        /// What it holds.
        found: Content,
    },
}

impl From<LayoutError> for ImageError {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::BigEndianHost => f.write_str("images are read in place, which needs a little-endian machine"),
            Self::Magic { found } => write!(f, "not an image: it begins with {}", found.escape_ascii()),
            Self::Version { found, supported } if found > VERSION => {
                write!(f, "the image has version {found}, newer than the version {supported} that can be read")
            }
            Self::Version { found, supported } => {
                write!(f, "the image has version {found}, but only version {supported} can be read")
            }
            Self::Length { stated, found } => write!(f, "the image has {stated} bytes, but {found} are there"),
            Self::Alignment { off_by } => {
                write!(
                    f,
                    "the image lies {off_by} bytes behind a multiple of {IN_PLACE_ALIGN}: it cannot be read in place"
                )
            }
            Self::Checksum { part, stated, computed } => {
                write!(f, "{part} is damaged: its checksum is {computed:08x} where {stated:08x} is stated")
            }
            Self::Reserved { part } => write!(f, "{part}: bytes without a meaning are not zero"),
            Self::TableRange { table, total } => {
                write!(f, "the table of sections cannot be at byte {table} of {total}")
            }
            Self::Layout(error) => error.fmt(f),
            Self::Kind { section, code } => write!(f, "section {section} is of unknown kind {code}"),
            Self::Format { section, code } => write!(f, "section {section} is in unknown format {code}"),
            Self::Range { section, field, expected, found } => {
                write!(f, "section {section}: {field} is {found} where it must be {expected}")
            }
            Self::End { end, table } => write!(f, "the sections end at byte {end}, but their table is at {table}"),
            Self::Padding { section, at, found } => {
                write!(f, "byte {at}, padding of section {section}, is {found:#04x} instead of zero")
            }
            Self::Scale { section, row, value } => write!(f, "section {section}: a scale of row {row} is {value}"),
            Self::ConfigField { section, field, found } => {
                write!(f, "section {section}: the configuration's {field} cannot be {found} on this machine")
            }
            Self::Config { section, error } => write!(f, "section {section}: {error}"),
            Self::Missing { section } => write!(f, "the image has no section {section}"),
            Self::Mismatch { section, asked, format: Some(format), found } => {
                write!(f, "section {section} holds {found}, not {format} {asked}")
            }
            Self::Mismatch { section, asked, format: None, found } => {
                write!(f, "section {section} holds {found}, not {asked}")
            }
        }
    }
}

impl core::error::Error for ImageError {}
