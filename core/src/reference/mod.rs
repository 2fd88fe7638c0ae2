//! Every operation as plain loops, forward and backward side by side.
//!
//! It is the oracle of every other backend (in `f64`), the subject of finite differences, and the smallest backend
//! there is. It says what the numbers are and may never be made fast.

mod bag;
mod dense;
mod optim;
mod plan;
mod select;

use core::marker::PhantomData;

use crate::device::Host;
use crate::element::Real;

/// The reference backend, in scalars of type `F`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference<F>(PhantomData<F>);

impl<F: Real> Reference<F> {
    /// The reference backend. It has no state.
    #[must_use]
    pub const fn new() -> Self {
        Self(PhantomData)
    }
}

/// `items` in rows of `width`; no rows of nothing.
fn rows<T>(items: &[T], width: usize) -> core::slice::ChunksExact<'_, T> {
    items.chunks_exact(width.max(1))
}

/// As [`rows`], to be written.
fn rows_mut<T>(items: &mut [T], width: usize) -> core::slice::ChunksExactMut<'_, T> {
    items.chunks_exact_mut(width.max(1))
}

impl<F: Real> Host for Reference<F> {
    type Scalar = F;
    fn name(&self) -> &str {
        match F::FORMAT {
            crate::element::Format::F64 => "reference f64",
            _ => "reference f32",
        }
    }
}
