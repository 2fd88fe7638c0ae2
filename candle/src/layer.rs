//! A memory layer as a candle module.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Module, Shape, Storage, Tensor};
use candle_nn::VarBuilder;
use memlayer_core::config::Kind;
use memlayer_core::layer::{self, Activations, Grads};
use memlayer_core::{Config, DenseRows, Scratch};
use memlayer_cpu::Cpu;

use crate::error::Error;
use crate::params::{self, LayerInit};
use crate::pool::{Memory, ValuePool};

/// A memory layer: `[.., D]` in, `[.., O]` out, differentiable in its input and in all its dense parameters.
///
/// The dense parameters are variables of the [`VarBuilder`] by the published names (`query_proj.query_mlps.0.weight`,
/// `keys`, `value_proj.weight` and so on), `f32`, on the CPU. The rows are in a [`ValuePool`], which other layers may
/// share: `backward` leaves their gradients there, and [`ValuePool::step`] applies them.
#[derive(Clone, Debug)]
pub struct MemoryLayer {
    shared: Arc<Shared>,
    parameters: Vec<(&'static str, Tensor)>,
}

/// What an operation in a graph shares with its layer.
#[derive(Debug)]
struct Shared {
    config: Config,
    values: ValuePool,
    experts: Option<ValuePool>,
    scratch: Mutex<Memory>,
    /// Activations of forwards whose backward is done, to be used again.
    spare: Mutex<Vec<Kept>>,
    reads: Mutex<Option<Reads>>,
}

/// The memory of a forward's activations.
#[derive(Debug, Default)]
struct Kept {
    reals: Vec<f32>,
    ids: Vec<u32>,
    tokens: usize,
    steps: u64,
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
    /// not `f32` on the CPU; [`Error::Argument`] for a PEER configuration, which wants [`MemoryLayer::peer`].
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
    /// As [`MemoryLayer::new`], but for the other kind of configuration.
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
        let shared = Shared {
            config,
            values,
            experts,
            scratch: Mutex::default(),
            spare: Mutex::default(),
            reads: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), parameters })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// The value rows.
    #[must_use]
    pub fn values(&self) -> &ValuePool {
        &self.shared.values
    }

    /// PEER's `u`.
    #[must_use]
    pub fn experts(&self) -> Option<&ValuePool> {
        self.shared.experts.as_ref()
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
        *lock(&self.shared.reads) = Some(Reads::default());
        let out = self.run(&x.detach(), false);
        let reads = lock(&self.shared.reads).take().unwrap_or_default();
        Ok((out?, reads))
    }

    /// Runs the layer without keeping anything for a backward. The result carries no gradient.
    ///
    /// # Errors
    /// As `forward`.
    pub fn infer(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(self.run(&x.detach(), false)?)
    }

    fn run(&self, x: &Tensor, keep: bool) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        let flat: Vec<Tensor> =
            self.parameters.iter().map(|(_, t)| t.flatten_all()).collect::<candle_core::Result<_>>()?;
        let flat = Tensor::cat(&flat, 0)?;
        let op = LayerOp { shared: Arc::clone(&self.shared), kept: Mutex::default(), keep };
        let (x, flat) = (x.contiguous()?, flat.contiguous()?);
        let out = if keep { x.apply_op2(&flat, op)? } else { x.apply_op2_no_bwd(&flat, &op)? };
        if let Some(last) = dims.last_mut() {
            *last = self.shared.config.output_dim();
        }
        out.reshape(dims)
    }
}

impl Module for MemoryLayer {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.run(x, true)
    }
}

/// One forward of a layer in a graph, and the backward that belongs to it.
struct LayerOp {
    shared: Arc<Shared>,
    kept: Mutex<Option<Kept>>,
    keep: bool,
}

