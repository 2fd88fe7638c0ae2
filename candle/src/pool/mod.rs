//! A table of rows outside candle's variables, with a sparse update of its own.
//!
//! candle's gradient of an embedding is dense: as large as the table, which is what a memory layer must not pay. The
//! rows therefore live here. Backward leaves entries, a few numbers per row read, and [`ValuePool::step`] plans, sums
//! and applies them, at a cost that grows with the rows touched and never with the table.

mod rows;

use std::sync::Arc;

use memlayer_core::ops::optim::{Adagrad, Adam, RowRule, RowwiseAdagrad, RowwiseAdam};
use memlayer_cpu::Cpu;
#[cfg(feature = "cuda")]
use memlayer_cuda::Cuda;

pub(crate) use rows::Pool;

use crate::compute::Compute;
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
                let $inner = &memlayer_core::ops::optim::Sgd;
                $body
            }
            Rule::Adagrad($inner) => $body,
            Rule::RowwiseAdagrad($inner) => $body,
            Rule::Adam($inner) => $body,
            Rule::RowwiseAdam($inner) => $body,
        }
    };
}
pub(crate) use with_rule;

impl Rule {
    /// Scalars of state for a row of `dim` values.
    #[must_use]
    pub fn state_len(&self, dim: usize) -> usize {
        with_rule!(self, |rule| rule.state_len(dim))
    }
}

/// Rows that layers share: the values of a memory, or one of PEER's tables. Clones are the same pool.
#[derive(Clone, Debug)]
pub struct ValuePool(pub(crate) Place);

/// Where the rows are.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Cpu(Arc<Pool<Cpu>>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<Pool<Cuda>>),
}

/// Calls the pool, wherever it is.
macro_rules! with_pool {
    ($self:expr, |$pool:ident| $body:expr) => {
        match &$self.0 {
            Place::Cpu($pool) => $body,
            #[cfg(feature = "cuda")]
            Place::Cuda($pool) => $body,
        }
    };
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
    /// A pool of `rows` rows of `dim` values, normally distributed with standard deviation `std`, picked by `seed`: the
    /// same values wherever they are.
    ///
    /// # Errors
    /// [`Error::Config`] if the table cannot be addressed or a size is zero, [`Error::Memory`] or the device's error if
    /// there is no memory for it.
    pub fn new(
        compute: impl Into<Compute>,
        rows: usize,
        dim: usize,
        rule: Rule,
        std: f32,
        seed: u64,
    ) -> Result<Self, Error> {
        Self::build(compute.into(), rows, dim, rule, std, seed, None)
    }

    /// [`ValuePool::new`] for a table larger than its GPU: rows and state are in pinned memory of the host, and
    /// `cache_rows` rows with their state on the device. Every result has the bits of a pool on the device.
    ///
    /// A layer's forward and backward load the rows they read that are not there, a step those it changes; rows whose last use
    /// is longest ago give way. So `cache_rows` must be at least as many as a step touches, of all layers that share the pool:
    /// else that is [`Error::CacheRows`] and nothing changes. On the device each row of the pool takes four bytes, too.
    ///
    /// # Errors
    /// As [`ValuePool::new`], [`Error::Config`] if `cache_rows` is zero, too; [`Error::NoCache`] on a CPU, where all rows
    /// are in the host's memory.
    pub fn cached(
        compute: impl Into<Compute>,
        rows: usize,
        dim: usize,
        rule: Rule,
        std: f32,
        seed: u64,
        cache_rows: usize,
    ) -> Result<Self, Error> {
        Self::build(compute.into(), rows, dim, rule, std, seed, Some(cache_rows))
    }

    fn build(
        compute: Compute,
        rows: usize,
        dim: usize,
        rule: Rule,
        std: f32,
        seed: u64,
        cache_rows: Option<usize>,
    ) -> Result<Self, Error> {
        let place = match compute {
            Compute::Cpu(cpu) => Place::Cpu(Arc::new(Pool::new(cpu, rows, dim, rule, std, seed, cache_rows)?)),
            #[cfg(feature = "cuda")]
            Compute::Cuda(cuda) => Place::Cuda(Arc::new(Pool::new(cuda, rows, dim, rule, std, seed, cache_rows)?)),
        };
        Ok(Self(place))
    }

    /// The number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        with_pool!(self, |pool| pool.rows)
    }

    /// The width of a row.
    #[must_use]
    pub fn dim(&self) -> usize {
        with_pool!(self, |pool| pool.dim)
    }

    /// How rows change.
    #[must_use]
    pub fn rule(&self) -> &Rule {
        with_pool!(self, |pool| &pool.rule)
    }

    /// What computes.
    #[must_use]
    pub fn compute(&self) -> Compute {
        with_pool!(self, |pool| Arc::clone(&pool.backend).into())
    }

    /// Steps made so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        with_pool!(self, |pool| pool.table().steps)
    }

    /// Looks at the rows (`[rows, dim]`) and their state (`[rows, state_len]`): where they are on the host, a copy of all of
    /// them from a GPU. The cache of a pool that has one is empty afterwards.
    ///
    /// # Errors
    /// The device's.
    pub fn read<R>(&self, look: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R, Error> {
        with_pool!(self, |pool| pool.read(look))
    }

    /// Replaces rows, state and the number of steps: the way back from a checkpoint. Pending gradients are dropped.
    ///
    /// # Errors
    /// [`Error::State`] if a length is not this pool's, [`Error::NotFinite`] if a row is not; nothing changes then.
    pub fn restore(&self, rows: &[f32], state: &[f32], steps: u64) -> Result<(), Error> {
        with_pool!(self, |pool| pool.restore(rows, state, steps))
    }

    /// Forgets the gradients that backward left.
    pub fn discard(&self) {
        with_pool!(self, |pool| pool.discard());
    }

    /// The sum of the squares of the pending gradients, for clipping by the global norm.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more entries than a plan can have, or the device's.
    pub fn grad_square_sum(&self) -> Result<f64, Error> {
        with_pool!(self, |pool| pool.grad_square_sum())
    }

    /// Changes the touched rows by the pending gradients, each times `grad_scale`, with learning rate `lr`, and
    /// forgets them. Layers that share this pool must all have walked back before.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more entries than a plan can have, [`Error::CacheRows`] if there are more rows than
    /// a cache holds: no row changed then, and the gradients stay until [`ValuePool::discard`]; or the device's.
    pub fn step(&self, lr: f64, grad_scale: f64) -> Result<StepReport, Error> {
        with_pool!(self, |pool| pool.step(lr, grad_scale))
    }

    /// Fails unless the pool has `rows` rows of `dim` values.
    pub(crate) fn check(&self, rows: usize, dim: usize) -> Result<(), Error> {
        if (self.rows(), self.dim()) == (rows, dim) {
            return Ok(());
        }
        Err(Error::PoolShape { rows, dim, found_rows: self.rows(), found_dim: self.dim() })
    }
}
