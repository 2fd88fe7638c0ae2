//! A table in training that stays in a file.

use core::marker::PhantomData;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use memlayer_core::{RowId, Table, TrainStore, Trainable};

use super::journal::{Journal, sync_folder};
use super::{FileError, FileRows, Locked, read_exact_at, write_all_at};
use crate::Cpu;

const MAGIC: [u8; 8] = *b"mltrain1";
/// The rows begin at a multiple of a page.
const HEADER: u64 = 4096;
/// About what reading or writing a row takes that the system has in memory.
const ROW_NANOS: usize = 2_000;

/// What a table survives at any moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The end of the process (`kill -9`), not of the machine: the system writes in its own time.
    #[default]
    Process,
    /// The loss of power too: every step waits until the drive has its record.
    Power,
}

/// A table of rows and of the state that their row rule keeps, in a file: larger than memory, trained in place.
///
/// A step is [`TrainedFile::load`] with the touched rows (those of a plan, ascending), an update of what that lends by
/// [`memlayer_core::ops::RowUpdate`], and [`TrainedFile::commit`]. Only the touched rows are in memory, and the bits are those of
/// a table in memory: rows are lent by their own ids.
///
/// Whatever happens, the file holds the table after a whole number of steps, and [`TrainedFile::open`] says after which:
/// `commit` writes the changed rows to a journal beside the file (`NAME.journal`) before it writes them in place, and opening
/// the table applies what the journal has. A step is lost only if its `commit` had not returned.
///
/// The rows lie one after the other from [`TrainedFile::layout`] on: [`super::MappedFile`] and [`super::CachedRows`] read them once the
/// training has ended. As long as this lives the file is locked: a second training, or a map, is refused.
#[derive(Debug)]
pub struct TrainedFile<E> {
    path: PathBuf,
    file: Locked,
    journal: Journal,
    shape: Shape,
    step: u64,
    /// A write in place failed: the journal knows better than the file.
    broken: bool,
    /// Bytes of journal after which the table is synced and the journal begun anew.
    limit: u64,
    ids: Vec<RowId>,
    codes: Vec<E>,
    state: Vec<f32>,
}

/// The sizes of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    rows: usize,
    dim: usize,
    state_len: usize,
    /// Bytes of a row's codes, and of its state.
    bytes: [u64; 2],
}

impl Shape {
    fn new<E: Trainable>(rows: usize, dim: usize, state_len: usize) -> Result<Self, FileError> {
        let size = |field, found: usize| FileError::Size { field, found: found as u64 };
        for (field, found) in [("rows", rows), ("dim", dim)] {
            if found == 0 {
                return Err(size(field, found));
            }
        }
        if u32::try_from(rows - 1).is_err() {
            return Err(size("rows", rows));
        }
        let bytes = |len: usize, size: usize| len.checked_mul(size).map(|n| n as u64);
        let codes = bytes(E::codes(dim), size_of::<E>()).ok_or(size("dim", dim))?;
        let state = bytes(state_len, 4).ok_or(size("state_len", state_len))?;
        let shape = Self { rows, dim, state_len, bytes: [codes, state] };
        shape.end().map(|_| shape).ok_or(size("rows", rows))
    }

    /// Where the codes of a row are, or its state.
    fn place(&self, part: usize, row: RowId) -> u64 {
        let start = HEADER + if part == 0 { 0 } else { self.rows as u64 * self.bytes[0] };
        start + u64::from(row) * self.bytes[part]
    }

    fn end(&self) -> Option<u64> {
        (self.rows as u64).checked_mul(self.bytes[0].checked_add(self.bytes[1])?)?.checked_add(HEADER)
    }

    /// Magic, rows, dim, state, number of the format, checksum.
    fn header<E: Trainable>(&self) -> [u8; 48] {
        let mut header = [0; 48];
        header[..8].copy_from_slice(&MAGIC);
        let numbers = [self.rows as u64, self.dim as u64, self.state_len as u64, number::<E>()];
        for (place, number) in header[8..40].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        let sum = crc32fast::hash(&header[..40]);
        header[40..44].copy_from_slice(&sum.to_le_bytes());
        header
    }
}

