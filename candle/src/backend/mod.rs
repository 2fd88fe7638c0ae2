//! What computes for a layer and where its memory is: the CPU, or an NVIDIA GPU.

#[cfg(feature = "cuda")]
mod cached;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use std::borrow::Cow;

use memlayer_core::ops::optim::{Adagrad, Adam, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::ops::{Dense, EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{ConfigError, Device, Item, Scratch, ScratchReq, Table};

use crate::error::Error;

#[cfg(feature = "cuda")]
pub(crate) use cuda::{storage, view};

/// A device that layers and pools run on, and the memory it lends them.
pub(crate) trait Backend:
    Device<Scalar = f32, Error: Into<Error>>
    + Dense
    + RowReduce
    + for<'x> SelectRows<<Self as Device>::Rows<'x>>
    + for<'x> EmbeddingBag<<Self as Backend>::Values<'x>>
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
    /// Rows and their state, wherever they are kept.
    type Store: Send + Sync;
    /// The rows of a store as layers read them, by their ids.
    type Values<'a>: Table<Elem = f32>;
    /// Rows in training.
    type Train<'a>: Table<Elem = f32>;

    /// `len` items of zero.
    fn buffer<T: Item>(&self, len: usize) -> Result<Self::Buffer<T>, Error>;
    /// All of a buffer.
    fn view<T: Item>(buffer: &Self::Buffer<T>) -> Self::View<'_, T>;
    /// All of a buffer.
    fn view_mut<T: Item>(buffer: &mut Self::Buffer<T>) -> Self::ViewMut<'_, T>;
    /// A table of zeros. With `cache_rows` it is kept on the host, and so many of its rows on the device.
    fn store(&self, sizes: Sizes, cache_rows: Option<usize>) -> Result<Self::Store, Error>;
    /// The rows, to be read.
    fn values(store: &Self::Store) -> Self::Values<'_>;
    /// The rows of a plan, to be changed. From then on the plan says where in what is lent they are.
    fn train<'a>(&self, store: &'a mut Self::Store, plan: &mut PlanBuffers<'_, Self>)
    -> Result<Self::Train<'a>, Error>;
    /// Overwrites the values of a part from `at` on, which it has.
    fn overwrite(&self, store: &mut Self::Store, part: Part, at: usize, values: &[f32]) -> Result<(), Error>;
    /// Looks at rows and state: where they are, if that is on the host.
    fn look<R>(&self, store: &Self::Store, look: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error>;
    /// The items of a view on the host: where they are, if they are there already.
    fn host<'a, T: Item>(&self, view: Self::View<'a, T>) -> Result<Cow<'a, [T]>, Error>;
}

/// How large a table is. Neither its rows nor its state have more values than can be addressed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Rows.
    pub(crate) rows: usize,
    /// Values in a row.
    pub(crate) dim: usize,
    /// Scalars of state for a row.
    pub(crate) state_len: usize,
}

/// What is wrong with a table that cannot be addressed.
pub(crate) const TOO_LARGE: ConfigError = ConfigError::TooLarge { buffer: "the value table" };

/// A part of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// `[rows, dim]`.
    Rows,
    /// `[rows, state_len]`.
    State,
}

/// A store whose parts are each in one piece of a device's memory.
pub(crate) struct Whole<M> {
    sizes: Sizes,
    rows: M,
    state: M,
}

impl<M> Whole<M> {
    /// A store in what `zeros` makes of lengths.
    fn new<E>(sizes: Sizes, mut zeros: impl FnMut(usize) -> Result<M, E>) -> Result<Self, E> {
        let (rows, state) = (zeros(sizes.rows * sizes.dim)?, zeros(sizes.rows * sizes.state_len)?);
        Ok(Self { sizes, rows, state })
    }

    fn part_mut(&mut self, part: Part) -> &mut M {
        match part {
            Part::Rows => &mut self.rows,
            Part::State => &mut self.state,
        }
    }
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
