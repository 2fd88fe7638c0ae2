//! Embedding bags: a block of columns stays in registers while the rows of a bag run past it, and the rows that come
//! next are asked for ahead of time.

use memlayer_core::element::Format;
use memlayer_core::error::check_ids;
use memlayer_core::ops::bag::{BagDot, BagSum, EmbeddingBag};
use memlayer_core::{ArgError, Element, RowStore};

use crate::Cpu;
use crate::isa::rows::{Columns, add_row, columns, dot_row};
use crate::isa::{Level, Simd, dispatch};

/// Bytes that are asked for before they are summed, as whole rows of a block; of the smallest rows half of that.
const AHEAD: usize = 8192;

/// Rows between the one that is summed and the one that is asked for a second time. (Sums of int8 rows of 256 from memory, one core of an
/// AMD EPYC: 26.6 ns a row with 4, 23.7 with 8 or 16.)
const NEAR: usize = 8;

/// Rows of a large table that are asked for at once. What asks keeps its place among the instructions that a processor has
/// under way until its page is found, and that may take 250 ns (a table of 1 GiB, a virtual machine): a row at a time, with the
/// sum of another between, few pages are looked for side by side. (Sums of e4m3 rows of 256 among 2^22, one core of an AMD EPYC:
/// 107 ns a row with 1, 65 with 16; among 2^20 31 and 27.)
pub(crate) const BURST: usize = 16;

/// Bytes from which on a table is large. Of rows in a cache, asking in bursts takes time that sums would else hide.
const LARGE: usize = 1 << 26;

/// Whether blocks of `width` columns of a table's rows are asked for in bursts.
#[inline(always)]
fn bursts<T: RowStore>(table: &T, width: usize) -> bool {
    let row = T::Elem::codes(table.dim()) * size_of::<T::Elem>();
    long::<T::Elem>(width) && table.rows().saturating_mul(row) >= LARGE
}

/// About how long a row of `dim` values takes, in nanoseconds.
pub(super) fn row_cost(dim: usize) -> usize {
    4 + dim / 8
}

impl<T: RowStore + Sync> EmbeddingBag<T> for Cpu {
    fn bag_sum(&self, table: &T, args: BagSum<'_, Self>) -> Result<(), ArgError> {
        let (dim, bag) = (table.dim(), args.bag);
        let tokens = args.check(dim)?;
        check_ids("bag_sum", args.ids, table.rows())?;
        // Without tokens a bag may have any size, also one that no product holds.
        if tokens == 0 {
            return Ok(());
        }
        let cost = bag * row_cost(dim);
        let piece = self.piece(tokens, cost);
        let pieces = args.out.chunks_mut((piece * dim).max(1)).enumerate();
        self.pool.for_each(tokens * cost, pieces, |(i, out)| {
            let (ids, weights) = (&args.ids[i * piece * bag..], &args.weights[i * piece * bag..]);
            dispatch!(self.token, s => {
                for (t, out) in out.chunks_exact_mut(dim).enumerate() {
                    let (ids, weights) = (&ids[t * bag..], &weights[t * bag..(t + 1) * bag]);
                    let (accumulate, whole) = (args.accumulate, self.whole_rows);
                    let mut sum = Sum { table, ids, weights, out, accumulate, whole };
                    columns(s, dim, &mut sum);
                }
            });
        });
        Ok(())
    }

    fn bag_dot(&self, table: &T, args: BagDot<'_, Self>) -> Result<(), ArgError> {
        let (dim, bag) = (table.dim(), args.bag);
        let tokens = args.check(dim)?;
        check_ids("bag_dot", args.ids, table.rows())?;
        if tokens == 0 {
            return Ok(());
        }
        let cost = bag * row_cost(dim);
        let piece = self.piece(tokens, cost);
        let pieces = args.out.chunks_mut(piece * bag).enumerate();
        self.pool.for_each(tokens * cost, pieces, |(i, out)| {
            let (ids, vectors) = (&args.ids[i * piece * bag..], &args.vectors[i * piece * dim..]);
            dispatch!(self.token, s => {
                for (t, out) in out.chunks_exact_mut(bag).enumerate() {
                    let (ids, vector) = (&ids[t * bag..], &vectors[t * dim..(t + 1) * dim]);
                    columns(s, dim, &mut Dot { table, row: |l: usize| ids.get(l).copied(), vector, out, far: true });
                }
            });
        });
        Ok(())
    }
}

/// Rows that [`AHEAD`] bytes are, in a block of `width` columns. Few choices, so that the compiler knows them where it
/// knows the width.
#[inline(always)]
fn ahead<E: Element>(width: usize) -> usize {
    match E::codes(width) * size_of::<E>() {
        ..=128 => AHEAD / 128,
        129..=256 => AHEAD / 256,
        _ => AHEAD / 512,
    }
}

