//! A table of rows outside candle's variables, with a sparse update of its own.
//!
//! candle's gradient of an embedding is dense: as large as the table, which is what a memory layer must not pay. The
//! rows therefore live here. Backward leaves entries, a few numbers per row read, and [`ValuePool::step`] plans, sums
//! and applies them, at a cost that grows with the rows touched and never with the table.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use memlayer_core::ops::optim::{Adagrad, Adam, RowRule, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::{DenseRows, Random, Scratch, ScratchReq, TrainRows};
use memlayer_cpu::{Cpu, TableMemory};

use crate::error::Error;

/// How the rows of a pool change; see [`memlayer_core::ops::optim`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `row -= lr · grad`.
    Sgd,
    /// A sum of squares for every value.
    Adagrad(Adagrad),
    /// A sum of squares for every row.
    RowwiseAdagrad(RowwiseAdagrad),
    /// Lazy Adam: both moments for every value of the touched rows.
    Adam(Adam),
    /// Lazy Adam with one second moment a row.
    RowwiseAdam(RowwiseAdam),
}

impl Default for Rule {
    /// Lazy Adam with the usual betas (0.9, 0.999) and eps 1e-8.
    fn default() -> Self {
        Self::Adam(Adam { betas: (0.9, 0.999), eps: 1e-8 })
    }
}

/// Calls a generic function with the rule inside.
macro_rules! with_rule {
    ($rule:expr, |$inner:ident| $body:expr) => {
        match $rule {
            Rule::Sgd => {
                let $inner = &Sgd;
                $body
            }
            Rule::Adagrad($inner) => $body,
            Rule::RowwiseAdagrad($inner) => $body,
            Rule::Adam($inner) => $body,
            Rule::RowwiseAdam($inner) => $body,
        }
    };
}

impl Rule {
    /// Scalars of state for a row of `dim` values.
    #[must_use]
    pub fn state_len(&self, dim: usize) -> usize {
        with_rule!(self, |rule| rule.state_len(dim))
    }
}

/// Rows that layers share: the values of a memory, or one of PEER's tables. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct ValuePool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cpu: Arc<Cpu>,
    rows: usize,
    dim: usize,
    rule: Rule,
    table: RwLock<Table>,
    pending: Mutex<Pending>,
}

/// The rows, their state and how often they changed.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) rows: TableMemory<f32>,
    state: TableMemory<f32>,
    /// Steps made.
    pub(crate) steps: u64,
}

/// Entries that backward left, and the buffers of a step, kept for the next.
#[derive(Debug, Default)]
struct Pending {
    bag: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    sources: Vec<f32>,
    /// Whether `grads` and `plan` are of these entries.
    reduced: bool,
    plan: Vec<u32>,
    grads: Vec<f32>,
    scratch: Memory,
}

/// Memory for a [`Scratch`] that grows to what was asked for and stays.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    reals: Vec<f32>,
    ids: Vec<u32>,
}

impl Memory {
    pub(crate) fn lend(&mut self, req: ScratchReq) -> Scratch<'_, Cpu> {
        grow(&mut self.reals, req.reals);
        grow(&mut self.ids, req.ids);
        Scratch { reals: &mut self.reals[..req.reals], ids: &mut self.ids[..req.ids] }
    }
}

/// Makes a buffer long enough; a buffer that already is stays as it is.
fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepReport {
    /// Entries summed.
    pub entries: usize,
    /// Rows changed.
    pub touched: usize,
}

impl ValuePool {
    /// A pool of `rows` rows of `dim` values, normally distributed with standard deviation `std`, picked by `seed`.
    ///
    /// # Errors
    /// [`Error::Config`] if the table cannot be addressed or a size is zero, [`Error::Memory`] if the system has no memory
    /// for it.
    pub fn new(cpu: Arc<Cpu>, rows: usize, dim: usize, rule: Rule, std: f32, seed: u64) -> Result<Self, Error> {
        let len = checked_len(rows, dim, &rule)?;
        let memory = |len| TableMemory::zeroed(len).map_err(|source| Error::Memory { values: len, source });
        let mut table = memory(len)?;
        Random::new(seed).fill_normal(&mut table[..], f64::from(std));
        let state = memory(rows * rule.state_len(dim))?;
        Ok(Self::from_table(cpu, rows, dim, rule, Table { rows: table, state, steps: 0 }))
    }

