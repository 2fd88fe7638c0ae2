//! AdamW over the dense variables, in one pass each.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::error::{LmError, Result};
use crate::ops::with_values;

/// What AdamW (Loshchilov and Hutter 2019) is told.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdamWConfig {
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Keeps the quotient finite.
    pub eps: f64,
    /// Decay of matrices; embeddings, sub-keys, gains and biases do not decay.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.98), eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer and its moments.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    steps: u64,
}

/// A variable and its moments.
#[derive(Debug)]
struct Slot {
    name: String,
    var: Var,
    first: Vec<f32>,
    second: Vec<f32>,
    decays: bool,
}

impl AdamW {
    /// An optimizer of these variables, with moments of zero.
    #[must_use]
    pub fn new(config: AdamWConfig, variables: Vec<(String, Var)>) -> Self {
        let slots = variables
            .into_iter()
            .map(|(name, var)| {
                let len = var.elem_count();
                let kept = ["embedding.weight", ".keys"].iter().any(|n| name.ends_with(n));
                let decays = var.rank() >= 2 && !kept && !name.ends_with("norm.weight");
                Slot { name, var, first: vec![0.0; len], second: vec![0.0; len], decays }
            })
            .collect();
        Self { config, slots, steps: 0 }
    }

    /// Steps made.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The sum of the squares of all gradients.
    ///
    /// # Errors
    /// candle's.
    pub fn square_sum(&self, grads: &GradStore) -> Result<f64> {
        let mut sum = 0.0;
        for slot in &self.slots {
            if let Some(grad) = grads.get(&slot.var) {
                sum += with_values(grad, |g| Ok(g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>()))?;
            }
        }
        Ok(sum)
    }

    /// Changes all variables that have a gradient, which is multiplied by `scale` first.
    ///
    /// # Errors
    /// candle's.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        self.steps += 1;
        let AdamWConfig { betas: (b1, b2), eps, weight_decay } = self.config;
        let count = self.steps as f64;
        let (c1, c2) = (1.0 - b1.powf(count), 1.0 - b2.powf(count));
        #[allow(clippy::cast_possible_truncation, reason = "rounding to the variables' format")]
        let [rate, eps, b1, b2, scale] = [lr * c2.sqrt() / c1, eps * c2.sqrt(), b1, b2, scale].map(|x| x as f32);
        for slot in &mut self.slots {
            let Some(grad) = grads.get(&slot.var) else { continue };
            #[allow(clippy::cast_possible_truncation, reason = "rounding to the variables' format")]
            let keep = if slot.decays { (1.0 - lr * weight_decay) as f32 } else { 1.0 };
            let (first, second) = (&mut slot.first, &mut slot.second);
            let changed = with_values(grad, |grad| {
                with_values(slot.var.as_tensor(), |x| {
                    let mut changed = Vec::with_capacity(x.len());
                    for (((x, &g), m), v) in x.iter().zip(grad).zip(first).zip(second) {
                        let g = g * scale;
                        *m = b1 * *m + (1.0 - b1) * g;
                        *v = b2 * *v + (1.0 - b2) * g * g;
                        changed.push(keep * x - rate * *m / (v.sqrt() + eps));
                    }
                    Ok(changed)
                })
            })?;
            slot.var.set(&Tensor::from_vec(changed, slot.var.shape(), slot.var.device())?)?;
        }
        Ok(())
    }

    /// The moments by the names of their variables: what a checkpoint keeps.
    pub fn moments(&self) -> impl Iterator<Item = (&str, &[f32], &[f32])> {
        self.slots.iter().map(|s| (s.name.as_str(), s.first.as_slice(), s.second.as_slice()))
    }

    /// Takes moments back from a checkpoint: `moment` gives those of a name.
    ///
    /// # Errors
    /// What `moment` gives, or [`LmError::Training`] if one has another length.
    pub fn restore(&mut self, steps: u64, moment: impl Fn(&str) -> Result<(Vec<f32>, Vec<f32>)>) -> Result<()> {
        let mut restored = Vec::new();
        for slot in &self.slots {
            let (first, second) = moment(&slot.name)?;
            if (first.len(), second.len()) != (slot.first.len(), slot.second.len()) {
                let (found, expected) = (first.len(), slot.first.len());
                return Err(LmError::Training(format!("moments of {} have {found} values, not {expected}", slot.name)));
            }
            restored.push((first, second));
        }
        for (slot, (first, second)) in self.slots.iter_mut().zip(restored) {
            (slot.first, slot.second) = (first, second);
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_step_worked_out_by_hand() {
        let var = Var::new(&[[1f32, -2.0]], &Device::Cpu).expect("a var");
        let config = AdamWConfig { betas: (0.9, 0.99), eps: 0.0, weight_decay: 0.5 };
        let mut adam = AdamW::new(config, vec![("w".to_owned(), var.clone())]);
        let loss = (var.as_tensor() * 3.0).expect("a product").sum_all().expect("a sum");
        let grads = loss.backward().expect("gradients");
        assert!((adam.square_sum(&grads).expect("a norm") - 18.0).abs() < 1e-6);
        adam.step(&grads, 0.1, 1.0).expect("a step");
        // The first step is lr in the gradient's direction, after decay by lr · weight_decay.
        let values = var.flatten_all().expect("flat").to_vec1::<f32>().expect("values");
        assert!((values[0] - (0.95 - 0.1)).abs() < 1e-6 && (values[1] - (-1.9 - 0.1)).abs() < 1e-6, "{values:?}");
    }
}
