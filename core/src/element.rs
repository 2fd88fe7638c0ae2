//! What a row is made of: the scalars arithmetic runs in, and the codes rows are stored in.

use core::fmt;
use core::ops::{AddAssign, DivAssign, Mul, MulAssign, SubAssign};

pub use half::{bf16 as Bf16, f16 as F16};
use num_traits::{FromPrimitive, Num, ToPrimitive};

/// Anything that may lie in a buffer of a device: plain data without padding, so that bytes of a file may be read in
/// place as items.
pub trait Item: bytemuck::Pod + Default + PartialEq + fmt::Debug + Send + Sync + 'static {}

macro_rules! items { ($($t:ty),*) => { $(impl Item for $t {})* } }
items!(f32, f64, F16, Bf16, E4m3, E5m2, i8, u8, u32, u64);

/// The scalar that arithmetic runs in: `f32` or `f64`.
///
/// The transcendental functions are those of the `libm` crate on every target, with or without the standard
/// library, so that no cargo feature of any dependency can change a number.
pub trait Real:
    Item
    + Num
    + PartialOrd
    + ToPrimitive
    + FromPrimitive
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + core::ops::Neg<Output = Self>
    + Mul<Output = Self>
    + Element
    + Trainable
{
    /// The unit round-off, half the distance from 1 to the next number.
    const EPS: Self;
    /// Positive infinity.
    const INFINITY: Self;
    /// `self` from a 64-bit float, rounded to nearest.
    fn of(value: f64) -> Self;
    /// `self` as a 64-bit float, exactly.
    fn wide(self) -> f64;
    /// The square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// The exponential.
    fn exp(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// The absolute value.
    fn abs(self) -> Self;
    /// Whether this is not a number.
    fn is_nan(self) -> bool;
}

macro_rules! real {
    ($t:ty, $sqrt:path, $exp:path, $erf:path, $fabs:path) => {
        impl Real for $t {
            const EPS: Self = <$t>::EPSILON / 2.0;
            const INFINITY: Self = <$t>::INFINITY;
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation, reason = "rounding to the scalar is what this function is for")]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $sqrt(self)
            }
            #[inline]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline]
            fn erf(self) -> Self {
                $erf(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $fabs(self)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
        }
    };
}
real!(f32, libm::sqrtf, libm::expf, libm::erff, libm::fabsf);
real!(f64, libm::sqrt, libm::exp, libm::erf, libm::fabs);

/// The number formats rows may be stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Format {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 8-bit integers, one scale a row.
    Int8,
    /// 8-bit floats with 4 exponent bits, no infinities (OCP "E4M3", torch's `float8_e4m3fn`), one scale a row.
    E4m3,
    /// 8-bit floats with 5 exponent bits (OCP "E5M2"), one scale a row.
    E5m2,
    /// 4-bit integers in groups of 32, each with a binary16 scale among the codes ([`Int4`]).
    Int4,
    /// 4-bit integers in groups of 64, each with a binary16 scale among the codes ([`Int4`]).
    Int4x64,
}

impl Format {
    /// The name used in files and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "f64",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::E4m3 => "e4m3",
            Self::E5m2 => "e5m2",
            Self::Int4 => "int4",
            Self::Int4x64 => "int4x64",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A code that a row is stored as. Values are codes times the row's scale.
pub trait Element: Item {
    /// The format, for messages and files.
    const FORMAT: Format;

    /// How many codes hold `dim` values.
    #[must_use]
    fn codes(dim: usize) -> usize {
        dim
    }

    /// Value `i` of a row of codes, unscaled, exact in `f32` (and in `f64` for `f64` rows); NaN if the row has none.
    fn value<F: Real>(codes: &[Self], i: usize) -> F;
}

/// A code that rows can be trained in.
pub trait Trainable: Element {
    /// `value` as a code.
    ///
    /// `noise` decides the rounding where `value` is no code: [`NEAREST`] rounds to nearest, ties to even; any
    /// other value holds uniformly random bits, of which the lower 16 are used, and rounds up with a probability equal to the fraction cut off,
    /// so that the expected code is `value` (stochastic rounding).
    fn store<F: Real>(value: F, noise: Option<u32>) -> Self;
}

/// The `noise` of [`Trainable::store`] that rounds to nearest, ties to even.
pub const NEAREST: Option<u32> = None;

#[allow(clippy::cast_possible_truncation, reason = "rounding to the format is what these conversions are for")]
mod floats {
    use super::{Bf16, E4m3, E5m2, Element, F16, Format, Real, Trainable};

