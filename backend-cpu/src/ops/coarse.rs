//! Integer scores that say which sub-keys can be among the best: these alone are scored in `f32`, and the `f32` scores
//! decide, so that the selection is theirs.
//!
//! With a query `q = s·a + r` and a sub-key `k = z·b + e`, `a` and `b` integers,
//! `<q, k> - s·z·<a, b> = <r, k> + <s·a, e>`, in magnitude at most `|r|₂·|k|₂ + (|q|₂ + |r|₂)·|e|₂`; the rounding of sums
//! of C products adds less than `2(C + 16)·ε·C·|q|∞·|k|∞`. Where `m` bounds that, a sub-key with a coarse
//! score below some bound has a score below that bound and `m`: what may be passed over is seen from the K-th best.

use memlayer_core::element::Format;
use memlayer_core::{Element, Row, RowStore};

use crate::isa::int8::{Int8, MAX_DIM};
use crate::isa::rows::as_f32;
use crate::isa::{Simd, Token, dispatch};

/// The norms are sums of at most [`MAX_DIM`] rounded terms.
const ROUNDING: f32 = 1.01;

/// Magnitudes whose products and squares neither overflow nor vanish.
const PLAIN: core::ops::RangeInclusive<f32> = 1e-15..=1e15;

/// Room for vectors of one width, one after the other.
pub(super) struct Buffer {
    /// Zero behind the width, up to whole vectors of any instruction set.
    values: [f32; MAX_DIM],
    /// Zero behind the width.
    codes: [i8; MAX_DIM],
}

/// How a vector was written as integers, and how far off they are.
#[derive(Clone, Copy)]
pub(super) struct Quantized {
    /// Value `i` is about `scale` times code `i`.
    pub(super) scale: f32,
    /// `|x|∞`; infinite if the vector is not finite, or its values are too large or too small to be bounded.
    max: f32,
    /// `|x|₂`.
    norm: f32,
    /// `|r|₂` of what is left, `r = x - scale · codes`.
    rest: f32,
}

/// What a set of sub-keys has at most.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// `|k|∞`.
    pub(super) max: f32,
    /// `|k|₂`.
    pub(super) norm: f32,
    /// `|e|₂`.
    pub(super) rest: f32,
}

impl Bounds {
    /// Of no sub-keys.
    pub(super) const NONE: Self = Self { max: 0.0, norm: 0.0, rest: 0.0 };
    /// As scalars in scratch.
    pub(super) const LEN: usize = 3;

    /// Of `dim` int8 codes with a scale.
    pub(super) fn of_scale(scale: f32, dim: usize) -> Self {
        let max = bounded(128.0 * scale.abs());
        Self { max, norm: max * (dim as f32).sqrt(), rest: 0.0 }
    }
    /// Of int8 codes with their scales and the sums of their squares; the norms are squared.
    #[inline(always)]
    pub(super) fn of_codes(scales: &[f32], squares: &[i32]) -> Self {
        // The bits of magnitudes are in their order, and those of NaN above all.
        let (mut max, mut norm) = (0, 0.0);
        for (scale, &square) in scales.iter().zip(squares) {
            max = scale.abs().to_bits().max(max);
            let square = scale * scale * square as f32;
            norm = if square > norm { square } else { norm };
        }
        Self { max: bounded(128.0 * f32::from_bits(max)), norm, rest: 0.0 }
    }
    pub(super) fn and(self, other: Self) -> Self {
        let Self { max, norm, rest } = self;
        Self { max: max.max(other.max), norm: norm.max(other.norm), rest: rest.max(other.rest) }
    }
    /// Of bounds whose norms are squared.
    pub(super) fn root(self) -> Self {
        Self { norm: self.norm.sqrt(), rest: self.rest.sqrt(), ..self }
    }
    pub(super) fn store(self, to: &mut [f32]) {
        to.copy_from_slice(&[self.max, self.norm, self.rest]);
    }
    /// Of all that were stored.
    pub(super) fn load(from: &[f32]) -> Self {
        let stored = from.chunks_exact(Self::LEN).map(|of| Self { max: of[0], norm: of[1], rest: of[2] });
        stored.fold(Self::NONE, Self::and)
    }
}

