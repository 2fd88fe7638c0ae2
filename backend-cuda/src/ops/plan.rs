//! Plans, and the sums over them.

use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::{CHUNK, PlanBuffers, RowGradient, RowPlan};
use memlayer_core::{ArgError, Scratch, ScratchReq, Trainable};

use super::bag::check_rows;
use super::gradient::{Gradient, MixedGradient};
use super::{aligned, number_of, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant, trained_format};
use crate::launch::{Args, Shape};
use crate::memory::{View, ViewMut};

/// Threads of the kernels that sort, and the entries a block of them takes.
const THREADS: u32 = 256;
const TILE: usize = 2048;
/// Entries that one block plans, and its threads at most.
const FEW: usize = 4096;
const FEW_THREADS: usize = 1024;
/// Digits of the sort have this many bits at most.
const DIGIT_BITS: u32 = 8;
/// Blocks that sum squares.
const SUM_BLOCKS: u32 = 1024;
const PLAN: &str = "plan";
pub(crate) const VARIANT: Variant = Variant::of(File::Plan);

/// Entries of a plan, at most: kernels look a few rounds of rows ahead in 32 bits.
const MOST_ENTRIES: usize = 1 << 31;

/// A plan as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct PlanArg {
    unique: u64,
    rows: u64,
    starts: u64,
    entries: u64,
    entries_len: u32,
    padding: u32,
}

impl PlanArg {
    /// Fails unless the views of the plan fit together.
    pub(crate) fn new(op: &'static str, plan: &RowPlan<'_, Cuda>) -> Result<Self, CudaError> {
        use memlayer_core::error::check_len;
        let entries = plan.entries.len();
        if entries > MOST_ENTRIES {
            return Err(CudaError::Unsupported { op, what: "a plan of more than 2^31 entries" });
        }
        check_len(op, "unique", 1, plan.unique.len())?;
        check_len(op, "rows", entries, plan.rows.len())?;
        check_len(op, "starts", entries + 1, plan.starts.len())?;
        Ok(Self {
            unique: plan.unique.pointer(),
            rows: plan.rows.pointer(),
            starts: plan.starts.pointer(),
            entries: plan.entries.pointer(),
            entries_len: size(op, "entries", entries)?,
            padding: 0,
        })
    }
}

/// Where the gradients of rows go, as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Destination {
    pointer: u64,
    limit: u64,
    scatter: u32,
    padding: u32,
}

impl Destination {
    /// To `pointer`, where `limit` rows fit. If `scatter`, a gradient goes to the place of its row instead of its place in
    /// the plan.
    pub(crate) const fn new(pointer: u64, limit: usize, scatter: bool) -> Self {
        Self { pointer, limit: limit as u64, scatter: scatter as u32, padding: 0 }
    }
}

/// The lists of rows that are not short, as kernels take them: see `sums.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Lists {
    counts: u64,
    middle: u64,
    longest: u64,
}

impl Lists {
    /// Rows that fit on one list.
    const LEN: usize = 65_536;
    /// Words that the lists take; the counts come first.
    pub(crate) const WORDS: usize = 4 + 2 * Self::LEN;

    fn at(pointer: u64) -> Self {
        Self { counts: pointer, middle: pointer + 16, longest: pointer + 16 + 4 * Self::LEN as u64 }
    }
}

/// Columns of a row as kernels divide them: so many a thread at once.
pub(crate) const fn pieces(dim: usize, wide: bool) -> usize {
    dim.div_ceil(if wide { 4 } else { 1 })
}

/// Threads of a block that takes a row of `pieces` alone: one each, as far as a block goes.
pub(crate) fn row_block(pieces: usize) -> u32 {
    u32::try_from(pieces.next_multiple_of(32).clamp(32, 512)).unwrap_or(512)
}

/// Threads of a block that takes short rows: eight pieces each, for it is many rows at a time that hide how far apart
/// they are.
pub(crate) fn short_block(pieces: usize) -> u32 {
    u32::try_from(pieces.div_ceil(8).next_multiple_of(32).clamp(32, 256)).unwrap_or(256)
}

/// Columns of rows of `dim` that are summed at a time, so that those of the sources, of which one column has `sources` bytes,
/// stay in a cache of so many bytes, which sums written in codes of `bytes` pass through too.
fn slice(sources: usize, dim: usize, bytes: usize, cache: usize) -> usize {
    let fits = cache / (3 * bytes) / sources.max(1);
    // No warp is left with less than a piece for each lane.
    (fits / 128 * 128).max(128).min(dim)
}

