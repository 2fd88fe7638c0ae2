//! The models and the training that the program starts from, and the options that change them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use memlayer_cpu::Cpu;
use memlayer_lm::data::{Dataset, Example};
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::train::{Report, TrainConfig, Trainer};
use memlayer_lm::{LmError, MemoryConfig, ModelConfig, flops};

use crate::error::CliError;
use crate::progress::Progress;

/// Which facts.
#[derive(Clone, Debug, Args)]
pub(crate) struct DataOptions {
    /// The folder of countries.tsv and cities.tsv.
    #[arg(long, value_name = "FOLDER", default_value = "data")]
    pub(crate) data: PathBuf,
    /// Facts from lines of JSON instead: {"question": "..", "answer": ["..", ..]}. Nothing of them is held out.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["data", "facts"])]
    pub(crate) jsonl: Option<PathBuf>,
    /// How many facts of the world.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub(crate) facts: usize,
    /// Picks starting values, the order of training, and which phrasing of each fact is held out.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

impl DataOptions {
    /// Loads the facts.
    pub(crate) fn load(&self) -> Result<Dataset, LmError> {
        match &self.jsonl {
            Some(path) => Dataset::jsonl(path),
            None => Dataset::world(&self.data, self.facts, self.seed),
        }
    }
}

/// Sizes and training of the tour's models.
#[derive(Clone, Debug, Args)]
pub(crate) struct Recipe {
    /// Steps of training.
    #[arg(long, value_name = "N", default_value_t = 3000)]
    pub(crate) steps: u64,
    /// Sequences in a batch.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) batch: usize,
    /// Learning rate of the dense part.
    #[arg(long, default_value_t = 1e-2)]
    pub(crate) lr: f64,
    /// Learning rate of the values.
    #[arg(long, default_value_t = 1e-1)]
    pub(crate) value_lr: f64,
    /// Tokens in the vocabulary.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) vocab: usize,
    /// Width of the model.
    #[arg(long, value_name = "D", default_value_t = 32)]
    pub(crate) dim: usize,
    /// Blocks of attention and feed-forward.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) layers: usize,
    /// Attention heads.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) heads: usize,
    /// Width of the dense feed-forward layers.
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub(crate) hidden: usize,
    /// Heads of the memory.
    #[arg(long, value_name = "H", default_value_t = 4)]
    pub(crate) memory_heads: usize,
    /// Sub-keys per half; the memory has their square of slots.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) sub_keys: usize,
    /// Width of a half key.
    #[arg(long, value_name = "C", default_value_t = 4)]
    pub(crate) half_dim: usize,
    /// Rows kept per head.
    #[arg(long, value_name = "K", default_value_t = 8)]
    pub(crate) top_k: usize,
    /// Blocks with a memory in place of their feed-forward, counted from 0; the last if none is named.
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    pub(crate) memory_layers: Vec<usize>,
}

impl Recipe {
    /// The model with a memory, for a tokenizer's vocabulary.
    pub(crate) fn memory_model(&self, vocab: usize) -> ModelConfig {
        let last = self.layers.saturating_sub(1);
        let layers = if self.memory_layers.is_empty() { vec![last] } else { self.memory_layers.clone() };
        let memory = MemoryConfig {
            layers,
            heads: self.memory_heads,
            sub_keys: self.sub_keys,
            half_dim: self.half_dim,
            top_k: self.top_k,
        };
        let (dim, heads, hidden) = (self.dim, self.heads, self.hidden);
        ModelConfig { vocab, dim, layers: self.layers, heads, hidden, context: 128, memory: Some(memory) }
    }

    /// How it is trained.
    pub(crate) fn training(&self, seed: u64) -> TrainConfig {
        let (steps, batch) = (self.steps, self.batch);
        TrainConfig { steps, batch, lr: self.lr, value_lr: self.value_lr, seed, ..TrainConfig::default() }
    }

    /// A tokenizer of the trained questions and answers.
    pub(crate) fn tokenizer(&self, data: &Dataset) -> Result<Tokenizer, LmError> {
        Tokenizer::train(&data.train, self.vocab)
    }
}

/// The mean number of tokens a trained sequence puts in.
pub(crate) fn mean_len(tokenizer: &Tokenizer, examples: &[Example]) -> Result<f64, LmError> {
    let mut sum = 0;
    for example in examples {
        sum += tokenizer.example(example)?.tokens.len() - 1;
    }
    Ok(sum as f64 / examples.len().max(1) as f64)
}

/// The dense model of the same cost.
pub(crate) fn dense_twin(config: &ModelConfig, mean_len: f64) -> Result<ModelConfig, LmError> {
    flops::dense_twin(config, mean_len)
}

/// Steps between looks at the recall while training.
pub(crate) const LOOK_EVERY: u64 = 250;

/// A point of a learning curve.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub(crate) struct Point {
    /// Steps made.
    pub(crate) step: u64,
    /// Mean loss since the last point.
    pub(crate) loss: f64,
    /// Recall of a part of the judged questions.
    pub(crate) recall: f64,
}

/// A training to be run to its end.
pub(crate) struct Run<'a> {
    /// Its name, for the progress.
    pub(crate) name: &'a str,
    /// The facts.
    pub(crate) data: &'a Dataset,
    /// Where checkpoints go, and after how many steps.
    pub(crate) checkpoints: Option<(&'a Path, u64)>,
    /// Called after every step.
    pub(crate) after_step: &'a mut dyn FnMut(&Report),
}

impl Run<'_> {
    /// Trains to the end; gives the learning curve and the seconds spent on steps alone.
    pub(crate) fn finish(self, trainer: &mut Trainer) -> Result<(Vec<Point>, f64), CliError> {
        let total = trainer.config().steps;
        let mut progress = Progress::new(self.name, total);
        let (mut points, mut seconds, mut losses, mut count) = (Vec::new(), 0.0, 0.0, 0u32);
        while trainer.steps() < total {
            let start = std::time::Instant::now();
            let report = trainer.step()?;
            seconds += start.elapsed().as_secs_f64();
            (self.after_step)(&report);
            losses += report.loss;
            count += 1;
            if report.step % LOOK_EVERY == 0 || report.step == total {
                let recall = quick_recall(trainer, self.data)?;
                points.push(Point { step: report.step, loss: losses / f64::from(count), recall });
                (losses, count) = (0.0, 0);
            }
            if let Some((folder, every)) = self.checkpoints
                && (report.step % every.max(1) == 0 || report.step == total)
            {
                trainer.save(folder)?;
            }
            progress.at(report.step, || {
                let recall = points.last().map_or(0.0, |p| p.recall);
                format!(
                    "loss {:.3}, recall about {:.0} %, {:.1} ms a step",
                    report.loss,
                    100.0 * recall,
                    1e3 * seconds / f64::from(u32::try_from(report.step).unwrap_or(u32::MAX))
                )
            });
        }
        progress.finish();
        Ok((points, seconds))
    }
}

/// Recall of about a thousand of the judged questions.
fn quick_recall(trainer: &Trainer, data: &Dataset) -> Result<f64, LmError> {
    let (judged, _) = data.judged();
    let questions = memlayer_lm::eval::Questions::new(judged, trainer.tokenizer())?.thinned(judged.len() / 1000);
    trainer.with_reader(|reader, cpu| {
        let normalization = memlayer_lm::metrics::Normalization::Squad;
        Ok(questions.ask(reader, cpu, trainer.tokenizer(), normalization, |_, _, _| {})?.em)
    })
}

/// A backend that model, pool and reader share.
pub(crate) fn share(cpu: Cpu) -> Arc<Cpu> {
    Arc::new(cpu)
}
