//! Where rows live.
//!
//! A backend of the host reads any [`RowStore`], so rows may sit in an arena, in flash or in a map of a file.
//! Another device has table types of its own, which are only a [`Table`].

use crate::element::{Element, Item, Real, Trainable};

/// Names a row of a table. A table has at most 2^32 rows.
pub type RowId = u32;

/// A table of rows of one width and one format.
pub trait Table {
    /// What a row's codes are.
    type Elem: Element;
    /// Rows.
    fn rows(&self) -> usize;
    /// Values in a row.
    fn dim(&self) -> usize;
}

/// How large a table is, in place of the table where nothing of it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Rows.
    pub rows: usize,
    /// Values in a row.
    pub dim: usize,
}

impl Table for Extent {
    /// There are no codes: of no meaning.
    type Elem = f32;
    fn rows(&self) -> usize {
        self.rows
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

/// A row where it lies: value `i` is `scales[i / group] · code i`.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a, E> {
    /// The codes, [`Element::codes`] of the table's width.
    pub codes: &'a [E],
    /// One scale for each `group` values; empty if all are 1.
    pub scales: &'a [f32],
    /// Values that share a scale; the table's width where a row has one.
    pub group: usize,
}

impl<E: Element> Row<'_, E> {
    /// The scale of value `i`; NaN where there is none.
    #[inline(always)]
    #[must_use]
    pub fn scale<F: Real>(&self, i: usize) -> F {
        match self.scales {
            [] => F::one(),
            [scale] => F::of(f64::from(*scale)),
            scales => {
                let scale = i.checked_div(self.group).and_then(|group| scales.get(group));
                scale.map_or(F::of(f64::NAN), |&scale| F::of(f64::from(scale)))
            }
        }
    }

    /// The code of value `i`, unscaled; NaN where there is none.
    #[inline(always)]
    #[must_use]
    pub fn code<F: Real>(&self, i: usize) -> F {
        E::value(self.codes, i)
    }

    /// Value `i`.
    #[inline(always)]
    #[must_use]
    pub fn value<F: Real>(&self, i: usize) -> F {
        self.scale::<F>(i) * self.code::<F>(i)
    }
}

/// Rows readable from the host: implement it to keep rows in flash, a memory map or an arena.
pub trait RowStore: Table {
    /// Row `id`.
    ///
    /// # Panics
    /// If there is no such row. Operations check ids before they read.
    fn row(&self, id: RowId) -> Row<'_, Self::Elem>;

    /// Row `id`, if there is one: what does not panic reads rows by it.
    #[inline(always)]
    fn get(&self, id: RowId) -> Option<Row<'_, Self::Elem>> {
        ((id as usize) < self.rows()).then(|| self.row(id))
    }

    /// `count` rows from `first` on as one, if they lie one after the other: all their codes, and all their scales.
    #[inline(always)]
    fn run(&self, _first: RowId, _count: usize) -> Option<Row<'_, Self::Elem>> {
        None
    }

    /// Says that row `id` will be read soon. `id` may be out of range.
    #[inline(always)]
    fn prefetch(&self, _id: RowId) {}
}

impl<S: Table + ?Sized> Table for &S {
    type Elem = S::Elem;
    fn rows(&self) -> usize {
        (**self).rows()
    }
    fn dim(&self) -> usize {
        (**self).dim()
    }
}

impl<S: RowStore + ?Sized> RowStore for &S {
    #[inline(always)]
    fn row(&self, id: RowId) -> Row<'_, Self::Elem> {
        (**self).row(id)
    }
    #[inline(always)]
    fn get(&self, id: RowId) -> Option<Row<'_, Self::Elem>> {
        (**self).get(id)
    }
    #[inline(always)]
    fn run(&self, first: RowId, count: usize) -> Option<Row<'_, Self::Elem>> {
        (**self).run(first, count)
    }
    #[inline(always)]
    fn prefetch(&self, id: RowId) {
        (**self).prefetch(id);
    }
}

