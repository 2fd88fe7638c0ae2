//! The operation in candle's graph: its gradients are slopes, and its pool changes as the rows' gradients say.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use memlayer_candle::{Config, Cpu, Error, LayerInit, MemoryLayer, Rule, ValuePool};
use memlayer_core::config::Kind;

fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut random = memlayer_core::Random::new(seed);
    #[allow(clippy::cast_possible_truncation, reason = "a test's numbers")]
    (0..len).map(|_| (2.0 * random.uniform() - 1.0) as f32).collect()
}

fn pool(rows: usize, dim: usize, seed: u64) -> ValuePool {
    let cpu = Arc::new(Cpu::new().expect("a backend"));
    ValuePool::new(cpu, rows, dim, Rule::Sgd, 0.5, seed).expect("a pool")
}

fn layer(config: Config, values: &ValuePool, variables: &VarMap) -> MemoryLayer {
    let vb = VarBuilder::from_varmap(variables, DType::F32, &Device::Cpu);
    let init = LayerInit { gain: 1.2 };
    let layer = match config.kind() {
        Kind::Memory => MemoryLayer::new(config, values.clone(), &init, &vb),
        Kind::Peer => {
            MemoryLayer::peer(config, pool(config.slots(), config.input_dim(), 9), values.clone(), &init, &vb)
        }
    };
    // candle's own starting values cannot be seeded.
    for (name, var) in variables.data().lock().expect("variables").iter() {
        let seed = name.bytes().map(u64::from).sum();
        let shift = if name.ends_with("norm.weight") { 1.3 } else { 0.0 };
        let values: Vec<f32> = numbers(var.elem_count(), seed).iter().map(|v| v + shift).collect();
        var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu).expect("a tensor")).expect("a variable");
    }
    layer.expect("a layer")
}

fn variants() -> Vec<Config> {
    let base = Config::builder(6).heads(2).sub_keys(5).half_dim(3).top_k(2);
    [
        base,
        base.silu_gate(true).qk_norm(true),
        base.value_dim(4).sigmoid_gate(true),
        base.kind(Kind::Peer).qk_norm(true),
        base.flat_keys().sub_keys(12),
    ]
    .into_iter()
    .map(|builder| builder.build().expect("a configuration"))
    .collect()
}

fn loss(layer: &MemoryLayer, x: &Tensor, g: &Tensor) -> Tensor {
    (layer.forward(x).expect("a forward") * g).expect("a product").sum_all().expect("a sum")
}

fn number(loss: &Tensor) -> f64 {
    f64::from(loss.to_scalar::<f32>().expect("a number"))
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().expect("flat").to_vec1().expect("values")
}

#[test]
fn gradients_are_slopes() {
    const STEP: f32 = 4e-3;
    for config in variants() {
        let variables = VarMap::new();
        let values = pool(config.slots(), config.value_dim(), 3);
        let layer = layer(config, &values, &variables);
        let x = Var::from_vec(numbers(2 * 3 * 6, 5), (2, 3, 6), &Device::Cpu).expect("a variable");
        let g = Tensor::from_vec(numbers(2 * 3 * config.output_dim(), 6), (2, 3, config.output_dim()), &Device::Cpu);
        let g = g.expect("a tensor");
        let grads = loss(&layer, x.as_tensor(), &g).backward().expect("gradients");
        values.discard();
        let reads = |x: &Tensor| layer.forward_explained(x).expect("a forward").1.ids;
        let chosen = reads(x.as_tensor());
        let mut checked = 0;
        let named = variables.data().lock().expect("variables").clone();
        for (name, var) in named.into_iter().chain([("x".to_owned(), x.clone())]) {
            let (before, grad) = (flat(var.as_tensor()), flat(grads.get(&var).expect("a gradient")));
            for at in (0..before.len()).step_by(before.len().div_ceil(9)) {
                let slope = |sign: f32| {
                    let mut moved = before.clone();
                    moved[at] += sign * STEP;
                    var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).expect("a tensor"))
                        .expect("a variable");
                    // Across a border of the selection there is no slope.
                    let same = reads(x.as_tensor()) == chosen;
                    same.then(|| number(&loss(&layer, x.as_tensor(), &g)))
                };
                if let (Some(up), Some(down)) = (slope(1.0), slope(-1.0)) {
                    let expected = (up - down) / (2.0 * f64::from(STEP));
                    let found = f64::from(grad[at]);
                    let error = (expected - found).abs();
                    assert!(
                        error < 6e-3 * (1.0 + expected.abs()),
                        "{config:?}: {name}[{at}] is {found}, slope {expected}"
                    );
                    checked += 1;
                }
            }
            var.set(&Tensor::from_vec(before, var.shape(), &Device::Cpu).expect("a tensor")).expect("a variable");
        }
        assert!(checked > 20, "only {checked} slopes for {config:?}");
    }
}

