//! A decoder-only transformer: RMSNorm, rotary positions, SwiGLU, tied embeddings, and memory layers in place of any of
//! its feed-forward layers.

mod place;
mod variables;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{Module, Tensor};
use memlayer_candle::{LayerInit, MemoryLayer, Rule, ValuePool};
use memlayer_core::DenseRows;

pub use place::Place;
pub use variables::Variables;

use crate::config::ModelConfig;
use crate::error::{LmError, Result};
use crate::infer::{Reader, Source, Tables};
use crate::ops::{attention, rms_norm, swiglu, take_rows, with_values};

/// A feed-forward layer of either kind.
#[derive(Clone, Debug)]
pub enum FeedForward {
    /// SwiGLU.
    Dense {
        /// `[2·hidden, D]`: gate, then up.
        up: Tensor,
        /// `[D, hidden]`.
        down: Tensor,
    },
    /// A memory layer.
    Memory(MemoryLayer),
}

/// One block.
#[derive(Clone, Debug)]
struct Block {
    attention_norm: Tensor,
    /// `[3·D, D]`: queries, keys, values.
    qkv: Tensor,
    /// `[D, D]`.
    out: Tensor,
    feed_forward_norm: Tensor,
    feed_forward: FeedForward,
}

/// A model and its variables.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    variables: Variables,
    pool: Option<ValuePool>,
    /// `[vocab, D]`, also the logits' projection.
    embedding: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    data: u64,
}

/// How the values of a memory are trained.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolInit {
    /// How rows change.
    pub rule: Rule,
}

/// Tokens of several sequences, padded behind to the same length, and where their losses are.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// `[B, S]`, row after row.
    pub tokens: Vec<u32>,
    /// B.
    pub sequences: usize,
    /// Positions (of `B·S`) whose next token is part of an answer.
    pub positions: Vec<u32>,
    /// The token that comes next there.
    pub targets: Vec<u32>,
}

impl Model {
    /// A model with fresh variables picked by `seed`.
    ///
    /// # Errors
    /// [`crate::LmError::Config`] if the sizes make no model.
    pub fn new(config: &ModelConfig, init: PoolInit, place: &Place, seed: u64) -> Result<Self> {
        config.check()?;
        let d = config.dim;
        let variables = Variables::new(seed, config.layers);
        let vb = variables.builder(place.device());
        let memory = config.memory_layer()?;
        let pool = match &memory {
            Some(m) => {
                #[allow(clippy::cast_possible_truncation, reason = "rounding a standard deviation")]
                let std = 1.0 / (m.value_dim() as f64).sqrt() as f32;
                Some(place.pool(m.slots(), m.value_dim(), init.rule, std, seed)?)
            }
            None => None,
        };
        let embedding = vb.get((config.vocab, d), "embedding.weight")?;
        let mut blocks = Vec::new();
        for layer in 0..config.layers {
            let vb = vb.pp(format!("layers.{layer}"));
            let feed_forward = match (&memory, &pool) {
                (Some(memory), Some(pool)) if config.is_memory(layer) => {
                    // Scores begin with a standard deviation of about 4: sharper than uniform, soft enough to move.
                    let gain = (4.0 / (memory.half_dim() as f64).sqrt()).sqrt();
                    let vb = vb.pp("memory");
                    FeedForward::Memory(MemoryLayer::new(*memory, pool.clone(), &LayerInit { gain }, &vb)?)
                }
                _ => FeedForward::Dense {
                    up: vb.get((2 * config.hidden, d), "feed_forward.up.weight")?,
                    down: vb.get((d, config.hidden), "feed_forward.down.weight")?,
                },
            };
            blocks.push(Block {
                attention_norm: vb.get(d, "attention_norm.weight")?,
                qkv: vb.get((3 * d, d), "attention.qkv.weight")?,
                out: vb.get((d, d), "attention.out.weight")?,
                feed_forward_norm: vb.get(d, "feed_forward_norm.weight")?,
                feed_forward,
            });
        }
        let norm = vb.get(d, "norm.weight")?;
        Ok(Self { config: config.clone(), variables, pool, embedding, blocks, norm, data: 0 })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The fingerprint of the data it is trained on ([`crate::data::Dataset::fingerprint`]); 0 if nobody said.
    #[must_use]
    pub fn data(&self) -> u64 {
        self.data
    }

    /// Says what data it is trained on.
    pub(crate) fn set_data(&mut self, fingerprint: u64) {
        self.data = fingerprint;
    }

    /// The dense variables, by name.
    #[must_use]
    pub fn variables(&self) -> &Variables {
        &self.variables
    }

    /// The values that all memory layers share.
    #[must_use]
    pub fn pool(&self) -> Option<&ValuePool> {
        self.pool.as_ref()
    }

    /// The logits at the batch's positions, `[positions, vocab]`.
    ///
    /// # Errors
    /// candle's, if a token is none of the vocabulary, or the batch is not rectangular.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        let (b, d) = (batch.sequences, self.config.dim);
        let s = batch.tokens.len() / b.max(1);
        let positions: Arc<[u32]> = batch.positions.as_slice().into();
        let mut x = take_rows(&self.embedding, batch.tokens.as_slice().into())?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = rms_norm(&x, &block.attention_norm)?;
            let qkv = linear(&normed, &block.qkv)?.reshape((b, s, 3 * d))?;
            let mut attended = attention(&qkv, self.config.heads)?.reshape((b * s, d))?;
            // What follows the last attention looks at one position at a time, and only those with a loss matter.
            if layer + 1 == self.blocks.len() {
                x = take_rows(&x, Arc::clone(&positions))?;
                attended = take_rows(&attended, Arc::clone(&positions))?;
            }
            x = (x + linear(&attended, &block.out)?)?;
            let normed = rms_norm(&x, &block.feed_forward_norm)?;
            let fed = match &block.feed_forward {
                FeedForward::Dense { up, down } => linear(&swiglu(&linear(&normed, up)?)?, down)?,
                FeedForward::Memory(memory) => memory.forward(&normed)?,
            };
            x = (x + fed)?;
        }
        Ok(linear(&rms_norm(&x, &self.norm)?, &self.embedding)?)
    }
}

