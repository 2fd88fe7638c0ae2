//! Training: gradients of rows, and the whole step.

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Rounding, RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{Bf16, Scratch};
use memlayer_cuda::{Cuda, CudaError, MixedGradient, Rows, TrainRows};

use super::device::{Bench, SETS};
use super::{BAG, Case, TOKENS};

impl Bench<'_> {
    /// Steps over tables of several sizes.
    pub(super) fn steps(&self) -> Result<(), CudaError> {
        if !self.wants("step") && !self.wants("sparse") {
            return Ok(());
        }
        for zipf in [false, true] {
            for (width, slots) in [(256, 20), (1024, 20), (4096, 20), (1024, 22), (1024, 24)] {
                self.step(TOKENS, width, 1 << slots, zipf)?;
            }
        }
        if !self.options.quick {
            for tokens in [1, 32, 32_768] {
                for slots in [20, 24] {
                    self.step(tokens, 1024, 1 << slots, false)?;
                }
            }
        }
        Ok(())
    }

    /// The parts of a training step over a bf16 table, and the whole of it.
    fn step(&self, tokens: usize, width: usize, slots: usize, zipf: bool) -> Result<(), CudaError> {
        let cuda = &self.cuda;
        let mut codes = self.codes(slots * width, Bf16::from_f32)?;
        let mut state = cuda.zeros::<f32>(slots)?;
        let entries = tokens * BAG;
        let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(entries, slots, zipf, s as u64)).collect();
        let (sets, weights, dout) = (sets?, self.reals(entries, 3)?, self.reals(tokens * width, 4)?);
        let mut out = cuda.zeros::<f32>(tokens * width)?;
        let mut dots = cuda.zeros::<f32>(entries)?;
        // The gradient of the sums as the peers have it. Where something reads it in f32 too, what is timed rounds it anew.
        let mut rounded = cuda.zeros::<Bf16>(tokens * width)?;
        cuda.round(dout.view(), rounded.view_mut())?;
        let mut plan_ids = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries))?;
        let mut plan_scratch = cuda.zeros::<u32>(cuda.plan_scratch(entries).ids)?;
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(plan_ids.view_mut(), entries)?;
        let req = RowUpdate::<TrainRows<'_, Bf16>, RowwiseAdagrad>::reduce_and_update_scratch(cuda, width);
        let mut slots_scratch = cuda.zeros::<f32>(req.reals)?;
        let mut none = cuda.zeros::<f32>(0)?;
        let mut no_ids = cuda.zeros::<u32>(0)?;
        let mut step = Step::new(1e-3, 1);
        step.rounding = Rounding::Stochastic { seed: 1 };
        let rule = RowwiseAdagrad { eps: 1e-8 };

        macro_rules! sum {
            ($set:expr) => {{
                let table = Rows::new(codes.view(), width);
                let (ids, weights, out) = (sets[$set].view(), weights.view(), out.view_mut());
                cuda.bag_sum(&table, BagSum { bag: BAG, ids, weights, out, accumulate: false })?;
            }};
        }
        macro_rules! dot {
            ($set:expr) => {{
                let table = Rows::new(codes.view(), width);
                let (ids, vectors, out) = (sets[$set].view(), dout.view(), dots.view_mut());
                cuda.bag_dot(&table, BagDot { bag: BAG, ids, vectors, out })?;
            }};
        }
        macro_rules! plan {
            ($set:expr) => {{
                let scratch = Scratch { reals: none.view_mut(), ids: plan_scratch.view_mut() };
                cuda.plan(sets[$set].view(), slots, plan.reborrow(), scratch)?;
            }};
        }
        macro_rules! round {
            () => {
                cuda.round(dout.view(), rounded.view_mut())?
            };
        }
        macro_rules! gradient {
            ($sources:expr) => {
                MixedGradient { bag: BAG, dim: width, weights: weights.view(), sources: $sources.view() }
            };
        }
        macro_rules! change {
            ($sources:expr) => {{
                let rows = TrainRows::new(codes.view_mut(), width, state.view_mut(), 1).expect("a state for each row");
                let scratch = Scratch { reals: slots_scratch.view_mut(), ids: no_ids.view_mut() };
                cuda.reduce_and_update_as(rows, &rule, &step, plan.plan(), gradient!($sources), scratch)?;
            }};
        }
        macro_rules! dot_and_change {
            ($sources:expr) => {{
                let rows = TrainRows::new(codes.view_mut(), width, state.view_mut(), 1).expect("a state for each row");
                let scratch = Scratch { reals: slots_scratch.view_mut(), ids: no_ids.view_mut() };
                let (gradient, dots) = (gradient!($sources), dots.view_mut());
                cuda.dot_reduce_and_update_as(rows, &rule, &step, plan.plan(), gradient, dots, scratch)?;
            }};
        }
        macro_rules! reduce {
            ($sources:expr, $grads:expr) => {
                cuda.reduce_as(plan.plan(), gradient!($sources), $grads.view_mut())?
            };
        }
        // Sums, gradients of weights, the plan.
        macro_rules! both_ways {
            ($set:expr) => {{
                sum!($set);
                dot!($set);
                plan!($set);
            }};
        }
        // The rows a step touches: how many there are decides what must be moved.
        plan!(0);
        let mut unique = [0u32];
        cuda.read(plan.plan().unique, &mut unique)?;
        let unique = f64::from(unique[0]);
        let (v, e) = (width as f64, entries as f64);
        let (sum, dot) = (e * (v * 2.0 + 8.0) + tokens as f64 * v * 4.0, e * (v * 2.0 + 8.0) + tokens as f64 * v * 4.0);
        // Sources are read from the second-level cache; from memory once.
        let change = unique * (v * 4.0 + 16.0) + e * 8.0 + tokens as f64 * v * 4.0;
        let ids = if zipf { "zipf" } else { "uniform" };
        let row = Case { op: "", format: "bf16", ids, tokens, width, slots };
        // A source in bf16 is half as long; where it is made in the time that is taken, it is written too.
        let (less, made) = (tokens as f64 * v * 2.0, tokens as f64 * v * 2.0);
        macro_rules! case {
            ($op:literal, $bytes:expr, $set:pat_param, $what:block) => {{
                let ms = self.time(|$set| {
                    $what
                    Ok(())
                })?;
                self.report(Case { op: $op, ..row }, $bytes, ms);
            }};
        }
        if self.wants("step") || self.wants("sparse") {
            case!("plan", e * 4.0 * 14.0, set, { plan!(set) });
            case!("reduce_and_update", change, _, { change!(dout) });
            case!("reduce_and_update, dY bf16", change - less, _, { change!(rounded) });
            let change = change + e * 4.0;
            case!("dot_reduce_and_update", change, _, { dot_and_change!(dout) });
            case!("dot_reduce_and_update, dY bf16", change - less, _, { dot_and_change!(rounded) });
        }
        if self.wants("sparse") {
            let bytes = unique * v * 4.0 + e * 8.0 + tokens as f64 * v * 4.0;
            let all = sum + dot + bytes;
            let mut grads = cuda.zeros::<f32>(entries * width)?;
            case!("reduce", bytes, _, { reduce!(dout, grads) });
            case!("reduce, dY bf16", bytes - less, _, { reduce!(rounded, grads) });
            case!("forward+backward", all, set, {
                both_ways!(set);
                reduce!(dout, grads);
            });
            case!("forward+backward, dY bf16", all + made, set, {
                both_ways!(set);
                round!();
                reduce!(rounded, grads);
            });
            // Gradients of rows in bf16, as the peers write theirs.
            let (bytes, all) = (bytes - unique * v * 2.0, all - unique * v * 2.0);
            let mut grads = cuda.zeros::<Bf16>(entries * width)?;
            case!("reduce to bf16", bytes, _, { reduce!(dout, grads) });
            case!("reduce to bf16, dY bf16", bytes - less, _, { reduce!(rounded, grads) });
            case!("forward+backward to bf16", all, set, {
                both_ways!(set);
                reduce!(dout, grads);
            });
            case!("forward+backward to bf16, dY bf16", all + made, set, {
                both_ways!(set);
                round!();
                reduce!(rounded, grads);
            });
        }
        if self.wants("step") {
            case!("step", sum + change + e * 4.0, set, {
                sum!(set);
                plan!(set);
                dot_and_change!(dout);
            });
            case!("step, dY bf16", sum + change + e * 4.0 - less, set, {
                sum!(set);
                plan!(set);
                dot_and_change!(rounded);
            });
            // The dots by themselves, as where a gradient is clipped before it is applied.
            case!("step in two passes", sum + dot + change, set, {
                both_ways!(set);
                change!(dout);
            });
            case!("step in two passes, dY bf16", sum + dot + change + made, set, {
                both_ways!(set);
                round!();
                change!(rounded);
            });
        }
        Ok(())
    }
}
