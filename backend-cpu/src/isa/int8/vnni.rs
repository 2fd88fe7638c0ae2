//! Integer dot products of x86: `vpdpbusd`, with 512 bits and with 256.

use core::arch::x86_64::*;

use super::{MAX_DIM, OFFSET, Tile, WIDTH, for_words};

/// [`OFFSET`] in each byte of a word.
pub(super) const OFFSETS: u32 = 0x8080_8080;

/// Writes `codes` as column `n` of a panel of rows of words, the offset added.
#[inline(always)]
fn pack_column(codes: &[i8], n: usize, panel: &mut [u32]) {
    let column = &mut panel[n..];
    for_words(codes, |k, word| column[k * WIDTH] = word ^ OFFSETS);
}

/// What the offset of the other side adds to the products with `query`, taken off.
#[inline(always)]
fn start(query: &[i8]) -> i32 {
    -OFFSET * query.iter().map(|&code| i32::from(code)).sum::<i32>()
}

/// The CPU has AVX-512 F, BW and VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(());

impl Vnni {
    /// The token, if the CPU has the features.
    pub(super) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Self(()))
    }

    #[inline(always)]
    pub(super) fn pack_column(self, codes: &[i8], n: usize, panel: &mut [u32]) {
        pack_column(codes, n, panel);
    }

    #[inline(always)]
    pub(super) fn multiply(self, tile: Tile<'_>, rows: usize, out: &mut [f32]) {
        let mut r = 0;
        while r < rows {
            let (tile, out) = (tile.rows_from(r), &mut out[r * tile.stride..]);
            // SAFETY: the CPU has the features by the token. The tile has at least `R` rows, and `out` WIDTH places in
            // each of them: `multiply` of the parent has asserted it.
            r += unsafe {
                match rows - r {
                    8.. => Self::tile::<8>(tile, out),
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn tile<const R: usize>(tile: Tile<'_>, out: &mut [f32]) -> usize {
        let Tile { depth, stride, .. } = tile;
        let (left, panel, out) = (tile.left.as_ptr().cast::<i32>(), tile.panel.as_ptr(), out.as_mut_ptr());
        let row = 1 + depth;
        // SAFETY: `r < R` and `k < depth`, so by the contract every place that is read or written is in its slice.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); 2]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [_mm512_set1_epi32(*left.add(r * row)); 2];
            }
            for k in 0..depth {
                let from = panel.add(k * WIDTH);
                let b = [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(16).cast())];
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = _mm512_set1_epi32(*left.add(r * row + 1 + k));
                    *acc = [_mm512_dpbusd_epi32(acc[0], b[0], a), _mm512_dpbusd_epi32(acc[1], b[1], a)];
                }
            }
            for j in 0..2 {
                let scale = _mm512_loadu_ps(tile.scales.as_ptr().add(16 * j));
                for (r, acc) in acc.iter().enumerate() {
                    let scores = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(acc[j]));
                    _mm512_storeu_ps(out.add(r * stride + 16 * j), scores);
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

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn squares_of(panel: &[u32]) -> [i32; WIDTH] {
        let (offsets, ones) = (_mm512_set1_epi32(OFFSETS.cast_signed()), _mm512_set1_epi8(1));
        let (mut sums, mut squares) = ([_mm512_setzero_si512(); 2], [0; WIDTH]);
        let mut codes = sums;
        for row in panel.chunks_exact(WIDTH) {
            for ((part, sum), codes) in row.chunks_exact(16).zip(&mut sums).zip(&mut codes) {
                // SAFETY: the chunk has 16 words.
                let shifted = unsafe { _mm512_loadu_si512(part.as_ptr().cast()) };
                let code = _mm512_xor_si512(shifted, offsets);
                *sum = _mm512_dpbusd_epi32(*sum, shifted, code);
                *codes = _mm512_dpbusd_epi32(*codes, ones, code);
            }
        }
        // The offset has added as many times the codes.
        for ((sum, codes), to) in sums.into_iter().zip(codes).zip(squares.chunks_exact_mut(16)) {
            // SAFETY: the chunk has 16 words.
            unsafe {
                _mm512_storeu_si512(to.as_mut_ptr().cast(), _mm512_sub_epi32(sum, _mm512_slli_epi32::<7>(codes)))
            };
        }
        squares
    }

    #[inline(always)]
    pub(super) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        let start = start(&query[..dim]);
        for (i, out) in out.chunks_mut(16).enumerate() {
            let mut sums = [0.0; 16];
            // SAFETY: the CPU has the features by the token; there are as many rows of `dim` codes as places in `out`.
            unsafe { Self::sixteen(query, start, dim, &rows[16 * i * dim..], out.len(), &mut sums) };
            out.copy_from_slice(&sums[..out.len()]);
        }
    }

    /// # Safety
    /// * The CPU has the features.
    /// * There are at least `count` rows of `dim` codes, at most [`MAX_DIM`], and at least one.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn sixteen(query: &[i8; MAX_DIM], start: i32, dim: usize, rows: &[i8], count: usize, out: &mut [f32; 16]) {
        let sign = _mm512_set1_epi8(i8::MIN);
        let mut acc = [_mm512_setzero_si512(); 16];
        let mut at = 0;
        // Whole vectors of whole sixteens are read without masks: the selection of one token takes 20.0 us in place of 22.7 (AMD
        // EPYC, 1024 sub-keys of 64, 4 heads).
        if count == 16 {
            while at + 64 <= dim {
                // SAFETY: 64 codes from `at` on are in the query and in each of 16 rows.
                unsafe {
                    let q = _mm512_loadu_si512(query.as_ptr().add(at).cast());
                    for (j, acc) in acc.iter_mut().enumerate() {
                        let row = _mm512_loadu_si512(rows.as_ptr().add(j * dim + at).cast());
                        *acc = _mm512_dpbusd_epi32(*acc, _mm512_xor_si512(row, sign), q);
                    }
                }
                at += 64;
            }
        }
        while at < dim {
            let left = (dim - at).min(64);
            let mask = u64::MAX >> (64 - left);
            // SAFETY: `at` is a multiple of 64 below `dim <= MAX_DIM`, itself a multiple of 64: so many codes of the
            // query may be read, and of a row those that the mask has.
            unsafe {
                let q = _mm512_loadu_si512(query.as_ptr().add(at).cast());
                for (j, acc) in acc.iter_mut().enumerate() {
                    // Those behind the last row are the last row again. What is not loaded meets a zero of the query.
                    let row = _mm512_maskz_loadu_epi8(mask, rows.as_ptr().add(j.min(count - 1) * dim + at));
                    *acc = _mm512_dpbusd_epi32(*acc, _mm512_xor_si512(row, sign), q);
                }
            }
            at += 64;
        }
        // Sums over four lanes, then over the quarters of the vectors.
        let pair = |a, b| _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let four = |i: usize| {
            let (a, b) = (pair(acc[i], acc[i + 1]), pair(acc[i + 2], acc[i + 3]));
            _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b))
        };
        let quarters = |a, b| _mm512_add_epi32(_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let sums = quarters(quarters(four(0), four(4)), quarters(four(8), four(12)));
        let sums = _mm512_cvtepi32_ps(_mm512_add_epi32(sums, _mm512_set1_epi32(start)));
        // SAFETY: `out` has 16 elements and is borrowed mutably.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sums) };
    }
}

