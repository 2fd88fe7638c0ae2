//! NEON: four lanes. Every 64-bit Arm processor has it.

use core::arch::aarch64::*;
use core::arch::asm;

use super::{Level, Simd};

/// The CPU has NEON.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The token, if the CPU has the feature.
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

/// Runs intrinsics that touch registers only.
macro_rules! have {
    ($self:ident, $e:expr) => {{
        let Self(()) = $self;
        // SAFETY: a value of this type is made by `new` alone, after detection: the CPU has every feature that the
        // intrinsics here ask for, and they have no other obligation.
        #[allow(unused_unsafe, reason = "targets with the feature built in make the intrinsics safe")]
        unsafe {
            $e
        }
    }};
}

/// A bit for each lane.
static BITS: [u32; 4] = [1, 2, 4, 8];
/// Four zeros, then four times all bits: the window that starts `3 - lane` places before the ones begins them behind
/// `lane`.
static BEHIND: [u32; 8] = [0, 0, 0, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX];

impl Neon {
    /// One bit a lane of a mask.
    #[inline(always)]
    fn bits(self, mask: uint32x4_t) -> u32 {
        // SAFETY: the CPU has the feature by the token; `BITS` has 4 elements, so the load of 4 is in bounds.
        unsafe { vaddvq_u32(vandq_u32(mask, vld1q_u32(BITS.as_ptr()))) }
    }
    /// `count`, one more in the lanes of a mask.
    #[inline(always)]
    fn count(self, count: float32x4_t, mask: uint32x4_t) -> float32x4_t {
        have!(self, {
            let one = vreinterpretq_u32_f32(vdupq_n_f32(1.0));
            vaddq_f32(count, vreinterpretq_f32_u32(vandq_u32(mask, one)))
        })
    }
}

impl Simd for Neon {
    const LANES: usize = 4;
    const TILE: usize = 8;
    type V = float32x4_t;

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        #[target_feature(enable = "neon")]
        fn inner<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        have!(self, inner(f))
    }
    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        have!(self, vdupq_n_f32(x))
    }
    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        have!(self, vaddq_f32(a, b))
    }
    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        have!(self, vmulq_f32(a, b))
    }
    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        have!(self, vmaxq_f32(a, b))
    }
    #[inline(always)]
    fn mul_add(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        have!(self, vfmaq_f32(c, a, b))
    }
    #[inline(always)]
    fn sum(self, v: float32x4_t) -> f32 {
        have!(self, vaddvq_f32(v))
    }
    #[inline(always)]
    fn ge_bits(self, a: float32x4_t, b: float32x4_t) -> u32 {
        self.bits(have!(self, vcgeq_f32(a, b)))
    }
    #[inline(always)]
    fn not_lt_bits(self, a: float32x4_t, b: float32x4_t) -> u32 {
        self.bits(have!(self, vmvnq_u32(vcltq_f32(a, b))))
    }
    #[inline(always)]
    fn count_gt(self, count: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.count(count, have!(self, vcgtq_f32(a, b)))
    }
    #[inline(always)]
    fn count_ge(self, count: float32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.count(count, have!(self, vcgeq_f32(a, b)))
    }
    #[inline(always)]
    fn count_eq_behind(self, count: float32x4_t, a: float32x4_t, b: float32x4_t, lane: usize) -> float32x4_t {
        let window = &BEHIND[3 - lane..][..4];
        // SAFETY: the CPU has the feature by the token; `window` has 4 elements, so the load of 4 is in bounds.
        let mask = unsafe { vandq_u32(vceqq_f32(a, b), vld1q_u32(window.as_ptr())) };
        self.count(count, mask)
    }
    #[inline(always)]
    fn prefetch(self, level: Level, at: *const u8) {
        // SAFETY: a prefetch of any address is no access; the instructions touch no register, flag or stack.
        unsafe {
            match level {
                Level::First => asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly)),
                Level::Second => asm!("prfm pldl2keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly)),
            }
        }
    }
    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> float32x4_t {
        // SAFETY: 4 scalars may be read by the contract; the CPU has the feature by the token.
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn store_at(self, v: float32x4_t, to: *mut f32) {
        // SAFETY: 4 scalars may be written by the contract; the CPU has the feature by the token.
        unsafe { vst1q_f32(to, v) }
    }
}
