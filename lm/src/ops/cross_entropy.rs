//! The mean negative log-likelihood of the right tokens.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{exp, slice};

/// `mean(-log softmax(logits[m])[targets[m]])` over the rows of `logits` (`[M, vocab]`), a scalar.
///
/// # Errors
/// candle's, if there are not as many targets as rows, or one is no column.
pub fn cross_entropy(logits: &Tensor, targets: Arc<[u32]>) -> Result<Tensor> {
    if !logits.device().is_cpu() {
        return super::composed::cross_entropy(logits, &targets);
    }
    logits.contiguous()?.apply_op1(CrossEntropy { targets, gradient: Mutex::default() })
}

struct CrossEntropy {
    targets: Arc<[u32]>,
    /// `(softmax - onehot) / M`: the forward has made all of it but the subtraction.
    gradient: Mutex<Vec<f32>>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, vocab) = layout.shape().dims2()?;
        if rows != self.targets.len() || rows == 0 {
            candle_core::bail!("cross-entropy: {} targets for {rows} rows", self.targets.len());
        }
        if let Some(target) = self.targets.iter().find(|&&t| t as usize >= vocab) {
            candle_core::bail!("cross-entropy: target {target} of {vocab}");
        }
        let logits = slice(logits, layout)?;
        let mut gradient = vec![0.0; logits.len()];
        let scale = 1.0 / rows as f32;
        let pieces = logits.par_chunks(vocab).zip(gradient.par_chunks_mut(vocab)).zip(self.targets.par_iter());
        let losses: Vec<f64> = pieces.with_min_len(16).map(|((l, g), &t)| one(l, g, t as usize, scale)).collect();
        // Summed in order, whoever made them.
        let loss: f64 = losses.iter().sum();
        *self.gradient.lock().unwrap_or_else(PoisonError::into_inner) = gradient;
        #[allow(clippy::cast_possible_truncation, reason = "rounding to the tensor's format")]
        let loss = (loss / rows as f64) as f32;
        Ok((CpuStorage::F32(vec![loss]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, dloss: &Tensor) -> Result<Option<Tensor>> {
        let gradient = core::mem::take(&mut *self.gradient.lock().unwrap_or_else(PoisonError::into_inner));
        if gradient.is_empty() {
            candle_core::bail!("cross-entropy: a graph can be walked back once");
        }
        let gradient = Tensor::from_vec(gradient, logits.shape(), logits.device())?;
        match dloss.to_scalar::<f32>()? {
            1.0 => Ok(Some(gradient)),
            scale => Ok(Some((gradient * f64::from(scale))?)),
        }
    }
}

/// The loss of a row, and its gradient times `scale`.
fn one(logits: &[f32], gradient: &mut [f32], target: usize, scale: f32) -> f64 {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for (g, &l) in gradient.iter_mut().zip(logits) {
        *g = exp(l - greatest);
    }
    let sum: f32 = lanes_sum(gradient);
    let factor = scale / sum;
    for g in gradient.iter_mut() {
        *g *= factor;
    }
    gradient[target] -= scale;
    f64::from(sum).ln() - f64::from(logits[target] - greatest)
}

/// A sum in 16 lanes, which compilers turn into vector code.
fn lanes_sum(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_gradients, numbers};
    use super::cross_entropy;

    #[test]
    fn gradients_are_slopes() {
        let targets = [1u32, 4, 0];
        let inputs = [(&[3, 20][..], numbers(60, 5))];
        check_gradients(&inputs, |t| cross_entropy(&t[0], targets.into()).expect("a loss"));
    }

    #[test]
    fn a_certain_answer_costs_nothing() {
        let logits = candle_core::Tensor::new(&[[0f32, 60.0, 0.0]], &candle_core::Device::Cpu).expect("a tensor");
        let loss = |target: u32| {
            cross_entropy(&logits, [target].into()).expect("a loss").to_scalar::<f32>().expect("a number")
        };
        assert!(loss(1).abs() < 1e-6);
        assert!((loss(0) - 60.0).abs() < 1e-4);
        assert!(cross_entropy(&logits, [3u32].into()).is_err());
    }
}
