//! Where an operation runs, and what its buffers are.

use core::ops::Range;

use crate::element::{Item, Real};
use crate::error::{ArgError, check_len};
use crate::storage::{DenseRows, Table};

/// A place that operations run on, and the views of memory it can reach.
///
/// Views are of whole arrays whose length the device knows. The caller owns what they show. On a host they are
/// slices; elsewhere they are what that device's runtime has in their place. The lifetime of a view is that of its
/// memory, so a buffer cannot be given away while an operation's arguments still point to it.
pub trait Device: Sized {
    /// The scalar that arithmetic runs in.
    type Scalar: Real;
    /// What can go wrong.
    type Error: core::error::Error + From<ArgError>;
    /// Shared memory of this device.
    type View<'a, T: Item>: Copy;
    /// Memory of this device that an operation may write.
    type ViewMut<'a, T: Item>;
    /// A view of scalars as a table of unscaled rows.
    type Rows<'a>: Table<Elem = Self::Scalar>;

    /// What runs: the device and the instruction set.
    fn name(&self) -> &str;
    /// Waits for what was started, and reports what went wrong on the way.
    ///
    /// # Errors
    /// The first error since the last call that no operation has reported.
    fn synchronize(&self) -> Result<(), Self::Error>;

    /// Elements in a view.
    fn len<T: Item>(view: Self::View<'_, T>) -> usize;
    /// Elements in a mutable view.
    fn len_mut<T: Item>(view: &Self::ViewMut<'_, T>) -> usize;
    /// A part of a view.
    ///
    /// # Panics
    /// If the range does not lie in the view.
    fn slice<T: Item>(view: Self::View<'_, T>, range: Range<usize>) -> Self::View<'_, T>;
    /// A view for a shorter time. The compiler shortens a slice's lifetime by itself, but not that of a type it knows
    /// only as a device's view: generic code calls this wherever views of different lifetimes meet in one argument.
    fn shorten<'b, 'a: 'b, T: Item>(view: Self::View<'a, T>) -> Self::View<'b, T>;
    /// A mutable view, read.
    fn read<'b, T: Item>(view: &'b Self::ViewMut<'_, T>) -> Self::View<'b, T>;
    /// A mutable view, lent for a shorter time.
    fn reborrow<'b, T: Item>(view: &'b mut Self::ViewMut<'_, T>) -> Self::ViewMut<'b, T>;
    /// A mutable view in two, the first of `mid` elements, which must not be more than the view has.
    fn split<T: Item>(view: Self::ViewMut<'_, T>, mid: usize) -> (Self::ViewMut<'_, T>, Self::ViewMut<'_, T>);
    /// Copies `from` into `to`.
    ///
    /// # Errors
    /// [`ArgError::Shape`] if they differ in length.
    fn copy<T: Item>(&self, from: Self::View<'_, T>, to: Self::ViewMut<'_, T>) -> Result<(), Self::Error>;
    /// A view as a table of rows of `dim` scalars.
    fn rows<'a>(view: Self::View<'a, Self::Scalar>, dim: usize) -> Self::Rows<'a>;
}

/// A device whose memory is the host's: its views are slices.
pub trait Host: Sized {
    /// The scalar that arithmetic runs in.
    type Scalar: Real;
    /// What runs: the device and the instruction set.
    fn name(&self) -> &str;
}

impl<H: Host> Device for H {
    type Scalar = H::Scalar;
    type Error = ArgError;
    type View<'a, T: Item> = &'a [T];
    type ViewMut<'a, T: Item> = &'a mut [T];
    type Rows<'a> = DenseRows<'a, H::Scalar>;

    fn name(&self) -> &str {
        Host::name(self)
    }
    fn synchronize(&self) -> Result<(), ArgError> {
        Ok(())
    }
    fn len<T: Item>(view: &[T]) -> usize {
        view.len()
    }
    fn len_mut<T: Item>(view: &&mut [T]) -> usize {
        view.len()
    }
    fn slice<T: Item>(view: Self::View<'_, T>, range: Range<usize>) -> Self::View<'_, T> {
        &view[range]
    }
    fn shorten<'b, 'a: 'b, T: Item>(view: Self::View<'a, T>) -> Self::View<'b, T> {
        view
    }
    fn read<'b, T: Item>(view: &'b &mut [T]) -> &'b [T] {
        view
    }
    fn reborrow<'b, T: Item>(view: &'b mut &mut [T]) -> &'b mut [T] {
        view
    }
    fn split<T: Item>(view: Self::ViewMut<'_, T>, mid: usize) -> (Self::ViewMut<'_, T>, Self::ViewMut<'_, T>) {
        let mid = mid.min(view.len());
        view.split_at_mut(mid)
    }
    fn copy<T: Item>(&self, from: &[T], to: &mut [T]) -> Result<(), ArgError> {
        check_len("copy", "to", from.len(), to.len())?;
        to.copy_from_slice(from);
        Ok(())
    }
    fn rows<'a>(view: Self::View<'a, H::Scalar>, dim: usize) -> Self::Rows<'a> {
        DenseRows::new(view, dim)
    }
}

