//! How far packed rows are from what they were packed from.

use core::fmt;

use memlayer_core::Real;
use memlayer_core::storage::{RowId, RowStore};

/// The error of packed rows against their source, measured on the values that the codes stand for.
///
/// A score is a product of a query and a key, so packed sub-keys shift scores: that of query `q` against a packed
/// sub-key moves by at most `|q| · worst_row_norm`, and that of a slot by the sum over its parts. Slots whose scores
/// are nearer than that may change places; [`kept_share`] counts how many did.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct PackReport {
    /// Rows compared.
    pub rows: usize,
    /// `|packed - source| / |source|` over the whole table, in Euclidean norms.
    pub relative_rms: f64,
    /// The row whose error is greatest relative to its norm.
    pub worst_row: RowId,
    /// `|packed - source| / |source|` of that row.
    pub worst_row_error: f64,
    /// The greatest Euclidean norm of a row's error, that of [`PackReport::worst_row`] or another.
    pub worst_row_norm: f64,
    /// The greatest error of a single value.
    pub max_abs_error: f64,
}

/// Error that a use of packed rows can bear. The default bears any.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Budget {
    /// Of [`PackReport::relative_rms`].
    pub relative_rms: f64,
    /// Of [`PackReport::worst_row_error`].
    pub worst_row_error: f64,
    /// Of [`PackReport::max_abs_error`].
    pub max_abs_error: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { relative_rms: f64::INFINITY, worst_row_error: f64::INFINITY, max_abs_error: f64::INFINITY }
    }
}

/// A [`PackReport`] that is over its [`Budget`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct OverBudget {
    /// The field.
    pub field: &'static str,
    /// What was measured.
    pub found: f64,
    /// What was allowed.
    pub allowed: f64,
    /// The worst row.
    pub worst_row: RowId,
}

impl fmt::Display for OverBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, found, allowed, worst_row } = *self;
        write!(f, "{field} is {found:.3e} where {allowed:.3e} is allowed; the worst row is {worst_row}")
    }
}

impl core::error::Error for OverBudget {}

impl PackReport {
    /// Fails if an error is over `budget`.
    ///
    /// # Errors
    /// [`OverBudget`] with the first field that is.
    pub fn within(&self, budget: &Budget) -> Result<(), OverBudget> {
        let fields = [
            ("relative_rms", self.relative_rms, budget.relative_rms),
            ("worst_row_error", self.worst_row_error, budget.worst_row_error),
            ("max_abs_error", self.max_abs_error, budget.max_abs_error),
        ];
        for (field, found, allowed) in fields {
            // A NaN is over every budget.
            if found.partial_cmp(&allowed).is_none_or(core::cmp::Ordering::is_gt) {
                return Err(OverBudget { field, found, allowed, worst_row: self.worst_row });
            }
        }
        Ok(())
    }
}

impl fmt::Display for PackReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, relative_rms, worst_row, worst_row_error, max_abs_error, .. } = *self;
        write!(f, "{rows} rows: relative error {relative_rms:.3e}, ")?;
        write!(f, "worst row {worst_row} at {worst_row_error:.3e}, greatest error of a value {max_abs_error:.3e}")
    }
}

/// `error / norm` from their squares; nothing lost of nothing is no error.
fn ratio(error: f64, norm: f64) -> f64 {
    if error == 0.0 { 0.0 } else { Real::sqrt(error) / Real::sqrt(norm) }
}

/// Adds up a [`PackReport`], value after value and row after row.
#[derive(Default)]
pub(crate) struct Meter {
    report: PackReport,
    error: f64,
    norm: f64,
    row_error: f64,
    row_norm: f64,
}

impl Meter {
    /// Takes in a value of the row in progress.
    #[inline(always)]
    pub(crate) fn value(&mut self, source: f64, packed: f64) {
        let error = packed - source;
        self.row_error += error * error;
        self.row_norm += source * source;
        // A NaN in either must not be lost, as it would be in a maximum.
        if error.abs() > self.report.max_abs_error || error.is_nan() {
            self.report.max_abs_error = error.abs();
        }
    }

    /// Ends the row in progress, which was row `id`.
    pub(crate) fn end_row(&mut self, id: RowId) {
        let worst = ratio(self.row_error, self.row_norm);
        if worst > self.report.worst_row_error || worst.is_nan() {
            (self.report.worst_row, self.report.worst_row_error) = (id, worst);
        }
        self.report.worst_row_norm = self.report.worst_row_norm.max(Real::sqrt(self.row_error));
        self.report.rows += 1;
        self.error += self.row_error;
        self.norm += self.row_norm;
        (self.row_error, self.row_norm) = (0.0, 0.0);
    }

    /// The report over all rows ended.
    pub(crate) fn finish(mut self) -> PackReport {
        self.report.relative_rms = ratio(self.error, self.norm);
        self.report
    }
}

/// Compares `packed` with the `source` it was packed from; `None` if their sizes differ.
///
/// The source's values are read in `f32`, as packing reads them; the packed ones are exact.
pub fn compare(source: &impl RowStore, packed: &impl RowStore) -> Option<PackReport> {
    if (source.rows(), source.dim()) != (packed.rows(), packed.dim()) {
        return None;
    }
    let mut meter = Meter::default();
    for id in 0..source.rows() {
        let id = RowId::try_from(id).ok()?;
        let (from, to) = (source.row(id), packed.row(id));
        for i in 0..source.dim() {
            meter.value(f64::from(from.value::<f32>(i)), to.value::<f64>(i));
        }
        meter.end_row(id);
    }
    Some(meter.finish())
}

/// The share of selected slots that packed keys keep: of the ids in `exact`, how many are in `packed` too, head by
/// head. Both are `[T, H, K]`, in any order within a head.
///
/// Returns `None` if the sizes differ or are no multiple of `top_k`, or there are no ids.
#[must_use]
pub fn kept_share(exact: &[RowId], packed: &[RowId], top_k: usize) -> Option<f64> {
    if top_k == 0 || exact.is_empty() || exact.len() != packed.len() || !exact.len().is_multiple_of(top_k) {
        return None;
    }
    let heads = exact.chunks_exact(top_k).zip(packed.chunks_exact(top_k));
    let kept: usize = heads.map(|(exact, packed)| exact.iter().filter(|id| packed.contains(id)).count()).sum();
    Some(kept as f64 / exact.len() as f64)
}
