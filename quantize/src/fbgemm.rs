//! Byte rows of FBGEMM and `torch.ao`: `dim` codes, then a scale and a bias, both little-endian `f32`;
//! `value = code · scale + bias`.
//!
//! They can be read, so that tables packed by PyTorch can be packed anew. They cannot be rows of an image: a bias is
//! nothing that folds into a weight.

use core::fmt;

/// Why bytes are no FBGEMM rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum FbgemmError {
    /// Rows of no values, or so wide that this machine cannot address one.
    Dim {
        /// Values in a row.
        dim: usize,
    },
    /// The bytes are not a whole number of rows.
    Length {
        /// Bytes in a row.
        row: usize,
        /// Bytes found.
        found: usize,
    },
    /// A scale or bias is infinite or not a number.
    NonFinite {
        /// The row.
        row: usize,
        /// `scale` or `bias`.
        field: &'static str,
        /// Its value.
        value: f32,
    },
}

impl fmt::Display for FbgemmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Dim { dim } => write!(f, "there are no byte rows of {dim} values"),
            Self::Length { row, found } => write!(f, "{found} bytes are no whole number of byte rows of {row} bytes"),
            Self::NonFinite { row, field, value } => write!(f, "the {field} of byte row {row} is {value}"),
        }
    }
}

impl core::error::Error for FbgemmError {}

/// FBGEMM rows where they lie.
#[derive(Clone, Copy)]
pub struct FbgemmRows<'a> {
    bytes: &'a [u8],
    dim: usize,
}

/// The sizes, not the bytes.
impl fmt::Debug for FbgemmRows<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} byte rows of {} values", self.rows(), self.dim)
    }
}

/// Bytes behind the codes of a row.
const TAIL: usize = 8;

impl<'a> FbgemmRows<'a> {
    /// `bytes` as rows of `dim` values.
    ///
    /// # Errors
    /// [`FbgemmError`] if they are not a whole number of rows or a scale or bias is not finite.
    pub fn new(bytes: &'a [u8], dim: usize) -> Result<Self, FbgemmError> {
        let row = dim.checked_add(TAIL).filter(|_| dim > 0).ok_or(FbgemmError::Dim { dim })?;
        if !bytes.len().is_multiple_of(row) {
            return Err(FbgemmError::Length { row, found: bytes.len() });
        }
        let rows = Self { bytes, dim };
        for row in 0..rows.rows() {
            let (_, scale, bias) = rows.split(row);
            for (field, value) in [("scale", scale), ("bias", bias)] {
                if !value.is_finite() {
                    return Err(FbgemmError::NonFinite { row, field, value });
                }
            }
        }
        Ok(rows)
    }

    /// Rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.bytes.len() / (self.dim + TAIL)
    }

    /// Values in a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Writes the values of row `row` into `out`; what is beyond the row stays as it is.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn decode(&self, row: usize, out: &mut [f32]) {
        let (codes, scale, bias) = self.split(row);
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = f32::from(code) * scale + bias;
        }
    }

    /// The codes, scale and bias of a row.
    fn split(&self, row: usize) -> (&'a [u8], f32, f32) {
        let row = &self.bytes[row * (self.dim + TAIL)..][..self.dim + TAIL];
        let (codes, tail) = row.split_at(self.dim);
        let [a, b, c, d, e, f, g, h] = *tail else { return (codes, 1.0, 0.0) };
        (codes, f32::from_le_bytes([a, b, c, d]), f32::from_le_bytes([e, f, g, h]))
    }
}
