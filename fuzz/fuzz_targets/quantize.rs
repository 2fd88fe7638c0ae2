//! Packing rows of any bits, in every format: refused and named, or within the error bound of the format, the same
//! through an image, and packed again without a change.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::{Bf16, Config, DenseRows, E4m3, E5m2, Element, F16, Int4, RowStore, ScaledRows, Table};
use memlayer_fuzz::file::File;
use memlayer_fuzz::{Input, Values};
use memlayer_quantize::fbgemm::FbgemmRows;
use memlayer_quantize::image::{Image, Section, Writer, encoded_len};
use memlayer_quantize::int4::{error_bound, pack_int4_rows};
use memlayer_quantize::keys::prepare_keys;
use memlayer_quantize::report::{Budget, compare, kept_share};
use memlayer_quantize::{Pack, PackError, PackReport, pack_rows};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    let (rows, dim) = (input.size(0..=6), input.size(1..=24));
    let group = input.size(0..=dim + 1);
    let kind = input.pick([Values::Any, Values::Exact, Values::Special]);
    let mut values = input.values(rows * dim, kind);
    if input.size(0..=3) > 0 {
        // Most rows are finite, and lie around one magnitude.
        let scale = f32::from_bits(((input.bits() >> 40) as u32 % 254 + 1) << 23);
        values.iter_mut().for_each(|v| *v = if v.is_finite() { v.rem_euclid(4.0) - 2.0 } else { 1.0 } * scale);
    }
    match input.size(0..=9) {
        0 => packs::<i8>(&values, dim, group),
        1 => packs::<E4m3>(&values, dim, group),
        2 => packs::<E5m2>(&values, dim, group),
        3 => packs::<F16>(&values, dim, group),
        4 => packs::<Bf16>(&values, dim, group),
        5 => packs::<f32>(&values, dim, group),
        6 => casts(&values),
        7 => int4::<32>(&values, dim),
        8 => int4::<64>(&values, dim),
        _ => others(input, &values),
    }
});

fn packs<E: Pack>(values: &[f32], dim: usize, group: usize) {
    let source = DenseRows::new(values, dim);
    let groups = if E::SCALED && group > 0 { dim.div_ceil(group) } else { 0 };
    let (mut codes, mut scales) = (vec![E::default(); values.len()], vec![f32::NAN; source.rows() * groups]);
    let report = match pack_rows(&source, group, &mut codes, &mut scales) {
        Ok(report) => report,
        Err(error) => return is_named::<E>(&error, values, dim, group),
    };
    for (at, &value) in values.iter().enumerate() {
        let scale = if E::SCALED { scales[at / dim * groups + at % dim / group] } else { 1.0 };
        assert!(scale.is_finite() && scale > 0.0, "scale {scale} for {value:e}");
        let packed = f64::from(scale) * E::value::<f64>(&codes, at);
        let (error, bound) = ((packed - f64::from(value)).abs(), E::error_bound(value, scale));
        assert!(error <= bound, "{} {value:e} became {packed:e}, off by {error:e}, bound {bound:e}", E::FORMAT);
    }
    let measured = if E::SCALED {
        let packed = ScaledRows::new(&codes, &scales, dim, group).expect("rows");
        through_an_image(&source, &codes, &scales, group, &report);
        compare(&source, &packed)
    } else {
        compare(&source, &DenseRows::new(&codes, dim))
    };
    assert_eq!(measured, Some(report), "the report is what comparing finds");
    assert!(report.within(&Budget::default()).is_ok() && !report.to_string().is_empty());
}

/// Rows of 4-bit integers: the same questions, their scales being among the codes.
fn int4<const G: usize>(values: &[f32], dim: usize)
where
    Int4<G>: Element,
{
    let source = DenseRows::new(values, dim);
    let mut codes = vec![Int4::<G>(0xff); source.rows() * Int4::<G>::codes(dim)];
    let report = match pack_int4_rows(&source, &mut codes) {
        Ok(report) => report,
        Err(PackError::NonFinite { row, column, value }) => {
            return assert!(!value.is_finite() && values[row * dim + column].to_bits() == value.to_bits());
        }
        Err(PackError::OutOfRange { row, column, value, .. }) => {
            return assert!(values[row * dim + column] == value && value.abs() > 8.0 * 65_504.0);
        }
        Err(error) => panic!("{error}"),
    };
    let packed = DenseRows::new(&codes, dim);
    assert_eq!(compare(&source, &packed), Some(report), "the report is what comparing finds");
    for (at, &value) in values.iter().enumerate() {
        let row = packed.row(u32::try_from(at / dim).expect("few rows"));
        let scale = Int4::scale(&row.codes[at % dim / G * Int4::<G>::GROUP..]);
        let (error, bound) = ((row.value::<f64>(at % dim) - f64::from(value)).abs(), error_bound(scale));
        assert!(error <= bound, "{value:e} is off by {error:e} with a scale of {scale:e}");
    }
}

