//! Number formats: casts of every f16 to fp8, every code back, and rows that FBGEMM packed.

use memlayer_core::{DenseRows, E4m3, E5m2, Element, F16, RowStore, ScaledRows};
use memlayer_quantize::fbgemm::FbgemmRows;
use memlayer_quantize::formats::{Pack, e4m3_saturating, e5m2};
use memlayer_quantize::pack_rows;

use super::Compared;
use super::file::{GoldenError, GoldenFile, Problem};

/// What must be the same to the last bit: `error` counts what is not.
fn exact(tensor: &str, differing: usize) -> Compared {
    Compared { tensor: tensor.to_owned(), error: differing as f64, bound: 0.0 }
}

pub(super) fn check(file: &GoldenFile) -> Result<Vec<Compared>, GoldenError> {
    let mut compared = vec![];
    let halves = file.f16_bits("f16_all")?;
    compared.push(exact("e4m3_bits", casts(file, &halves, "e4m3_bits", E4m3::MAX, |x| e4m3_saturating(x).0)?));
    compared.push(exact("e5m2_bits", casts(file, &halves, "e5m2_bits", E5m2::MAX, |x| e5m2(x).0)?));
    compared.push(exact("e4m3_decode", decodes(file, "e4m3_decode", |code| E4m3(code).to_f32())?));
    compared.push(exact("e5m2_decode", decodes(file, "e5m2_decode", |code| E5m2(code).to_f32())?));
    compared.extend(rows(file)?);
    Ok(compared)
}

/// How many f16 patterns, finite and in range, are cast to another code than the file's.
fn casts(
    file: &GoldenFile,
    halves: &[u16],
    tensor: &str,
    greatest: f32,
    cast: impl Fn(f32) -> u8,
) -> Result<usize, GoldenError> {
    let (codes, _) = file.bytes(tensor)?;
    if codes.len() != halves.len() {
        return Ok(halves.len());
    }
    let differs = |(&bits, &code): (&u16, &u8)| {
        let value: f32 = F16::value(&[F16::from_bits(bits)], 0);
        value.is_finite() && value.abs() <= greatest && cast(value) != code
    };
    Ok(halves.iter().zip(&codes).filter(|&pair| differs(pair)).count())
}

/// How many of the 256 codes mean something else than in the file.
fn decodes(file: &GoldenFile, tensor: &str, decode: impl Fn(u8) -> f32) -> Result<usize, GoldenError> {
    let table = file.floats_of(tensor, &[256])?;
    let differs = |(code, &value): (u8, &f64)| {
        let found = f64::from(decode(code));
        // The sign of zero counts, the payload of NaN does not.
        !(found.to_bits() == value.to_bits() || found.is_nan() && value.is_nan())
    };
    Ok((0..=255).zip(&table).filter(|&pair| differs(pair)).count())
}

/// FBGEMM's rows and our own int8 against the rows they were made from.
fn rows(file: &GoldenFile) -> Result<Vec<Compared>, GoldenError> {
    let (values, shape) = file.floats("rows")?;
    let (bytes, packed_shape) = file.bytes("fbgemm_byte_rowwise")?;
    let wrong = |expected: Vec<usize>, found| {
        file.error(Problem::Shape { tensor: "fbgemm_byte_rowwise".to_owned(), expected, found })
    };
    let &[count, dim] = &shape[..] else { return Err(wrong(vec![0, 0], shape)) };
    if packed_shape != [count, dim + 8] {
        return Err(wrong(vec![count, dim + 8], packed_shape));
    }
    #[allow(clippy::cast_possible_truncation, reason = "the file holds f32")]
    let rows: Vec<f32> = values.iter().map(|&v| v as f32).collect();

    let fbgemm = FbgemmRows::new(&bytes, dim).map_err(|e| file.error(Problem::Device(Box::new(e))))?;
    let mut decoded = vec![0.0; dim];
    let (mut worst, mut worst_own) = (0.0f64, 0.0f64);
    for (r, row) in rows.chunks_exact(dim).enumerate() {
        fbgemm.decode(r, &mut decoded);
        let (least, most) = row.iter().fold((f32::MAX, f32::MIN), |(a, b), &x| (a.min(x), b.max(x)));
        // 256 levels from the least to the greatest: half a step, and the rounding of scale, bias and product.
        let bound = f64::from(most - least) / 255.0 * 0.5
            + 4.0 * f64::from(f32::EPSILON) * f64::from(most.abs().max(least.abs()));
        for (x, y) in row.iter().zip(&decoded) {
            worst = worst.max((f64::from(*x) - f64::from(*y)).abs() / bound);
        }
    }
    let (mut codes, mut scales) = (vec![0i8; count * dim], vec![0.0; count]);
    pack_rows(&DenseRows::new(&rows, dim), dim, &mut codes, &mut scales)
        .map_err(|e| file.error(Problem::Device(Box::new(e))))?;
    if let Some(table) = ScaledRows::new(&codes, &scales, dim, dim) {
        for (r, row) in (0u32..).zip(rows.chunks_exact(dim)) {
            for (i, &x) in row.iter().enumerate() {
                let bound = <i8 as Pack>::error_bound(x, scales[r as usize]);
                worst_own = worst_own.max((f64::from(x) - table.row(r).value::<f64>(i)).abs() / bound);
            }
        }
    }
    // Both are shares of what the format allows.
    let share = |tensor: &str, error| Compared { tensor: tensor.to_owned(), error, bound: 1.0 };
    Ok(vec![share("fbgemm_byte_rowwise", worst), share("rows (int8)", worst_own)])
}