impl Cuda {
    /// Empty lists.
    pub(crate) fn lists(&self) -> Result<Lists, CudaError> {
        let pointer = self.lists.view().pointer();
        self.stream.zero(pointer, 16)?;
        Ok(Lists::at(pointer))
    }

    /// [`RowReduce::reduce`] of sources in `S` to rows of `E`: the same sums, each rounded once, to nearest, as
    /// [`Trainable::store`] does without noise. Rows of bf16 are half of what is written.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit; rows and sources other than f32 and bf16 are not supported.
    pub fn reduce_as<E: Trainable, S: Trainable>(
        &self,
        plan: RowPlan<'_, Self>,
        gradient: MixedGradient<'_, S>,
        out: ViewMut<'_, E>,
    ) -> Result<(), CudaError> {
        const OP: &str = "reduce";
        let format = trained_format::<E>(OP)?;
        let limit = out.len().checked_div(gradient.dim).unwrap_or(0);
        let to = Destination::new(out.pointer(), limit, false);
        self.reduce_rows(OP, format, PlanArg::new(OP, &plan)?, Gradient::new(OP, &gradient, &plan)?, to)
    }

    /// The sums over the entries of every row.
    pub(crate) fn reduce_to(
        &self,
        op: &'static str,
        plan: PlanArg,
        gradient: Gradient,
        to: Destination,
    ) -> Result<(), CudaError> {
        self.reduce_rows(op, VARIANT.format, plan, gradient, to)
    }

    /// The same, to rows of a `format`.
    fn reduce_rows(
        &self,
        op: &'static str,
        format: u32,
        plan: PlanArg,
        gradient: Gradient,
        to: Destination,
    ) -> Result<(), CudaError> {
        let (entries, dim) = (plan.entries_len as usize, gradient.dim());
        let variant = VARIANT.format(format).source(gradient.format);
        if entries == 0 || dim == 0 {
            return Ok(());
        }
        let lists = self.lists()?;
        let wide = gradient.is_wide() && aligned(to.pointer, dim);
        let args = || {
            let args = Args::new().value(plan).value(gradient.arg).value(lists).value(to);
            args.value(self.flag.view().pointer()).value(number_of(op))
        };
        let kernel = self.kernels.get(variant, if wide { "reduce_short_4" } else { "reduce_short_1" })?;
        let sources = gradient.len() * gradient.code_bytes();
        let slice = slice(sources, dim, variant.code_bytes(), self.properties.cache);
        let shape = Shape::new(self.row_blocks(entries, 32), 32).by(dim.div_ceil(slice));
        let mut sliced = Args::new().value(plan).value(gradient.arg).value(lists).value(to);
        sliced = sliced.value(size(op, "width of the gradient", slice)?);
        sliced = sliced.value(self.flag.view().pointer()).value(number_of(op));
        self.stream.launch(&kernel, shape, &mut sliced)?;
        if entries > SHORT {
            let kernel = self.kernels.get(variant, if wide { "reduce_middle_4" } else { "reduce_middle_1" })?;
            let block = row_block(pieces(dim, wide));
            let rows = entries.div_ceil(SHORT);
            self.stream.launch(&kernel, Shape::new(self.row_blocks(rows, block), block), &mut args())?;
        }
        if entries > CHUNK {
            self.reduce_long(
                op,
                plan,
                gradient,
                lists,
                to,
                LongRows { format, first: 0, count: entries / CHUNK, slots: false },
            )?;
        }
        Ok(())
    }

    /// The sums over the entries of the longest rows.
    pub(crate) fn reduce_long(
        &self,
        op: &'static str,
        plan: PlanArg,
        gradient: Gradient,
        lists: Lists,
        to: Destination,
        rows: LongRows,
    ) -> Result<(), CudaError> {
        let dim = gradient.dim();
        let wide = gradient.is_wide() && aligned(to.pointer, dim);
        let variant = VARIANT.format(rows.format).source(gradient.format);
        let kernel = self.kernels.get(variant, if wide { "reduce_long_4" } else { "reduce_long_1" })?;
        let mut args = Args::new()
            .value(plan)
            .value(gradient.arg)
            .value(lists)
            .value(to)
            .value(size(op, "entries", rows.first)?)
            .value(u32::from(rows.slots))
            .value(self.flag.view().pointer())
            .value(number_of(op));
        self.stream.launch(&kernel, Shape::new(rows.count, 512).by(pieces(dim, wide).div_ceil(32)), &mut args)
    }

