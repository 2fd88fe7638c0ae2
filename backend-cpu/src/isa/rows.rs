//! Kernels over rows of a table: weighted sums and dots, in blocks of columns that stay in registers.

use memlayer_core::element::Format;
use memlayer_core::{Element, Row};

use super::{Lanes, Simd};

/// Most columns in a block: 8 vectors of 16.
pub(crate) const BLOCK: usize = 128;

/// What is done with a block of columns: `NV` vectors from column `col` on.
pub(crate) trait Columns {
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize);
}

/// Cuts `dim` columns into blocks, widest first. Columns that fill no vector are taken by narrow portable vectors.
#[inline(always)]
pub(crate) fn columns<S: Simd>(s: S, dim: usize, work: &mut impl Columns) {
    let mut col = 0;
    while dim - col >= 8 * S::LANES {
        work.block::<S, 8>(s, col);
        col += 8 * S::LANES;
    }
    if dim - col >= 4 * S::LANES {
        work.block::<S, 4>(s, col);
        col += 4 * S::LANES;
    }
    if dim - col >= 2 * S::LANES {
        work.block::<S, 2>(s, col);
        col += 2 * S::LANES;
    }
    if dim - col >= S::LANES {
        work.block::<S, 1>(s, col);
        col += S::LANES;
    }
    if S::LANES > 8 && dim - col >= 8 {
        work.block::<Lanes<8>, 1>(Lanes, col);
        col += 8;
    }
    if S::LANES > 4 && dim - col >= 4 {
        work.block::<Lanes<4>, 1>(Lanes, col);
        col += 4;
    }
    while col < dim {
        work.block::<Lanes<1>, 1>(Lanes, col);
        col += 1;
    }
}

/// `codes` as `f32`, if that is what they are.
#[inline(always)]
pub(crate) fn as_f32<E: Element>(codes: &[E]) -> Option<&[f32]> {
    (E::FORMAT == Format::F32).then(|| bytemuck::cast_slice(codes))
}

/// The codes `col..col + out.len()` of a row of `dim`, unscaled.
#[inline(always)]
pub(crate) fn widen<E: Element>(codes: &[E], col: usize, out: &mut [f32]) {
    let n = out.len();
    if E::codes(n) == n {
        // A code a value: the shorter slice spares the loop its bounds checks, so that it becomes vector code.
        let codes = &codes[col..col + n];
        for (i, out) in out.iter_mut().enumerate() {
            *out = E::value(codes, i);
        }
    } else {
        for (i, out) in out.iter_mut().enumerate() {
            *out = E::value(codes, col + i);
        }
    }
}

/// `acc += (weight · scale) · code`, multiplied, then added.
#[inline(always)]
pub(crate) fn add_row<S: Simd, E: Element, const NV: usize>(
    s: S,
    acc: &mut [S::V; NV],
    weight: f32,
    row: &Row<'_, E>,
    col: usize,
) {
    let n = NV * S::LANES;
    let mut wide = [0.0; BLOCK];
    let codes = match as_f32(row.codes) {
        Some(codes) => &codes[col..col + n],
        None => {
            widen(row.codes, col, &mut wide[..n]);
            &wide[..n]
        }
    };
    match row.scales {
        [] | [_] => {
            let factor = match row.scales {
                [scale] => weight * scale,
                _ => weight,
            };
            let factor = s.splat(factor);
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = s.add(*acc, s.mul(factor, s.load(&codes[i * S::LANES..])));
            }
        }
        _ => {
            let mut factors = [0.0; BLOCK];
            for (i, factor) in factors[..n].iter_mut().enumerate() {
                *factor = weight * row.scale::<f32>(col + i);
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let factor = s.load(&factors[i * S::LANES..]);
                *acc = s.add(*acc, s.mul(factor, s.load(&codes[i * S::LANES..])));
            }
        }
    }
}

/// The dot of a block of a row with the vector `x`.
#[inline(always)]
pub(crate) fn dot_row<S: Simd, E: Element, const NV: usize>(s: S, x: &[S::V; NV], row: &Row<'_, E>, col: usize) -> f32 {
    let n = NV * S::LANES;
    let mut wide = [0.0; BLOCK];
    let codes = match as_f32(row.codes) {
        Some(codes) if row.scales.len() <= 1 => &codes[col..col + n],
        _ => {
            widen(row.codes, col, &mut wide[..n]);
            if row.scales.len() > 1 {
                for (i, value) in wide[..n].iter_mut().enumerate() {
                    *value *= row.scale::<f32>(col + i);
                }
            }
            &wide[..n]
        }
    };
    let mut sums = [s.splat(0.0); 2];
    for (i, &x) in x.iter().enumerate() {
        sums[i % 2] = s.mul_add(x, s.load(&codes[i * S::LANES..]), sums[i % 2]);
    }
    let sum = if NV == 1 { s.sum(sums[0]) } else { s.sum(s.add(sums[0], sums[1])) };
    match row.scales {
        [scale] => scale * sum,
        _ => sum,
    }
}

/// The sum of the products of two slices of one length.
#[inline(always)]
pub(crate) fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut sums = [s.splat(0.0); 4];
    let (mut a4, mut b4) = (a.chunks_exact(4 * S::LANES), b.chunks_exact(4 * S::LANES));
    for (a, b) in (&mut a4).zip(&mut b4) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.mul_add(s.load(&a[i * S::LANES..]), s.load(&b[i * S::LANES..]), *sum);
        }
    }
    let (mut a1, mut b1) = (a4.remainder().chunks_exact(S::LANES), b4.remainder().chunks_exact(S::LANES));
    for (a, b) in (&mut a1).zip(&mut b1) {
        sums[0] = s.mul_add(s.load(a), s.load(b), sums[0]);
    }
    let mut sum = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    for (a, b) in a1.remainder().iter().zip(b1.remainder()) {
        sum += a * b;
    }
    sum
}
