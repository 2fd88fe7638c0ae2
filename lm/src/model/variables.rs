//! A model's dense variables: by name, in order, and the same for the same seed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use memlayer_core::Random;

use crate::data::Hash;

/// Variables that come to be when a model first asks for them.
///
/// candle's own random numbers on the CPU cannot be seeded; here each variable's are picked by the seed and its name.
#[derive(Clone, Debug)]
pub struct Variables(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    seed: u64,
    layers: usize,
    vars: BTreeMap<String, Var>,
}

impl Variables {
    /// No variables yet. Projections back into the residual stream start smaller the more `layers` add to it.
    #[must_use]
    pub fn new(seed: u64, layers: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { seed, layers, vars: BTreeMap::new() })))
    }

    /// What layers get their variables from, on `device`: of the same values wherever that is.
    #[must_use]
    pub fn builder(&self, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, device.clone())
    }

    /// All variables, ordered by name.
    #[must_use]
    pub fn all(&self) -> Vec<(String, Var)> {
        self.lock().vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a variable starts, by what it is.
fn start(name: &str, shape: &Shape, hint: Init, layers: usize) -> Init {
    let fan_in = shape.dims().last().copied().unwrap_or(1) as f64;
    let std = 1.0 / fan_in.sqrt();
    if name.ends_with(".bias") {
        Init::Const(0.0)
    } else if name.ends_with("norm.weight") {
        // A gain: 1, or what a memory layer wants.
        if let Init::Const(gain) = hint
            && gain != 0.0
        {
            hint
        } else {
            Init::Const(1.0)
        }
    } else if name.ends_with(".keys") {
        Init::Randn { mean: 0.0, stdev: 1.0 }
    } else if ["attention.out.weight", "feed_forward.down.weight", "value_proj.weight"]
        .iter()
        .any(|n| name.ends_with(n))
    {
        Init::Randn { mean: 0.0, stdev: std / (2.0 * layers as f64).sqrt() }
    } else {
        Init::Randn { mean: 0.0, stdev: std }
    }
}

/// `len` values of a distribution, picked by a seed and a name.
fn values(init: Init, len: usize, seed: u64, name: &str) -> Vec<f32> {
    let mut hash = Hash::new(seed);
    hash.text(name);
    let mut random = Random::new(hash.finish());
    let mut values = vec![0.0; len];
    match init {
        Init::Randn { mean, stdev } => {
            random.fill_normal(&mut values, stdev);
            #[allow(clippy::cast_possible_truncation, reason = "rounding to the variable's format")]
            values.iter_mut().for_each(|v| *v += mean as f32);
        }
        #[allow(clippy::cast_possible_truncation, reason = "rounding to the variable's format")]
        Init::Uniform { lo, up } => values.iter_mut().for_each(|v| *v = (lo + (up - lo) * random.uniform()) as f32),
        #[allow(clippy::cast_possible_truncation, reason = "rounding to the variable's format")]
        Init::Const(value) => values.fill(value as f32),
        Init::Kaiming { .. } => {}
    }
    values
}

impl SimpleBackend for Variables {
    fn get(&self, shape: Shape, name: &str, hint: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let mut inner = self.lock();
        if let Some(var) = inner.vars.get(name) {
            if var.shape() != &shape {
                candle_core::bail!("variable {name} is {:?}, not {shape:?}", var.shape());
            }
            return Ok(var.as_tensor().clone());
        }
        let init = start(name, &shape, hint, inner.layers);
        let values = values(init, shape.elem_count(), inner.seed, name);
        let var = Var::from_tensor(&Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)?;
        let tensor = var.as_tensor().clone();
        inner.vars.insert(name.to_owned(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.lock().vars.get(name) {
            Some(var) => Ok(var.as_tensor().clone()),
            None => candle_core::bail!("no variable {name}"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.lock().vars.contains_key(name)
    }
}
