//! AVX-512: sixteen lanes, masks, compression.

use core::arch::x86_64::*;

use super::Simd;

/// The CPU has AVX-512 F, BW, DQ and VL, AVX2 and FMA, and the system saves their registers.
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
            && is_x86_feature_detected!("fma");
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

impl Simd for Avx512 {
    const LANES: usize = 16;
    const TILE: usize = 8;
    type V = __m512;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
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
    #[allow(clippy::cast_possible_wrap, reason = "ids keep their bits")]
    fn compress(self, bits: u32, v: __m512, base: u32, scores: &mut [f32], ids: &mut [u32]) -> usize {
        let (mask, ids) = (bits as u16, &mut ids[..16]);
        self.store(have!(self, _mm512_maskz_compress_ps(mask, v)), scores);
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
    fn prefetch(self, at: *const u8) {
        // A prefetch of any address is no access.
        have!(self, _mm_prefetch::<_MM_HINT_T0>(at.cast()));
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
