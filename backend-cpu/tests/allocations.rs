//! After the first step a training step allocates nothing, on no thread.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unsafe_code, reason = "tests")]

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering};
use std::alloc::System;

use memlayer_core::layer::{Activations, Grads, Keys, Params, Projection, ProjectionGrads};
use memlayer_core::ops::RowRule;
use memlayer_core::ops::optim::{Adam, RowUpdate, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use memlayer_core::{Config, DenseRows, Scratch, ScratchReq, TrainRows, layer};
use memlayer_cpu::{CachedRows, Cpu, FileRows, Isa};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed on to the system's allocator as it is, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's obligations are the system's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligations are the system's.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONFIG: Config =
    match Config::builder(32).heads(4).sub_keys(64).half_dim(16).top_k(8).qk_norm(true).silu_gate(true).build() {
        Ok(config) => config,
        Err(_) => panic!("sizes"),
    };
const TOKENS: usize = 256;

struct Buffers {
    parameters: Vec<f32>,
    values: Vec<f32>,
    state: Vec<f32>,
    x: Vec<f32>,
    activations: (Vec<f32>, Vec<u32>),
    out: Vec<f32>,
    grads: Vec<f32>,
    sums: Vec<f32>,
    dots: Vec<f32>,
    plan: Vec<u32>,
    scratch: (Vec<f32>, Vec<u32>),
}

type Table<'a> = DenseRows<'a, f32>;
type Train<'a> = TrainRows<'a, f32, f32>;
const RULE: Adam = Adam { betas: (0.9, 0.999), eps: 1e-8 };

impl Buffers {
    fn new(cpu: &Cpu) -> Self {
        let wave = |n: usize| (0..n).map(|i| ((i * 7919 % 1009) as f32 / 504.0) - 1.0).collect::<Vec<_>>();
        let (d, v, q) = (CONFIG.input_dim(), CONFIG.value_dim(), CONFIG.query_len());
        let activations = CONFIG.activations_req(TOKENS);
        let bags = TOKENS * CONFIG.bag_len();
        let scratch = layer::forward_scratch::<Table<'_>, Table<'_>, _>(cpu, &CONFIG, TOKENS)
            .or(layer::backward_scratch::<Table<'_>, Table<'_>, _>(cpu, &CONFIG, TOKENS))
            .or(cpu.plan_scratch(bags))
            .or(RowUpdate::<Train<'_>, Adam>::dot_reduce_and_update_scratch(cpu, v, bags));
        let memory = |req: ScratchReq| (vec![0.0; req.reals], vec![0; req.ids]);
        Self {
            parameters: wave(q * d + CONFIG.keys_len() + 2 * q + v * d + v * v),
            values: wave(CONFIG.slots() * v),
            state: vec![0.0; CONFIG.slots() * RULE.state_len(v)],
            x: wave(TOKENS * d),
            activations: memory(activations),
            out: vec![0.0; TOKENS * v],
            grads: vec![0.0; q * d + CONFIG.keys_len() + 2 * q + v * d + v * v + TOKENS * d],
            sums: vec![0.0; TOKENS * v],
            dots: vec![0.0; bags],
            plan: vec![0; PlanBuffers::<Cpu>::ids_len(bags)],
            scratch: memory(scratch),
        }
    }

    fn step(&mut self, cpu: &Cpu, count: u64) {
        let (d, v, q) = (CONFIG.input_dim(), CONFIG.value_dim(), CONFIG.query_len());
        let (query, rest) = self.parameters.split_at(q * d);
        let (keys, rest) = rest.split_at(CONFIG.keys_len());
        let (query_gain, rest) = rest.split_at(q);
        let (key_gain, rest) = rest.split_at(q);
        let (silu, value) = rest.split_at(v * d);
        let values = DenseRows::new(&self.values, v);
        let params = Params::<Cpu, _, Table<'_>> {
            query: Projection { weight: query, bias: None },
            keys: Keys::Trained { keys, gain: Some(key_gain) },
            query_gain: Some(query_gain),
            values: &values,
            experts: None,
            silu: Some(Projection { weight: silu, bias: None }),
            value_proj: Some(Projection { weight: value, bias: None }),
            sigmoid: None,
        };
        let memory = Scratch { reals: &mut self.activations.0[..], ids: &mut self.activations.1[..] };
        let mut activations = Activations::<Cpu>::new(&CONFIG, TOKENS, memory).unwrap();
        let mut scratch = Scratch { reals: &mut self.scratch.0[..], ids: &mut self.scratch.1[..] };
        layer::forward(cpu, &CONFIG, &params, &self.x, &mut activations, &mut self.out, scratch.reborrow()).unwrap();

        let (input, rest) = self.grads.split_at_mut(TOKENS * d);
        let (query, rest) = rest.split_at_mut(q * d);
        let (keys, rest) = rest.split_at_mut(CONFIG.keys_len());
        let (query_gain, rest) = rest.split_at_mut(q);
        let (key_gain, rest) = rest.split_at_mut(q);
        let (silu, value) = rest.split_at_mut(v * d);
        let mut grads = Grads::<Cpu>::new(&mut self.sums);
        grads.input = Some(input);
        grads.query = ProjectionGrads { weight: Some(query), bias: None };
        grads.keys = Some(keys);
        grads.query_gain = Some(query_gain);
        grads.key_gain = Some(key_gain);
        grads.silu = ProjectionGrads { weight: Some(silu), bias: None };
        grads.value_proj = ProjectionGrads { weight: Some(value), bias: None };
        layer::backward(cpu, &CONFIG, &params, &self.x, &mut activations, &self.out, grads, scratch.reborrow())
            .unwrap();

        let bags = TOKENS * CONFIG.bag_len();
        let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut self.plan, bags).unwrap();
        cpu.plan(activations.ids, CONFIG.slots(), buffers.reborrow(), scratch.reborrow()).unwrap();
        let weights = activations.coefficients();
        let gradient = RowGradient::<Cpu> { bag: CONFIG.bag_len(), dim: v, weights, sources: &self.sums };
        let table = TrainRows::new(&mut self.values, v, &mut self.state, RULE.state_len(v)).unwrap();
        let step = Step::new(0.01, count);
        cpu.reduce_and_update(table, &RULE, &step, buffers.plan(), gradient, scratch.reborrow()).unwrap();
        let table = TrainRows::new(&mut self.values, v, &mut self.state, RULE.state_len(v)).unwrap();
        cpu.dot_reduce_and_update(table, &RULE, &step, buffers.plan(), gradient, &mut self.dots, scratch).unwrap();
    }
}

