//! The layer on a GPU is the layer on the CPU: outputs, gradients, rows after steps, for every variant.
//!
//! Without a device the tests are skipped and say so; `MEMLAYER_REQUIRE_CUDA=1` makes that a failure.
#![cfg(feature = "cuda")]

use std::collections::HashMap;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use memlayer_candle::{Compute, Config, LayerInit, MemoryLayer, RowwiseAdagrad, Rule, ValuePool};
use memlayer_core::config::Kind;

mod common;
use common::{gpu, named_numbers, numbers};

fn variants() -> Vec<Config> {
    let base = Config::builder(6).heads(2).sub_keys(5).half_dim(3).top_k(2);
    [
        base,
        base.silu_gate(true).qk_norm(true),
        base.value_dim(4).sigmoid_gate(true),
        base.kind(Kind::Peer).qk_norm(true),
        base.flat_keys().sub_keys(12),
        Config::builder(64).heads(4).sub_keys(32).half_dim(16).top_k(8).silu_gate(true).qk_norm(true),
    ]
    .into_iter()
    .map(|builder| builder.build().expect("a configuration"))
    .collect()
}

/// A layer on a device, its variables the same wherever that is.
struct Trained {
    device: Device,
    layer: MemoryLayer,
    variables: Vec<(String, Var)>,
    rate: f64,
}

impl Trained {
    fn new(config: Config, rule: Rule, device: &Device) -> Self {
        let compute = Compute::for_device(device).expect("a backend");
        let pool = |dim, seed| ValuePool::new(compute.clone(), config.slots(), dim, rule, 0.5, seed).expect("a pool");
        let init = LayerInit { gain: 1.2 };
        let shapes = candle_nn::VarMap::new();
        let vb = VarBuilder::from_varmap(&shapes, DType::F32, device);
        let values = pool(config.value_dim(), 3);
        let layer = match config.kind() {
            Kind::Memory => MemoryLayer::new(config, values, &init, &vb),
            Kind::Peer => MemoryLayer::peer(config, pool(config.input_dim(), 9), values, &init, &vb),
        };
        let variables = named_numbers(&shapes);
        Self { device: device.clone(), layer: layer.expect("a layer"), variables, rate: 0.05 }
    }

    /// One step on tokens picked by `seed`; everything that came of it, by name.
    fn step(&self, tokens: usize, seed: u64) -> HashMap<String, Vec<f32>> {
        let config = self.layer.config();
        let tensor = |dim: usize, seed| {
            Tensor::from_vec(numbers(tokens * dim, seed), (tokens, dim), &self.device).expect("a tensor")
        };
        let x = Var::from_tensor(&tensor(config.input_dim(), seed)).expect("a variable");
        let out = self.layer.forward(x.as_tensor()).expect("a forward");
        let loss = (&out * tensor(config.output_dim(), seed + 1)).expect("a product").sum_all().expect("a sum");
        let grads = loss.backward().expect("gradients");
        let mut all = HashMap::new();
        let mut keep = |name: &str, tensor: &Tensor| {
            all.insert(name.to_owned(), tensor.flatten_all().expect("flat").to_vec1::<f32>().expect("values"));
        };
        keep("out", &out);
        keep("dx", grads.get(&x).expect("a gradient"));
        for (name, var) in &self.variables {
            keep(&format!("d {name}"), grads.get(var).expect("a gradient"));
        }
        for (name, pool) in [("values", Some(self.layer.values())), ("experts", self.layer.experts())] {
            let Some(pool) = pool else { continue };
            let square = pool.grad_square_sum().expect("a norm");
            let report = pool.step(self.rate, 0.7).expect("a step");
            #[allow(clippy::cast_possible_truncation, reason = "a test's number")]
            all.insert(format!("{name} report"), vec![report.entries as f32, report.touched as f32, square as f32]);
            let (rows, state) = pool.read(|rows, state| (rows.to_vec(), state.to_vec())).expect("rows");
            all.insert(format!("{name} rows"), rows);
            all.insert(format!("{name} state"), state);
        }
        all
    }
}

/// The relative L2 distance.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    difference / norm(&mut a.iter().map(|&a| f64::from(a))).max(1e-12)
}

#[test]
fn a_gpu_gives_what_the_cpu_gives() {
    let Some(gpu) = gpu() else { return };
    for rule in [Rule::Sgd, Rule::RowwiseAdagrad(RowwiseAdagrad { eps: 1e-8 })] {
        for config in variants() {
            let (here, there) = (Trained::new(config, rule, &Device::Cpu), Trained::new(config, rule, &gpu));
            for step in 0..3 {
                let tokens = 7 + step;
                let (here, there) = (here.step(tokens, 5 + step as u64), there.step(tokens, 5 + step as u64));
                assert_eq!(here.len(), there.len());
                for (name, expected) in &here {
                    let error = distance(expected, &there[name]);
                    assert!(error < 2e-5, "{config:?}, step {step}: {name} is {error:e} off");
                }
            }
        }
    }
}

