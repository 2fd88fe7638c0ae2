//! An NVIDIA GPU: views are of device memory, candle's own where it is a tensor's.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Layout, Result as CandleResult};
use memlayer_core::Item;
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_cuda::{Buffer, Cuda, Rows, TrainRows, View, ViewMut};

use super::cached::{Cached, Values};
use super::{Backend, Part, Sizes, TOO_LARGE, Whole};
use crate::error::Error;

/// A pool's rows and their state.
pub(crate) enum Store {
    /// On the device.
    Device(Whole<Buffer<f32>>),
    /// On the host.
    Cached(Box<Cached>),
}

impl Backend for Cuda {
    type Buffer<T: Item> = Buffer<T>;
    type Store = Store;
    type Values<'a> = Values<'a>;
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
    fn store(&self, sizes: Sizes, cache_rows: Option<usize>) -> Result<Store, Error> {
        Ok(match cache_rows {
            Some(cache_rows) => Store::Cached(Box::new(Cached::new(self, sizes, cache_rows)?)),
            None => Store::Device(Whole::new(sizes, |len| self.zeros(len))?),
        })
    }
    fn values(store: &Store) -> Values<'_> {
        match store {
            Store::Device(table) => Values::Device(Rows::new(table.rows.view(), table.sizes.dim)),
            Store::Cached(table) => Values::Cached(table),
        }
    }
    fn train<'a>(&self, store: &'a mut Store, plan: &mut PlanBuffers<'_, Self>) -> Result<TrainRows<'a, f32>, Error> {
        match store {
            Store::Device(table) => {
                let Sizes { dim, state_len, .. } = table.sizes;
                let (rows, state) = (table.rows.view_mut(), table.state.view_mut());
                Ok(TrainRows::new(rows, dim, state, state_len).ok_or(TOO_LARGE)?)
            }
            Store::Cached(table) => Ok(table.train(self, plan)?),
        }
    }
    fn overwrite(&self, store: &mut Store, part: Part, at: usize, values: &[f32]) -> Result<(), Error> {
        match store {
            Store::Device(table) => {
                let (_, to) = table.part_mut(part).view_mut().split_at(at);
                let (to, _) = to.split_at(values.len());
                Ok(self.write(values, to)?)
            }
            Store::Cached(table) => Ok(table.on_host(self, |rows, state| {
                let to = if part == Part::Rows { rows } else { state };
                to[at..][..values.len()].copy_from_slice(values);
            })?),
        }
    }
    fn look<R>(&self, store: &Store, look: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error> {
        match store {
            Store::Device(table) => Ok(look(&self.host(table.rows.view())?, &self.host(table.state.view())?)),
            Store::Cached(table) => Ok(table.on_host(self, |rows, state| look(rows, state))?),
        }
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