/// An error is about something that is there.
fn is_named<E: Pack>(error: &PackError, values: &[f32], dim: usize, group: usize) {
    assert!(!error.to_string().is_empty());
    match *error {
        PackError::NonFinite { row, column, value } => {
            assert!(!value.is_finite() && values[row * dim + column].to_bits() == value.to_bits());
        }
        PackError::OutOfRange { row, column, value, .. } => {
            assert!(!E::SCALED && values[row * dim + column] == value && value.abs() >= E::REACH);
        }
        PackError::Group { .. } => assert!(group == 0 || group > dim),
        _ => panic!("{error}"),
    }
}

/// Written packed and packed on the way: the same bytes, and the same rows when read in place.
fn through_an_image<E: Pack>(
    source: &DenseRows<'_, f32>,
    codes: &[E],
    scales: &[f32],
    group: usize,
    report: &PackReport,
) {
    let (rows, dim) = (source.rows(), source.dim());
    let mut plan = [Section::rows::<E>("t", rows, dim, group).expect("a section")];
    let len = usize::try_from(encoded_len(&plan).expect("a layout")).expect("a length");
    let (mut whole, mut streamed) = (vec![0; len], vec![1; len]);
    let mut writer = Writer::new(&mut whole[..], &mut plan).expect("a writer");
    writer.rows("t", codes, scales).expect("rows");
    writer.finish().expect("whole");
    let mut writer = Writer::new(&mut streamed[..], &mut plan).expect("a writer");
    let streamed_report = writer.pack("t", source, &mut vec![E::default(); dim]).expect("rows");
    writer.finish().expect("whole");
    assert_eq!((&whole, &streamed_report), (&streamed, report));
    let file = File::new(&whole);
    let image = Image::parse(file.bytes()).expect("an image");
    image.verify().expect("sound");
    let read = image.rows::<E>("t").expect("rows");
    for id in 0..u32::try_from(rows).expect("few rows") {
        assert!(read.row(id).codes == &codes[id as usize * dim..][..dim]);
    }
}

/// Casts to 8-bit floats: no other code is nearer, and of two as near the even one.
fn casts(values: &[f32]) {
    nearest(values, E4m3::MAX, |x| E4m3::nearest(x).0, |code| E4m3(code).to_f32());
    nearest(values, E5m2::MAX, |x| E5m2::nearest(x).0, |code| E5m2(code).to_f32());
    for &value in values {
        assert_eq!(i8::nearest(value), value.clamp(-127.0, 127.0).round_ties_even() as i8, "{value:e}");
        assert!(memlayer_quantize::formats::e4m3(value).to_f32().is_nan() || value.abs() <= 464.0);
    }
}

fn nearest(values: &[f32], greatest: f32, cast: impl Fn(f32) -> u8, decode: impl Fn(u8) -> f32) {
    for &value in values {
        let code = cast(value);
        if value.is_nan() {
            assert!(decode(code).is_nan());
            continue;
        }
        let distance = |code: u8| (f64::from(decode(code)) - f64::from(value.clamp(-greatest, greatest))).abs();
        assert_eq!(decode(code).is_sign_negative(), value.is_sign_negative());
        for other in (0..=255).filter(|&other| decode(other).is_finite() && other != code && decode(other) != 0.0) {
            let nearer = distance(other) < distance(code) || distance(other) == distance(code) && code % 2 == 1;
            assert!(!nearer, "{value:e} became {code:#x}, but {other:#x} is nearer");
        }
    }
}

/// Rows that PyTorch packed, keys of any values, and shares of ids.
fn others(input: &mut Input<'_>, values: &[f32]) {
    let (len, dim) = (input.size(0..=100), input.size(0..=12));
    let bytes = input.bytes(len);
    match FbgemmRows::new(&bytes, dim) {
        Ok(rows) => {
            let mut out = vec![0.0; dim + 1];
            (0..rows.rows()).for_each(|row| rows.decode(row, &mut out));
            assert!(format!("{rows:?}").contains("byte rows") && rows.rows() * (dim + 8) == len);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let config = Config::builder(4).heads(1).sub_keys(2).half_dim(3).top_k(1).build().expect("a layer");
    let mut out = vec![0.0; 12];
    let done = prepare_keys(&config, &values[..values.len().min(12)], &[1.0; 6], &mut out);
    assert_eq!(done.is_ok(), values.len() >= 12);
    let (count, k) = (input.size(0..=9), input.size(0..=4));
    let (a, b) = (input.ids(count, 5, true), input.ids(count, 5, true));
    if let Some(share) = kept_share(&a, &b, k) {
        assert!((0.0..=1.0).contains(&share) && kept_share(&a, &a, k) == Some(1.0));
    }
}
