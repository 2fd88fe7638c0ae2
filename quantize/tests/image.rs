//! Images that are sound: written, read in place, refused where they must be.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{CONFIG, sections, small};
use memlayer_core::config::Kind;
use memlayer_core::{Bf16, Config, DenseRows, E4m3, E5m2, F16, RowStore, ScaledRows, Table};
use memlayer_quantize::image::{
    Aligned, Content, Full, ImageError, LayoutError, Section, Sink, WriteError, Writer, encoded_len,
};
use memlayer_quantize::{Image, Pack, PackError, pack_rows};
use proptest::prelude::*;

#[test]
fn everything_comes_back() {
    let file = small();
    let image = Image::parse(file.bytes()).unwrap();
    image.verify().unwrap();
    let names: Vec<String> = image.sections().map(|s| format!("{}: {}", s.name(), s.content())).collect();
    assert_eq!(
        names,
        [
            "0.config: a layer's configuration",
            "0.keys: 16 e4m3 rows of 5 values in groups of 2",
            "pool: 15 int8 rows of 6 values",
            "0.query: 3 dense f32 rows of 7 values",
            "empty: 0 bytes",
            "half: 5 dense f16 rows of 1 values",
            "tokenizer.json: 17 bytes",
        ]
    );
    assert_eq!(image.config("0.config").unwrap(), CONFIG);
    assert_eq!(image.bytes("tokenizer.json").unwrap(), b"{\"vocabulary\":[]}");
    assert_eq!(image.bytes("empty").unwrap(), b"");
    assert_eq!(image.dense::<f32>("0.query").unwrap().codes(), common::matrix());
    assert_eq!(image.dense::<F16>("half").unwrap().rows(), 5);
    let (pool, source) = (image.rows::<i8>("pool").unwrap(), common::table(15 * 6));
    assert_eq!((pool.rows(), pool.dim()), (15, 6));
    for id in 0..15 {
        for i in 0..6 {
            let error = pool.row(id).value::<f32>(i) - source[id as usize * 6 + i];
            assert!(f64::from(error.abs()) <= 1e-6 + i8::error_bound(3.0, pool.row(id).scales[0]));
        }
    }
    let keys = image.rows::<E4m3>("0.keys").unwrap();
    assert_eq!((keys.row(15).scales.len(), keys.row(15).group, keys.row(15).codes.len()), (3, 2, 5));
}

/// Sections start at multiples of 64 and are borrowed, not copied.
#[test]
fn rows_lie_in_the_file() {
    let file = small();
    let image = Image::parse(file.bytes()).unwrap();
    let range = file.bytes().as_ptr_range();
    let rows = image.rows::<i8>("pool").unwrap();
    let row = rows.row(0);
    for address in [row.codes.as_ptr().cast::<u8>(), row.scales.as_ptr().cast(), image.bytes("empty").unwrap().as_ptr()]
    {
        assert!(range.contains(&address));
        assert_eq!((address as usize - range.start as usize) % 64, 0);
    }
}

#[test]
fn what_is_not_there_is_named() {
    let file = small();
    let image = Image::parse(file.bytes()).unwrap();
    let text = |error: ImageError| error.to_string();
    assert_eq!(text(image.rows::<i8>("1.values").unwrap_err()), "the image has no section 1.values");
    assert_eq!(text(image.bytes(&"long\n".repeat(30)).unwrap_err()).len(), "the image has no section ".len() + 64);
    assert_eq!(
        text(image.rows::<E5m2>("pool").unwrap_err()),
        "section pool holds 15 int8 rows of 6 values, not e5m2 rows"
    );
    assert_eq!(
        text(image.dense::<F16>("0.query").unwrap_err()),
        "section 0.query holds 3 dense f32 rows of 7 values, not f16 dense rows"
    );
    assert_eq!(
        text(image.config("pool").unwrap_err()),
        "section pool holds 15 int8 rows of 6 values, not a layer's configuration"
    );
    assert!(
        image.bytes("pool").is_err() && image.rows::<f32>("0.query").is_err() && image.dense::<i8>("pool").is_err()
    );
}