/// How much workspace an operation needs: so many scalars and so many ids. Sums and products of it that no memory could
/// hold end at `usize::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct ScratchReq {
    /// Scalars of the device.
    pub reals: usize,
    /// 32-bit ids.
    pub ids: usize,
}

impl ScratchReq {
    /// No workspace.
    pub const EMPTY: Self = Self { reals: 0, ids: 0 };

    /// So many scalars and so many ids.
    #[must_use]
    pub const fn new(reals: usize, ids: usize) -> Self {
        Self { reals, ids }
    }
    /// Workspace for both at the same time.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self { reals: self.reals.saturating_add(other.reals), ids: self.ids.saturating_add(other.ids) }
    }
    /// Workspace for one after the other.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        const fn max(a: usize, b: usize) -> usize {
            if a > b { a } else { b }
        }
        Self { reals: max(self.reals, other.reals), ids: max(self.ids, other.ids) }
    }
    /// Workspace for `n` at the same time.
    #[must_use]
    pub const fn times(self, n: usize) -> Self {
        Self { reals: self.reals.saturating_mul(n), ids: self.ids.saturating_mul(n) }
    }
}

/// Workspace, lent to an operation; its content means nothing before and after.
pub struct Scratch<'a, D: Device> {
    /// Scalars.
    pub reals: D::ViewMut<'a, D::Scalar>,
    /// Ids.
    pub ids: D::ViewMut<'a, u32>,
}

impl<'a, D: Device> Scratch<'a, D> {
    /// Fails if this is smaller than `req`.
    ///
    /// # Errors
    /// [`ArgError::Scratch`].
    pub fn check(&self, op: &'static str, req: ScratchReq) -> Result<(), ArgError> {
        for (kind, expected, found) in
            [("reals", req.reals, D::len_mut(&self.reals)), ("ids", req.ids, D::len_mut(&self.ids))]
        {
            if found < expected {
                return Err(ArgError::Scratch { op, kind, expected, found });
            }
        }
        Ok(())
    }

    /// The same workspace for a shorter time.
    pub fn reborrow(&mut self) -> Scratch<'_, D> {
        Scratch { reals: D::reborrow(&mut self.reals), ids: D::reborrow(&mut self.ids) }
    }

    /// The first `n` scalars, and the rest. If there are fewer, that is a mistake: [`Scratch::check`] first.
    #[must_use]
    pub fn take_reals(self, n: usize) -> (D::ViewMut<'a, D::Scalar>, Self) {
        let (head, reals) = D::split(self.reals, n);
        (head, Self { reals, ids: self.ids })
    }

    /// The first `n` ids, and the rest. If there are fewer, that is a mistake: [`Scratch::check`] first.
    #[must_use]
    pub fn take_ids(self, n: usize) -> (D::ViewMut<'a, u32>, Self) {
        let (head, ids) = D::split(self.ids, n);
        (head, Self { reals: self.reals, ids })
    }
}
