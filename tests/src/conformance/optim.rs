//! Row rules: bit for bit, and only the touched rows.

use memlayer_core::ops::RowUpdate;
use memlayer_core::ops::optim::{Adagrad, Adam, RowRule, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::{Reference, Table};

use super::{Subject, assert_same_bits, assert_within};
use crate::device::{Memory, TestDevice, poisoned};
use crate::random::Random;

struct Case {
    rows: usize,
    dim: usize,
    steps: Vec<(Vec<u32>, Vec<f32>, Vec<f32>)>,
    table: Vec<f32>,
}

const BAG: usize = 4;

/// How a step is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Apart,
    OnePass,
    WithDots,
}

/// The table and its state after all steps, and what each step had for dots.
struct Trained {
    rows: Vec<f32>,
    state: Vec<f32>,
    /// For each step: the table before it, and the dots.
    dots: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Case {
    fn new(rows: usize, dim: usize, entries: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let table = random.reals(rows * dim);
        let steps = (0..3)
            .map(|_| (random.ids(entries, rows), random.reals(entries), random.reals(entries / BAG * dim)))
            .collect();
        Self { rows, dim, steps, table }
    }

    fn all() -> Vec<Self> {
        let shapes = [(1, 1, 4), (10, 3, 8), (50, 16, 40), (300, 17, 100), (4000, 64, 2000), (20, 100, 4000)];
        (0u64..).zip(shapes).map(|(seed, (rows, dim, entries))| Self::new(rows, dim, entries, seed)).collect()
    }

    fn run<D, O>(&self, device: &D, rule: &O, way: Way) -> Trained
    where
        D: TestDevice<Scalar = f32> + for<'x> RowUpdate<<D as TestDevice>::Train<'x>, O>,
        O: RowRule,
    {
        let state_len = rule.state_len(self.dim);
        let mut table = device.upload(&self.table);
        let mut state = device.upload(&vec![0f32; self.rows * state_len]);
        let mut dots = vec![];
        for (count, (ids, weights, sources)) in (1..).zip(&self.steps) {
            let mut step = Step::new(0.05, count);
            step.grad_scale = 0.75;
            let before = device.download(&table);
            let rows = D::train(&mut table, self.dim, &mut state, state_len);
            dots.push((before, self.step(device, rows, rule, &step, way, ids, weights, sources)));
        }
        Trained { rows: device.download(&table), state: device.download(&state), dots }
    }

    #[allow(clippy::too_many_arguments, reason = "a step is all of these")]
    fn step<D, S, O>(
        &self,
        device: &D,
        table: S,
        rule: &O,
        step: &Step,
        way: Way,
        ids: &[u32],
        weights: &[f32],
        sources: &[f32],
    ) -> Vec<f32>
    where
        S: Table,
        D: TestDevice<Scalar = f32> + RowUpdate<S, O>,
        O: RowRule,
    {
        let entries = ids.len();
        let mut buffer = device.upload(&vec![0u32; PlanBuffers::<D>::ids_len(entries)]);
        let (ids, weights, sources) = (device.upload(ids), device.upload(weights), device.upload(sources));
        let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut buffer), entries).expect("buffers");
        let mut scratch = Memory::new(device, device.plan_scratch(entries));
        device.plan(D::view(&ids), self.rows, buffers.reborrow(), scratch.lend()).expect("a plan");
        let gradient = RowGradient { bag: BAG, dim: self.dim, weights: D::view(&weights), sources: D::view(&sources) };
        let mut dots = poisoned(device, if way == Way::WithDots { entries } else { 0 });
        match way {
            Way::WithDots => {
                let mut scratch = Memory::new(device, device.dot_reduce_and_update_scratch(self.dim, entries));
                let (dots, scratch) = (D::view_mut(&mut dots), scratch.lend());
                device.dot_reduce_and_update(table, rule, step, buffers.plan(), gradient, dots, scratch)
            }
            Way::OnePass => {
                let mut scratch = Memory::new(device, device.reduce_and_update_scratch(self.dim));
                device.reduce_and_update(table, rule, step, buffers.plan(), gradient, scratch.lend())
            }
            Way::Apart => {
                let mut grads = poisoned(device, entries * self.dim);
                device.reduce(buffers.plan(), gradient, D::view_mut(&mut grads)).expect("sums");
                let mut scratch = Memory::new(device, device.update_scratch(self.dim));
                device.update(table, rule, step, buffers.plan(), D::view(&grads), scratch.lend())
            }
        }
        .expect("an update");
        device.synchronize().expect("an update");
        device.download(&dots)
    }
}

