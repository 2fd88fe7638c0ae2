//! Buffers on the device, views of them, and views as tables.

use core::marker::PhantomData;
use core::ops::Range;

use memlayer_core::{Element, Item, Table, Trainable};

use crate::launch::Allocation;

/// Items on the device. Freed when dropped, behind the work that uses it.
pub struct Buffer<T> {
    memory: Allocation,
    len: usize,
    items: PhantomData<T>,
}

impl<T: Item> Buffer<T> {
    /// `memory` is as long as `len` items.
    pub(crate) const fn new(memory: Allocation, len: usize) -> Self {
        Self { memory, len, items: PhantomData }
    }
    /// Items.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The whole of it.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View::at(self.memory.pointer(), self.len)
    }
    /// The whole of it, to be written.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::at(self.memory.pointer(), self.len)
    }
}

impl<T> core::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} items on the device", self.len)
    }
}

/// Items on the device, lent.
///
/// A view belongs to the [`crate::Cuda`] its buffer was made with: work of another one is not ordered with it.
pub struct View<'a, T> {
    pointer: u64,
    len: usize,
    items: PhantomData<&'a [T]>,
}

impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for View<'_, T> {}

/// Items on the device, lent to be written.
pub struct ViewMut<'a, T> {
    pointer: u64,
    len: usize,
    items: PhantomData<&'a mut [T]>,
}

impl<T> View<'_, T> {
    /// Only where the memory is known to be there: see `launch`.
    pub(crate) const fn at(pointer: u64, len: usize) -> Self {
        Self { pointer, len, items: PhantomData }
    }
    /// The address on the device.
    #[must_use]
    pub const fn pointer(self) -> u64 {
        self.pointer
    }
    /// Items.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// A part.
    ///
    /// # Panics
    /// If the range does not lie in the view.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a view of {}", self.len);
        Self::at(self.pointer + (range.start * size_of::<T>()) as u64, range.end - range.start)
    }
}

impl<'a, T> ViewMut<'a, T> {
    /// Only where the memory is known to be there, and not lent twice: see `launch`.
    pub(crate) const fn at(pointer: u64, len: usize) -> Self {
        Self { pointer, len, items: PhantomData }
    }
    /// The address on the device.
    #[must_use]
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }
    /// Items.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }
    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Read, for as long as this is lent.
    #[must_use]
    pub const fn read(&self) -> View<'_, T> {
        View::at(self.pointer, self.len)
    }
    /// Lent for a shorter time.
    #[must_use]
    pub const fn reborrow(&mut self) -> ViewMut<'_, T> {
        ViewMut::at(self.pointer, self.len)
    }
    /// In two, the first of `mid` items.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn split_at(self, mid: usize) -> (ViewMut<'a, T>, ViewMut<'a, T>) {
        assert!(mid <= self.len, "{mid} of a view of {}", self.len);
        let tail = self.pointer + (mid * size_of::<T>()) as u64;
        (ViewMut::at(self.pointer, mid), ViewMut::at(tail, self.len - mid))
    }
}

/// Rows on the device: value `i` of a row is `scales[i / group] · code i`, or the code where there are no scales.
pub struct Rows<'a, E> {
    pub(crate) codes: View<'a, E>,
    pub(crate) scales: Option<View<'a, f32>>,
    pub(crate) dim: usize,
    pub(crate) group: usize,
    /// Codes from a row to the next.
    pub(crate) stride: usize,
}

impl<E> Clone for Rows<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Rows<'_, E> {}

impl<'a, E: Element> Rows<'a, E> {
    /// `codes` as rows of `dim` values; what is left over at the end belongs to no row.
    ///
    /// # Panics
    /// If `dim` is zero.
    #[must_use]
    pub fn new(codes: View<'a, E>, dim: usize) -> Self {
        assert!(dim > 0, "rows of no values");
        Self { codes, scales: None, dim, group: dim, stride: E::codes(dim) }
    }

    /// `codes` as rows of `dim` values, with one of `scales` for each `group` of them.
    ///
    /// Returns `None` if a size is zero or there are not as many scales as the rows need.
    #[must_use]
    pub fn scaled(codes: View<'a, E>, scales: View<'a, f32>, dim: usize, group: usize) -> Option<Self> {
        if dim == 0 || group == 0 || !codes.len().is_multiple_of(dim) {
            return None;
        }
        let needed = (codes.len() / dim).checked_mul(dim.div_ceil(group))?;
        (scales.len() == needed).then_some(Self { codes, scales: Some(scales), dim, group, stride: dim })
    }

    /// The same where a row begins `stride` codes behind the one before: what is between two rows is not read, and a last row
    /// has its `stride` codes too. Memory gives lines of 128 bytes, and rows that begin with one touch the fewest of them
    /// ([`crate::CudaBuilder::fetch`] says more). Sums and dots read such rows, selection does not, and none are trained.
    ///
    /// Returns `None` as [`Rows::scaled`], and if a row does not fit into its stride.
    #[must_use]
    pub fn padded(
        codes: View<'a, E>,
        scales: Option<View<'a, f32>>,
        dim: usize,
        group: usize,
        stride: usize,
    ) -> Option<Self> {
        if dim == 0 || group == 0 || stride < E::codes(dim) || !codes.len().is_multiple_of(stride) {
            return None;
        }
        let needed = (codes.len() / stride).checked_mul(dim.div_ceil(group))?;
        scales.is_none_or(|scales| scales.len() == needed).then_some(Self { codes, scales, dim, group, stride })
    }

    /// Address and stride in one: a multiple of a power of two if all rows begin at one.
    pub(crate) fn beginnings(&self) -> u64 {
        self.codes.pointer() | (self.stride * size_of::<E>()) as u64
    }
}

impl<E: Element> Table for Rows<'_, E> {
    type Elem = E;
    fn rows(&self) -> usize {
        self.codes.len() / self.stride
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

/// Rows on the device that training changes, each with the state its row rule keeps.
pub struct TrainRows<'a, E> {
    pub(crate) codes: ViewMut<'a, E>,
    pub(crate) state: ViewMut<'a, f32>,
    pub(crate) dim: usize,
    pub(crate) state_len: usize,
    /// The ids that rows of a cache have in their table.
    pub(crate) names: Option<View<'a, u32>>,
}

impl<'a, E: Trainable> TrainRows<'a, E> {
    /// `codes` as rows of `dim` values, each with `state_len` scalars of `state`.
    ///
    /// Returns `None` if `dim` is zero, a row is cut off, or the states are not as many as the rows.
    #[must_use]
    pub fn new(codes: ViewMut<'a, E>, dim: usize, state: ViewMut<'a, f32>, state_len: usize) -> Option<Self> {
        if dim == 0 || !codes.len().is_multiple_of(dim) {
            return None;
        }
        let rows = codes.len() / dim;
        (rows.checked_mul(state_len)? == state.len()).then_some(Self { codes, state, dim, state_len, names: None })
    }
}

impl<E: Trainable> Table for TrainRows<'_, E> {
    type Elem = E;
    fn rows(&self) -> usize {
        self.codes.len() / self.dim
    }
    fn dim(&self) -> usize {
        self.dim
    }
}