    fn from_table(cpu: Arc<Cpu>, rows: usize, dim: usize, rule: Rule, table: Table) -> Self {
        let (table, pending) = (RwLock::new(table), Mutex::default());
        Self(Arc::new(Inner { cpu, rows, dim, rule, table, pending }))
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.0.dim
    }

    /// How rows change.
    #[must_use]
    pub fn rule(&self) -> &Rule {
        &self.0.rule
    }

    /// What computes.
    #[must_use]
    pub fn cpu(&self) -> &Arc<Cpu> {
        &self.0.cpu
    }

    /// Steps made so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.table().steps
    }

    /// Looks at the rows (`[rows, dim]`) and their state (`[rows, state_len]`).
    pub fn read<R>(&self, look: impl FnOnce(&[f32], &[f32]) -> R) -> R {
        let table = self.table();
        look(&table.rows, &table.state)
    }

    /// Replaces rows, state and the number of steps: the way back from a checkpoint. Pending gradients are dropped.
    ///
    /// # Errors
    /// [`Error::State`] if a length is not this pool's, [`Error::NotFinite`] if a row is not; nothing changes then.
    pub fn restore(&self, rows: &[f32], state: &[f32], steps: u64) -> Result<(), Error> {
        let mut table = self.table_mut();
        for (what, expected, found) in
            [("rows", table.rows.len(), rows.len()), ("state", table.state.len(), state.len())]
        {
            if expected != found {
                return Err(Error::State { what, expected, found });
            }
        }
        for (what, values, width) in [("rows", rows, self.0.dim), ("state", state, self.0.rule.state_len(self.0.dim))] {
            if let Some(at) = values.iter().position(|v| !v.is_finite()) {
                return Err(Error::NotFinite { what, row: at / width.max(1) });
            }
        }
        table.rows.copy_from_slice(rows);
        table.state.copy_from_slice(state);
        table.steps = steps;
        drop(table);
        self.discard();
        Ok(())
    }

    /// Forgets the gradients that backward left.
    pub fn discard(&self) {
        let mut pending = self.pending();
        pending.ids.clear();
        pending.weights.clear();
        pending.sources.clear();
        pending.reduced = false;
    }

    /// The sum of the squares of the pending gradients, for clipping by the global norm.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more entries than a plan can have.
    pub fn grad_square_sum(&self) -> Result<f64, Error> {
        let mut pending = self.pending();
        let pending = &mut *pending;
        if pending.ids.is_empty() {
            return Ok(0.0);
        }
        self.reduce(pending)?;
        let (cpu, entries) = (&*self.0.cpu, pending.ids.len());
        let (buffers, _) = PlanBuffers::<Cpu>::carve(&mut pending.plan, entries)?;
        let scratch = pending.scratch.lend(cpu.square_sum_scratch(entries));
        let mut sum = [0.0];
        cpu.square_sum(buffers.plan(), self.0.dim, &pending.grads, &mut sum, scratch)?;
        Ok(f64::from(sum[0]))
    }

    /// Plans and sums the pending entries into `plan` and `grads`.
    fn reduce(&self, pending: &mut Pending) -> Result<(), Error> {
        if pending.reduced {
            return Ok(());
        }
        let (cpu, entries, dim) = (&*self.0.cpu, pending.ids.len(), self.0.dim);
        grow(&mut pending.plan, PlanBuffers::<Cpu>::ids_len(entries));
        let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut pending.plan, entries)?;
        let scratch = pending.scratch.lend(cpu.plan_scratch(entries));
        cpu.plan(&pending.ids, self.0.rows, buffers.reborrow(), scratch)?;
        let plan = buffers.plan();
        grow(&mut pending.grads, plan.unique[0] as usize * dim);
        let gradient =
            RowGradient { bag: pending.bag, dim, weights: &pending.weights[..], sources: &pending.sources[..] };
        cpu.reduce(plan, gradient, &mut pending.grads)?;
        pending.reduced = true;
        Ok(())
    }

    /// Changes the touched rows by the pending gradients, each times `grad_scale`, with learning rate `lr`, and
    /// forgets them. Layers that share this pool must all have walked back before.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more entries than a plan can have; no row changed then.
    pub fn step(&self, lr: f64, grad_scale: f64) -> Result<StepReport, Error> {
        let mut pending = self.pending();
        let pending = &mut *pending;
        let mut table = self.table_mut();
        table.steps += 1;
        let entries = pending.ids.len();
        if entries == 0 {
            return Ok(StepReport { entries, touched: 0 });
        }
        let (cpu, dim) = (&*self.0.cpu, self.0.dim);
        let step = Step { grad_scale, ..Step::new(lr, table.steps) };
        let fused = !pending.reduced;
        if fused {
            grow(&mut pending.plan, PlanBuffers::<Cpu>::ids_len(entries));
        }
        let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut pending.plan, entries)?;
        if fused {
            let scratch = pending.scratch.lend(cpu.plan_scratch(entries));
            cpu.plan(&pending.ids, self.0.rows, buffers.reborrow(), scratch)?;
        }
        let plan = buffers.plan();
        let Table { rows, state, .. } = &mut *table;
        with_rule!(&self.0.rule, |rule| {
            let train = TrainRows::new(rows, dim, state, rule.state_len(dim)).ok_or(Error::State {
                what: "rows",
                expected: self.0.rows * dim,
                found: 0,
            })?;
            if fused {
                let gradient =
                    RowGradient { bag: pending.bag, dim, weights: &pending.weights[..], sources: &pending.sources[..] };
                let scratch = pending.scratch.lend(fused_req(cpu, &train, rule, dim));
                cpu.reduce_and_update(train, rule, &step, plan, gradient, scratch)?;
            } else {
                let scratch = pending.scratch.lend(update_req(cpu, &train, rule, dim));
                cpu.update(train, rule, &step, plan, &pending.grads, scratch)?;
            }
        });
        let touched = plan.unique[0] as usize;
        pending.ids.clear();
        pending.weights.clear();
        pending.sources.clear();
        pending.reduced = false;
        Ok(StepReport { entries, touched })
    }

    /// Keeps the entries of a layer's backward: `ids` and `weights` (`[T, bag]`), `sources` (`[T, dim]`).
    pub(crate) fn push(&self, bag: usize, ids: &[u32], weights: &[f32], sources: &[f32]) -> Result<(), Error> {
        let mut pending = self.pending();
        if !pending.ids.is_empty() && pending.bag != bag {
            return Err(Error::BagLength { expected: pending.bag, found: bag });
        }
        pending.bag = bag;
        pending.ids.extend_from_slice(ids);
        pending.weights.extend_from_slice(weights);
        pending.sources.extend_from_slice(sources);
        pending.reduced = false;
        Ok(())
    }

    pub(crate) fn table(&self) -> RwLockReadGuard<'_, Table> {
        // A panic elsewhere leaves plain numbers behind, which are as good as before.
        self.0.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.0.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails unless the pool has `rows` rows of `dim` values.
    pub(crate) fn check(&self, rows: usize, dim: usize) -> Result<(), Error> {
        if (self.0.rows, self.0.dim) == (rows, dim) {
            return Ok(());
        }
        Err(Error::PoolShape { rows, dim, found_rows: self.0.rows, found_dim: self.0.dim })
    }
}

