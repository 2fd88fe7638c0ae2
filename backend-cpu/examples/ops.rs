//! How long each operation takes: `cargo run --release -p memlayer-cpu --example ops [small large token linear steps
//! paper]`, all but the last without arguments.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "an example")]

use std::time::Instant;

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::dense::{Gate, Linear, LinearBackward, NormDims, RmsNorm, RmsNormBackward};
use memlayer_core::ops::optim::{Adam, RowUpdate, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::ops::select::{Select, SelectBackward, SelectDims};
use memlayer_core::ops::{Dense, EmbeddingBag, SelectRows};
use memlayer_core::{DenseRows, Scratch, ScratchReq, TrainRows};
use memlayer_cpu::{Cpu, TableMemory};

type Rows<'a> = DenseRows<'a, f32>;
type Train<'a> = TrainRows<'a, f32, f32>;
const RULE: Adam = Adam { betas: (0.9, 0.999), eps: 1e-8 };

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

fn reals(n: usize) -> Vec<f32> {
    let mut seed = n as u64;
    (0..n).map(|_| (random(&mut seed) % (1 << 20)) as f32 / (1 << 19) as f32 - 1.0).collect()
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

/// The median time of a few runs, in milliseconds.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 3 || (times.len() < 51 && start.elapsed().as_millis() < 400) {
        let start = Instant::now();
        f();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

struct Shape {
    tokens: usize,
    heads: usize,
    sub_keys: usize,
    half_dim: usize,
    top_k: usize,
    value_dim: usize,
}

fn row(name: &str, cpus: &[Cpu], mut f: impl FnMut(&Cpu)) {
    with_scratch(name, cpus, |_| ScratchReq::EMPTY, |cpu, _| f(cpu));
}

fn with_scratch(name: &str, cpus: &[Cpu], req: impl Fn(&Cpu) -> ScratchReq, mut f: impl FnMut(&Cpu, Scratch<'_, Cpu>)) {
    let mut times = String::new();
    for cpu in cpus {
        let mut memory = Memory::new(req(cpu));
        times += &format!("{:10.3}", time(|| f(cpu, memory.lend())));
    }
    println!("  {name:<22}{times}");
}

fn shape(cpus: &[Cpu], shape: &Shape) {
    let &Shape { tokens, heads, sub_keys, half_dim, top_k, value_dim } = shape;
    println!("T={tokens} H={heads} N={sub_keys} C={half_dim} K={top_k} V={value_dim}");
    let dims = SelectDims { tokens, heads, parts: 2, sub_keys, half_dim, top_k };
    let (queries, keys) = (reals(dims.queries_len()), reals(dims.key_rows() * half_dim));
    let keys = &DenseRows::new(&keys, half_dim);
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    let req = |cpu: &Cpu| SelectRows::<Rows<'_>>::select_scratch(cpu, dims);
    with_scratch("select", cpus, req, |cpu, memory| {
        let (ids, scores, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
        cpu.select(Select { dims, queries: &queries, keys, ids, scores, weights }, memory).unwrap();
    });
    let (mut dweights, mut dqueries) = (reals(n), vec![0.0; dims.queries_len()]);
    let mut dkeys = vec![0.0; dims.key_rows() * half_dim];
    let req = |cpu: &Cpu| SelectRows::<Rows<'_>>::select_backward_scratch(cpu, dims, true);
    with_scratch("select_backward", cpus, req, |cpu, memory| {
        let args = SelectBackward {
            dims,
            queries: &queries[..],
            keys,
            ids: &ids[..],
            weights: &weights[..],
            dweights: &mut dweights[..],
            dqueries: Some(&mut dqueries[..]),
            dkeys: Some(&mut dkeys[..]),
        };
        cpu.select_backward(args, memory).unwrap();
    });
    let slots = (sub_keys * sub_keys).min(1 << 18);
    let mut values = reals(slots * value_dim);
    for id in &mut ids {
        *id %= slots as u32;
    }
    let mut state = vec![0.0; 2 * values.len()];
    rows(cpus, (heads * top_k, value_dim), &ids, &weights, (&mut values, &mut state));
    norms(cpus, tokens * heads * 2, half_dim, heads * 2);
}

fn rows(
    cpus: &[Cpu],
    (bag, dim): (usize, usize),
    ids: &[u32],
    weights: &[f32],
    (values, state): (&mut [f32], &mut [f32]),
) {
    let mut out = vec![0.0; ids.len() / bag * dim];
    let mut dots = vec![0.0; ids.len()];
    let table = &DenseRows::new(values, dim);
    row("bag_sum", cpus, |cpu| {
        cpu.bag_sum(table, BagSum { bag, ids, weights, out: &mut out[..], accumulate: false }).unwrap();
    });
    row("bag_dot", cpus, |cpu| cpu.bag_dot(table, BagDot { bag, ids, vectors: &out[..], out: &mut dots[..] }).unwrap());
    let slots = values.len() / dim;
    let mut buffers = vec![0; PlanBuffers::<Cpu>::ids_len(ids.len())];
    let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut buffers, ids.len()).unwrap();
    let req = |cpu: &Cpu| cpu.plan_scratch(ids.len());
    with_scratch("plan", cpus, req, |cpu, memory| {
        cpu.plan(ids, slots, buffers.reborrow(), memory).unwrap();
    });
    let req = |cpu: &Cpu| RowUpdate::<Train<'_>, Adam>::reduce_and_update_scratch(cpu, dim);
    with_scratch("reduce_and_update", cpus, req, |cpu, memory| {
        let gradient = RowGradient::<Cpu> { bag, dim, weights, sources: &out };
        let table = TrainRows::new(values, dim, state, 2 * dim).unwrap();
        cpu.reduce_and_update(table, &RULE, &Step::new(1e-3, 1), buffers.plan(), gradient, memory).unwrap();
    });
}

fn norms(cpus: &[Cpu], rows: usize, dim: usize, groups: usize) {
    let dims = NormDims { rows, dim, groups, repeat: 1 };
    let (x, gain, mut out, mut dgain) =
        (reals(rows * dim), reals(groups * dim), reals(rows * dim), reals(groups * dim));
    row("rms_norm", cpus, |cpu| cpu.rms_norm(RmsNorm { dims, x: &x[..], gain: &gain[..], out: &mut out[..] }).unwrap());
    row("rms_norm_backward", cpus, |cpu| {
        let dgain = Some(&mut dgain[..]);
        cpu.rms_norm_backward(RmsNormBackward { dims, x: &x[..], gain: &gain[..], dx: &mut out[..], dgain }).unwrap();
    });
}

fn linear(cpus: &[Cpu], tokens: usize, inputs: usize, outputs: usize) {
    println!("linear T={tokens} I={inputs} O={outputs}");
    let (x, weight, mut out) = (reals(tokens * inputs), reals(outputs * inputs), reals(tokens * outputs));
    row("linear", cpus, |cpu| {
        cpu.linear(Linear { tokens, x: &x[..], weight: &weight[..], bias: None, out: &mut out[..] }).unwrap();
    });
    let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![0.0; weight.len()]);
    row("linear_backward", cpus, |cpu| {
        let args = LinearBackward {
            tokens,
            x: &x[..],
            weight: &weight[..],
            dout: &out[..],
            dx: Some(&mut dx[..]),
            accumulate: false,
            dweight: Some(&mut dweight[..]),
            dbias: None,
        };
        cpu.linear_backward(args).unwrap();
    });
    let mut gated = vec![0.0; out.len()];
    row("silu_gate", cpus, |cpu| {
        cpu.silu_gate(Gate { y: &out[..], gate: &out[..], out: &mut gated[..] }).unwrap();
    });
}

/// A sparse step over as many rows, of tables of very different sizes.
fn steps(cpus: &[Cpu]) {
    let (tokens, bag, dim, touched) = (4096, 32, 64, 1 << 15);
    let mut seed = 1;
    let chosen: Vec<u32> = (0..tokens * bag).map(|_| (random(&mut seed) % touched) as u32).collect();
    let weights = reals(chosen.len());
    for log in [16, 22] {
        let slots = 1usize << log;
        println!("sparse step T={tokens} L={bag} V={dim}, {touched} rows out of 2^{log}");
        // An odd factor permutes the rows of a table whose size is a power of two: as many distinct rows of either,
        // scattered without a stride that would make them share sets of the caches.
        let ids: Vec<u32> = chosen.iter().map(|&id| id.wrapping_mul(0x9e37_79b1) & (slots as u32 - 1)).collect();
        let memory = |len| TableMemory::<f32>::zeroed(len).expect("memory for a table");
        let (mut values, mut state) = (memory(slots * dim), memory(slots * dim * 2));
        values.fill(0.1);
        state.fill(0.1);
        rows(cpus, (bag, dim), &ids, &weights, (&mut values, &mut state));
    }
}

fn main() {
    let cpus = [1, 2].map(|threads| Cpu::builder().threads(threads).build().unwrap());
    println!("milliseconds, {} and {}", cpus[0].name(), cpus[1].name());
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let want = |name: &str| wanted.iter().any(|arg| arg == name) || wanted.is_empty() && name != "paper";
    if want("small") {
        shape(&cpus, &Shape { tokens: 4096, heads: 4, sub_keys: 64, half_dim: 8, top_k: 4, value_dim: 64 });
        shape(&cpus, &Shape { tokens: 4096, heads: 4, sub_keys: 128, half_dim: 16, top_k: 8, value_dim: 64 });
    }
    if want("large") {
        shape(&cpus, &Shape { tokens: 4096, heads: 8, sub_keys: 256, half_dim: 16, top_k: 16, value_dim: 64 });
    }
    if want("token") {
        shape(&cpus, &Shape { tokens: 1, heads: 4, sub_keys: 1024, half_dim: 256, top_k: 32, value_dim: 1024 });
        linear(&cpus, 1, 1024, 1024);
    }
    if want("linear") {
        linear(&cpus, 4096, 64, 256);
        linear(&cpus, 4096, 256, 64);
    }
    if want("steps") {
        steps(&cpus);
    }
    if want("paper") {
        shape(&cpus, &Shape { tokens: 8192, heads: 4, sub_keys: 1024, half_dim: 256, top_k: 32, value_dim: 1024 });
        linear(&cpus, 8192, 1024, 1024);
    }
}
