//! Products by cuBLAS; norms and gates.

use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::{Gate, GateBackward, Linear, LinearBackward, NORM_EPS, RmsNorm, RmsNormBackward};

use super::size;
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant};
use crate::launch::{Args, Matrix, Operands, Product, Shape};

const THREADS: u32 = 256;
/// Threads of the kernels that sum over rows: 32 stripes of 32 columns.
const SUM_THREADS: u32 = 1024;
const VARIANT: Variant = Variant::of(File::Dense);

const fn matrix(pointer: u64, stride: usize, transposed: bool) -> Matrix {
    Matrix { pointer, stride, batch: 0, transposed }
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

    /// A kernel that walks through `len` elements.
    fn each(&self, name: &'static str, len: usize, mut args: Args) -> Result<(), CudaError> {
        let kernel = self.kernels.get(VARIANT, name)?;
        self.stream.launch(&kernel, Shape::new(self.blocks_for(len, THREADS as usize), THREADS), &mut args)
    }

    /// A kernel of a warp for each of `rows`.
    fn each_row(&self, name: &'static str, rows: usize, mut args: Args) -> Result<(), CudaError> {
        let kernel = self.kernels.get(VARIANT, name)?;
        self.stream.launch(&kernel, Shape::new(rows.div_ceil(THREADS as usize / 32), THREADS), &mut args)
    }

    fn gate(&self, name: &'static str, args: &Gate<'_, Self>) -> Result<(), CudaError> {
        args.check(name, false)?;
        let len = args.y.len();
        let launch = Args::new().read(args.y).read(args.gate).write(&args.out).value(len as u64);
        self.each(name, len, launch)
    }

    fn gate_backward(&self, name: &'static str, args: &GateBackward<'_, Self>) -> Result<(), CudaError> {
        args.check(name, false)?;
        let len = args.y.len();
        let launch = Args::new().read(args.y).read(args.gate).read(args.dout).write(&args.dy).write(&args.dgate);
        self.each(name, len, launch.value(len as u64))
    }
}

impl Dense for Cuda {
    fn linear(&self, args: Linear<'_, Self>) -> Result<(), CudaError> {
        let dims = args.check()?;
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
        self.each("add_bias", len, launch.value(size("linear", "out", dims.outputs)?))
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
        self.each_row(OP, args.dims.rows, norm_args(OP, launch, &args.dims)?)
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
        self.each_row(OP, dims.rows, norm_args(OP, launch, dims)?)
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
        self.each(OP, len, launch.value(size(OP, "y", width)?))
    }

    fn sigmoid_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "sigmoid_gate_backward";
        let width = args.check(OP, true)?;
        let tokens = args.gate.len();
        let launch = Args::new().read(args.y).read(args.gate).read(args.dout).write(&args.dy).write(&args.dgate);
        self.each_row(OP, tokens, launch.value(tokens as u64).value(size(OP, "y", width)?))
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
