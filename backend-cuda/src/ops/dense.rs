//! Products by cuBLAS, or of few tokens by our own kernel; norms and gates.

use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::{
    Gate, GateBackward, Linear, LinearBackward, LinearDims, NORM_EPS, RmsNorm, RmsNormBackward,
};

use super::{aligned, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant};
use crate::launch::{Args, Matrix, Operands, Product, Shape};

pub(super) const THREADS: u32 = 256;
/// Threads of the kernels that sum over rows: 32 stripes of 32 columns.
const SUM_THREADS: u32 = 1024;
/// Products of so many tokens or fewer are made without cuBLAS: weights are read once for four tokens.
const FEW: usize = 8;
const FEW_THREADS: u32 = 128;
const VARIANT: Variant = Variant::of(File::Dense);

const fn matrix(pointer: u64, stride: usize, transposed: bool) -> Matrix {
    Matrix { pointer, stride, batch: 0, transposed }
}

/// The shape of a kernel of a warp for each of `rows`.
fn each_row(rows: usize) -> Shape {
    Shape::new(rows.div_ceil(THREADS as usize / 32), THREADS)
}

impl Cuda {
    /// A product of single matrices.
    fn multiply(
        &self,
        sizes: [usize; 3],
        a: Matrix,
        b: Matrix,
        out: Matrix,
        accumulate: bool,
    ) -> Result<(), CudaError> {
        self.blas.product(&Product { operands: Operands::F32, sizes, batch: 1, a, b, out, accumulate })
    }

    /// `out = x · weightᵀ + bias` for few tokens.
    fn linear_few(&self, args: &Linear<'_, Self>, dims: LinearDims) -> Result<(), CudaError> {
        const OP: &str = "linear";
        let kernel = self.kernels.get(VARIANT, if dims.tokens == 1 { "linear_1" } else { "linear_4" })?;
        let wide = [args.x.pointer(), args.weight.pointer()].into_iter().all(|p| aligned(p, dims.inputs));
        let mut launch = Args::new()
            .read(args.x)
            .read(args.weight)
            .read_or_null::<f32>(args.bias)
            .value(size(OP, "tokens", dims.tokens)?)
            .value(size(OP, "x", dims.inputs)?)
            .value(size(OP, "out", dims.outputs)?)
            .value(u32::from(wide))
            .write(&args.out);
        let blocks = dims.outputs.div_ceil(FEW_THREADS as usize / 32);
        self.stream.launch(&kernel, Shape::new(blocks, FEW_THREADS).early(), &mut launch)
    }

    /// The shape of a kernel that walks through `len` elements.
    pub(super) fn each(&self, len: usize) -> Shape {
        Shape::new(self.blocks_for(len, THREADS as usize), THREADS)
    }

    /// Launches a kernel of this file.
    pub(super) fn start(&self, name: &'static str, shape: Shape, mut args: Args) -> Result<(), CudaError> {
        self.stream.launch(&self.kernels.get(VARIANT, name)?, shape, &mut args)
    }

    fn gate(&self, name: &'static str, args: &Gate<'_, Self>) -> Result<(), CudaError> {
        args.check(name, false)?;
        let len = args.y.len();
        let launch = Args::new().read(args.y).read(args.gate).write(&args.out).value(len as u64);
        self.start(name, self.each(len).early(), launch)
    }

    fn gate_backward(&self, name: &'static str, args: &GateBackward<'_, Self>) -> Result<(), CudaError> {
        args.check(name, false)?;
        let len = args.y.len();
        let launch = Args::new().read(args.y).read(args.gate).read(args.dout).write(&args.dy).write(&args.dgate);
        self.start(name, self.each(len), launch.value(len as u64))
    }
}

