//! A pool's rows in the host's memory, with a cache of them on a GPU.
//!
//! A layer chooses its rows and reads them in one go, so that there is no moment in between at which a pool could load
//! them. So it is the reading that does it: sums and dots of bags plan their ids, load the rows that are missing, and run over
//! their places. Nothing has to stay in the cache from one operation to the next: backward loads what has gone since its
//! forward, unchanged, for a pool does not change between them, and a step loads the rows that it changes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{Item, Scratch, Table};
use memlayer_cuda::{Buffer, CachedTable, Cuda, CudaError, Rows, TrainRows, View};

use super::Sizes;

/// Rows that a layer on a GPU reads.
pub(crate) enum Values<'a> {
    /// On the device.
    Device(Rows<'a, f32>),
    /// On the host.
    Cached(&'a Cached),
}

/// Rows and state on the host, and a cache of them on the device.
pub(crate) struct Cached {
    sizes: Sizes,
    cache: Mutex<Cache>,
}

struct Cache {
    table: CachedTable<f32>,
    /// The workspace of a load, which grows to what was needed and stays: plan, places and the plan's own.
    ids: Buffer<u32>,
    reals: Buffer<f32>,
}

impl Cached {
    /// A table of zeros, of which `cache_rows` rows are on the device at a time.
    pub(super) fn new(cuda: &Cuda, sizes: Sizes, cache_rows: usize) -> Result<Self, CudaError> {
        let Sizes { rows, dim, state_len } = sizes;
        let table = cuda.cached_table(rows, dim, state_len, cache_rows.min(rows))?;
        Ok(Self { sizes, cache: Mutex::new(Cache { table, ids: cuda.zeros(0)?, reals: cuda.zeros(0)? }) })
    }

    /// Runs `read` over the rows of `ids` on the device, with their places for ids.
    fn with_places(
        &self,
        cuda: &Cuda,
        ids: View<'_, u32>,
        read: impl FnOnce(&Rows<'_, f32>, View<'_, u32>) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        // Held until `read` has started its work: on one stream, no later load comes before it.
        let mut cache = self.cache();
        let Cache { table, ids: memory, reals } = &mut *cache;
        let entries = ids.len();
        if entries == 0 {
            return read(&table.rows(), ids);
        }
        let req = cuda.plan_scratch(entries);
        grow(cuda, reals, req.reals)?;
        grow(cuda, memory, PlanBuffers::<Cuda>::ids_len(entries) + entries + req.ids)?;
        let (mut plan, rest) = PlanBuffers::<Cuda>::carve(memory.view_mut(), entries)?;
        let (mut places, rest) = rest.split_at(entries);
        cuda.plan(ids, self.sizes.rows, plan.reborrow(), Scratch { reals: reals.view_mut(), ids: rest })?;
        table.check_room(cuda, &plan.plan())?;
        table.load(cuda, &plan.plan())?;
        table.translate(cuda, ids, &mut places)?;
        read(&table.rows(), places.read())
    }

    /// The rows of a plan on the device, to be changed; the plan is over their places from then on.
    pub(super) fn train(
        &mut self,
        cuda: &Cuda,
        plan: &mut PlanBuffers<'_, Cuda>,
    ) -> Result<TrainRows<'_, f32>, CudaError> {
        let table = &mut self.cache.get_mut().unwrap_or_else(PoisonError::into_inner).table;
        table.check_room(cuda, &plan.plan())?;
        table.load(cuda, &plan.plan())?;
        table.translate_plan(cuda, plan)?;
        Ok(table.train_rows())
    }

    /// Calls `with` with rows and state on the host. The cache is empty then.
    pub(super) fn on_host<R>(
        &self,
        cuda: &Cuda,
        with: impl FnOnce(&mut [f32], &mut [f32]) -> R,
    ) -> Result<R, CudaError> {
        let mut cache = self.cache();
        let (rows, state) = cache.table.host(cuda)?;
        Ok(with(rows, state))
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // A panic elsewhere leaves the device's own notes of what is where, which are as good as before.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a buffer long enough; what was in it may be lost.
fn grow<T: Item>(cuda: &Cuda, buffer: &mut Buffer<T>, least: usize) -> Result<(), CudaError> {
    if buffer.len() < least {
        *buffer = cuda.zeros(least)?;
    }
    Ok(())
}

impl Table for Values<'_> {
    type Elem = f32;
    fn rows(&self) -> usize {
        match self {
            Self::Device(rows) => rows.rows(),
            Self::Cached(table) => table.sizes.rows,
        }
    }
    fn dim(&self) -> usize {
        match self {
            Self::Device(rows) => rows.dim(),
            Self::Cached(table) => table.sizes.dim,
        }
    }
}

impl EmbeddingBag<Values<'_>> for Cuda {
    fn bag_sum(&self, table: &Values<'_>, args: BagSum<'_, Self>) -> Result<(), CudaError> {
        match table {
            Values::Device(rows) => self.bag_sum(rows, args),
            Values::Cached(table) => {
                let BagSum { bag, ids, weights, out, accumulate } = args;
                table.with_places(self, ids, |rows, ids| {
                    self.bag_sum(rows, BagSum { bag, ids, weights, out, accumulate })
                })
            }
        }
    }

    fn bag_dot(&self, table: &Values<'_>, args: BagDot<'_, Self>) -> Result<(), CudaError> {
        match table {
            Values::Device(rows) => self.bag_dot(rows, args),
            Values::Cached(table) => {
                let BagDot { bag, ids, vectors, out } = args;
                table.with_places(self, ids, |rows, ids| self.bag_dot(rows, BagDot { bag, ids, vectors, out }))
            }
        }
    }
}