/// Rows that training changes, each with the state its row rule keeps.
///
/// The store can be cut at a row: parts with different rows are then updated by different workers, without a lock
/// and without `unsafe`. Ids keep their meaning in the parts.
pub trait TrainStore: Table<Elem: Trainable> + Sized {
    /// The scalar the state is kept in.
    type State: Real;

    /// Scalars of state a row has.
    fn state_len(&self) -> usize;

    /// Row `id` and its state.
    ///
    /// # Panics
    /// If this part has no such row.
    fn row_and_state(&mut self, id: RowId) -> (&mut [Self::Elem], &mut [Self::State]);

    /// The rows before `id`, and those from `id` on.
    ///
    /// # Panics
    /// If `id` is before the first row or behind the last one by more than one.
    #[must_use]
    fn split_at(self, id: RowId) -> (Self, Self);
}

/// Unscaled rows in one slice.
#[derive(Clone, Copy, Debug)]
pub struct DenseRows<'a, E> {
    codes: &'a [E],
    width: usize,
    dim: usize,
}

impl<'a, E: Element> DenseRows<'a, E> {
    /// `codes` as rows of `dim` values; what is left over at the end belongs to no row. There are no rows of no values.
    #[must_use]
    pub fn new(codes: &'a [E], dim: usize) -> Self {
        Self { codes, width: E::codes(dim), dim }
    }

    /// All codes, row after row.
    #[must_use]
    pub fn codes(&self) -> &'a [E] {
        self.codes
    }
}

impl<E: Element> Table for DenseRows<'_, E> {
    type Elem = E;
    fn rows(&self) -> usize {
        self.codes.len().checked_div(self.width).unwrap_or(0)
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

impl<E: Element> RowStore for DenseRows<'_, E> {
    #[inline(always)]
    fn row(&self, id: RowId) -> Row<'_, E> {
        let start = id as usize * self.width;
        Row { codes: &self.codes[start..start + self.width], scales: &[], group: self.dim }
    }
    #[inline(always)]
    fn get(&self, id: RowId) -> Option<Row<'_, E>> {
        Some(Row { codes: nth(self.codes, id, self.width)?, scales: &[], group: self.dim })
    }
    #[inline(always)]
    fn run(&self, first: RowId, count: usize) -> Option<Row<'_, E>> {
        Some(Row { codes: several(self.codes, first, count, self.width)?, scales: &[], group: self.dim })
    }
}

/// Piece `id` of `items`, cut into pieces of `width`, if there is one.
#[inline(always)]
fn nth<T>(items: &[T], id: RowId, width: usize) -> Option<&[T]> {
    items.get((id as usize).checked_mul(width)?..)?.get(..width)
}

/// `count` pieces of `width` items from piece `first` on, if they are there.
#[inline(always)]
fn several<T>(items: &[T], first: RowId, count: usize, width: usize) -> Option<&[T]> {
    items.get((first as usize).checked_mul(width)?..)?.get(..count.checked_mul(width)?)
}

/// Packed rows: codes in one slice, scales in another.
#[derive(Clone, Copy, Debug)]
pub struct ScaledRows<'a, E> {
    codes: &'a [E],
    scales: &'a [f32],
    width: usize,
    dim: usize,
    group: usize,
    /// Scales of a row.
    groups: usize,
}

impl<'a, E: Element> ScaledRows<'a, E> {
    /// `codes` as rows of `dim` values, with one of `scales` for each `group` of them.
    ///
    /// Returns `None` if a size is zero or there are not as many scales as the rows need.
    #[must_use]
    pub fn new(codes: &'a [E], scales: &'a [f32], dim: usize, group: usize) -> Option<Self> {
        let width = E::codes(dim);
        if width == 0 || group == 0 || !codes.len().is_multiple_of(width) {
            return None;
        }
        let groups = dim.div_ceil(group);
        let needed = (codes.len() / width).checked_mul(groups)?;
        (scales.len() == needed).then_some(Self { codes, scales, width, dim, group, groups })
    }
}

