//! Images that are damaged or made to harm: each is refused, none is believed, nothing panics.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{File, small};
use memlayer_core::{E4m3, F16, RowStore, Table};
use memlayer_quantize::Image;
use memlayer_quantize::image::{ImageError, LayoutError, Part};
use proptest::prelude::*;

/// CRC-32 bit by bit, as the format's description has it.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

const TABLE_AT: usize = 24;
const ENTRY: usize = 128;

/// An attacker who keeps all checksums right.
struct Forger(File);

impl Forger {
    fn new() -> Self {
        Self(small())
    }
    fn entry(&self, i: usize) -> usize {
        u64_at(self.0.bytes(), TABLE_AT) + i * ENTRY
    }
    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }
    /// Sets a field of entry `i`.
    fn field(self, i: usize, at: usize, bytes: &[u8]) -> Self {
        let at = self.entry(i) + at;
        self.put(at, bytes)
    }
    /// Mends section `i`'s checksum.
    fn mend_section(self, i: usize) -> Self {
        let (entry, b) = (self.entry(i), self.0.bytes());
        let range = |at: usize| u64_at(b, entry + at)..u64_at(b, entry + at) + u64_at(b, entry + at + 8);
        let sum = crc(&[&b[range(88)], &b[range(104)]].concat());
        self.field(i, 84, &sum.to_le_bytes())
    }
    /// Mends the checksums of header and table.
    fn mend(mut self) -> File {
        let (table, len) = (self.entry(0), self.0.bytes().len());
        let bytes = self.0.bytes_mut();
        let sum = crc(&bytes[..60]);
        bytes[60..64].copy_from_slice(&sum.to_le_bytes());
        if let Some(entries) = bytes.get(table..len - 4) {
            let sum = crc(entries);
            bytes[len - 4..].copy_from_slice(&sum.to_le_bytes());
        }
        self.0
    }
    fn refused(self) -> ImageError {
        let file = self.mend();
        walk(file.bytes());
        Image::parse(file.bytes()).unwrap_err()
    }
}

/// Uses whatever of `bytes` can be parsed, in every way.
fn walk(bytes: &[u8]) {
    let Ok(image) = Image::parse(bytes) else { return };
    let _ = image.verify();
    for entry in image.sections() {
        let name = entry.name();
        let _ = (image.config(name), image.bytes(name).map(<[u8]>::len), entry.content().to_string(), entry.verify());
        let _ = image.dense::<f32>(name).map(|rows| rows.codes().iter().sum::<f32>());
        let _ = image.dense::<F16>(name).map(|rows| rows.codes().len());
        let last = |rows: usize| u32::try_from(rows).ok()?.checked_sub(1);
        if let Ok(rows) = image.rows::<i8>(name) {
            last(rows.rows()).map(|id| rows.row(id).value::<f32>(rows.dim() - 1));
        }
        if let Ok(rows) = image.rows::<E4m3>(name) {
            last(rows.rows()).map(|id| rows.row(id).value::<f32>(rows.dim() - 1));
        }
    }
}

fn sound(bytes: &[u8]) -> Result<(), ImageError> {
    Image::parse(bytes)?.verify()
}

#[test]
fn forging_itself_is_sound() {
    let file = (0..7).fold(Forger::new(), Forger::mend_section).mend();
    assert_eq!(file.bytes(), small().bytes());
    sound(file.bytes()).unwrap();
}

/// Every bit of the file matters: header, data, scales, padding, table.
#[test]
fn every_flipped_bit_is_found() {
    let mut file = small();
    for at in 0..file.bytes().len() {
        for bit in 0..8 {
            file.bytes_mut()[at] ^= 1 << bit;
            assert!(sound(file.bytes()).is_err(), "bit {bit} of byte {at}");
            walk(file.bytes());
            file.bytes_mut()[at] ^= 1 << bit;
        }
    }
    sound(file.bytes()).unwrap();
}

