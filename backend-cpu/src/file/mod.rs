//! Tables that stay in a file, for those larger than memory.
//!
//! [`MappedFile`] shows a file as bytes, and the system keeps what it has room for: the rows of an image are read in
//! place. [`CachedRows`] reads the rows of a call, each once, into a cache of a size the caller chose: the process
//! never takes more, and a call that cannot be served is an error instead of a fault. Rows are the same bits either
//! way, so every operation gives the same bits as from memory.

mod cache;
#[allow(unsafe_code, reason = "one block: a map of a file")]
mod map;

use core::fmt;
use std::io;

pub use cache::{CachedRows, CachedView, FileRows};
pub use map::MappedFile;

/// Why rows of a file cannot be read.
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
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}