/// `max`, or infinity if products with it may overflow or vanish, or it is NaN.
fn bounded(max: f32) -> f32 {
    if max == 0.0 || PLAIN.contains(&max) { max } else { f32::INFINITY }
}

impl Buffer {
    pub(super) fn new() -> Self {
        Self { values: [0.0; MAX_DIM], codes: [0; MAX_DIM] }
    }

    /// Writes `vector` as integers; all vectors of a buffer have one width.
    pub(super) fn quantize(&mut self, token: Token, vector: &[f32]) -> (Quantized, &[i8]) {
        dispatch!(token, s => self.quantize_by(s, vector))
    }

    /// [`Buffer::quantize`] where the instruction set is known.
    #[inline(always)]
    pub(super) fn quantize_by<S: Simd>(&mut self, s: S, vector: &[f32]) -> (Quantized, &[i8]) {
        let dim = vector.len();
        let values = if dim.is_multiple_of(LANES) {
            vector
        } else {
            self.values[..dim].copy_from_slice(vector);
            &self.values[..dim.next_multiple_of(LANES)]
        };
        let (scale, Bounds { max, norm, rest }) = quantize_squared(s, values, &mut self.codes);
        (Quantized { scale, max, norm: norm.sqrt(), rest: rest.sqrt() }, &self.codes[..dim])
    }

    /// Writes a row of `dim` values of any format as integers: their scale, their bounds with the norms squared, the codes.
    #[inline(always)]
    pub(super) fn quantize_row<S: Simd, E: Element>(
        &mut self,
        s: S,
        row: &Row<'_, E>,
        dim: usize,
    ) -> (f32, Bounds, &[i8]) {
        let values = match as_f32(row.codes) {
            Some(codes) if row.scales.is_empty() && dim.is_multiple_of(LANES) => codes,
            _ => {
                for (i, value) in self.values[..dim].iter_mut().enumerate() {
                    *value = row.value::<f32>(i);
                }
                &self.values[..dim.next_multiple_of(LANES)]
            }
        };
        let (scale, bounds) = quantize_squared(s, values, &mut self.codes);
        (scale, bounds, &self.codes[..dim])
    }
}

/// How values become codes.
#[derive(Clone, Copy)]
struct Scale {
    scale: f32,
    inverse: f32,
}

impl Scale {
    /// For values of magnitude up to `max`, which is [`bounded`].
    #[inline(always)]
    fn of(max: f32) -> Self {
        let plain = max > 0.0 && max < f32::INFINITY;
        if plain { Self { scale: max / 127.0, inverse: 127.0 / max } } else { Self { scale: 0.0, inverse: 0.0 } }
    }

    /// Writes whole vectors of values as codes, and gives what each vector leaves.
    #[inline(always)]
    fn write<S: Simd>(self, s: S, values: &[f32], codes: &mut [i8; MAX_DIM], mut rest: impl FnMut(S::V)) {
        let (inverse, negative) = (s.splat(self.inverse), s.splat(-self.scale));
        for (values, codes) in values.chunks_exact(S::LANES).zip(codes.chunks_exact_mut(S::LANES)) {
            let x = s.load(values);
            // Floats around this one are consecutive integers, and so are their bits.
            let shifted = s.mul_add(x, inverse, s.splat(INTEGERS));
            let mut lanes = [0.0; LANES];
            s.store(shifted, &mut lanes);
            for (code, lane) in codes.iter_mut().zip(lanes) {
                *code = lane.to_bits().to_le_bytes()[0].cast_signed();
            }
            rest(s.mul_add(negative, s.add(shifted, s.splat(-INTEGERS)), x));
        }
    }
}

/// `|x|`, of values that are not NaN.
#[inline(always)]
fn magnitude<S: Simd>(s: S, x: S::V) -> S::V {
    s.max(x, s.mul(x, s.splat(-1.0)))
}

/// The greatest lane of values that are not NaN.
#[inline(always)]
fn greatest<S: Simd>(s: S, v: S::V) -> f32 {
    let mut lanes = [0.0; LANES];
    s.store(v, &mut lanes);
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] = if lanes[i] > lanes[i + n] { lanes[i] } else { lanes[i + n] };
        }
    }
    lanes[0]
}

