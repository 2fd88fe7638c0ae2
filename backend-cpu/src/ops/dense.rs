//! The dense rest: products by tiles, norms row by row, gates value by value.

use memlayer_core::ArgError;
use memlayer_core::element::Real;
use memlayer_core::ops::dense::{
    Dense, Gate, GateBackward, Linear, LinearBackward, LinearDims, NORM_EPS, NormDims, RmsNorm, RmsNormBackward,
};

use crate::Cpu;
use crate::isa::product::{self, DEPTH, Left, MAX_WIDTH, Panel};
use crate::isa::rows::dot;
use crate::isa::{Lanes, Simd, dispatch};
use crate::math::sigmoid;

/// With fewer tokens or outputs a linear map is dots; with more it is a product of tiles.
const FEW: usize = 4;

/// The most tokens that are the columns of a linear map's product.
const COLUMNS: usize = 32;

/// Whether they are: laying out the weight for its product takes as long as the product then, and they fill vectors of sixteen.
const fn are_columns(tokens: usize) -> bool {
    matches!(tokens, 12..=16 | 28..=COLUMNS)
}

/// Outputs of a tile of tokens that are columns.
const OUTPUTS: usize = 64;

/// Values of a gate that one piece of work takes.
const VALUES: usize = 4096;

impl Cpu {
    /// Rows of a product that one piece of work takes: pieces enough for all, but not more panels to make than is
    /// worth it. No result depends on it.
    fn rows_of_piece(&self, rows: usize) -> usize {
        let pieces = if self.threads() == 1 { 1 } else { 2 * self.threads() };
        rows.div_ceil(pieces).next_multiple_of(8).clamp(8, 256)
    }

    /// `out = x · weightᵀ` for few tokens or outputs.
    fn linear_dots(&self, dims: LinearDims, args: &mut Linear<'_, Self>) {
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        let cost = dims.tokens * outputs * inputs / 8;
        let (x, weight) = (args.x, args.weight);
        let width = outputs.min(64);
        let rows = args.out.chunks_mut(outputs).enumerate();
        let pieces =
            rows.flat_map(|(t, out)| out.chunks_mut(width).enumerate().map(move |(i, out)| (t, i * width, out)));
        let dots = |(t, first, out): (usize, usize, &mut [f32])| {
            let x = &x[t * inputs..(t + 1) * inputs];
            dispatch!(self.token, s => {
                for (o, out) in out.iter_mut().enumerate() {
                    *out = dot(s, x, &weight[(first + o) * inputs..][..inputs]);
                }
            });
        };
        if dims.tokens < FEW {
            self.pool.for_each(cost, pieces, dots);
        } else {
            // Many tokens, few outputs: a row is too little for a piece.
            let tokens = self.rows_of_piece(dims.tokens);
            let pieces = args.out.chunks_mut(tokens * outputs).enumerate();
            self.pool.for_each(cost, pieces, |(i, out)| {
                out.chunks_mut(outputs).enumerate().for_each(|(t, out)| dots((i * tokens + t, 0, out)));
            });
        }
    }

    /// `out = x · weightᵀ + bias` for some tokens, a range of outputs a piece.
    fn linear_columns(&self, dims: LinearDims, args: Linear<'_, Self>) {
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        let width = outputs.div_ceil(2 * self.threads()).next_multiple_of(OUTPUTS);
        let cost = dims.tokens * outputs * inputs / 16;
        // What is left of each token's outputs.
        let mut rest: [&mut [f32]; COLUMNS] = core::array::from_fn(|_| Default::default());
        rest.iter_mut().zip(args.out.chunks_mut(outputs)).for_each(|(rest, out)| *rest = out);
        let pieces = (0..outputs).step_by(width).map(|first| {
            let width = width.min(outputs - first);
            (first, rest.each_mut().map(|rest| rest.split_off_mut(..width).unwrap_or_default()))
        });
        self.pool.for_each(cost, pieces, |(first, mut out)| {
            let weight = &args.weight[first * inputs..];
            let bias = args.bias.map(|bias| &bias[first..]);
            dispatch!(self.token, s => linear_columns(s, args.x, weight, bias, inputs, &mut out[..dims.tokens]));
        });
    }

