//! AVX-512: sixteen lanes, masks, compression.

use core::arch::x86_64::*;

use bytemuck::NoUninit;
use memlayer_core::Element;
use memlayer_core::element::Format;

use super::rows::{self, Nibbles};
use super::{Level, Simd};

/// The CPU has AVX-512 F, BW, DQ and VL, AVX2, FMA, BMI1, BMI2 and POPCNT, and the system saves their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token, if the CPU has the features.
    pub(crate) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt");
        found.then_some(Self(()))
    }
}

/// Runs intrinsics that touch registers only.
macro_rules! have {
    ($self:ident, $e:expr) => {{
        let Self(()) = $self;
        // SAFETY: a value of this type is made by `new` alone, after detection: the CPU has every feature that the
        // intrinsics here ask for, and they have no other obligation.
        unsafe { $e }
    }};
}

impl Avx512 {
    /// A bitonic sorter (Batcher 1968): merges of runs twice as long each time, which descend and ascend in turns.
    #[inline(always)]
    fn sort<const DOWN: bool>(self, v: __m512) -> __m512 {
        let v = self.merge::<2, true>(v);
        let v = self.merge::<4, true>(v);
        let v = self.merge::<8, true>(v);
        self.merge::<16, DOWN>(v)
    }
    /// Of each `RUN` lanes, that first ascend and then descend or the other way, a run that descends, and the next one ascends; the
    /// first ascends if not `DOWN`.
    #[inline(always)]
    fn merge<const RUN: usize, const DOWN: bool>(self, v: __m512) -> __m512 {
        let mut v = v;
        if RUN >= 16 {
            v = self.order(v, have!(self, _mm512_shuffle_f32x4::<0x4e>(v, v)), const { greater(RUN, 8, DOWN) });
        }
        if RUN >= 8 {
            v = self.order(v, have!(self, _mm512_shuffle_f32x4::<0xb1>(v, v)), const { greater(RUN, 4, DOWN) });
        }
        if RUN >= 4 {
            v = self.order(v, have!(self, _mm512_permute_ps::<0x4e>(v)), const { greater(RUN, 2, DOWN) });
        }
        self.order(v, have!(self, _mm512_permute_ps::<0xb1>(v)), const { greater(RUN, 1, DOWN) })
    }
    /// The greater of each lane of both where `greater` has a bit, the lesser elsewhere.
    #[inline(always)]
    fn order(self, v: __m512, other: __m512, greater: u16) -> __m512 {
        have!(self, _mm512_mask_max_ps(_mm512_min_ps(v, other), greater, v, other))
    }
    /// The 16 16-bit codes from `col` on.
    #[inline(always)]
    fn words<E: Element>(self, codes: &[E], col: usize) -> __m256i {
        let words = &bytemuck::cast_slice::<E, u16>(codes)[col..col + 16];
        // SAFETY: the CPU has the feature by the token; the slice has 16 words, so as many may be read.
        unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
    }
    /// The 16 bytes from `at` on.
    #[inline(always)]
    fn bytes<E: NoUninit>(self, codes: &[E], at: usize) -> __m128i {
        let bytes = &bytemuck::cast_slice::<E, u8>(codes)[at..at + 16];
        // SAFETY: the CPU has the feature by the token; the slice has 16 bytes, so as many may be read.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }
    /// A 256th of the values of 16 codes of e4m3 that are no NaN: as a binary16 the exponent is 8 too small, of subnormal
    /// codes too.
    #[inline(always)]
    fn e4m3_part(self, bytes: &[u8]) -> __m512 {
        have!(self, {
            // Bit 15 is the sign, as all bits from 7 on are; bit 14 is the sign too.
            let half = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(self.bytes(bytes, 0)));
            _mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(0xbf80_u16.cast_signed())))
        })
    }
    /// [`Simd::add_scaled`] of whole groups of [`memlayer_core::Int4`], which begin at `col`: of a group's 16 products
    /// every code chooses one.
    #[inline(always)]
    fn add_int4<E: Element, const G: usize, const NV: usize>(
        self,
        acc: &mut [__m512; NV],
        factor: f32,
        codes: &[E],
        col: usize,
    ) {
        let (start, bytes) = (col / G * (2 + G / 2), NV * 16 / G * (2 + G / 2));
        let groups = &bytemuck::cast_slice::<E, u8>(codes)[start..start + bytes];
        for (acc, group) in acc.chunks_exact_mut(G / 16).zip(groups.chunks_exact(2 + G / 2)) {
            let (low, high) = acc.split_at_mut(G / 32);
            have!(self, {
                let scale = _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes([group[0], group[1]])));
                let integers = _mm512_setr_ps(-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.);
                let values = _mm512_mul_ps(scale, integers);
                let products = _mm512_mul_ps(_mm512_set1_ps(factor), values);
                for (i, (low, high)) in low.iter_mut().zip(high).enumerate() {
                    // A permutation looks at four bits of each place.
                    let place = _mm512_cvtepu8_epi32(self.bytes(group, 2 + 16 * i));
                    *low = _mm512_add_ps(*low, _mm512_permutexvar_ps(place, products));
                    let place = _mm512_srli_epi32::<4>(place);
                    *high = _mm512_add_ps(*high, _mm512_permutexvar_ps(place, products));
                }
            });
        }
    }
    /// The values from `col` on of a row of [`memlayer_core::Int4`].
    #[inline(always)]
    fn int4<E: Element, const G: usize>(self, codes: &[E], col: usize) -> __m512 {
        let place = Nibbles::new(G, col);
        let group = &bytemuck::cast_slice::<E, u8>(codes)[place.group..];
        let scale = i16::from_le_bytes([group[0], group[1]]);
        have!(self, {
            let nibbles = _mm_srl_epi16(self.bytes(codes, place.byte), _mm_cvtsi32_si128(place.shift));
            let integers = _mm512_cvtepu8_epi32(_mm_and_si128(nibbles, _mm_set1_epi8(15)));
            let integers = _mm512_cvtepi32_ps(_mm512_sub_epi32(integers, _mm512_set1_epi32(8)));
            _mm512_mul_ps(_mm512_cvtph_ps(_mm256_set1_epi16(scale)), integers)
        })
    }
}

