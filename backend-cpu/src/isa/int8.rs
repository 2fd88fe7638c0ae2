//! Integer dot products: `u8 · i8` in fours, summed in 32 bits, where the CPU has an instruction for them.
//!
//! Codes are `i8`, and every sum is exact. Four codes lie in a word, the first in its low byte.

#[cfg(target_arch = "x86_64")]
use core::arch::x86_64::*;

use super::Token;

/// Columns of a panel.
pub(crate) const WIDTH: usize = 32;

/// The most rows that [`Int8::multiply`] takes.
pub(crate) const ROWS: usize = 8;

/// The most values of a vector: so that a sum of products of codes has 24 bits, and is exact as a float.
pub(crate) const MAX_DIM: usize = 1024;

/// What is added to a code of a panel, whose bytes have no sign.
const OFFSET: i32 = 128;

/// Words of a left row that holds `dim` codes: a start, then the codes.
pub(crate) const fn left_len(dim: usize) -> usize {
    1 + dim.div_ceil(4)
}

/// Writes `codes` as a row on the left of [`Int8::multiply`], of [`left_len`] words.
#[inline(always)]
pub(crate) fn pack_left(codes: &[i8], to: &mut [u32]) {
    let Some((start, words)) = to.split_first_mut() else { return };
    // Of every product with the offset of the other side.
    *start = (-OFFSET * codes.iter().map(|&code| i32::from(code)).sum::<i32>()).cast_unsigned();
    let (fours, rest) = codes.as_chunks::<4>();
    let last = [0, 1, 2, 3].map(|i| *rest.get(i).unwrap_or(&0));
    for (word, four) in words.iter_mut().zip(fours.iter().chain([&last])) {
        *word = u32::from_le_bytes(four.map(i8::cast_unsigned));
    }
}

/// Writes `codes` as column `n` of a panel of [`WIDTH`] columns and a quarter as many rows as there are codes.
#[inline(always)]
pub(crate) fn pack_column(codes: &[i8], n: usize, panel: &mut [u32]) {
    let (fours, rest) = codes.as_chunks::<4>();
    let mut words = panel[n..].iter_mut().step_by(WIDTH);
    // In this order: a zip asks its first side first, and a word asked for is gone.
    for (four, word) in fours.iter().zip(words.by_ref()) {
        *word = u32::from_le_bytes(four.map(i8::cast_unsigned)) ^ 0x8080_8080;
    }
    if let (Some(word), [first, ..]) = (words.next(), rest) {
        // The last code, up to three times too often, meets a zero of the query.
        let four = [0, 1, 2, 3].map(|i| *rest.get(i).unwrap_or(first));
        *word = u32::from_le_bytes(four.map(i8::cast_unsigned)) ^ 0x8080_8080;
    }
}

/// The right to use the instructions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Int8 {
    #[cfg(target_arch = "x86_64")]
    Vnni(Vnni),
}

impl Int8 {
    /// The instructions that go with an instruction set, if this machine has them.
    pub(crate) fn new(token: Token) -> Option<Self> {
        match token {
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => is_x86_feature_detected!("avx512vnni").then_some(Self::Vnni(Vnni(()))),
            _ => None,
        }
    }

    /// `out[r · stride + j] = scales[j] · Σ left(r) · panel(j)`, for the rows of `left`, at most [`ROWS`] of
    /// [`left_len`]`(4 · depth)`, and the [`WIDTH`] columns of `panel`.
    ///
    /// # Panics
    /// If an operand is too short or there are too many rows.
    #[inline(always)]
    pub(crate) fn multiply(self, left: &[u32], panel: &[u32], scales: &[f32], out: &mut [f32], stride: usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(vnni) => vnni.multiply(left, panel, scales, out, stride),
        }
    }

    /// `out[n] = Σ query · row n`, for rows of `dim` codes; behind so many the query is zero.
    ///
    /// # Panics
    /// If there are fewer rows than places in `out`.
    #[inline(always)]
    pub(crate) fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(vnni) => vnni.dots(query, dim, rows, out),
        }
    }
}

/// The CPU has AVX-512 F, BW and VNNI.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Vnni(());

