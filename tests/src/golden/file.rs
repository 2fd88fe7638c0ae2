//! Reading a safetensors file of which nothing is known.

use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::de::DeserializeOwned;

/// Why a file cannot be checked.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub struct GoldenError {
    path: PathBuf,
    #[source]
    problem: Problem,
}

impl GoldenError {
    pub(super) fn new(path: &Path, problem: Problem) -> Self {
        Self { path: path.to_owned(), problem }
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Problem {
    #[error("cannot be read: {0}")]
    Read(std::io::Error),
    #[error("is no safetensors file: {0}")]
    Format(safetensors::SafeTensorError),
    #[error("is none of the golden formats (it has none of grad_output, step0.rows, fbgemm_byte_rowwise, counted)")]
    NotGolden,
    #[error("has no metadata field `config`")]
    NoConfig,
    #[error("metadata field `config`: {0}")]
    Config(String),
    #[error("has no tensor `{0}`")]
    Missing(String),
    #[error("tensor `{tensor}` has shape {found:?} where {expected:?} is needed")]
    Shape { tensor: String, expected: Vec<usize>, found: Vec<usize> },
    #[error("tensor `{tensor}` is {found:?} where {expected} is needed")]
    Dtype { tensor: String, expected: &'static str, found: Dtype },
    #[error("tensor `{tensor}`, element {at}: {value} is no row of {rows}")]
    Row { tensor: String, at: usize, value: i64, rows: usize },
    #[error("{0}")]
    Device(Box<dyn core::error::Error + Send + Sync>),
}

/// A safetensors file in memory.
pub struct GoldenFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl GoldenFile {
    /// Reads the file and checks its header.
    ///
    /// # Errors
    /// [`GoldenError`].
    pub fn open(path: &Path) -> Result<Self, GoldenError> {
        Self::new(path, std::fs::read(path).map_err(|e| GoldenError::new(path, Problem::Read(e)))?)
    }

    /// A file that is in memory already; `path` is what errors call it.
    ///
    /// # Errors
    /// [`GoldenError`] if its header is wrong.
    pub fn new(path: &Path, bytes: Vec<u8>) -> Result<Self, GoldenError> {
        let file = Self { path: path.to_owned(), bytes };
        SafeTensors::deserialize(&file.bytes).map_err(|e| file.error(Problem::Format(e)))?;
        Ok(file)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn error(&self, problem: Problem) -> GoldenError {
        GoldenError::new(&self.path, problem)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, GoldenError> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| self.error(Problem::Format(e)))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors().is_ok_and(|t| t.tensor(name).is_ok())
    }

    /// The JSON of the metadata field `config`.
    pub(super) fn config<T: DeserializeOwned>(&self) -> Result<T, GoldenError> {
        let (_, metadata) = SafeTensors::read_metadata(&self.bytes).map_err(|e| self.error(Problem::Format(e)))?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("config"));
        let text = text.ok_or_else(|| self.error(Problem::NoConfig))?;
        serde_json::from_str(text).map_err(|e| self.error(Problem::Config(e.to_string())))
    }

    /// The bytes of a tensor of one of `dtypes`, with its type and shape.
    fn raw(&self, name: &str, expected: &'static str, dtypes: &[Dtype]) -> Result<Raw, GoldenError> {
        let tensors = self.tensors()?;
        let tensor = tensors.tensor(name).map_err(|_| self.error(Problem::Missing(name.to_owned())))?;
        if !dtypes.contains(&tensor.dtype()) {
            let tensor_name = name.to_owned();
            return Err(self.error(Problem::Dtype { tensor: tensor_name, expected, found: tensor.dtype() }));
        }
        Ok(Raw { dtype: tensor.dtype(), shape: tensor.shape().to_vec(), data: tensor.data().to_vec() })
    }

    /// A tensor of f32 or f64, and its shape.
    pub(super) fn floats(&self, name: &str) -> Result<(Vec<f64>, Vec<usize>), GoldenError> {
        let raw = self.raw(name, "f32 or f64", &[Dtype::F32, Dtype::F64])?;
        let values = if raw.dtype == Dtype::F32 {
            raw.data.as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        } else {
            raw.data.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
        };
        Ok((values, raw.shape))
    }

    /// A tensor of f32 or f64 of this shape.
    pub(super) fn floats_of(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>, GoldenError> {
        let (values, found) = self.floats(name)?;
        if found != shape {
            let (tensor, expected) = (name.to_owned(), shape.to_vec());
            return Err(self.error(Problem::Shape { tensor, expected, found }));
        }
        Ok(values)
    }

    /// A tensor of i64, all of them rows of a table of `rows` rows.
    pub(super) fn ids(&self, name: &str, rows: usize) -> Result<(Vec<u32>, Vec<usize>), GoldenError> {
        let raw = self.raw(name, "i64", &[Dtype::I64])?;
        let mut ids = Vec::with_capacity(raw.data.len() / 8);
        for (at, bytes) in raw.data.as_chunks().0.iter().enumerate() {
            let value = i64::from_le_bytes(*bytes);
            match u32::try_from(value) {
                Ok(id) if (id as usize) < rows => ids.push(id),
                _ => return Err(self.error(Problem::Row { tensor: name.to_owned(), at, value, rows })),
            }
        }
        Ok((ids, raw.shape))
    }

    /// A tensor of bytes and its shape.
    pub(super) fn bytes(&self, name: &str) -> Result<(Vec<u8>, Vec<usize>), GoldenError> {
        let raw = self.raw(name, "u8", &[Dtype::U8])?;
        Ok((raw.data, raw.shape))
    }

    /// A tensor of f16, as bits.
    pub(super) fn f16_bits(&self, name: &str) -> Result<Vec<u16>, GoldenError> {
        let raw = self.raw(name, "f16", &[Dtype::F16])?;
        Ok(raw.data.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect())
    }
}

struct Raw {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}
