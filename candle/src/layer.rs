//! A memory layer as a candle module.

use std::sync::Arc;

use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;
use memlayer_core::Config;
use memlayer_core::config::Kind;
use memlayer_cpu::Cpu;
#[cfg(feature = "cuda")]
use memlayer_cuda::Cuda;

use crate::error::Error;
use crate::op::Shared;
use crate::params::{self, LayerInit};
use crate::pool::{Place, ValuePool};

/// A memory layer: `[.., D]` in, `[.., O]` out, differentiable in its input and in all its dense parameters.
///
/// The dense parameters are variables of the [`VarBuilder`] by the published names (`query_proj.query_mlps.0.weight`,
/// `keys`, `value_proj.weight` and so on), `f32`, on the device of the pool. The rows are in a [`ValuePool`], which other
/// layers may share: `backward` leaves their gradients there, and [`ValuePool::step`] applies them.
#[derive(Clone, Debug)]
pub struct MemoryLayer {
    config: Config,
    values: ValuePool,
    experts: Option<ValuePool>,
    parameters: Vec<(&'static str, Tensor)>,
    shared: OnDevice,
}

/// What the layer's operations share, by where they run.
#[derive(Clone, Debug)]
enum OnDevice {
    Cpu(Arc<Shared<Cpu>>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<Shared<Cuda>>),
}

/// Which rows a forward read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reads {
    /// L, rows read for each token.
    pub bag: usize,
    /// `[T, L]`: the slots, best first in each head.
    pub ids: Vec<u32>,
    /// `[T, L]`: their softmax weights.
    pub weights: Vec<f32>,
}

impl MemoryLayer {
    /// A layer over `values`, with parameters from `vb`.
    ///
    /// # Errors
    /// [`Error::PoolShape`] if the pool is not `[N^P, V]`; candle's if a parameter is missing, has another shape, or is
    /// not `f32`; [`Error::Argument`] for a PEER configuration, which wants [`MemoryLayer::peer`].
    pub fn new(config: Config, values: ValuePool, init: &LayerInit, vb: &VarBuilder) -> Result<Self, Error> {
        if config.kind() == Kind::Peer {
            return Err(
                memlayer_core::ArgError::Presence { op: "MemoryLayer::new", operand: "experts", needed: true }.into()
            );
        }
        Self::build(config, values, None, init, vb)
    }

    /// A PEER layer over the expert rows `u` (`[N^P, D]`) and `v` (`[N^P, V]`).
    ///
    /// # Errors
    /// As [`MemoryLayer::new`], but for the other kind of configuration; [`Error::Places`] if the pools are on different
    /// devices.
    pub fn peer(config: Config, u: ValuePool, v: ValuePool, init: &LayerInit, vb: &VarBuilder) -> Result<Self, Error> {
        if config.kind() == Kind::Memory {
            return Err(memlayer_core::ArgError::Presence {
                op: "MemoryLayer::peer",
                operand: "experts",
                needed: false,
            }
            .into());
        }
        u.check(config.slots(), config.input_dim())?;
        Self::build(config, v, Some(u), init, vb)
    }

    fn build(
        config: Config,
        values: ValuePool,
        experts: Option<ValuePool>,
        init: &LayerInit,
        vb: &VarBuilder,
    ) -> Result<Self, Error> {
        values.check(config.slots(), config.value_dim())?;
        let mut parameters = Vec::new();
        for spec in params::specs(&config, init) {
            let tensor = vb.get_with_hints(spec.shape.as_slice(), spec.name, spec.init)?;
            if tensor.dtype() != DType::F32 {
                let (expected, got) = (DType::F32, tensor.dtype());
                return Err(candle_core::Error::UnexpectedDType { msg: spec.name, expected, got }.into());
            }
            parameters.push((spec.name, tensor));
        }
        let shared = match (&values.0, experts.as_ref().map(|pool| &pool.0)) {
            (Place::Cpu(values), None) => OnDevice::Cpu(Shared::new(config, values, None)?),
            (Place::Cpu(values), Some(Place::Cpu(u))) => OnDevice::Cpu(Shared::new(config, values, Some(u))?),
            #[cfg(feature = "cuda")]
            (Place::Cuda(values), None) => OnDevice::Cuda(Shared::new(config, values, None)?),
            #[cfg(feature = "cuda")]
            (Place::Cuda(values), Some(Place::Cuda(u))) => OnDevice::Cuda(Shared::new(config, values, Some(u))?),
            #[cfg(feature = "cuda")]
            _ => return Err(Error::Places),
        };
        Ok(Self { config, values, experts, parameters, shared })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The value rows.
    #[must_use]
    pub fn values(&self) -> &ValuePool {
        &self.values
    }

    /// PEER's `u`.
    #[must_use]
    pub fn experts(&self) -> Option<&ValuePool> {
        self.experts.as_ref()
    }

    /// The dense parameters by their published names.
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        self.parameters.iter().map(|(name, tensor)| (*name, tensor))
    }

    /// Runs the layer and tells which rows it read. The result carries no gradient.
    ///
    /// # Errors
    /// As `forward`.
    pub fn forward_explained(&self, x: &Tensor) -> Result<(Tensor, Reads), Error> {
        let mut reads = Reads::default();
        let out = self.run(&x.detach(), false, Some(&mut reads))?;
        Ok((out, reads))
    }

    /// Runs the layer without keeping anything for a backward. The result carries no gradient.
    ///
    /// # Errors
    /// As `forward`.
    pub fn infer(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(self.run(&x.detach(), false, None)?)
    }

    fn run(&self, x: &Tensor, keep: bool, reads: Option<&mut Reads>) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let flat: Vec<Tensor> =
            self.parameters.iter().map(|(_, t)| t.flatten_all()).collect::<candle_core::Result<_>>()?;
        let (x, flat) = (x.contiguous()?, Tensor::cat(&flat, 0)?.contiguous()?);
        let out = match &self.shared {
            OnDevice::Cpu(shared) => shared.run(&x, &flat, keep, reads)?,
            #[cfg(feature = "cuda")]
            OnDevice::Cuda(shared) => shared.run(&x, &flat, keep, reads)?,
        };
        if let Some(last) = dims.last_mut() {
            *last = self.config.output_dim();
        }
        out.reshape(dims)
    }
}

impl Module for MemoryLayer {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.run(x, true, None)
    }
}
