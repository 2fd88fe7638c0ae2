//! How fast this machine reads rows at all: what a bag of rows of that size can at best take.

use core::sync::atomic::{AtomicU64, Ordering};

use memlayer_core::ArgError;
use memlayer_core::error::check_ids;

use crate::Cpu;
use crate::isa::{Level, Simd, dispatch};
use crate::ops::bag::BURST;

/// Bytes of a row that are read in one go.
const BLOCK: usize = 512;

/// Rows in a group.
const GROUP: usize = 128;

/// Nanoseconds that a row is reckoned with when work is cut into pieces.
const ROW_COST: usize = 16;

impl Cpu {
    /// Reads the rows `ids` of a table of rows of `row_bytes` and does next to nothing with them, asking for each some
    /// `ahead` rows before, many at once: a limit to measure [`memlayer_core::ops::EmbeddingBag::bag_sum`] against, with the same
    /// workers on the same memory. Rows longer than 512 bytes are read as bags are: block by block, each of a group of
    /// rows after the other, which is faster where the hardware fetches ahead. Gives the sum of a word of every 64 bytes,
    /// so that no read can be left out; fewer than eight bytes at the end of a row are not read.
    ///
    /// # Errors
    /// [`ArgError`] if an id is no row, or a row has no bytes.
    pub fn read_rows(&self, table: &[u8], row_bytes: usize, ids: &[u32], ahead: usize) -> Result<u64, ArgError> {
        if row_bytes == 0 {
            return Err(ArgError::Size { op: "read_rows", operand: "row_bytes", found: 0, multiple_of: 1 });
        }
        check_ids("read_rows", ids, table.len() / row_bytes)?;
        let sum = AtomicU64::new(0);
        let piece = self.piece(ids.len(), ROW_COST).next_multiple_of(GROUP);
        self.pool.for_each(ids.len() * ROW_COST, (0..ids.len()).step_by(piece), |start| {
            let part = Part { table, ids, range: start..(start + piece).min(ids.len()), ahead };
            let part = dispatch!(self.token, s => match row_bytes {
                64 => part.read(s, Whole::<64>),
                128 => part.read(s, Whole::<128>),
                256 => part.read(s, Whole::<256>),
                512 => part.read(s, Whole::<512>),
                1024 => part.read(s, Whole::<1024>),
                2048 => part.read(s, Whole::<2048>),
                4096 => part.read(s, Whole::<4096>),
                _ => part.read(s, Any(row_bytes)),
            });
            sum.fetch_add(part, Ordering::Relaxed);
        });
        Ok(sum.into_inner())
    }
}

/// How long rows are: a limit must not wait for its own arithmetic, so that for usual lengths the compiler knows it.
trait Rows {
    fn bytes(&self) -> usize;
    /// The block of a row from byte `col` on.
    fn block<'a>(&self, table: &'a [u8], id: u32, col: usize) -> &'a [u8];
}

struct Whole<const BYTES: usize>;

impl<const BYTES: usize> Rows for Whole<BYTES> {
    #[inline(always)]
    fn bytes(&self) -> usize {
        BYTES
    }
    #[inline(always)]
    fn block<'a>(&self, table: &'a [u8], id: u32, col: usize) -> &'a [u8] {
        &table.as_chunks::<BYTES>().0[id as usize][col..col + BYTES.min(BLOCK)]
    }
}

struct Any(usize);

impl Rows for Any {
    #[inline(always)]
    fn bytes(&self) -> usize {
        self.0
    }
    #[inline(always)]
    fn block<'a>(&self, table: &'a [u8], id: u32, col: usize) -> &'a [u8] {
        &table[id as usize * self.0..][..self.0][col..self.0.min(col + BLOCK)]
    }
}

/// The rows of one piece of work.
struct Part<'a> {
    table: &'a [u8],
    ids: &'a [u32],
    range: core::ops::Range<usize>,
    ahead: usize,
}

impl Part<'_> {
    #[inline(always)]
    fn read<S: Simd>(&self, s: S, rows: impl Rows) -> u64 {
        let (ahead, mut sum) = (self.ahead, 0u64);
        for start in self.range.clone().step_by(GROUP) {
            let group = &self.ids[start..self.range.end.min(start + GROUP)];
            // What comes behind the group in this order is its next block, or the next group.
            let behind = &self.ids[start + group.len()..];
            for col in (0..rows.bytes()).step_by(BLOCK) {
                let last = col + BLOCK >= rows.bytes();
                let (rest, at) = if last { (behind, 0) } else { (group, col + BLOCK) };
                for (i, burst) in group.chunks(BURST).enumerate() {
                    let (first, end) = (i * BURST + ahead, i * BURST + ahead + burst.len());
                    for &next in group.iter().take(end).skip(first) {
                        s.prefetch_all(Level::Second, rows.block(self.table, next, col));
                    }
                    for &next in
                        rest.iter().take(end.saturating_sub(group.len())).skip(first.saturating_sub(group.len()))
                    {
                        s.prefetch_all(Level::Second, rows.block(self.table, next, at));
                    }
                    for &id in burst {
                        touch(&mut sum, rows.block(self.table, id, col));
                    }
                }
            }
        }
        sum
    }
}

/// Adds a word of each line, or of 64 bytes from the first on: whoever reads one has the line.
#[inline(always)]
fn touch(sum: &mut u64, bytes: &[u8]) {
    for line in bytes.chunks(64) {
        let word = line.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        *sum = sum.wrapping_add(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_every_row_is_read() {
        let table: Vec<u8> = (0..1 << 16).map(|i: u32| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
        for threads in [1, 3] {
            let cpu = Cpu::builder().threads(threads).build().expect("a backend");
            for row_bytes in [4, 36, 64, 100, 144, 256, 512, 1000, 1024, 4096] {
                let rows = table.len() / row_bytes;
                let ids: Vec<u32> =
                    (0..2000u32).map(|i| i.wrapping_mul(7919) % u32::try_from(rows).expect("few")).collect();
                let words = |&id: &u32| {
                    let row = &table[id as usize * row_bytes..][..row_bytes];
                    row.chunks(64)
                        .filter_map(|line| Some(u64::from_le_bytes(*line.first_chunk()?)))
                        .fold(0, u64::wrapping_add)
                };
                let expected = ids.iter().map(words).fold(0, u64::wrapping_add);
                for ahead in [0, 8, 200] {
                    let found = cpu.read_rows(&table, row_bytes, &ids, ahead);
                    assert_eq!(found.expect("rows that are there"), expected, "{row_bytes} bytes, {ahead} ahead");
                }
            }
        }
    }
}
