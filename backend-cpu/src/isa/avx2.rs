//! AVX2 with FMA and F16C: eight lanes.

use core::arch::x86_64::*;

use bytemuck::NoUninit;
use memlayer_core::Element;
use memlayer_core::element::Format;

use super::rows::{self, Nibbles};
use super::{Level, Simd};

/// The CPU has AVX2, FMA, F16C, BMI1, BMI2 and POPCNT, and the system saves their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, if the CPU has the features.
    pub(crate) fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
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

/// Eight zeros, then eight times all bits: the window that starts `7 - lane` places before the ones begins them
/// behind `lane`.
static BEHIND: [i32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1];

impl Avx2 {
    /// The 8 16-bit codes from `col` on.
    #[inline(always)]
    fn words<E: Element>(self, codes: &[E], col: usize) -> __m128i {
        let words = &bytemuck::cast_slice::<E, u16>(codes)[col..col + 8];
        // SAFETY: the CPU has the feature by the token; the slice has 8 words, so as many may be read.
        unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
    }
    /// The 8 bytes from `at` on.
    #[inline(always)]
    fn bytes<E: NoUninit>(self, codes: &[E], at: usize) -> __m128i {
        let bytes = &bytemuck::cast_slice::<E, u8>(codes)[at..at + 8];
        // SAFETY: the CPU has the feature by the token; the slice has 8 bytes, so as many may be read.
        unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }
    }
    /// A 256th of the values of 8 codes of e4m3 that are no NaN: as a binary16 the exponent is 8 too small, of subnormal
    /// codes too.
    #[inline(always)]
    fn e4m3_part(self, bytes: &[u8]) -> __m256 {
        have!(self, {
            // Bit 15 is the sign, as all bits from 7 on are; bit 14 is the sign too.
            let half = _mm_slli_epi16::<7>(_mm_cvtepi8_epi16(self.bytes(bytes, 0)));
            _mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16(0xbf80_u16.cast_signed())))
        })
    }
    /// The values from `col` on of a row of [`memlayer_core::Int4`].
    #[inline(always)]
    fn int4<E: Element, const G: usize>(self, codes: &[E], col: usize) -> __m256 {
        let place = Nibbles::new(G, col);
        let group = &bytemuck::cast_slice::<E, u8>(codes)[place.group..];
        let scale = i16::from_le_bytes([group[0], group[1]]);
        have!(self, {
            let nibbles = _mm_srl_epi16(self.bytes(codes, place.byte), _mm_cvtsi32_si128(place.shift));
            let integers = _mm256_cvtepu8_epi32(_mm_and_si128(nibbles, _mm_set1_epi8(15)));
            let integers = _mm256_cvtepi32_ps(_mm256_sub_epi32(integers, _mm256_set1_epi32(8)));
            _mm256_mul_ps(_mm256_cvtph_ps(_mm_set1_epi16(scale)), integers)
        })
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE: usize = 6;
    type V = __m256;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,popcnt")]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        have!(self, inner(f))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        have!(self, _mm256_set1_ps(x))
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        have!(self, _mm256_add_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        have!(self, _mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        have!(self, _mm256_max_ps(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        have!(self, _mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        have!(self, {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }
    #[inline(always)]
    #[allow(clippy::cast_sign_loss, reason = "a mask of 8 bits")]
    fn ge_bits(self, a: __m256, b: __m256) -> u32 {
        have!(self, _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b))) as u32
    }
    #[inline(always)]
    #[allow(clippy::cast_sign_loss, reason = "a mask of 8 bits")]
    fn not_lt_bits(self, a: __m256, b: __m256) -> u32 {
        have!(self, _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, b))) as u32
    }
    #[inline(always)]
    fn count_gt(self, count: __m256, a: __m256, b: __m256) -> __m256 {
        have!(self, {
            let mask = _mm256_cmp_ps::<_CMP_GT_OQ>(a, b);
            _mm256_add_ps(count, _mm256_and_ps(mask, _mm256_set1_ps(1.0)))
        })
    }
    #[inline(always)]
    fn count_ge(self, count: __m256, a: __m256, b: __m256) -> __m256 {
        have!(self, {
            let mask = _mm256_cmp_ps::<_CMP_GE_OQ>(a, b);
            _mm256_add_ps(count, _mm256_and_ps(mask, _mm256_set1_ps(1.0)))
        })
    }
    #[inline(always)]
    fn count_eq_behind(self, count: __m256, a: __m256, b: __m256, lane: usize) -> __m256 {
        let window = &BEHIND[7 - lane..][..8];
        // SAFETY: the CPU has the features by the token; `window` has 8 elements, so the load of 8 is in bounds.
        unsafe {
            let behind = _mm256_castsi256_ps(_mm256_loadu_si256(window.as_ptr().cast()));
            let mask = _mm256_and_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(a, b), behind);
            _mm256_add_ps(count, _mm256_and_ps(mask, _mm256_set1_ps(1.0)))
        }
    }
    #[inline(always)]
    fn turn(self, (from, from_stride): (&[f32], usize), (to, to_stride): (&mut [f32], usize)) {
        let mut rows = [self.splat(0.0); 8];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = self.load(&from[i * from_stride..]);
        }
        // Lane half `l` of column `j` of a four of rows holds column `4 l + j` of them. No closure: it would be no code of
        // the instruction set where it is not inlined.
        let mut fours = [[self.splat(0.0); 4]; 2];
        for (i, four) in fours.iter_mut().enumerate() {
            let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
            have!(self, {
                let (low, high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (low2, high2) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                *four = [
                    _mm256_shuffle_ps::<0x44>(low, low2),
                    _mm256_shuffle_ps::<0xee>(low, low2),
                    _mm256_shuffle_ps::<0x44>(high, high2),
                    _mm256_shuffle_ps::<0xee>(high, high2),
                ];
            });
        }
        let [upper, lower] = fours;
        for (j, (upper, lower)) in upper.into_iter().zip(lower).enumerate() {
            self.store(have!(self, _mm256_permute2f128_ps::<0x20>(upper, lower)), &mut to[j * to_stride..]);
            self.store(have!(self, _mm256_permute2f128_ps::<0x31>(upper, lower)), &mut to[(4 + j) * to_stride..]);
        }
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
    fn widen<E: Element>(self, codes: &[E], col: usize) -> __m256 {
        match E::FORMAT {
            Format::F32 => self.load(&bytemuck::cast_slice::<E, f32>(codes)[col..]),
            Format::F16 => have!(self, _mm256_cvtph_ps(self.words(codes, col))),
            Format::Bf16 => {
                have!(self, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(self.words(codes, col)))))
            }
            Format::Int8 => have!(self, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(self.bytes(codes, col)))),
            // The upper byte of a binary16.
            Format::E5m2 => {
                have!(self, _mm256_cvtph_ps(_mm_slli_epi16::<8>(_mm_cvtepu8_epi16(self.bytes(codes, col)))))
            }
            Format::E4m3 => have!(self, {
                let magnitude = _mm_and_si128(self.bytes(codes, col), _mm_set1_epi8(0x7f));
                let nan = _mm256_cvtepi8_epi32(_mm_cmpeq_epi8(magnitude, _mm_set1_epi8(0x7f)));
                let part = self.e4m3_part(&bytemuck::cast_slice::<E, u8>(codes)[col..]);
                _mm256_or_ps(_mm256_mul_ps(part, _mm256_set1_ps(256.0)), _mm256_castsi256_ps(nan))
            }),
            Format::Int4 => self.int4::<E, 32>(codes, col),
            Format::Int4x64 => self.int4::<E, 64>(codes, col),
            _ => {
                let mut wide = [0.0; 8];
                rows::widen(codes, col, &mut wide);
                self.load(&wide)
            }
        }
    }
    #[inline(always)]
    fn add_scaled<E: Element, const NV: usize>(self, acc: &mut [__m256; NV], factor: f32, codes: &[E], col: usize) {
        match E::FORMAT {
            Format::E4m3 => rows::add_e4m3(self, acc, factor, codes, col, Self::e4m3_part),
            _ => rows::add_widened(self, acc, factor, codes, col),
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> __m256 {
        // SAFETY: 8 scalars may be read by the contract; the CPU has the feature by the token.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_at(self, v: __m256, to: *mut f32) {
        // SAFETY: 8 scalars may be written by the contract; the CPU has the feature by the token.
        unsafe { _mm256_storeu_ps(to, v) }
    }
}
