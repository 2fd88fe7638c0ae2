//! Gradients with sources in bf16: the bits of the same values in f32. Skipped, and said so, where there is no device.

use memlayer_core::element::NEAREST;
use memlayer_core::ops::RowReduce;
use memlayer_core::ops::optim::{Adagrad, Adam, Rounding, RowRule, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::{ArgError, Bf16, Device, Trainable};
use memlayer_cuda::{Buffer, Cuda, CudaError, DeviceRule, MixedGradient, TrainRows, View};
use memlayer_tests::conformance::skipped;
use memlayer_tests::device::{Memory, TestDevice};
use memlayer_tests::random::Random;

mod common;
use common::cuda;

const BAG: usize = 4;

/// A plan, and the gradients of its rows.
struct Case {
    rows: usize,
    dim: usize,
    entries: usize,
    plan: Buffer<u32>,
    weights: Buffer<f32>,
}

impl Case {
    /// Rows of all three lengths.
    fn new(cuda: &Cuda, random: &mut Random, dim: usize) -> Self {
        let (rows, entries) = if dim > 10_000 { (40, 640) } else { (900, 4000) };
        let ids: Vec<u32> = random.ids(entries, rows).into_iter().map(|id| [5, id % 20, id][id as usize % 3]).collect();
        let ids = cuda.upload(&ids).expect("ids");
        let mut plan = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries)).expect("a plan");
        let (buffers, _) = PlanBuffers::<Cuda>::carve(plan.view_mut(), entries).expect("a plan");
        let mut scratch = Memory::new(cuda, cuda.plan_scratch(entries));
        cuda.plan(ids.view(), rows, buffers, scratch.lend()).expect("a plan");
        let weights = cuda.upload(&random.reals::<f32>(entries)).expect("weights");
        Self { rows, dim, entries, plan, weights }
    }

    fn gradient<'a, S>(&'a self, sources: View<'a, S>) -> MixedGradient<'a, S> {
        MixedGradient { bag: BAG, dim: self.dim, weights: self.weights.view(), sources }
    }

    /// The sums in rows of `E`.
    fn sums<E: Trainable, S: Trainable>(&mut self, cuda: &Cuda, sources: View<'_, S>) -> Vec<E> {
        let mut out = cuda.zeros::<E>(self.rows * self.dim).expect("sums");
        let (plan, _) = PlanBuffers::<Cuda>::carve(self.plan.view_mut(), self.entries).expect("a plan");
        let gradient = MixedGradient { bag: BAG, dim: self.dim, weights: self.weights.view(), sources };
        cuda.reduce_as(plan.plan(), gradient, out.view_mut()).expect("sums");
        cuda.synchronize().expect("sums");
        TestDevice::download(cuda, &out)
    }

    /// What an update leaves: rows, their states, and the dots if they are found in the same pass.
    fn update<E: Trainable, O: RowRule + DeviceRule, S: Trainable>(
        &mut self,
        cuda: &Cuda,
        rule: &O,
        sources: View<'_, S>,
        with_dots: bool,
    ) -> (Vec<E>, Vec<f32>, Vec<f32>) {
        let (dim, state_len) = (self.dim, rule.state_len(self.dim));
        let start = Random::new(99).reals::<f32>(self.rows * dim);
        let start: Vec<E> = start.into_iter().map(|x| E::store(x, NEAREST)).collect();
        let mut codes = cuda.upload(&start).expect("rows");
        let mut state = cuda.zeros::<f32>(self.rows * state_len).expect("a state");
        let mut dots = cuda.zeros::<f32>(self.entries).expect("dots");
        let mut step = Step::new(0.1, 3);
        step.rounding = Rounding::Stochastic { seed: 7 };
        let req = RowUpdate::<TrainRows<'_, E>, O>::dot_reduce_and_update_scratch(cuda, dim, self.entries);
        let mut scratch = Memory::new(cuda, req);
        let (plan, _) = PlanBuffers::<Cuda>::carve(self.plan.view_mut(), self.entries).expect("a plan");
        let gradient = MixedGradient { bag: BAG, dim, weights: self.weights.view(), sources };
        for _ in 0..2 {
            let rows = TrainRows::new(codes.view_mut(), dim, state.view_mut(), state_len).expect("rows");
            let (scratch, plan) = (scratch.lend(), plan.plan());
            if with_dots {
                let dots = dots.view_mut();
                cuda.dot_reduce_and_update_as(rows, rule, &step, plan, gradient, dots, scratch).expect("an update");
            } else {
                cuda.reduce_and_update_as(rows, rule, &step, plan, gradient, scratch).expect("an update");
            }
        }
        cuda.synchronize().expect("an update");
        let [states, dots] = [&state, &dots].map(|buffer| TestDevice::download(cuda, buffer));
        (TestDevice::download(cuda, &codes), states, dots)
    }
}

/// Bits, for NaN is a result too.
fn bits(reals: &[f32]) -> Vec<u32> {
    reals.iter().map(|x| x.to_bits()).collect()
}

fn check_updates<E: Trainable + PartialEq, O: RowRule + DeviceRule>(
    cuda: &Cuda,
    case: &mut Case,
    rule: &O,
    wide: View<'_, f32>,
    narrow: View<'_, Bf16>,
) {
    for with_dots in [false, true] {
        let expected = case.update::<E, _, _>(cuda, rule, wide, with_dots);
        let found = case.update::<E, _, _>(cuda, rule, narrow, with_dots);
        let what = format!("rows of {}, {}, dots {with_dots}", case.dim, E::FORMAT.name());
        assert!(expected.0 == found.0, "{what}");
        assert!(bits(&expected.1) == bits(&found.1), "states of {what}");
        assert!(bits(&expected.2) == bits(&found.2), "dots of {what}");
    }
}

