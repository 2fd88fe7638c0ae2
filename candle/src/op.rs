//! The layer as one operation of candle's graph: its way forward, and the way back that belongs to it.

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Storage, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, op::BackpropOp};
use memlayer_core::layer::{self, Activations, Grads};
use memlayer_core::{ArgError, Config, Scratch};
use memlayer_cpu::Cpu;
#[cfg(feature = "cuda")]
use memlayer_cuda::Cuda;

use crate::backend::{Backend, Memory, grow};
use crate::error::Error;
use crate::layer::Reads;
use crate::params;
use crate::pool::Pool;

/// What an operation in a graph shares with its layer.
pub(crate) struct Shared<B: Backend> {
    config: Config,
    values: Arc<Pool<B>>,
    experts: Option<Arc<Pool<B>>>,
    scratch: Mutex<Memory<B>>,
    /// Activations of forwards whose backward is done, to be used again.
    spare: Mutex<Vec<Kept<B>>>,
}

/// The memory of a forward's activations.
struct Kept<B: Backend> {
    reals: B::Buffer<f32>,
    ids: B::Buffer<u32>,
    tokens: usize,
    steps: u64,
}

/// One forward of a layer in a graph.
pub(crate) struct LayerOp<B: Backend> {
    shared: Arc<Shared<B>>,
    kept: Mutex<Option<Kept<B>>>,
}

/// Where a backward writes: the gradients of the input and of the flat parameters.
struct Written<'a, B: Backend> {
    input: B::ViewMut<'a, f32>,
    flat: B::ViewMut<'a, f32>,
}

impl<B: Backend> Shared<B> {
    pub(crate) fn new(
        config: Config,
        values: &Arc<Pool<B>>,
        experts: Option<&Arc<Pool<B>>>,
    ) -> Result<Arc<Self>, Error> {
        let scratch = Mutex::new(Memory::new(&*values.backend)?);
        let (values, experts) = (Arc::clone(values), experts.map(Arc::clone));
        Ok(Arc::new(Self { config, values, experts, scratch, spare: Mutex::default() }))
    }

    /// Runs the layer over `x` (`[.., D]`) with the parameters `flat`; `[T, O]`. With `keep` for a backward. `reads` is
    /// overwritten.
    pub(crate) fn run(
        self: &Arc<Self>,
        x: &Tensor,
        flat: &Tensor,
        keep: bool,
        reads: Option<&mut Reads>,
    ) -> candle_core::Result<Tensor>
    where
        LayerOp<B>: CustomOp2,
    {
        let op = LayerOp { shared: Arc::clone(self), kept: Mutex::default() };
        if keep {
            return x.apply_op2(flat, op);
        }
        let out = x.apply_op2_no_bwd(flat, &op)?;
        if let Some(mut kept) = lock(&op.kept).take() {
            if let Some(reads) = reads {
                let (backend, tokens) = (&*self.values.backend, kept.tokens);
                let act = Activations::<B>::new(&self.config, tokens, kept.lend()).map_err(Error::from)?;
                let (ids, weights) = (backend.host(B::read(&act.ids))?, backend.host(B::read(&act.weights))?);
                *reads = Reads { bag: self.config.bag_len(), ids: ids.to_vec(), weights: weights.to_vec() };
            }
            lock(&self.spare).push(kept);
        }
        Ok(out)
    }

    /// The number of tokens in `len` values of input.
    fn tokens(&self, found: usize) -> Result<usize, Error> {
        let multiple_of = self.config.input_dim();
        if found.is_multiple_of(multiple_of) {
            return Ok(found / multiple_of);
        }
        Err(ArgError::Size { op: "memory-layer", operand: "x", found, multiple_of }.into())
    }

