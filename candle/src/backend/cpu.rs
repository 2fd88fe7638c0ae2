//! The CPU: views are slices.

use std::borrow::Cow;

use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::{DenseRows, Item, TrainRows};
use memlayer_cpu::{Cpu, TableMemory};

use super::{Backend, Part, Sizes, TOO_LARGE, Whole};
use crate::error::Error;

impl Backend for Cpu {
    type Buffer<T: Item> = Vec<T>;
    type Store = Whole<TableMemory<f32>>;
    type Values<'a> = DenseRows<'a, f32>;
    type Train<'a> = TrainRows<'a, f32, f32>;

    fn buffer<T: Item>(&self, len: usize) -> Result<Vec<T>, Error> {
        Ok(vec![T::default(); len])
    }
    fn view<T: Item>(buffer: &Vec<T>) -> &[T] {
        buffer
    }
    fn view_mut<T: Item>(buffer: &mut Vec<T>) -> &mut [T] {
        buffer
    }
    fn store(&self, sizes: Sizes, cache_rows: Option<usize>) -> Result<Self::Store, Error> {
        match cache_rows {
            Some(cache_rows) => Err(Error::NoCache { cache_rows }),
            None => Whole::new(sizes, |values| {
                TableMemory::zeroed(values).map_err(|source| Error::Memory { values, source })
            }),
        }
    }
    fn values(store: &Self::Store) -> Self::Values<'_> {
        DenseRows::new(&store.rows, store.sizes.dim)
    }
    fn train<'a>(&self, store: &'a mut Self::Store, _: &mut PlanBuffers<'_, Self>) -> Result<Self::Train<'a>, Error> {
        let Sizes { dim, state_len, .. } = store.sizes;
        Ok(TrainRows::new(&mut store.rows, dim, &mut store.state, state_len).ok_or(TOO_LARGE)?)
    }
    fn overwrite(&self, store: &mut Self::Store, part: Part, at: usize, values: &[f32]) -> Result<(), Error> {
        store.part_mut(part)[at..][..values.len()].copy_from_slice(values);
        Ok(())
    }
    fn look<R>(&self, store: &Self::Store, look: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error> {
        Ok(look(&store.rows, &store.state))
    }
    fn host<'a, T: Item>(&self, view: Self::View<'a, T>) -> Result<Cow<'a, [T]>, Error> {
        Ok(Cow::Borrowed(view))
    }
}