#[test]
fn sources_in_bf16_give_the_bits_of_the_same_values_in_f32() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    for (seed, dim) in [(1, 64), (2, 100), (3, 17), (4, 1024), (5, 2000), (6, 4096), (7, 1), (8, 30_000)] {
        let mut random = Random::new(seed);
        let mut case = Case::new(&cuda, &mut random, dim);
        let codes: Vec<Bf16> = random.reals::<f32>(case.entries / BAG * dim).into_iter().map(Bf16::from_f32).collect();
        let reals: Vec<f32> = codes.iter().map(|code| code.to_f32()).collect();
        let (wide, narrow) = (cuda.upload(&reals).expect("sources"), cuda.upload(&codes).expect("sources"));
        let (wide, narrow) = (wide.view(), narrow.view());
        let (expected, found) = (case.sums::<f32, _>(&cuda, wide), case.sums::<f32, _>(&cuda, narrow));
        assert!(expected == found, "sums of rows of {dim}");
        let (expected, found) = (case.sums::<Bf16, _>(&cuda, wide), case.sums::<Bf16, _>(&cuda, narrow));
        assert!(expected == found, "sums of rows of {dim} in bf16");
        let (betas, eps) = ((0.9, 0.99), 1e-8);
        check_updates::<Bf16, _>(&cuda, &mut case, &RowwiseAdagrad { eps }, wide, narrow);
        if dim < 30_000 {
            check_updates::<f32, _>(&cuda, &mut case, &RowwiseAdagrad { eps }, wide, narrow);
            check_updates::<Bf16, _>(&cuda, &mut case, &Sgd, wide, narrow);
            check_updates::<f32, _>(&cuda, &mut case, &Adagrad { eps }, wide, narrow);
            check_updates::<Bf16, _>(&cuda, &mut case, &Adam { betas, eps }, wide, narrow);
            check_updates::<Bf16, _>(&cuda, &mut case, &RowwiseAdam { betas, eps }, wide, narrow);
        }
    }
}

/// Sources that begin where four of them cannot be read at once, and such as are no numbers.
#[test]
fn sources_anywhere_and_of_any_value() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(9);
    let mut case = Case::new(&cuda, &mut random, 64);
    let mut codes: Vec<Bf16> =
        random.reals::<f32>(case.entries / BAG * 64 + 1).into_iter().map(Bf16::from_f32).collect();
    for (at, special) in [(70, f32::NAN), (700, f32::INFINITY), (7000, f32::NEG_INFINITY), (9000, f32::MAX)] {
        codes[at] = Bf16::from_f32(special);
    }
    let reals: Vec<f32> = codes.iter().map(|code| code.to_f32()).collect();
    let (wide, narrow) = (cuda.upload(&reals).expect("sources"), cuda.upload(&codes).expect("sources"));
    let (wide, narrow) = (wide.view().slice(1..reals.len()), narrow.view().slice(1..reals.len()));
    let (expected, found) = (case.sums::<f32, _>(&cuda, wide), case.sums::<f32, _>(&cuda, narrow));
    assert!(expected.iter().any(|x| x.is_nan()) && bits(&expected) == bits(&found));
    let rule = RowwiseAdagrad { eps: 1e-8 };
    let (expected, found) =
        (case.update::<f32, _, _>(&cuda, &rule, wide, true), case.update::<f32, _, _>(&cuda, &rule, narrow, true));
    assert!(bits(&expected.0) == bits(&found.0) && bits(&expected.2) == bits(&found.2));
}

#[test]
fn rounding_is_the_hosts() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(10);
    let mut reals = random.reals::<f32>(100_003);
    reals.extend(random.ids(50_000, 1 << 31).into_iter().flat_map(|bits| [bits, bits | 1 << 31]).map(f32::from_bits));
    reals.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1.003_906_2, 1.011_718_8]);
    let from = cuda.upload(&reals).expect("reals");
    for skip in [0, 1, 4] {
        let reals = &reals[skip..];
        let mut to = cuda.zeros::<Bf16>(reals.len()).expect("codes");
        cuda.round(from.view().slice(skip..skip + reals.len()), to.view_mut()).expect("codes");
        let found: Vec<Bf16> = TestDevice::download(&cuda, &to);
        for (real, found) in reals.iter().zip(found) {
            assert_eq!(found.to_bits(), Bf16::from_f32(*real).to_bits(), "{real:?}");
        }
    }
    let mut short = cuda.zeros::<Bf16>(3).expect("codes");
    let error = ArgError::Shape { op: "round", operand: "to", expected: reals.len(), found: 3 };
    assert_eq!(cuda.round(from.view(), short.view_mut()), Err(CudaError::Arg(error)));
}

#[test]
fn sources_that_do_not_fit_are_refused() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let case = Case::new(&cuda, &mut Random::new(11), 8);
    let sources = cuda.zeros::<Bf16>(case.entries / BAG * 8 - 1).expect("sources");
    let mut out = cuda.zeros::<f32>(case.rows * 8).expect("sums");
    let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(case.entries)).expect("a plan");
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), case.entries).expect("a plan");
    let expected = case.entries / BAG * 8;
    let error = ArgError::Shape { op: "reduce", operand: "sources", expected, found: expected - 1 };
    let found = cuda.reduce_as(plan.plan(), case.gradient(sources.view()), out.view_mut());
    assert_eq!(found, Err(CudaError::Arg(error)));
    let gradient = MixedGradient { bag: 3, ..case.gradient(sources.view()) };
    let error = ArgError::Size { op: "reduce", operand: "entries", found: case.entries, multiple_of: 3 };
    assert_eq!(cuda.reduce_as(plan.plan(), gradient, out.view_mut()), Err(CudaError::Arg(error)));
}
