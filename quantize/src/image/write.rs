//! Writing an image from first byte to last, without an allocator.

use core::fmt;

use bytemuck::NoUninit;
use crc32fast::Hasher;
use memlayer_core::element::Format;
use memlayer_core::storage::RowStore;
use memlayer_core::{Config, Element};

use super::ALIGN;
use super::codec::{HEADER_LEN, Header, encode_entry};
use super::config::encode;
use super::section::{Content, LayoutError, Name, Place, Section, encoded_len, table_at};
use crate::formats::Pack;
use crate::report::{Meter, PackReport};
use crate::rows::{Cut, PackError, check_len, group_scale, pack_group};

/// Where an image goes: a file, a flash page, a buffer. It comes in pieces of any length, many of them short: put a
/// buffer in front of a file.
pub trait Sink {
    /// Why it takes no more.
    type Error;
    /// Takes all of `bytes`, which follow those of the call before.
    ///
    /// # Errors
    /// If it cannot. The image is then lost.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// A buffer is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Full {
    /// Bytes that did not fit.
    pub missing: usize,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the buffer is {} bytes too short", self.missing)
    }
}

impl core::error::Error for Full {}

/// Fills the buffer from the front; what is left of it is the slice afterwards.
impl Sink for &mut [u8] {
    type Error = Full;
    fn write(&mut self, bytes: &[u8]) -> Result<(), Full> {
        let missing = bytes.len().saturating_sub(self.len());
        match core::mem::take(self).split_at_mut_checked(bytes.len()) {
            Some((place, rest)) => {
                place.copy_from_slice(bytes);
                *self = rest;
                Ok(())
            }
            None => Err(Full { missing }),
        }
    }
}

/// Why an image cannot be written.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum WriteError<E> {
    /// Codes are written as they lie, which needs a little-endian machine.
    BigEndianHost,
    /// The sink refused.
    Sink(E),
    /// There can be no such image.
    Layout(LayoutError),
    /// A section is written out of turn.
    Order {
        /// The section whose turn it is; none if all are written.
        expected: Option<Name>,
    },
    /// A section was ended, or the next begun, before it was whole; or none was begun.
    Incomplete {
        /// The section; none if none was begun.
        section: Option<Name>,
        /// Bytes of it that are missing.
        missing: u64,
    },
    /// More was written into a section than it holds.
    Surplus {
        /// The section.
        section: Name,
        /// Bytes beyond its end.
        bytes: u64,
    },
    /// A section was said to hold something else.
    Mismatch {
        /// The section.
        section: Name,
        /// What it was said to hold.
        expected: Content,
    },
    /// Rows cannot be packed.
    Pack {
        /// The section.
        section: Name,
        /// Why.
        error: PackError,
    },
}

impl<E: fmt::Display> fmt::Display for WriteError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BigEndianHost => f.write_str("images are written in place, which needs a little-endian machine"),
            Self::Sink(error) => error.fmt(f),
            Self::Layout(error) => error.fmt(f),
            Self::Order { expected: Some(expected) } => {
                write!(f, "a section is written out of turn: {expected} is next")
            }
            Self::Order { expected: None } => f.write_str("a section is written, but none is left"),
            Self::Incomplete { section: Some(section), missing } => {
                write!(f, "{missing} bytes of section {section} are missing")
            }
            Self::Incomplete { section: None, .. } => f.write_str("no section is begun"),
            Self::Surplus { section, bytes } => write!(f, "{bytes} bytes more than section {section} holds"),
            Self::Mismatch { section, expected } => write!(f, "section {section} was to hold {expected}"),
            Self::Pack { section, error } => write!(f, "section {section}: {error}"),
        }
    }
}

impl<E: fmt::Debug + fmt::Display> core::error::Error for WriteError<E> {}

/// Writes an image into a [`Sink`], section after section in the order they were announced in.
///
/// The sink sees every byte once, in order. After an error the image is lost: start anew.
#[derive(Debug)]
pub struct Writer<'a, S> {
    sink: S,
    sections: &'a mut [Section],
    /// The section whose turn it is.
    next: usize,
    /// Where it lies.
    at: u64,
    /// What was written of it, if it is begun.
    open: Option<Open>,
}

/// A section in progress.
#[derive(Debug)]
struct Open {
    name: Name,
    place: Place,
    /// Bytes of data and scales so far.
    written: u64,
    crc: Hasher,
}

impl Open {
    /// Bytes of data and scales still to come.
    fn missing(&self) -> u64 {
        self.place.data_len + self.place.scales_len - self.written
    }
}

type Written<S> = Result<(), WriteError<<S as Sink>::Error>>;

