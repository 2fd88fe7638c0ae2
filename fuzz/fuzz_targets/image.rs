//! Any bytes as an image: whatever parses is used in every way there is, and what verifies is what the writer writes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::{Bf16, E4m3, E5m2, Element, F16, RowStore, Table};
use memlayer_fuzz::file::{File, mend};
use memlayer_quantize::Image;
use memlayer_quantize::image::{Content, Entry, Section, Writer, encoded_len};

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if mode % 4 != 0 {
        mend(&mut bytes);
    }
    let file = File::new(&bytes);
    let bytes = file.bytes();
    match Image::stated_len(bytes) {
        Ok(stated) => assert!(stated >= 64),
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(Image::parse(bytes).is_err(), "a header is part of an image");
        }
    }
    match Image::parse(bytes) {
        Ok(image) => walk(&image, bytes),
        Err(error) => assert!(!error.to_string().is_empty() && !format!("{error:?}").is_empty()),
    }
});

fn walk(image: &Image<'_>, bytes: &[u8]) {
    assert!(format!("{image:?}").len() >= image.sections().len());
    assert!(image.config("no such section").is_err() && image.bytes("\n").is_err());
    for entry in image.sections() {
        let name = entry.name();
        assert!(!name.is_empty() && !name.chars().any(char::is_control));
        assert_eq!(image.section(name).map(|found| found.content()), Some(entry.content()));
        let _ = (entry.checksum(), entry.verify(), entry.config().map(|config| config.activations_req(1)));
        let readable = usize::from(reads::<f32>(&entry))
            + usize::from(reads::<F16>(&entry))
            + usize::from(reads::<Bf16>(&entry))
            + usize::from(reads::<i8>(&entry))
            + usize::from(reads::<E4m3>(&entry))
            + usize::from(reads::<E5m2>(&entry));
        let rows = entry.content().format().is_some();
        assert_eq!(readable, usize::from(rows), "rows are readable in their format and in no other");
        assert_eq!(entry.bytes().is_ok(), matches!(entry.content(), Content::Bytes { .. }));
    }
    if image.verify().is_ok() {
        assert!(written(image).is_some_and(|again| again == bytes), "an image has a single form");
    }
}

/// Reads the first, middle and last row, if they are of this format.
fn reads<E: Element>(entry: &Entry<'_>) -> bool {
    if let Ok(rows) = entry.rows::<E>() {
        read(&rows);
        return true;
    }
    if let Ok(rows) = entry.dense::<E>() {
        assert_eq!(rows.codes().len(), rows.rows() * rows.dim());
        read(&rows);
        return true;
    }
    false
}

fn read(table: &impl RowStore) {
    let last = u32::try_from(table.rows()).unwrap_or(u32::MAX).wrapping_sub(1);
    for id in if table.rows() == 0 { vec![] } else { vec![0, last / 2, last] } {
        table.prefetch(id);
        let row = table.row(id);
        for i in [0, table.dim() / 2, table.dim() - 1] {
            let (value, exact): (f32, f64) = (row.value(i), row.value(i));
            assert_eq!(value.is_nan(), exact.is_nan());
        }
    }
    table.prefetch(u32::MAX);
}

/// The same content, written anew.
fn written(image: &Image<'_>) -> Option<Vec<u8>> {
    let mut plan: Vec<Section> =
        image.sections().map(|entry| Section::new(entry.name(), entry.content()).ok()).collect::<Option<_>>()?;
    let mut bytes = vec![0xaa; usize::try_from(encoded_len(&plan).ok()?).ok()?];
    let mut writer = Writer::new(&mut bytes[..], &mut plan).ok()?;
    for entry in image.sections() {
        writer.begin(entry.name()).ok()?;
        match entry.content() {
            Content::Config => writer.append(&raw(image, &entry)?).ok()?,
            Content::Bytes { .. } => writer.append(entry.bytes().ok()?).ok()?,
            _ => {
                append::<f32>(&mut writer, &entry)
                    .or_else(|| append::<F16>(&mut writer, &entry))
                    .or_else(|| append::<Bf16>(&mut writer, &entry))
                    .or_else(|| append::<i8>(&mut writer, &entry))
                    .or_else(|| append::<E4m3>(&mut writer, &entry))
                    .or_else(|| append::<E5m2>(&mut writer, &entry))?;
            }
        }
        writer.end().ok()?;
    }
    assert!(writer.finish().ok()?.is_empty());
    Some(bytes)
}

/// A configuration through its fields, as bytes.
fn raw(image: &Image<'_>, entry: &Entry<'_>) -> Option<[u8; 64]> {
    let mut plan = [Section::config("c").ok()?];
    let mut bytes = [0; 512];
    let mut writer = Writer::new(&mut bytes[..], &mut plan).ok()?;
    writer.config("c", &image.config(entry.name()).ok()?).ok()?;
    writer.finish().ok()?;
    bytes[64..].first_chunk().copied()
}

fn append<E: Element>(writer: &mut Writer<'_, &mut [u8]>, entry: &Entry<'_>) -> Option<()> {
    if let Ok(table) = entry.dense::<E>() {
        return writer.append(table.codes()).ok();
    }
    let table = entry.rows::<E>().ok()?;
    let ids = || (0..table.rows()).map(|id| u32::try_from(id).expect("at most 2^32 rows"));
    ids().try_for_each(|id| writer.append(table.row(id).codes).ok())?;
    ids().try_for_each(|id| writer.append(table.row(id).scales).ok())
}
