//! What can be wrong with the arguments of an operation.

use core::fmt;

/// An argument that an operation cannot accept. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ArgError {
    /// An operand has the wrong number of elements.
    Shape {
        /// The operation, `bag_sum` for instance.
        op: &'static str,
        /// The operand, `out` for instance.
        operand: &'static str,
        /// Elements it must have.
        expected: usize,
        /// Elements it has.
        found: usize,
    },
    /// An operand that this configuration needs is not there, or one is there that it has no use for.
    Presence {
        /// The operation.
        op: &'static str,
        /// The operand.
        operand: &'static str,
        /// Whether the configuration needs it.
        needed: bool,
    },
    /// A row id points behind the end of its table.
    RowOutOfRange {
        /// The operation.
        op: &'static str,
        /// The id.
        row: u32,
        /// Rows the table has.
        rows: usize,
    },
    /// The scratch is smaller than the operation's `_scratch` twin asks for.
    Scratch {
        /// The operation.
        op: &'static str,
        /// `reals` or `ids`.
        kind: &'static str,
        /// Elements needed.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A size that must be a multiple of another is not, or is zero where it must not be.
    Size {
        /// The operation.
        op: &'static str,
        /// What has the size.
        operand: &'static str,
        /// The size.
        found: usize,
        /// What it must be a multiple of.
        multiple_of: usize,
    },
}

impl fmt::Display for ArgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Shape { op, operand, expected, found } => {
                write!(f, "{op}: {operand} has {found} elements where {expected} are needed")
            }
            Self::Presence { op, operand, needed: true } => write!(f, "{op}: {operand} is missing"),
            Self::Presence { op, operand, needed: false } => {
                write!(f, "{op}: {operand} is given, but this configuration has none")
            }
            Self::RowOutOfRange { op, row, rows } => write!(f, "{op}: row {row} of a table of {rows} rows"),
            Self::Scratch { op, kind, expected, found } => {
                write!(f, "{op}: scratch holds {found} {kind} where {expected} are needed")
            }
            Self::Size { op, operand, found, multiple_of } => {
                write!(f, "{op}: {operand} is {found}, which is not a positive multiple of {multiple_of}")
            }
        }
    }
}

impl core::error::Error for ArgError {}

/// Fails unless `found` elements are as many as `expected`.
///
/// # Errors
/// [`ArgError::Shape`].
pub const fn check_len(op: &'static str, operand: &'static str, expected: usize, found: usize) -> Result<(), ArgError> {
    if expected == found { Ok(()) } else { Err(ArgError::Shape { op, operand, expected, found }) }
}

/// The product of sizes, or `usize::MAX` where there is no such number: no buffer is that long, so a check against a
/// buffer's length fails, where a product that wraps around might pass.
#[must_use]
pub const fn product(sizes: &[usize]) -> usize {
    let (mut product, mut i) = (1usize, 0);
    while i < sizes.len() {
        product = product.saturating_mul(sizes[i]);
        i += 1;
    }
    product
}

/// Fails unless every id is a row of a table of `rows` rows.
///
/// # Errors
/// [`ArgError::RowOutOfRange`] with the greatest id.
pub fn check_ids(op: &'static str, ids: &[u32], rows: usize) -> Result<(), ArgError> {
    // A fold over the whole slice becomes vector code; an early exit would not.
    let greatest = ids.iter().fold(0, |m, &id| m.max(id));
    if ids.is_empty() || (greatest as usize) < rows {
        Ok(())
    } else {
        Err(ArgError::RowOutOfRange { op, row: greatest, rows })
    }
}