#[test]
fn rows_change_by_their_gradients_and_no_others() {
    let config = variants()[0];
    let values = pool(config.slots(), config.value_dim(), 3);
    let layer = layer(config, &values, &VarMap::new());
    let x = Tensor::from_vec(numbers(4 * 6, 5), (4, 6), &Device::Cpu).expect("a tensor");
    let g = Tensor::ones((4, 6), DType::F32, &Device::Cpu).expect("a tensor");
    let before = values.read(|rows, _| rows.to_vec()).expect("rows");
    let first = loss(&layer, &x, &g);
    first.backward().expect("gradients");
    let norm = values.grad_square_sum().expect("a norm");
    let report = values.step(0.1, 0.5).expect("a step");
    let after = values.read(|rows, _| rows.to_vec()).expect("rows");
    let changed: Vec<usize> =
        (0..config.slots()).filter(|r| before[r * 6..(r + 1) * 6] != after[r * 6..(r + 1) * 6]).collect();
    let read = layer.forward_explained(&x).expect("a forward").1;
    assert_eq!(changed.len(), report.touched);
    assert!(changed.iter().all(|&row| read.ids.iter().any(|&id| id as usize == row)));
    // Plain descent: the loss falls by rate · scale · |gradient|², the layer being linear in its rows.
    let fell = number(&first) - number(&loss(&layer, &x, &g));
    assert!((fell - 0.05 * norm).abs() < 1e-3 * norm, "fell by {fell}, not by {}", 0.05 * norm);
}

#[test]
fn clipping_first_gives_the_bits_of_one_pass() {
    let config = variants()[1];
    let run = |norm_first: bool| {
        let values = pool(config.slots(), config.value_dim(), 3);
        let layer = layer(config, &values, &VarMap::new());
        let x = Tensor::from_vec(numbers(4 * 6, 5), (4, 6), &Device::Cpu).expect("a tensor");
        loss(&layer, &x, &x).backward().expect("gradients");
        if norm_first {
            values.grad_square_sum().expect("a norm");
        }
        values.step(0.1, 0.7).expect("a step");
        values.read(|rows, _| rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>()).expect("rows")
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn layers_share_a_pool() {
    let config = variants()[0];
    let values = pool(config.slots(), config.value_dim(), 3);
    let (a, b) = (layer(config, &values, &VarMap::new()), layer(config, &values, &VarMap::new()));
    let x = Tensor::from_vec(numbers(4 * 6, 5), (4, 6), &Device::Cpu).expect("a tensor");
    let both = (loss(&a, &x, &x) + loss(&b, &x, &x)).expect("a sum");
    both.backward().expect("gradients");
    let report = values.step(0.1, 1.0).expect("a step");
    assert_eq!(report.entries, 2 * 4 * config.bag_len());
}

#[test]
fn misuse_is_an_error() {
    let config = variants()[0];
    let values = pool(config.slots(), config.value_dim(), 3);
    let layer_of = |pool: ValuePool| {
        let vb_map = VarMap::new();
        MemoryLayer::new(
            config,
            pool,
            &LayerInit::default(),
            &VarBuilder::from_varmap(&vb_map, DType::F32, &Device::Cpu),
        )
    };
    assert!(matches!(layer_of(pool(7, 6, 1)), Err(Error::PoolShape { found_rows: 7, .. })));
    let layer = layer_of(values.clone()).expect("a layer");
    let x = Tensor::from_vec(numbers(24, 5), (4, 6), &Device::Cpu).expect("a tensor");
    let late = loss(&layer, &x, &x);
    values.step(0.1, 1.0).expect("a step");
    assert!(late.backward().expect_err("stale").to_string().contains("between a forward and its backward"));
    assert!(layer.forward(&Tensor::zeros((4, 5), DType::F32, &Device::Cpu).expect("a tensor")).is_err());
    assert!(matches!(values.restore(&[0.0], &[], 0), Err(Error::State { what: "rows", .. })));
    let mut rows = vec![0.0; config.slots() * 6];
    rows[8] = f32::NAN;
    assert!(matches!(values.restore(&rows, &[], 0), Err(Error::NotFinite { row: 1, .. })));
    let cached = |cache_rows| {
        let cpu = Arc::new(Cpu::new().expect("a backend"));
        ValuePool::cached(cpu, config.slots(), 6, Rule::Sgd, 0.5, 1, cache_rows).expect_err("a cache").to_string()
    };
    assert!(cached(10).starts_with("cache_rows 10 on a CPU"));
    assert!(cached(0).contains("cache_rows"));
}
