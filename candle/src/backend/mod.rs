//! What computes for a layer and where its memory is: the CPU, or an NVIDIA GPU.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::borrow::Cow;

use memlayer_core::ops::optim::{Adagrad, Adam, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd};
use memlayer_core::ops::{Dense, EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{Device, Item, Scratch, ScratchReq, Table};

use crate::error::Error;

#[cfg(feature = "cuda")]
pub(crate) use cuda::{storage, view};

/// A device that layers and pools run on, and the memory it lends them.
pub(crate) trait Backend:
    Device<Scalar = f32, Error: Into<Error>>
    + Dense
    + RowReduce
    + for<'x> SelectRows<<Self as Device>::Rows<'x>>
    + for<'x> EmbeddingBag<<Self as Device>::Rows<'x>>
    + for<'x> RowUpdate<<Self as Backend>::Train<'x>, Sgd>
    + for<'x> RowUpdate<<Self as Backend>::Train<'x>, Adagrad>
    + for<'x> RowUpdate<<Self as Backend>::Train<'x>, RowwiseAdagrad>
    + for<'x> RowUpdate<<Self as Backend>::Train<'x>, Adam>
    + for<'x> RowUpdate<<Self as Backend>::Train<'x>, RowwiseAdam>
    + Send
    + Sync
    + 'static
{
    /// Owned memory.
    type Buffer<T: Item>: Send + Sync;
    /// Owned memory for rows and their state, which are read far apart.
    type Large: Send + Sync;
    /// Rows in training.
    type Train<'a>: Table<Elem = f32>;

    /// `len` items of zero.
    fn buffer<T: Item>(&self, len: usize) -> Result<Self::Buffer<T>, Error>;
    /// All of a buffer.
    fn view<T: Item>(buffer: &Self::Buffer<T>) -> Self::View<'_, T>;
    /// All of a buffer.
    fn view_mut<T: Item>(buffer: &mut Self::Buffer<T>) -> Self::ViewMut<'_, T>;
    /// `len` values of zero.
    fn large(&self, len: usize) -> Result<Self::Large, Error>;
    /// All of it.
    fn large_view(memory: &Self::Large) -> Self::View<'_, f32>;
    /// All of it.
    fn large_view_mut(memory: &mut Self::Large) -> Self::ViewMut<'_, f32>;
    /// Rows of `dim` values with `state_len` scalars of state each; `None` if they are not as many.
    fn train<'a>(
        rows: Self::ViewMut<'a, f32>,
        dim: usize,
        state: Self::ViewMut<'a, f32>,
        state_len: usize,
    ) -> Option<Self::Train<'a>>;
    /// Overwrites `to` with as many values of the host.
    fn write(&self, from: &[f32], to: Self::ViewMut<'_, f32>) -> Result<(), Error>;
    /// The items of a view on the host: where they are, if they are there already.
    fn host<'a, T: Item>(&self, view: Self::View<'a, T>) -> Result<Cow<'a, [T]>, Error>;
}

/// Items in a buffer.
pub(crate) fn len<B: Backend, T: Item>(buffer: &B::Buffer<T>) -> usize {
    B::len(B::view(buffer))
}

/// Makes a buffer long enough. What was in it may be lost; a buffer that is long enough stays as it is.
pub(crate) fn grow<B: Backend, T: Item>(backend: &B, buffer: &mut B::Buffer<T>, least: usize) -> Result<(), Error> {
    if len::<B, T>(buffer) < least {
        *buffer = backend.buffer(least)?;
    }
    Ok(())
}

/// Memory for a [`Scratch`] that grows to what was asked for and stays.
pub(crate) struct Memory<B: Backend> {
    reals: B::Buffer<f32>,
    ids: B::Buffer<u32>,
}

impl<B: Backend> Memory<B> {
    pub(crate) fn new(backend: &B) -> Result<Self, Error> {
        Ok(Self { reals: backend.buffer(0)?, ids: backend.buffer(0)? })
    }

    pub(crate) fn lend(&mut self, backend: &B, req: ScratchReq) -> Result<Scratch<'_, B>, Error> {
        grow::<B, f32>(backend, &mut self.reals, req.reals)?;
        grow::<B, u32>(backend, &mut self.ids, req.ids)?;
        let (reals, _) = B::split(B::view_mut(&mut self.reals), req.reals);
        let (ids, _) = B::split(B::view_mut(&mut self.ids), req.ids);
        Ok(Scratch { reals, ids })
    }
}

/// Items that are added behind each other.
pub(crate) struct List<B: Backend, T: Item> {
    buffer: B::Buffer<T>,
    len: usize,
}

impl<B: Backend, T: Item> List<B, T> {
    pub(crate) fn new(backend: &B) -> Result<Self, Error> {
        Ok(Self { buffer: backend.buffer(0)?, len: 0 })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn view(&self) -> B::View<'_, T> {
        B::slice(B::view(&self.buffer), 0..self.len)
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn push(&mut self, backend: &B, items: B::View<'_, T>) -> Result<(), Error> {
        let len = self.len + B::len(items);
        if len > self::len::<B, T>(&self.buffer) {
            let mut longer = backend.buffer(len.max(2 * self.len))?;
            let (head, _) = B::split(B::view_mut(&mut longer), self.len);
            backend.copy(self.view(), head).map_err(Into::into)?;
            self.buffer = longer;
        }
        let (_, tail) = B::split(B::view_mut(&mut self.buffer), self.len);
        let (place, _) = B::split(tail, B::len(items));
        backend.copy(items, place).map_err(Into::into)?;
        self.len = len;
        Ok(())
    }
}
