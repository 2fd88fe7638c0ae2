//! Rows of a file, read into a cache when they are wanted.

use core::hash::{BuildHasherDefault, Hasher};
use std::collections::HashMap;
use std::fs::File;
use std::sync::{Mutex, PoisonError};

use memlayer_core::{Element, Row, RowId, RowStore, Table};

use super::{FileError, read_exact_at};
use crate::Cpu;

/// Where the rows of a table lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRows {
    /// The byte that the codes begin at, row after row, little-endian.
    pub codes: u64,
    /// The byte that the scales begin at, `f32` row after row; none for rows without.
    pub scales: Option<u64>,
    /// Rows.
    pub rows: usize,
    /// V, values in a row.
    pub dim: usize,
    /// Values that share a scale.
    pub group: usize,
}

/// A table in a file, of which the rows used last are in memory.
///
/// All memory is taken at the start. A call's rows are read by all workers of the backend at once; a row that was used
/// since the hand of the clock last came by stays (second chance), and no row of a call gives way to another of it.
#[derive(Debug)]
pub struct CachedRows<E> {
    file: File,
    layout: FileRows,
    /// Codes and scales of a row.
    width: usize,
    groups: usize,
    codes: Vec<E>,
    scales: Vec<f32>,
    places: HashMap<RowId, u32, BuildHasherDefault<Fibonacci>>,
    held: Vec<Place>,
    /// The place that is asked next to give way.
    hand: usize,
    call: u64,
    /// Places that a call fills, in their order.
    wanted: Vec<u32>,
    read: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    row: Option<RowId>,
    /// Used since the hand came by.
    used: bool,
    /// The last call that used it.
    call: u64,
}

/// Ids are no secret: their product with the golden ratio spreads them.
#[derive(Debug, Default)]
struct Fibonacci(u64);

impl Hasher for Fibonacci {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(u32::from(byte)));
    }
    fn write_u32(&mut self, id: u32) {
        let product = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = product ^ product >> 32;
    }
}

impl<E: Element> CachedRows<E> {
    /// The rows at `layout` in `file`, of which at most `budget` bytes of codes and scales are in memory.
    ///
    /// # Errors
    /// [`FileError::Size`] if a size is zero or the budget holds no row; [`FileError::Short`]; [`FileError::Io`].
    pub fn new(file: File, layout: FileRows, budget: usize) -> Result<Self, FileError> {
        let FileRows { rows, dim, group, .. } = layout;
        let width = E::codes(dim);
        let size = |field, found: usize| FileError::Size { field, found: found as u64 };
        if width == 0 || (group == 0 && layout.scales.is_some()) {
            return Err(size(if width == 0 { "dim" } else { "group" }, 0));
        }
        if u32::try_from(rows.saturating_sub(1)).is_err() {
            return Err(size("rows", rows));
        }
        let groups = if layout.scales.is_some() { dim.div_ceil(group) } else { 0 };
        let row_bytes = width * size_of::<E>() + groups * size_of::<f32>();
        let places = (budget / row_bytes).min(rows);
        if places == 0 && rows > 0 {
            return Err(size("budget", budget));
        }
        let len = file.metadata().map_err(|source| FileError::Io { at: 0, len: 0, source })?.len();
        let end = |at: u64, bytes: usize| (rows as u64).checked_mul(bytes as u64).and_then(|n| at.checked_add(n));
        let ends = [end(layout.codes, width * size_of::<E>()), layout.scales.map_or(Some(0), |at| end(at, groups * 4))];
        for end in ends {
            let end = end.unwrap_or(u64::MAX);
            if end > len {
                return Err(FileError::Short { end, len });
            }
        }
        Ok(Self {
            file,
            layout,
            width,
            groups,
            codes: vec![bytemuck::Zeroable::zeroed(); places * width],
            scales: vec![0.0; places * groups],
            // Twice the room: then entries that are gone are cleared where they are, without new memory.
            places: HashMap::with_capacity_and_hasher(2 * places, BuildHasherDefault::default()),
            held: vec![Place { row: None, used: false, call: 0 }; places],
            hand: 0,
            call: 0,
            wanted: Vec::with_capacity(places),
            read: 0,
        })
    }

    /// Rows that the cache holds at most.
    #[must_use]
    pub fn places(&self) -> usize {
        self.held.len()
    }

    /// Rows that were read from the file since the start.
    #[must_use]
    pub fn rows_read(&self) -> u64 {
        self.read
    }

