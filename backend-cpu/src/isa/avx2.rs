//! AVX2 with FMA: eight lanes.

use core::arch::x86_64::*;

use super::Simd;

/// The CPU has AVX2 and FMA, and the system saves their registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, if the CPU has the features.
    pub(crate) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
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

impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE: usize = 6;
    type V = __m256;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "avx2,fma")]
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
    fn prefetch(self, at: *const u8) {
        // A prefetch of any address is no access.
        have!(self, _mm_prefetch::<_MM_HINT_T0>(at.cast()));
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
