//! The CPU: views are slices.

use std::borrow::Cow;

use memlayer_core::error::check_len;
use memlayer_core::{Item, TrainRows};
use memlayer_cpu::{Cpu, TableMemory};

use super::Backend;
use crate::error::Error;

impl Backend for Cpu {
    type Buffer<T: Item> = Vec<T>;
    type Large = TableMemory<f32>;
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
    fn large(&self, len: usize) -> Result<Self::Large, Error> {
        TableMemory::zeroed(len).map_err(|source| Error::Memory { values: len, source })
    }
    fn large_view(memory: &Self::Large) -> &[f32] {
        memory
    }
    fn large_view_mut(memory: &mut Self::Large) -> &mut [f32] {
        memory
    }
    fn train<'a>(
        rows: Self::ViewMut<'a, f32>,
        dim: usize,
        state: Self::ViewMut<'a, f32>,
        state_len: usize,
    ) -> Option<Self::Train<'a>> {
        TrainRows::new(rows, dim, state, state_len)
    }
    fn write(&self, from: &[f32], to: &mut [f32]) -> Result<(), Error> {
        check_len("write", "to", from.len(), to.len())?;
        to.copy_from_slice(from);
        Ok(())
    }
    fn host<'a, T: Item>(&self, view: Self::View<'a, T>) -> Result<Cow<'a, [T]>, Error> {
        Ok(Cow::Borrowed(view))
    }
}
