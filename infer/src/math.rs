//! The transformer's own arithmetic on slices.

/// The exponential to about 1e-7 relative, in arithmetic that compilers turn into vector code.
///
/// `2^(x / ln 2)` with the integer part put into the exponent and a polynomial for the rest; 0 below -87, infinity
/// above 88.7 is cut to the greatest finite power.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding 1.5 · 2^23 rounds to an integer, which stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * core::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    // ln 2 in two parts: the first has few bits, so n times it is exact.
    let r = (x - n * (355.0 / 512.0)) + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = (p * r * r + r) + 1.0;
    p * f32::from_bits((rounded.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `silu(gate) · up` where each row of `x` (`[.., 2·width]`) is gate, then up; `out` (`[.., width]`) is overwritten.
pub fn gate(x: &[f32], width: usize, out: &mut [f32]) {
    for (row, out) in x.chunks_exact(width.max(1).saturating_mul(2)).zip(out.chunks_exact_mut(width.max(1))) {
        let (gate, up) = row.split_at(width.min(row.len()));
        for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *out = g * sigmoid(g) * u;
        }
    }
}

/// `p[s] = softmax(<q, k[s]> / sqrt(width))`, overwritten, over as many rows of `k` (`[.., width]`) as `p` has places.
pub fn softmax_scores(q: &[f32], k: &[f32], p: &mut [f32]) {
    let scale = 1.0 / libm::sqrtf(q.len() as f32);
    for (p, k) in p.iter_mut().zip(k.chunks_exact(q.len().max(1))) {
        *p = scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
    }
    let greatest = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for p in p.iter_mut() {
        *p = exp(*p - greatest);
    }
    let sum: f32 = p.iter().sum();
    for p in p.iter_mut() {
        *p /= sum;
    }
}

/// `out += factor · x`.
#[inline(always)]
pub fn add_scaled(out: &mut [f32], factor: f32, x: &[f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out += factor * x;
    }
}

/// Turns the pairs `(x[i], x[i + w/2])` of a head of width w by angles whose cosines, then sines, are `angles` (`[2, w/2]`)
/// (rotary positions, Su et al. 2021).
#[inline]
pub fn turn(x: &mut [f32], angles: &[f32]) {
    let half = x.len() / 2;
    let (a, b) = x.split_at_mut(half);
    let (cos, sin) = angles.split_at(half.min(angles.len()));
    for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

/// The angles of a position, for [`turn`]: `position / 10000^(2i/w)`. `out` (`[2, w/2]`) is overwritten.
pub fn angles(position: usize, out: &mut [f32]) {
    let half = out.len() / 2;
    let (cos, sin) = out.split_at_mut(half);
    for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
        let angle = position as f32 * libm::powf(10_000.0, -(i as f32) / half as f32);
        (*cos, *sin) = (libm::cosf(angle), libm::sinf(angle));
    }
}

/// The index of the greatest; the first of equal ones, 0 if none is more than minus infinity.
#[must_use]
pub fn greatest(values: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &value) in (0u32..).zip(values) {
        if value > best.1 {
            best = (i, value);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_near() {
        for i in -8600..8800 {
            let x = i as f32 / 100.0;
            let (expected, found) = (libm::exp(f64::from(x)), f64::from(exp(x)));
            assert!((expected - found).abs() <= 3e-7 * expected, "exp({x}) is {expected}, not {found}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn a_turn_by_a_quarter() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        turn(&mut x, &[0.0, 1.0, 1.0, 0.0]);
        assert_eq!(x, [-3.0, 2.0, 1.0, 4.0]);
        let mut both = [0.0; 4];
        angles(3, &mut both);
        assert!((both[0] - libm::cosf(3.0)).abs() < 1e-6 && (both[3] - libm::sinf(0.03)).abs() < 1e-6);
    }

    #[test]
    fn scores_become_probabilities() {
        let mut p = [0.0; 3];
        softmax_scores(&[1.0, 0.0], &[0.0, 5.0, 0.0, 7.0, 1e9, 0.0], &mut p);
        assert_eq!(p, [0.0, 0.0, 1.0].map(|x: f32| if x == 0.0 { p[0] } else { x }));
        assert!(p[0] < 1e-30);
        assert_eq!(greatest(&p), 2);
        assert_eq!(greatest(&[f32::NAN, f32::NAN]), 0);
    }
}
