//! Portable vectors: arrays, in loops that the compiler turns into whatever vectors the code around them may use.
//!
//! [`Lanes<4>`] is the scalar instruction set; inside the kernels of others, narrow ones take the columns that fill
//! no vector.

use super::{Level, Simd};

/// Vectors of `L` scalars, without an instruction set of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes<const L: usize>;

impl<const L: usize> Lanes<L> {
    #[inline(always)]
    fn bits(a: [f32; L], b: [f32; L], test: impl Fn(f32, f32) -> bool) -> u32 {
        let mut bits = 0;
        for i in 0..L {
            bits |= u32::from(test(a[i], b[i])) << i;
        }
        bits
    }
    #[inline(always)]
    fn zip(a: [f32; L], b: [f32; L], f: impl Fn(f32, f32) -> f32) -> [f32; L] {
        core::array::from_fn(|i| f(a[i], b[i]))
    }
}

impl<const L: usize> Simd for Lanes<L> {
    const LANES: usize = L;
    const TILE: usize = 4;
    type V = [f32; L];

    #[inline(always)]
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R {
        f()
    }
    #[inline(always)]
    fn splat(self, x: f32) -> [f32; L] {
        [x; L]
    }
    #[inline(always)]
    fn add(self, a: [f32; L], b: [f32; L]) -> [f32; L] {
        Self::zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; L], b: [f32; L]) -> [f32; L] {
        Self::zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn max(self, a: [f32; L], b: [f32; L]) -> [f32; L] {
        Self::zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: [f32; L], b: [f32; L], c: [f32; L]) -> [f32; L] {
        // Without the instruction a fused product would be a call.
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn sum(self, v: [f32; L]) -> f32 {
        // Halves upon each other, as the wide vectors do it: `L` is a power of two.
        let (mut v, mut n) = (v, L);
        while n > 1 {
            n /= 2;
            for i in 0..n {
                v[i] += v[i + n];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn ge_bits(self, a: [f32; L], b: [f32; L]) -> u32 {
        Self::bits(a, b, |a, b| a >= b)
    }
    #[inline(always)]
    #[allow(clippy::neg_cmp_op_on_partial_ord, reason = "true for NaN, as the operation says")]
    fn not_lt_bits(self, a: [f32; L], b: [f32; L]) -> u32 {
        Self::bits(a, b, |a, b| !(a < b))
    }
    #[inline(always)]
    fn count_gt(self, count: [f32; L], a: [f32; L], b: [f32; L]) -> [f32; L] {
        core::array::from_fn(|i| count[i] + if a[i] > b[i] { 1.0 } else { 0.0 })
    }
    #[inline(always)]
    fn count_ge(self, count: [f32; L], a: [f32; L], b: [f32; L]) -> [f32; L] {
        core::array::from_fn(|i| count[i] + if a[i] >= b[i] { 1.0 } else { 0.0 })
    }
    #[inline(always)]
    fn count_eq_behind(self, count: [f32; L], a: [f32; L], b: [f32; L], lane: usize) -> [f32; L] {
        core::array::from_fn(|i| count[i] + if i > lane && a[i] == b[i] { 1.0 } else { 0.0 })
    }
    #[inline(always)]
    fn prefetch(self, level: Level, at: *const u8) {
        #[cfg(target_arch = "x86_64")]
        {
            use core::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
            // SAFETY: SSE is part of x86-64, and a prefetch of any address is no access.
            unsafe {
                match level {
                    Level::First => _mm_prefetch::<_MM_HINT_T0>(at.cast()),
                    Level::Second => _mm_prefetch::<_MM_HINT_T1>(at.cast()),
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (level, at);
    }
    #[inline(always)]
    unsafe fn load_at(self, from: *const f32) -> [f32; L] {
        // SAFETY: `L` scalars may be read by the contract; the read asks for no alignment.
        unsafe { from.cast::<[f32; L]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_at(self, v: [f32; L], to: *mut f32) {
        // SAFETY: `L` scalars may be written by the contract; the write asks for no alignment.
        unsafe { to.cast::<[f32; L]>().write_unaligned(v) }
    }
}
