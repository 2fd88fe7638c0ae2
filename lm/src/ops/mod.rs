//! The model's own operations for candle: one pass forward, one pass backward, nothing kept that can be made again.
//!
//! candle composes each of them from several element-wise operations, every one a pass over memory with a graph node
//! of its own; at the widths of a small model that is most of a training step. Tensors that are not on the CPU take that
//! way (`composed`).

mod attention;
mod composed;
mod cross_entropy;
mod rms_norm;
mod rows;
mod swiglu;

pub use attention::attention;
pub use cross_entropy::cross_entropy;
pub use rms_norm::{NORM_EPS, rms_norm};
pub use rows::take_rows;
pub use swiglu::swiglu;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};
use memlayer_infer::math::{add_scaled, exp, gate, sigmoid, softmax_scores};

/// The values of a contiguous `f32` tensor on the CPU.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        (CpuStorage::F32(_), None) => candle_core::bail!("tensors must be contiguous"),
        _ => candle_core::bail!("tensors must be f32"),
    }
}

/// Looks at the values of a tensor, made contiguous first if it is not, fetched first if they are elsewhere.
pub(crate) fn with_values<R>(tensor: &Tensor, look: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => look(slice(storage, layout)?),
        _ => look(&tensor.flatten_all()?.to_vec1::<f32>()?),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use candle_core::{Device, Tensor, Var};

    /// Pseudo-random numbers in -1..1.
    pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
        (0..len as u64)
            .map(|i| {
                let mut hash = crate::data::Hash::new(seed);
                hash.text(&i.to_string());
                #[allow(clippy::cast_possible_truncation, reason = "a test's number")]
                let x = (hash.finish() >> 11) as f64 as f32 / (1u64 << 52) as f32;
                x - 1.0
            })
            .collect()
    }

    /// Checks the gradient of `sum(f(x) · g)` for each input against differences, with a fixed `g`.
    pub(crate) fn check_gradients(inputs: &[(&[usize], Vec<f32>)], f: impl Fn(&[Tensor]) -> Tensor) {
        let vars: Vec<Var> = inputs
            .iter()
            .map(|(shape, values)| {
                Var::from_tensor(&Tensor::from_slice(values, *shape, &Device::Cpu).expect("a tensor")).expect("a var")
            })
            .collect();
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let out = f(&tensors);
        let g = Tensor::from_vec(numbers(out.elem_count(), 99), out.shape(), &Device::Cpu).expect("a tensor");
        let loss = |tensors: &[Tensor]| {
            let out = (f(tensors) * &g).expect("a product").flatten_all().expect("flat").to_vec1::<f32>();
            out.expect("values").iter().map(|&v| f64::from(v)).sum::<f64>()
        };
        let grads = (out * &g).expect("a product").sum_all().expect("a sum").backward().expect("gradients");
        for (i, (shape, values)) in inputs.iter().enumerate() {
            let grad = grads.get(&vars[i]).expect("a gradient").flatten_all().expect("flat");
            let grad = grad.to_vec1::<f32>().expect("values");
            for at in (0..values.len()).step_by(values.len().div_ceil(25)) {
                let slope = |sign: f32| {
                    let mut moved = values.clone();
                    moved[at] += sign * 1e-2;
                    let mut tensors = tensors.clone();
                    tensors[i] = Tensor::from_vec(moved, *shape, &Device::Cpu).expect("a tensor");
                    loss(&tensors)
                };
                let expected = (slope(1.0) - slope(-1.0)) / 2e-2;
                let found = f64::from(grad[at]);
                assert!(
                    (expected - found).abs() < 2e-3 * (1.0 + expected.abs()),
                    "input {i}[{at}]: {found}, slope {expected}"
                );
            }
        }
    }
}
