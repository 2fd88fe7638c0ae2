//! RMSNorm of the rows of a matrix.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{slice, with_values};

/// What keeps the norm of a zero row finite, added to the mean square.
pub const NORM_EPS: f32 = 1e-6;

/// `x / sqrt(mean(x²) + eps) · gain` for each row of `x` (`[.., D]`), `gain` being `[D]`.
///
/// # Errors
/// candle's, if `gain` is not as wide as `x`.
pub fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return super::composed::rms_norm(x, gain);
    }
    x.contiguous()?.apply_op2(&gain.contiguous()?, RmsNorm)
}

struct RmsNorm;

fn inverse_rms(row: &[f32]) -> f32 {
    let sum: f32 = row.iter().map(|x| x * x).sum();
    1.0 / (sum / row.len() as f32 + NORM_EPS).sqrt()
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, gain: &CpuStorage, gl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, gain) = (slice(x, xl)?, slice(gain, gl)?);
        if gain.is_empty() || !x.len().is_multiple_of(gain.len()) {
            candle_core::bail!("rms-norm: {} values in rows of {}", x.len(), gain.len());
        }
        let mut out = Vec::with_capacity(x.len());
        for row in x.chunks_exact(gain.len()) {
            let inverse = inverse_rms(row);
            out.extend(row.iter().zip(gain).map(|(x, g)| x * inverse * g));
        }
        Ok((CpuStorage::F32(out), xl.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, gain: &Tensor, _: &Tensor, dout: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dgain) =
            with_values(x, |x| with_values(gain, |gain| with_values(dout, |dout| Ok(backward(x, gain, dout)))))?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dgain, gain.shape(), gain.device())?)))
    }
}

/// With n = x / rms and dn = dout · gain: dx = (dn - n · mean(dn · n)) / rms, dgain = Σ dout · n.
fn backward(x: &[f32], gain: &[f32], dout: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let dim = gain.len();
    let (mut dx, mut dgain) = (Vec::with_capacity(x.len()), vec![0.0; dim]);
    for (row, dout) in x.chunks_exact(dim).zip(dout.chunks_exact(dim)) {
        let inverse = inverse_rms(row);
        let mut mean = 0.0;
        for c in 0..dim {
            let n = row[c] * inverse;
            mean += dout[c] * gain[c] * n;
            dgain[c] += dout[c] * n;
        }
        mean /= dim as f32;
        dx.extend((0..dim).map(|c| (dout[c] * gain[c] - row[c] * inverse * mean) * inverse));
    }
    (dx, dgain)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_gradients, numbers};
    use super::rms_norm;

    #[test]
    fn gradients_are_slopes() {
        let inputs = [(&[3, 2, 6][..], numbers(36, 1)), (&[6][..], numbers(6, 2))];
        check_gradients(&inputs, |t| rms_norm(&t[0], &t[1]).expect("a norm"));
    }
}