#[test]
fn a_second_step_allocates_nothing() {
    for isa in Isa::available() {
        for threads in [1, 2, 5] {
            let cpu = Cpu::builder().isa(isa).threads(threads).build().unwrap();
            let mut buffers = Buffers::new(&cpu);
            buffers.step(&cpu, 1);
            // Workers that were late for the first step have their first now.
            std::thread::sleep(core::time::Duration::from_millis(20));
            let before = COUNT.load(Ordering::Relaxed);
            for count in 2..10 {
                buffers.step(&cpu, count);
            }
            assert_eq!(COUNT.load(Ordering::Relaxed), before, "{}", cpu.name());
        }
    }
    // Here and not in a test of its own: tests run at once, and allocations are counted for all.
    loads_allocate_nothing();
}

/// A cache of rows of a file has all its memory from the start.
fn loads_allocate_nothing() {
    let path = std::env::temp_dir().join(format!("memlayer-loads-{}", std::process::id()));
    std::fs::write(&path, vec![1; 4 * 1000]).unwrap();
    let layout = FileRows { codes: 0, scales: None, rows: 1000, dim: 4, group: 4 };
    let cpu = Cpu::builder().threads(2).build().unwrap();
    let mut cache = CachedRows::<i8>::new(std::fs::File::open(&path).unwrap(), layout, 4 * 100).unwrap();
    let mut places = [0; 60];
    let mut load = |first: u32| {
        let ids = core::array::from_fn::<u32, 60, _>(|i| (first * 37 + 13 * i as u32) % 1000);
        cache.load(&cpu, &ids, &mut places).unwrap();
    };
    load(0);
    std::thread::sleep(core::time::Duration::from_millis(20));
    let before = COUNT.load(Ordering::Relaxed);
    (1..2000).for_each(&mut load);
    assert_eq!(COUNT.load(Ordering::Relaxed), before, "loads");
    assert!(cache.rows_read() > 100_000);
    std::fs::remove_file(&path).unwrap();
}
