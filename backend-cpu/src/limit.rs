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
    /// rows after the other, which is faster where the hardware fetches ahead. Gives the sum of the rows' words, so
    /// that no read can be left out; bytes behind the last whole word of a row are not read.
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
                let mut sums = [0u64; 8];
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
                            add_words(&mut sums, block(id, col));
                        }
                    }
                }
                sums.iter().fold(0u64, |a, b| a.wrapping_add(*b))
            });
            sum.fetch_add(part, Ordering::Relaxed);
        });
        Ok(sum.into_inner())
    }
}

/// Adds whole lines to eight sums that stay in a register, and the words behind them to one.
#[inline(always)]
fn add_words(sums: &mut [u64; 8], bytes: &[u8]) {
    let (lines, rest) = bytes.as_chunks::<64>();
    for line in lines {
        let (words, _) = line.as_chunks::<8>();
        for i in 0..8 {
            sums[i] = sums[i].wrapping_add(u64::from_le_bytes(words[i]));
        }
    }
    let rest = rest.as_chunks::<8>().0.iter().fold(0u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    sums[0] = sums[0].wrapping_add(rest);
}