#[test]
fn every_truncation_is_found() {
    let file = small();
    let len = file.bytes().len() as u64;
    for cut in 0..file.bytes().len() {
        let stated = if cut < 64 { 64 } else { len };
        let error = Image::parse(&file.bytes()[..cut]).unwrap_err();
        assert_eq!(error, ImageError::Length { stated, found: cut as u64 });
    }
    let longer = File::of(&[file.bytes(), &[0]].concat());
    assert_eq!(Image::parse(longer.bytes()).unwrap_err(), ImageError::Length { stated: len, found: len + 1 });
}

/// What parsing cannot see, since it does not read sections, verifying says exactly.
#[test]
fn damage_is_named() {
    let (file, keys) = (small(), 128);
    let damaged = Forger(file.clone()).put(keys, &[0x55]).0;
    let error = sound(damaged.bytes()).unwrap_err();
    assert!(matches!(error, ImageError::Checksum { part: Part::Section(name), .. } if &*name == "0.keys"));
    let padded = Forger(file).put(keys + 16 * 5 + 3, &[7]).0;
    let error = sound(padded.bytes()).unwrap_err();
    assert_eq!(error.to_string(), "byte 211, padding of section 0.keys, is 0x07 instead of zero");
    let error = sound(Forger::new().put(20, &[1]).0.bytes()).unwrap_err();
    assert!(error.to_string().starts_with("the header is damaged: its checksum is "), "{error}");
}

#[test]
fn other_versions_are_named() {
    let error = Forger::new().put(8, &2u32.to_le_bytes()).refused();
    assert_eq!(error.to_string(), "the image has version 2, newer than the version 1 that can be read");
    let error = Forger::new().put(8, &[0]).refused();
    assert_eq!(error.to_string(), "the image has version 0, but only version 1 can be read");
}

#[test]
fn scales_that_are_not_finite_are_named() {
    let entry = Forger::new().entry(2);
    let scales = u64_at(small().bytes(), entry + 104);
    for bad in [f32::NAN, f32::INFINITY] {
        let file = Forger::new().put(scales + 4 * 11, &bad.to_le_bytes()).mend_section(2).mend();
        let error = sound(file.bytes()).unwrap_err();
        assert_eq!(error.to_string(), format!("section pool: a scale of row 11 is {bad}"));
    }
    // Three scales a row.
    let entry = Forger::new().entry(1);
    let scales = u64_at(small().bytes(), entry + 104);
    let file = Forger::new().put(scales + 4 * 8, &f32::NAN.to_le_bytes()).mend_section(1).mend();
    assert!(matches!(sound(file.bytes()).unwrap_err(), ImageError::Scale { row: 2, .. }));
}

#[test]
fn sections_cannot_overlap_or_move() {
    let pool = u64_at(small().bytes(), Forger::new().entry(2) + 88) as u64;
    // Onto the section before, into the header, behind the end, to the end of the address space.
    for place in [pool - 64, 0, pool + 64, 1 << 20, u64::MAX, u64::MAX - 63] {
        let error = Forger::new().field(2, 88, &place.to_le_bytes()).refused();
        assert!(matches!(error, ImageError::Range { field: "the data's place", found, .. } if found == place));
        let error = Forger::new().field(2, 104, &place.to_le_bytes()).refused();
        assert!(matches!(error, ImageError::Range { field: "the scales' place", .. }));
        let error = Forger::new().field(2, 96, &place.to_le_bytes()).refused();
        assert!(matches!(error, ImageError::Range { field: "the data's length", .. }));
        let error = Forger::new().field(2, 112, &place.to_le_bytes()).refused();
        assert!(matches!(error, ImageError::Range { field: "the scales' length", .. }));
    }
}

#[test]
fn swapped_sections_are_found() {
    let forger = Forger::new();
    let (one, two) = (forger.entry(1), forger.entry(2));
    let entries: Vec<u8> = forger.0.bytes()[one..one + 2 * ENTRY].to_vec();
    let swapped = forger.put(one, &entries[ENTRY..]).put(two, &entries[..ENTRY]);
    assert!(matches!(swapped.refused(), ImageError::Range { .. }));
    // Names alone: the table is damaged, and with its checksum mended, contents say what they are.
    let renamed = Forger::new().field(1, 0, &entries[ENTRY..ENTRY + 64]).field(2, 0, &entries[..64]);
    assert!(matches!(Image::parse(renamed.0.bytes()).unwrap_err(), ImageError::Checksum { part: Part::Table, .. }));
    let file = renamed.mend();
    assert!(Image::parse(file.bytes()).unwrap().rows::<i8>("pool").is_err());
}