impl<'a, S: Sink> Writer<'a, S> {
    /// Begins an image of `sections`, whose checksums are noted in them as they are written.
    ///
    /// # Errors
    /// [`WriteError::Layout`], or what the sink reports.
    pub fn new(mut sink: S, sections: &'a mut [Section]) -> Result<Self, WriteError<S::Error>> {
        if cfg!(target_endian = "big") {
            return Err(WriteError::BigEndianHost);
        }
        let table = table_at(sections).map_err(WriteError::Layout)?;
        let total = encoded_len(sections).map_err(WriteError::Layout)?;
        let too_many = LayoutError::TooMany { sections: sections.len() };
        let count = u32::try_from(sections.len()).map_err(|_| WriteError::Layout(too_many))?;
        let header = Header { sections: count, total, table }.encode();
        sink.write(&header).map_err(WriteError::Sink)?;
        Ok(Self { sink, sections, next: 0, at: header.len() as u64, open: None })
    }

    /// Begins the next section, which must be called `name`. [`Writer::append`] then takes its bytes in pieces.
    ///
    /// # Errors
    /// [`WriteError::Order`], or [`WriteError::Incomplete`] if the section before was not ended.
    pub fn begin(&mut self, name: &str) -> Written<S> {
        if let Some(open) = &self.open {
            return Err(WriteError::Incomplete { section: Some(open.name), missing: open.missing() });
        }
        let next = self.sections.get(self.next).filter(|s| s.name() == name);
        let Some(section) = next else {
            let expected = self.sections.get(self.next).map(|s| s.name);
            return Err(WriteError::Order { expected });
        };
        let too_large = WriteError::Layout(LayoutError::TooLarge { section: section.name });
        let place = Place::of(&section.content, self.at).ok_or(too_large)?;
        self.open = Some(Open { name: section.name, place, written: 0, crc: Hasher::new() });
        Ok(())
    }

    /// Adds to the section in progress: first all of its data, then all of its scales, in pieces of any length.
    ///
    /// # Errors
    /// [`WriteError::Surplus`] if that is more than the section holds, or what the sink reports.
    pub fn append<T: NoUninit>(&mut self, items: &[T]) -> Written<S> {
        let mut bytes: &[u8] = bytemuck::cast_slice(items);
        let Some(open) = &mut self.open else {
            return Err(WriteError::Incomplete { section: None, missing: 0 });
        };
        if bytes.len() as u64 > open.missing() {
            return Err(WriteError::Surplus { section: open.name, bytes: bytes.len() as u64 - open.missing() });
        }
        open.crc.update(bytes);
        let data_left = open.place.data_len.saturating_sub(open.written);
        if data_left > 0 && bytes.len() as u64 >= data_left {
            let (data, rest) = bytes.split_at(usize::try_from(data_left).unwrap_or(bytes.len()));
            put(&mut self.sink, data)?;
            pad(&mut self.sink, open.place.data_len)?;
            open.written += data_left;
            bytes = rest;
        }
        put(&mut self.sink, bytes)?;
        open.written += bytes.len() as u64;
        Ok(())
    }

    /// Ends the section in progress.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if it is not whole.
    pub fn end(&mut self) -> Written<S> {
        let missing = self.open.as_ref().map_or(0, Open::missing);
        let Some(open) = self.open.take_if(|_| missing == 0) else {
            return Err(WriteError::Incomplete { section: self.open.as_ref().map(|open| open.name), missing });
        };
        pad(&mut self.sink, open.place.scales_len)?;
        self.sections[self.next].checksum = open.crc.finalize();
        (self.next, self.at) = (self.next + 1, open.place.end);
        Ok(())
    }

    /// Begins section `name`, if it was said to hold what `fits` accepts.
    fn begin_as(&mut self, name: &str, fits: impl FnOnce(Content) -> bool) -> Result<Content, WriteError<S::Error>> {
        self.begin(name)?;
        let Section { name, content, .. } = self.sections[self.next];
        if fits(content) { Ok(content) } else { Err(WriteError::Mismatch { section: name, expected: content }) }
    }

    /// Writes packed rows, as [`crate::rows::pack_rows`] makes them.
    ///
    /// # Errors
    /// [`WriteError`] if it is not this section's turn, or it holds something else or not as much.
    pub fn rows<E: Element>(&mut self, name: &str, codes: &[E], scales: &[f32]) -> Written<S> {
        let (codes_len, scales_len) = (size_of_val(codes) as u64, size_of_val(scales) as u64);
        self.begin_as(name, |content| {
            matches!(content, Content::Rows { format, .. } if format == E::FORMAT)
                && content.lens() == Some((codes_len, scales_len))
        })?;
        self.append(codes)?;
        self.append(scales)?;
        self.end()
    }

