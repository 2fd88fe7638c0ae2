//! AdamW over the dense variables, in one pass each.

use std::borrow::Cow;

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
    moments: Moments,
    decays: bool,
}

/// Both moments of a variable, where it is.
#[derive(Debug)]
enum Moments {
    Host { first: Vec<f32>, second: Vec<f32> },
    Device { first: Tensor, second: Tensor },
}

/// What a step multiplies by.
#[derive(Clone, Copy)]
struct Factors {
    /// The learning rate, with the corrections of both moments' bias.
    rate: f64,
    eps: f64,
    betas: (f64, f64),
    /// The gradient is multiplied by this.
    scale: f64,
    /// The variable is, if it decays.
    keep: f64,
}

impl Moments {
    fn zeros(var: &Var) -> candle_core::Result<Self> {
        let len = var.elem_count();
        if var.device().is_cpu() {
            return Ok(Self::Host { first: vec![0.0; len], second: vec![0.0; len] });
        }
        Ok(Self::Device { first: var.zeros_like()?, second: var.zeros_like()? })
    }

    fn get(&self) -> candle_core::Result<[Cow<'_, [f32]>; 2]> {
        match self {
            Self::Host { first, second } => Ok([first.into(), second.into()]),
            Self::Device { first, second } => {
                let fetch = |t: &Tensor| Ok::<_, candle_core::Error>(t.flatten_all()?.to_vec1::<f32>()?.into());
                Ok([fetch(first)?, fetch(second)?])
            }
        }
    }

    /// The same moments as other values, as many as the variable has.
    fn set(&mut self, var: &Var, values: [Vec<f32>; 2]) -> candle_core::Result<()> {
        let [a, b] = values;
        *self = match self {
            Self::Host { .. } => Self::Host { first: a, second: b },
            Self::Device { .. } => {
                let put = |values| Tensor::from_vec(values, var.shape(), var.device());
                Self::Device { first: put(a)?, second: put(b)? }
            }
        };
        Ok(())
    }

    /// The variable after a step.
    fn step(&mut self, var: &Var, grad: &Tensor, factors: Factors) -> candle_core::Result<Tensor> {
        match self {
            Self::Host { first, second } => host_step(var, grad, first, second, factors),
            Self::Device { first, second } => {
                let Factors { rate, eps, betas: (b1, b2), scale, keep } = factors;
                let grad = (grad * scale)?;
                *first = ((&*first * b1)? + (&grad * (1.0 - b1))?)?;
                *second = ((&*second * b2)? + (grad.sqr()? * (1.0 - b2))?)?;
                let moved = ((&*first * rate)? / (second.sqrt()? + eps)?)?;
                (var.as_tensor() * keep)? - moved
            }
        }
    }
}

fn host_step(
    var: &Var,
    grad: &Tensor,
    first: &mut [f32],
    second: &mut [f32],
    factors: Factors,
) -> candle_core::Result<Tensor> {
    let Factors { rate, eps, betas: (b1, b2), scale, keep } = factors;
    #[allow(clippy::cast_possible_truncation, reason = "rounding to the variables' format")]
    let [rate, eps, b1, b2, scale, keep] = [rate, eps, b1, b2, scale, keep].map(|x| x as f32);
    let changed = with_values(grad, |grad| {
        with_values(var.as_tensor(), |x| {
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
    Tensor::from_vec(changed, var.shape(), var.device())
}

impl AdamW {
    /// An optimizer of these variables, with moments of zero.
    ///
    /// # Errors
    /// candle's, if a device has no memory for them.
    pub fn new(config: AdamWConfig, variables: Vec<(String, Var)>) -> Result<Self> {
        let slots = variables.into_iter().map(|(name, var)| {
            let kept = ["embedding.weight", ".keys"].iter().any(|n| name.ends_with(n));
            let decays = var.rank() >= 2 && !kept && !name.ends_with("norm.weight");
            Ok(Slot { name, moments: Moments::zeros(&var)?, var, decays })
        });
        Ok(Self { config, slots: slots.collect::<Result<_>>()?, steps: 0 })
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
        let mut elsewhere = Vec::new();
        for slot in &self.slots {
            let Some(grad) = grads.get(&slot.var) else { continue };
            if grad.device().is_cpu() {
                sum += with_values(grad, |g| Ok(g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>()))?;
            } else {
                elsewhere.push(grad.sqr()?.sum_all()?);
            }
        }
        if !elsewhere.is_empty() {
            // One wait for all of them.
            sum += f64::from(Tensor::stack(&elsewhere, 0)?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(sum)
    }

    /// Changes all variables that have a gradient, which is multiplied by `scale` first.
    ///
    /// # Errors
    /// candle's.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        self.steps += 1;
        let AdamWConfig { betas, eps, weight_decay } = self.config;
        let count = self.steps as f64;
        let (c1, c2) = (1.0 - betas.0.powf(count), 1.0 - betas.1.powf(count));
        let (rate, eps) = (lr * c2.sqrt() / c1, eps * c2.sqrt());
        for slot in &mut self.slots {
            let Some(grad) = grads.get(&slot.var) else { continue };
            let keep = if slot.decays { 1.0 - lr * weight_decay } else { 1.0 };
            let changed = slot.moments.step(&slot.var, grad, Factors { rate, eps, betas, scale, keep })?;
            slot.var.set(&changed)?;
        }
        Ok(())
    }

    /// The moments by the names of their variables: what a checkpoint keeps.
    pub fn moments(&self) -> impl Iterator<Item = Result<(&str, [Cow<'_, [f32]>; 2])>> {
        self.slots.iter().map(|s| Ok((s.name.as_str(), s.moments.get()?)))
    }

    /// Takes moments back from a checkpoint: `moment` gives those of a name.
    ///
    /// # Errors
    /// What `moment` gives, or [`LmError::Training`] if one has another length.
    pub fn restore(&mut self, steps: u64, moment: impl Fn(&str) -> Result<(Vec<f32>, Vec<f32>)>) -> Result<()> {
        let mut restored = Vec::new();
        for slot in &self.slots {
            let (first, second) = moment(&slot.name)?;
            let expected = slot.var.elem_count();
            if (first.len(), second.len()) != (expected, expected) {
                let found = first.len();
                return Err(LmError::Training(format!("moments of {} have {found} values, not {expected}", slot.name)));
            }
            restored.push([first, second]);
        }
        for (slot, values) in self.slots.iter_mut().zip(restored) {
            slot.moments.set(&slot.var, values)?;
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
        let mut adam = AdamW::new(config, vec![("w".to_owned(), var.clone())]).expect("an optimizer");
        let loss = (var.as_tensor() * 3.0).expect("a product").sum_all().expect("a sum");
        let grads = loss.backward().expect("gradients");
        assert!((adam.square_sum(&grads).expect("a norm") - 18.0).abs() < 1e-6);
        adam.step(&grads, 0.1, 1.0).expect("a step");
        // The first step is lr in the gradient's direction, after decay by lr · weight_decay.
        let values = var.flatten_all().expect("flat").to_vec1::<f32>().expect("values");
        assert!((values[0] - (0.95 - 0.1)).abs() < 1e-6 && (values[1] - (-1.9 - 0.1)).abs() < 1e-6, "{values:?}");
    }
}