/// Every rule gives the reference's bits, rows and state.
///
/// # Panics
/// If a bit differs.
pub fn rows_have_the_references_bits<D: Subject>(device: &D) {
    fn check<D, O: RowRule + core::fmt::Debug>(device: &D, rule: O)
    where
        D: Subject + for<'x> RowUpdate<<D as TestDevice>::Train<'x>, O>,
    {
        for case in Case::all() {
            let expected = case.run(&Reference::<f32>::new(), &rule, Way::OnePass);
            for way in [Way::OnePass, Way::WithDots] {
                let found = case.run(device, &rule, way);
                assert_same_bits(&expected.rows, &found.rows, &format!("rows of {} under {rule:?}, {way:?}", case.dim));
                assert_same_bits(
                    &expected.state,
                    &found.state,
                    &format!("state of {} under {rule:?}, {way:?}", case.dim),
                );
            }
        }
    }
    check(device, Sgd);
    check(device, Adagrad { eps: 1e-10 });
    check(device, RowwiseAdagrad { eps: 1e-10 });
    check(device, Adam { betas: (0.9, 0.95), eps: 1e-8 });
    check(device, RowwiseAdam { betas: (0.9, 0.95), eps: 1e-8 });
}

/// Rows that no entry names keep their bits, and so does their state.
///
/// # Panics
/// If one changed.
pub fn untouched_rows_never_change<D: Subject>(device: &D) {
    let case = Case::new(500, 24, 60, 5);
    let rule = Adam { betas: (0.9, 0.95), eps: 1e-8 };
    let Trained { rows, state, .. } = case.run(device, &rule, Way::OnePass);
    let touched: Vec<u32> = case.steps.iter().flat_map(|(ids, ..)| ids.iter().copied()).collect();
    let mut untouched = 0;
    for id in 0..500u32 {
        let at = id as usize;
        let same = rows[at * 24..(at + 1) * 24] == case.table[at * 24..(at + 1) * 24];
        assert_eq!(same, !touched.contains(&id), "row {id}");
        if same {
            untouched += 1;
            assert!(state[at * 48..(at + 1) * 48].iter().all(|s| s.to_bits() == 0), "state of row {id}");
        }
    }
    assert!(untouched > 300, "the case leaves rows alone");
}

/// Reducing and updating in one pass gives the bits of one after the other.
///
/// # Panics
/// If a bit differs.
pub fn one_pass_is_as_two<D: Subject>(device: &D) {
    for case in Case::all() {
        let rule = RowwiseAdagrad { eps: 1e-10 };
        let one = case.run(device, &rule, Way::OnePass);
        let two = case.run(device, &rule, Way::Apart);
        assert_same_bits(&one.rows, &two.rows, "rows in one pass and in two");
        assert_same_bits(&one.state, &two.state, "state in one pass and in two");
    }
}

/// The dots of an update are those of the rows as they were before it: against `f64`, within the bound of their terms,
/// and exact ones exactly.
///
/// # Panics
/// If one is out of its bound.
pub fn dots_are_of_the_rows_before<D: Subject>(device: &D) {
    let hot = Case::new(3, 40, 2400, 7);
    for mut case in Case::all().into_iter().chain([hot]) {
        for exact in [false, true] {
            if exact {
                // Integers, as the first step finds them.
                let mut random = Random::new(70);
                case.table = random.integers(case.table.len(), 8);
                case.steps.iter_mut().for_each(|(_, _, sources)| *sources = random.integers(sources.len(), 8));
                case.steps.truncate(1);
            }
            let dim = case.dim;
            let trained = case.run(device, &RowwiseAdagrad { eps: 1e-10 }, Way::WithDots);
            for ((ids, _, sources), (before, dots)) in case.steps.iter().zip(&trained.dots) {
                let (mut expected, mut bounds) = (vec![], vec![]);
                for (e, &id) in ids.iter().enumerate() {
                    let row = &before[id as usize * dim..][..dim];
                    let terms =
                        sources[e / BAG * dim..][..dim].iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    expected.push(terms.clone().sum());
                    let scale = if exact { 0.0 } else { dim as f64 * f64::from(f32::EPSILON) };
                    bounds.push(scale * terms.map(f64::abs).sum::<f64>());
                }
                assert_within(&expected, dots, &bounds, &format!("dots of rows of {dim}"));
            }
        }
    }
}
