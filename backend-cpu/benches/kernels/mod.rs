//! The kernels of the CPU with inputs of one size: `operations` times them, and `examples/kernels` runs them for their
//! instruction counts.

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::dense::Linear;
use memlayer_core::ops::optim::{Adam, RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::ops::select::{Select, SelectBackward, SelectDims};
use memlayer_core::ops::{Dense, EmbeddingBag, RowRule, SelectRows};
use memlayer_core::{
    Bf16, DenseRows, E4m3, E5m2, Element, F16, Int4, Random, ScaledRows, Scratch, ScratchReq, TrainRows,
};
use memlayer_cpu::Cpu;

/// A kernel with its inputs: every call is the same work.
pub(crate) type Call<'a> = Box<dyn FnMut() + 'a>;

const SLOTS: usize = 64 * 64;
const DIM: usize = 256;
const TOKENS: usize = 16;
const DIMS: SelectDims = SelectDims { tokens: TOKENS, heads: 2, parts: 2, sub_keys: 512, half_dim: 64, top_k: 32 };
const BAG: usize = 64;

fn reals(n: usize, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; n];
    Random::new(seed).fill_normal(&mut values, 1.0);
    values
}

fn ids(n: usize) -> Vec<u32> {
    let mut random = Random::new(9);
    (0..n).map(|_| u32::try_from(random.below(SLOTS)).unwrap()).collect()
}

struct Memory(Vec<f32>, Vec<u32>);

impl Memory {
    fn new(req: ScratchReq) -> Self {
        Self(vec![0.0; req.reals], vec![0; req.ids])
    }
    fn lend(&mut self) -> Scratch<'_, Cpu> {
        Scratch { reals: &mut self.0, ids: &mut self.1 }
    }
}

fn select(cpu: &Cpu, dims: SelectDims) -> Call<'_> {
    let (queries, keys) = (reals(dims.queries_len(), 1), reals(dims.key_rows() * dims.half_dim, 2));
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    let mut memory = Memory::new(SelectRows::<DenseRows<'_, f32>>::select_scratch(cpu, dims));
    Box::new(move || {
        let keys = &DenseRows::new(&keys, dims.half_dim);
        let (ids, scores, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
        cpu.select(Select { dims, queries: &queries, keys, ids, scores, weights }, memory.lend()).unwrap();
    })
}

fn select_backward(cpu: &Cpu) -> Call<'_> {
    let (queries, keys) = (reals(DIMS.queries_len(), 1), reals(DIMS.key_rows() * DIMS.half_dim, 2));
    let (ids, weights) = (ids(DIMS.bags_len()), reals(DIMS.bags_len(), 3));
    let mut dweights = reals(DIMS.bags_len(), 4);
    let (mut dqueries, mut dkeys) = (vec![0.0; DIMS.queries_len()], vec![0.0; DIMS.key_rows() * DIMS.half_dim]);
    let mut memory = Memory::new(SelectRows::<DenseRows<'_, f32>>::select_backward_scratch(cpu, DIMS, true));
    Box::new(move || {
        let args = SelectBackward {
            dims: DIMS,
            queries: &queries[..],
            keys: &DenseRows::new(&keys, DIMS.half_dim),
            ids: &ids[..],
            weights: &weights[..],
            dweights: &mut dweights[..],
            dqueries: Some(&mut dqueries[..]),
            dkeys: Some(&mut dkeys[..]),
        };
        cpu.select_backward(args, memory.lend()).unwrap();
    })
}

fn bag<E: Element>(cpu: &Cpu, scaled: bool, code: impl Fn(u64) -> E) -> Call<'_> {
    let mut random = Random::new(5);
    let codes: Vec<E> = (0..SLOTS * E::codes(DIM)).map(|_| code(random.bits())).collect();
    let scales = if scaled { vec![0.01; SLOTS] } else { vec![] };
    let (ids, weights, mut out) = (ids(TOKENS * BAG), reals(TOKENS * BAG, 6), vec![0.0; TOKENS * DIM]);
    Box::new(move || {
        let args = BagSum { bag: BAG, ids: &ids[..], weights: &weights[..], out: &mut out[..], accumulate: false };
        match ScaledRows::new(&codes, &scales, DIM, DIM) {
            Some(table) => cpu.bag_sum(&table, args).unwrap(),
            None => cpu.bag_sum(&DenseRows::new(&codes, DIM), args).unwrap(),
        }
    })
}

