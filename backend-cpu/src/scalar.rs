//! The scalar that row rules run in.

use core::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Rem, Sub, SubAssign};

use bytemuck::{Pod, Zeroable};
use memlayer_core::element::Format;
use memlayer_core::{Element, Item, Real, Trainable};
use num_traits::{FromPrimitive, Num, One, ToPrimitive, Zero};

/// An `f32` whose square root is one instruction that vectors have too.
///
/// `core` takes its square root from a library that must do without the standard one and has it as a block of
/// assembly, one scalar at a time: the compiler cannot make vector code of a loop around that. Both roots are
/// correctly rounded, so the bits are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Pod, Zeroable)]
#[repr(transparent)]
pub(crate) struct Single(f32);

impl Single {
    #[inline(always)]
    pub(crate) fn slice(slice: &[f32]) -> &[Self] {
        bytemuck::cast_slice(slice)
    }
    #[inline(always)]
    pub(crate) fn slice_mut(slice: &mut [f32]) -> &mut [Self] {
        bytemuck::cast_slice_mut(slice)
    }
}

macro_rules! operators {
    ($($op:ident $method:ident $assign:ident $assign_method:ident),*) => { $(
        impl $op for Single {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Self($op::$method(self.0, other.0))
            }
        }
        impl $assign for Single {
            #[inline(always)]
            fn $assign_method(&mut self, other: Self) {
                *self = $op::$method(*self, other);
            }
        }
    )* };
}
operators!(Add add AddAssign add_assign, Sub sub SubAssign sub_assign, Mul mul MulAssign mul_assign);
operators!(Div div DivAssign div_assign);

impl Rem for Single {
    type Output = Self;
    #[inline(always)]
    fn rem(self, other: Self) -> Self {
        Self(self.0 % other.0)
    }
}

impl Neg for Single {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(-self.0)
    }
}

impl Zero for Single {
    #[inline(always)]
    fn zero() -> Self {
        Self(0.0)
    }
    #[inline(always)]
    fn is_zero(&self) -> bool {
        self.0 == 0.0
    }
}

impl One for Single {
    #[inline(always)]
    fn one() -> Self {
        Self(1.0)
    }
}

impl Num for Single {
    type FromStrRadixErr = <f32 as Num>::FromStrRadixErr;
    fn from_str_radix(text: &str, radix: u32) -> Result<Self, Self::FromStrRadixErr> {
        f32::from_str_radix(text, radix).map(Self)
    }
}

impl ToPrimitive for Single {
    fn to_i64(&self) -> Option<i64> {
        self.0.to_i64()
    }
    fn to_u64(&self) -> Option<u64> {
        self.0.to_u64()
    }
    fn to_f32(&self) -> Option<f32> {
        Some(self.0)
    }
    fn to_f64(&self) -> Option<f64> {
        Some(f64::from(self.0))
    }
}

impl FromPrimitive for Single {
    fn from_i64(n: i64) -> Option<Self> {
        f32::from_i64(n).map(Self)
    }
    fn from_u64(n: u64) -> Option<Self> {
        f32::from_u64(n).map(Self)
    }
    fn from_f32(n: f32) -> Option<Self> {
        Some(Self(n))
    }
    fn from_f64(n: f64) -> Option<Self> {
        Some(Self::of(n))
    }
}

impl Item for Single {}

impl Element for Single {
    const FORMAT: Format = Format::F32;
    #[inline(always)]
    fn value<F: Real>(codes: &[Self], i: usize) -> F {
        F::of(f64::from(codes[i].0))
    }
}

impl Trainable for Single {
    #[inline(always)]
    fn store<F: Real>(value: F, _noise: Option<u32>) -> Self {
        Self::of(value.wide())
    }
}

impl Real for Single {
    const EPS: Self = Self(f32::EPSILON / 2.0);
    const INFINITY: Self = Self(f32::INFINITY);
    #[inline(always)]
    fn of(value: f64) -> Self {
        Self(<f32 as Real>::of(value))
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self.0)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(f32::sqrt(self.0))
    }
    #[inline]
    fn exp(self) -> Self {
        Self(Real::exp(self.0))
    }
    #[inline]
    fn erf(self) -> Self {
        Self(Real::erf(self.0))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(f32::abs(self.0))
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self.0)
    }
}