fn write(sections: &mut [Section], fill: impl FnOnce(&mut Writer<'_, &mut [u8]>)) -> common::File {
    let mut file = common::File::zeroed(usize::try_from(encoded_len(sections).unwrap()).unwrap());
    let mut writer = Writer::new(file.bytes_mut(), sections).unwrap();
    fill(&mut writer);
    assert!(writer.finish().unwrap().is_empty(), "the length is exact");
    file
}

/// Every format, packed on the way and in pieces: the same bytes as packed before.
#[test]
fn streaming_writes_the_same_bytes() {
    fn check<E: Pack>(group: usize) {
        let source = common::table(50 * 24);
        let table = DenseRows::new(&source, 24);
        let plan = if E::SCALED { Section::rows::<E>("t", 50, 24, group) } else { Section::dense::<E>("t", 50, 24) };
        let scales_len = if E::SCALED { 50 * 24usize.div_ceil(group) } else { 0 };
        let (mut codes, mut scales) = (vec![E::default(); 50 * 24], vec![0f32; scales_len]);
        let report = pack_rows(&table, group, &mut codes, &mut scales).unwrap();
        let whole = write(&mut [plan.unwrap()], |w| {
            if E::SCALED { w.rows("t", &codes, &scales) } else { w.dense("t", &codes) }.unwrap();
        });
        let packed = write(&mut [plan.unwrap()], |w| {
            assert_eq!(w.pack("t", &table, &mut [E::default(); 24]).unwrap(), report);
        });
        let pieces = write(&mut [plan.unwrap()], |w| {
            w.begin("t").unwrap();
            let bytes = [bytemuck::cast_slice::<E, u8>(&codes), bytemuck::cast_slice(&scales)].concat();
            bytes.chunks(77).for_each(|piece| w.append(piece).unwrap());
            w.end().unwrap();
        });
        assert_eq!(whole.bytes(), packed.bytes());
        assert_eq!(whole.bytes(), pieces.bytes());
        Image::parse(whole.bytes()).unwrap().verify().unwrap();
    }
    for group in [24, 7, 1] {
        check::<i8>(group);
        check::<E4m3>(group);
        check::<E5m2>(group);
    }
    check::<F16>(24);
    check::<Bf16>(24);
    check::<f32>(24);
}

#[test]
fn writers_keep_to_the_plan() {
    let mut buffer = [0u8; 8192];
    let mut plan = sections();
    let mut writer = Writer::new(&mut buffer[..], &mut plan).unwrap();
    assert_eq!(
        writer.bytes("pool", &[]).unwrap_err().to_string(),
        "a section is written out of turn: 0.config is next"
    );
    assert!(matches!(writer.append(&[0u8]).unwrap_err(), WriteError::Incomplete { section: None, .. }));
    assert!(matches!(writer.end().unwrap_err(), WriteError::Incomplete { section: None, .. }));
    writer.config("0.config", &CONFIG).unwrap();
    writer.begin("0.keys").unwrap();
    writer.append(&[0u8; 16 * 5 + 4]).unwrap();
    assert_eq!(writer.end().unwrap_err().to_string(), "188 bytes of section 0.keys are missing");
    assert_eq!(writer.begin("pool").unwrap_err().to_string(), "188 bytes of section 0.keys are missing");
    assert_eq!(writer.append(&[0u8; 189]).unwrap_err().to_string(), "1 bytes more than section 0.keys holds");
    writer.append(&[0f32; 47]).unwrap();
    writer.end().unwrap();
    let error = writer.rows("pool", &[E4m3(0); 96], &[1.0; 16]).unwrap_err();
    assert_eq!(error.to_string(), "section pool was to hold 15 int8 rows of 6 values");
    assert!(matches!(writer.finish().unwrap_err(), WriteError::Incomplete { missing: 150, .. }));
}

#[test]
fn a_value_that_cannot_be_packed_is_named_with_its_section() {
    let mut plan = [Section::rows::<i8>("values", 2, 2, 2).unwrap()];
    let mut buffer = [0u8; 1024];
    let mut writer = Writer::new(&mut buffer[..], &mut plan).unwrap();
    let error = writer.pack("values", &DenseRows::new(&[1.0, 2.0, 3.0, f32::NAN], 2), &mut [0i8; 2]).unwrap_err();
    assert!(matches!(error, WriteError::Pack { error: PackError::NonFinite { row: 1, column: 1, .. }, .. }));
    assert_eq!(error.to_string(), "section values: row 1, column 1 is NaN, which cannot be packed");
}

#[test]
fn a_full_sink_ends_it() {
    let mut plan = sections();
    let len = usize::try_from(encoded_len(&plan).unwrap()).unwrap();
    for short in 0..len {
        let mut buffer = vec![0u8; short];
        let result = Writer::new(&mut buffer[..], &mut plan).and_then(|mut writer| {
            common::fill(&mut writer)?;
            writer.finish().map(drop)
        });
        assert!(matches!(result, Err(WriteError::Sink(Full { missing: 1.. }))), "{short} of {len}");
    }
}

/// A sink of one's own.
#[test]
fn sinks_see_every_byte_once() {
    struct Collect(Vec<u8>);
    impl Sink for Collect {
        type Error = core::convert::Infallible;
        fn write(&mut self, bytes: &[u8]) -> Result<(), Self::Error> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
    }
    let mut plan = sections();
    let mut writer = Writer::new(Collect(Vec::new()), &mut plan).unwrap();
    common::fill(&mut writer).unwrap();
    assert_eq!(writer.finish().unwrap().0, small().bytes());
}

#[test]
fn plans_that_make_no_image_are_refused() {
    let text = |section: Result<Section, LayoutError>| section.unwrap_err().to_string();
    let name = "a name of {} bytes is not 1 to 64 bytes of UTF-8 without control characters";
    assert_eq!(text(Section::bytes("", 1)), name.replace("{}", "0"));
    assert_eq!(text(Section::bytes(&"é".repeat(33), 1)), name.replace("{}", "66"));
    assert_eq!(text(Section::bytes("a\0b", 1)), name.replace("{}", "3"));
    assert!(Section::bytes(&"é".repeat(32), 1).is_ok());
    assert_eq!(text(Section::rows::<i8>("v", 1, 0, 1)), "section v: group cannot be 1");
    assert_eq!(text(Section::dense::<f32>("v", 1, 0)), "section v: dim cannot be 0");
    assert_eq!(text(Section::rows::<i8>("v", 1, 4, 0)), "section v: group cannot be 0");
    assert_eq!(text(Section::rows::<i8>("v", 1 << 33, 4, 4)), "section v: rows cannot be 8589934592");
    assert_eq!(text(Section::dense::<i8>("v", 1, 1 << 32)), "section v: dim cannot be 4294967296");
    assert_eq!(text(Section::dense::<f64>("v", 1, 1)), "section v: an image has no rows of f64");
    let twice = [Section::bytes("a", 1).unwrap(), Section::config("a").unwrap()];
    assert_eq!(encoded_len(&twice).unwrap_err().to_string(), "two sections are called a");
    let huge = Section::bytes("huge", usize::MAX - 100).unwrap();
    assert_eq!(encoded_len(&[huge]).unwrap_err().to_string(), "section huge ends beyond 2^64 bytes");
    let many: Vec<Section> = (0..4097).map(|i| Section::bytes(&i.to_string(), 0).unwrap()).collect();
    assert!(encoded_len(&many).is_err());
    assert_eq!(encoded_len(&many[1..]).unwrap(), 64 + 4096 * 128 + 4);
}

#[test]
fn an_empty_image_is_one() {
    let file = write(&mut [], |_| ());
    let image = Image::parse(file.bytes()).unwrap();
    image.verify().unwrap();
    assert_eq!((image.sections().len(), file.bytes().len()), (0, 68));
}

#[test]
fn a_table_of_no_rows_is_one() {
    let plan = [Section::rows::<i8>("v", 0, 8, 4), Section::dense::<f32>("d", 0, u32::MAX as usize)];
    let file = write(&mut plan.map(Result::unwrap), |w| {
        w.rows::<i8>("v", &[], &[]).unwrap();
        w.dense::<f32>("d", &[]).unwrap();
    });
    let image = Image::parse(file.bytes()).unwrap();
    image.verify().unwrap();
    assert_eq!(image.rows::<i8>("v").unwrap().rows(), 0);
    assert_eq!(image.dense::<f32>("d").unwrap().dim(), u32::MAX as usize);
}

#[test]
fn alignment_is_checked() {
    let file = small();
    let mut moved = common::File::zeroed(file.bytes().len() + 4);
    for by in 1..=4 {
        let place = &mut moved.bytes_mut()[by..by + file.bytes().len()];
        place.copy_from_slice(file.bytes());
        match Image::parse(place) {
            Ok(image) if by == 4 => image.verify().unwrap(),
            other => assert_eq!(other.unwrap_err(), ImageError::Alignment { off_by: by }),
        }
    }
}

#[test]
fn images_print_what_they_hold() {
    let file = small();
    let text = format!("{:?}", Image::parse(file.bytes()).unwrap());
    assert!(text.starts_with("[0.config: a layer's configuration, 0.keys: 16 e4m3 rows"), "{text}");
}

#[test]
fn statics_are_aligned() {
    static TEXT: &Aligned<[u8]> = &Aligned(*b"not an image, but sixty-four bytes of text that lie where one could.");
    assert_eq!(TEXT.0.as_ptr() as usize % 64, 0);
    assert_eq!(Image::parse(&TEXT.0).unwrap_err().to_string(), "not an image: it begins with not an i");
}

#[test]
fn the_length_is_known_from_the_header() {
    let file = small();
    assert_eq!(Image::stated_len(&file.bytes()[..64]), Ok(file.bytes().len() as u64));
    assert!(Image::stated_len(&file.bytes()[..63]).is_err());
}

fn config() -> impl Strategy<Value = Config> {
    let sizes = (1..2000usize, 1..2000usize, 1..2000usize, 1..16usize, 1..5000usize, 1..500usize);
    (sizes, any::<[bool; 5]>(), any::<prop::sample::Index>()).prop_filter_map("a layer", |(sizes, flags, top_k)| {
        let (input, output, value, heads, sub_keys, half) = sizes;
        let [peer, flat, qk_norm, silu, sigmoid] = flags;
        let builder = Config::builder(input).output_dim(output).value_dim(value).heads(heads).sub_keys(sub_keys);
        let builder = builder.half_dim(half).top_k(top_k.index(sub_keys) + 1).qk_norm(qk_norm).silu_gate(silu);
        let builder = builder.sigmoid_gate(sigmoid).kind(if peer { Kind::Peer } else { Kind::Memory });
        if flat { builder.flat_keys() } else { builder }.build().ok()
    })
}

proptest! {
    #[test]
    fn configurations_come_back(config in config()) {
        let file = write(&mut [Section::config("c").unwrap()], |w| w.config("c", &config).unwrap());
        prop_assert_eq!(Image::parse(file.bytes()).unwrap().config("c").unwrap(), config);
    }

    #[test]
    fn sections_come_back(parts in prop::collection::vec((0..5usize, 0..40usize, 1..40usize, any::<u8>()), 0..8)) {
        let plan: Vec<Section> = parts.iter().enumerate().map(|(i, &(kind, rows, dim, _))| {
            let name = format!("{i}");
            match kind {
                0 => Section::bytes(&name, rows),
                1 => Section::dense::<f32>(&name, rows, dim),
                2 => Section::rows::<i8>(&name, rows, dim, dim),
                3 => Section::rows::<E5m2>(&name, rows, dim, dim.div_ceil(2)),
                _ => Section::dense::<Bf16>(&name, rows, dim),
            }.unwrap()
        }).collect();
        let file = write(&mut plan.clone(), |w| for (section, part) in plan.iter().zip(&parts) {
            w.begin(section.name()).unwrap();
            while w.append(&[part.3 & 0x3f]).is_ok() {}
            w.end().unwrap();
        });
        let image = Image::parse(file.bytes()).unwrap();
        image.verify().unwrap();
        for (section, entry) in plan.iter().zip(image.sections()) {
            prop_assert_eq!((section.name(), section.content()), (entry.name(), entry.content()));
            if let Content::Rows { .. } = section.content() {
                prop_assert!(entry.rows::<i8>().is_ok() || entry.rows::<E5m2>().is_ok());
            }
        }
    }

    /// A row of an image is the row that was packed.
    #[test]
    fn rows_come_back(values in prop::collection::vec(-10f32..10.0, 1..60), dim in 1..8usize) {
        let rows = values.len() / dim;
        let values = &values[..rows * dim];
        let (mut codes, mut scales) = (vec![0i8; values.len()], vec![0f32; rows]);
        pack_rows(&DenseRows::new(values, dim), dim, &mut codes, &mut scales).unwrap();
        let file = write(&mut [Section::rows::<i8>("v", rows, dim, dim).unwrap()], |w| w.rows("v", &codes, &scales).unwrap());
        let stored = Image::parse(file.bytes()).unwrap().rows::<i8>("v").unwrap();
        let packed = ScaledRows::new(&codes, &scales, dim, dim).unwrap();
        for id in 0..u32::try_from(rows).unwrap() {
            prop_assert_eq!(stored.row(id).codes, packed.row(id).codes);
            prop_assert_eq!(stored.row(id).scales, packed.row(id).scales);
        }
    }
}
