//! Number formats: casts to 8-bit floats, and what packing needs to know of each format.

use memlayer_core::element::{Bf16, E4m3, E5m2, Element, F16, Trainable};

/// `value` as an 8-bit float with `M` fraction bits and least normal exponent `E`, rounded to nearest, ties to even;
/// `None` where the rounded magnitude is `over` or more.
#[inline(always)]
fn round_small_float<const M: u32, const E: i32>(magnitude: f32, over: u32) -> Option<u8> {
    let bits = magnitude.to_bits();
    let cut = 23 - M;
    let bias = E.unsigned_abs() + 1;
    let code = if bits < ((127 - E.unsigned_abs()) << 23) {
        // Subnormal codes are multiples of 2^(E - M). Added to the power of two whose last place is that step, the
        // hardware rounds as it must, and the sum's lowest bits are the code.
        let anchor = f32::from_bits((127 + 23 - E.unsigned_abs() - M) << 23);
        (magnitude + anchor).to_bits() - anchor.to_bits()
    } else {
        // Half a step less one, plus one if the code would be odd; a carry moves on into the exponent.
        let half = (1 << (cut - 1)) - 1;
        let rounded = bits.saturating_add(half + ((bits >> cut) & 1)) >> cut;
        rounded - ((127 - bias) << M)
    };
    if code < over { u8::try_from(code).ok() } else { None }
}

#[inline(always)]
fn sign_bit(value: f32) -> u8 {
    if value.is_sign_negative() { 0x80 } else { 0 }
}

/// `value` as [`E4m3`], rounded to nearest, ties to even.
///
/// The format has no infinities: magnitudes above 464, which would round to more than [`E4m3::MAX`], become NaN with
/// their sign, as infinities and NaNs do. This is the OCP specification's conversion without saturation.
#[inline]
#[must_use]
pub fn e4m3(value: f32) -> E4m3 {
    let code = round_small_float::<3, -6>(f32::from_bits(value.to_bits() & 0x7fff_ffff), 0x7f);
    E4m3(sign_bit(value) | code.unwrap_or(0x7f))
}

/// `value` as [`E4m3`], rounded to nearest, ties to even; what is too great, infinities included, becomes
/// [`E4m3::MAX`] with its sign. NaN stays NaN.
///
/// This is torch's cast to `float8_e4m3fn`, bit by bit in the version that made the golden vectors.
#[inline]
#[must_use]
pub fn e4m3_saturating(value: f32) -> E4m3 {
    if value.is_nan() {
        return e4m3(value);
    }
    e4m3(value.clamp(-E4m3::MAX, E4m3::MAX))
}

/// `value` as [`E5m2`], rounded to nearest, ties to even, as IEEE 754 does it: magnitudes of 61440 and more become
/// infinite. This is torch's cast to `float8_e5m2`, bit by bit.
#[inline]
#[must_use]
pub fn e5m2(value: f32) -> E5m2 {
    if value.is_nan() {
        return E5m2(sign_bit(value) | 0x7f);
    }
    let code = round_small_float::<2, -14>(f32::from_bits(value.to_bits() & 0x7fff_ffff), 0x7c);
    E5m2(sign_bit(value) | code.unwrap_or(0x7c))
}

/// `value` as [`E5m2`], rounded to nearest, ties to even; what is too great becomes [`E5m2::MAX`] with its sign.
/// NaN stays NaN.
#[inline]
#[must_use]
pub fn e5m2_saturating(value: f32) -> E5m2 {
    if value.is_nan() {
        return e5m2(value);
    }
    e5m2(value.clamp(-E5m2::MAX, E5m2::MAX))
}

/// A format that rows can be packed in.
pub trait Pack: Element {
    /// Whether rows have scales. If not, codes are the values themselves.
    const SCALED: bool;
    /// The greatest magnitude of a finite code.
    const LARGEST: f32;
    /// The code that the greatest magnitude under a scale becomes: the greatest integer, but the greatest power of
    /// two of a float format. There the greatest value is then exact and all others lie in finer binades: no value
    /// errs by more than 1/32 (e4m3) or 1/16 (e5m2) of the greatest, where with the greatest code it would be 1/28
    /// and 1/14. On normal rows of 32 to 1024 values that lowered the relative error of the table by 0.2 to 3 %; the
    /// price is less than one of 15 or 30 binades at the lower end.
    const TOP: f32;
    /// The greatest magnitude whose nearest number, were the format's range unbounded, is still within a rounding
    /// error of [`Pack::LARGEST`]. A scale is chosen so that no value of its row lies beyond it.
    const REACH: f32;