    /// A plan of at most [`FEW`] entries: one launch.
    fn plan_few(&self, ids: View<'_, u32>, rows: usize, out: PlanBuffers<'_, Self>) -> Result<(), CudaError> {
        let entries = ids.len();
        let (passes, bits) = passes(rows);
        let mut args = Args::new()
            .read(ids)
            .value(size(PLAN, "entries", entries)?)
            .value(rows as u64)
            .value(passes)
            .value(bits)
            .write(&out.unique)
            .write(&out.rows)
            .write(&out.starts)
            .write(&out.entries)
            .value(self.flag.view().pointer())
            .value(number_of(PLAN));
        // Each of the digits needs a thread.
        let threads = entries.next_multiple_of(32).clamp(1 << DIGIT_BITS, FEW_THREADS);
        let kernel = self.kernels.get(VARIANT, "plan_few")?;
        self.stream.launch(&kernel, Shape::new(1, u32::try_from(threads).unwrap_or(THREADS)), &mut args)
    }

    /// A plan of more entries: by many blocks, in as many launches as the digits of the ids need.
    fn plan_many(
        &self,
        ids: View<'_, u32>,
        rows: usize,
        out: PlanBuffers<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        let entries = ids.len();
        let tiles = entries.div_ceil(TILE).max(1);
        let (key_a, scratch) = scratch.take_ids(entries);
        let (key_b, scratch) = scratch.take_ids(entries);
        let (entry_b, scratch) = scratch.take_ids(entries);
        let (counts, scratch) = scratch.take_ids(tiles << DIGIT_BITS);
        let (totals, _) = scratch.take_ids(1 << DIGIT_BITS);
        let (count, all_tiles) = (size(PLAN, "entries", entries)?, size(PLAN, "entries", tiles)?);
        let (flag, op) = (self.flag.view().pointer(), number_of(PLAN));

        let (passes, bits) = passes(rows);
        let kernels = ["plan_histogram", "plan_scan", "plan_scatter", "plan_heads", "plan_write"];
        let [histogram, scan, scatter, heads, write] = kernels.map(|name| self.kernels.get(VARIANT, name));
        let (histogram, scan, scatter, heads, write) = (histogram?, scan?, scatter?, heads?, write?);
        let shape = Shape::new(tiles, THREADS);
        let mut sorted = (ids, out.entries.read());
        for pass in 0..passes {
            let first = u32::from(pass == 0);
            // The last pass ends in the plan's own entries.
            let to_plan = (passes - pass) % 2 == 1;
            let (keys_to, entries_to) = if to_plan { (&key_a, &out.entries) } else { (&key_b, &entry_b) };
            let (shift, digits) = (pass * bits, 1u32 << bits);
            let mut args = Args::new()
                .read(sorted.0)
                .value(count)
                .value(rows as u64)
                .value(shift)
                .value(digits)
                .write(&counts)
                .value(all_tiles)
                .value(first)
                .value(flag)
                .value(op);
            self.stream.launch(&histogram, shape, &mut args)?;
            let mut args = Args::new().write(&counts).value(all_tiles).write(&totals);
            self.stream.launch(&scan, Shape::new(digits as usize, THREADS), &mut args)?;
            let mut args = Args::new()
                .read(sorted.0)
                .read(sorted.1)
                .value(count)
                .value(rows as u64)
                .value(shift)
                .value(digits)
                .write(&counts)
                .write(&totals)
                .value(all_tiles)
                .value(first)
                .write(keys_to)
                .write(entries_to);
            self.stream.launch(&scatter, shape, &mut args)?;
            sorted = (keys_to.read(), entries_to.read());
        }
        let mut args = Args::new().read(sorted.0).value(count).write(&counts);
        self.stream.launch(&heads, shape, &mut args)?;
        let mut args = Args::new()
            .read(sorted.0)
            .value(count)
            .write(&counts)
            .write(&out.unique)
            .write(&out.rows)
            .write(&out.starts);
        self.stream.launch(&write, shape, &mut args)
    }

    /// Blocks for as many rows as there may be, no more than the device holds at once.
    pub(crate) fn row_blocks(&self, rows: usize, block: u32) -> usize {
        let resident = self.properties.multiprocessors as usize * (2048 / block as usize).min(32);
        rows.min(resident)
    }
}

