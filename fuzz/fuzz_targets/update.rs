//! Row updates on every instruction set: for rules, formats, roundings and values of any kind the reference's bits,
//! in one pass and in two, and no other row touched.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::ops::RowUpdate;
use memlayer_core::ops::optim::{Adagrad, Adam, Rounding, RowRule, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::{Bf16, Host, Reference, Scratch, ScratchReq, TrainRows, Trainable};
use memlayer_cpu::Cpu;
use memlayer_fuzz::{Input, Values, cpus};
use memlayer_tests::conformance::assert_same_bits;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    let (bag, rows) = (input.size(1..=5), input.size(1..=30));
    let (most, widest) = (input.pick([3, 120]), input.pick([3, 20, 70]));
    let (tokens, dim) = (input.size(0..=most / bag), input.size(1..=widest));
    let kind = input.pick([Values::Exact, Values::Special, Values::Any]);
    let mut step = Step::new(f64::from(input.size(0..=100) as u32) / 64.0, input.bits());
    step.grad_scale = if input.flag() { 1.0 } else { f64::from(input.values(1, kind)[0]) };
    if input.flag() {
        step.rounding = Rounding::Stochastic { seed: input.bits() };
    }
    let case = Case {
        bag,
        dim,
        step,
        ids: input.ids(tokens * bag, rows, false),
        weights: input.values(tokens * bag, kind),
        sources: input.values(tokens * dim, kind),
    };
    let codes = input.values(rows * dim, kind);
    let state = input.values(rows * 2 * dim, kind);
    let (betas, eps) = ((0.9, 0.999), 1e-8);
    let rule = input.size(0..=4);
    if input.flag() {
        let codes: Vec<Bf16> = codes.into_iter().map(Bf16::from_f32).collect();
        case.with(rule, &codes, &state, (betas, eps));
    } else {
        case.with(rule, &codes, &state, (betas, eps));
    }
});

struct Case {
    bag: usize,
    dim: usize,
    step: Step,
    ids: Vec<u32>,
    weights: Vec<f32>,
    sources: Vec<f32>,
}

type Rows<'a, E> = TrainRows<'a, E, f32>;

fn memory(req: ScratchReq) -> (Vec<f32>, Vec<u32>) {
    (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids])
}

fn lend<D: Host<Scalar = f32>>(memory: &mut (Vec<f32>, Vec<u32>)) -> Scratch<'_, D> {
    Scratch { reals: &mut memory.0, ids: &mut memory.1 }
}

/// Codes and state after a step. Only for a type that is known does the compiler know that views are slices, so this
/// is written once for each, by a macro.
macro_rules! run {
    ($name:ident, $device:ty) => {
        fn $name<E: Trainable, O: RowRule>(
            device: &$device,
            case: &Case,
            rule: &O,
            codes: &[E],
            state: &[f32],
            fused: bool,
        ) -> (Vec<E>, Vec<f32>) {
            type D = $device;
            let (entries, dim) = (case.ids.len(), case.dim);
            let (mut codes, mut state) = (codes.to_vec(), state.to_vec());
            let rows = codes.len() / dim;
            let table = TrainRows::new(&mut codes, dim, &mut state, rule.state_len(dim)).expect("a table");
            let mut buffer = vec![0; PlanBuffers::<D>::ids_len(entries)];
            let (mut buffers, _) = PlanBuffers::<D>::carve(&mut buffer, entries).expect("buffers");
            let mut scratch = memory(device.plan_scratch(entries));
            device.plan(&case.ids, rows, buffers.reborrow(), lend(&mut scratch)).expect("a plan");
            let gradient = RowGradient::<D> { bag: case.bag, dim, weights: &case.weights, sources: &case.sources };
            if fused {
                let mut scratch = memory(RowUpdate::<Rows<'_, E>, O>::reduce_and_update_scratch(device, dim));
                let scratch = lend(&mut scratch);
                device.reduce_and_update(table, rule, &case.step, buffers.plan(), gradient, scratch).expect("a step");
            } else {
                let mut grads = vec![f32::NAN; entries * dim];
                device.reduce(buffers.plan(), gradient, &mut grads).expect("gradients");
                let mut scratch = memory(RowUpdate::<Rows<'_, E>, O>::update_scratch(device, dim));
                device.update(table, rule, &case.step, buffers.plan(), &grads, lend(&mut scratch)).expect("a step");
            }
            (codes, state)
        }
    };
}
run!(run_reference, Reference<f32>);
run!(run_cpu, Cpu);

impl Case {
    fn with<E: Trainable>(&self, rule: usize, codes: &[E], state: &[f32], (betas, eps): ((f64, f64), f64)) {
        match rule {
            0 => self.check(&Sgd, codes, state),
            1 => self.check(&Adagrad { eps }, codes, state),
            2 => self.check(&RowwiseAdagrad { eps }, codes, state),
            3 => self.check(&Adam { betas, eps }, codes, state),
            _ => self.check(&RowwiseAdam { betas, eps }, codes, state),
        }
    }

    fn check<E: Trainable, O: RowRule>(&self, rule: &O, codes: &[E], state: &[f32]) {
        let state = &state[..codes.len() / self.dim * rule.state_len(self.dim)];
        let expected = run_reference(&Reference::new(), self, rule, codes, state, true);
        self.untouched(codes, state, &expected, rule.state_len(self.dim));
        let two = run_reference(&Reference::new(), self, rule, codes, state, false);
        same(&expected, &two, "in two passes");
        for cpu in cpus() {
            for fused in [true, false] {
                same(&expected, &run_cpu(cpu, self, rule, codes, state, fused), cpu.name());
            }
        }
    }

    /// Rows without an entry keep every bit, of values and of state.
    fn untouched<E: Trainable>(&self, codes: &[E], state: &[f32], after: &(Vec<E>, Vec<f32>), state_len: usize) {
        for row in (0..codes.len() / self.dim).filter(|&row| self.ids.iter().all(|&id| id as usize != row)) {
            let of = |values: &[f32], len: usize| values[row * len..(row + 1) * len].to_vec();
            assert_same_bits(&of(&values(codes), self.dim), &of(&values(&after.0), self.dim), "an untouched row");
            assert_same_bits(&of(state, state_len), &of(&after.1, state_len), "an untouched row's state");
        }
    }
}

fn values<E: Trainable>(codes: &[E]) -> Vec<f32> {
    (0..codes.len()).map(|i| E::value(codes, i)).collect()
}

fn same<E: Trainable>(expected: &(Vec<E>, Vec<f32>), found: &(Vec<E>, Vec<f32>), name: &str) {
    assert_same_bits(&values(&expected.0), &values(&found.0), name);
    assert_same_bits(&expected.1, &found.1, name);
}
