//! Kernels over rows of a table: weighted sums and dots, in blocks of columns that stay in registers.

use memlayer_core::element::Format;
use memlayer_core::{Element, Int4, Row};

use super::{Lanes, Simd};

/// Columns in a block: 8 vectors of 16.
pub(crate) const BLOCK: usize = 128;

/// What is done with a block of columns: `NV` vectors from column `col` on.
pub(crate) trait Columns {
    /// Whether blocks of 16 vectors are worth it, where there are registers for them: of rows of bytes a block of 8 is two
    /// lines, and the same row is then read again for the next two.
    #[inline(always)]
    fn wide(&self) -> bool {
        false
    }
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize);
}

/// Cuts `dim` columns into blocks, widest first. Columns that fill no vector are taken by narrow portable vectors.
#[inline(always)]
pub(crate) fn columns<S: Simd, C: Columns>(s: S, dim: usize, work: &mut C) {
    let mut col = 0;
    if S::LANES == 16 && work.wide() {
        while dim - col >= 16 * S::LANES {
            work.block::<S, 16>(s, col);
            col += 16 * S::LANES;
        }
    }
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
    match E::FORMAT {
        Format::Int4 => return widen_int4::<32>(bytemuck::cast_slice(codes), col, out),
        Format::Int4x64 => return widen_int4::<64>(bytemuck::cast_slice(codes), col, out),
        _ => {}
    }
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

/// Where the values from `col` on are in a row of [`Int4`], for a vector that lies in half a group.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Nibbles {
    /// The first byte of their group.
    pub(super) group: usize,
    /// The first of their bytes.
    pub(super) byte: usize,
    /// Bits that their halves of the bytes are shifted by.
    pub(super) shift: i32,
}

#[cfg(target_arch = "x86_64")]
impl Nibbles {
    #[inline(always)]
    pub(super) const fn new(group: usize, col: usize) -> Self {
        let (half, place) = (group / 2, col % group);
        let start = col / group * (2 + half);
        Self { group: start, byte: start + 2 + place % half, shift: if place < half { 0 } else { 4 } }
    }
}

/// [`widen`] of groups of `G` integers: half a group at a time, so that it becomes vector code.
#[inline(always)]
fn widen_int4<const G: usize>(codes: &[Int4<G>], col: usize, out: &mut [f32]) {
    let half = G / 2;
    if !col.is_multiple_of(half) || !out.len().is_multiple_of(half) {
        for (i, out) in out.iter_mut().enumerate() {
            *out = Int4::value(codes, col + i);
        }
        return;
    }
    for (i, out) in out.chunks_exact_mut(half).enumerate() {
        let i = col / half + i;
        let group = &codes[i / 2 * Int4::<G>::GROUP..][..Int4::<G>::GROUP];
        let (scale, shift) = (Int4::scale(group), 4 * (i % 2));
        for (out, byte) in out.iter_mut().zip(&group[2..]) {
            *out = scale * (f32::from(byte.0 >> shift & 15) - 8.0);
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
    if row.scales.len() > 1 {
        // By value: sums whose address is known to a call would stay in memory.
        *acc = add_groups(s, *acc, weight, row, col);
        return;
    }
    let factor = match row.scales {
        [scale] => weight * scale,
        _ => weight,
    };
    let (codes, col) = block(row.codes, col, NV * S::LANES);
    s.add_scaled(acc, factor, codes, col);
}

/// What [`Simd::add_scaled`] says, by [`Simd::widen`].
#[inline(always)]
pub(super) fn add_widened<S: Simd, E: Element, const NV: usize>(
    s: S,
    acc: &mut [S::V; NV],
    factor: f32,
    codes: &[E],
    col: usize,
) {
    let factor = s.splat(factor);
    for (i, acc) in acc.iter_mut().enumerate() {
        *acc = s.add(*acc, s.mul(factor, s.widen(codes, col + i * S::LANES)));
    }
}

/// The same of e4m3, where `part` gives a vector's values without what most of them do not need: a 256th of them, of codes
/// that are no NaN. A power of two takes nothing from the products, unless the factor then overflows.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn add_e4m3<S: Simd, E: Element, const NV: usize>(
    s: S,
    acc: &mut [S::V; NV],
    factor: f32,
    codes: &[E],
    col: usize,
    part: impl Fn(S, &[u8]) -> S::V,
) {
    let bytes = &bytemuck::cast_slice::<E, u8>(codes)[col..col + NV * S::LANES];
    let nan = bytes.iter().fold(false, |nan, byte| nan | (byte & 0x7f == 0x7f));
    if nan || factor.abs() >= f32::MAX / 256.0 {
        // By value, as below.
        *acc = add_any(s, *acc, factor, codes, col);
        return;
    }
    let factor = s.splat(256.0 * factor);
    for (acc, bytes) in acc.iter_mut().zip(bytes.chunks_exact(S::LANES)) {
        *acc = s.add(*acc, s.mul(factor, part(s, bytes)));
    }
}

/// [`add_widened`] where it is rare.
#[cfg(target_arch = "x86_64")]
#[cold]
#[inline(never)]
fn add_any<S: Simd, E: Element, const NV: usize>(
    s: S,
    mut acc: [S::V; NV],
    factor: f32,
    codes: &[E],
    col: usize,
) -> [S::V; NV] {
    s.vectorize(
        #[inline(always)]
        || {
            add_widened(s, &mut acc, factor, codes, col);
            acc
        },
    )
}

/// The codes that hold values `col..col + n`, and where among them value `col` is. With a code a value they are
/// exactly `n`: one check in place of one for each vector.
#[inline(always)]
fn block<E: Element>(codes: &[E], col: usize, n: usize) -> (&[E], usize) {
    if E::codes(1) == 1 { (&codes[col..col + n], 0) } else { (codes, col) }
}

/// [`add_row`] of a row with a scale for each group of its values.
#[inline(never)]
fn add_groups<S: Simd, E: Element, const NV: usize>(
    s: S,
    mut acc: [S::V; NV],
    weight: f32,
    row: &Row<'_, E>,
    col: usize,
) -> [S::V; NV] {
    s.vectorize(
        #[inline(always)]
        || {
            for (i, acc) in acc.iter_mut().enumerate() {
                let col = col + i * S::LANES;
                let mut factors = [0.0; 16];
                for (i, factor) in factors[..S::LANES].iter_mut().enumerate() {
                    *factor = weight * row.scale::<f32>(col + i);
                }
                *acc = s.add(*acc, s.mul(s.load(&factors), s.widen(row.codes, col)));
            }
            acc
        },
    )
}

/// The dot of a block of a row with the vector `x`.
#[inline(always)]
pub(crate) fn dot_row<S: Simd, E: Element, const NV: usize>(s: S, x: &[S::V; NV], row: &Row<'_, E>, col: usize) -> f32 {
    let mut sums = [s.splat(0.0); 2];
    if row.scales.len() > 1 {
        for (i, &x) in x.iter().enumerate() {
            let col = col + i * S::LANES;
            let mut scales = [0.0; 16];
            for (i, scale) in scales[..S::LANES].iter_mut().enumerate() {
                *scale = row.scale::<f32>(col + i);
            }
            let values = s.mul(s.widen(row.codes, col), s.load(&scales));
            sums[i % 2] = s.mul_add(x, values, sums[i % 2]);
        }
    } else {
        let (codes, col) = block(row.codes, col, NV * S::LANES);
        for (i, &x) in x.iter().enumerate() {
            sums[i % 2] = s.mul_add(x, s.widen(codes, col + i * S::LANES), sums[i % 2]);
        }
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