/// Rows of more than [`CHUNK`] entries, by their places on the list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LongRows {
    /// The number of the format that the sums are written in.
    pub(crate) format: u32,
    pub(crate) first: usize,
    pub(crate) count: usize,
    /// Whether gradients go to the places counted from `first`.
    pub(crate) slots: bool,
}

/// Entries of a short row, as in `sums.cuh`.
pub(crate) const SHORT: usize = 32;

/// The digits that ids below `rows` are sorted by: how many passes, and bits of each.
fn passes(rows: usize) -> (u32, u32) {
    let bits = (usize::BITS - rows.saturating_sub(1).leading_zeros()).max(1);
    let passes = bits.div_ceil(DIGIT_BITS);
    (passes, bits.div_ceil(passes))
}

impl RowReduce for Cuda {
    fn plan_scratch(&self, entries: usize) -> ScratchReq {
        // Keys twice, entries once, counts of every digit in every tile, their totals.
        let tiles = entries.div_ceil(TILE).max(1);
        ScratchReq::new(0, 3 * entries + (tiles + 1) * (1 << DIGIT_BITS))
    }

    fn plan(
        &self,
        ids: View<'_, u32>,
        rows: usize,
        out: PlanBuffers<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        let entries = ids.len();
        out.check(entries)?;
        if entries > MOST_ENTRIES {
            return Err(CudaError::Unsupported { op: PLAN, what: "a plan of more than 2^31 entries" });
        }
        check_rows(PLAN, rows, entries)?;
        scratch.check(PLAN, self.plan_scratch(entries))?;
        if entries <= FEW { self.plan_few(ids, rows, out) } else { self.plan_many(ids, rows, out, scratch) }
    }

    fn reduce(
        &self,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        out: ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        self.reduce_as(plan, MixedGradient::from(gradient), out)
    }

    fn square_sum_scratch(&self, _entries: usize) -> ScratchReq {
        ScratchReq::new(SUM_BLOCKS as usize, 0)
    }

    fn square_sum(
        &self,
        plan: RowPlan<'_, Self>,
        dim: usize,
        grads: View<'_, f32>,
        out: ViewMut<'_, f32>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        const OP: &str = "square_sum";
        memlayer_core::error::check_len(OP, "out", 1, out.len())?;
        memlayer_core::error::check_len(OP, "unique", 1, plan.unique.len())?;
        scratch.check(OP, self.square_sum_scratch(plan.entries.len()))?;
        if dim == 0 {
            return Err(ArgError::Size { op: OP, operand: "dim", found: 0, multiple_of: 1 }.into());
        }
        let mut args = Args::new()
            .read(plan.unique)
            .value(size(OP, "dim", dim)?)
            .value(grads.len() as u64)
            .read(grads)
            .write(&scratch.reals)
            .value(self.flag.view().pointer())
            .value(number_of(OP));
        let kernel = self.kernels.get(VARIANT, "square_sums")?;
        self.stream.launch(&kernel, Shape::new(SUM_BLOCKS as usize, THREADS), &mut args)?;
        let mut args = Args::new().write(&scratch.reals).value(SUM_BLOCKS).write(&out);
        let kernel = self.kernels.get(VARIANT, "square_total")?;
        self.stream.launch(&kernel, Shape::new(1, 32), &mut args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_fit_into_the_cache() {
        assert_eq!(slice(4 * 4096, 4096, 4, 50 << 20), 256);
        assert_eq!(slice(4 * 4096, 4096, 2, 50 << 20), 512);
        assert_eq!(slice(2 * 4096, 4096, 2, 50 << 20), 1024);
        assert_eq!(slice(4 * 4096, 256, 4, 50 << 20), 256);
        assert_eq!(slice(4 << 20, 1000, 4, 50 << 20), 128);
        assert_eq!(slice(4, 17, 4, 0), 17);
        assert_eq!(slice(0, 1 << 16, 4, 50 << 20), 1 << 16);
    }

    #[test]
    fn passes_cover_every_id() {
        for rows in [1usize, 2, 3, 255, 256, 257, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 32] {
            let (passes, bits) = passes(rows);
            assert!(bits <= DIGIT_BITS && (1u128 << (passes * bits)) >= rows as u128, "{rows} rows");
        }
        assert_eq!(passes(1 << 20), (3, 7));
        assert_eq!(passes(1 << 24), (3, 8));
    }
}
