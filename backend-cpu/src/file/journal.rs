//! What a step changes, written down before it is changed.
//!
//! A journal begins with the step that the table is at without it; behind that are records, one a step: the new rows and their
//! new state, in full. So a record can be applied any number of times, to rows old, new or half-written, and gives the table
//! after its step. What is at the end of the file and no whole record was being written when the process ended, and its step
//! had not begun to change the table.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::FileError;
use super::train::Durability;

const MAGIC: [u8; 8] = *b"mljrnl01";
/// Magic, step, checksum of both, padding.
const START: usize = 24;
/// Step, rows, bytes of the body, checksum of these and of the body, padding.
const HEAD: usize = 32;

/// The records since the table was last known to be whole on disk.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// Where the next record goes.
    end: u64,
    durability: Durability,
    /// A record being put together, used again.
    record: Vec<u8>,
}

/// A record of a journal that is read.
pub(super) struct Record {
    pub(super) rows: usize,
    /// Ids, rows and states.
    pub(super) body: Vec<u8>,
}

fn crc(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize()
}

fn place(table: &Path) -> PathBuf {
    let mut name = table.as_os_str().to_owned();
    name.push(".journal");
    name.into()
}

impl Journal {
    /// An empty journal of a table that is at `step`, in place of the one there is. It is the new one or the old one, whole.
    pub(super) fn start(table: &Path, step: u64, durability: Durability) -> Result<Self, FileError> {
        let path = place(table);
        let temporary = path.with_extension(format!("journal.{}.tmp", std::process::id()));
        let mut start = [0; START];
        start[..8].copy_from_slice(&MAGIC);
        start[8..16].copy_from_slice(&step.to_le_bytes());
        let sum = crc(&[&start[..16]]);
        start[16..20].copy_from_slice(&sum.to_le_bytes());
        let made = (|| {
            let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&temporary)?;
            file.write_all(&start)?;
            if durability == Durability::Power {
                file.sync_all()?;
            }
            std::fs::rename(&temporary, &path)?;
            sync_folder(&path, durability)?;
            Ok(file)
        })();
        match made {
            Ok(file) => Ok(Self { path, file, end: START as u64, durability, record: Vec::new() }),
            Err(source) => {
                let _ = std::fs::remove_file(&temporary);
                Err(FileError::Open { path, source })
            }
        }
    }

    /// The step that the journal of a table begins with, and its whole records one after the other.
    pub(super) fn read(
        table: &Path,
        widest: u64,
        mut apply: impl FnMut(Record) -> Result<(), FileError>,
    ) -> Result<u64, FileError> {
        let path = place(table);
        let fail = |source| FileError::Open { path: path.clone(), source };
        let mut file = File::open(&path).map_err(fail)?;
        let mut left = file.metadata().map_err(fail)?.len();
        let mut start = [0; START];
        let whole = left >= START as u64;
        if whole {
            file.read_exact(&mut start).map_err(fail)?;
        }
        let word = |bytes: &[u8], at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        if !whole || start[..8] != MAGIC || word(&start, 16) != u64::from(crc(&[&start[..16]])) {
            return Err(FileError::Header {
                path,
                field: "journal",
                found: word(&start, 0),
                expected: word(&MAGIC, 0),
            });
        }
        left -= START as u64;
        let mut step = word(&start, 8);
        while left >= HEAD as u64 {
            let mut head = [0; HEAD];
            file.read_exact(&mut head).map_err(fail)?;
            left -= HEAD as u64;
            let (rows, bytes) = (word(&head, 8), word(&head, 16));
            // A record in full is next, or the end: a length that is none is not believed.
            if word(&head, 0) != step + 1 || bytes > left || rows.checked_mul(widest) != Some(bytes) {
                break;
            }
            let Ok(len) = usize::try_from(bytes) else { break };
            let mut body = vec![0; len];
            file.read_exact(&mut body).map_err(fail)?;
            left -= bytes;
            if word(&head, 24) != u64::from(crc(&[&head[..24], &body])) {
                break;
            }
            step += 1;
            let rows = usize::try_from(rows).unwrap_or(usize::MAX);
            apply(Record { rows, body })?;
        }
        Ok(step)
    }

    /// What its records survive.
    pub(super) fn durability(&self) -> Durability {
        self.durability
    }

    /// Bytes of the records.
    pub(super) fn bytes(&self) -> u64 {
        self.end - START as u64
    }

    /// Writes a record of `step`; when this returns it is where the durability says.
    pub(super) fn append(&mut self, step: u64, rows: usize, parts: [&[u8]; 3]) -> Result<(), FileError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut head = [0; HEAD];
        for (at, word) in [step, rows as u64, bytes as u64].into_iter().enumerate() {
            head[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let sum = crc(&[&head[..24], parts[0], parts[1], parts[2]]);
        head[24..28].copy_from_slice(&sum.to_le_bytes());
        self.record.clear();
        self.record.extend_from_slice(&head);
        parts.iter().for_each(|part| self.record.extend_from_slice(part));
        let len = self.record.len() as u64;
        let written = super::write_all_at(&self.file, &self.record, self.end).and_then(|()| match self.durability {
            Durability::Power => self.file.sync_data(),
            Durability::Process => Ok(()),
        });
        if let Err(source) = written {
            // What was written of it is no record, but room on a full disk.
            let _ = self.file.set_len(self.end);
            return Err(FileError::Write { path: self.path.clone(), at: self.end, len, source });
        }
        self.end += len;
        Ok(())
    }
}

/// Makes a rename in the folder of `path` last.
pub(super) fn sync_folder(path: &Path, durability: Durability) -> io::Result<()> {
    if durability == Durability::Power
        && let Some(folder) = path.parent()
    {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