impl Model {
    /// The sub-keys of a memory layer, normalized.
    pub(crate) fn prepared_keys(&self, layer: usize, config: &memlayer_core::Config) -> Result<Vec<f32>> {
        let Some(FeedForward::Memory(memory)) = self.blocks.get(layer).map(|b| &b.feed_forward) else {
            return Err(LmError::Config(format!("layer {layer} has no memory")));
        };
        let mut normed = vec![0.0; config.keys_len()];
        let get = |wanted: &str| {
            let found = memory.parameters().find(|(name, _)| *name == wanted);
            found.ok_or_else(|| LmError::Config(format!("layer {layer} has no {wanted}")))
        };
        let (keys, gain) = (get("keys")?.1, get("key_norm.weight")?.1);
        let (keys, gain) = (with_values(keys, |v| Ok(v.to_vec()))?, with_values(gain, |v| Ok(v.to_vec()))?);
        memlayer_quantize::keys::prepare_keys(config, &keys, &gain, &mut normed)?;
        Ok(normed)
    }

    /// Reads the model as it is now, without candle.
    ///
    /// # Errors
    /// What `look` gives.
    pub fn with_reader<R>(&self, look: impl FnOnce(&Reader<'_>) -> Result<R>) -> Result<R> {
        let mut dense = BTreeMap::new();
        for (name, var) in self.variables.all() {
            dense.insert(name, with_values(var.as_tensor(), |v| Ok(v.to_vec()))?);
        }
        // Inference reads sub-keys that are already normalized, as a packed model holds them.
        let mut keys = BTreeMap::new();
        if let Some(config) = self.config.memory_layer()? {
            for layer in (0..self.config.layers).filter(|&layer| self.config.is_memory(layer)) {
                keys.insert(layer, self.prepared_keys(layer, &config)?);
            }
        }
        let look_at =
            |values: &[f32]| look(&Reader::new(&self.config, &Trained { dense: &dense, keys: &keys, values })?);
        match &self.pool {
            Some(pool) => pool.read(|values, _| look_at(values))?,
            None => look_at(&[]),
        }
    }
}

/// A model in training, as a source.
struct Trained<'a> {
    dense: &'a BTreeMap<String, Vec<f32>>,
    keys: &'a BTreeMap<usize, Vec<f32>>,
    values: &'a [f32],
}

impl<'a> Source<'a> for Trained<'a> {
    fn dense(&self, name: &str, len: usize) -> Result<&'a [f32]> {
        match self.dense.get(name) {
            Some(values) if values.len() == len => Ok(values),
            found => {
                let found = found.map_or(0, Vec::len);
                Err(LmError::Config(format!("parameter {name} has {found} values, not {len}")))
            }
        }
    }

    fn tables(&self, layer: usize, config: &memlayer_core::Config) -> Result<Tables<'a>> {
        let keys = self.keys.get(&layer).ok_or_else(|| LmError::Config(format!("layer {layer} has no sub-keys")))?;
        let values = DenseRows::new(self.values, config.value_dim());
        Ok(Tables::F32(DenseRows::new(keys, config.half_dim()), values))
    }
}

/// `x · weightᵀ`.
fn linear(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    x.matmul(&weight.t()?)
}