impl Table {
    pub(crate) fn view(&self, dim: usize) -> DenseRows<'_, f32> {
        DenseRows::new(&self.rows, dim)
    }
}

fn fused_req<S: memlayer_core::Table, O: RowRule>(cpu: &Cpu, _: &S, _: &O, dim: usize) -> ScratchReq
where
    Cpu: RowUpdate<S, O>,
{
    RowUpdate::<S, O>::reduce_and_update_scratch(cpu, dim)
}

fn update_req<S: memlayer_core::Table, O: RowRule>(cpu: &Cpu, _: &S, _: &O, dim: usize) -> ScratchReq
where
    Cpu: RowUpdate<S, O>,
{
    RowUpdate::<S, O>::update_scratch(cpu, dim)
}

/// The values of a table, if it and its state can be addressed.
fn checked_len(rows: usize, dim: usize, rule: &Rule) -> Result<usize, Error> {
    use memlayer_core::ConfigError;
    for (field, size) in [("rows", rows), ("dim", dim)] {
        if size == 0 {
            return Err(ConfigError::Zero { field }.into());
        }
    }
    let fits = |width: usize| rows.checked_mul(width).is_some_and(|n| n <= isize::MAX as usize / 4);
    if u32::try_from(rows - 1).is_err() || !fits(dim) || !fits(rule.state_len(dim)) {
        return Err(ConfigError::TooLarge { buffer: "the value table" }.into());
    }
    Ok(rows * dim)
}