    /// `dx = dout · weight`.
    fn input_backward(&self, dims: LinearDims, dout: &[f32], weight: &[f32], dx: &mut [f32], accumulate: bool) {
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        let tokens = self.rows_of_piece(dims.tokens);
        let cost = dims.tokens * outputs * inputs / 16;
        self.pool.for_each(cost, dx.chunks_mut(tokens * inputs).enumerate(), |(i, dx)| {
            let left = Left { data: &dout[i * tokens * outputs..], row: outputs, step: 1 };
            dispatch!(self.token, s => rows_product(s, left, (weight, inputs), outputs, dx, accumulate));
        });
    }

    /// `dweight = doutᵀ · x`, in the order of the tokens.
    fn weight_backward(&self, dims: LinearDims, dout: &[f32], x: &[f32], dweight: &mut [f32]) {
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        let rows = self.rows_of_piece(outputs).min(64);
        let cost = dims.tokens * outputs * inputs / 16;
        self.pool.for_each(cost, dweight.chunks_mut(rows * inputs).enumerate(), |(i, dweight)| {
            let left = Left { data: &dout[i * rows..], row: 1, step: outputs };
            dispatch!(self.token, s => rows_product(s, left, (x, inputs), dims.tokens, dweight, false));
        });
    }
}

/// Rows for which a panel is copied together first: where it lies, its rows may be a power of two apart, and few of them
/// then fit into the first cache at a time.
const COPIED: usize = 16;

/// `out[R, I] = left[R, depth] · right[depth, I]`, or added to it.
#[inline(always)]
fn rows_product<S: Simd>(
    s: S,
    left: Left<'_>,
    (right, width): (&[f32], usize),
    depth: usize,
    out: &mut [f32],
    accumulate: bool,
) {
    let rows = out.len() / width;
    let mut copy = [0.0; DEPTH * MAX_WIDTH];
    for k in (0..depth).step_by(DEPTH) {
        let (size, more) = (DEPTH.min(depth - k), accumulate || k > 0);
        let left = Left { data: &left.data[k * left.step..], ..left };
        for col in (0..width).step_by(product::width::<S>()) {
            let columns = product::width::<S>().min(width - col);
            let whole = columns == product::width::<S>();
            let panel = if whole && rows < COPIED {
                Panel { data: &right[k * width + col..], step: width }
            } else {
                for (j, to) in copy.chunks_exact_mut(product::width::<S>()).take(size).enumerate() {
                    let from = &right[(k + j) * width + col..];
                    // A copy of a length that the compiler knows is no call.
                    if whole {
                        to.copy_from_slice(&from[..to.len()])
                    } else {
                        to[..columns].copy_from_slice(&from[..columns])
                    }
                }
                Panel { data: &copy, step: product::width::<S>() }
            };
            product::multiply(s, (rows, size, columns), left, panel, (&mut out[col..], width), more);
        }
    }
    if depth == 0 && !accumulate {
        out.fill(0.0);
    }
}

/// `out[R, O] = x[R, I] · weight[O, I]ᵀ + bias`, a panel of the weight at a time.
#[inline(always)]
fn linear_rows<S: Simd>(s: S, x: &[f32], weight: &[f32], bias: Option<&[f32]>, dims: LinearDims, out: &mut [f32]) {
    let (inputs, outputs) = (dims.inputs, dims.outputs);
    let (rows, width) = (out.len() / outputs, product::width::<S>());
    let mut panel = [0.0; DEPTH * MAX_WIDTH];
    for col in (0..outputs).step_by(width) {
        let columns = width.min(outputs - col);
        for k in (0..inputs).step_by(DEPTH) {
            let depth = DEPTH.min(inputs - k);
            product::transpose(s, &weight[col * inputs + k..], inputs, columns, depth, &mut panel);
            let left = Left { data: &x[k..], row: inputs, step: 1 };
            let panel = Panel { data: &panel, step: width };
            product::multiply(s, (rows, depth, columns), left, panel, (&mut out[col..], outputs), k > 0);
        }
    }
    add_bias(bias, outputs, out);
}