/// A format as the header has it: the first letters of its name.
fn number<E: Trainable>() -> u64 {
    E::FORMAT.name().bytes().take(8).fold(0, |all, byte| all << 8 | u64::from(byte))
}

impl<E: Trainable> TrainedFile<E> {
    /// A new table of `rows` rows of `dim` values with `state_len` scalars of state each, all zero; `fill` gets each row once,
    /// in order, to start it. The file appears when it is whole.
    ///
    /// # Errors
    /// [`FileError::Size`]; [`FileError::Open`] if there is such a file, or it cannot be written.
    pub fn create(
        path: &Path,
        (rows, dim, state_len): (usize, usize, usize),
        durability: Durability,
        mut fill: impl FnMut(RowId, &mut [E]),
    ) -> Result<Self, FileError> {
        let shape = Shape::new::<E>(rows, dim, state_len)?;
        let fail = |source| FileError::Open { path: path.to_owned(), source };
        if path.try_exists().map_err(fail)? {
            return Err(fail(std::io::ErrorKind::AlreadyExists.into()));
        }
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut write = || {
            let mut out = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
            let mut header = vec![0; usize::try_from(HEADER).unwrap_or(4096)];
            header[..48].copy_from_slice(&shape.header::<E>());
            out.write_all(&header)?;
            let mut row = vec![E::default(); E::codes(dim)];
            for id in 0..rows {
                row.fill(E::default());
                #[allow(clippy::cast_possible_truncation, reason = "checked: ids have 32 bits")]
                fill(id as RowId, &mut row);
                out.write_all(bytemuck::cast_slice(&row))?;
            }
            let zeros = vec![0; state_len * 4];
            (0..rows).try_for_each(|_| out.write_all(&zeros))?;
            out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
        };
        // The journal first: a table without one is not opened.
        let made = write()
            .map_err(fail)
            .and_then(|()| Journal::start(path, 0, durability))
            .and_then(|_| std::fs::rename(&temporary, path).and_then(|()| sync_folder(path, durability)).map_err(fail));
        if let Err(error) = made {
            let _ = std::fs::remove_file(&temporary);
            return Err(error);
        }
        Self::open(path, durability)
    }

    /// The table in a file, as it was after the last step whose `commit` returned, or one more.
    ///
    /// # Errors
    /// [`FileError::Locked`] if somebody reads or trains it; [`FileError::Header`] if it is no table of this format, or cut off;
    /// [`FileError::Open`], [`FileError::Io`], [`FileError::Write`].
    pub fn open(path: &Path, durability: Durability) -> Result<Self, FileError> {
        let fail = |source| FileError::Open { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
        let Ok(file) = Locked::alone(file) else { return Err(FileError::Locked { path: path.to_owned() }) };
        let len = file.metadata().map_err(fail)?.len();
        let shape = Self::shape(path, &file, len)?;
        // A step is applied as a whole: rows that are no table's are no record's.
        let step = Journal::read(path, 4 + shape.bytes[0] + shape.bytes[1], |record| {
            let (ids, rest) = record.body.split_at(4 * record.rows);
            let (codes, state) = rest.split_at(record.rows * len_of(shape.bytes[0]));
            let ids: Vec<RowId> = ids.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect();
            if let Some(&id) = ids.iter().find(|&&id| id as usize >= shape.rows) {
                return Err(FileError::Row { id, rows: shape.rows });
            }
            for (part, bytes) in [codes, state].into_iter().enumerate() {
                for (&id, bytes) in ids.iter().zip(bytes.chunks_exact(len_of(shape.bytes[part]).max(1))) {
                    write(path, &file, &shape, part, id, bytes)?;
                }
            }
            Ok(())
        })?;
        if durability == Durability::Power {
            file.sync_data().map_err(fail)?;
        }
        let journal = Journal::start(path, step, durability)?;
        let path = path.to_owned();
        let (ids, codes, state) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { path, file, journal, shape, step, broken: false, limit: 1 << 30, ids, codes, state })
    }

