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
    by_threads(cpu, || {
        let trainers = Trainers::new()?;
        let memory = trainers.config(128);
        let dense = flops::dense_twin(&memory, 16.0)?;
        pair(seconds, &mut *trainers.side(&memory, cpu)?, &mut *trainers.side(&dense, cpu)?)
    })
}

/// Training steps of the tour's model with 2^22 slots and with 2^16.
pub(super) fn grown_steps(seconds: f64, cpu: &Arc<Cpu>) -> Result<Pair, BenchError> {
    by_threads(cpu, || {
        let trainers = Trainers::new()?;
        let [large, small] = [2048, 256].map(|sub_keys| trainers.side(&trainers.config(sub_keys), cpu));
        pair(seconds, &mut *large?, &mut *small?)
    })
}

/// What candle does takes as many threads as `cpu`.
fn by_threads(cpu: &Cpu, run: impl FnOnce() -> Result<Pair, BenchError> + Send) -> Result<Pair, BenchError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(cpu.threads()).build()?;
    pool.install(run)
}

/// What trains the tour's models.
struct Trainers {
    data: Dataset,
    tokenizer: Tokenizer,
}

impl Trainers {
    fn new() -> Result<Self, BenchError> {
        let data = Dataset::world(Path::new("data"), 10_000, 1)?;
        let tokenizer = Tokenizer::train(&data.train, 1000)?;
        Ok(Self { data, tokenizer })
    }

    /// The tour's model with a memory of `sub_keys` squared slots.
    fn config(&self, sub_keys: usize) -> ModelConfig {
        let memory = MemoryConfig { layers: vec![1], heads: 4, sub_keys, half_dim: 4, top_k: 8 };
        let (vocab, context) = (self.tokenizer.vocab(), 128);
        ModelConfig { vocab, dim: 32, layers: 2, heads: 4, hidden: 48, context, memory: Some(memory) }
    }

    fn side(&self, config: &ModelConfig, cpu: &Arc<Cpu>) -> Result<Box<Side<'static>>, BenchError> {
        let mut trainer = Trainer::new(config, &TrainConfig::default(), &self.data, self.tokenizer.clone(), cpu)?;
        Ok(Box::new(move |calls| clock(calls, || Ok(trainer.step().map(|_| ())?))))
    }
}
