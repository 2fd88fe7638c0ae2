//! The rows of a pool on a backend, the entries that backward left, and the step that applies them.

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use memlayer_core::ops::optim::{RowRule, RowUpdate, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowPlan};
use memlayer_core::{ConfigError, Random};

use super::{Rule, StepReport, with_rule};
use crate::backend::{Backend, List, Memory, Part, Sizes, TOO_LARGE, grow};
use crate::error::Error;

/// Rows that layers share.
pub(crate) struct Pool<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) rows: usize,
    pub(crate) dim: usize,
    pub(crate) rule: Rule,
    table: RwLock<Table<B>>,
    pending: Mutex<Pending<B>>,
}

/// The rows, their state and how often they changed.
pub(crate) struct Table<B: Backend> {
    store: B::Store,
    /// Steps made.
    pub(crate) steps: u64,
}

/// Entries that backward left, and the buffers of a step, kept for the next.
struct Pending<B: Backend> {
    bag: usize,
    ids: List<B, u32>,
    weights: List<B, f32>,
    sources: List<B, f32>,
    /// Rows that `plan` and `grads` are of, if they are of these entries.
    reduced: Option<usize>,
    plan: B::Buffer<u32>,
    grads: B::Buffer<f32>,
    scratch: Memory<B>,
}

/// Values drawn at a time: what a table that is elsewhere takes of the host's memory.
const DRAWN: usize = 1 << 20;

impl<B: Backend> Pool<B> {
    pub(super) fn new(
        backend: Arc<B>,
        rows: usize,
        dim: usize,
        rule: Rule,
        std: f32,
        seed: u64,
        cache_rows: Option<usize>,
    ) -> Result<Self, Error> {
        let sizes = checked_sizes(rows, dim, &rule, cache_rows)?;
        let mut store = backend.store(sizes, cache_rows)?;
        draw(&*backend, &mut store, rows * dim, std, seed)?;
        let pending = Pending::new(&*backend)?;
        let table = Table { store, steps: 0 };
        Ok(Self { backend, rows, dim, rule, table: RwLock::new(table), pending: Mutex::new(pending) })
    }

