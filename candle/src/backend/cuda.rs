//! An NVIDIA GPU: views are of device memory, candle's own where it is a tensor's.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Result as CandleResult};
use memlayer_core::Item;
use memlayer_cuda::{Buffer, Cuda, TrainRows, View, ViewMut};

use super::Backend;
use crate::error::Error;

impl Backend for Cuda {
    type Buffer<T: Item> = Buffer<T>;
    type Large = Buffer<f32>;
    type Train<'a> = TrainRows<'a, f32>;

    fn buffer<T: Item>(&self, len: usize) -> Result<Buffer<T>, Error> {
        Ok(self.zeros(len)?)
    }
    fn view<T: Item>(buffer: &Buffer<T>) -> View<'_, T> {
        buffer.view()
    }
    fn view_mut<T: Item>(buffer: &mut Buffer<T>) -> ViewMut<'_, T> {
        buffer.view_mut()
    }
    fn large(&self, len: usize) -> Result<Buffer<f32>, Error> {
        Ok(self.zeros(len)?)
    }
    fn large_view(memory: &Buffer<f32>) -> View<'_, f32> {
        memory.view()
    }
    fn large_view_mut(memory: &mut Buffer<f32>) -> ViewMut<'_, f32> {
        memory.view_mut()
    }
    fn train<'a>(
        rows: Self::ViewMut<'a, f32>,
        dim: usize,
        state: Self::ViewMut<'a, f32>,
        state_len: usize,
    ) -> Option<Self::Train<'a>> {
        TrainRows::new(rows, dim, state, state_len)
    }
    fn write(&self, from: &[f32], to: ViewMut<'_, f32>) -> Result<(), Error> {
        Ok(Self::write(self, from, to)?)
    }
    fn host<'a, T: Item>(&self, view: Self::View<'a, T>) -> Result<Cow<'a, [T]>, Error> {
        let mut items = vec![T::default(); view.len()];
        self.read(view, &mut items)?;
        Ok(Cow::Owned(items))
    }
}

/// The values of a contiguous `f32` tensor, where they are.
pub(crate) fn view<'a>(cuda: &Cuda, storage: &'a CudaStorage, layout: &Layout) -> CandleResult<View<'a, f32>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        candle_core::bail!("memory-layer: tensors must be contiguous");
    };
    let all = cuda.borrow(storage.as_cuda_slice::<f32>()?).map_err(Error::from)?;
    Ok(all.slice(start..end))
}

/// A tensor's storage of `len` values, which `fill` overwrites.
pub(crate) fn storage(
    cuda: &Cuda,
    like: &CudaStorage,
    len: usize,
    fill: impl FnOnce(ViewMut<'_, f32>) -> Result<(), Error>,
) -> CandleResult<CudaStorage> {
    let device = like.device().clone();
    let mut slice = device.alloc_zeros::<f32>(len)?;
    fill(cuda.borrow_mut(&mut slice).map_err(Error::from)?)?;
    Ok(CudaStorage::wrap_cuda_slice(slice, device))
}