#[test]
fn the_same_work_gives_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let config = variants()[5];
    let run = || {
        let trained = Trained::new(config, Rule::default(), &gpu);
        (0..3).map(|step| trained.step(300, step)).collect::<Vec<_>>()
    };
    let (first, second) = (run(), run());
    for (a, b) in first.iter().zip(&second) {
        for (name, values) in a {
            let same = values.iter().zip(&b[name]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name} differs from run to run");
        }
    }
}

#[test]
fn tensors_elsewhere_are_refused() {
    let Some(gpu) = gpu() else { return };
    let trained = Trained::new(variants()[1], Rule::Sgd, &gpu);
    let x = Tensor::zeros((2, 6), DType::F32, &Device::Cpu).expect("a tensor");
    assert!(trained.layer.forward(&x).is_err());
    let (on_gpu, on_cpu) = (Compute::for_device(&gpu).expect("a backend"), Compute::for_device(&Device::Cpu));
    let peer = variants()[3];
    let pool = |compute| ValuePool::new(compute, peer.slots(), 6, Rule::Sgd, 0.5, 1).expect("a pool");
    let vb = VarBuilder::zeros(DType::F32, &gpu);
    let mixed = MemoryLayer::peer(peer, pool(on_gpu), pool(on_cpu.expect("a backend")), &LayerInit::default(), &vb);
    assert!(mixed.expect_err("two places").to_string().contains("different devices"));
}

#[test]
fn what_was_read_can_be_seen() {
    let Some(gpu) = gpu() else { return };
    let config = variants()[1];
    let (here, there) = (Trained::new(config, Rule::Sgd, &Device::Cpu), Trained::new(config, Rule::Sgd, &gpu));
    let x = Tensor::from_vec(numbers(5 * 6, 4), (5, 6), &Device::Cpu).expect("a tensor");
    let (_, a) = here.layer.forward_explained(&x).expect("a forward");
    let (_, b) = there.layer.forward_explained(&x.to_device(&gpu).expect("a tensor")).expect("a forward");
    assert_eq!(a.ids, b.ids);
    assert!(distance(&a.weights, &b.weights) < 2e-5);
}

/// A variable on a GPU and its moments, after some steps, beside the same loop on the host.
#[test]
fn adamw_in_place_is_the_loop_on_the_host() {
    use memlayer_candle::adamw::{AdamW, Moments, square_sum};
    let Some(device) = gpu() else { return };
    let Compute::Cuda(cuda) = Compute::for_device(&device).expect("a backend") else { panic!("the GPU is none") };
    let step = AdamW { rate: 1e-2, eps: 1e-8, beta1: 0.9, beta2: 0.98, scale: 0.5, keep: 0.99 };
    let (mut x, mut m, mut v) = (numbers(35, 1), vec![0f32; 35], vec![0f32; 35]);
    let var = Var::from_tensor(&Tensor::from_slice(&x, (5, 7), &device).expect("a tensor")).expect("a var");
    let mut moments = Moments::zeros(&cuda, 35).expect("moments");
    for seed in 2..5 {
        let grad = numbers(35, seed);
        // A gradient that lies in another order than it counts.
        let turned =
            Tensor::from_slice(&grad, (5, 7), &device).and_then(|g| g.t()?.contiguous()?.t()).expect("a tensor");
        moments.step(&var, &turned, step).expect("a step");
        let found = square_sum(&cuda, &[&turned, &turned.narrow(0, 1, 2).expect("a part")]).expect("a sum");
        let expected: f32 = grad.iter().chain(&grad[7..21]).map(|g| g * g).sum();
        assert!((found - f64::from(expected)).abs() < 1e-4, "{found} for {expected}");
        for (((x, g), m), v) in x.iter_mut().zip(grad).zip(&mut m).zip(&mut v) {
            let g = g * step.scale;
            *m = step.beta1 * *m + (1.0 - step.beta1) * g;
            *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
            *x = step.keep * *x - step.rate * *m / (v.sqrt() + step.eps);
        }
    }
    let found = var.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values");
    assert!(found == x, "the variable");
    assert!(moments.get().expect("moments") == [m.clone(), v.clone()], "its moments");
    assert!(
        Moments::new(&cuda, &m, &v).and_then(|moments| moments.get()).expect("moments") == [m, v],
        "moments put back"
    );
    assert!(Moments::new(&cuda, &[0.0; 2], &[0.0; 3]).is_err(), "moments of different lengths");
    let short = Var::zeros(34, DType::F32, &device).expect("a var");
    assert!(moments.step(&short, short.as_tensor(), step).is_err(), "a variable of another length");
}
