//! The sparse gradient of a table: which rows a call touched, by which entries, and the sums over them.

use crate::device::{Device, Scratch, ScratchReq};
use crate::error::{ArgError, check_len, product};

/// Entries of one row that are summed in one go; longer rows are sums of such chunks, in order.
///
/// It is part of the law of vertical sums: a hot row's chunks may be summed at the same time, and every backend
/// gives the same bits.
pub const CHUNK: usize = 512;

/// The symbolic half of a sparse gradient: the unique rows of a list of entries, and the entries of each.
///
/// Entry `e` is the `e`-th id of the list the plan was made from. Layers that share one table make one plan over all
/// their ids.
pub struct RowPlan<'a, D: Device> {
    /// `[1]`: U, how many rows are touched. It stays on the device.
    pub unique: D::View<'a, u32>,
    /// `[E]`, the first U of them used: the rows, ascending.
    pub rows: D::View<'a, u32>,
    /// `[E + 1]`, the first `U + 1` used: row `u` has the entries `starts[u]..starts[u + 1]` of `entries`.
    pub starts: D::View<'a, u32>,
    /// `[E]`: the entries, by row, those of one row ascending.
    pub entries: D::View<'a, u32>,
}

impl<D: Device> Clone for RowPlan<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for RowPlan<'_, D> {}

/// The buffers a plan is made in.
pub struct PlanBuffers<'a, D: Device> {
    /// `[1]`, overwritten.
    pub unique: D::ViewMut<'a, u32>,
    /// `[E]`, the first U overwritten.
    pub rows: D::ViewMut<'a, u32>,
    /// `[E + 1]`, the first `U + 1` overwritten.
    pub starts: D::ViewMut<'a, u32>,
    /// `[E]`, overwritten.
    pub entries: D::ViewMut<'a, u32>,
}

impl<'a, D: Device> PlanBuffers<'a, D> {
    /// Ids that the buffers of a plan of `entries` entries take.
    #[must_use]
    pub const fn ids_len(entries: usize) -> usize {
        3 * entries + 2
    }

    /// Buffers for `entries` entries out of the first [`PlanBuffers::ids_len`] of `ids`, and the rest.
    ///
    /// # Errors
    /// [`ArgError::Scratch`] if there are fewer.
    pub fn carve(ids: D::ViewMut<'a, u32>, entries: usize) -> Result<(Self, D::ViewMut<'a, u32>), ArgError> {
        let (expected, found) = (Self::ids_len(entries), D::len_mut(&ids));
        if found < expected {
            return Err(ArgError::Scratch { op: "plan", kind: "ids", expected, found });
        }
        let (unique, ids) = D::split(ids, 1);
        let (rows, ids) = D::split(ids, entries);
        let (starts, ids) = D::split(ids, entries + 1);
        let (entries, rest) = D::split(ids, entries);
        Ok((Self { unique, rows, starts, entries }, rest))
    }

    /// The same buffers for a shorter time.
    pub fn reborrow(&mut self) -> PlanBuffers<'_, D> {
        PlanBuffers {
            unique: D::reborrow(&mut self.unique),
            rows: D::reborrow(&mut self.rows),
            starts: D::reborrow(&mut self.starts),
            entries: D::reborrow(&mut self.entries),
        }
    }

    /// The plan that [`RowReduce::plan`] left here.
    #[must_use]
    pub fn plan(&self) -> RowPlan<'_, D> {
        RowPlan {
            unique: D::read(&self.unique),
            rows: D::read(&self.rows),
            starts: D::read(&self.starts),
            entries: D::read(&self.entries),
        }
    }

    /// Fails unless the buffers are for `entries` entries.
    ///
    /// # Errors
    /// [`ArgError::Shape`].
    pub fn check(&self, entries: usize) -> Result<(), ArgError> {
        const OP: &str = "plan";
        if entries >= u32::MAX as usize {
            return Err(ArgError::Shape { op: OP, operand: "ids", expected: u32::MAX as usize - 1, found: entries });
        }
        check_len(OP, "unique", 1, D::len_mut(&self.unique))?;
        check_len(OP, "rows", entries, D::len_mut(&self.rows))?;
        check_len(OP, "starts", entries + 1, D::len_mut(&self.starts))?;
        check_len(OP, "entries", entries, D::len_mut(&self.entries))
    }
}

/// The numeric half of a sparse gradient: entry `e` contributes `weights[e] · sources[e / bag]` to its row.
pub struct RowGradient<'a, D: Device> {
    /// L, entries that share a source.
    pub bag: usize,
    /// V, the width of a row.
    pub dim: usize,
    /// `[E]`.
    pub weights: D::View<'a, D::Scalar>,
    /// `[E / L, V]`.
    pub sources: D::View<'a, D::Scalar>,
}

impl<D: Device> Clone for RowGradient<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for RowGradient<'_, D> {}

impl<D: Device> RowGradient<'_, D> {
    /// Fails unless all sizes fit `plan`.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self, op: &'static str, plan: &RowPlan<'_, D>) -> Result<(), ArgError> {
        let entries = D::len(plan.entries);
        if self.bag == 0 || !entries.is_multiple_of(self.bag) {
            return Err(ArgError::Size { op, operand: "entries", found: entries, multiple_of: self.bag });
        }
        check_len(op, "weights", entries, D::len(self.weights))?;
        check_len(op, "sources", product(&[entries / self.bag, self.dim]), D::len(self.sources))
    }
}

/// Sums sparse gradients.
pub trait RowReduce: Device {
    /// What [`RowReduce::plan`] needs for `entries` entries.
    fn plan_scratch(&self, entries: usize) -> ScratchReq;

    /// Sorts `ids` (`[E]`, rows of a table of `rows` rows) into a plan. Costs grow with E, not with `rows`.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit or an id is no row; nothing is written then.
    fn plan(
        &self,
        ids: Self::View<'_, u32>,
        rows: usize,
        out: PlanBuffers<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), Self::Error>;

    /// The gradient of every touched row: the first U rows of `out` (`[E, V]`, or shorter if the caller knows U) are
    /// overwritten with vertical sums over their entries.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn reduce(
        &self,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        out: Self::ViewMut<'_, Self::Scalar>,
    ) -> Result<(), Self::Error>;

    /// What [`RowReduce::square_sum`] needs for `entries` entries.
    fn square_sum_scratch(&self, entries: usize) -> ScratchReq;

    /// The sum of the squares of all gradients of touched rows, for clipping by the global norm: a horizontal sum.
    /// `grads` is what [`RowReduce::reduce`] wrote, rows of `dim`; `out` (`[1]`) is overwritten.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit.
    fn square_sum(
        &self,
        plan: RowPlan<'_, Self>,
        dim: usize,
        grads: Self::View<'_, Self::Scalar>,
        out: Self::ViewMut<'_, Self::Scalar>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), Self::Error>;
}