/// `max`, or infinity where `rest` is NaN: it is where a value is NaN, which a maximum may pass over.
fn unless_nan(max: f32, rest: f32) -> f32 {
    if rest.is_nan() { f32::INFINITY } else { max }
}

/// Writes whole vectors of values as integers; gives their scale and bounds, the norms squared.
#[inline(always)]
fn quantize_squared<S: Simd>(s: S, values: &[f32], codes: &mut [i8; MAX_DIM]) -> (f32, Bounds) {
    let (mut max, mut square) = (s.splat(0.0), s.splat(0.0));
    for values in values.chunks_exact(S::LANES) {
        let x = s.load(values);
        (max, square) = (s.max(max, magnitude(s, x)), s.mul_add(x, x, square));
    }
    let max = bounded(greatest(s, max));
    let scale = Scale::of(max);
    let mut rest_square = s.splat(0.0);
    scale.write(s, values, codes, |rest| rest_square = s.mul_add(rest, rest, rest_square));
    let rest = s.sum(rest_square);
    (scale.scale, Bounds { max: unless_nan(max, rest), norm: s.sum(square), rest })
}

/// `|scale · codes|₂²`.
#[inline(always)]
pub(super) fn square(scale: f32, codes: &[i8]) -> f32 {
    // Squares of 16 bits: products of these are cheaper in vectors.
    let mut sum = 0;
    for &code in codes {
        sum += i32::from(i16::from(code) * i16::from(code));
    }
    scale * scale * sum as f32
}

/// Most scalars of a vector.
const LANES: usize = 16;

/// 1.5 · 2^23.
const INTEGERS: f32 = 12_582_912.0;

/// The coarse scores of a query.
#[derive(Clone, Copy)]
pub(super) struct Coarse {
    /// What they are in units of.
    pub(super) scale: f32,
    /// How far they are off at most, times their scale: `m` of the head of this file. It is no number, or infinite, where
    /// nothing is known.
    pub(super) error: f32,
}

impl Coarse {
    /// Of no query.
    pub(super) const NONE: Self = Self { scale: 0.0, error: f32::INFINITY };

    /// The least coarse score of a sub-key with a score of `least`; NaN, or negative infinity, where nothing is known.
    pub(super) fn from(&self, least: f32) -> f32 {
        (least - self.error) / self.scale
    }

    /// The greatest score of a sub-key with a coarse one of `from`.
    pub(super) fn most(&self, from: f32) -> f32 {
        from * self.scale + self.error
    }
}

impl Quantized {
    /// What its scores with sub-keys are.
    pub(super) fn coarse(&self, dim: usize, keys: Bounds) -> Coarse {
        let rest = self.rest * keys.norm + (self.norm + self.rest) * keys.rest;
        let dim = dim as f32;
        let rounding = 2.0 * (dim + 16.0) * f32::EPSILON * dim * self.max * keys.max;
        let error = ROUNDING * (rest + rounding);
        Coarse { scale: self.scale, error: if self.max < f32::INFINITY { error } else { f32::INFINITY } }
    }
}

/// The codes and scales of `count` rows, if they are of int8 with one scale each or none.
#[inline(always)]
pub(super) fn as_int8<'a, E: Element>(rows: &Row<'a, E>, count: usize) -> Option<(&'a [i8], &'a [f32])> {
    let fits = E::FORMAT == Format::Int8 && (rows.scales.is_empty() || rows.scales.len() == count);
    fits.then(|| (bytemuck::cast_slice(rows.codes), rows.scales))
}

/// Whether the keys are `rows` of int8 that lie one after the other, with one scale each or none.
pub(super) fn lie_as_int8<K: RowStore>(keys: &K, rows: usize) -> bool {
    keys.run(0, rows).is_some_and(|all| as_int8(&all, rows).is_some())
}