#[cfg(target_arch = "x86_64")]
impl Vnni {
    #[inline(always)]
    fn multiply(self, left: &[u32], panel: &[u32], scales: &[f32], out: &mut [f32], stride: usize) {
        let depth = panel.len() / WIDTH;
        let rows = left.len() / (1 + depth);
        assert!(scales.len() >= WIDTH && rows <= ROWS, "a panel of integers");
        assert!(rows == 0 || (rows - 1) * stride + WIDTH <= out.len(), "out of integers");
        let mut r = 0;
        while r < rows {
            let (left, out) = (&left[r * (1 + depth)..], &mut out[r * stride..]);
            // SAFETY: the CPU has the features by the token. `R` rows of 1 + depth words are left, `depth` rows of
            // WIDTH words are the panel, there are WIDTH scales, and WIDTH places in each of the `R` rows of `out`:
            // asserted above.
            r += unsafe {
                match rows - r {
                    8.. => Self::tile::<8>(left, depth, panel, scales, out, stride),
                    4.. => Self::tile::<4>(left, depth, panel, scales, out, stride),
                    2.. => Self::tile::<2>(left, depth, panel, scales, out, stride),
                    _ => Self::tile::<1>(left, depth, panel, scales, out, stride),
                }
            };
        }
    }

    /// # Safety
    /// * The CPU has the features.
    /// * `left` has `R` rows of `1 + depth`, `panel` has `depth · WIDTH`, `scales` has `WIDTH`, and `out` has
    ///   `(R - 1) · stride + WIDTH` elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn tile<const R: usize>(
        left: &[u32],
        depth: usize,
        panel: &[u32],
        scales: &[f32],
        out: &mut [f32],
        stride: usize,
    ) -> usize {
        let (left, panel, out) = (left.as_ptr().cast::<i32>(), panel.as_ptr(), out.as_mut_ptr());
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
                let scale = _mm512_loadu_ps(scales.as_ptr().add(16 * j));
                for (r, acc) in acc.iter().enumerate() {
                    let scores = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(acc[j]));
                    _mm512_storeu_ps(out.add(r * stride + 16 * j), scores);
                }
            }
        }
        R
    }

    #[inline(always)]
    fn dots(self, query: &[i8; MAX_DIM], dim: usize, rows: &[i8], out: &mut [f32]) {
        let start = -OFFSET * query[..dim].iter().map(|&code| i32::from(code)).sum::<i32>();
        let rows = &rows[..out.len() * dim];
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    /// The products of this machine's best instruction set; none where it has no such instructions.
    fn best() -> Option<Int8> {
        Isa::available().next().and_then(Token::new).and_then(Int8::new)
    }

    #[test]
    #[allow(clippy::cast_possible_truncation, reason = "codes")]
    fn sums_are_exact() {
        let Some(int8) = best() else {
            eprintln!("skipped: no integer dot products here");
            return;
        };
        let mut random = memlayer_core::Random::new(1);
        for dim in [1, 3, 4, 5, 16, 63, 64, 65, 129, MAX_DIM] {
            let mut codes = |n: usize| -> Vec<i8> { (0..n).map(|_| random.below(256) as u8 as i8).collect() };
            let mut rows: Vec<Vec<i8>> = (0..WIDTH).map(|_| codes(dim)).collect();
            rows[3].fill(i8::MIN);
            let mut queries: Vec<Vec<i8>> = (0..ROWS).map(|_| codes(dim)).collect();
            queries.iter_mut().flatten().for_each(|code| *code = (*code).max(-127));
            queries[2].fill(-127);
            queries[1].fill(127);
            let dot = |a: &[i8], b: &[i8]| a.iter().zip(b).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum::<i32>();
            let mut panel = vec![0; WIDTH * dim.div_ceil(4)];
            rows.iter().enumerate().for_each(|(n, row)| pack_column(row, n, &mut panel));
            let scales: Vec<f32> = (0..WIDTH).map(|n| 0.5 + n as f32).collect();
            for count in 0..=ROWS {
                let mut left = vec![0; count * left_len(dim)];
                queries.iter().zip(left.chunks_mut(left_len(dim))).for_each(|(query, to)| pack_left(query, to));
                let mut out = vec![f32::NAN; count * 40];
                int8.multiply(&left, &panel, &scales, &mut out, 40);
                for (query, out) in queries.iter().zip(out.chunks(40)) {
                    for ((row, scale), &out) in rows.iter().zip(&scales).zip(out) {
                        assert_eq!(out, scale * dot(query, row) as f32, "{count} rows, dim {dim}");
                    }
                }
            }
            for count in [0, 1, 15, 16, 17, WIDTH] {
                let (mut out, mut query) = (vec![f32::NAN; count], [0; MAX_DIM]);
                query[..dim].copy_from_slice(&queries[1]);
                int8.dots(&query, dim, &rows.concat(), &mut out);
                let expected: Vec<f32> = rows[..count].iter().map(|row| dot(&queries[1], row) as f32).collect();
                assert_eq!(out, expected, "{count} rows, dim {dim}");
            }
        }
    }
}
