//! What can go wrong.

use core::fmt;

use memlayer_core::ArgError;

/// Why an operation failed, or why there is no [`crate::Cuda`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CudaError {
    /// An argument that the operation cannot accept.
    ///
    /// Sizes are found at the call, and nothing was read or written. A row id that no table has is found by the
    /// kernels: [`memlayer_core::Device::synchronize`] reports it, what the operation wrote means nothing, and tables
    /// in training were left alone from then on.
    Arg(ArgError),
    /// A library that is loaded at run time is not on this machine.
    Library(&'static str),
    /// There is no device of this number.
    NoDevice(usize),
    /// The device is older than this backend supports.
    TooOld {
        /// Its compute capability, major and minor.
        capability: (i32, i32),
    },
    /// The operation does not exist for this format or size.
    Unsupported {
        /// The operation.
        op: &'static str,
        /// What it does not take.
        what: &'static str,
    },
    /// A plan has more rows than a [`crate::CachedTable`] has room for on the device; none of them was loaded.
    Room {
        /// Rows of the plan.
        rows: usize,
        /// Rows that there is room for.
        capacity: usize,
    },
    /// A call of the CUDA driver failed.
    Driver {
        /// The call.
        call: &'static str,
        /// The driver's name of the error, and its word for it.
        error: String,
    },
    /// A call of cuBLAS failed.
    Blas {
        /// The call.
        call: &'static str,
        /// The library's name of the error.
        error: String,
    },
    /// A kernel file could not be compiled on this machine.
    Compile {
        /// The file.
        file: &'static str,
        /// What the compiler says.
        log: String,
    },
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Arg(error) => error.fmt(f),
            Self::Library(name) => write!(f, "{name} is not on this machine (it is loaded at run time)"),
            Self::NoDevice(ordinal) => write!(f, "there is no CUDA device {ordinal}"),
            Self::TooOld { capability: (major, minor) } => {
                write!(f, "the device has compute capability {major}.{minor}; 8.0 is needed")
            }
            Self::Unsupported { op, what } => write!(f, "{op}: {what} is not supported on CUDA devices"),
            Self::Room { rows, capacity } => {
                write!(f, "{rows} rows at once do not fit into a cache of {capacity} rows")
            }
            Self::Driver { call, error } | Self::Blas { call, error } => write!(f, "{call}: {error}"),
            Self::Compile { file, log } => write!(f, "kernels/{file} could not be compiled: {log}"),
        }
    }
}

impl core::error::Error for CudaError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Arg(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ArgError> for CudaError {
    fn from(error: ArgError) -> Self {
        Self::Arg(error)
    }
}