impl<E: Element> Table for ScaledRows<'_, E> {
    type Elem = E;
    fn rows(&self) -> usize {
        self.codes.len().checked_div(self.width).unwrap_or(0)
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

impl<E: Element> RowStore for ScaledRows<'_, E> {
    #[inline(always)]
    fn row(&self, id: RowId) -> Row<'_, E> {
        let (start, groups) = (id as usize * self.width, self.groups);
        Row {
            codes: &self.codes[start..start + self.width],
            scales: &self.scales[id as usize * groups..(id as usize + 1) * groups],
            group: self.group,
        }
    }
    #[inline(always)]
    fn get(&self, id: RowId) -> Option<Row<'_, E>> {
        let (codes, scales) = (nth(self.codes, id, self.width)?, nth(self.scales, id, self.groups)?);
        Some(Row { codes, scales, group: self.group })
    }
    #[inline(always)]
    fn run(&self, first: RowId, count: usize) -> Option<Row<'_, E>> {
        let codes = several(self.codes, first, count, self.width)?;
        Some(Row { codes, scales: several(self.scales, first, count, self.groups)?, group: self.group })
    }
}

/// Rows of one slice that may be changed, from row `first` on.
#[derive(Debug)]
pub struct DenseRowsMut<'a, T> {
    items: &'a mut [T],
    width: usize,
    first: RowId,
}

impl<'a, T: Item> DenseRowsMut<'a, T> {
    /// `items` as rows of `width` items; a width of zero makes rows of nothing.
    #[must_use]
    pub fn new(items: &'a mut [T], width: usize) -> Self {
        Self { items, width, first: 0 }
    }

    /// Row `id`.
    ///
    /// # Panics
    /// If this part has no such row.
    #[inline(always)]
    pub fn row_mut(&mut self, id: RowId) -> &mut [T] {
        let start = (id - self.first) as usize * self.width;
        &mut self.items[start..start + self.width]
    }

    /// The rows before `id`, and those from `id` on.
    ///
    /// # Panics
    /// If `id` is before the first row or behind the last one by more than one.
    #[must_use]
    pub fn split_at(self, id: RowId) -> (Self, Self) {
        let (head, tail) = self.items.split_at_mut((id - self.first) as usize * self.width);
        (Self { items: head, width: self.width, first: self.first }, Self { items: tail, width: self.width, first: id })
    }
}

/// Rows and the state of their row rule, each in a slice of its own.
#[derive(Debug)]
pub struct TrainRows<'a, E, F> {
    rows: DenseRowsMut<'a, E>,
    state: DenseRowsMut<'a, F>,
    dim: usize,
    end: usize,
}

impl<'a, E: Trainable, F: Real> TrainRows<'a, E, F> {
    /// `codes` as rows of `dim` values, each with `state_len` scalars of `state`.
    ///
    /// Returns `None` if `dim` is zero, a row is cut off, or the states are not as many as the rows.
    #[must_use]
    pub fn new(codes: &'a mut [E], dim: usize, state: &'a mut [F], state_len: usize) -> Option<Self> {
        let width = E::codes(dim);
        if width == 0 || !codes.len().is_multiple_of(width) {
            return None;
        }
        let rows = codes.len() / width;
        (rows.checked_mul(state_len)? == state.len()).then(|| Self {
            rows: DenseRowsMut::new(codes, width),
            state: DenseRowsMut::new(state, state_len),
            dim,
            end: rows,
        })
    }
}

impl<E: Trainable, F: Real> Table for TrainRows<'_, E, F> {
    type Elem = E;
    /// One more than the greatest id.
    fn rows(&self) -> usize {
        self.end
    }
    fn dim(&self) -> usize {
        self.dim
    }
}

impl<E: Trainable, F: Real> TrainStore for TrainRows<'_, E, F> {
    type State = F;
    fn state_len(&self) -> usize {
        self.state.width
    }
    #[inline(always)]
    fn row_and_state(&mut self, id: RowId) -> (&mut [E], &mut [F]) {
        (self.rows.row_mut(id), self.state.row_mut(id))
    }
    fn split_at(self, id: RowId) -> (Self, Self) {
        let (rows, more_rows) = self.rows.split_at(id);
        let (state, more_state) = self.state.split_at(id);
        (
            Self { rows, state, dim: self.dim, end: id as usize },
            Self { rows: more_rows, state: more_state, dim: self.dim, end: self.end },
        )
    }
}
