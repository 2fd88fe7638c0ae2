//! Packing rows into buffers of the caller.

use core::fmt;
use core::ops::Range;

use memlayer_core::element::Format;
use memlayer_core::storage::{Row, RowId, RowStore};

use crate::formats::Pack;
use crate::report::{Meter, PackReport};

/// Why rows cannot be packed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum PackError {
    /// A value is infinite or not a number.
    NonFinite {
        /// Its row.
        row: usize,
        /// Its place in the row.
        column: usize,
        /// The value.
        value: f32,
    },
    /// A value is beyond the range of a format that has no scales.
    OutOfRange {
        /// Its row.
        row: usize,
        /// Its place in the row.
        column: usize,
        /// The value.
        value: f32,
        /// The format.
        format: Format,
    },
    /// A buffer has the wrong length.
    Length {
        /// Which.
        buffer: &'static str,
        /// Elements it must have.
        expected: usize,
        /// Elements it has.
        found: usize,
    },
    /// The values that share a scale are none, or more than a row has.
    Group {
        /// Values that share a scale.
        group: usize,
        /// Values in a row.
        dim: usize,
    },
    /// The table has more rows than ids can name, or more values than this machine can address.
    TooLarge {
        /// Rows.
        rows: usize,
        /// Values in a row.
        dim: usize,
    },
}

impl fmt::Display for PackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NonFinite { row, column, value } => {
                write!(f, "row {row}, column {column} is {value}, which cannot be packed")
            }
            Self::OutOfRange { row, column, value, format } => {
                write!(f, "row {row}, column {column} is {value:e}, which is beyond the range of {format}")
            }
            Self::Length { buffer, expected, found } => {
                write!(f, "{buffer} has {found} elements where {expected} are needed")
            }
            Self::Group { group, dim } => write!(f, "{group} values cannot share a scale in rows of {dim}"),
            Self::TooLarge { rows, dim } => write!(f, "{rows} rows of {dim} values are more than a table can have"),
        }
    }
}

impl core::error::Error for PackError {}

/// The scale under which magnitude `greatest` becomes the code [`Pack::TOP`]: their quotient to nearest, but
///
/// * 1 for zeros, so that nothing that divides by a scale can make a NaN;
/// * the next greater number where a subnormal scale was rounded so far down that the greatest code would not reach;
/// * the next smaller one where it was rounded up so that `scale · TOP` overflows.
#[must_use]
pub fn scale_for<E: Pack>(greatest: f32) -> f32 {
    if greatest == 0.0 {
        return 1.0;
    }
    let scale = greatest / E::TOP;
    if greatest / scale > E::REACH {
        f32::from_bits(scale.to_bits() + 1)
    } else if scale * E::TOP == f32::INFINITY {
        f32::from_bits(scale.to_bits() - 1)
    } else {
        scale
    }
}

/// How a table is cut into rows and groups.
#[derive(Clone, Copy)]
pub(crate) struct Cut {
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) group: usize,
}

impl Cut {
    pub(crate) fn of(source: &impl RowStore, group: usize) -> Result<Self, PackError> {
        let (rows, dim) = (source.rows(), source.dim());
        if group == 0 || group > dim {
            return Err(PackError::Group { group, dim });
        }
        if rows as u64 > 1 << 32 || rows.checked_mul(dim).is_none() {
            return Err(PackError::TooLarge { rows, dim });
        }
        Ok(Self { rows, dim, group })
    }

    /// Every row's id.
    pub(crate) fn ids(self) -> impl Iterator<Item = RowId> {
        (0..self.rows).map_while(|id| RowId::try_from(id).ok())
    }

    /// The columns of each group of a row.
    pub(crate) fn groups(self) -> impl Iterator<Item = Range<usize>> {
        (0..self.dim).step_by(self.group).map(move |at| at..self.dim.min(at + self.group))
    }
}

/// The scale of the values at `columns`, all of which must be finite.
pub(crate) fn group_scale<E: Pack, S: memlayer_core::Element>(
    row: &Row<'_, S>,
    id: RowId,
    columns: Range<usize>,
) -> Result<f32, PackError> {
    let (greatest, _) = greatest(row, id, columns)?;
    Ok(if E::SCALED { scale_for::<E>(greatest.abs()) } else { 1.0 })
}

/// The value of greatest magnitude at `columns`, all of which must be finite, and its column.
pub(crate) fn greatest<S: memlayer_core::Element>(
    row: &Row<'_, S>,
    id: RowId,
    columns: Range<usize>,
) -> Result<(f32, usize), PackError> {
    let mut greatest = (0.0f32, columns.start);
    for column in columns {
        let value = row.value::<f32>(column);
        if !value.is_finite() {
            return Err(PackError::NonFinite { row: id as usize, column, value });
        }
        if value.abs() > greatest.0.abs() {
            greatest = (value, column);
        }
    }
    Ok(greatest)
}

/// Packs the values at `columns` under `scale` into `codes`, which is the whole row.
pub(crate) fn pack_group<E: Pack, S: memlayer_core::Element>(
    row: &Row<'_, S>,
    id: RowId,
    columns: Range<usize>,
    scale: f32,
    codes: &mut [E],
    meter: &mut Meter,
) -> Result<(), PackError> {
    for column in columns {
        let value = row.value::<f32>(column);
        codes[column] = E::nearest(value / scale);
        let packed: f64 = E::value(codes, column);
        if !packed.is_finite() {
            return Err(PackError::OutOfRange { row: id as usize, column, value, format: E::FORMAT });
        }
        meter.value(f64::from(value), f64::from(scale) * packed);
    }
    Ok(())
}

/// Packs every row of `source` into `codes` (`[rows, dim]`) and `scales` (one for each `group` values of a row, empty
/// for formats without), and says how much was lost.
///
/// A `group` as wide as the rows gives one scale a row. Rows are packed in the format of `E`: values are divided by
/// their scale ([`scale_for`]) and rounded to nearest, ties to even. The bound on each value's error is
/// [`Pack::error_bound`]. The source's values are read as `f32`.
///
/// # Errors
/// [`PackError`]; the buffers' contents then mean nothing.
pub fn pack_rows<E: Pack, S: RowStore>(
    source: &S,
    group: usize,
    codes: &mut [E],
    scales: &mut [f32],
) -> Result<PackReport, PackError> {
    let cut = Cut::of(source, group)?;
    let groups = if E::SCALED { cut.dim.div_ceil(group) } else { 0 };
    check_len("codes", cut.rows * cut.dim, codes.len())?;
    check_len("scales", cut.rows * groups, scales.len())?;

    let mut meter = Meter::default();
    let mut scales = scales.iter_mut();
    for (id, codes) in cut.ids().zip(codes.chunks_exact_mut(cut.dim)) {
        let row = source.row(id);
        for columns in cut.groups() {
            let scale = group_scale::<E, _>(&row, id, columns.clone())?;
            pack_group(&row, id, columns, scale, codes, &mut meter)?;
            if let (true, Some(slot)) = (E::SCALED, scales.next()) {
                *slot = scale;
            }
        }
        meter.end_row(id);
    }
    Ok(meter.finish())
}

pub(crate) fn check_len(buffer: &'static str, expected: usize, found: usize) -> Result<(), PackError> {
    if expected == found { Ok(()) } else { Err(PackError::Length { buffer, expected, found }) }
}