#[test]
fn absurd_sizes_are_refused_without_work() {
    let rows = |rows: u64| Forger::new().field(2, 72, &rows.to_le_bytes());
    assert!(matches!(rows(1 << 60).refused(), ImageError::Layout(LayoutError::Size { field: "rows", .. })));
    assert!(matches!(rows(u64::MAX).refused(), ImageError::Layout(LayoutError::Size { field: "rows", .. })));
    assert!(matches!(rows(1 << 32).refused(), ImageError::Range { .. }));
    let wide = rows(1 << 32).field(2, 68, &[0xff; 4]).field(2, 80, &[1, 0, 0, 0]);
    assert!(matches!(wide.refused(), ImageError::Layout(LayoutError::TooLarge { .. })));
    let bytes = Forger::new().field(6, 72, &u64::MAX.to_le_bytes()).field(6, 96, &u64::MAX.to_le_bytes());
    assert!(matches!(bytes.refused(), ImageError::Layout(LayoutError::TooLarge { .. })));
    // Sizes that agree with each other, of a section that reaches into the table.
    let long = Forger::new().field(6, 72, &100u64.to_le_bytes()).field(6, 96, &100u64.to_le_bytes());
    assert!(matches!(long.refused(), ImageError::End { .. }));
}

#[test]
fn hostile_headers_are_refused() {
    let len = small().bytes().len() as u64;
    for sections in [0u32, 6, 8, 4097, u32::MAX] {
        assert!(matches!(Forger::new().put(12, &sections.to_le_bytes()).refused(), ImageError::TableRange { .. }));
    }
    for total in [0, 64, len - 1, len + 1, u64::MAX] {
        let error = Forger::new().put(16, &total.to_le_bytes()).refused();
        assert!(matches!(error, ImageError::TableRange { .. }), "{error}");
    }
    let mut header = small();
    for table in [0u64, 1, 63, 64, 1 << 40, u64::MAX, u64::MAX - 63] {
        header.bytes_mut()[24..32].copy_from_slice(&table.to_le_bytes());
        let sum = crc(&header.bytes()[..60]).to_le_bytes();
        header.bytes_mut()[60..64].copy_from_slice(&sum);
        assert!(matches!(Image::parse(header.bytes()).unwrap_err(), ImageError::TableRange { .. }));
    }
    assert_eq!(Forger::new().put(40, &[1]).refused(), ImageError::Reserved { part: Part::Header });
}

#[test]
fn hostile_entries_are_refused() {
    let refused = |i, at, bytes: &[u8]| Forger::new().field(i, at, bytes).refused();
    assert!(matches!(refused(2, 64, &[5, 0]), ImageError::Kind { code: 5, .. }));
    assert_eq!(refused(2, 66, &[9, 0]).to_string(), "section pool is in unknown format 9");
    assert!(matches!(refused(2, 66, &[0, 0]), ImageError::Format { code: 0, .. }));
    assert!(matches!(refused(2, 68, &[0; 4]), ImageError::Layout(LayoutError::Size { .. })));
    assert!(matches!(refused(2, 80, &[0; 4]), ImageError::Layout(LayoutError::Size { field: "group", found: 0, .. })));
    assert!(matches!(refused(2, 80, &[7, 0, 0, 0]), ImageError::Layout(LayoutError::Size { field: "group", .. })));
    assert!(matches!(refused(2, 80, &[1, 0, 0, 0]), ImageError::Range { .. }), "more scales than there are");
    assert!(matches!(refused(2, 120, &[1]), ImageError::Reserved { .. }));
    assert!(matches!(refused(3, 80, &[1]), ImageError::Reserved { .. }), "a dense section has no group");
    assert!(matches!(refused(6, 66, &[1]), ImageError::Reserved { .. }), "bytes have no format");
    assert!(matches!(refused(0, 72, &[1]), ImageError::Reserved { .. }), "a configuration has no rows");
    assert!(matches!(refused(2, 0, &[0]), ImageError::Layout(LayoutError::Name { len: 0 })));
    assert!(matches!(refused(2, 0, &[0xff]), ImageError::Layout(LayoutError::Name { .. })));
    assert!(matches!(refused(2, 1, b"\x1b"), ImageError::Layout(LayoutError::Name { .. })), "a terminal's escape");
    assert!(matches!(refused(2, 63, b"x"), ImageError::Layout(LayoutError::Name { len: 4 })), "hidden bytes");
    assert!(matches!(refused(2, 0, b"empty"), ImageError::Layout(LayoutError::Duplicate { .. })));
}

