//! Tables in the host's memory, with a cache of their rows on the device.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use memlayer_core::error::check_len;
use memlayer_core::ops::plan::{PlanBuffers, RowPlan};
use memlayer_core::{Device, Element, Trainable};

use super::{number_of, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant};
use crate::launch::{Args, Pinned, Shape};
use crate::memory::{Buffer, Rows, TrainRows, View, ViewMut};

const THREADS: u32 = 256;
/// Words of `counts` in `cache.cu`.
const COUNTS: usize = 4 + 34;
/// Blocks that move rows: so many rows are under way.
const MOVERS: usize = 1024;

/// A table too large for the device: rows, and the state that a row rule keeps for each, in pinned memory of the host, and
/// as many of them on the device as there is room for.
///
/// A call's rows are planned ([`memlayer_core::ops::RowReduce::plan`]) and loaded ([`CachedTable::load`]). Operations then run
/// over [`CachedTable::rows`] with the places of the rows for ids ([`CachedTable::translate`]), and updates over
/// [`CachedTable::train_rows`] with the places of the plan's rows ([`CachedTable::translate_plan`]). Every result has the bits
/// it has over a table on the device.
///
/// Rows that have to go are those whose last use is longest ago. Nothing comes back to the host's program in a step.
///
/// Do not record a load in a graph ([`Cuda::graph`]): each has a number, and is told whether rows were changed before it, so
/// that a replay would not know which rows are old, and could drop changes.
pub struct CachedTable<E> {
    codes: Buffer<E>,
    state: Buffer<f32>,
    host_codes: Pinned<E>,
    host_state: Pinned<f32>,
    /// `[rows]`: the place of each, or `u32::MAX`.
    places: Buffer<u32>,
    /// `[capacity]`: the row in each place, or `u32::MAX`.
    names: Buffer<u32>,
    stamps: Buffer<u32>,
    counts: Buffer<u32>,
    missing: Buffer<u32>,
    victims: Buffer<u32>,
    sizes: Sizes,
    stream: Arc<CudaStream>,
    /// The number of the last load.
    now: u32,
    /// Whether rows on the device may differ from those on the host.
    changed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    rows: usize,
    dim: usize,
    state_len: usize,
    capacity: usize,
}

/// A cache as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct CacheArg {
    places: u64,
    names: u64,
    stamps: u64,
    counts: u64,
    missing: u64,
    victims: u64,
    rows: u64,
    capacity: u32,
    now: u32,
}

/// Rows or states as kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct PartArg {
    host: u64,
    device: u64,
    bytes: u64,
}

impl Cuda {
    /// A table of `rows` rows of `dim` values with `state_len` scalars of state each, all of them zero, in pinned memory of
    /// the host, and room for `capacity` of them on the device: at least as many as a call touches.
    ///
    /// # Errors
    /// [`CudaError::Unsupported`] if a size is zero, or too large for this machine or for 32-bit ids; the driver's where
    /// there is not enough memory.
    pub fn cached_table<E: Element>(
        &self,
        rows: usize,
        dim: usize,
        state_len: usize,
        capacity: usize,
    ) -> Result<CachedTable<E>, CudaError> {
        const OP: &str = "cached_table";
        let unsupported = |what| CudaError::Unsupported { op: OP, what };
        if rows == 0 || dim == 0 || capacity == 0 {
            return Err(unsupported("a table without rows, values or places"));
        }
        let (all, places) = (size(OP, "rows", rows)?, size(OP, "places", capacity)?);
        if all == u32::MAX || places == u32::MAX {
            return Err(unsupported("that many rows"));
        }
        let too_large = || unsupported("a table of that size");
        let codes = rows.checked_mul(E::codes(dim)).ok_or_else(too_large)?;
        let states = rows.checked_mul(state_len).ok_or_else(too_large)?;
        let cached = |width: usize| capacity.checked_mul(width).ok_or_else(too_large);
        let table = CachedTable {
            codes: self.zeros(cached(E::codes(dim))?)?,
            state: self.zeros(cached(state_len)?)?,
            host_codes: Pinned::zeroed(&self.stream, codes)?,
            host_state: Pinned::zeroed(&self.stream, states)?,
            places: self.zeros(rows)?,
            names: self.zeros(capacity)?,
            stamps: self.zeros(capacity)?,
            counts: self.zeros(COUNTS)?,
            missing: self.zeros(capacity)?,
            victims: self.zeros(capacity)?,
            sizes: Sizes { rows, dim, state_len, capacity },
            stream: self.stream().clone(),
            now: 0,
            changed: false,
        };
        for all in [&table.places, &table.names] {
            self.stream.fill(all.view().pointer(), 0xff, all.len() * 4)?;
        }
        Ok(table)
    }
}

