//! Weighted sums over the rows of a table, and their dots with a vector.

use crate::device::Device;
use crate::error::{ArgError, check_len, product};
use crate::storage::Table;

/// The arguments of [`EmbeddingBag::bag_sum`].
pub struct BagSum<'a, D: Device> {
    /// L, rows in a bag.
    pub bag: usize,
    /// `[T, L]`.
    pub ids: D::View<'a, u32>,
    /// `[T, L]`.
    pub weights: D::View<'a, D::Scalar>,
    /// `[T, V]`: overwritten, or added to if `accumulate`.
    pub out: D::ViewMut<'a, D::Scalar>,
    /// Whether the sum, made from zero, is added to what `out` holds.
    pub accumulate: bool,
}

/// The arguments of [`EmbeddingBag::bag_dot`].
pub struct BagDot<'a, D: Device> {
    /// L, rows in a bag.
    pub bag: usize,
    /// `[T, L]`.
    pub ids: D::View<'a, u32>,
    /// `[T, V]`.
    pub vectors: D::View<'a, D::Scalar>,
    /// `[T, L]`, overwritten.
    pub out: D::ViewMut<'a, D::Scalar>,
}

/// The tokens of a call with `ids` ids in bags of `bag`.
fn tokens(op: &'static str, bag: usize, ids: usize) -> Result<usize, ArgError> {
    if bag == 0 || !ids.is_multiple_of(bag) {
        return Err(ArgError::Size { op, operand: "ids", found: ids, multiple_of: bag });
    }
    Ok(ids / bag)
}

impl<D: Device> BagSum<'_, D> {
    /// The number of tokens T, if all sizes fit a table of rows of `dim` values.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self, dim: usize) -> Result<usize, ArgError> {
        const OP: &str = "bag_sum";
        let tokens = tokens(OP, self.bag, D::len(self.ids))?;
        check_len(OP, "weights", D::len(self.ids), D::len(self.weights))?;
        check_len(OP, "out", product(&[tokens, dim]), D::len_mut(&self.out))?;
        Ok(tokens)
    }
}

impl<D: Device> BagDot<'_, D> {
    /// The number of tokens T, if all sizes fit a table of rows of `dim` values.
    ///
    /// # Errors
    /// [`ArgError`].
    pub fn check(&self, dim: usize) -> Result<usize, ArgError> {
        const OP: &str = "bag_dot";
        let tokens = tokens(OP, self.bag, D::len(self.ids))?;
        check_len(OP, "vectors", product(&[tokens, dim]), D::len(self.vectors))?;
        check_len(OP, "out", D::len(self.ids), D::len_mut(&self.out))?;
        Ok(tokens)
    }
}

/// Reads bags of rows.
pub trait EmbeddingBag<S: Table>: Device {
    /// Sums weighted rows: `out[t] = Σ_l (weights[t, l] · scale) · code(ids[t, l])`, multiplied, then added, in order
    /// of `l`: a vertical sum. The sum of an empty bag is zero.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit or an id is no row of `table`; nothing is written then.
    fn bag_sum(&self, table: &S, args: BagSum<'_, Self>) -> Result<(), Self::Error>;

    /// Dots of rows: `out[t, l] = scale · Σ_v vectors[t, v] · code(ids[t, l])[v]`, a horizontal sum. It is the gradient
    /// of [`EmbeddingBag::bag_sum`]'s weights if `vectors` is that of its output.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit or an id is no row of `table`; nothing is written then.
    fn bag_dot(&self, table: &S, args: BagDot<'_, Self>) -> Result<(), Self::Error>;
}