    fn shape(path: &Path, file: &File, len: u64) -> Result<Shape, FileError> {
        let wrong = |field, found, expected| FileError::Header { path: path.to_owned(), field, found, expected };
        if len < HEADER {
            return Err(wrong("length", len, HEADER));
        }
        let mut header = [0; 48];
        read_exact_at(file, &mut header, 0).map_err(|source| FileError::Io { at: 0, len: 48, source })?;
        let word = |at: usize| header[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        if header[..8] != MAGIC {
            return Err(wrong("magic", word(0), u64::from_le_bytes(MAGIC)));
        }
        let sum = u64::from(crc32fast::hash(&header[..40]));
        if word(40) != sum {
            return Err(wrong("checksum", word(40), sum));
        }
        if word(32) != number::<E>() {
            return Err(wrong("format", word(32), number::<E>()));
        }
        let size = |at| usize::try_from(word(at)).unwrap_or(usize::MAX);
        let shape = Shape::new::<E>(size(8), size(16), size(24))?;
        match shape.end() {
            Some(end) if end == len => Ok(shape),
            end => Err(wrong("length", len, end.unwrap_or(u64::MAX))),
        }
    }

    /// Steps that are in the table.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Where the rows lie, for who reads the file when it is trained.
    #[must_use]
    pub fn layout(&self) -> FileRows {
        let Shape { rows, dim, .. } = self.shape;
        FileRows { codes: HEADER, scales: None, rows, dim, group: dim }
    }

    /// How many bytes of journal there may be before the table is synced and the journal begun anew; 1 GiB at first.
    pub fn set_journal_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    /// Reads the rows `ids` (ascending, each once) with their state, by the threads of `readers`, and lends them to be changed.
    /// What was lent before and not committed is forgotten.
    ///
    /// # Errors
    /// [`FileError::Row`] for a row that is none, [`FileError::Size`] if the ids do not ascend, [`FileError::Io`],
    /// [`FileError::Broken`] after a write that failed.
    pub fn load(&mut self, readers: &Cpu, ids: &[RowId]) -> Result<LoadedRows<'_, E>, FileError> {
        self.sound()?;
        self.ids.clear();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(FileError::Size { field: "the next id", found: pair[1].into() });
        }
        if let Some(&id) = ids.last()
            && id as usize >= self.shape.rows
        {
            return Err(FileError::Row { id, rows: self.shape.rows });
        }
        let (width, state_len) = (E::codes(self.shape.dim), self.shape.state_len);
        self.codes.resize(ids.len() * width, E::default());
        self.state.resize(ids.len() * state_len, 0.0);
        let error = Mutex::new(None);
        let (file, shape) = (&self.file, &self.shape);
        let mut states = self.state.chunks_exact_mut(state_len.max(1));
        let items = ids.iter().zip(self.codes.chunks_exact_mut(width));
        let items = items.map(|(&id, codes)| (id, codes, states.next().unwrap_or(&mut [])));
        readers.pool.for_each(ids.len() * ROW_NANOS, items, |(id, codes, state)| {
            for (part, to) in [bytemuck::cast_slice_mut(codes), bytemuck::cast_slice_mut(state)].into_iter().enumerate()
            {
                let (at, len) = (shape.place(part, id), shape.bytes[part]);
                if let Err(source) = read_exact_at(file, to, at) {
                    *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(FileError::Io { at, len, source });
                }
            }
        });
        if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        self.ids.extend_from_slice(ids);
        Ok(LoadedRows {
            ids: &self.ids,
            codes: &mut self.codes,
            state: &mut self.state,
            shape: self.shape,
            elements: PhantomData,
        })
    }

    /// Writes what [`TrainedFile::load`] lent, as it is now, and counts a step: first to the journal, then in place, by the
    /// threads of `writers`.
    ///
    /// # Errors
    /// [`FileError::Write`]. If it names the journal, the table is as before the step. If it names the table, what is in the file
    /// is no longer known, and nothing is read from it any more; opening it again makes it whole, this step in it.
    pub fn commit(&mut self, writers: &Cpu) -> Result<u64, FileError> {
        self.sound()?;
        let (codes, state) = (bytemuck::cast_slice(&self.codes), bytemuck::cast_slice(&self.state));
        self.journal.append(self.step + 1, self.ids.len(), [bytemuck::cast_slice(&self.ids), codes, state])?;
        self.step += 1;
        let error = Mutex::new(None);
        let (path, file, shape) = (&self.path, &self.file, &self.shape);
        let rows = |part: usize, bytes| <[u8]>::chunks_exact(bytes, len_of(shape.bytes[part]).max(1));
        let mut states = rows(1, state);
        let items = self.ids.iter().zip(rows(0, codes)).map(|(&id, codes)| (id, [codes, states.next().unwrap_or(&[])]));
        writers.pool.for_each(self.ids.len() * ROW_NANOS, items, |(id, parts)| {
            for (part, bytes) in parts.into_iter().enumerate() {
                if let Err(failed) = write(path, file, shape, part, id, bytes) {
                    *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(failed);
                }
            }
        });
        self.ids.clear();
        self.codes.clear();
        self.state.clear();
        if let Some(error) = error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.broken = true;
            return Err(error);
        }
        if self.journal.bytes() > self.limit {
            self.settle()?;
        }
        Ok(self.step)
    }

    /// Makes the table whole without its journal, which begins anew.
    ///
    /// # Errors
    /// [`FileError::Open`] if the file cannot be synced, or the new journal not be written; the old one stays.
    pub fn settle(&mut self) -> Result<(), FileError> {
        self.sound()?;
        // Also where only the process may end: without the journal nothing could mend what the system had not written.
        self.file.sync_data().map_err(|source| FileError::Open { path: self.path.clone(), source })?;
        self.journal = Journal::start(&self.path, self.step, self.journal.durability())?;
        Ok(())
    }

    fn sound(&self) -> Result<(), FileError> {
        if self.broken { Err(FileError::Broken { path: self.path.clone() }) } else { Ok(()) }
    }
}

fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn write(path: &Path, file: &File, shape: &Shape, part: usize, id: RowId, bytes: &[u8]) -> Result<(), FileError> {
    let (at, len) = (shape.place(part, id), bytes.len() as u64);
    write_all_at(file, bytes, at).map_err(|source| FileError::Write { path: path.to_owned(), at, len, source })
}

/// Rows of a file with their state, lent to be changed. They have their own ids; other rows are not there.
#[derive(Debug)]
pub struct LoadedRows<'a, E> {
    /// Ascending.
    ids: &'a [RowId],
    codes: &'a mut [E],
    state: &'a mut [f32],
    shape: Shape,
    elements: PhantomData<E>,
}

impl<E: Trainable> Table for LoadedRows<'_, E> {
    type Elem = E;
    /// Rows of the table, not those that were loaded.
    fn rows(&self) -> usize {
        self.shape.rows
    }
    fn dim(&self) -> usize {
        self.shape.dim
    }
}

impl<E: Trainable> TrainStore for LoadedRows<'_, E> {
    type State = f32;

    fn state_len(&self) -> usize {
        self.shape.state_len
    }

    fn row_and_state(&mut self, id: RowId) -> (&mut [E], &mut [f32]) {
        let (width, state_len) = (E::codes(self.shape.dim), self.shape.state_len);
        let Ok(at) = self.ids.binary_search(&id) else { panic!("row {id} was not loaded") };
        (&mut self.codes[at * width..(at + 1) * width], &mut self.state[at * state_len..(at + 1) * state_len])
    }

    fn split_at(self, id: RowId) -> (Self, Self) {
        let at = self.ids.partition_point(|&row| row < id);
        let (ids, behind) = self.ids.split_at(at);
        let (codes, codes_behind) = self.codes.split_at_mut(at * E::codes(self.shape.dim));
        let (state, state_behind) = self.state.split_at_mut(at * self.shape.state_len);
        let (shape, elements) = (self.shape, PhantomData);
        (
            Self { ids, codes, state, shape, elements },
            Self { ids: behind, codes: codes_behind, state: state_behind, shape, elements },
        )
    }
}
