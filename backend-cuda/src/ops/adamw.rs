//! Steps of dense parameters: AdamW, and the sum of squares that a gradient is clipped by.

use memlayer_core::error::check_len;

use crate::Cuda;
use crate::error::CudaError;
use crate::launch::{Args, Shape};
use crate::memory::{View, ViewMut};

/// The factors of a step of AdamW (Loshchilov and Hutter 2019): `g = scale·grad`, `m = beta1·m + (1 - beta1)·g`,
/// `v = beta2·v + (1 - beta2)·g²`, `x = keep·x - rate·m / (√v + eps)`. Corrections of the moments' bias are in `rate` and
/// `eps`, the decay of weights is in `keep`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[allow(missing_docs, reason = "the formula above says what they are")]
pub struct AdamW {
    pub rate: f32,
    pub eps: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub scale: f32,
    pub keep: f32,
}

/// Sums that [`Cuda::sum_squares`] makes of each of its arguments.
pub const SQUARE_PARTS: usize = 64;

impl Cuda {
    /// One step of the parameters `x` and their moments `first` and `second` in one pass, operation by operation in `f32` as
    /// in [`AdamW`]: the bits of the same loop on a host.
    ///
    /// # Errors
    /// [`memlayer_core::ArgError::Shape`] if the lengths differ, or the driver's.
    pub fn adamw(
        &self,
        step: AdamW,
        grad: View<'_, f32>,
        x: ViewMut<'_, f32>,
        first: ViewMut<'_, f32>,
        second: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        const OP: &str = "adamw";
        let len = x.len();
        for (operand, found) in [("grad", grad.len()), ("first", first.len()), ("second", second.len())] {
            check_len(OP, operand, len, found)?;
        }
        let launch = Args::new().value(step).read(grad).write(&x).write(&first).write(&second).value(len as u64);
        self.start(OP, self.each(len), launch)
    }

    /// `out[0]`: the sum of the squares of all values of all `of`. `parts` is overwritten, [`SQUARE_PARTS`] for each of them.
    ///
    /// # Errors
    /// [`memlayer_core::ArgError::Shape`] if `parts` or `out` has another length, or the driver's.
    pub fn sum_squares(
        &self,
        of: &[View<'_, f32>],
        mut parts: ViewMut<'_, f32>,
        out: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        const OP: &str = "sum_squares";
        check_len(OP, "parts", of.len() * SQUARE_PARTS, parts.len())?;
        check_len(OP, "out", 1, out.len())?;
        let mut rest = parts.reborrow();
        for x in of {
            let (sums, behind) = rest.split_at(SQUARE_PARTS);
            let launch = Args::new().read(*x).value(x.len() as u64).write(&sums);
            self.start("squares", Shape::new(SQUARE_PARTS, super::dense::THREADS), launch)?;
            rest = behind;
        }
        let launch = Args::new().read(parts.read()).value(parts.len() as u64).write(&out);
        self.start("total", Shape::new(1, super::dense::THREADS), launch)
    }
}
