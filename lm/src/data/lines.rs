//! Lines of a text file, none longer than a bound: a file without line ends must not fill the memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{LmError, Result};

/// The longest line that is read, in bytes.
pub(crate) const LONGEST: usize = 64 * 1024;

/// Reads lines, counted from 1, without their ends.
pub(crate) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: usize,
}

impl Lines {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| LmError::io(path, e))?;
        Ok(Self { path: path.to_owned(), reader: BufReader::new(file), number: 0 })
    }

    pub(crate) fn error(&self, problem: impl Into<String>) -> LmError {
        LmError::line(&self.path, self.number.max(1), problem)
    }

    /// The next line, or `None` at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<String>> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.reader).take(LONGEST as u64 + 2);
        let read = bounded.read_until(b'\n', &mut line).map_err(|e| LmError::io(&self.path, e))?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        }
        if line.len() > LONGEST {
            return Err(self.error(format!("longer than {LONGEST} bytes")));
        }
        match String::from_utf8(line) {
            Ok(line) => Ok(Some(line)),
            Err(e) => Err(self.error(format!("byte {} is not UTF-8", e.utf8_error().valid_up_to() + 1))),
        }
    }
}