fn bag_dot(cpu: &Cpu) -> Call<'_> {
    let (values, vectors, ids) = (reals(SLOTS * DIM, 1), reals(TOKENS * DIM, 2), ids(TOKENS * BAG));
    let mut out = vec![0.0; ids.len()];
    Box::new(move || {
        let args = BagDot { bag: BAG, ids: &ids[..], vectors: &vectors[..], out: &mut out[..] };
        cpu.bag_dot(&DenseRows::new(&values, DIM), args).unwrap();
    })
}

fn update<O: RowRule + 'static>(cpu: &Cpu, rule: O) -> Call<'_> {
    let (ids, weights, sources) = (ids(TOKENS * BAG), reals(TOKENS * BAG, 6), reals(TOKENS * DIM, 7));
    let (mut values, mut state) = (reals(SLOTS * DIM, 1), vec![0.1; SLOTS * rule.state_len(DIM)]);
    let req = cpu.plan_scratch(ids.len());
    let req = req.or(RowUpdate::<TrainRows<'_, f32, f32>, O>::reduce_and_update_scratch(cpu, DIM));
    let (mut memory, mut plan) = (Memory::new(req), vec![0; PlanBuffers::<Cpu>::ids_len(ids.len())]);
    Box::new(move || {
        let (mut plan, _) = PlanBuffers::<Cpu>::carve(&mut plan[..], ids.len()).unwrap();
        cpu.plan(&ids, SLOTS, plan.reborrow(), memory.lend()).unwrap();
        let gradient = RowGradient::<Cpu> { bag: BAG, dim: DIM, weights: &weights, sources: &sources };
        let table = TrainRows::new(&mut values, DIM, &mut state, rule.state_len(DIM)).unwrap();
        let step = Step::new(1e-3, 1);
        cpu.reduce_and_update(table, &rule, &step, plan.plan(), gradient, memory.lend()).unwrap();
    })
}

fn linear(cpu: &Cpu) -> Call<'_> {
    let (x, weight, mut out) = (reals(TOKENS * DIM, 1), reals(DIM * DIM, 2), vec![0.0; TOKENS * DIM]);
    Box::new(move || {
        let args = Linear { tokens: TOKENS, x: &x[..], weight: &weight[..], bias: None, out: &mut out[..] };
        cpu.linear(args).unwrap();
    })
}

/// What there is.
pub(crate) const NAMES: [&str; 14] = [
    "select",
    "select_one_token",
    "select_backward",
    "bag_sum_f32",
    "bag_sum_bf16",
    "bag_sum_f16",
    "bag_sum_int8",
    "bag_sum_e4m3",
    "bag_sum_e5m2",
    "bag_sum_int4",
    "bag_dot_f32",
    "update_adam",
    "update_rowwise_adagrad",
    "linear",
];

/// A kernel by its name.
///
/// # Panics
/// If there is none of that name.
#[allow(clippy::cast_possible_truncation, reason = "bits of a code")]
pub(crate) fn kernel<'a>(cpu: &'a Cpu, name: &str) -> Call<'a> {
    match name {
        "select" => select(cpu, DIMS),
        "select_one_token" => select(cpu, SelectDims { tokens: 1, ..DIMS }),
        "select_backward" => select_backward(cpu),
        "bag_sum_f32" => bag(cpu, false, |bits| (bits % 1000) as f32 - 500.0),
        "bag_sum_bf16" => bag(cpu, false, |bits| Bf16::from_bits(bits as u16 & 0xbfff)),
        "bag_sum_f16" => bag(cpu, false, |bits| F16::from_bits(bits as u16 & 0xbfff)),
        "bag_sum_int8" => bag(cpu, true, |bits| bits as i8),
        "bag_sum_e4m3" => bag(cpu, true, |bits| E4m3(bits as u8 & 0xf7)),
        "bag_sum_e5m2" => bag(cpu, true, |bits| E5m2(bits as u8 & 0xbf)),
        "bag_sum_int4" => bag(cpu, false, |bits| Int4::<32>(bits as u8 & 0xbf)),
        "bag_dot_f32" => bag_dot(cpu),
        "update_adam" => update(cpu, Adam { betas: (0.9, 0.999), eps: 1e-8 }),
        "update_rowwise_adagrad" => update(cpu, RowwiseAdagrad { eps: 1e-8 }),
        "linear" => linear(cpu),
        _ => panic!("no kernel {name}"),
    }
}
