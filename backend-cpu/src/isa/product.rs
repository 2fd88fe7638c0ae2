//! Dense products: a tile of the result stays in registers while the depth runs past it.
//!
//! Every element of a result is one chain of (fused) products and sums in order of the depth, whatever the tiles:
//! results depend on neither blocks nor workers.

use super::Simd;

/// Columns of a panel: two vectors.
#[inline(always)]
pub(crate) const fn width<S: Simd>() -> usize {
    2 * S::LANES
}

/// The widest panel of any instruction set.
pub(crate) const MAX_WIDTH: usize = 2 * 16;

/// Depth that is run through in one go, so that a panel stays in the first cache.
pub(crate) const DEPTH: usize = 256;

/// A matrix of a product's left: element `(r, k)` is `data[r · row + k · step]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

/// A panel of a product's right: element `(k, j)` is `data[k · step + j]`, for [`width`] columns `j`.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) step: usize,
}

/// `out[r · stride + j] = Σ_k left(r, k) · panel(k, j)`, or added to it with `more`, for `rows` rows and the first
/// `columns` columns of the panel.
///
/// # Panics
/// If an operand is too short.
#[inline(always)]
pub(crate) fn multiply<S: Simd>(
    s: S,
    (rows, depth, columns): (usize, usize, usize),
    left: Left<'_>,
    panel: Panel<'_>,
    out: (&mut [f32], usize),
    more: bool,
) {
    let (out, stride) = out;
    if rows == 0 || columns == 0 {
        return;
    }
    assert!(columns <= width::<S>());
    assert!((rows - 1) * stride + columns <= out.len(), "out of a product");
    if depth > 0 {
        assert!((rows - 1) * left.row + (depth - 1) * left.step < left.data.len(), "left of a product");
        assert!((depth - 1) * panel.step + width::<S>() <= panel.data.len(), "panel of a product");
    }
    let mut r = 0;
    while r < rows {
        let left = Left { data: &left.data[(r * left.row).min(left.data.len())..], ..left };
        let out = (&mut out[r * stride..], stride);
        let size = (depth, columns);
        r += match rows - r {
            // Half a panel leaves registers for twice the rows.
            16.. if S::TILE == 8 && columns <= S::LANES => tile::<S, 16, 1>(s, size, left, panel, out, more),
            12.. if S::TILE == 6 && columns <= S::LANES => tile::<S, 12, 1>(s, size, left, panel, out, more),
            8.. if S::TILE == 8 => tile::<S, 8, 2>(s, size, left, panel, out, more),
            6.. if S::TILE == 6 => tile::<S, 6, 2>(s, size, left, panel, out, more),
            4.. => tile::<S, 4, 2>(s, size, left, panel, out, more),
            2.. => tile::<S, 2, 2>(s, size, left, panel, out, more),
            _ => tile::<S, 1, 2>(s, size, left, panel, out, more),
        };
    }
}

/// `R` rows of [`multiply`], whose checks hold for them, and `NV` vectors of its columns, at most two; returns `R`.
#[inline(always)]
fn tile<S: Simd, const R: usize, const NV: usize>(
    s: S,
    (depth, columns): (usize, usize),
    left: Left<'_>,
    panel: Panel<'_>,
    (out, stride): (&mut [f32], usize),
    more: bool,
) -> usize {
    // Columns that fill no vector go by way of a tile of their own. Both loops over the accumulators are of a length that
    // the compiler knows and cannot fail: else it would keep them in memory while the depth runs past.
    let whole = columns == NV * S::LANES;
    let mut edge = [[0.0; MAX_WIDTH]; R];
    if more && !whole {
        edge.iter_mut().enumerate().for_each(|(r, to)| to[..columns].copy_from_slice(&out[r * stride..][..columns]));
    }
    let (to, to_stride) = if whole { (out.as_mut_ptr(), stride) } else { (edge.as_mut_ptr().cast::<f32>(), MAX_WIDTH) };
    let mut acc = [[s.splat(0.0); NV]; R];
    if more {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (j, acc) in acc.iter_mut().enumerate() {
                // SAFETY: `r < R` rows are left and `NV` vectors are all columns, so that `multiply` asserts that they are
                // in `out`; a row of the edge has room for both.
                *acc = unsafe { s.load_at(to.add(r * to_stride + j * S::LANES)) };
            }
        }
    }
    let (left_start, panel_start) = (left.data.as_ptr(), panel.data.as_ptr());
    for k in 0..depth {
        // SAFETY: `k < depth`, and `multiply` asserts that `(depth - 1) · step + width` elements of the panel exist,
        // so two vectors from `k · step` on are in bounds, and there are no more.
        let b: [S::V; NV] = unsafe {
            let from = panel_start.add(k * panel.step);
            core::array::from_fn(|j| s.load_at(from.add(j * S::LANES)))
        };
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `r < R` rows are left, and `multiply` asserts that element (last row, last of the depth) of
            // the left exists; this one is not behind it.
            let a = s.splat(unsafe { *left_start.add(r * left.row + k * left.step) });
            for (acc, &b) in acc.iter_mut().zip(&b) {
                *acc = s.mul_add(a, b, *acc);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (j, &acc) in acc.iter().enumerate() {
            // SAFETY: as for the loads; both are borrowed mutably.
            unsafe { s.store_at(acc, to.add(r * to_stride + j * S::LANES)) };
        }
    }
    if !whole {
        edge.iter().enumerate().for_each(|(r, from)| out[r * stride..][..columns].copy_from_slice(&from[..columns]));
    }
    R
}

/// Makes a panel, rows of [`width`], out of up to so many rows of `depth` elements at `rows[n · stride..]`; columns
/// without a row are zero.
#[inline(always)]
pub(crate) fn transpose<S: Simd>(s: S, rows: &[f32], stride: usize, count: usize, depth: usize, panel: &mut [f32]) {
    let width = width::<S>();
    if count < width {
        panel[..depth * width].fill(0.0);
    }
    // Whole squares, then the rows and the ends of rows that fill none.
    let (squares, deep) = (count / S::LANES * S::LANES, depth / S::LANES * S::LANES);
    for n in (0..squares).step_by(S::LANES) {
        for k in (0..deep).step_by(S::LANES) {
            s.turn((&rows[n * stride + k..], stride), (&mut panel[k * width + n..], width));
        }
    }
    for n in 0..count {
        let start = if n < squares { deep } else { 0 };
        for k in start..depth {
            panel[k * width + n] = rows[n * stride + k];
        }
    }
}
