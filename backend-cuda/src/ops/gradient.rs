//! Gradients of rows, as kernels take them.

use memlayer_core::error::check_len;
use memlayer_core::ops::plan::{RowGradient, RowPlan};
use memlayer_core::{ArgError, Bf16, Trainable};

use super::{magic, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant, trained_format};
use crate::launch::{Args, Shape};
use crate::memory::{View, ViewMut};

/// The numeric half of a sparse gradient with sources in `S`, f32 or bf16: entry `e` contributes `weights[e] · sources[e / bag]`
/// to its row, as in a [`RowGradient`], which is one with sources in f32.
///
/// Products and sums are of f32 whatever sources are stored in: the same bits as from the same values in f32. A source is read
/// for each of its entries, and in rows of 1024 values and more these reads are much of what a gradient takes: bf16 halves them.
/// Where sources are f32, rounding them first ([`Cuda::round`]) costs a small part of that.
pub struct MixedGradient<'a, S> {
    /// L, entries that share a source.
    pub bag: usize,
    /// V, the width of a row.
    pub dim: usize,
    /// `[E]`.
    pub weights: View<'a, f32>,
    /// `[E / L, V]`.
    pub sources: View<'a, S>,
}

impl<S> Clone for MixedGradient<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S> Copy for MixedGradient<'_, S> {}

impl<'a> From<RowGradient<'a, Cuda>> for MixedGradient<'a, f32> {
    fn from(gradient: RowGradient<'a, Cuda>) -> Self {
        let RowGradient { bag, dim, weights, sources } = gradient;
        Self { bag, dim, weights, sources }
    }
}

impl<S> MixedGradient<'_, S> {
    /// Fails unless all sizes fit `plan`, as [`RowGradient::check`].
    fn check(&self, op: &'static str, plan: &RowPlan<'_, Cuda>) -> Result<(), ArgError> {
        let entries = plan.entries.len();
        if self.bag == 0 || !entries.is_multiple_of(self.bag) {
            return Err(ArgError::Size { op, operand: "entries", found: entries, multiple_of: self.bag });
        }
        check_len(op, "weights", entries, self.weights.len())?;
        check_len(op, "sources", (entries / self.bag).saturating_mul(self.dim), self.sources.len())
    }
}

/// A gradient as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct GradientArg {
    weights: u64,
    sources: u64,
    magic: u64,
    dim: u32,
    len: u32,
}

/// A gradient that is checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gradient {
    pub(crate) arg: GradientArg,
    /// The number of the sources' format.
    pub(crate) format: u32,
    sources: usize,
}

impl Gradient {
    /// Fails unless it fits the plan.
    pub(crate) fn new<S: Trainable>(
        op: &'static str,
        gradient: &MixedGradient<'_, S>,
        plan: &RowPlan<'_, Cuda>,
    ) -> Result<Self, CudaError> {
        gradient.check(op, plan)?;
        let arg = GradientArg {
            weights: gradient.weights.pointer(),
            sources: gradient.sources.pointer(),
            magic: magic(gradient.bag),
            dim: size(op, "width of the gradient", gradient.dim)?,
            len: size(op, "entries", gradient.weights.len())?,
        };
        Ok(Self { arg, format: trained_format::<S>(op)?, sources: gradient.weights.len() / gradient.bag })
    }
    /// The width of a row.
    pub(crate) const fn dim(&self) -> usize {
        self.arg.dim as usize
    }
    /// How many sources there are.
    pub(crate) const fn len(&self) -> usize {
        self.sources
    }
    /// Bytes of a value of a source.
    pub(crate) const fn code_bytes(&self) -> usize {
        Variant::of(File::Plan).format(self.format).code_bytes()
    }
    /// Whether four columns may be read at once.
    pub(crate) const fn is_wide(&self) -> bool {
        self.arg.sources.is_multiple_of(4 * self.code_bytes() as u64) && self.dim().is_multiple_of(4)
    }
}

impl Cuda {
    /// Values rounded to bf16, to nearest, ties to even: [`Bf16::from_f32`]. `to` is overwritten.
    ///
    /// # Errors
    /// [`ArgError::Shape`] if the lengths differ.
    pub fn round(&self, from: View<'_, f32>, to: ViewMut<'_, Bf16>) -> Result<(), CudaError> {
        check_len("round", "to", from.len(), to.len())?;
        self.round_to(from.pointer(), from.len(), to.pointer())
    }

    /// Rounds `len` floats at `from` to bf16 at `to`.
    pub(crate) fn round_to(&self, from: u64, len: usize, to: u64) -> Result<(), CudaError> {
        let kernel = self.kernels.get(Variant::of(File::Select), "to_bf16")?;
        let mut args = Args::new().value(from).value(len as u64).value(to);
        self.stream.launch(&kernel, Shape::new(self.blocks_for(len.div_ceil(4), 256), 256), &mut args)
    }
}