    /// Writes rows without scales.
    ///
    /// # Errors
    /// As [`Writer::rows`].
    pub fn dense<E: Element>(&mut self, name: &str, values: &[E]) -> Written<S> {
        self.begin_as(name, |content| matches!(content, Content::Dense { format, .. } if format == E::FORMAT))?;
        self.append(values)?;
        self.end()
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// As [`Writer::rows`].
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Written<S> {
        self.begin_as(name, |content| matches!(content, Content::Bytes { .. }))?;
        self.append(bytes)?;
        self.end()
    }

    /// Writes a layer's configuration.
    ///
    /// # Errors
    /// As [`Writer::rows`].
    pub fn config(&mut self, name: &str, config: &Config) -> Written<S> {
        self.begin_as(name, |content| content == Content::Config)?;
        self.append(&encode(config))?;
        self.end()
    }

    /// Packs `source` straight into the image, with room for one row: `row` is as long as a row of it. The section is
    /// rows or, for formats without scales, dense. Each row is read twice, first for its codes, then for its scales.
    ///
    /// # Errors
    /// As [`Writer::rows`]; [`WriteError::Pack`] if a value cannot be packed.
    pub fn pack<E: Pack, R: RowStore>(
        &mut self,
        name: &str,
        source: &R,
        row: &mut [E],
    ) -> Result<PackReport, WriteError<S::Error>> {
        let sizes = (E::FORMAT, source.rows() as u64, source.dim() as u64);
        let content = self.begin_as(name, |content| sizes_of(content, E::SCALED) == Some(sizes))?;
        let section = self.sections[self.next].name;
        let fail = |error| WriteError::Pack { section, error };
        let group = if let Content::Rows { group, .. } = content { group as usize } else { source.dim() };
        let cut = Cut::of(source, group).map_err(fail)?;
        check_len("row", cut.dim, row.len()).map_err(fail)?;

        let mut meter = Meter::default();
        for id in cut.ids() {
            let from = source.row(id);
            for columns in cut.groups() {
                let scale = group_scale::<E, _>(&from, id, columns.clone()).map_err(fail)?;
                pack_group(&from, id, columns, scale, row, &mut meter).map_err(fail)?;
            }
            meter.end_row(id);
            self.append(row)?;
        }
        for id in cut.ids().filter(|_| E::SCALED) {
            let from = source.row(id);
            for columns in cut.groups() {
                self.append(&[group_scale::<E, _>(&from, id, columns).map_err(fail)?])?;
            }
        }
        self.end()?;
        Ok(meter.finish())
    }

    /// Ends the image with its table, and gives the sink back.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`] if a section was not written, or what the sink reports.
    pub fn finish(mut self) -> Result<S, WriteError<S::Error>> {
        if let Some(section) = self.sections.get(self.next) {
            let missing = self.open.as_ref().map(Open::missing);
            let missing = missing.or(section.content.lens().map(|(data, scales)| data + scales)).unwrap_or(u64::MAX);
            return Err(WriteError::Incomplete { section: Some(section.name), missing });
        }
        let mut crc = Hasher::new();
        let mut at = HEADER_LEN as u64;
        for section in &*self.sections {
            let too_large = WriteError::Layout(LayoutError::TooLarge { section: section.name });
            let place = Place::of(&section.content, at).ok_or(too_large)?;
            let entry = encode_entry(section, &place);
            crc.update(&entry);
            self.sink.write(&entry).map_err(WriteError::Sink)?;
            at = place.end;
        }
        self.sink.write(&crc.finalize().to_le_bytes()).map_err(WriteError::Sink)?;
        Ok(self.sink)
    }
}

/// Format, rows and dim of a section that packed rows with or without scales may go into.
fn sizes_of(content: Content, scaled: bool) -> Option<(Format, u64, u64)> {
    match content {
        Content::Rows { format, rows, dim, .. } if scaled => Some((format, rows, u64::from(dim))),
        Content::Dense { format, rows, dim } if !scaled => Some((format, rows, u64::from(dim))),
        _ => None,
    }
}

/// Zeros behind `len` bytes, up to the next multiple of 64.
fn pad<S: Sink>(sink: &mut S, len: u64) -> Written<S> {
    const ZEROS: [u8; ALIGN] = [0; ALIGN];
    let used = usize::try_from(len % ALIGN as u64).unwrap_or(0);
    let padding = if used == 0 { 0 } else { ALIGN - used };
    put(sink, &ZEROS[..padding])
}

/// Spares sinks writes of nothing.
fn put<S: Sink>(sink: &mut S, bytes: &[u8]) -> Written<S> {
    if bytes.is_empty() { Ok(()) } else { sink.write(bytes).map_err(WriteError::Sink) }
}