#[test]
fn hostile_configurations_are_refused() {
    let refused = |at: usize, bytes: &[u8]| {
        let file = Forger::new().put(64 + at, bytes).mend_section(0).mend();
        let error = sound(file.bytes()).unwrap_err();
        assert_eq!(Image::parse(file.bytes()).unwrap().config("0.config").unwrap_err(), error);
        error.to_string()
    };
    assert_eq!(refused(0, &[2]), "section 0.config: the configuration's kind cannot be 2 on this machine");
    assert_eq!(refused(1, &[3]), "section 0.config: the configuration's parts cannot be 3 on this machine");
    assert_eq!(refused(2, &[8]), "section 0.config: the configuration's flags cannot be 8 on this machine");
    assert_eq!(
        refused(7, &[1]),
        "section 0.config: the configuration's reserved bytes cannot be 4294967296 on this machine"
    );
    assert_eq!(refused(56, &[9]), "section 0.config: top_k 9 exceeds sub_keys 4");
    assert_eq!(refused(8, &[0xff; 8]), "section 0.config: the value table exceeds the address space of this machine");
    // Without verifying: a damaged configuration is never believed.
    let damaged = Forger::new().put(64 + 56, &[1]).0;
    let error = Image::parse(damaged.bytes()).unwrap().config("0.config").unwrap_err();
    assert!(matches!(error, ImageError::Checksum { part: Part::Section(_), .. }));
}

/// The limit on sections bounds the search for equal names.
#[test]
fn many_sections_take_no_time() {
    use memlayer_quantize::image::{Section, Writer, encoded_len};
    let mut plan: Vec<Section> = (0..4096).map(|i| Section::bytes(&format!("{i:064}"), 0).unwrap()).collect();
    let mut file = File::zeroed(usize::try_from(encoded_len(&plan).unwrap()).unwrap());
    let names: Vec<String> = plan.iter().map(|s| s.name().to_owned()).collect();
    let mut writer = Writer::new(file.bytes_mut(), &mut plan).unwrap();
    names.iter().for_each(|name| writer.bytes(name, &[]).unwrap());
    writer.finish().unwrap();
    sound(file.bytes()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        walk(File::of(&bytes).bytes());
        prop_assert!(Image::parse(&bytes).is_err());
    }

    /// Behind checksums that are right.
    #[test]
    fn arbitrary_fields_do_not_panic(
        entries in prop::collection::vec((0..7usize, 0..ENTRY, any::<[u8; 4]>(), 1..=4usize), 0..4),
        data in prop::collection::vec((64..1000usize, any::<u8>()), 0..20),
    ) {
        let mut forger = Forger::new();
        for (at, byte) in data {
            forger = forger.put(at, &[byte]);
        }
        for (entry, at, bytes, len) in entries {
            let len = len.min(ENTRY - at);
            forger = forger.field(entry, at, &bytes[..len]);
        }
        walk(forger.mend().bytes());
    }

    #[test]
    fn bursts_are_found(at in any::<prop::sample::Index>(), bytes in any::<[u8; 4]>()) {
        let mut file = small();
        let at = at.index(file.bytes().len() - 3);
        let place = &mut file.bytes_mut()[at..at + 4];
        prop_assume!(place != bytes);
        place.copy_from_slice(&bytes);
        prop_assert!(sound(file.bytes()).is_err());
    }
}
