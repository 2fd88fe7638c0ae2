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
    /// The CPU backend cannot be made.
    #[error(transparent)]
    Cpu(#[from] memlayer_cpu::CpuError),
    /// The GPU's.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] memlayer_cuda::CudaError),
    /// candle's own.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}
