//! What the test programs of the GPU share.

use candle_core::{Device, Var};
use candle_nn::VarMap;

pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut random = memlayer_core::Random::new(seed);
    #[allow(clippy::cast_possible_truncation, reason = "a test's numbers")]
    (0..len).map(|_| (2.0 * random.uniform() - 1.0) as f32).collect()
}

/// Device 0, if there is one.
pub(crate) fn gpu() -> Option<Device> {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => Some(device),
        Err(error) => {
            let required = std::env::var("MEMLAYER_REQUIRE_CUDA").is_ok_and(|v| v == "1");
            assert!(!required, "a CUDA device is required here: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// The variables by name, each overwritten with numbers that its name picks: candle's own starting values cannot be seeded.
pub(crate) fn named_numbers(variables: &VarMap) -> Vec<(String, Var)> {
    let mut all: Vec<(String, Var)> =
        variables.data().lock().expect("variables").iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, var) in &all {
        let seed = name.bytes().map(u64::from).sum();
        let shift = if name.ends_with("norm.weight") { 1.3 } else { 0.0 };
        let values: Vec<f32> = numbers(var.elem_count(), seed).iter().map(|v| v + shift).collect();
        let values = candle_core::Tensor::from_vec(values, var.shape(), var.device()).expect("a tensor");
        var.set(&values).expect("a variable");
    }
    all
}
