//! Integer dot products of 64-bit Arm: `sdot` (dotprod) and `smmla` (i8mm). The standard library's intrinsics for them
//! are not stable; the instructions are.

use core::arch::aarch64::*;
use core::arch::asm;

use super::{MAX_DIM, Tile, WIDTH, for_words};

/// `acc[i] + Σ a[4i..4i + 4] · b[4i..4i + 4]`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction, which the feature has, reads and writes these registers alone.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// `acc[2i + j] + Σ a[8i..8i + 8] · b[8j..8j + 8]`.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut acc: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction, which the feature has, reads and writes these registers alone.
    unsafe {
        asm!("smmla {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// The CPU has NEON and `sdot`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dot(());

impl Dot {
    /// The token, if the CPU has the feature.
    pub(super) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("dotprod").then_some(Self(()))
    }

    /// A row of words holds one of each column.
    #[inline(always)]
    pub(super) fn pack_column(self, codes: &[i8], n: usize, panel: &mut [u32]) {
        let column = &mut panel[n..];
        for_words(codes, |k, word| column[k * WIDTH] = word);
    }

    #[inline(always)]
    pub(super) fn multiply(self, tile: Tile<'_>, rows: usize, out: &mut [f32]) {
        let mut r = 0;
        while r < rows {
            let (tile, out) = (tile.rows_from(r), &mut out[r * tile.stride..]);
            // SAFETY: the CPU has the feature by the token. The tile has at least `R` rows, and `out` WIDTH places in
            // each of them: `multiply` of the parent has asserted it.
            r += unsafe {
                match rows - r {
                    4.. => Self::tile::<4>(tile, out),
                    2.. => Self::tile::<2>(tile, out),
                    _ => Self::tile::<1>(tile, out),
                }
            };
        }
    }

    /// # Safety
    /// * The CPU has the features.
    /// * `tile` has `R` rows and is sized as it says, and `out` has `(R - 1) · stride + WIDTH` elements.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn tile<const R: usize>(tile: Tile<'_>, out: &mut [f32]) -> usize {
        let Tile { depth, stride, .. } = tile;
        let (left, panel, out) = (tile.left.as_ptr(), tile.panel.as_ptr(), out.as_mut_ptr());
        let row = 1 + depth;
        // Half the columns at a time: sixteen sums stay in registers.
        for half in [0, WIDTH / 2] {
            let mut acc = [[vdupq_n_s32(0); 4]; R];
            // SAFETY: `r < R`, `k < depth`, and `half + 16 <= WIDTH`, so by the contract every place that is read or
            // written is in its slice.
            unsafe {
                for k in 0..depth {
                    let from = panel.add(k * WIDTH + half);
                    let b: [_; 4] = core::array::from_fn(|j| vreinterpretq_s8_u32(vld1q_u32(from.add(4 * j))));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let a = vreinterpretq_s8_u32(vld1q_dup_u32(left.add(r * row + 1 + k)));
                        for (acc, b) in acc.iter_mut().zip(b) {
                            *acc = sdot(*acc, b, a);
                        }
                    }
                }
                for j in 0..4 {
                    let scale = vld1q_f32(tile.scales.as_ptr().add(half + 4 * j));
                    for (r, acc) in acc.iter().enumerate() {
                        let scores = vmulq_f32(scale, vcvtq_f32_s32(acc[j]));
                        vst1q_f32(out.add(r * stride + half + 4 * j), scores);
                    }
                }
            }
        }
        R
    }

    #[inline(always)]
    pub(super) fn squares(self, panel: &[u32]) -> [i32; WIDTH] {
        // SAFETY: the CPU has the features by the token, and that is all the function asks for.
        unsafe { Self::squares_of(panel) }
    }

    #[target_feature(enable = "neon,dotprod")]
    fn squares_of(panel: &[u32]) -> [i32; WIDTH] {
        let mut squares = [0; WIDTH];
        for row in panel.chunks_exact(WIDTH) {
            for (four, to) in row.chunks_exact(4).zip(squares.chunks_exact_mut(4)) {
                // SAFETY: both chunks have four words.
                unsafe {
                    let codes = vreinterpretq_s8_u32(vld1q_u32(four.as_ptr()));
                    vst1q_s32(to.as_mut_ptr(), sdot(vld1q_s32(to.as_ptr()), codes, codes));
                }
            }
        }
        squares
    }

    #[inline(always)]
    pub(super) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(dim.max(1))) {
            // SAFETY: the CPU has the feature by the token.
            *out = unsafe { Self::one(query, row) } as f32;
        }
    }

    /// # Safety
    /// * The CPU has the features.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn one(query: &[i8; MAX_DIM], row: &[i8]) -> i32 {
        let mut acc = [vdupq_n_s32(0); 2];
        let (whole, rest) = row.as_chunks::<16>();
        let mut last = [0; 16];
        last[..rest.len()].copy_from_slice(rest);
        for (i, (q, row)) in query.as_chunks::<16>().0.iter().zip(whole.iter().chain([&last])).enumerate() {
            // SAFETY: both are arrays of 16 codes.
            acc[i % 2] = unsafe { sdot(acc[i % 2], vld1q_s8(q.as_ptr()), vld1q_s8(row.as_ptr())) };
        }
        vaddvq_s32(vaddq_s32(acc[0], acc[1]))
    }
}

