//! Functions of one scalar, free of branches and calls, so that loops over them become vector code.

/// The exponential, within 2 ULP of the exact value where that is normal, and within one unit of the least number
/// where it is not; `exp(NaN)` is NaN, `exp(inf)` is infinite, `exp(-inf)` is zero.
///
/// `x = n ln 2 + r` with `|r| <= ln(2) / 2`; `exp(r)` is a polynomial (Cephes' `expf`), `2^n` is multiplied on in two
/// steps, so that subnormal results come out rounded and great ones overflow. All operations are plain, so every
/// instruction set gives the same bits.
#[inline(always)]
#[allow(clippy::excessive_precision, reason = "the constants as they were published")]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to an integer, which the lower bits then hold.
    const ROUND: f32 = 12_582_912.0;
    const HIGH: f32 = 89.0;
    const LOW: f32 = -104.0;
    // Comparisons with NaN are false, so that it passes.
    let x = if x > HIGH { HIGH } else { x };
    let x = if x < LOW { LOW } else { x };
    let shifted = x * core::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first of few bits: its product with `n` is exact.
    let r = (x - n * 0.693_359_375) - n * -2.121_944_4e-4;
    let p = 1.987_569_15e-4;
    let p = p * r + 1.398_199_950_7e-3;
    let p = p * r + 8.333_451_907_3e-3;
    let p = p * r + 4.166_579_589_4e-2;
    let p = p * r + 1.666_666_545_9e-1;
    let p = p * r + 5.000_000_120_1e-1;
    let e = p * (r * r) + r + 1.0;
    // For NaN these bits are anything, and the products below are NaN all the same.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
    let half = n >> 1;
    e * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// `2^n` for `-126 <= n <= 127`.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned())
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    #[allow(clippy::cast_possible_truncation, reason = "rounding to the format under test")]
    fn exp_is_within_its_bound() {
        let mut worst = 0.0f64;
        // Every 64th float of those whose exponential is neither 1 nor out of range, both signs.
        for bits in (0x3000_0000u32..0x42d2_0000).step_by(64) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let exact = f64::from(x).exp();
                let (got, rounded) = (exp(x), exact as f32);
                if rounded.is_infinite() {
                    assert!(got.is_infinite() || (got == f32::MAX && exact < f64::from(f32::MAX) * 1.000_001), "{x}");
                    continue;
                }
                let ulp = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
                let ulp = if ulp.is_finite() { ulp } else { 2.0f64.powi(104) };
                worst = worst.max((f64::from(got) - exact).abs() / ulp);
            }
        }
        assert!(worst <= 2.0, "{worst} ULP");
    }

    #[test]
    fn exp_of_what_is_no_number_and_of_the_ends() {
        assert!(exp(f32::NAN).is_nan() && exp(-f32::NAN).is_nan());
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!((exp(0.0), exp(-0.0)), (1.0, 1.0));
    }
}
