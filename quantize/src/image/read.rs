//! Reading an image in place.

use core::fmt;

use bytemuck::AnyBitPattern;
use memlayer_core::storage::{DenseRows, ScaledRows};
use memlayer_core::{Config, Element};

use super::codec::{CRC_LEN, ENTRY_LEN, HEADER_LEN, Header, check_crc, decode_entry, stated_data};
use super::config::{CONFIG_LEN, Invalid, decode};
use super::error::{ImageError, Part};
use super::section::{Content, LayoutError, Name, Place, Section};
use super::{ALIGN, IN_PLACE_ALIGN};

/// A parsed image: its structure is sound. It borrows the bytes and copies nothing.
#[derive(Clone, Copy)]
pub struct Image<'a> {
    bytes: &'a [u8],
    table: &'a [[u8; ENTRY_LEN]],
}

/// A section of an image.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    bytes: &'a [u8],
    section: Section,
    place: Place,
}

/// What it holds, not its bytes.
impl fmt::Debug for Image<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sections()).finish()
    }
}

/// What it holds, not its bytes.
impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.section.name, self.section.content)
    }
}

impl<'a> Image<'a> {
    /// `bytes` as an image, which must fill them and lie at a multiple of [`IN_PLACE_ALIGN`].
    ///
    /// Trusts nothing and never panics. Reads header and table, not the sections: that is [`Image::verify`]'s work.
    ///
    /// # Errors
    /// [`ImageError`] with the first thing that is wrong.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        if cfg!(target_endian = "big") {
            return Err(ImageError::BigEndianHost);
        }
        let header = Header::decode(bytes)?;
        if header.total != bytes.len() as u64 {
            return Err(ImageError::Length { stated: header.total, found: bytes.len() as u64 });
        }
        let off_by = bytes.as_ptr().addr() % IN_PLACE_ALIGN;
        if off_by != 0 {
            return Err(ImageError::Alignment { off_by });
        }
        let tail = slice(bytes, header.table, header.total - header.table);
        let (entries, crc) = tail.as_chunks::<ENTRY_LEN>();
        let stated = crc.first_chunk::<CRC_LEN>().map_or(0, |crc| u32::from_le_bytes(*crc));
        check_crc(Part::Table, stated, entries.as_flattened())?;
        let image = Self { bytes, table: entries };
        image.check_table(header.table)?;
        Ok(image)
    }

    /// The length that the image which begins with `header` says it has: how much to read from where no file ends.
    ///
    /// # Errors
    /// [`ImageError`] if this is no header. Nothing behind the first 64 bytes is read.
    pub fn stated_len(header: &[u8]) -> Result<u64, ImageError> {
        Header::decode(header).map(|header| header.total)
    }

    /// Fails unless the sections fill the space between header and table, each with a name of its own.
    fn check_table(&self, table: u64) -> Result<(), ImageError> {
        let mut at = HEADER_LEN as u64;
        for (i, entry) in self.table.iter().enumerate() {
            let (section, place) = decode_entry(entry, at)?;
            if self.table.iter().take(i).any(|other| other.starts_with(section.name.field())) {
                return Err(LayoutError::Duplicate { section: section.name }.into());
            }
            at = place.end;
        }
        if at == table { Ok(()) } else { Err(ImageError::End { end: at, table }) }
    }

    /// Reads every byte once: checksums, padding, scales and configurations. After it, every bit of the image is
    /// known to be as it was written.
    ///
    /// # Errors
    /// [`ImageError`] with the first thing that is wrong.
    pub fn verify(&self) -> Result<(), ImageError> {
        self.sections().try_for_each(|entry| entry.verify())
    }

    /// All sections in order.
    pub fn sections(&self) -> impl ExactSizeIterator<Item = Entry<'a>> + use<'a> {
        let image = *self;
        // Parsing has decoded every entry, so that none falls back to an empty section here.
        self.table.iter().map(move |entry| {
            let (section, place) = decode_entry(entry, stated_data(entry)).unwrap_or_else(|_| nothing());
            Entry { bytes: image.bytes, section, place }
        })
    }

    /// The section called `name`.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<Entry<'a>> {
        self.sections().find(|entry| entry.name() == name)
    }

    fn find(&self, name: &str) -> Result<Entry<'a>, ImageError> {
        self.section(name).ok_or_else(|| ImageError::Missing { section: Name::clipped(name) })
    }

    /// The packed rows called `name`.
    ///
    /// # Errors
    /// [`ImageError::Missing`] or [`ImageError::Mismatch`].
    pub fn rows<E: Element>(&self, name: &str) -> Result<ScaledRows<'a, E>, ImageError> {
        self.find(name)?.rows()
    }

    /// The rows without scales called `name`; [`DenseRows::codes`] has all values in one slice.
    ///
    /// # Errors
    /// [`ImageError::Missing`] or [`ImageError::Mismatch`].
    pub fn dense<E: Element>(&self, name: &str) -> Result<DenseRows<'a, E>, ImageError> {
        self.find(name)?.dense()
    }

    /// The bytes called `name`.
    ///
    /// # Errors
    /// [`ImageError::Missing`] or [`ImageError::Mismatch`].
    pub fn bytes(&self, name: &str) -> Result<&'a [u8], ImageError> {
        self.find(name)?.bytes()
    }

    /// The configuration called `name`. Its checksum is checked, with or without [`Image::verify`].
    ///
    /// # Errors
    /// [`ImageError::Missing`] or [`ImageError::Mismatch`]; or what is wrong with the configuration.
    pub fn config(&self, name: &str) -> Result<Config, ImageError> {
        self.find(name)?.config()
    }
}

