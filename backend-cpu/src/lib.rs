//! Memory layers on the CPU: SIMD by run-time dispatch and its own workers.
//!
//! [`Cpu`] implements every operation of [`memlayer_core::ops`] and obeys its laws: vertical sums, plans and row
//! updates have the bits of the reference backend, and no result depends on the number of threads.
//!
//! ```
//! use memlayer_cpu::{Cpu, CpuError};
//! let cpu = Cpu::new()?;
//! println!("{}", cpu.name()); // "cpu avx512 x8"
//! # Ok::<(), CpuError>(())
//! ```
//!
//! There is no global state: the workers belong to the value and end with it. After the first calls no operation
//! allocates. Unsafe code lives in `isa`, in one block of `pool` and in one of `file`.
#![deny(unsafe_code)]

pub mod file;
#[allow(unsafe_code, reason = "vector intrinsics")]
mod isa;
mod limit;
mod math;
mod memory;
mod ops;
#[allow(unsafe_code, reason = "one block: workers borrow the caller's job")]
mod pool;
mod scalar;

use core::fmt;
use core::num::NonZeroUsize;
use std::ffi::OsStr;

pub use file::{CachedRows, CachedView, Durability, FileError, FileRows, LoadedRows, MappedFile, TrainedFile};
pub use isa::{Isa, UnknownIsa};
use memlayer_core::Host;
pub use memory::TableMemory;
pub use ops::PanelKeys;

use crate::isa::Token;
use crate::isa::int8::Int8;
use crate::pool::Pool;

/// The environment variable that forces an instruction set: `scalar`, `avx2`, `avx512` or `neon`.
pub const ISA_VARIABLE: &str = "MEMLAYER_ISA";

/// The CPU as a backend.
pub struct Cpu {
    token: Token,
    int8: Option<Int8>,
    pool: Pool,
    name: String,
    isa: Isa,
    /// [`isa::sums_whole_rows`].
    whole_rows: bool,
}

/// Why there is no [`Cpu`].
#[derive(Debug)]
#[non_exhaustive]
pub enum CpuError {
    /// This machine does not have the instruction set.
    Unavailable(Isa),
    /// [`ISA_VARIABLE`] names no instruction set.
    UnknownIsa,
    /// A worker could not be started.
    Spawn(std::io::Error),
}

impl fmt::Display for CpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(isa) => write!(f, "this CPU does not have {isa}"),
            Self::UnknownIsa => write!(f, "{ISA_VARIABLE}: {UnknownIsa}"),
            Self::Spawn(_) => write!(f, "a worker thread could not be started"),
        }
    }
}

impl core::error::Error for CpuError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Spawn(error) => Some(error),
            _ => None,
        }
    }
}

/// Builds a [`Cpu`]; what is not set is as in [`Cpu::new`].
#[derive(Clone, Copy, Debug, Default)]
#[must_use]
pub struct CpuBuilder {
    threads: Option<usize>,
    isa: Option<Isa>,
}

impl CpuBuilder {
    /// Threads that work, the caller's among them; 0 counts as 1, the caller alone.
    pub const fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }
    /// The instruction set, whatever [`ISA_VARIABLE`] says.
    pub const fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }
    /// The backend.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn build(self) -> Result<Cpu, CpuError> {
        let isa = match self.isa {
            Some(isa) => isa,
            None => forced(std::env::var_os(ISA_VARIABLE).as_deref())?
                .or_else(|| Isa::available().next())
                .unwrap_or(Isa::Scalar),
        };
        let token = Token::new(isa).ok_or(CpuError::Unavailable(isa))?;
        let threads = match self.threads {
            Some(threads) => threads.max(1),
            None => std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
        };
        let pool = Pool::new(threads).map_err(CpuError::Spawn)?;
        let (name, whole_rows) = (format!("cpu {isa} x{threads}"), isa::sums_whole_rows());
        Ok(Cpu { token, int8: Int8::new(token), pool, name, isa, whole_rows })
    }
}

/// What [`ISA_VARIABLE`] asks for; nothing if it is unset or empty.
fn forced(value: Option<&OsStr>) -> Result<Option<Isa>, CpuError> {
    match value {
        Some(value) if !value.is_empty() => {
            let isa = value.to_str().and_then(|name| name.parse().ok());
            isa.map(Some).ok_or(CpuError::UnknownIsa)
        }
        _ => Ok(None),
    }
}

impl Cpu {
    /// The best instruction set of this machine, or what [`ISA_VARIABLE`] forces, on all its cores.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn new() -> Result<Self, CpuError> {
        Self::builder().build()
    }
    /// Starts from [`Cpu::new`].
    pub fn builder() -> CpuBuilder {
        CpuBuilder::default()
    }
    /// What runs, such as `cpu avx512 x2`: the instruction set and the number of threads.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.isa
    }
    /// Threads that work, the caller's among them.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cpu").field(&self.name).finish()
    }
}

impl Host for Cpu {
    type Scalar = f32;
    fn name(&self) -> &str {
        &self.name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_forces_or_fails() {
        assert!(forced(None).expect("unset").is_none());
        assert!(forced(Some(OsStr::new(""))).expect("empty").is_none());
        assert_eq!(forced(Some(OsStr::new("scalar"))).expect("known"), Some(Isa::Scalar));
        assert!(matches!(forced(Some(OsStr::new("mmx"))), Err(CpuError::UnknownIsa)));
    }

    #[test]
    fn the_name_says_what_runs() {
        let cpu = Cpu::builder().isa(Isa::Scalar).threads(3).build().expect("always there");
        assert_eq!((cpu.name(), cpu.isa(), cpu.threads()), ("cpu scalar x3", Isa::Scalar, 3));
        assert!(Isa::available().any(|isa| isa == Isa::Scalar));
    }
}
