//! What can go wrong between candle and a memory layer.

use memlayer_core::{ArgError, ConfigError};

/// An error of a layer or of its pool. It becomes a [`candle_core::Error`] where candle asks for one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Sizes that make no layer.
    #[error("configuration: {0}")]
    Config(#[from] ConfigError),
    /// An operation was called with what does not fit.
    #[error(transparent)]
    Argument(#[from] ArgError),
    /// A pool has other rows than a layer needs.
    #[error("the pool has {found_rows} rows of {found_dim} values where the layer needs {rows} of {dim}")]
    PoolShape {
        /// Rows needed.
        rows: usize,
        /// Width needed.
        dim: usize,
        /// Rows there are.
        found_rows: usize,
        /// Width there is.
        found_dim: usize,
    },
    /// The system has no memory for a table.
    #[error("a table of {values} values: {source}")]
    Memory {
        /// Its values.
        values: usize,
        /// Why.
        source: std::io::Error,
    },
    /// Layers that share a pool read bags of different lengths.
    #[error("a layer with bags of {found} shares a pool with layers whose bags have {expected}")]
    BagLength {
        /// What the pool has gradients of.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// The pool changed between a forward and its backward.
    #[error("the pool was updated between a forward and its backward")]
    Stale,
    /// Backward without the forward before it, or twice.
    #[error("no forward is kept for this backward: a graph can be walked back once")]
    NoForward,
    /// State that does not belong to this pool.
    #[error("{what} has {found} values where this pool needs {expected}")]
    State {
        /// `rows` or `state`.
        what: &'static str,
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A value that is no number would spread through the whole model.
    #[error("row {row} of the {what} is not finite")]
    NotFinite {
        /// `rows` or `gradient`.
        what: &'static str,
        /// The row.
        row: usize,
    },
    /// There is no backend for this device of candle's.
    #[error("no memory layers on {0:?}: it is neither the CPU nor, with the feature `cuda`, an NVIDIA GPU")]
    Device(candle_core::DeviceLocation),
    /// PEER's two tables are on different devices.
    #[error("the pools of a PEER layer are on different devices")]
    Places,
    /// A call of a layer, or a step, touches more rows than a pool's cache holds; nothing changed.
    #[error("cache_rows {cache_rows} is less than the {rows} rows that one call or step touches")]
    CacheRows {
        /// Rows that the cache holds.
        cache_rows: usize,
        /// Rows touched.
        rows: usize,
    },
    /// The pool of a CPU has no cache.
    #[error("cache_rows {cache_rows} on a CPU: only a GPU caches rows of a pool that is in the host's memory")]
    NoCache {
        /// Rows that it was to hold.
        cache_rows: usize,
    },
    /// The CPU backend cannot be made.
    #[error(transparent)]
    Cpu(#[from] memlayer_cpu::CpuError),
    /// The GPU's.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(memlayer_cuda::CudaError),
    /// candle's own.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

#[cfg(feature = "cuda")]
impl From<memlayer_cuda::CudaError> for Error {
    fn from(error: memlayer_cuda::CudaError) -> Self {
        match error {
            memlayer_cuda::CudaError::Room { rows, capacity: cache_rows } => Self::CacheRows { cache_rows, rows },
            error => Self::Cuda(error),
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}
