//! A training step over a table that stays on the host, with a cache of its rows on the device.

use core::cell::Cell;

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Rounding, RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{Bf16, Scratch};
use memlayer_cuda::{Cuda, CudaError, TrainRows};

use super::device::Bench;
use super::{BAG, Case, TOKENS};

/// Sets of ids: every step that is measured has its own, as rows that come again are what a cache is for.
const SETS: usize = 28;

impl Bench<'_> {
    /// The step of `step.rs` at V = 1024 over 2^22 slots, of which the device has room for a quarter.
    pub(super) fn cached(&self) -> Result<(), CudaError> {
        if !self.wants("step cached") {
            return Ok(());
        }
        for zipf in [true, false] {
            self.cached_step(1024, 1 << 22, 1 << 20, zipf)?;
        }
        Ok(())
    }

    fn cached_step(&self, width: usize, slots: usize, capacity: usize, zipf: bool) -> Result<(), CudaError> {
        let (cuda, entries) = (&self.cuda, TOKENS * BAG);
        let mut table = cuda.cached_table::<Bf16>(slots, width, 1, capacity)?;
        let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(entries, slots, zipf, s as u64)).collect();
        let (sets, weights, dout) = (sets?, self.reals(entries, 3)?, self.reals(TOKENS * width, 4)?);
        let (mut out, mut dots) = (cuda.zeros::<f32>(TOKENS * width)?, cuda.zeros::<f32>(entries)?);
        let mut places = cuda.zeros::<u32>(entries)?;
        let mut plan_ids = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries))?;
        let mut plan_scratch = cuda.zeros::<u32>(cuda.plan_scratch(entries).ids)?;
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(plan_ids.view_mut(), entries)?;
        let req = RowUpdate::<TrainRows<'_, Bf16>, RowwiseAdagrad>::reduce_and_update_scratch(cuda, width);
        let (mut reals, mut none, mut no_ids) =
            (cuda.zeros::<f32>(req.reals)?, cuda.zeros::<f32>(0)?, cuda.zeros::<u32>(0)?);
        let mut step = Step::new(1e-3, 1);
        step.rounding = Rounding::Stochastic { seed: 1 };
        let rule = RowwiseAdagrad { eps: 1e-8 };
        let turn = Cell::new(0);
        let mut one = || {
            let ids = sets[turn.replace((turn.get() + 1) % SETS)].view();
            let scratch = Scratch { reals: none.view_mut(), ids: plan_scratch.view_mut() };
            cuda.plan(ids, slots, plan.reborrow(), scratch)?;
            table.load(cuda, &plan.plan())?;
            table.translate(cuda, ids, &mut places.view_mut())?;
            table.translate_plan(cuda, &mut plan)?;
            let (ids, weights) = (places.view(), weights.view());
            let sum = BagSum { bag: BAG, ids, weights, out: out.view_mut(), accumulate: false };
            cuda.bag_sum(&table.rows(), sum)?;
            cuda.bag_dot(&table.rows(), BagDot { bag: BAG, ids, vectors: dout.view(), out: dots.view_mut() })?;
            let gradient = RowGradient { bag: BAG, dim: width, weights, sources: dout.view() };
            let scratch = Scratch { reals: reals.view_mut(), ids: no_ids.view_mut() };
            cuda.reduce_and_update(table.train_rows(), &rule, &step, plan.plan(), gradient, scratch)
        };
        // The cache as it is in the middle of a training.
        (0..SETS).try_for_each(|_| one())?;
        let ms = self.time(|_| one())?;
        let ids = if zipf { "zipf" } else { "uniform" };
        self.report(Case { op: "step cached", format: "bf16", ids, tokens: TOKENS, width, slots }, 0.0, ms);
        Ok(())
    }
}