/// Whether a block of a row is more than two lines.
#[inline(always)]
fn long<E: Element>(width: usize) -> bool {
    E::codes(width) * size_of::<E>() > 128
}

/// Asks for what row `l` of a bag gives reason to: the row that comes [`AHEAD`] bytes after it, with `BURSTS` at the first of
/// each [`BURST`] rows, and one that is [`NEAR`] once more.
#[inline(always)]
fn ask<S: Simd, T: RowStore, const BURSTS: bool>(
    s: S,
    table: &T,
    row: impl Fn(usize) -> Option<u32>,
    (l, bag): (usize, usize),
    columns: (usize, usize),
) {
    // This first: behind the other, sums of int4 rows took a twelfth more instructions (AVX2).
    ask_near(s, table, &row, (l, bag), columns);
    if !BURSTS {
        ask_far(s, table, row, (l, bag), columns);
    } else if l.is_multiple_of(BURST) {
        for l in l..bag.min(l + BURST) {
            ask_far(s, table, &row, (l, bag), columns);
        }
    }
}

/// Asks for the row that comes [`AHEAD`] bytes after row `l` of a bag, in the second-level cache: in this block of columns,
/// the next block, or the next bag, whose rows follow if `row` knows them.
#[inline(always)]
fn ask_far<S: Simd, T: RowStore>(
    s: S,
    table: &T,
    row: impl Fn(usize) -> Option<u32>,
    (l, bag): (usize, usize),
    (col, width): (usize, usize),
) {
    let ahead = l + ahead::<T::Elem>(width);
    let (l, start) = match (ahead < bag, col + width < table.dim()) {
        (true, _) => (ahead, col),
        (false, true) => (ahead - bag, col + width),
        (false, false) => (ahead, 0),
    };
    if let Some(id) = row(l) {
        let row = table.row(id);
        if start == 0 {
            table.prefetch(id);
            // Where there are none their address is no memory's, and asking for it costs a walk of the page tables.
            if let Some(scale) = row.scales.first() {
                s.prefetch(Level::Second, core::ptr::from_ref(scale).cast());
            }
        }
        // A row's codes are as many as its values, or fewer where a code holds several. A whole block has so many lines as
        // the compiler knows; the last of a row may be less.
        let (start, count) = (T::Elem::codes(start), T::Elem::codes(width));
        let codes = match row.codes.get(start..start + count) {
            Some(codes) => {
                s.prefetch_all(Level::Second, &codes[..count]);
                codes
            }
            None => {
                let codes = row.codes.get(start..).unwrap_or(&[]);
                s.prefetch_all(Level::Second, codes);
                codes
            }
        };
        // Groups with their scales are no power of two long: a block of them begins anywhere in a line, and may end in one
        // line more than it has.
        if T::Elem::codes(64) != 64
            && let Some(last) = codes.last()
        {
            s.prefetch(Level::Second, core::ptr::from_ref(last).cast());
        }
    }
}

/// Asks for a row that is [`NEAR`], and more than two lines, in the first-level cache: what is widened is loaded a part of a
/// line at a time, and all parts of a line would wait for it. Not so f32, which is loaded a line at a time.
#[inline(always)]
fn ask_near<S: Simd, T: RowStore>(
    s: S,
    table: &T,
    row: impl Fn(usize) -> Option<u32>,
    (l, bag): (usize, usize),
    (col, width): (usize, usize),
) {
    if long::<T::Elem>(width)
        && T::Elem::FORMAT != Format::F32
        && l + NEAR < bag
        && let Some(id) = row(l + NEAR)
        && let Some(codes) = table.row(id).codes.get(T::Elem::codes(col)..T::Elem::codes(col) + T::Elem::codes(width))
    {
        s.prefetch_all(Level::First, &codes[..T::Elem::codes(width)]);
    }
}

/// `out = Σ weights · rows`, over the first rows of `ids`; those behind them come next.
struct Sum<'a, T> {
    table: &'a T,
    ids: &'a [u32],
    weights: &'a [f32],
    out: &'a mut [f32],
    accumulate: bool,
    /// Whether rows of `f32` are read whole ([`crate::isa::sums_whole_rows`]).
    whole: bool,
}