    /// Brings the rows `ids` into memory by the threads of `readers`, overwrites `places` with the places they have there, and lends the rows by
    /// their places: an operation over the view takes `places` for its ids.
    ///
    /// Reading threads wait more than they work. A drive that serves many reads at once wants a backend value with more
    /// threads than there are cores, made for this alone.
    ///
    /// # Errors
    /// [`FileError::Row`]; [`FileError::Full`] if the cache does not hold all different rows of the call;
    /// [`FileError::Size`] if `places` are not as many as `ids`; [`FileError::Io`]. After an error the cache is as good
    /// as before, without the rows that were to be read.
    pub fn load(&mut self, readers: &Cpu, ids: &[RowId], places: &mut [u32]) -> Result<CachedView<'_, E>, FileError> {
        if places.len() != ids.len() {
            return Err(FileError::Size { field: "places", found: places.len() as u64 });
        }
        self.call += 1;
        self.wanted.clear();
        let found = self.find(ids, places).and_then(|()| self.fill(readers));
        if let Err(error) = found {
            for &place in &self.wanted {
                if let Some(row) = self.held[place as usize].row.take() {
                    self.places.remove(&row);
                }
            }
            return Err(error);
        }
        self.read += self.wanted.len() as u64;
        Ok(CachedView {
            codes: &self.codes,
            scales: &self.scales,
            width: self.width,
            groups: self.groups,
            layout: self.layout,
        })
    }

    /// A place for every row; those that have to be read are `wanted`.
    fn find(&mut self, ids: &[RowId], places: &mut [u32]) -> Result<(), FileError> {
        for (&id, to) in ids.iter().zip(places) {
            let place = match self.places.get(&id) {
                Some(&place) => place,
                None if id as usize >= self.layout.rows => {
                    return Err(FileError::Row { id, rows: self.layout.rows });
                }
                None => {
                    let place = self.free_place().ok_or_else(|| self.full(ids))?;
                    self.held[place as usize].row = Some(id);
                    self.places.insert(id, place);
                    self.wanted.push(place);
                    place
                }
            };
            let held = &mut self.held[place as usize];
            (held.used, held.call) = (true, self.call);
            *to = place;
        }
        self.wanted.sort_unstable();
        Ok(())
    }

    /// A place whose row gives way, if there is one that this call does not use.
    fn free_place(&mut self) -> Option<u32> {
        // Once around to take the second chances, and once more to use what was left without.
        for _ in 0..2 * self.held.len() {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.held.len();
            let place = &mut self.held[at];
            if place.call == self.call {
                continue;
            }
            if core::mem::take(&mut place.used) {
                continue;
            }
            if let Some(row) = place.row.take() {
                self.places.remove(&row);
            }
            #[allow(clippy::cast_possible_truncation, reason = "no more places than rows, whose ids have 32 bits")]
            return Some(at as u32);
        }
        None
    }

    fn full(&self, ids: &[RowId]) -> FileError {
        let mut rows = ids.to_vec();
        rows.sort_unstable();
        rows.dedup();
        FileError::Full { rows: rows.len(), places: self.held.len() }
    }

    /// Reads what is `wanted`.
    fn fill(&mut self, readers: &Cpu) -> Result<(), FileError> {
        let error = Mutex::new(None);
        let (file, layout, held) = (&self.file, &self.layout, &self.held);
        let (width, groups) = (self.width, self.groups);
        let mut codes = Cut { rest: &mut self.codes[..], width, at: 0 };
        let mut scales = Cut { rest: &mut self.scales[..], width: groups, at: 0 };
        let items =
            self.wanted.iter().map(|&place| (held[place as usize].row, codes.piece(place), scales.piece(place)));
        readers.pool.for_each(self.wanted.len() * READ_NANOS, items, |(row, codes, scales)| {
            let mut read = || {
                let Some(row) = row else { return Ok(()) };
                read_row(file, layout.codes, row, bytemuck::cast_slice_mut(codes))?;
                match layout.scales {
                    Some(at) => read_row(file, at, row, bytemuck::cast_slice_mut(scales)),
                    None => Ok(()),
                }
            };
            if let Err(failed) = read() {
                *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(failed);
            }
        });
        error.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// About what a read takes that the system has in memory.
const READ_NANOS: usize = 2_000;

fn read_row(file: &File, start: u64, row: RowId, to: &mut [u8]) -> Result<(), FileError> {
    let len = to.len() as u64;
    let at = start + u64::from(row) * len;
    read_exact_at(file, to, at).map_err(|source| FileError::Io { at, len, source })
}

/// Cuts pieces of `width` items out of a slice, at ascending places.
struct Cut<'a, T> {
    rest: &'a mut [T],
    width: usize,
    /// The place that `rest` begins at.
    at: u32,
}

impl<'a, T> Cut<'a, T> {
    fn piece(&mut self, place: u32) -> &'a mut [T] {
        let rest = core::mem::take(&mut self.rest);
        let (_, rest) = rest.split_at_mut((place - self.at) as usize * self.width);
        let (piece, rest) = rest.split_at_mut(self.width);
        (self.rest, self.at) = (rest, place + 1);
        piece
    }
}

/// The rows in memory, by their places.
#[derive(Clone, Copy, Debug)]
pub struct CachedView<'a, E> {
    codes: &'a [E],
    scales: &'a [f32],
    width: usize,
    groups: usize,
    layout: FileRows,
}

impl<E: Element> Table for CachedView<'_, E> {
    type Elem = E;
    /// Places.
    fn rows(&self) -> usize {
        self.codes.len() / self.width
    }
    fn dim(&self) -> usize {
        self.layout.dim
    }
}

impl<E: Element> RowStore for CachedView<'_, E> {
    #[inline(always)]
    fn row(&self, place: RowId) -> Row<'_, E> {
        let (place, width, groups) = (place as usize, self.width, self.groups);
        Row {
            codes: &self.codes[place * width..(place + 1) * width],
            scales: &self.scales[place * groups..(place + 1) * groups],
            group: self.layout.group,
        }
    }
}