/// The outputs of the first rows of a weight: the tokens are a product's columns, and the weight is read where it lies.
#[inline(always)]
fn linear_columns<S: Simd>(
    s: S,
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    inputs: usize,
    out: &mut [&mut [f32]],
) {
    let (width, outputs) = (product::width::<S>(), out[0].len());
    let mut panel = [0.0; DEPTH * MAX_WIDTH];
    let (mut tile, mut turned) = ([0.0; OUTPUTS * MAX_WIDTH], [0.0; OUTPUTS * MAX_WIDTH]);
    for (x, out) in x.chunks(width * inputs).zip(out.chunks_mut(width)) {
        // Half a panel where that has room for all.
        let columns = if out.len() <= S::LANES { S::LANES } else { width };
        for first in (0..outputs).step_by(OUTPUTS) {
            let rows = OUTPUTS.min(outputs - first);
            for k in (0..inputs).step_by(DEPTH) {
                let depth = DEPTH.min(inputs - k);
                // Of one piece of the depth it is the same panel for all outputs.
                if first == 0 || inputs > DEPTH {
                    product::transpose(s, &x[k..], inputs, out.len(), depth, &mut panel);
                }
                let left = Left { data: &weight[first * inputs + k..], row: inputs, step: 1 };
                let panel = Panel { data: &panel, step: width };
                product::multiply(s, (rows, depth, columns), left, panel, (&mut tile, width), k > 0);
            }
            for n in (0..OUTPUTS).step_by(S::LANES) {
                for t in (0..columns).step_by(S::LANES) {
                    s.turn((&tile[n * width + t..], width), (&mut turned[t * OUTPUTS + n..], OUTPUTS));
                }
            }
            for (turned, out) in turned.chunks_exact(OUTPUTS).zip(&mut *out) {
                let out = &mut out[first..first + rows];
                out.copy_from_slice(&turned[..rows]);
                add_bias(bias.map(|bias| &bias[first..first + rows]), rows, out);
            }
        }
    }
}

#[inline(always)]
fn add_bias(bias: Option<&[f32]>, outputs: usize, out: &mut [f32]) {
    if let Some(bias) = bias {
        for out in out.chunks_exact_mut(outputs) {
            for (out, bias) in out.iter_mut().zip(bias) {
                *out += bias;
            }
        }
    }
}

impl Dense for Cpu {
    fn linear(&self, mut args: Linear<'_, Self>) -> Result<(), ArgError> {
        let dims = args.check()?;
        if dims.tokens == 0 {
            return Ok(());
        }
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        if dims.tokens < FEW || outputs < FEW {
            self.linear_dots(dims, &mut args);
            add_bias(args.bias, outputs, args.out);
            return Ok(());
        }
        if are_columns(dims.tokens) {
            self.linear_columns(dims, args);
            return Ok(());
        }
        let tokens = self.rows_of_piece(dims.tokens);
        let cost = dims.tokens * outputs * inputs / 16;
        self.pool.for_each(cost, args.out.chunks_mut(tokens * outputs).enumerate(), |(i, out)| {
            let x = &args.x[i * tokens * inputs..];
            dispatch!(self.token, s => linear_rows(s, x, args.weight, args.bias, dims, out));
        });
        Ok(())
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<(), ArgError> {
        let dims = args.check()?;
        if dims.tokens == 0 {
            // The sums over no token.
            args.dweight.into_iter().chain(args.dbias).for_each(|grad| grad.fill(0.0));
            return Ok(());
        }
        if let Some(dx) = args.dx {
            self.input_backward(dims, args.dout, args.weight, dx, args.accumulate);
        }
        if let Some(dweight) = args.dweight {
            self.weight_backward(dims, args.dout, args.x, dweight);
        }
        if let Some(dbias) = args.dbias {
            let pieces = dbias.chunks_mut(64).enumerate();
            self.pool.for_each(args.dout.len() / 8, pieces, |(i, dbias)| {
                dispatch!(self.token, _s => {
                    dbias.fill(0.0);
                    for dout in args.dout.chunks_exact(dims.outputs) {
                        for (dbias, dout) in dbias.iter_mut().zip(&dout[i * 64..]) {
                            *dbias += dout;
                        }
                    }
                });
            });
        }
        Ok(())
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let (dims, dim) = (args.dims, args.dims.dim);
        let rows = (VALUES / dim).max(1);
        let pieces = args.out.chunks_mut(rows * dim).zip(args.x.chunks(rows * dim)).enumerate();
        self.pool.for_each(args.x.len() / 2, pieces, |(i, (out, x))| {
            dispatch!(self.token, s => {
                let groups = Groups::new(&dims, i * rows);
                for ((out, x), group) in out.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(groups) {
                    let (inverse, gain) = (inverse_rms(s, x), &args.gain[group * dim..(group + 1) * dim]);
                    for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gain) {
                        *out = x * inverse * gain;
                    }
                }
            });
        });
        Ok(())
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let (dims, dim) = (args.dims, args.dims.dim);
        if let Some(dgain) = args.dgain {
            // A gain has one owner, who adds its rows in their order.
            let dout = &*args.dx;
            self.pool.for_each(args.x.len() / 2, dgain.chunks_exact_mut(dim).enumerate(), |(group, dgain)| {
                dispatch!(self.token, s => gain_backward(s, &dims, group, args.x, dout, dgain));
            });
        }
        let rows = (VALUES / dim).max(1);
        let pieces = args.dx.chunks_mut(rows * dim).zip(args.x.chunks(rows * dim)).enumerate();
        self.pool.for_each(args.x.len(), pieces, |(i, (dx, x))| {
            dispatch!(self.token, s => {
                let groups = Groups::new(&dims, i * rows);
                for ((dx, x), group) in dx.chunks_exact_mut(dim).zip(x.chunks_exact(dim)).zip(groups) {
                    norm_backward(s, x, &args.gain[group * dim..(group + 1) * dim], dx);
                }
            });
        });
        Ok(())
    }

