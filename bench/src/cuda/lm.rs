//! Training steps of the language model with a memory, beside those of a dense model of equal FLOPs a token.

use std::path::Path;
use std::sync::Arc;

use memlayer_cpu::Cpu;
use memlayer_lm::data::Dataset;
use memlayer_lm::model::Place;
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::train::{TrainConfig, Trainer};
use memlayer_lm::{MemoryConfig, ModelConfig, flops};

use super::device::Bench;
use super::{Case, Other};
use crate::error::BenchError;
use crate::time::{Side, clock, pair};

/// The least of the dense model's speed that is aimed at.
const TARGET: f64 = 0.9;
/// Steps of a call: what waits behind the last is then little of its time.
const STEPS: usize = 10;
const SECONDS: f64 = 20.0;

/// A model's sizes; its memories are in `memories`.
struct Sizes {
    facts: usize,
    dim: usize,
    layers: usize,
    heads: usize,
    hidden: usize,
    memories: &'static [usize],
    sub_keys: usize,
    half_dim: usize,
    top_k: usize,
    lr: f64,
}

/// The tour's model, and one of 4 layers of 512.
const MODELS: [Sizes; 2] = [
    Sizes {
        facts: 10_000,
        dim: 32,
        layers: 2,
        heads: 4,
        hidden: 48,
        memories: &[1],
        sub_keys: 128,
        half_dim: 4,
        top_k: 8,
        lr: 1e-2,
    },
    Sizes {
        facts: 300,
        dim: 512,
        layers: 4,
        heads: 8,
        hidden: 1365,
        memories: &[1, 3],
        sub_keys: 256,
        half_dim: 64,
        top_k: 32,
        lr: 1e-3,
    },
];

impl Sizes {
    fn config(&self, vocab: usize) -> ModelConfig {
        let &Self { dim, layers, heads, hidden, sub_keys, half_dim, top_k, .. } = self;
        let memory = MemoryConfig { layers: self.memories.to_vec(), heads: 4, sub_keys, half_dim, top_k };
        ModelConfig { vocab, dim, layers, heads, hidden, context: 128, memory: Some(memory) }
    }
}

impl Bench<'_> {
    /// Steps of both models of each size in turn; the dense one is the peer.
    pub(super) fn lm_steps(&self) -> Result<Vec<Other>, BenchError> {
        let mut peers = Vec::new();
        if !self.wants("lm step") {
            return Ok(peers);
        }
        let cpu = Arc::new(Cpu::builder().build()?);
        let place = Place::named("cuda", &cpu)?;
        for sizes in &MODELS {
            peers.push(self.lm_step(sizes, &place)?);
        }
        Ok(peers)
    }

    fn lm_step(&self, sizes: &Sizes, place: &Place) -> Result<Other, BenchError> {
        let data = Dataset::world(Path::new("data"), sizes.facts, 1)?;
        let tokenizer = Tokenizer::train(&data.train, 1000)?;
        let training = TrainConfig { lr: sizes.lr, ..TrainConfig::default() };
        let memory = sizes.config(tokenizer.vocab());
        let trainer = |config: &ModelConfig| Trainer::new(config, &training, &data, tokenizer.clone(), place);
        let with = trainer(&memory)?;
        let mean_len = with.mean_len();
        let without = trainer(&flops::dense_twin(&memory, mean_len)?)?;
        let found = pair(SECONDS, &mut *side(with, place), &mut *side(without, place))?;

        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "some thousands of tokens")]
        let tokens = (training.batch as f64 * mean_len) as usize;
        let slots = sizes.sub_keys * sizes.sub_keys;
        let case = Case { op: "lm step", format: "f32", ids: "-", tokens, width: sizes.dim, slots };
        self.report(case, 0.0, found.ours / 1e3);
        let (ratio, (low, high)) = (found.ratio, found.spread);
        self.note(format!(
            "lm step, {} layers of {}: the dense model's time over that with a memory, by pairs, is {ratio:.3} (quartiles {low:.3} {high:.3}; target {TARGET})",
            sizes.layers, sizes.dim
        ));
        let (by, format, ids) = ("dense, equal FLOPs".to_owned(), case.format.to_owned(), case.ids.to_owned());
        let ms = Some(found.other / 1e3);
        Ok(Other { by, op: case.op.to_owned(), format, ids, tokens, width: case.width, slots, ms })
    }
}

/// Calls of [`STEPS`] steps, the device waited for; microseconds a step.
fn side(mut trainer: Trainer, place: &Place) -> Box<Side<'_>> {
    Box::new(move |calls| {
        let call = || {
            for _ in 0..STEPS {
                trainer.step()?;
            }
            Ok(place.device().synchronize()?)
        };
        Ok(clock(calls, call)? / STEPS as f64)
    })
}
