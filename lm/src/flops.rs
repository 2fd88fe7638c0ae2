//! What a model costs: every product counted, in one place.

use crate::config::ModelConfig;
use crate::error::Result;

/// Parameters and products of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// All parameters but the values of memories.
    pub dense_params: usize,
    /// Values of the pool.
    pub memory_params: usize,
    /// Floating-point operations to carry one token through the whole model and to the logits of the next, two for
    /// each multiplication with an addition.
    pub flops_per_token: usize,
}

/// The cost of `config` at sequences of `mean_len` tokens, which an average token attends to half of.
///
/// # Errors
/// [`crate::LmError::Config`] if the sizes make no model.
pub fn cost(config: &ModelConfig, mean_len: f64) -> Result<Cost> {
    config.check()?;
    let d = config.dim;
    let memory = config.memory_layer()?;
    let (mut params, mut products) = (config.vocab * d + d, config.vocab * d);
    for layer in 0..config.layers {
        // Two norms, the projections of attention, and its scores and sums.
        params += 2 * d + 4 * d * d;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few thousand, not negative")]
        let attended = (mean_len / 2.0).ceil() as usize;
        products += 4 * d * d + 2 * d * attended;
        match &memory {
            Some(m) if config.is_memory(layer) => {
                let (q, v) = (m.query_len(), m.value_dim());
                params += q * d + q + m.keys_len() + 2 * m.gain_len() + v * d + v + d * v + d;
                // Query projection, norm and scores of the halves; pairs; the weighted sum; gate and projection.
                products += q * d + 2 * q + m.keys_len() + m.bag_len() * v + v * d + v + d * v;
            }
            _ => {
                params += 3 * d * config.hidden;
                products += 3 * d * config.hidden + config.hidden;
            }
        }
    }
    let memory_params = memory.map_or(0, |m| m.slots() * m.value_dim());
    Ok(Cost { dense_params: params, memory_params, flops_per_token: 2 * products })
}

/// A dense model with the smallest `hidden` that costs at least as much per token as `config`.
///
/// # Errors
/// [`crate::LmError::Config`] if the sizes make no model.
pub fn dense_twin(config: &ModelConfig, mean_len: f64) -> Result<ModelConfig> {
    let target = cost(config, mean_len)?.flops_per_token;
    let mut twin = ModelConfig { memory: None, hidden: 1, ..config.clone() };
    let base = cost(&twin, mean_len)?.flops_per_token;
    let step = 2 * config.layers * (3 * config.dim + 1);
    twin.hidden = 1 + target.saturating_sub(base).div_ceil(step);
    Ok(twin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;

    fn config() -> ModelConfig {
        let memory = MemoryConfig { layers: vec![1], heads: 4, sub_keys: 128, half_dim: 8, top_k: 8 };
        ModelConfig { vocab: 1000, dim: 48, layers: 2, heads: 4, hidden: 64, context: 64, memory: Some(memory) }
    }

    #[test]
    fn a_cost_worked_out_by_hand() {
        // One block of width 2 with one head and a feed-forward of 3, 5 tokens, sequences of 4.
        let config = ModelConfig { vocab: 5, dim: 2, layers: 1, heads: 1, hidden: 3, context: 8, memory: None };
        let cost = cost(&config, 4.0).expect("a cost");
        assert_eq!(cost.dense_params, 5 * 2 + 2 + (2 + 2) + 4 * 4 + 3 * 2 * 3);
        assert_eq!(cost.flops_per_token, 2 * (5 * 2 + 4 * 4 + 2 * 2 * 2 + 3 * 2 * 3 + 3));
        assert_eq!(cost.memory_params, 0);
    }

    #[test]
    fn the_twin_costs_as_much_and_not_more_than_it_must() {
        let memory = cost(&config(), 15.0).expect("a cost");
        let twin = dense_twin(&config(), 15.0).expect("a twin");
        let dense = cost(&twin, 15.0).expect("a cost");
        assert!(dense.flops_per_token >= memory.flops_per_token);
        let narrower = ModelConfig { hidden: twin.hidden - 1, ..twin };
        assert!(cost(&narrower, 15.0).expect("a cost").flops_per_token < memory.flops_per_token);
        assert_eq!(memory.memory_params, 128 * 128 * 48);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for (change, expected) in [
            (ModelConfig { dim: 0, ..config() }, "dim 0"),
            (ModelConfig { dim: 50, ..config() }, "dim 50 is no even multiple of heads 4"),
            (ModelConfig { layers: 1, ..config() }, "memory.layers has 1"),
            (ModelConfig { vocab: usize::MAX, ..config() }, "vocab"),
        ] {
            assert!(cost(&change, 15.0).expect_err("absurd").to_string().contains(expected));
        }
        let mut wide = config();
        wide.memory.as_mut().expect("a memory").top_k = 200;
        assert!(cost(&wide, 15.0).expect_err("absurd").to_string().contains("top_k 200 exceeds sub_keys 128"));
    }
}
