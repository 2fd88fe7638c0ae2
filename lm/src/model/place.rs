//! Where a model is trained.

use std::sync::Arc;

use candle_core::Device;
use memlayer_candle::{Compute, Rule, ValuePool};
use memlayer_cpu::Cpu;

use crate::error::{LmError, Result};

/// A device to train on: the CPU, or a GPU. Reading a model, to judge it or to pack it, is the CPU's in either case.
#[derive(Clone, Debug)]
pub struct Place {
    cpu: Arc<Cpu>,
    device: Device,
    compute: Compute,
    cache_rows: Option<usize>,
}

impl Place {
    /// The device of a name: `cpu`, `cuda`, or `cuda:1` for another than the first GPU.
    ///
    /// # Errors
    /// [`LmError::Training`] if it has no such name, or the program was built without CUDA; candle's or the backend's if
    /// the device cannot be used.
    pub fn named(name: &str, cpu: &Arc<Cpu>) -> Result<Self> {
        let ordinal = match name.split_once(':') {
            None if name == "cpu" => return Ok(cpu.into()),
            None if name == "cuda" => Some(0),
            Some(("cuda", number)) => number.parse().ok(),
            _ => None,
        };
        let Some(ordinal) = ordinal else {
            return Err(LmError::Training(format!("device `{name}` is not `cpu`, `cuda` or `cuda:NUMBER`")));
        };
        Self::cuda(ordinal, cpu)
    }

    #[cfg(feature = "cuda")]
    fn cuda(ordinal: usize, cpu: &Arc<Cpu>) -> Result<Self> {
        // A stream of its own: candle's other one is another in every thread.
        let device = Device::new_cuda_with_stream(ordinal)?;
        let compute = Compute::for_device(&device)?;
        Ok(Self { cpu: Arc::clone(cpu), device, compute, cache_rows: None })
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(ordinal: usize, _: &Arc<Cpu>) -> Result<Self> {
        Err(LmError::Training(format!("device `cuda:{ordinal}`: this program was built without the feature `cuda`")))
    }

    /// Keeps the values of memory layers in the host's memory and so many rows of them on the GPU
    /// ([`memlayer_candle::ValuePool::cached`]); `None` for all of them there. No number depends on it.
    #[must_use]
    pub fn with_cache_rows(self, cache_rows: Option<usize>) -> Self {
        Self { cache_rows, ..self }
    }

    /// What reads.
    #[must_use]
    pub fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    /// Where the dense variables are.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What runs the memory layers.
    #[must_use]
    pub fn compute(&self) -> &Compute {
        &self.compute
    }

    /// A pool of values here.
    pub(super) fn pool(&self, rows: usize, dim: usize, rule: Rule, std: f32, seed: u64) -> Result<ValuePool> {
        let compute = self.compute.clone();
        Ok(match self.cache_rows {
            Some(cache_rows) => ValuePool::cached(compute, rows, dim, rule, std, seed, cache_rows)?,
            None => ValuePool::new(compute, rows, dim, rule, std, seed)?,
        })
    }
}

impl From<&Arc<Cpu>> for Place {
    fn from(cpu: &Arc<Cpu>) -> Self {
        Self { cpu: Arc::clone(cpu), device: Device::Cpu, compute: Arc::clone(cpu).into(), cache_rows: None }
    }
}

impl From<&Self> for Place {
    fn from(place: &Self) -> Self {
        place.clone()
    }
}