/// The CPU has NEON, `sdot` and `smmla`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix(Dot);

impl Matrix {
    /// The token, if the CPU has the features.
    pub(super) fn new() -> Option<Self> {
        Dot::new().filter(|_| std::arch::is_aarch64_feature_detected!("i8mm")).map(Self)
    }

    /// A pair of words of each column, one behind the other: eight codes are one operand.
    #[inline(always)]
    pub(super) fn pack_column(self, codes: &[i8], n: usize, panel: &mut [u32]) {
        for_words(codes, |k, word| panel[k / 2 * 2 * WIDTH + 2 * n + k % 2] = word);
    }

    #[inline(always)]
    pub(super) fn multiply(self, tile: Tile<'_>, rows: usize, out: &mut [f32]) {
        let mut r = 0;
        while r < rows {
            let (tile, out) = (tile.rows_from(r), &mut out[r * tile.stride..]);
            // SAFETY: the CPU has the features by the token. The tile has at least as many rows, and `out` WIDTH places
            // in each of them: `multiply` of the parent has asserted it.
            r += unsafe {
                match rows - r {
                    4.. => Self::tile::<2>(tile, 4, out),
                    2.. => Self::tile::<1>(tile, 2, out),
                    _ => Self::tile::<1>(tile, 1, out),
                }
            };
        }
    }

    /// `P` pairs of rows, of which the last may be one row, twice.
    ///
    /// # Safety
    /// * The CPU has the features.
    /// * `tile` has `rows` rows, `2P` or `2P - 1`, and is sized as it says; `out` has `(rows - 1) · stride + WIDTH`
    ///   elements.
    #[target_feature(enable = "neon,i8mm")]
    unsafe fn tile<const P: usize>(tile: Tile<'_>, rows: usize, out: &mut [f32]) -> usize {
        let Tile { depth, stride, .. } = tile;
        let (left, panel, out) = (tile.left.as_ptr(), tile.panel.as_ptr(), out.as_mut_ptr());
        let row = |r: usize| r.min(rows - 1) * (1 + depth) + 1;
        // Half the columns at a time, in pairs: with two pairs of rows sixteen sums of two by two stay in registers.
        for half in [0, WIDTH / 2] {
            let mut acc = [[vdupq_n_s32(0); 8]; P];
            // SAFETY: rows are below `rows`, pairs of words below `depth`, which is even, and columns below WIDTH, so by
            // the contract every place that is read or written is in its slice.
            unsafe {
                for k in (0..depth).step_by(2) {
                    let from = panel.add(k * WIDTH + 2 * half);
                    let b: [_; 8] = core::array::from_fn(|j| vreinterpretq_s8_u32(vld1q_u32(from.add(4 * j))));
                    for (p, acc) in acc.iter_mut().enumerate() {
                        let eight = |r: usize| vld1_s8(left.add(row(r) + k).cast());
                        let a = vcombine_s8(eight(2 * p), eight(2 * p + 1));
                        for (acc, b) in acc.iter_mut().zip(b) {
                            *acc = smmla(*acc, a, b);
                        }
                    }
                }
                for j in 0..4 {
                    let scale = vld1q_f32(tile.scales.as_ptr().add(half + 4 * j));
                    for (p, acc) in acc.iter().enumerate() {
                        // Two columns of the first row, then of the second.
                        let two = [2 * j, 2 * j + 1].map(|j| vreinterpretq_s64_s32(acc[j]));
                        for (r, four) in
                            [vzip1q_s64(two[0], two[1]), vzip2q_s64(two[0], two[1])].into_iter().enumerate()
                        {
                            if 2 * p + r < rows {
                                let scores = vmulq_f32(scale, vcvtq_f32_s32(vreinterpretq_s32_s64(four)));
                                vst1q_f32(out.add((2 * p + r) * stride + half + 4 * j), scores);
                            }
                        }
                    }
                }
            }
        }
        rows
    }

    #[inline(always)]
    pub(super) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        self.0.dots(query, dim, rows, out);
    }
}