    /// Memory for the activations of a forward.
    fn activations(&self, tokens: usize, steps: u64) -> Result<Kept<B>, Error> {
        let backend = &*self.values.backend;
        let mut kept = match lock(&self.spare).pop() {
            Some(kept) => kept,
            None => Kept { reals: backend.buffer(0)?, ids: backend.buffer(0)?, tokens, steps },
        };
        let req = self.config.activations_req(tokens);
        grow::<B, f32>(backend, &mut kept.reals, req.reals)?;
        grow::<B, u32>(backend, &mut kept.ids, req.ids)?;
        (kept.tokens, kept.steps) = (tokens, steps);
        Ok(kept)
    }
}

impl<B: Backend> LayerOp<B> {
    /// From `x` (`[T, D]`) and the flat parameters to `out` (`[T, O]`, overwritten).
    fn forward(&self, x: B::View<'_, f32>, flat: B::View<'_, f32>, out: B::ViewMut<'_, f32>) -> Result<(), Error> {
        let shared = &*self.shared;
        let (config, backend) = (&shared.config, &*shared.values.backend);
        let tokens = shared.tokens(B::len(x))?;
        let table = shared.values.table();
        let experts_table = shared.experts.as_ref().map(|pool| pool.table());
        let values = table.values();
        let experts = experts_table.as_ref().map(|table| table.values());
        let params = params::trained::<B, _>(config, B::shorten(flat), &values, experts.as_ref());
        let mut kept = shared.activations(tokens, table.steps)?;
        let mut act = Activations::new(config, tokens, kept.lend())?;
        let mut scratch = lock(&shared.scratch);
        let req = layer::forward_scratch::<B::Values<'_>, B::Rows<'_>, B>(backend, config, tokens);
        let scratch = scratch.lend(backend, req)?;
        layer::forward(backend, config, &params, x, &mut act, out, scratch).map_err(Into::into)?;
        drop(act);
        *lock(&self.kept) = Some(kept);
        Ok(())
    }

    /// The gradients of the input and of the flat parameters; those of the rows go to their pools.
    fn backward(
        &self,
        x: B::View<'_, f32>,
        flat: B::View<'_, f32>,
        dout: B::View<'_, f32>,
        mut out: Written<'_, B>,
    ) -> Result<(), Error> {
        let shared = &*self.shared;
        let (config, backend) = (&shared.config, &*shared.values.backend);
        let mut kept = lock(&self.kept).take().ok_or(Error::NoForward)?;
        let (tokens, bag) = (kept.tokens, config.bag_len());
        let table = shared.values.table();
        if table.steps != kept.steps {
            return Err(Error::Stale);
        }
        let experts_table = shared.experts.as_ref().map(|pool| pool.table());
        let values = table.values();
        let experts = experts_table.as_ref().map(|table| table.values());
        let params = params::trained::<B, _>(config, B::shorten(flat), &values, experts.as_ref());

        let mut act = Activations::new(config, tokens, kept.lend())?;
        let mut sums = backend.buffer::<f32>(tokens * config.value_dim())?;
        let mut dots = backend.buffer::<f32>(if experts.is_some() { tokens * bag } else { 0 })?;
        let mut grads = Grads::<B>::new(B::view_mut(&mut sums));
        grads.input = Some(B::reborrow(&mut out.input));
        grads.dots = experts.is_some().then(|| B::view_mut(&mut dots));
        params::grads(config, B::reborrow(&mut out.flat), &mut grads);
        let mut scratch = lock(&shared.scratch);
        let req = layer::backward_scratch::<B::Values<'_>, B::Rows<'_>, B>(backend, config, tokens);
        let scratch = scratch.lend(backend, req)?;
        layer::backward(backend, config, &params, x, &mut act, dout, grads, scratch).map_err(Into::into)?;

        shared.values.push(bag, B::read(&act.ids), act.coefficients(), B::view(&sums))?;
        if let Some(pool) = &shared.experts {
            pool.push(bag, B::read(&act.ids), B::view(&dots), x)?;
        }
        drop(act);
        lock(&shared.spare).push(kept);
        Ok(())
    }
}

