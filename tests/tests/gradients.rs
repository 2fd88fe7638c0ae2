//! Finite differences of the reference in `f64`, for every variant; and a pool of values shared by two layers.

use memlayer_core::Reference;
use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_tests::conformance::layer::variants;
use memlayer_tests::device::Memory;
use memlayer_tests::layer::{LayerInputs, LayerResults};
use memlayer_tests::random::Random;

const DEVICE: Reference<f64> = Reference::new();

fn loss(inputs: &LayerInputs, results: &LayerResults) -> f64 {
    results.tensor("output").iter().zip(&inputs.grad_output).map(|(o, g)| o * g).sum()
}

/// The gradient of element `at` of a tensor, as a table's rows or as a dense tensor.
fn gradient(results: &LayerResults, name: &str, at: usize, width: usize) -> f64 {
    let grad = results.tensor(&format!("grad.{name}"));
    let Some((_, rows)) = results.rows.iter().find(|(n, _)| *n == format!("grad.{name}.rows")) else {
        return grad[at];
    };
    rows.iter().position(|&row| row as usize == at / width).map_or(0.0, |u| grad[u * width + at % width])
}

#[test]
fn every_gradient_is_the_slope() {
    const STEP: f64 = 1e-5;
    let mut checked = 0;
    for (seed, config) in (0u64..).zip(variants()) {
        let inputs = LayerInputs::random(config, 4, 1000 + seed);
        let results = inputs.run(&DEVICE, |_| true).expect("a layer");
        let shapes = memlayer_tests::layer::parameters(&config, 4);
        let mut random = Random::new(seed);
        for ((name, values), (_, shape)) in inputs.tensors.iter().zip(&shapes) {
            for _ in 0..12 {
                let at = random.below(values.len());
                let slope = |sign: f64| {
                    let mut moved = inputs.clone();
                    moved.tensors.iter_mut().find(|(n, _)| n == name).expect("the tensor").1[at] += sign * STEP;
                    let results = moved.run(&DEVICE, |_| false).expect("a layer");
                    let same = results.ids == inputs.run(&DEVICE, |_| false).expect("a layer").ids;
                    same.then(|| loss(&moved, &results))
                };
                // The selection is a constant of the derivative: where the step crosses a border there is none.
                let (Some(up), Some(down)) = (slope(1.0), slope(-1.0)) else { continue };
                let expected = (up - down) / (2.0 * STEP);
                let found = gradient(&results, name, at, *shape.last().expect("a shape"));
                let error = (expected - found).abs();
                assert!(
                    error <= 1e-6 * (1.0 + expected.abs()),
                    "{config:?}: {name}[{at}] is {found}, slope {expected}"
                );
                checked += 1;
            }
        }
    }
    assert!(checked > 1000, "only {checked} slopes were taken: the steps cross too many borders");
}

/// One plan over the entries of two layers gives the sum of their gradients, in entry order.
#[test]
fn layers_share_a_pool_through_one_plan() {
    let config = variants()[0];
    let (bag, dim) = (config.bag_len(), config.value_dim());
    let layers: Vec<_> = (0..2).map(|seed| LayerInputs::random(config, 5, seed)).collect();
    let mut ids = vec![];
    let (mut weights, mut sources) = (vec![], vec![]);
    let mut expected = vec![0.0; config.slots() * dim];
    for inputs in &layers {
        let results = inputs.run(&DEVICE, |_| true).expect("a layer");
        ids.extend(&results.ids);
        weights.extend(results.tensor("weights"));
        // A plain memory's output is the weighted sum: its gradient is the output's.
        sources.extend(&inputs.grad_output);
        let (_, rows) = &results.rows[0];
        for (u, &row) in rows.iter().enumerate() {
            for v in 0..dim {
                expected[row as usize * dim + v] += results.tensor("grad.values.weight")[u * dim + v];
            }
        }
    }
    let mut buffer = vec![0; PlanBuffers::<Reference<f64>>::ids_len(ids.len())];
    let (mut buffers, _) = PlanBuffers::<Reference<f64>>::carve(&mut buffer, ids.len()).expect("buffers");
    let mut scratch = Memory::new(&DEVICE, DEVICE.plan_scratch(ids.len()));
    DEVICE.plan(&ids, config.slots(), buffers.reborrow(), scratch.lend()).expect("a plan");
    let mut grads = vec![0.0; ids.len() * dim];
    let gradient = RowGradient { bag, dim, weights: &weights[..], sources: &sources[..] };
    DEVICE.reduce(buffers.plan(), gradient, &mut grads).expect("sums");
    let plan = buffers.plan();
    for u in 0..plan.unique[0] as usize {
        for v in 0..dim {
            let (expected, found) = (expected[plan.rows[u] as usize * dim + v], grads[u * dim + v]);
            assert!((expected - found).abs() < 1e-12, "row {}: {found} where {expected} is right", plan.rows[u]);
        }
    }
}