impl<E: Element> CachedTable<E> {
    /// Rows of the table.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.sizes.rows
    }
    /// Whether there are none: never.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.sizes.rows == 0
    }
    /// Rows that the device has room for.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.sizes.capacity
    }

    fn arg(&self) -> CacheArg {
        #[allow(clippy::cast_possible_truncation, reason = "checked when the table was made")]
        CacheArg {
            places: self.places.view().pointer(),
            names: self.names.view().pointer(),
            stamps: self.stamps.view().pointer(),
            counts: self.counts.view().pointer(),
            missing: self.missing.view().pointer(),
            victims: self.victims.view().pointer(),
            rows: self.sizes.rows as u64,
            capacity: self.sizes.capacity as u32,
            now: self.now,
        }
    }

    /// Rows, states, and the bytes that both can be copied by.
    fn parts(&self) -> (PartArg, PartArg, u32) {
        let bytes = [E::codes(self.sizes.dim) * size_of::<E>(), self.sizes.state_len * 4].map(|n| n as u64);
        let unit = [16, 4].into_iter().find(|unit| bytes.iter().all(|n| n.is_multiple_of(*unit))).unwrap_or(1);
        let part = |host, device, bytes| PartArg { host, device, bytes };
        #[allow(clippy::cast_possible_truncation, reason = "at most 16")]
        (
            part(self.host_codes.pointer(), self.codes.view().pointer(), bytes[0]),
            part(self.host_state.pointer(), self.state.view().pointer(), bytes[1]),
            unit as u32,
        )
    }

    /// Fails if a plan has more rows than there is room for, before anything is loaded. Only where it has more entries than
    /// that is its number of rows asked for, and the device waited for.
    ///
    /// # Errors
    /// [`CudaError::Room`], or the driver's.
    pub fn check_room(&self, cuda: &Cuda, plan: &RowPlan<'_, Cuda>) -> Result<(), CudaError> {
        let capacity = self.sizes.capacity;
        if plan.entries.len() <= capacity {
            return Ok(());
        }
        let mut unique = [0];
        cuda.read(plan.unique, &mut unique)?;
        let rows = unique[0] as usize;
        if rows > capacity { Err(CudaError::Room { rows, capacity }) } else { Ok(()) }
    }

    /// Brings the rows of a plan to the device, those that are not there yet; rows of an earlier call give way.
    ///
    /// # Errors
    /// The driver's. Found by the device and reported by [`Device::synchronize`]: a row that the table does
    /// not have, and more rows than places, as `row U of C rows` of the operation `load`. Who wants to know the latter
    /// before asks [`CachedTable::check_room`].
    pub fn load(&mut self, cuda: &Cuda, plan: &RowPlan<'_, Cuda>) -> Result<(), CudaError> {
        const OP: &str = "load";
        cuda.same_stream(OP, &self.stream)?;
        let entries = plan.rows.len();
        if entries == 0 {
            return Ok(());
        }
        self.now = self.now.checked_add(1).ok_or(CudaError::Unsupported { op: OP, what: "2^32 loads" })?;
        cuda.stream.fill(self.counts.view().pointer(), 0, COUNTS * 4)?;
        let (cache, (codes, state, unit)) = (self.arg(), self.parts());
        let kernel = |name| cuda.kernels.get(Variant::of(File::Cache), name);
        let over = |items: usize| Shape::new(cuda.blocks_for(items, THREADS as usize), THREADS);
        let mut find = Args::new()
            .value(cache)
            .read(plan.unique)
            .read(plan.rows)
            .value(size(OP, "entries", entries)?)
            .value(cuda.flag.view().pointer())
            .value(number_of(OP));
        cuda.stream.launch(&kernel("cache_find")?, over(entries), &mut find)?;
        for name in ["cache_ages", "cache_choose"] {
            cuda.stream.launch(&kernel(name)?, over(self.sizes.capacity), &mut Args::new().value(cache))?;
        }
        let mut args = Args::new().value(cache).value(codes).value(state).value(unit).value(u32::from(self.changed));
        cuda.stream.launch(&kernel("cache_move")?, Shape::new(entries.min(MOVERS), 128), &mut args)
    }

    /// `places[i]` is where row `ids[i]` is.
    ///
    /// # Errors
    /// [`memlayer_core::ArgError::Shape`] if the lengths differ, or the driver's. A row that was not loaded is found by the
    /// device: [`Device::synchronize`] reports it.
    pub fn translate(&self, cuda: &Cuda, ids: View<'_, u32>, places: &mut ViewMut<'_, u32>) -> Result<(), CudaError> {
        check_len("translate", "places", ids.len(), places.len())?;
        self.translate_first(cuda, None, ids, places)
    }

    /// Changes the rows of a plan to their places, so that it is a plan over [`CachedTable::train_rows`].
    ///
    /// # Errors
    /// As [`CachedTable::translate`].
    pub fn translate_plan(&self, cuda: &Cuda, plan: &mut PlanBuffers<'_, Cuda>) -> Result<(), CudaError> {
        let ids = View::at(plan.rows.pointer(), plan.rows.len());
        self.translate_first(cuda, Some(plan.unique.read()), ids, &mut plan.rows)
    }

    /// All of `ids`, or as many as `count` says.
    fn translate_first(
        &self,
        cuda: &Cuda,
        count: Option<View<'_, u32>>,
        ids: View<'_, u32>,
        places: &mut ViewMut<'_, u32>,
    ) -> Result<(), CudaError> {
        const OP: &str = "translate";
        cuda.same_stream(OP, &self.stream)?;
        let mut args = Args::new()
            .value(self.arg())
            .read(ids)
            .value(ids.len() as u64)
            .read_or_null::<u32>(count)
            .write(places)
            .value(cuda.flag.view().pointer())
            .value(number_of(OP));
        let kernel = cuda.kernels.get(Variant::of(File::Cache), "cache_translate")?;
        cuda.stream.launch(&kernel, Shape::new(cuda.blocks_for(ids.len(), THREADS as usize), THREADS), &mut args)
    }

    /// The rows on the device, by their places.
    #[must_use]
    pub fn rows(&self) -> Rows<'_, E> {
        Rows::new(self.codes.view(), self.sizes.dim)
    }

    /// The table on the host, rows and states, with all changes; the cache is empty then, for what is lent may be changed.
    ///
    /// # Errors
    /// As [`Device::synchronize`].
    pub fn host(&mut self, cuda: &Cuda) -> Result<(&mut [E], &mut [f32]), CudaError> {
        cuda.same_stream("host", &self.stream)?;
        let (codes, state, unit) = self.parts();
        let changed = u32::from(self.changed);
        let mut args = Args::new().value(self.arg()).value(codes).value(state).value(unit).value(changed);
        let kernel = cuda.kernels.get(Variant::of(File::Cache), "cache_flush")?;
        cuda.stream.launch(&kernel, Shape::new(self.sizes.capacity.min(MOVERS), 128), &mut args)?;
        cuda.synchronize()?;
        self.changed = false;
        Ok((self.host_codes.lend(), self.host_state.lend()))
    }
}

impl<E: Trainable> CachedTable<E> {
    /// The rows on the device by their places, to be changed.
    #[must_use]
    pub fn train_rows(&mut self) -> TrainRows<'_, E> {
        self.changed = true;
        let Sizes { dim, state_len, .. } = self.sizes;
        let names = Some(self.names.view());
        TrainRows { codes: self.codes.view_mut(), state: self.state.view_mut(), dim, state_len, names }
    }
}

impl<E> core::fmt::Debug for CachedTable<E> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Sizes { rows, dim, capacity, .. } = self.sizes;
        write!(f, "{rows} rows of {dim} on the host, {capacity} places on the device")
    }
}