impl<B: Backend> Kept<B> {
    fn lend(&mut self) -> Scratch<'_, B> {
        Scratch { reals: B::view_mut(&mut self.reals), ids: B::view_mut(&mut self.ids) }
    }
}

impl<B: Backend> fmt::Debug for Shared<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a layer over {:?}", self.values)
    }
}

const NAME: &str = "memory-layer";

impl CustomOp2 for LayerOp<Cpu> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        flat: &CpuStorage,
        flat_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, flat) = (slice(x, x_layout)?, slice(flat, flat_layout)?);
        let shape = (self.shared.tokens(x.len())?, self.shared.config.output_dim());
        let mut out = vec![0.0; shape.0 * shape.1];
        self.forward(x, flat, &mut out)?;
        Ok((CpuStorage::F32(out), Shape::from(shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        let (mut dx, mut dflat) = (vec![0.0; x.elem_count()], vec![0.0; flat.elem_count()]);
        let guards = [x, flat, &dout].map(Tensor::storage_and_layout);
        let [x_values, flat_values, dout_values] = [0, 1, 2].map(|i| match &*guards[i].0 {
            Storage::Cpu(storage) => slice(storage, guards[i].1),
            _ => candle_core::bail!("{NAME}: tensors must be on the CPU"),
        });
        let written = Written { input: &mut dx[..], flat: &mut dflat[..] };
        self.backward(x_values?, flat_values?, dout_values?, written)?;
        let dx = Tensor::from_vec(dx, x.shape(), x.device())?;
        Ok((Some(dx), Some(Tensor::from_vec(dflat, flat.shape(), flat.device())?)))
    }
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        (CpuStorage::F32(_), None) => candle_core::bail!("{NAME}: tensors must be contiguous"),
        _ => candle_core::bail!("{NAME}: tensors must be f32"),
    }
}

#[cfg(feature = "cuda")]
impl CustomOp2 for LayerOp<Cuda> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("{NAME}: the pool is on a GPU, and the tensors are on the CPU")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        flat: &CudaStorage,
        flat_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        use crate::backend::{storage, view};
        let cuda = &*self.shared.values.backend;
        let (input, flat) = (view(cuda, x, x_layout)?, view(cuda, flat, flat_layout)?);
        let shape = (self.shared.tokens(input.len())?, self.shared.config.output_dim());
        let out = storage(cuda, x, shape.0 * shape.1, |out| self.forward(input, flat, out))?;
        Ok((out, Shape::from(shape)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        flat: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        use crate::backend::{storage, view};
        let cuda = &*self.shared.values.backend;
        let dout = dout.contiguous()?;
        let guards = [x, flat, &dout].map(Tensor::storage_and_layout);
        let on_gpu = |i: usize| match &*guards[i].0 {
            Storage::Cuda(storage) => Ok(storage),
            _ => candle_core::bail!("{NAME}: tensors must be on the pool's GPU"),
        };
        let [x_values, flat_values, dout_values] = [0, 1, 2].map(|i| view(cuda, on_gpu(i)?, guards[i].1));
        let (x_values, flat_values, dout_values) = (x_values?, flat_values?, dout_values?);
        let like = on_gpu(0)?;
        let mut dflat = None;
        let dx = storage(cuda, like, x.elem_count(), |input| {
            let made = storage(cuda, like, flat.elem_count(), |flat| {
                self.backward(x_values, flat_values, dout_values, Written { input, flat })
            });
            dflat = Some(made?);
            Ok(())
        })?;
        let tensor =
            |made, shape: &Shape| Tensor::from_storage(Storage::Cuda(made), shape.clone(), BackpropOp::none(), false);
        Ok((Some(tensor(dx, x.shape())), dflat.map(|made| tensor(made, flat.shape()))))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panic elsewhere left behind is plain numbers, written anew by the next forward.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
