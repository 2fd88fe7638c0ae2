//! AdamW over the dense variables, in one pass each.

use std::borrow::Cow;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use memlayer_candle::Compute;
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
    compute: Compute,
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
    Host {
        first: Vec<f32>,
        second: Vec<f32>,
    },
    #[cfg(feature = "cuda")]
    Cuda(memlayer_candle::adamw::Moments),
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
    fn zeros(var: &Var, compute: &Compute) -> Result<Self> {
        let len = var.elem_count();
        match compute {
            #[cfg(feature = "cuda")]
            Compute::Cuda(cuda) => Ok(Self::Cuda(memlayer_candle::adamw::Moments::zeros(cuda, len)?)),
            _ => Ok(Self::Host { first: vec![0.0; len], second: vec![0.0; len] }),
        }
    }

    fn get(&self) -> Result<[Cow<'_, [f32]>; 2]> {
        match self {
            Self::Host { first, second } => Ok([first.into(), second.into()]),
            #[cfg(feature = "cuda")]
            Self::Cuda(moments) => Ok(moments.get()?.map(Cow::Owned)),
        }
    }

    /// The same moments as other values, as many as the variable has.
    fn set(&mut self, [a, b]: [Vec<f32>; 2], compute: &Compute) -> Result<()> {
        *self = match compute {
            #[cfg(feature = "cuda")]
            Compute::Cuda(cuda) => Self::Cuda(memlayer_candle::adamw::Moments::new(cuda, &a, &b)?),
            _ => Self::Host { first: a, second: b },
        };
        Ok(())
    }

    /// A step of the variable.
    fn step(&mut self, var: &Var, grad: &Tensor, factors: Factors) -> Result<()> {
        match self {
            Self::Host { first, second } => Ok(var.set(&host_step(var, grad, first, second, factors)?)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(moments) => {
                let [rate, eps, beta1, beta2, scale, keep] = factors.rounded();
                let step = memlayer_candle::adamw::AdamW { rate, eps, beta1, beta2, scale, keep };
                Ok(moments.step(var, grad, step)?)
            }
        }
    }
}

impl Factors {
    /// Learning rate, eps, both betas, scale and decay in the variables' format.
    fn rounded(self) -> [f32; 6] {
        let Self { rate, eps, betas: (b1, b2), scale, keep } = self;
        #[allow(clippy::cast_possible_truncation, reason = "rounding to the variables' format")]
        [rate, eps, b1, b2, scale, keep].map(|x| x as f32)
    }
}

fn host_step(
    var: &Var,
    grad: &Tensor,
    first: &mut [f32],
    second: &mut [f32],
    factors: Factors,
) -> candle_core::Result<Tensor> {
    let [rate, eps, b1, b2, scale, keep] = factors.rounded();
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
    /// An optimizer of these variables, which are where `compute` computes, with moments of zero.
    ///
    /// # Errors
    /// The device's, if it has no memory for them.
    pub fn new(config: AdamWConfig, variables: Vec<(String, Var)>, compute: &Compute) -> Result<Self> {
        let slots = variables.into_iter().map(|(name, var)| {
            let kept = ["embedding.weight", ".keys"].iter().any(|n| name.ends_with(n));
            let decays = var.rank() >= 2 && !kept && !name.ends_with("norm.weight");
            Ok(Slot { name, moments: Moments::zeros(&var, compute)?, var, decays })
        });
        Ok(Self { config, compute: compute.clone(), slots: slots.collect::<Result<_>>()?, steps: 0 })
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
        let grads = self.slots.iter().filter_map(|slot| grads.get(&slot.var));
        match &self.compute {
            #[cfg(feature = "cuda")]
            Compute::Cuda(cuda) => Ok(memlayer_candle::adamw::square_sum(cuda, &grads.collect::<Vec<_>>())?),
            _ => {
                let mut sum = 0.0;
                for grad in grads {
                    sum += with_values(grad, |g| Ok(g.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>()))?;
                }
                Ok(sum)
            }
        }
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
            slot.moments.step(&slot.var, grad, Factors { rate, eps, betas, scale, keep })?;
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
            slot.moments.set(values, &self.compute)?;
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
        let compute = Compute::for_device(&Device::Cpu).expect("a backend");
        let config = AdamWConfig { betas: (0.9, 0.99), eps: 0.0, weight_decay: 0.5 };
        let mut adam = AdamW::new(config, vec![("w".to_owned(), var.clone())], &compute).expect("an optimizer");
        let loss = (var.as_tensor() * 3.0).expect("a product").sum_all().expect("a sum");
        let grads = loss.backward().expect("gradients");
        assert!((adam.square_sum(&grads).expect("a norm") - 18.0).abs() < 1e-6);
        adam.step(&grads, 0.1, 1.0).expect("a step");
        // The first step is lr in the gradient's direction, after decay by lr · weight_decay.
        let values = var.flatten_all().expect("flat").to_vec1::<f32>().expect("values");
        assert!((values[0] - (0.95 - 0.1)).abs() < 1e-6 && (values[1] - (-1.9 - 0.1)).abs() < 1e-6, "{values:?}");
    }
}