impl Dense for Cuda {
    fn linear(&self, args: Linear<'_, Self>) -> Result<(), CudaError> {
        let dims = args.check()?;
        if dims.tokens <= FEW {
            return self.linear_few(&args, dims);
        }
        let (x, weight) = (args.x.pointer(), args.weight.pointer());
        self.multiply(
            [dims.tokens, dims.outputs, dims.inputs],
            matrix(x, dims.inputs, false),
            matrix(weight, dims.inputs, true),
            matrix(args.out.pointer(), dims.outputs, false),
            false,
        )?;
        let Some(bias) = args.bias else { return Ok(()) };
        let len = args.out.len();
        let launch = Args::new().write(&args.out).read(bias).value(len as u64);
        self.start("add_bias", self.each(len), launch.value(size("linear", "out", dims.outputs)?))
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "linear_backward";
        let dims = args.check()?;
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        let (x, weight, dout) = (args.x.pointer(), args.weight.pointer(), args.dout.pointer());
        if let Some(dx) = &args.dx {
            self.multiply(
                [dims.tokens, inputs, outputs],
                matrix(dout, outputs, false),
                matrix(weight, inputs, false),
                matrix(dx.pointer(), inputs, false),
                args.accumulate,
            )?;
        }
        if dims.tokens == 0 {
            // Sums over no tokens. The widths are not known, but the operands are.
            for grad in [&args.dweight, &args.dbias].into_iter().flatten() {
                self.stream.zero(grad.pointer(), grad.len() * size_of::<f32>())?;
            }
            return Ok(());
        }
        if let Some(dweight) = &args.dweight {
            self.multiply(
                [outputs, inputs, dims.tokens],
                matrix(dout, outputs, true),
                matrix(x, inputs, false),
                matrix(dweight.pointer(), inputs, false),
                false,
            )?;
        }
        let Some(dbias) = &args.dbias else { return Ok(()) };
        let kernel = self.kernels.get(VARIANT, "column_sums")?;
        let mut launch = Args::new()
            .read(args.dout)
            .value(size(OP, "tokens", dims.tokens)?)
            .value(size(OP, "dout", outputs)?)
            .write(dbias);
        self.stream.launch(&kernel, Shape::new(outputs.div_ceil(32), SUM_THREADS), &mut launch)
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "rms_norm";
        args.check()?;
        let launch = Args::new().read(args.x).read(args.gain).write(&args.out);
        self.start(OP, each_row(args.dims.rows).early(), norm_args(OP, launch, &args.dims)?)
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "rms_norm_backward";
        args.check()?;
        let dims = &args.dims;
        if let Some(dgain) = &args.dgain {
            let kernel = self.kernels.get(VARIANT, "rms_norm_dgain")?;
            let launch = Args::new().read(args.x).write(&args.dx).write(dgain);
            let shape = Shape::new(dims.dim.div_ceil(32), SUM_THREADS).by(dims.groups);
            self.stream.launch(&kernel, shape, &mut norm_args(OP, launch, dims)?)?;
        }
        let launch = Args::new().read(args.x).read(args.gain).write(&args.dx);
        self.start(OP, each_row(dims.rows), norm_args(OP, launch, dims)?)
    }

    fn silu_gate(&self, args: Gate<'_, Self>) -> Result<(), CudaError> {
        self.gate("silu_gate", &args)
    }

    fn silu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), CudaError> {
        self.gate_backward("silu_gate_backward", &args)
    }

    fn sigmoid_gate(&self, args: Gate<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "sigmoid_gate";
        let width = args.check(OP, true)?;
        let len = args.y.len();
        let launch = Args::new().read(args.y).read(args.gate).write(&args.out).value(len as u64);
        self.start(OP, self.each(len).early(), launch.value(size(OP, "y", width)?))
    }

    fn sigmoid_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "sigmoid_gate_backward";
        let width = args.check(OP, true)?;
        let tokens = args.gate.len();
        let launch = Args::new().read(args.y).read(args.gate).read(args.dout).write(&args.dy).write(&args.dgate);
        self.start(OP, each_row(tokens), launch.value(tokens as u64).value(size(OP, "y", width)?))
    }

    fn gelu_gate(&self, args: Gate<'_, Self>) -> Result<(), CudaError> {
        self.gate("gelu_gate", &args)
    }

    fn gelu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), CudaError> {
        self.gate_backward("gelu_gate_backward", &args)
    }
}

/// The sizes of a norm, behind its operands.
fn norm_args(op: &'static str, args: Args, dims: &memlayer_core::ops::dense::NormDims) -> Result<Args, CudaError> {
    #[allow(clippy::cast_possible_truncation, reason = "a constant")]
    let eps = NORM_EPS as f32;
    Ok(args
        .value(dims.rows as u64)
        .value(size(op, "dim", dims.dim)?)
        .value(size(op, "groups", dims.groups)?)
        .value(dims.repeat as u64)
        .value(eps))
}
