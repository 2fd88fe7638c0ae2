//! What can go wrong.

use std::path::PathBuf;

/// Why a bench ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    /// A file could not be written or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The Python process did not answer as it should.
    #[error("peer {program}: {problem}")]
    Peer {
        /// The Python.
        program: String,
        /// What it did.
        problem: String,
    },
    /// The backend could not be made.
    #[error(transparent)]
    Cpu(#[from] memlayer_cpu::CpuError),
    /// The GPU's.
    #[error(transparent)]
    Cuda(#[from] memlayer_cuda::CudaError),
    /// Rows of a file could not be read.
    #[error(transparent)]
    File(#[from] memlayer_cpu::FileError),
    /// An operation refused its arguments.
    #[error(transparent)]
    Args(#[from] memlayer_core::ArgError),
    /// candle's threads could not be started.
    #[cfg(feature = "lm")]
    #[error("threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// The configuration of a layer.
    #[error("{0}")]
    Config(#[from] memlayer_core::ConfigError),
    /// The language model.
    #[cfg(feature = "lm")]
    #[error(transparent)]
    Lm(#[from] memlayer_lm::LmError),
    /// candle, as a peer.
    #[cfg(any(feature = "lm", feature = "candle"))]
    #[error("candle: {0}")]
    Candle(#[from] candle_core::Error),
    /// A plot could not be drawn.
    #[error("plot: {0}")]
    Plot(String),
}
