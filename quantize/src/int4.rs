//! 4-bit rows: groups of 32 or 64 integers, each group with its binary16 scale beside its codes.

use memlayer_core::element::{F16, Int4};
use memlayer_core::storage::RowStore;
use memlayer_core::{Element, Item};

use crate::report::{Meter, PackReport};
use crate::rows::{Cut, PackError, check_len, greatest};

/// The greatest scale, and so the greatest magnitude that fits: 8 times it.
const LARGEST: f32 = 8.0 * 65_504.0;

/// The greatest `|value(code) - value|` that packing causes in a group whose scale is `scale`: half a step, and one
/// step more at the positive end, where the integer 8 is missing; and 1/128 of a step for the rounding of the scale.
#[must_use]
pub fn error_bound(scale: f32) -> f64 {
    f64::from(scale).abs() * (1.0 + 1.0 / 128.0)
}

/// The scale under which `most` becomes the integer -8: their quotient as binary16, or the next greater one where that
/// was rounded so far down, among the subnormals, that `most` would lie beyond -8.
fn scale_for(most: f32) -> F16 {
    let scale = F16::from_f32(most / -8.0);
    if most != 0.0 && most / scale.to_f32() < -8.0 - 1.0 / 128.0 { F16::from_bits(scale.to_bits() + 1) } else { scale }
}

/// Packs every row of `source` into `codes` (`[rows, Int4::codes(dim)]`), and says how much was lost.
///
/// A group's value of greatest magnitude becomes the integer -8, its scale having the opposite sign of that value, so
/// that all sixteen integers are in use; values are divided by the scale as rounded to binary16, and rounded to
/// nearest. The source's values are read as `f32`. What fills the last group of a row is zero.
///
/// # Errors
/// [`PackError`]: a buffer of the wrong length, a value that is not finite or beyond 8 times the greatest binary16.
pub fn pack_int4_rows<const G: usize, S: RowStore>(source: &S, codes: &mut [Int4<G>]) -> Result<PackReport, PackError>
where
    Int4<G>: Item,
{
    let cut = Cut::of(source, source.dim())?;
    let width = <Int4<G> as Element>::codes(cut.dim);
    check_len("codes", cut.rows.saturating_mul(width), codes.len())?;
    let mut meter = Meter::default();
    for (id, codes) in cut.ids().zip(codes.chunks_exact_mut(width)) {
        let row = source.row(id);
        for (g, group) in codes.chunks_exact_mut(Int4::<G>::GROUP).enumerate() {
            let columns = g * G..cut.dim.min((g + 1) * G);
            let (most, column) = greatest(&row, id, columns.clone())?;
            if most.abs() > LARGEST {
                let format = <Int4<G> as Element>::FORMAT;
                return Err(PackError::OutOfRange { row: id as usize, column, value: most, format });
            }
            let scale = scale_for(most);
            let [low, high] = scale.to_le_bytes();
            (group[0], group[1]) = (Int4(low), Int4(high));
            let scale = scale.to_f32();
            let integer = |i: usize| {
                let column = g * G + i;
                if column >= cut.dim || scale == 0.0 {
                    return 8;
                }
                nearest(row.value::<f32>(column) / scale)
            };
            let half = G / 2;
            for j in 0..half {
                group[2 + j] = Int4(integer(j) | integer(j + half) << 4);
            }
            for column in columns {
                let packed: f64 = Element::value(group, column - g * G);
                meter.value(f64::from(row.value::<f32>(column)), packed);
            }
        }
        meter.end_row(id);
    }
    Ok(meter.finish())
}