/// The CPU has AVX2 and AVX-VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AvxVnni(());

impl AvxVnni {
    /// The token, if the CPU has the features.
    pub(super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("avxvnni")).then_some(Self(()))
    }

    #[inline(always)]
    pub(super) fn pack_column(self, codes: &[i8], n: usize, panel: &mut [u32]) {
        pack_column(codes, n, panel);
    }

    #[inline(always)]
    pub(super) fn multiply(self, tile: Tile<'_>, rows: usize, out: &mut [f32]) {
        let mut r = 0;
        while r < rows {
            let (tile, out) = (tile.rows_from(r), &mut out[r * tile.stride..]);
            // SAFETY: the CPU has the features by the token. The tile has at least `R` rows, and `out` WIDTH places in
            // each of them: `multiply` of the parent has asserted it.
            r += unsafe { if rows - r >= 2 { Self::tile::<2>(tile, out) } else { Self::tile::<1>(tile, out) } };
        }
    }

    /// # Safety
    /// * The CPU has the features.
    /// * `tile` has `R` rows and is sized as it says, and `out` has `(R - 1) · stride + WIDTH` elements.
    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn tile<const R: usize>(tile: Tile<'_>, out: &mut [f32]) -> usize {
        let Tile { depth, stride, .. } = tile;
        let (left, panel, out) = (tile.left.as_ptr().cast::<i32>(), tile.panel.as_ptr(), out.as_mut_ptr());
        let row = 1 + depth;
        // SAFETY: `r < R`, `k < depth` and `j < 4`, so by the contract every place that is read or written is in its
        // slice.
        unsafe {
            let mut acc = [[_mm256_setzero_si256(); 4]; R];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = [_mm256_set1_epi32(*left.add(r * row)); 4];
            }
            for k in 0..depth {
                let from = panel.add(k * WIDTH);
                let b: [_; 4] = core::array::from_fn(|j| _mm256_loadu_si256(from.add(8 * j).cast()));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let a = _mm256_set1_epi32(*left.add(r * row + 1 + k));
                    for (acc, b) in acc.iter_mut().zip(b) {
                        *acc = _mm256_dpbusd_avx_epi32(*acc, b, a);
                    }
                }
            }
            for j in 0..4 {
                let scale = _mm256_loadu_ps(tile.scales.as_ptr().add(8 * j));
                for (r, acc) in acc.iter().enumerate() {
                    let scores = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(acc[j]));
                    _mm256_storeu_ps(out.add(r * stride + 8 * j), scores);
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

    #[target_feature(enable = "avx2,avxvnni")]
    fn squares_of(panel: &[u32]) -> [i32; WIDTH] {
        let (offsets, ones) = (_mm256_set1_epi32(OFFSETS.cast_signed()), _mm256_set1_epi8(1));
        let (mut sums, mut squares) = ([_mm256_setzero_si256(); 4], [0; WIDTH]);
        let mut codes = sums;
        for row in panel.chunks_exact(WIDTH) {
            for ((part, sum), codes) in row.chunks_exact(8).zip(&mut sums).zip(&mut codes) {
                // SAFETY: the chunk has 8 words.
                let shifted = unsafe { _mm256_loadu_si256(part.as_ptr().cast()) };
                let code = _mm256_xor_si256(shifted, offsets);
                *sum = _mm256_dpbusd_avx_epi32(*sum, shifted, code);
                *codes = _mm256_dpbusd_avx_epi32(*codes, ones, code);
            }
        }
        // The offset has added as many times the codes.
        for ((sum, codes), to) in sums.into_iter().zip(codes).zip(squares.chunks_exact_mut(8)) {
            // SAFETY: the chunk has 8 words.
            unsafe {
                _mm256_storeu_si256(to.as_mut_ptr().cast(), _mm256_sub_epi32(sum, _mm256_slli_epi32::<7>(codes)))
            };
        }
        squares
    }

    #[inline(always)]
    pub(super) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        let start = start(&query[..dim]);
        for (out, row) in out.iter_mut().zip(rows.chunks_exact(dim.max(1))) {
            // SAFETY: the CPU has the features by the token.
            *out = unsafe { Self::one(query, start, row) } as f32;
        }
    }

    /// # Safety
    /// * The CPU has the features.
    #[target_feature(enable = "avx2,avxvnni")]
    unsafe fn one(query: &[i8; MAX_DIM], start: i32, row: &[i8]) -> i32 {
        let sign = _mm256_set1_epi8(i8::MIN);
        let mut acc = [_mm256_setzero_si256(); 2];
        let (whole, rest) = row.as_chunks::<32>();
        let mut last = [0; 32];
        last[..rest.len()].copy_from_slice(rest);
        for (i, (q, row)) in query.as_chunks::<32>().0.iter().zip(whole.iter().chain([&last])).enumerate() {
            // SAFETY: both are arrays of 32 codes. Those behind the row meet zeros of the query.
            unsafe {
                let (q, row) = (_mm256_loadu_si256(q.as_ptr().cast()), _mm256_loadu_si256(row.as_ptr().cast()));
                acc[i % 2] = _mm256_dpbusd_avx_epi32(acc[i % 2], _mm256_xor_si256(row, sign), q);
            }
        }
        let acc = _mm256_add_epi32(acc[0], acc[1]);
        let four = _mm_add_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256::<1>(acc));
        let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b0100_1110>(four));
        start + _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b1011_0001>(two)))
    }
}