/// The coarse scores of int8 sub-keys that lie one after the other, codes and scales, in units of the query's scale, and
/// their bounds.
pub(super) fn score_rows(
    token: Token,
    int8: Int8,
    (codes, scales): (&[i8], &[f32]),
    query: &[f32],
    out: &mut [f32],
) -> Bounds {
    let mut buffer = Buffer::new();
    buffer.quantize(token, query);
    int8.dots(&buffer.codes, query.len(), codes, out);
    if scales.is_empty() {
        return Bounds::of_scale(1.0, query.len());
    }
    dispatch!(token, _s => {
        let mut max = 0;
        for (out, &scale) in out.iter_mut().zip(scales) {
            *out *= scale;
            // The bits of magnitudes are in their order, and those of NaN above all.
            max = scale.abs().to_bits().max(max);
        }
        Bounds::of_scale(f32::from_bits(max), query.len())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use memlayer_core::Random;

    fn token() -> Token {
        Isa::available().next().and_then(Token::new).expect("one is always there")
    }

    /// The greatest error of a coarse score, in units of what it may be, and this in units of the spread of the scores.
    fn measure(dim: usize, mut draw: impl FnMut(&mut Random) -> f64, random: &mut Random) -> (f64, f64) {
        #[allow(clippy::cast_possible_truncation, reason = "rounded")]
        let mut vector = || -> Vec<f32> { (0..dim).map(|_| draw(random) as f32).collect() };
        let query = vector();
        let keys: Vec<_> = (0..200).map(|_| vector()).collect();
        let (mut buffer, mut other) = (Buffer::new(), Buffer::new());
        let (q, codes) = buffer.quantize(token(), &query);
        let mut pack = |key: &Vec<f32>| {
            let row = Row { codes: &key[..], scales: &[], group: dim };
            let (scale, squared, codes) = dispatch!(token(), s => other.quantize_row(s, &row, dim));
            (scale, squared.root(), codes.to_vec())
        };
        let packed: Vec<_> = keys.iter().map(&mut pack).collect();
        let bounds = packed.iter().fold(Bounds::NONE, |bounds, (_, k, _)| bounds.and(*k));
        let error = f64::from(q.coarse(dim, bounds).error);
        let (mut worst, mut square) = (0.0_f64, 0.0);
        for (key, (scale, _, key_codes)) in keys.iter().zip(&packed) {
            let exact: f64 = query.iter().zip(key).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            let sum: i32 = codes.iter().zip(key_codes).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
            let coarse = f64::from(q.scale) * f64::from(scale * sum as f32);
            worst = worst.max((coarse - exact).abs() / error);
            square += exact * exact;
        }
        (worst, error / (square / 200.0).sqrt())
    }

    #[test]
    fn coarse_scores_are_within_their_bound() {
        let random = &mut Random::new(5);
        let even = |r: &mut Random| 2.0 * r.uniform() - 1.0;
        for dim in [1, 7, 16, 64, 100, 256, MAX_DIM] {
            for _ in 0..20 {
                let (error, bound) = measure(dim, even, random);
                assert!(error <= 1.0, "dim {dim}: {error} of the bound");
                // Else it would be right, and of no use.
                assert!(dim > 256 || bound < 0.3, "dim {dim}: the bound is {bound} of the spread");
                let tails = |r: &mut Random| even(r).powi(9) * 100.0;
                assert!(measure(dim, tails, random).0 <= 1.0, "dim {dim}");
                let sparse = |r: &mut Random| if r.below(10) == 0 { even(r) } else { 1e-4 * even(r) };
                assert!(measure(dim, sparse, random).0 <= 1.0, "dim {dim}");
                let small = |r: &mut Random| 1e-12 * even(r);
                assert!(measure(dim, small, random).0 <= 1.0, "dim {dim}");
            }
        }
    }

    #[test]
    fn what_cannot_be_bounded_is_infinite() {
        let bounds = Bounds { max: 1.0, norm: 2.0, rest: 0.01 };
        for x in [f32::NAN, f32::INFINITY, 1e20, 1e-20, 0.0] {
            let mut query = [0.0; 5];
            query[3] = x;
            let from = Buffer::new().quantize(token(), &query).0.coarse(5, bounds).from(1.0);
            assert!(!from.is_finite(), "{x}: {from}");
        }
        let keys = Bounds::of_scale(f32::NAN, 5);
        assert!(!Buffer::new().quantize(token(), &[1.0; 5]).0.coarse(5, keys).error.is_finite());
    }
}
