//! Tables that stay in a file, for those larger than memory.
//!
//! [`MappedFile`] shows a file as bytes, and the system keeps what it has room for: the rows of an image are read in
//! place. [`CachedRows`] reads the rows of a call, each once, into a cache of a size the caller chose: the process
//! never takes more, and a call that cannot be served is an error instead of a fault. Rows are the same bits either
//! way, so every operation gives the same bits as from memory.
//!
//! [`TrainedFile`] is such a table in training: the rows of a step are read, changed and written back, through a journal.

mod cache;
mod journal;
#[allow(unsafe_code, reason = "one block: a map of a file")]
mod map;
mod train;

use core::fmt;
use core::ops::Deref;
use std::fs::{File, TryLockError};
use std::io;
use std::path::PathBuf;

pub use cache::{CachedRows, CachedView, FileRows};
pub use map::MappedFile;
pub use train::{Durability, LoadedRows, TrainedFile};

/// A file that is locked, and unlocked when this ends. Closing it is not enough: a process that is being started has a copy of
/// every open file until it begins, and a lock lasts as long as any copy.
#[derive(Debug)]
struct Locked(File);

impl Locked {
    /// For this alone, as long as nobody has it.
    fn alone(file: File) -> Result<Self, TryLockError> {
        file.try_lock()?;
        Ok(Self(file))
    }

    /// For all who ask so, as long as nobody has it alone.
    fn shared(file: File) -> Result<Self, TryLockError> {
        file.try_lock_shared()?;
        Ok(Self(file))
    }
}

impl Deref for Locked {
    type Target = File;
    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // If it fails, closing the file unlocks it.
        let _ = self.0.unlock();
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, to: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, at)
}

#[cfg(not(unix))]
fn read_exact_at(_: &File, _: &mut [u8], _: u64) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "reads at a place of a file are of Unix"))
}

#[cfg(unix)]
fn write_all_at(file: &File, from: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, from, at)
}

#[cfg(not(unix))]
fn write_all_at(_: &File, _: &[u8], _: u64) -> io::Result<()> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "writes at a place of a file are of Unix"))
}

/// Why rows of a file cannot be read or written.
#[derive(Debug)]
#[non_exhaustive]
pub enum FileError {
    /// The system's word.
    Io {
        /// The first byte that was asked for.
        at: u64,
        /// How many.
        len: u64,
        /// What it said.
        source: io::Error,
    },
    /// A file cannot be opened, made or synced.
    Open {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// A file cannot be written.
    Write {
        /// The file.
        path: PathBuf,
        /// The first byte that was to be written.
        at: u64,
        /// How many.
        len: u64,
        /// The system's word.
        source: io::Error,
    },
    /// Somebody else reads or trains the table.
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A file is not the table that was asked for, or not a whole one.
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        field: &'static str,
        /// What it is.
        found: u64,
        /// What it must be.
        expected: u64,
    },
    /// A write failed before: the table must be opened again.
    Broken {
        /// The file.
        path: PathBuf,
    },
    /// The rows, or their scales, end behind the file.
    Short {
        /// Where they end.
        end: u64,
        /// Bytes of the file.
        len: u64,
    },
    /// There is no such row.
    Row {
        /// Its id.
        id: u32,
        /// Rows of the table.
        rows: usize,
    },
    /// The rows of a call do not fit the cache.
    Full {
        /// Different rows of the call.
        rows: usize,
        /// Rows that the cache holds.
        places: usize,
    },
    /// A size is zero, does not go with another, or exceeds what an address can say.
    Size {
        /// Which.
        field: &'static str,
        /// The size.
        found: u64,
    },
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { at, len, .. } => write!(f, "{len} bytes from byte {at} on cannot be read"),
            Self::Open { path, source } => write!(f, "{}: {source}", path.display()),
            Self::Write { path, at, len, source } => {
                write!(f, "{}: {len} bytes from byte {at} on cannot be written: {source}", path.display())
            }
            Self::Locked { path } => write!(f, "{}: another process reads or trains it", path.display()),
            Self::Header { path, field, found, expected } => {
                write!(f, "{}: {field} is {found:#x}, not {expected:#x}", path.display())
            }
            Self::Broken { path } => write!(f, "{}: a write failed; it must be opened again", path.display()),
            Self::Short { end, len } => write!(f, "the rows end at byte {end} of a file of {len}"),
            Self::Row { id, rows } => write!(f, "row {id} is none of {rows}"),
            Self::Full { rows, places } => write!(f, "{rows} rows of a call exceed the {places} of the cache"),
            Self::Size { field, found } => write!(f, "{field} cannot be {found}"),
        }
    }
}

impl core::error::Error for FileError {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } | Self::Open { source, .. } | Self::Write { source, .. } => Some(source),
            _ => None,
        }
    }
}