impl<T: RowStore> Sum<'_, T> {
    /// Whether these are rows of `f32` that are read whole.
    #[inline(always)]
    fn whole(&self) -> bool {
        T::Elem::FORMAT == Format::F32 && self.whole
    }

    /// Adds the rows to a block of columns.
    #[inline(always)]
    fn rows<S: Simd, const NV: usize, const BURSTS: bool>(&self, s: S, acc: &mut [S::V; NV], col: usize) {
        let (bag, width) = (self.weights.len(), NV * S::LANES);
        for (l, (&id, &weight)) in self.ids.iter().zip(self.weights).enumerate() {
            ask::<S, T, BURSTS>(s, self.table, |l| self.ids.get(l).copied(), (l, bag), (col, width));
            add_row(s, acc, weight, &self.table.row(id), col);
        }
    }
}

impl<T: RowStore> Columns for Sum<'_, T> {
    // Rows of more bytes are slower so on most processors, and groups of int4, whose products take registers too.
    #[inline(always)]
    fn wide(&self) -> bool {
        matches!(T::Elem::FORMAT, Format::Int8 | Format::E4m3 | Format::E5m2) || self.whole()
    }

    #[inline(always)]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        let width = NV * S::LANES;
        let mut acc = [s.splat(0.0); NV];
        if !self.whole() && bursts(self.table, width) {
            self.rows::<S, NV, true>(s, &mut acc, col);
        } else {
            self.rows::<S, NV, false>(s, &mut acc, col);
        }
        let out = &mut self.out[col..col + width];
        if self.accumulate {
            for (out, acc) in out.chunks_exact(S::LANES).zip(&mut acc) {
                *acc = s.add(s.load(out), *acc);
            }
        }
        for (out, acc) in out.chunks_exact_mut(S::LANES).zip(acc) {
            s.store(acc, out);
        }
    }
}

/// `out[l] = <vector, row(l)>`.
pub(super) struct Dot<'a, T, R> {
    pub(super) table: &'a T,
    /// Row `l`, and those that will be read after the last, if known.
    pub(super) row: R,
    pub(super) vector: &'a [f32],
    pub(super) out: &'a mut [f32],
    /// Whether rows are asked for ahead of time: they may be far.
    pub(super) far: bool,
}

impl<T: RowStore, R: Fn(usize) -> Option<u32>> Dot<'_, T, R> {
    /// The dots of a block of columns.
    #[inline(always)]
    fn rows<S: Simd, const NV: usize, const BURSTS: bool>(&mut self, s: S, col: usize) {
        let (bag, width) = (self.out.len(), NV * S::LANES);
        let vector = &self.vector[col..col + width];
        let mut x = [s.splat(0.0); NV];
        for (i, x) in x.iter_mut().enumerate() {
            *x = s.load(&vector[i * S::LANES..]);
        }
        for (l, out) in self.out.iter_mut().enumerate() {
            if self.far {
                ask::<S, T, BURSTS>(s, self.table, &self.row, (l, bag), (col, width));
            }
            let Some(id) = (self.row)(l) else { return };
            let dot = dot_row(s, &x, &self.table.row(id), col);
            *out = if col == 0 { dot } else { *out + dot };
        }
    }
}

impl<T: RowStore, R: Fn(usize) -> Option<u32>> Columns for Dot<'_, T, R> {
    #[inline(always)]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        if self.far && bursts(self.table, NV * S::LANES) {
            self.rows::<S, NV, true>(s, col);
        } else {
            self.rows::<S, NV, false>(s, col);
        }
    }
}

#[cfg(test)]
mod tests {
    use memlayer_core::{DenseRows, Random};

    use super::*;
    use crate::isa::{Isa, Token};

    #[test]
    fn sums_of_whole_rows_have_the_bits_of_those_in_blocks() {
        // Columns for each kind of block: 256 + 128 + 64 + 32 + 16 + 8 + 4 + 3.
        const DIM: usize = 511;
        let random = &mut Random::new(5);
        let (rows, bag) = (LARGE / 4 / DIM + 1, 37);
        #[allow(clippy::cast_possible_truncation, reason = "fewer than 2^32 rows")]
        let ids: Vec<u32> = (0..bag).map(|_| random.below(rows) as u32).collect();
        let mut values = vec![0.0; rows * DIM];
        for &id in &ids {
            random.fill_normal(&mut values[id as usize * DIM..][..DIM], 1.0);
        }
        let table = DenseRows::new(&values, DIM);
        let mut weights = vec![0.0; bag];
        random.fill_normal(&mut weights, 1.0);
        for token in Isa::available().filter_map(Token::new) {
            let sum = |whole| -> Vec<u32> {
                let mut out = vec![f32::NAN; DIM];
                let mut sum =
                    Sum { table: &table, ids: &ids, weights: &weights, out: &mut out, accumulate: false, whole };
                dispatch!(token, s => columns(s, DIM, &mut sum));
                out.iter().map(|x| x.to_bits()).collect()
            };
            assert_eq!(sum(true), sum(false), "{token:?}");
        }
    }
}