    pub(super) fn read<R>(&self, look: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error> {
        self.backend.look(&self.table().store, look)
    }

    pub(super) fn restore(&self, rows: &[f32], state: &[f32], steps: u64) -> Result<(), Error> {
        let (dim, state_len) = (self.dim, self.rule.state_len(self.dim));
        for (what, width, found) in [("rows", dim, rows.len()), ("state", state_len, state.len())] {
            let expected = self.rows * width;
            if expected != found {
                return Err(Error::State { what, expected, found });
            }
        }
        for (what, values, width) in [("rows", rows, dim), ("state", state, state_len)] {
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::NotFinite { what, row: at / width.max(1) });
            }
        }
        let mut table = self.table_mut();
        self.backend.overwrite(&mut table.store, Part::Rows, 0, rows)?;
        self.backend.overwrite(&mut table.store, Part::State, 0, state)?;
        table.steps = steps;
        drop(table);
        self.discard();
        Ok(())
    }

    pub(super) fn discard(&self) {
        self.pending().clear();
    }

    pub(super) fn grad_square_sum(&self) -> Result<f64, Error> {
        let backend = &*self.backend;
        let mut pending = self.pending();
        let pending = &mut *pending;
        let entries = pending.ids.len();
        if entries == 0 {
            return Ok(0.0);
        }
        pending.reduce(backend, self.rows, self.dim)?;
        let (buffers, _) = PlanBuffers::<B>::carve(B::view_mut(&mut pending.plan), entries)?;
        let mut sum = backend.buffer::<f32>(1)?;
        let scratch = pending.scratch.lend(backend, backend.square_sum_scratch(entries))?;
        backend
            .square_sum(buffers.plan(), self.dim, B::view(&pending.grads), B::view_mut(&mut sum), scratch)
            .map_err(Into::into)?;
        Ok(f64::from(backend.host(B::view(&sum))?[0]))
    }

    pub(super) fn step(&self, lr: f64, grad_scale: f64) -> Result<StepReport, Error> {
        let backend = &*self.backend;
        let mut pending = self.pending();
        let mut table = self.table_mut();
        let (entries, reduced) = (pending.ids.len(), pending.reduced);
        let mut touched = 0;
        if entries > 0 {
            let step = Step { grad_scale, ..Step::new(lr, table.steps + 1) };
            let (rows, dim, store) = (self.rows, self.dim, &mut table.store);
            with_rule!(&self.rule, |rule| pending.apply(backend, rows, dim, store, rule, &step))?;
            touched = match reduced {
                Some(touched) => touched,
                None => pending.planned(backend)?,
            };
            // An id that is no row is found on the device, and known only now.
            backend.synchronize().map_err(Into::into)?;
            pending.clear();
        }
        table.steps += 1;
        Ok(StepReport { entries, touched })
    }

    /// Keeps the entries of a layer's backward: `ids` and `weights` (`[T, bag]`), `sources` (`[T, dim]`).
    pub(crate) fn push(
        &self,
        bag: usize,
        ids: B::View<'_, u32>,
        weights: B::View<'_, f32>,
        sources: B::View<'_, f32>,
    ) -> Result<(), Error> {
        let backend = &*self.backend;
        let mut pending = self.pending();
        if pending.ids.len() > 0 && pending.bag != bag {
            return Err(Error::BagLength { expected: pending.bag, found: bag });
        }
        pending.bag = bag;
        pending.reduced = None;
        pending.ids.push(backend, ids)?;
        pending.weights.push(backend, weights)?;
        pending.sources.push(backend, sources)
    }

    pub(crate) fn table(&self) -> RwLockReadGuard<'_, Table<B>> {
        // A panic elsewhere leaves plain numbers behind, which are as good as before.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table<B>> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, Pending<B>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Backend> Pending<B> {
    fn new(backend: &B) -> Result<Self, Error> {
        Ok(Self {
            bag: 0,
            ids: List::new(backend)?,
            weights: List::new(backend)?,
            sources: List::new(backend)?,
            reduced: None,
            plan: backend.buffer(0)?,
            grads: backend.buffer(0)?,
            scratch: Memory::new(backend)?,
        })
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.weights.clear();
        self.sources.clear();
        self.reduced = None;
    }

    /// Plans the entries into `plan`.
    fn make_plan(&mut self, backend: &B, rows: usize) -> Result<(), Error> {
        let entries = self.ids.len();
        grow::<B, u32>(backend, &mut self.plan, PlanBuffers::<B>::ids_len(entries))?;
        let (buffers, _) = PlanBuffers::<B>::carve(B::view_mut(&mut self.plan), entries)?;
        let scratch = self.scratch.lend(backend, backend.plan_scratch(entries))?;
        backend.plan(self.ids.view(), rows, buffers, scratch).map_err(Into::into)
    }

    /// Rows in the plan.
    fn planned(&mut self, backend: &B) -> Result<usize, Error> {
        let (buffers, _) = PlanBuffers::<B>::carve(B::view_mut(&mut self.plan), self.ids.len())?;
        Ok(backend.host(buffers.plan().unique)?[0] as usize)
    }

    /// Plans and sums the entries into `plan` and `grads`.
    fn reduce(&mut self, backend: &B, rows: usize, dim: usize) -> Result<(), Error> {
        if self.reduced.is_some() {
            return Ok(());
        }
        self.make_plan(backend, rows)?;
        let unique = self.planned(backend)?;
        grow::<B, f32>(backend, &mut self.grads, unique * dim)?;
        let (buffers, _) = PlanBuffers::<B>::carve(B::view_mut(&mut self.plan), self.ids.len())?;
        let gradient = RowGradient { bag: self.bag, dim, weights: self.weights.view(), sources: self.sources.view() };
        let grads = B::view_mut(&mut self.grads);
        backend.reduce(buffers.plan(), gradient, grads).map_err(Into::into)?;
        self.reduced = Some(unique);
        Ok(())
    }

    /// Changes the rows of the entries.
    fn apply<O: RowRule>(
        &mut self,
        backend: &B,
        rows: usize,
        dim: usize,
        store: &mut B::Store,
        rule: &O,
        step: &Step,
    ) -> Result<(), Error>
    where
        B: for<'x> RowUpdate<B::Train<'x>, O>,
    {
        // What is changed here may be in a cache, and the plan then says where: it serves no second time.
        let reduced = self.reduced.take().is_some();
        if !reduced {
            self.make_plan(backend, rows)?;
        }
        let (mut buffers, _) = PlanBuffers::<B>::carve(B::view_mut(&mut self.plan), self.ids.len())?;
        let train = backend.train(store, &mut buffers)?;
        let plan: RowPlan<'_, B> = buffers.plan();
        if reduced {
            let scratch = self.scratch.lend(backend, RowUpdate::<B::Train<'_>, O>::update_scratch(backend, dim))?;
            backend.update(train, rule, step, plan, B::view(&self.grads), scratch).map_err(Into::into)
        } else {
            let gradient =
                RowGradient { bag: self.bag, dim, weights: self.weights.view(), sources: self.sources.view() };
            let req = RowUpdate::<B::Train<'_>, O>::reduce_and_update_scratch(backend, dim);
            let scratch = self.scratch.lend(backend, req)?;
            backend.reduce_and_update(train, rule, step, plan, gradient, scratch).map_err(Into::into)
        }
    }
}

impl<B: Backend> Table<B> {
    pub(crate) fn values(&self) -> B::Values<'_> {
        B::values(&self.store)
    }
}

impl<B: Backend> fmt::Debug for Pool<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (backend, rows, dim) = (self.backend.name(), self.rows, self.dim);
        write!(f, "{rows} rows of {dim} values on {backend}, {:?}", self.rule)
    }
}

/// Fills a table of `len` values with normally distributed ones.
fn draw<B: Backend>(backend: &B, store: &mut B::Store, len: usize, std: f32, seed: u64) -> Result<(), Error> {
    let mut random = Random::new(seed);
    let mut drawn = vec![0.0; DRAWN.min(len)];
    for at in (0..len).step_by(DRAWN) {
        let drawn = &mut drawn[..DRAWN.min(len - at)];
        random.fill_normal(drawn, f64::from(std));
        backend.overwrite(store, Part::Rows, at, drawn)?;
    }
    Ok(())
}

/// The sizes of a table, if it and its state can be addressed.
fn checked_sizes(rows: usize, dim: usize, rule: &Rule, cache_rows: Option<usize>) -> Result<Sizes, Error> {
    for (field, size) in [("rows", rows), ("dim", dim), ("cache_rows", cache_rows.unwrap_or(rows))] {
        if size == 0 {
            return Err(ConfigError::Zero { field }.into());
        }
    }
    let state_len = rule.state_len(dim);
    let fits = |width: usize| rows.checked_mul(width).is_some_and(|n| n <= isize::MAX as usize / 4);
    if u32::try_from(rows - 1).is_err() || !fits(dim) || !fits(state_len) {
        return Err(TOO_LARGE.into());
    }
    Ok(Sizes { rows, dim, state_len })
}
