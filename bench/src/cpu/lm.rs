//! Training steps of the language model.

use std::path::Path;
use std::sync::Arc;

use memlayer_cpu::Cpu;
use memlayer_lm::data::Dataset;
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::train::{TrainConfig, Trainer};
use memlayer_lm::{MemoryConfig, ModelConfig, flops};

use crate::error::BenchError;
use crate::time::{Pair, Side, clock, pair};

/// Training steps of the tour's two models: with a memory, and dense of equal FLOPs a token.
pub(super) fn steps(seconds: f64, cpu: &Arc<Cpu>) -> Result<Pair, BenchError> {
    let data = Dataset::world(Path::new("data"), 10_000, 1)?;
    let tokenizer = Tokenizer::train(&data.train, 1000)?;
    let memory = MemoryConfig { layers: vec![1], heads: 4, sub_keys: 128, half_dim: 4, top_k: 8 };
    let (vocab, context) = (tokenizer.vocab(), 128);
    let memory = ModelConfig { vocab, dim: 32, layers: 2, heads: 4, hidden: 48, context, memory: Some(memory) };
    let dense = flops::dense_twin(&memory, 16.0)?;
    let side = |config: &ModelConfig| -> Result<Box<Side<'static>>, BenchError> {
        let mut trainer = Trainer::new(config, &TrainConfig::default(), &data, tokenizer.clone(), cpu)?;
        Ok(Box::new(move |calls| clock(calls, || Ok(trainer.step().map(|_| ())?))))
    };
    pair(seconds, &mut *side(&memory)?, &mut *side(&dense)?)
}
