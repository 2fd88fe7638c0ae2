//! Instruction sets: tokens that only detection makes, the vector operations a token gives the right to, and the
//! kernels written over them. It is the only place with vector intrinsics.
//!
//! An operation dispatches once per piece of work ([`dispatch!`]); everything below is generic over [`Simd`] and
//! inlined into a function compiled for that instruction set. Other machines run [`Lanes`], which is portable.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod int8;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod product;
pub(crate) mod rows;

use core::fmt;
use core::str::FromStr;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use lanes::Lanes;
use memlayer_core::Element;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;

/// An instruction set this backend has kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What every machine of the target has.
    Scalar,
    /// AVX2, FMA and F16C (x86-64-v3).
    Avx2,
    /// AVX-512 F, BW, DQ and VL (x86-64-v4).
    Avx512,
    /// NEON (64-bit Arm).
    Neon,
}

impl Isa {
    const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Scalar];

    /// The instruction sets of this machine, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| Token::new(*isa).is_some())
    }

    /// The name: `scalar`, `avx2`, `avx512` or `neon`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is none of an instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownIsa;

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no instruction set of this name: scalar, avx2, avx512 and neon are")
    }
}

impl core::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;
    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or(UnknownIsa)
    }
}

/// The right to use an instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Token {
    Scalar(Lanes<4>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

impl Token {
    /// The right to use `isa`, if this machine has it.
    pub(crate) fn new(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Scalar => Some(Self::Scalar(Lanes)),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::new().map(Self::Avx2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::new().map(Self::Avx512),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::new().map(Self::Neon),
            // Those of other architectures.
            _ => None,
        }
    }
}

/// Runs `$body` with `$s` a token of the instruction set, compiled for it.
macro_rules! dispatch {
    ($token:expr, $s:ident => $body:expr) => {
        match $token {
            $crate::isa::Token::Scalar($s) => $crate::isa::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Token::Avx2($s) => $crate::isa::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Token::Avx512($s) => $crate::isa::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
            #[cfg(target_arch = "aarch64")]
            $crate::isa::Token::Neon($s) => $crate::isa::Simd::vectorize(
                $s,
                #[inline(always)]
                || $body,
            ),
        }
    };
}
pub(crate) use dispatch;

/// Whether `f32` rows are best summed whole, each asked for by itself: so with AVX-512 on AMD's Zen 5, for which newer ones are taken. An older
/// EPYC wants them in blocks that are asked for in bursts; others have not been measured. (One core, V = 256, 256 tokens, ns a row among 2^16,
/// 2^20 and 2^22: Zen 5 36, 47 and 54 in blocks and bursts, 29, 34 and 34 whole; V = 1024 among 2^20 210 and 160. The older one, blocks among
/// 2^22, 32 in bursts and 40 one by one.)
pub(crate) fn sums_whole_rows() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::__cpuid;
        let (vendor, signature) = (__cpuid(0), __cpuid(1).eax);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD";
        let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
        amd && family >= 0x1a
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// A cache.
#[derive(Clone, Copy)]
pub(crate) enum Level {
    /// The nearest: for what is read next.
    First,
    /// It has more lines under way at a time than the first, which is what limits reads of rows all over memory.
    Second,
}

/// Vectors of `f32` of one instruction set.
///
/// `mul` then `add` is never fused: vertical sums rely on it. Positions are counted in floats from [`Simd::COUNT`],
/// whose low bits are then the count.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Scalars in a vector.
    const LANES: usize;
    /// Rows of the tile that a product keeps in registers.
    const TILE: usize;
    /// Where counting starts: the floats from here on are consecutive integers, and so are their bits.
    const COUNT: f32 = 8_388_608.0;
    /// A vector.
    type V: Copy;

    /// Runs `f` compiled for this instruction set.
    fn vectorize<R>(self, f: impl FnOnce() -> R) -> R;
    fn splat(self, x: f32) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// The greater; anything if one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a · b + c`, fused where that is as fast.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The sum of all lanes.
    fn sum(self, v: Self::V) -> f32;
    /// One bit a lane: `a >= b`.
    fn ge_bits(self, a: Self::V, b: Self::V) -> u32;
    /// One bit a lane: not `a < b`, so true where one is NaN.
    fn not_lt_bits(self, a: Self::V, b: Self::V) -> u32;
    /// `count`, one more where `a > b`.
    fn count_gt(self, count: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `count`, one more where `a >= b`.
    fn count_ge(self, count: Self::V, a: Self::V, b: Self::V) -> Self::V;
    /// `count`, one more in the lanes behind `lane` where `a == b`.
    fn count_eq_behind(self, count: Self::V, a: Self::V, b: Self::V, lane: usize) -> Self::V;
    /// Writes the lanes whose bit is set, and `base` plus their position, one after the other; returns how many.
    /// What comes behind them in the first `LANES` places of `scores` and `ids` means nothing.
    ///
    /// # Panics
    /// If one of them has fewer places.
    #[inline(always)]
    fn compress(self, bits: u32, v: Self::V, base: u32, scores: &mut [f32], ids: &mut [u32]) -> usize {
        assert!(scores.len() >= Self::LANES && ids.len() >= Self::LANES);
        let mut lanes = [0.0; 16];
        self.store(v, &mut lanes);
        let (mut left, mut n) = (bits, 0);
        while left != 0 {
            let lane = left.trailing_zeros();
            scores[n] = lanes[lane as usize];
            ids[n] = base + lane;
            n += 1;
            left &= left - 1;
        }
        n
    }
    /// Writes `base` plus the position of each bit that is set, one after the other; returns how many. What comes
    /// behind them in the first `LANES` places means nothing.
    ///
    /// # Panics
    /// If there are fewer places.
    #[inline(always)]
    fn compress_ids(self, bits: u32, base: u32, ids: &mut [u32]) -> usize {
        let (mut left, mut n) = (bits, 0);
        while left != 0 {
            ids[n] = base + left.trailing_zeros();
            n += 1;
            left &= left - 1;
        }
        n
    }
    /// The lanes of both, greatest first, if there is a shorter way than to count for each how many go before it. Anything if one is
    /// NaN.
    #[inline(always)]
    fn sort_two(self, both: [Self::V; 2]) -> Option<[Self::V; 2]> {
        let _ = both;
        None
    }
    /// Turns a square of `LANES` rows and columns: `to[j · to_stride + i] = from[i · from_stride + j]`.
    ///
    /// # Panics
    /// If one of them is shorter.
    #[inline(always)]
    fn turn(self, (from, from_stride): (&[f32], usize), (to, to_stride): (&mut [f32], usize)) {
        for j in 0..Self::LANES {
            for (i, to) in to[j * to_stride..][..Self::LANES].iter_mut().enumerate() {
                *to = from[i * from_stride + j];
            }
        }
    }
    /// Asks for the cache line of `at`, which may be any address.
    fn prefetch(self, level: Level, at: *const u8);

    /// `LANES` scalars from `from` on.
    ///
    /// # Safety
    /// * All of them may be read.
    unsafe fn load_at(self, from: *const f32) -> Self::V;
    /// `LANES` scalars to `to` on.
    ///
    /// # Safety
    /// * All of them may be written.
    unsafe fn store_at(self, v: Self::V, to: *mut f32);

    /// Values `col..col + LANES` of a row of codes, unscaled; `col` is a multiple of `LANES`.
    ///
    /// # Panics
    /// If the row has fewer.
    #[inline(always)]
    fn widen<E: Element>(self, codes: &[E], col: usize) -> Self::V {
        let mut wide = [0.0; 16];
        rows::widen(codes, col, &mut wide[..Self::LANES]);
        self.load(&wide)
    }

    /// `acc[i] += factor · values`, multiplied, then added, of the values of `widen(codes, col + i · LANES)`: bit for bit
    /// those sums, by a shorter way where an instruction set has one.
    ///
    /// # Panics
    /// If the row has fewer.
    #[inline(always)]
    fn add_scaled<E: Element, const NV: usize>(self, acc: &mut [Self::V; NV], factor: f32, codes: &[E], col: usize) {
        rows::add_widened(self, acc, factor, codes, col);
    }

    /// The first `LANES` scalars.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::V {
        let from = &from[..Self::LANES];
        // SAFETY: the slice has `LANES` elements, so as many may be read from its start.
        unsafe { self.load_at(from.as_ptr()) }
    }
    /// To the first `LANES` scalars.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32]) {
        let to = &mut to[..Self::LANES];
        // SAFETY: the slice has `LANES` elements and is borrowed mutably, so as many may be written to its start.
        unsafe { self.store_at(v, to.as_mut_ptr()) }
    }
    /// Asks for every cache line of `memory`.
    #[inline(always)]
    fn prefetch_all<T>(self, level: Level, memory: &[T]) {
        let (start, bytes) = (memory.as_ptr().cast::<u8>(), size_of_val(memory));
        for at in (0..bytes).step_by(64) {
            self.prefetch(level, start.wrapping_add(at));
        }
    }
}
