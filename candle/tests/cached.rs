//! A pool on the host with a cache of its rows on a GPU is a pool on the GPU, bit for bit.
//!
//! Without a device the tests are skipped and say so; `MEMLAYER_REQUIRE_CUDA=1` makes that a failure.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use memlayer_candle::{Compute, Config, Error, LayerInit, MemoryLayer, RowwiseAdagrad, Rule, ValuePool};
use memlayer_core::config::Kind;

mod common;
use common::{gpu, named_numbers, numbers};

const DIM: usize = 64;
const STEPS: usize = 9;
const RATE: f64 = 0.05;

fn memory() -> Config {
    Config::builder(DIM).heads(4).sub_keys(64).half_dim(16).top_k(8).build().expect("a configuration")
}

fn memory_plus() -> Config {
    let builder = Config::builder(DIM).heads(2).sub_keys(64).half_dim(16).top_k(8);
    builder.value_dim(40).silu_gate(true).qk_norm(true).build().expect("a configuration")
}

fn peer() -> Config {
    let builder = Config::builder(DIM).heads(4).sub_keys(64).half_dim(16).top_k(8);
    builder.kind(Kind::Peer).qk_norm(true).build().expect("a configuration")
}

/// Tokens of a step.
fn tokens(number: usize) -> usize {
    17 + number % 4
}

/// Layers in a row that share their pools.
struct Stack {
    device: Device,
    layers: Vec<MemoryLayer>,
    variables: Vec<(String, Var)>,
}

impl Stack {
    /// With all rows on the device, or `cache_rows` of them.
    fn new(config: Config, rule: Rule, depth: usize, cache_rows: Option<usize>, device: &Device) -> Self {
        let compute = Compute::for_device(device).expect("a backend");
        let pool = |dim, seed| {
            let (compute, slots) = (compute.clone(), config.slots());
            match cache_rows {
                Some(cache_rows) => ValuePool::cached(compute, slots, dim, rule, 0.5, seed, cache_rows),
                None => ValuePool::new(compute, slots, dim, rule, 0.5, seed),
            }
            .expect("a pool")
        };
        let u = (config.kind() == Kind::Peer).then(|| pool(config.input_dim(), 9));
        let v = pool(config.value_dim(), 3);
        let variables = VarMap::new();
        let vb = VarBuilder::from_varmap(&variables, DType::F32, device);
        let layer = |number: usize| {
            let (vb, init) = (vb.pp(number.to_string()), LayerInit::default());
            match &u {
                None => MemoryLayer::new(config, v.clone(), &init, &vb),
                Some(u) => MemoryLayer::peer(config, u.clone(), v.clone(), &init, &vb),
            }
        };
        let layers = (0..depth).map(|number| layer(number).expect("a layer")).collect();
        Self { device: device.clone(), layers, variables: named_numbers(&variables) }
    }

    fn pools(&self) -> impl Iterator<Item = &ValuePool> {
        self.layers[0].experts().into_iter().chain([self.layers[0].values()])
    }

    fn tensor(&self, tokens: usize, seed: u64) -> Tensor {
        Tensor::from_vec(numbers(tokens * DIM, seed), (tokens, DIM), &self.device).expect("a tensor")
    }

    /// Forward and backward of a step through all layers: what came of it. The gradients of rows are in their pools.
    fn walk(&self, number: usize) -> Vec<Vec<f32>> {
        let (tokens, seed) = (tokens(number), 10 * number as u64);
        let x = Var::from_tensor(&self.tensor(tokens, seed)).expect("a variable");
        let out = self
            .layers
            .iter()
            .fold(x.as_tensor().clone(), |x, layer| (layer.forward(&x).expect("a forward") + &x).expect("a sum"));
        // Between forward and backward other rows are read, for which those of the forward may have to go.
        let mut all = Vec::new();
        for other in 0..4 {
            let inferred = self.layers[0].infer(&self.tensor(2, 1000 * (seed + 1) + other)).expect("an inference");
            all.push(values(&inferred));
        }
        let loss = (&out * self.tensor(tokens, seed + 1)).expect("a product").sum_all().expect("a sum");
        let grads = loss.backward().expect("gradients");
        all.push(values(&out));
        let variables = self.variables.iter().map(|(_, var)| var).chain([&x]);
        all.extend(variables.map(|var| values(grads.get(var).expect("a gradient"))));
        all
    }

    /// A whole step: what came of it, and the most rows of a pool that it touched.
    fn step(&self, number: usize) -> (Vec<Vec<f32>>, usize) {
        let mut all = self.walk(number);
        let mut most = 0;
        for pool in self.pools() {
            // Some trainings want the norm of all gradients first.
            if number % 2 == 1 {
                #[allow(clippy::cast_possible_truncation, reason = "it was an f32")]
                all.push(vec![pool.grad_square_sum().expect("a norm") as f32]);
            }
            most = most.max(pool.step(RATE, 0.7).expect("a step").touched);
        }
        (all, most)
    }