    /// The code nearest to `value`, ties to even. Formats with scales saturate, the others round as IEEE 754 says.
    #[must_use]
    fn nearest(value: f32) -> Self;

    /// The greatest `|scale · code - value|` that packing may cause, in exact arithmetic, for a scale that packing
    /// chose. Where `scale · code` is computed in `f32`, its rounding comes on top.
    #[must_use]
    fn error_bound(value: f32, scale: f32) -> f64;
}

/// Codes are computed from quotients rounded to `f32`: what that adds to an error, relative to the value.
const QUOTIENT: f64 = 1.0 / (1 << 23) as f64;

/// The error bound of a float format: half a step, relative to the value or, for subnormal codes, to the scale.
fn float_bound(value: f32, scale: f32, relative: f64, absolute: f64) -> f64 {
    let (value, scale) = (f64::from(value).abs(), f64::from(scale).abs());
    (value * relative).max(scale * absolute) + value * QUOTIENT
}

impl Pack for i8 {
    const SCALED: bool = true;
    const LARGEST: f32 = 127.0;
    const TOP: f32 = 127.0;
    const REACH: f32 = 127.5;

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "clamped to the range of the format before")]
    fn nearest(value: f32) -> Self {
        // In [2^23, 2^24) floats are the integers: the addition rounds to nearest, ties to even.
        const ANCHOR: f32 = 12_582_912.0;
        ((value.clamp(-127.0, 127.0) + ANCHOR) - ANCHOR) as i8
    }

    /// Half a scale, and 2^-23 of the value for the rounding of quotients.
    fn error_bound(value: f32, scale: f32) -> f64 {
        f64::from(scale).abs() / 2.0 + f64::from(value).abs() * QUOTIENT
    }
}

impl Pack for E4m3 {
    const SCALED: bool = true;
    const LARGEST: f32 = Self::MAX;
    const TOP: f32 = 256.0;
    const REACH: f32 = 464.0;

    #[inline(always)]
    fn nearest(value: f32) -> Self {
        e4m3_saturating(value)
    }

    /// 1/16 of the value, or scale / 2^10 if that is more, and 2^-23 of the value.
    fn error_bound(value: f32, scale: f32) -> f64 {
        float_bound(value, scale, 1.0 / 16.0, 1.0 / 1024.0)
    }
}

impl Pack for E5m2 {
    const SCALED: bool = true;
    const LARGEST: f32 = Self::MAX;
    const TOP: f32 = 32_768.0;
    const REACH: f32 = 61_440.0;

    #[inline(always)]
    fn nearest(value: f32) -> Self {
        e5m2_saturating(value)
    }

    /// 1/8 of the value, or scale / 2^17 if that is more, and 2^-23 of the value.
    fn error_bound(value: f32, scale: f32) -> f64 {
        float_bound(value, scale, 1.0 / 8.0, 1.0 / 131_072.0)
    }
}

impl Pack for F16 {
    const SCALED: bool = false;
    const LARGEST: f32 = 65_504.0;
    const TOP: f32 = <Self as Pack>::LARGEST;
    const REACH: f32 = 65_520.0;

    #[inline(always)]
    fn nearest(value: f32) -> Self {
        Self::from_f32(value)
    }

    /// 2^-11 of the value, or 2^-25 if that is more.
    fn error_bound(value: f32, _scale: f32) -> f64 {
        (f64::from(value).abs() / 2048.0).max(1.0 / f64::from(1u32 << 25))
    }
}

impl Pack for Bf16 {
    const SCALED: bool = false;
    /// 255 · 2^120.
    const LARGEST: f32 = f32::from_bits(0x7f7f_0000);
    const TOP: f32 = <Self as Pack>::LARGEST;
    const REACH: f32 = f32::from_bits(0x7f7f_8000);

    #[inline(always)]
    fn nearest(value: f32) -> Self {
        Self::store(value, memlayer_core::element::NEAREST)
    }

    /// 1/256 of the value, or 2^-134 if that is more.
    fn error_bound(value: f32, _scale: f32) -> f64 {
        (f64::from(value).abs() / 256.0).max(f64::from(f32::MIN_POSITIVE) / 256.0)
    }
}

impl Pack for f32 {
    const SCALED: bool = false;
    const LARGEST: f32 = Self::MAX;
    const TOP: f32 = <Self as Pack>::LARGEST;
    const REACH: f32 = Self::MAX;

    #[inline(always)]
    fn nearest(value: f32) -> Self {
        value
    }

    /// Nothing.
    fn error_bound(_value: f32, _scale: f32) -> f64 {
        0.0
    }
}