    fn silu_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        args.check("silu_gate", false)?;
        self.gate(args, 4, |y, g| y * (g * sigmoid(g)));
        Ok(())
    }

    fn silu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        args.check("silu_gate_backward", false)?;
        self.gate_backward(args, 2, |y, g, dout| {
            let s = sigmoid(g);
            (dout * (g * s), dout * y * (s + g * s * (1.0 - s)))
        });
        Ok(())
    }

    fn sigmoid_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        let width = args.check("sigmoid_gate", true)?;
        let tokens = (VALUES / width).max(1);
        let pieces =
            args.out.chunks_mut(tokens * width).zip(args.y.chunks(tokens * width)).zip(args.gate.chunks(tokens));
        self.pool.for_each(args.y.len() / 4, pieces, |((out, y), gate)| {
            dispatch!(self.token, _s => {
                for ((out, y), &g) in out.chunks_exact_mut(width).zip(y.chunks_exact(width)).zip(gate) {
                    let s = sigmoid(g);
                    out.iter_mut().zip(y).for_each(|(out, &y)| *out = y * s);
                }
            });
        });
        Ok(())
    }

    fn sigmoid_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        let width = args.check("sigmoid_gate_backward", true)?;
        let tokens = (VALUES / width).max(1);
        let chunk = tokens * width;
        let inputs = args.y.chunks(chunk).zip(args.dout.chunks(chunk)).zip(args.gate.chunks(tokens));
        let pieces = args.dy.chunks_mut(chunk).zip(args.dgate.chunks_mut(tokens)).zip(inputs);
        self.pool.for_each(args.y.len() / 4, pieces, |((dy, dgate), ((y, dout), gate))| {
            dispatch!(self.token, lanes => {
                let rows = y.chunks_exact(width).zip(dout.chunks_exact(width)).zip(gate);
                for ((dy, dgate), ((y, dout), &g)) in dy.chunks_exact_mut(width).zip(dgate).zip(rows) {
                    let s = sigmoid(g);
                    dy.iter_mut().zip(dout).for_each(|(dy, &dout)| *dy = dout * s);
                    *dgate = dot(lanes, dout, y) * (s * (1.0 - s));
                }
            });
        });
        Ok(())
    }

    fn gelu_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        args.check("gelu_gate", false)?;
        self.gate(args, 1, |y, g| y * (g * normal_cdf(g)));
        Ok(())
    }

    fn gelu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        args.check("gelu_gate_backward", false)?;
        // The density of the normal distribution is exp(-g²/2) / sqrt(2π).
        const NORM: f32 = core::f32::consts::FRAC_2_SQRT_PI * core::f32::consts::FRAC_1_SQRT_2 / 2.0;
        self.gate_backward(args, 1, |y, g, dout| {
            let (cdf, density) = (normal_cdf(g), NORM * crate::math::exp(g * g * -0.5));
            (dout * (g * cdf), dout * y * (cdf + g * density))
        });
        Ok(())
    }
}

