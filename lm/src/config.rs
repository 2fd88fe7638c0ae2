//! The sizes of a model.

use memlayer_core::Config;
use memlayer_infer::{MemorySizes, Sizes};
use serde::{Deserialize, Serialize};

use crate::error::{LmError, Result};

/// The sizes of a transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// D, the width.
    pub dim: usize,
    /// Blocks of attention and feed-forward.
    pub layers: usize,
    /// Attention heads; their width is even.
    pub heads: usize,
    /// Width of the dense feed-forward layers (SwiGLU).
    pub hidden: usize,
    /// The longest sequence, in tokens.
    pub context: usize,
    /// Memory in place of some of the feed-forward layers.
    pub memory: Option<MemoryConfig>,
}

/// Memory+ layers with qk-norm that share one pool of values of width D.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Which blocks have one, counted from 0.
    pub layers: Vec<usize>,
    /// H.
    pub heads: usize,
    /// N; the pool has N² slots.
    pub sub_keys: usize,
    /// C.
    pub half_dim: usize,
    /// K, rows kept per head.
    pub top_k: usize,
}

impl ModelConfig {
    /// Fails unless the sizes make a model.
    ///
    /// # Errors
    /// [`LmError::Config`].
    pub fn check(&self) -> Result<()> {
        let fail = |problem: String| Err(LmError::Config(problem));
        for (name, size, limit) in [
            ("vocab", self.vocab, 1 << 24),
            ("dim", self.dim, 1 << 16),
            ("layers", self.layers, 1 << 10),
            ("heads", self.heads, 1 << 10),
            ("hidden", self.hidden, 1 << 20),
            ("context", self.context, 1 << 20),
        ] {
            if size == 0 || size > limit {
                return fail(format!("{name} {size} is not in 1..={limit}"));
            }
        }
        if !self.dim.is_multiple_of(2 * self.heads) {
            return fail(format!("dim {} is no even multiple of heads {}", self.dim, self.heads));
        }
        let Some(memory) = &self.memory else { return Ok(()) };
        if memory.layers.is_empty() {
            return fail("memory.layers is empty".to_owned());
        }
        if let Some(layer) = memory.layers.iter().find(|&&layer| layer >= self.layers) {
            return fail(format!("memory.layers has {layer}, but layers is {}", self.layers));
        }
        self.memory_layer().map(|_| ())
    }

    /// The sizes as a packed model has them.
    ///
    /// # Errors
    /// [`LmError::Config`] if the model has more blocks than a packed one can.
    pub fn sizes(&self) -> Result<Sizes> {
        let &Self { vocab, dim, layers, heads, hidden, context, .. } = self;
        let memory = self.memory.as_ref().map(|memory| {
            let &MemoryConfig { heads, sub_keys, half_dim, top_k, .. } = memory;
            let bits = memory.layers.iter().filter(|&&layer| layer < Sizes::MAX_LAYERS);
            MemorySizes { layers: bits.fold(0, |all, layer| all | 1 << layer), heads, sub_keys, half_dim, top_k }
        });
        let sizes = Sizes { vocab, dim, layers, heads, hidden, context, memory };
        sizes.check().map_err(|e| LmError::Config(e.to_string()))?;
        Ok(sizes)
    }

    /// Whether block `layer` has a memory in place of its dense feed-forward.
    #[must_use]
    pub fn is_memory(&self, layer: usize) -> bool {
        self.memory.as_ref().is_some_and(|memory| memory.layers.contains(&layer))
    }

    /// The sizes of every memory layer, if there is one.
    ///
    /// # Errors
    /// [`LmError::Config`] with the layer's own reason.
    pub fn memory_layer(&self) -> Result<Option<Config>> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let builder = Config::builder(self.dim)
            .heads(memory.heads)
            .sub_keys(memory.sub_keys)
            .half_dim(memory.half_dim)
            .top_k(memory.top_k)
            .silu_gate(true)
            .qk_norm(true);
        builder.build().map(Some).map_err(|e| LmError::Config(format!("memory: {e}")))
    }

    /// Width of an attention head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.dim / self.heads
    }
}

impl From<Sizes> for ModelConfig {
    fn from(sizes: Sizes) -> Self {
        let Sizes { vocab, dim, layers, heads, hidden, context, memory } = sizes;
        let memory = memory.map(|memory| {
            let MemorySizes { layers: bits, heads, sub_keys, half_dim, top_k } = memory;
            let layers = (0..Sizes::MAX_LAYERS).filter(|layer| bits >> layer & 1 == 1).collect();
            MemoryConfig { layers, heads, sub_keys, half_dim, top_k }
        });
        Self { vocab, dim, layers, heads, hidden, context, memory }
    }
}
