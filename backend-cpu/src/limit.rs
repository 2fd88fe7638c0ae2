//! How fast this machine reads rows at all: what a bag of rows of that size can at best take.

use core::sync::atomic::{AtomicU64, Ordering};

use memlayer_core::ArgError;
use memlayer_core::error::check_ids;

use crate::Cpu;
use crate::isa::{Simd, dispatch};
use crate::ops::piece;

/// Bytes of a row that are read in one go.
const BLOCK: usize = 512;

/// Rows in a group.
const GROUP: usize = 128;

/// Nanoseconds that a row is reckoned with when work is cut into pieces.
const ROW_COST: usize = 16;

impl Cpu {
    /// Reads the rows `ids` of a table of rows of `row_bytes` and does next to nothing with them, asking for each
    /// `ahead` rows before: a limit to measure [`memlayer_core::ops::EmbeddingBag::bag_sum`] against, with the same
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
        let block = |id: u32, col: usize| {
            let row = &table[id as usize * row_bytes..][..row_bytes];
            &row[col..row_bytes.min(col + BLOCK)]
        };
        let piece = piece(ids.len(), ROW_COST).next_multiple_of(GROUP);
        self.pool.for_each(ids.len() * ROW_COST, ids.chunks(piece).enumerate(), |(i, mine)| {
            let part = dispatch!(self.token, s => {
                let mut sum = 0u64;
                for (g, group) in mine.chunks(GROUP).enumerate() {
                    // What comes behind the group in this order is its next block, or the next group.
                    let behind = ids.get(i * piece + (g + 1) * GROUP..).unwrap_or(&[]);
                    for col in (0..row_bytes).step_by(BLOCK) {
                        let last = col + BLOCK >= row_bytes;
                        let (rest, at) = if last { (behind, 0) } else { (group, col + BLOCK) };
                        for (l, &id) in group.iter().enumerate() {
                            let next = group.get(l + ahead).map(|&id| block(id, col));
                            let next = next.or_else(|| Some(block(*rest.get(l + ahead - group.len())?, at)));
                            s.prefetch_all(next.unwrap_or(&[]));
                            touch(&mut sum, block(id, col));
                        }
                    }
                }
                sum
            });
            sum.fetch_add(part, Ordering::Relaxed);
        });
        Ok(sum.into_inner())
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