    /// Rows and state of every pool.
    fn rows(&self) -> Vec<Vec<f32>> {
        let read = |pool: &ValuePool| pool.read(|rows, state| [rows.to_vec(), state.to_vec()]).expect("rows");
        self.pools().flat_map(read).collect()
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("values")
}

fn bits(all: &[Vec<f32>]) -> Vec<Vec<u32>> {
    all.iter().map(|values| values.iter().map(|v| v.to_bits()).collect()).collect()
}

/// Steps over pools on the device and over pools with a cache of just as many rows as the largest step touches.
fn same_bits(gpu: &Device, config: Config, rule: Rule, depth: usize) {
    let probe = Stack::new(config, rule, depth, None, gpu);
    let cache_rows = (0..STEPS).map(|number| probe.step(number).1).max().expect("steps");
    let entries = depth * tokens(3) * config.bag_len();
    assert!(cache_rows < entries.min(config.slots() / 2), "{cache_rows} rows by {entries} entries");

    let (plain, mut cached) =
        (Stack::new(config, rule, depth, None, gpu), Stack::new(config, rule, depth, Some(cache_rows), gpu));
    assert!(bits(&plain.rows()) == bits(&cached.rows()), "the first rows");
    for number in 0..STEPS {
        let ((expected, _), (found, _)) = (plain.step(number), cached.step(number));
        assert!(bits(&expected) == bits(&found), "{config:?}, {rule:?}, {depth} layers, step {number}");
        if number == 4 {
            // On the way rows and state are saved, and put back into new pools.
            let fresh = Stack::new(config, rule, depth, Some(cache_rows), gpu);
            for (from, to) in cached.pools().zip(fresh.pools()) {
                let steps = from.steps();
                from.read(|rows, state| to.restore(rows, state, steps)).expect("rows").expect("a restored pool");
            }
            cached = fresh;
        }
    }
    let expected = plain.rows();
    assert!(bits(&expected) == bits(&cached.rows()), "{config:?}, {rule:?}, {depth} layers: the rows");
    assert!(bits(&expected) == bits(&probe.rows()), "the probe's rows");
}

#[test]
fn every_bit_is_that_of_a_pool_on_the_device() {
    let Some(gpu) = gpu() else { return };
    same_bits(&gpu, memory(), Rule::RowwiseAdagrad(RowwiseAdagrad { eps: 1e-8 }), 1);
    same_bits(&gpu, memory_plus(), Rule::default(), 1);
}

#[test]
fn layers_that_share_a_pool_share_its_cache() {
    let Some(gpu) = gpu() else { return };
    same_bits(&gpu, memory_plus(), Rule::default(), 2);
    same_bits(&gpu, memory(), Rule::Sgd, 3);
}

#[test]
fn experts_are_cached_too() {
    let Some(gpu) = gpu() else { return };
    same_bits(&gpu, peer(), Rule::RowwiseAdagrad(RowwiseAdagrad { eps: 1e-8 }), 2);
}

#[test]
fn too_small_a_cache_is_an_error_and_changes_nothing() {
    let Some(gpu) = gpu() else { return };
    let (config, rule) = (memory(), Rule::default());
    let message = |cache_rows: usize, rows: usize| {
        format!("cache_rows {cache_rows} is less than the {rows} rows that one call or step touches")
    };
    let touched = Stack::new(config, rule, 2, None, &gpu).step(3).1;
    for norm_first in [false, true] {
        let small = Stack::new(config, rule, 2, Some(touched - 1), &gpu);
        let (pool, before) = (small.layers[0].values(), small.rows());
        small.walk(3);
        if norm_first {
            pool.grad_square_sum().expect("a norm");
        }
        for _ in 0..2 {
            let error = pool.step(RATE, 0.7).expect_err("too many rows");
            assert!(matches!(error, Error::CacheRows { .. }), "{error:?}");
            assert_eq!(error.to_string(), message(touched - 1, touched));
        }
        assert_eq!(pool.steps(), 0);
        assert!(bits(&before) == bits(&small.rows()), "rows changed");

        // Without these gradients it goes on as if nothing had been.
        pool.discard();
        let plain = Stack::new(config, rule, 2, None, &gpu);
        assert!(bits(&plain.step(0).0) == bits(&small.step(0).0), "the next step");
        assert!(bits(&plain.rows()) == bits(&small.rows()), "rows after the next step");
    }

    let touched = Stack::new(config, rule, 1, None, &gpu).step(3).1;
    let tiny = Stack::new(config, rule, 1, Some(10), &gpu);
    let before = tiny.rows();
    let error = tiny.layers[0].forward(&tiny.tensor(tokens(3), 30)).expect_err("too many rows").to_string();
    assert!(error.contains(&message(10, touched)), "{error}");
    assert!(bits(&before) == bits(&tiny.rows()), "rows changed");
}

#[test]
fn a_cache_may_be_larger_than_its_pool() {
    let Some(gpu) = gpu() else { return };
    let config = memory();
    let stack = |cache_rows| Stack::new(config, Rule::Sgd, 1, cache_rows, &gpu);
    let (plain, cached) = (stack(None), stack(Some(2 * config.slots())));
    assert!(bits(&plain.step(0).0) == bits(&cached.step(0).0) && bits(&plain.rows()) == bits(&cached.rows()));
}