    impl Element for f32 {
        const FORMAT: Format = Format::F32;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |&code| F::of(f64::from(code)))
        }
    }
    impl Trainable for f32 {
        #[inline(always)]
        fn store<F: Real>(value: F, _noise: Option<u32>) -> Self {
            value.wide() as f32
        }
    }
    impl Element for f64 {
        const FORMAT: Format = Format::F64;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |&code| F::of(code))
        }
    }
    impl Trainable for f64 {
        #[inline(always)]
        fn store<F: Real>(value: F, _noise: Option<u32>) -> Self {
            value.wide()
        }
    }
    impl Element for F16 {
        const FORMAT: Format = Format::F16;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |code| F::of(f64::from(f16_to_f32(code.to_bits()))))
        }
    }
    impl Element for Bf16 {
        const FORMAT: Format = Format::Bf16;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            let widened = |code: &Self| f64::from(f32::from_bits(u32::from(code.to_bits()) << 16));
            codes.get(i).map_or(F::of(f64::NAN), |code| F::of(widened(code)))
        }
    }
    impl Trainable for Bf16 {
        #[inline(always)]
        fn store<F: Real>(value: F, noise: Option<u32>) -> Self {
            let value = value.wide() as f32;
            match noise {
                Some(noise) if value.is_finite() => {
                    // Adding 16 random bits below the cut carries into the code with the right probability; from
                    // the greatest finite code it carries into infinity, as rounding up there must.
                    let bits = value.to_bits() + (noise & 0xffff);
                    Self::from_bits((bits >> 16) as u16)
                }
                _ => Self::from_f32(value),
            }
        }
    }
    impl Element for i8 {
        const FORMAT: Format = Format::Int8;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |&code| F::of(f64::from(code)))
        }
    }
    impl Element for E4m3 {
        const FORMAT: Format = Format::E4m3;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |code| F::of(f64::from(code.to_f32())))
        }
    }
    impl Element for E5m2 {
        const FORMAT: Format = Format::E5m2;
        #[inline(always)]
        fn value<F: Real>(codes: &[Self], i: usize) -> F {
            codes.get(i).map_or(F::of(f64::NAN), |code| F::of(f64::from(code.to_f32())))
        }
    }

    /// Widens without a branch, so that a loop over it becomes vector code on every target.
    #[inline(always)]
    pub(super) fn f16_to_f32(bits: u16) -> f32 {
        let bits = u32::from(bits);
        let magnitude = bits & 0x7fff;
        // Placed as it is, the exponent is 112 too small; the product mends it, for subnormal codes too.
        let finite = f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23);
        let special = f32::from_bits((magnitude << 13) | 0x7f80_0000);
        let value = if magnitude >= 0x7c00 { special } else { finite };
        f32::from_bits(value.to_bits() | ((bits & 0x8000) << 16))
    }
}

/// An 8-bit float: 1 sign, 4 exponent and 3 fraction bits, bias 7, no infinities; `0x7f` and `0xff` are NaN and the
/// greatest finite value is 448 (OCP 8-bit floating point specification, "E4M3"; torch's `float8_e4m3fn`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct E4m3(pub u8);

impl E4m3 {
    /// The greatest finite value.
    pub const MAX: f32 = 448.0;

    /// The value, exactly.
    #[inline(always)]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        let bits = u32::from(self.0);
        let magnitude = bits & 0x7f;
        // The exponent sits 120 too low once the fraction is aligned; a product by 2^120 mends it, and makes
        // subnormal codes right without a branch.
        let finite = f32::from_bits(magnitude << 20) * f32::from_bits((127 + 120) << 23);
        let value = if magnitude == 0x7f { f32::NAN } else { finite };
        f32::from_bits(value.to_bits() | ((bits & 0x80) << 24))
    }
}

/// An 8-bit float: 1 sign, 5 exponent and 2 fraction bits, bias 15, with infinities and NaN as IEEE has them
/// (OCP 8-bit floating point specification, "E5M2"). It is the upper byte of a binary16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct E5m2(pub u8);

impl E5m2 {
    /// The greatest finite value.
    pub const MAX: f32 = 57_344.0;

    /// The value, exactly.
    #[inline(always)]
    #[must_use]
    pub fn to_f32(self) -> f32 {
        floats::f16_to_f32(u16::from(self.0) << 8)
    }
}

/// A byte of a row of 4-bit integers in groups of `G` values, 32 or 64.
///
/// A group is its scale, a little-endian binary16, and `G / 2` bytes: byte `j` holds value `j` in its lower half and
/// value `j + G / 2` in its upper half, both plus 8. The last group is as long as the others; what fills it means
/// nothing. With the scale beside its codes a row is one read, and value `i`, scale times integer, is exact in `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Int4<const G: usize>(pub u8);

impl<const G: usize> Int4<G> {
    /// Bytes of a group.
    pub const GROUP: usize = 2 + G / 2;

    /// The scale of the group that `group` begins with.
    ///
    /// # Panics
    /// If `group` has fewer than two bytes.
    #[inline(always)]
    #[must_use]
    pub fn scale(group: &[Self]) -> f32 {
        floats::f16_to_f32(u16::from_le_bytes([group[0].0, group[1].0]))
    }
}

impl<const G: usize> Item for Int4<G> {}

impl<const G: usize> Element for Int4<G> {
    const FORMAT: Format = match G {
        32 => Format::Int4,
        64 => Format::Int4x64,
        _ => panic!("groups are of 32 or 64 values"),
    };

    fn codes(dim: usize) -> usize {
        dim.div_ceil(G) * Self::GROUP
    }

    #[inline(always)]
    fn value<F: Real>(codes: &[Self], i: usize) -> F {
        let start = i / G * Self::GROUP;
        let Some(group) = codes.get(start..start + Self::GROUP) else { return F::of(f64::NAN) };
        let (i, half) = (i % G, G / 2);
        let byte = group[2 + i % half].0;
        let integer = if i < half { byte & 15 } else { byte >> 4 };
        F::of(f64::from(Self::scale(group))) * F::of(f64::from(integer) - 8.0)
    }
}