impl Cpu {
    /// `out = f(y, gate)`, value by value; some `per_ns` of them take a nanosecond.
    fn gate(&self, args: Gate<'_, Self>, per_ns: usize, f: impl Fn(f32, f32) -> f32 + Sync) {
        let inputs = args.y.chunks(VALUES).zip(args.gate.chunks(VALUES));
        self.pool.for_each(args.y.len() / per_ns, args.out.chunks_mut(VALUES).zip(inputs), |(out, (y, gate))| {
            dispatch!(self.token, _s => {
                for ((out, &y), &g) in out.iter_mut().zip(y).zip(gate) {
                    *out = f(y, g);
                }
            });
        });
    }

    /// `(dy, dgate) = f(y, gate, dout)`, value by value.
    fn gate_backward(
        &self,
        args: GateBackward<'_, Self>,
        per_ns: usize,
        f: impl Fn(f32, f32, f32) -> (f32, f32) + Sync,
    ) {
        let inputs = args.y.chunks(VALUES).zip(args.gate.chunks(VALUES)).zip(args.dout.chunks(VALUES));
        let pieces = args.dy.chunks_mut(VALUES).zip(args.dgate.chunks_mut(VALUES)).zip(inputs);
        self.pool.for_each(args.y.len() / per_ns, pieces, |((dy, dgate), ((y, gate), dout))| {
            dispatch!(self.token, _s => {
                let inputs = y.iter().zip(gate).zip(dout);
                for ((dy, dgate), ((&y, &g), &dout)) in dy.iter_mut().zip(dgate).zip(inputs) {
                    (*dy, *dgate) = f(y, g, dout);
                }
            });
        });
    }
}

/// The gains of consecutive rows, without a division for each.
struct Groups {
    group: usize,
    left: usize,
    repeat: usize,
    groups: usize,
}

impl Groups {
    fn new(dims: &NormDims, row: usize) -> Self {
        Self { group: dims.group(row), left: dims.repeat - row % dims.repeat, repeat: dims.repeat, groups: dims.groups }
    }
}

impl Iterator for Groups {
    type Item = usize;
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        let group = self.group;
        self.left -= 1;
        if self.left == 0 {
            self.left = self.repeat;
            self.group = if group + 1 == self.groups { 0 } else { group + 1 };
        }
        Some(group)
    }
}

/// A dot by the widest vectors that a slice fills.
#[inline(always)]
fn narrow_dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    if a.len() < S::LANES { dot(Lanes::<4>, a, b) } else { dot(s, a, b) }
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "the constant rounded to the scalar")]
fn inverse_rms<S: Simd>(s: S, x: &[f32]) -> f32 {
    1.0 / (narrow_dot(s, x, x) / x.len() as f32 + NORM_EPS as f32).sqrt()
}

/// With `n = x / rms`: `dn = dout · gain`, and `dx = (dn - n · mean(dn · n)) / rms`.
#[inline(always)]
fn norm_backward<S: Simd>(s: S, x: &[f32], gain: &[f32], dx: &mut [f32]) {
    let inverse = inverse_rms(s, x);
    for (dx, &gain) in dx.iter_mut().zip(gain) {
        *dx *= gain;
    }
    let mean = narrow_dot(s, dx, x) * inverse / x.len() as f32;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = (*dx - x * inverse * mean) * inverse;
    }
}

/// `dgain = Σ dout · x / rms` over the rows of a gain.
#[inline(always)]
fn gain_backward<S: Simd>(s: S, dims: &NormDims, group: usize, x: &[f32], dout: &[f32], dgain: &mut [f32]) {
    let dim = dims.dim;
    dgain.fill(0.0);
    let run = dims.repeat * dim;
    for start in (group * run..x.len()).step_by(dims.groups * run) {
        let run = start..(start + run).min(x.len());
        for (x, dout) in x[run.clone()].chunks_exact(dim).zip(dout[run].chunks_exact(dim)) {
            let inverse = inverse_rms(s, x);
            for ((dgain, &x), &dout) in dgain.iter_mut().zip(x).zip(dout) {
                *dgain += dout * (x * inverse);
            }
        }
    }
}

/// The distribution function of the normal distribution: exact GELU is `x` times it.
#[inline]
fn normal_cdf(x: f32) -> f32 {
    0.5 * (1.0 + Real::erf(x * core::f32::consts::FRAC_1_SQRT_2))
}
