//! The gate of a SwiGLU feed-forward.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{gate, sigmoid, slice, with_values};

/// `silu(gate) · up` where each row of `x` (`[.., 2F]`) is gate, then up; `[.., F]`.
///
/// # Errors
/// candle's, if the last dimension is odd.
pub fn swiglu(x: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return super::composed::swiglu(x);
    }
    x.contiguous()?.apply_op1(Swiglu)
}

struct Swiglu;

/// Rows a worker takes at a time: enough work to be worth the hand-over.
const ROWS: usize = 256;

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        let mut dims = layout.dims().to_vec();
        let width = match dims.last_mut() {
            Some(last) if *last > 0 && last.is_multiple_of(2) => {
                *last /= 2;
                *last
            }
            _ => candle_core::bail!("swiglu: {dims:?} has no even last dimension"),
        };
        let mut out = vec![0.0; x.len() / 2];
        x.par_chunks(2 * width * ROWS).zip(out.par_chunks_mut(width * ROWS)).for_each(|(x, out)| gate(x, width, out));
        Ok((CpuStorage::F32(out), Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let width = out.dims().last().copied().unwrap_or(1);
        let dx = with_values(x, |x| with_values(dout, |dout| Ok(backward(x, width, dout))))?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

fn backward(x: &[f32], width: usize, dout: &[f32]) -> Vec<f32> {
    let mut dx = vec![0.0; x.len()];
    let blocks = x.par_chunks(2 * width * ROWS).zip(dout.par_chunks(width * ROWS));
    blocks.zip(dx.par_chunks_mut(2 * width * ROWS)).for_each(|((x, dout), dx)| {
        let rows = x.chunks_exact(2 * width).zip(dout.chunks_exact(width));
        for ((row, dout), dx) in rows.zip(dx.chunks_exact_mut(2 * width)) {
            let ((gate, up), (dgate, dup)) = (row.split_at(width), dx.split_at_mut(width));
            for i in 0..width {
                let (g, s) = (gate[i], sigmoid(gate[i]));
                dup[i] = dout[i] * g * s;
                dgate[i] = dout[i] * up[i] * (s + g * s * (1.0 - s));
            }
        }
    });
    dx
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_gradients, numbers};
    use super::swiglu;

    #[test]
    fn gradients_are_slopes() {
        check_gradients(&[(&[3, 2, 10][..], numbers(60, 3))], |t| swiglu(&t[0]).expect("a gate"));
    }
}