impl LayerOp {
    fn forward(&self, x: &[f32], flat: &[f32]) -> Result<(Vec<f32>, usize), Error> {
        let shared = &*self.shared;
        let (config, cpu) = (&shared.config, &**shared.values.cpu());
        let tokens = tokens_of(config, x)?;
        let table = shared.values.table();
        let experts_table = shared.experts.as_ref().map(ValuePool::table);
        let values = table.view(config.value_dim());
        let experts = experts_table.as_ref().map(|t| t.view(config.input_dim()));
        let params = params::trained(config, flat, &values, experts.as_ref());

        let mut kept = lock(&shared.spare).pop().unwrap_or_default();
        let req = config.activations_req(tokens);
        kept.reals.resize(req.reals, 0.0);
        kept.ids.resize(req.ids, 0);
        (kept.tokens, kept.steps) = (tokens, table.steps);
        let mut act = Activations::new(config, tokens, kept.lend())?;
        let mut out = vec![0.0; tokens * config.output_dim()];
        let mut scratch = lock(&shared.scratch);
        let req = layer::forward_scratch::<DenseRows<'_, f32>, DenseRows<'_, f32>, Cpu>(cpu, config, tokens);
        layer::forward(cpu, config, &params, x, &mut act, &mut out, scratch.lend(req))?;
        if let Some(reads) = &mut *lock(&shared.reads) {
            *reads = Reads { bag: config.bag_len(), ids: act.ids.to_vec(), weights: act.weights.to_vec() };
        }
        if self.keep {
            *lock(&self.kept) = Some(kept);
        } else {
            lock(&shared.spare).push(kept);
        }
        Ok((out, tokens))
    }

    /// The gradients of the input and of the flat parameters; those of the rows go to their pools.
    fn backward(&self, x: &[f32], flat: &[f32], dout: &[f32]) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let shared = &*self.shared;
        let (config, cpu) = (&shared.config, &**shared.values.cpu());
        let mut kept = lock(&self.kept).take().ok_or(Error::NoForward)?;
        let (tokens, bag) = (kept.tokens, config.bag_len());
        let table = shared.values.table();
        if table.steps != kept.steps {
            return Err(Error::Stale);
        }
        let experts_table = shared.experts.as_ref().map(ValuePool::table);
        let values = table.view(config.value_dim());
        let experts = experts_table.as_ref().map(|t| t.view(config.input_dim()));
        let params = params::trained(config, flat, &values, experts.as_ref());

        let mut act = Activations::new(config, tokens, kept.lend())?;
        let (mut dx, mut dflat) = (vec![0.0; x.len()], vec![0.0; flat.len()]);
        let mut sums = vec![0.0; tokens * config.value_dim()];
        let mut dots = vec![0.0; if experts.is_some() { tokens * bag } else { 0 }];
        let mut grads = Grads::new(&mut sums[..]);
        grads.input = Some(&mut dx[..]);
        grads.dots = experts.is_some().then_some(&mut dots[..]);
        params::grads(config, &mut dflat, &mut grads);
        let mut scratch = lock(&shared.scratch);
        let req = layer::backward_scratch::<DenseRows<'_, f32>, DenseRows<'_, f32>, Cpu>(cpu, config, tokens);
        layer::backward(cpu, config, &params, x, &mut act, dout, grads, scratch.lend(req))?;

        shared.values.push(bag, act.ids, act.coefficients(), &sums)?;
        if let Some(pool) = &shared.experts {
            pool.push(bag, act.ids, &dots, x)?;
        }
        lock(&shared.spare).push(kept);
        Ok((dx, dflat))
    }
}

impl Kept {
    fn lend(&mut self) -> Scratch<'_, Cpu> {
        Scratch { reals: &mut self.reals, ids: &mut self.ids }
    }
}

impl CustomOp2 for LayerOp {
    fn name(&self) -> &'static str {
        "memory-layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        flat: &CpuStorage,
        flat_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (out, tokens) = self.forward(slice(x, x_layout)?, slice(flat, flat_layout)?)?;
        Ok((CpuStorage::F32(out), Shape::from((tokens, self.shared.config.output_dim()))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        let ((x_storage, x_layout), (flat_storage, flat_layout)) = (x.storage_and_layout(), flat.storage_and_layout());
        let (dout_storage, dout_layout) = dout.storage_and_layout();
        let (dx, dflat) = self.backward(
            slice(cpu(&x_storage)?, x_layout)?,
            slice(cpu(&flat_storage)?, flat_layout)?,
            slice(cpu(&dout_storage)?, dout_layout)?,
        )?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dflat, flat.shape(), flat.device())?)))
    }
}

fn tokens_of(config: &Config, x: &[f32]) -> Result<usize, Error> {
    let (found, multiple_of) = (x.len(), config.input_dim());
    if found.is_multiple_of(multiple_of) {
        return Ok(found / multiple_of);
    }
    Err(memlayer_core::ArgError::Size { op: "memory-layer", operand: "x", found, multiple_of }.into())
}

fn cpu(storage: &Storage) -> candle_core::Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("memory-layer: tensors must be on the CPU"),
    }
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        (CpuStorage::F32(_), None) => candle_core::bail!("memory-layer: tensors must be contiguous"),
        _ => candle_core::bail!("memory-layer: tensors must be f32"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What a panic elsewhere left behind is plain numbers, written anew by the next forward.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