/// The lanes that keep the greater of theirs and that of the lane `distance` away, where runs of `run` lanes are merged that descend
/// and ascend in turns, the first of them descending if `down`.
const fn greater(run: usize, distance: usize, down: bool) -> u16 {
    let (mut lanes, mut i) = (0, 0);
    while i < 16 {
        let descends = (i & run == 0) == down;
        if (i & distance == 0) == descends {
            lanes |= 1 << i;
        }
        i += 1;
    }
    lanes
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const TILE: usize = 8;
    type V = __m512;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,popcnt")]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        have!(self, inner(f))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        have!(self, _mm512_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        have!(self, _mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        have!(self, _mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        have!(self, _mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        have!(self, _mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        have!(self, _mm512_reduce_add_ps(v))
    }
    #[inline(always)]
    fn ge_bits(self, a: __m512, b: __m512) -> u32 {
        u32::from(have!(self, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b)))
    }
    #[inline(always)]
    fn not_lt_bits(self, a: __m512, b: __m512) -> u32 {
        u32::from(have!(self, _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b)))
    }
    #[inline(always)]
    fn count_gt(self, count: __m512, a: __m512, b: __m512) -> __m512 {
        have!(self, {
            let mask = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b);
            _mm512_mask_add_ps(count, mask, count, _mm512_set1_ps(1.0))
        })
    }
    #[inline(always)]
    fn count_ge(self, count: __m512, a: __m512, b: __m512) -> __m512 {
        have!(self, {
            let mask = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b);
            _mm512_mask_add_ps(count, mask, count, _mm512_set1_ps(1.0))
        })
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the lanes are the lower 16 bits")]
    fn count_eq_behind(self, count: __m512, a: __m512, b: __m512, lane: usize) -> __m512 {
        let behind = (0xfffe_u32 << lane) as u16;
        have!(self, {
            let mask = _mm512_mask_cmp_ps_mask::<_CMP_EQ_OQ>(behind, a, b);
            _mm512_mask_add_ps(count, mask, count, _mm512_set1_ps(1.0))
        })
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the lanes are the lower 16 bits")]
    fn compress(self, bits: u32, v: __m512, base: u32, scores: &mut [f32], ids: &mut [u32]) -> usize {
        self.store(have!(self, _mm512_maskz_compress_ps(bits as u16, v)), scores);
        self.compress_ids(bits, base, ids)
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the lanes are the lower 16 bits")]
    #[allow(clippy::cast_possible_wrap, reason = "ids keep their bits")]
    fn compress_ids(self, bits: u32, base: u32, ids: &mut [u32]) -> usize {
        let (mask, ids) = (bits as u16, &mut ids[..16]);
        // SAFETY: the CPU has the features by the token; `ids` has 16 elements and is borrowed mutably, so the store
        // of 16 of them to its start is in bounds.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let all = _mm512_add_epi32(_mm512_set1_epi32(base as i32), lanes);
            _mm512_storeu_si512(ids.as_mut_ptr().cast(), _mm512_maskz_compress_epi32(mask, all));
        }
        mask.count_ones() as usize
    }
    #[inline(always)]
    fn sort_two(self, [a, b]: [__m512; 2]) -> Option<[__m512; 2]> {
        let (a, b) = (self.sort::<true>(a), self.sort::<false>(b));
        // One that descends and one that ascends: lane by lane the greater are the greater half of all.
        let (high, low) = (self.max(a, b), have!(self, _mm512_min_ps(a, b)));
        Some([self.merge::<16, true>(high), self.merge::<16, true>(low)])
    }
    #[inline(always)]
    fn turn(self, (from, from_stride): (&[f32], usize), (to, to_stride): (&mut [f32], usize)) {
        let mut rows = [self.splat(0.0); 16];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = self.load(&from[i * from_stride..]);
        }
        have!(self, {
            // Pairs of rows, then fours of them: lane `l` of `fours[4 g + j]` holds column `4 l + j` of rows `4 g ..`.
            let mut fours = rows;
            for g in 0..4 {
                let [a, b, c, d] = [rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]];
                let (low, high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (low2, high2) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                let [low, high, low2, high2] = [low, high, low2, high2].map(|v| _mm512_castps_pd(v));
                let columns = [
                    _mm512_unpacklo_pd(low, low2),
                    _mm512_unpackhi_pd(low, low2),
                    _mm512_unpacklo_pd(high, high2),
                    _mm512_unpackhi_pd(high, high2),
                ];
                for (j, column) in columns.into_iter().enumerate() {
                    fours[4 * g + j] = _mm512_castpd_ps(column);
                }
            }
            // Then the quarters of vectors, a four by four of them for each `j`.
            for j in 0..4 {
                let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
                let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                let (even2, odd2) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(even, even2),
                    _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                    _mm512_shuffle_f32x4::<0xdd>(even, even2),
                    _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
                ];
                for (l, column) in columns.into_iter().enumerate() {
                    self.store(column, &mut to[(4 * l + j) * to_stride..]);
                }
            }
        });
    }
    #[inline(always)]
    fn prefetch(self, level: Level, at: *const u8) {
        // A prefetch of any address is no access.
        match level {
            Level::First => have!(self, _mm_prefetch::<_MM_HINT_T0>(at.cast())),
            Level::Second => have!(self, _mm_prefetch::<_MM_HINT_T1>(at.cast())),
        }
    }
    #[inline(always)]
    fn widen<E: Element>(self, codes: &[E], col: usize) -> __m512 {
        match E::FORMAT {
            Format::F32 => self.load(&bytemuck::cast_slice::<E, f32>(codes)[col..]),
            Format::F16 => have!(self, _mm512_cvtph_ps(self.words(codes, col))),
            Format::Bf16 => {
                have!(self, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(self.words(codes, col)))))
            }
            Format::Int8 => have!(self, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(self.bytes(codes, col)))),
            // The upper byte of a binary16.
            Format::E5m2 => {
                have!(self, _mm512_cvtph_ps(_mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(self.bytes(codes, col)))))
            }
            Format::E4m3 => have!(self, {
                let magnitude = _mm_and_si128(self.bytes(codes, col), _mm_set1_epi8(0x7f));
                let nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
                let part = self.e4m3_part(&bytemuck::cast_slice::<E, u8>(codes)[col..]);
                _mm512_mask_mov_ps(_mm512_mul_ps(part, _mm512_set1_ps(256.0)), nan, _mm512_set1_ps(f32::NAN))
            }),
            Format::Int4 => self.int4::<E, 32>(codes, col),
            Format::Int4x64 => self.int4::<E, 64>(codes, col),
            _ => {
                let mut wide = [0.0; 16];
                rows::widen(codes, col, &mut wide);
                self.load(&wide)
            }
        }
    }
    #[inline(always)]
    fn add_scaled<E: Element, const NV: usize>(self, acc: &mut [__m512; NV], factor: f32, codes: &[E], col: usize) {
        match E::FORMAT {
            Format::E4m3 => rows::add_e4m3(self, acc, factor, codes, col, Self::e4m3_part),
            Format::Int4 if NV.is_multiple_of(2) => self.add_int4::<E, 32, NV>(acc, factor, codes, col),
            Format::Int4x64 if NV.is_multiple_of(4) => self.add_int4::<E, 64, NV>(acc, factor, codes, col),
            _ => rows::add_widened(self, acc, factor, codes, col),
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> __m512 {
        // SAFETY: 16 scalars may be read by the contract; the CPU has the feature by the token.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_at(self, v: __m512, to: *mut f32) {
        // SAFETY: 16 scalars may be written by the contract; the CPU has the feature by the token.
        unsafe { _mm512_storeu_ps(to, v) }
    }
}
