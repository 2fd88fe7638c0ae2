//! Header and table entries as bytes, in both directions.

use memlayer_core::element::Format;

use super::error::{ImageError, Part};
use super::section::{Content, Name, Place, Section, total_len};
use super::{ALIGN, MAX_SECTIONS, VERSION};

pub(super) const HEADER_LEN: usize = 64;
pub(super) const ENTRY_LEN: usize = 128;
pub(super) const CRC_LEN: usize = 4;
pub(super) const MAGIC: [u8; 8] = *b"memlayer";

/// The formats an image may hold; a format's code is one more than its place.
const FORMATS: [Format; 6] = [Format::F32, Format::F16, Format::Bf16, Format::Int8, Format::E4m3, Format::E5m2];

pub(super) fn format_code(format: Format) -> Option<u16> {
    (1..).zip(FORMATS).find(|&(_, f)| f == format).map(|(code, _)| code)
}

fn format_of(code: u16) -> Option<Format> {
    FORMATS.get(usize::from(code).checked_sub(1)?).copied()
}

/// Reads fields one after the other. Behind the end there are zeros.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk::<N>() else { return [0; N] };
        self.0 = rest;
        *field
    }
    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// Writes fields one after the other.
struct FieldsMut<'a>(&'a mut [u8]);

impl FieldsMut<'_> {
    fn put(&mut self, field: &[u8]) {
        if let Some((place, rest)) = core::mem::take(&mut self.0).split_at_mut_checked(field.len()) {
            place.copy_from_slice(field);
            self.0 = rest;
        }
    }
}

/// What a header says.
#[derive(Clone, Copy)]
pub(super) struct Header {
    pub(super) sections: u32,
    pub(super) total: u64,
    pub(super) table: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut fields = FieldsMut(&mut bytes);
        fields.put(&MAGIC);
        fields.put(&VERSION.to_le_bytes());
        fields.put(&self.sections.to_le_bytes());
        fields.put(&self.total.to_le_bytes());
        fields.put(&self.table.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..HEADER_LEN - CRC_LEN]);
        bytes[HEADER_LEN - CRC_LEN..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The header at the start of `bytes`. The version comes before the checksum: a newer one may sum up otherwise.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        let truncated = ImageError::Length { stated: HEADER_LEN as u64, found: bytes.len() as u64 };
        let header = bytes.first_chunk::<HEADER_LEN>().ok_or(truncated)?;
        let mut fields = Fields(header);
        let magic = fields.take();
        if magic != MAGIC {
            return Err(ImageError::Magic { found: magic });
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(ImageError::Version { found: version, supported: VERSION });
        }
        let (sections, total, table) = (fields.u32(), fields.u64(), fields.u64());
        let reserved: [u8; 28] = fields.take();
        check_crc(Part::Header, fields.u32(), &header[..HEADER_LEN - CRC_LEN])?;
        if reserved != [0; 28] {
            return Err(ImageError::Reserved { part: Part::Header });
        }
        let fits = table >= HEADER_LEN as u64 && table.is_multiple_of(ALIGN as u64);
        if !fits || u64::from(sections) > MAX_SECTIONS as u64 || total_len(table, sections.into()) != Some(total) {
            return Err(ImageError::TableRange { table, total });
        }
        Ok(Self { sections, total, table })
    }
}

pub(super) fn check_crc(part: Part, stated: u32, bytes: &[u8]) -> Result<(), ImageError> {
    let computed = crc32fast::hash(bytes);
    if stated == computed { Ok(()) } else { Err(ImageError::Checksum { part, stated, computed }) }
}

const ROWS: u16 = 1;
const DENSE: u16 = 2;
const BYTES: u16 = 3;
const CONFIG: u16 = 4;

/// An entry's sizes: kind, format, dim, rows, group.
type Sizes = (u16, u16, u32, u64, u32);

fn sizes_of(content: &Content) -> Sizes {
    match *content {
        Content::Rows { format, rows, dim, group } => (ROWS, format_code(format).unwrap_or(0), dim, rows, group),
        Content::Dense { format, rows, dim } => (DENSE, format_code(format).unwrap_or(0), dim, rows, 0),
        Content::Bytes { len } => (BYTES, 0, 0, len, 0),
        Content::Config => (CONFIG, 0, 0, 0, 0),
    }
}

fn content_of(section: Name, (kind, format, dim, rows, group): Sizes) -> Result<Content, ImageError> {
    let unknown = ImageError::Format { section, code: format };
    let content = match kind {
        ROWS => Content::Rows { format: format_of(format).ok_or(unknown)?, rows, dim, group },
        DENSE => Content::Dense { format: format_of(format).ok_or(unknown)?, rows, dim },
        BYTES => Content::Bytes { len: rows },
        CONFIG => Content::Config,
        _ => return Err(ImageError::Kind { section, code: kind }),
    };
    content.check(section)?;
    if sizes_of(&content) == (kind, format, dim, rows, group) {
        Ok(content)
    } else {
        Err(ImageError::Reserved { part: Part::Section(section) })
    }
}

pub(super) fn encode_entry(section: &Section, place: &Place) -> [u8; ENTRY_LEN] {
    let (kind, format, dim, rows, group) = sizes_of(&section.content);
    let mut bytes = [0; ENTRY_LEN];
    let mut fields = FieldsMut(&mut bytes);
    fields.put(section.name.field());
    fields.put(&kind.to_le_bytes());
    fields.put(&format.to_le_bytes());
    fields.put(&dim.to_le_bytes());
    fields.put(&rows.to_le_bytes());
    fields.put(&group.to_le_bytes());
    fields.put(&section.checksum.to_le_bytes());
    for offset in [place.data, place.data_len, place.scales, place.scales_len] {
        fields.put(&offset.to_le_bytes());
    }
    bytes
}

/// The section that an entry describes, if it lies where the sizes of the sections before put it, at `at`.
pub(super) fn decode_entry(bytes: &[u8; ENTRY_LEN], at: u64) -> Result<(Section, Place), ImageError> {
    let mut fields = Fields(bytes);
    let name = Name::decode(&fields.take())?;
    let sizes = (fields.u16(), fields.u16(), fields.u32(), fields.u64(), fields.u32());
    let content = content_of(name, sizes)?;
    let checksum = fields.u32();
    let too_large = super::LayoutError::TooLarge { section: name };
    let place = Place::of(&content, at).ok_or(too_large)?;
    let expected = [
        ("the data's place", place.data),
        ("the data's length", place.data_len),
        ("the scales' place", place.scales),
        ("the scales' length", place.scales_len),
    ];
    for (field, expected) in expected {
        let found = fields.u64();
        if found != expected {
            return Err(ImageError::Range { section: name, field, expected, found });
        }
    }
    if fields.u64() != 0 {
        return Err(ImageError::Reserved { part: Part::Section(name) });
    }
    Ok((Section { name, content, checksum }, place))
}

/// The place of a data that an entry states, unchecked.
pub(super) fn stated_data(bytes: &[u8; ENTRY_LEN]) -> u64 {
    Fields(&bytes[88..]).u64()
}