/// The integer nearest to `quotient`, ties to even, from -8 to 7, plus 8.
fn nearest(quotient: f32) -> u8 {
    // Sums with this number are integers, rounded by the hardware.
    const ROUND: f32 = 12_582_912.0;
    let rounded = (quotient.clamp(-8.0, 7.0) + ROUND) - ROUND;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an integer from 0 to 15")]
    let code = (rounded + 8.0) as u8;
    code
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec;
    use std::vec::Vec;

    use memlayer_core::{DenseRows, Random};

    use super::*;

    fn packed<const G: usize>(values: &[f32], dim: usize) -> (Vec<Int4<G>>, PackReport)
    where
        Int4<G>: Item,
    {
        let rows = values.len() / dim;
        let mut codes = vec![Int4(0xff); rows * <Int4<G> as Element>::codes(dim)];
        let report = pack_int4_rows(&DenseRows::new(values, dim), &mut codes).expect("finite rows");
        (codes, report)
    }

    fn stays_in_its_bound<const G: usize>()
    where
        Int4<G>: Item,
    {
        let mut random = Random::new(4);
        for dim in [1, 7, 31, 32, 33, 64, 65, 100, 256] {
            let mut values = vec![0.0f32; 40 * dim];
            random.fill_normal(&mut values, 3.0);
            let (codes, report) = packed::<G>(&values, dim);
            let table = DenseRows::new(&codes, dim);
            for (id, row) in (0..).zip(values.chunks(dim)) {
                for (i, &x) in row.iter().enumerate() {
                    let stored: f64 = table.row(id).value(i);
                    let group = &table.row(id).codes[i / G * Int4::<G>::GROUP..];
                    let bound = error_bound(Int4::scale(group));
                    assert!((stored - f64::from(x)).abs() <= bound, "{dim} {id} {i}: {stored} for {x}, {bound}");
                }
            }
            assert!(report.relative_rms < 0.12, "{dim}: {report}");
        }
    }

    #[test]
    fn errors_stay_in_their_bound() {
        stays_in_its_bound::<32>();
        stays_in_its_bound::<64>();
    }

    #[test]
    fn the_greatest_is_exact_up_to_its_scale_and_zeros_stay_zeros() {
        let (codes, _) = packed::<32>(&[4.0, -1.0, 0.0, 0.5], 4);
        let table = DenseRows::new(&codes, 4);
        let values: Vec<f32> = (0..4).map(|i| table.row(0).value(i)).collect();
        assert_eq!(values, [4.0, -1.0, 0.0, 0.5]);
        let (codes, report) = packed::<64>(&[0.0; 5], 5);
        assert_eq!(DenseRows::new(&codes, 5).row(0).value::<f32>(3), 0.0);
        assert_eq!(report.relative_rms, 0.0);
    }

    /// Found by fuzzing (`quantize`): the scale of such groups became zero, or half of what they need.
    #[test]
    fn tiny_groups_stay_in_their_bound() {
        for most in [1.0587912e-22f32, -1e-40, 2e-7, -7.1e-7, 1.3e-6, -6.1e-5, 0.0] {
            let values = [most, most / -1.01, most * 0.3];
            let (codes, _) = packed::<32>(&values, 3);
            let bound = error_bound(Int4::scale(&codes));
            for (i, &x) in values.iter().enumerate() {
                let error = (DenseRows::new(&codes, 3).row(0).value::<f64>(i) - f64::from(x)).abs();
                assert!(error <= bound, "{x:e} is off by {error:e}, bound {bound:e}");
            }
        }
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        let mut codes = vec![Int4::<32>(0); 18];
        let error = pack_int4_rows(&DenseRows::new(&[0.0, f32::NAN], 2), &mut codes).expect_err("NaN");
        assert_eq!(std::format!("{error}"), "row 0, column 1 is NaN, which cannot be packed");
        let error = pack_int4_rows(&DenseRows::new(&[1e6f32, 0.0], 2), &mut codes).expect_err("too great");
        assert_eq!(std::format!("{error}"), "row 0, column 0 is 1e6, which is beyond the range of int4");
        let error = pack_int4_rows(&DenseRows::new(&[1.0f32; 4], 2), &mut codes).expect_err("too short");
        assert_eq!(std::format!("{error}"), "codes has 18 elements where 36 are needed");
    }
}