/// What no entry of a parsed image decodes to.
fn nothing() -> (Section, Place) {
    let section = Section { name: Name::clipped(""), content: Content::Bytes { len: 0 }, checksum: 0 };
    (section, Place { data: 0, data_len: 0, scales: 0, scales_len: 0, end: 0 })
}

/// The range of `bytes`, which parsing has found to be there.
fn slice(bytes: &[u8], at: u64, len: u64) -> &[u8] {
    let range = usize::try_from(at).ok().zip(usize::try_from(len).ok());
    range.and_then(|(at, len)| bytes.get(at..)?.get(..len)).unwrap_or_default()
}

/// `bytes` as items. Sections lie at multiples of 64 bytes and are whole items long, so the cast succeeds.
fn items<T: AnyBitPattern>(bytes: &[u8]) -> &[T] {
    bytemuck::try_cast_slice(bytes).unwrap_or_default()
}

impl<'a> Entry<'a> {
    /// The section's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.section.name
    }

    /// What it holds.
    #[must_use]
    pub fn content(&self) -> Content {
        self.section.content
    }

    /// The checksum it should have: the CRC-32 of data and scales.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.section.checksum
    }

    fn data(&self) -> &'a [u8] {
        slice(self.bytes, self.place.data, self.place.data_len)
    }

    fn scales(&self) -> &'a [u8] {
        slice(self.bytes, self.place.scales, self.place.scales_len)
    }

    fn mismatch(&self, asked: &'static str, format: Option<memlayer_core::element::Format>) -> ImageError {
        ImageError::Mismatch { section: self.section.name, asked, format, found: self.section.content }
    }

    /// As [`Image::rows`].
    ///
    /// # Errors
    /// [`ImageError::Mismatch`].
    pub fn rows<E: Element>(&self) -> Result<ScaledRows<'a, E>, ImageError> {
        let mismatch = self.mismatch("rows", Some(E::FORMAT));
        match self.section.content {
            Content::Rows { format, dim, group, .. } if format == E::FORMAT => {
                let (codes, scales) = (items(self.data()), items(self.scales()));
                ScaledRows::new(codes, scales, dim as usize, group as usize).ok_or(mismatch)
            }
            _ => Err(mismatch),
        }
    }

    /// As [`Image::dense`].
    ///
    /// # Errors
    /// [`ImageError::Mismatch`].
    pub fn dense<E: Element>(&self) -> Result<DenseRows<'a, E>, ImageError> {
        match self.section.content {
            Content::Dense { format, dim, .. } if format == E::FORMAT => {
                Ok(DenseRows::new(items(self.data()), dim as usize))
            }
            _ => Err(self.mismatch("dense rows", Some(E::FORMAT))),
        }
    }

    /// As [`Image::bytes`].
    ///
    /// # Errors
    /// [`ImageError::Mismatch`].
    pub fn bytes(&self) -> Result<&'a [u8], ImageError> {
        match self.section.content {
            Content::Bytes { .. } => Ok(self.data()),
            _ => Err(self.mismatch("bytes", None)),
        }
    }

    /// As [`Image::config`].
    ///
    /// # Errors
    /// [`ImageError::Mismatch`], or what is wrong with the configuration.
    pub fn config(&self) -> Result<Config, ImageError> {
        let section = self.section.name;
        match (self.section.content, self.data().first_chunk::<CONFIG_LEN>()) {
            (Content::Config, Some(bytes)) => {
                check_crc(Part::Section(section), self.section.checksum, bytes)?;
                decode(bytes).map_err(|invalid| match invalid {
                    Invalid::Field(field, found) => ImageError::ConfigField { section, field, found },
                    Invalid::Sizes(error) => ImageError::Config { section, error },
                })
            }
            _ => Err(self.mismatch("a layer's configuration", None)),
        }
    }

    /// Reads the section and its padding once: as [`Image::verify`], for this section alone.
    ///
    /// # Errors
    /// [`ImageError`] with the first thing that is wrong.
    pub fn verify(&self) -> Result<(), ImageError> {
        let (data, scales, place) = (self.data(), self.scales(), &self.place);
        let mut crc = crc32fast::Hasher::new();
        crc.update(data);
        crc.update(scales);
        let (part, stated, computed) = (Part::Section(self.section.name), self.section.checksum, crc.finalize());
        if stated != computed {
            return Err(ImageError::Checksum { part, stated, computed });
        }
        self.check_padding(place.data + place.data_len)?;
        self.check_padding(place.scales + place.scales_len)?;
        match self.section.content {
            Content::Rows { dim, group, .. } => self.check_scales(scales, u64::from(dim.div_ceil(group.max(1)))),
            Content::Config => self.config().map(drop),
            Content::Dense { .. } | Content::Bytes { .. } => Ok(()),
        }
    }

    /// Fails unless there are zeros from `from` to the next multiple of 64.
    fn check_padding(&self, from: u64) -> Result<(), ImageError> {
        let padding = slice(self.bytes, from, from.next_multiple_of(ALIGN as u64) - from);
        match (from..).zip(padding).find(|&(_, &byte)| byte != 0) {
            Some((at, &found)) => Err(ImageError::Padding { section: self.section.name, at, found }),
            None => Ok(()),
        }
    }

    fn check_scales(&self, scales: &[u8], per_row: u64) -> Result<(), ImageError> {
        for (i, &value) in (0..).zip(items::<f32>(scales)) {
            if !value.is_finite() {
                let row = u64::checked_div(i, per_row).unwrap_or(0);
                return Err(ImageError::Scale { section: self.section.name, row, value });
            }
        }
        Ok(())
    }
}
