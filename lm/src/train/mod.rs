//! Training: answer-only loss, one fact a sequence, the dense part by AdamW and the values by a row rule.

mod batches;
mod checkpoint;

use std::path::Path;
use std::sync::Arc;

use memlayer_candle::{Adam, Rule};
use memlayer_cpu::Cpu;
use serde::{Deserialize, Serialize};

pub use checkpoint::{Saved, latest};

use crate::config::ModelConfig;
use crate::data::Dataset;
use crate::error::{LmError, Result};
use crate::files::Lock;
use crate::infer::Reader;
use crate::model::{Model, Place, PoolInit};
use crate::ops::cross_entropy;
use crate::optim::{AdamW, AdamWConfig};
use crate::tokenizer::Tokenizer;
use batches::Batches;

/// How a model is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Steps in all.
    pub steps: u64,
    /// Sequences in a batch.
    pub batch: usize,
    /// The dense part's learning rate after the warm-up; it falls to zero in a line.
    pub lr: f64,
    /// The values' learning rate, on the same schedule.
    pub value_lr: f64,
    /// Steps of the linear warm-up.
    pub warmup: u64,
    /// The greatest norm of the dense part's gradient.
    pub clip: f64,
    /// The dense part's optimizer.
    pub adamw: AdamWConfig,
    /// The values' rule.
    pub value_rule: ValueRule,
    /// Picks starting values and the order of examples.
    pub seed: u64,
}

/// The row rule of the values, as configuration files name it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ValueRule {
    /// Plain gradient descent.
    Sgd,
    /// Lazy Adam.
    Adam {
        /// Decay of the first and of the second moment.
        betas: (f64, f64),
        /// Keeps the quotient finite.
        eps: f64,
    },
    /// Adagrad with one sum a row.
    RowwiseAdagrad {
        /// Keeps the quotient finite.
        eps: f64,
    },
}

impl From<ValueRule> for Rule {
    fn from(rule: ValueRule) -> Self {
        match rule {
            ValueRule::Sgd => Self::Sgd,
            ValueRule::Adam { betas, eps } => Self::Adam(Adam { betas, eps }),
            ValueRule::RowwiseAdagrad { eps } => Self::RowwiseAdagrad(memlayer_candle::RowwiseAdagrad { eps }),
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: 2000,
            batch: 256,
            lr: 1e-2,
            value_lr: 1e-1,
            warmup: 100,
            clip: 1.0,
            adamw: AdamWConfig::default(),
            value_rule: ValueRule::Adam { betas: (0.9, 0.99), eps: 1e-8 },
            seed: 1,
        }
    }
}

impl TrainConfig {
    fn check(&self) -> Result<()> {
        for (name, value) in [("lr", self.lr), ("value_lr", self.value_lr), ("clip", self.clip)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(LmError::Training(format!("{name} {value} is not positive")));
            }
        }
        if self.steps == 0 || self.batch == 0 {
            return Err(LmError::Training(format!("{} steps of {} sequences are no training", self.steps, self.batch)));
        }
        Ok(())
    }

    /// What learning rates are multiplied by at step `step`, counted from 0: up in a line, then down in a line.
    #[must_use]
    pub fn schedule(&self, step: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        let left = self.steps.saturating_sub(step) as f64;
        left / self.steps.saturating_sub(self.warmup).max(1) as f64
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Steps made, this one among them.
    pub step: u64,
    /// The mean loss of the batch's answer tokens, in nats.
    pub loss: f64,
    /// The norm of the dense gradient, before clipping.
    pub norm: f64,
    /// Rows of the pool that changed.
    pub rows: usize,
}

/// A training run.
#[derive(Debug)]
pub struct Trainer {
    model: Model,
    config: TrainConfig,
    tokenizer: Tokenizer,
    optimizer: AdamW,
    batches: Batches,
    mean_len: f64,
    step: u64,
    cpu: Arc<Cpu>,
}

impl Trainer {
    /// A run from the start.
    ///
    /// # Errors
    /// [`LmError::Config`] or [`LmError::Training`] if a configuration makes no sense, the vocabulary is not the
    /// tokenizer's, or an example is longer than the model's context.
    pub fn new(
        model: &ModelConfig,
        config: &TrainConfig,
        data: &Dataset,
        tokenizer: Tokenizer,
        place: impl Into<Place>,
    ) -> Result<Self> {
        let place = place.into();
        config.check()?;
        if model.vocab != tokenizer.vocab() {
            let found = tokenizer.vocab();
            return Err(LmError::Config(format!("vocab {} is not the tokenizer's {found}", model.vocab)));
        }
        let encoded = data.train.iter().map(|e| tokenizer.example(e)).collect::<Result<Vec<_>>>()?;
        let longest = encoded.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
        if longest > model.context {
            return Err(LmError::TooLong { found: longest, limit: model.context });
        }
        let mean_len = encoded.iter().map(|e| e.tokens.len() as f64 - 1.0).sum::<f64>() / encoded.len().max(1) as f64;
        let init = PoolInit { rule: config.value_rule.into() };
        let mut model = Model::new(model, init, &place, config.seed)?;
        let optimizer = AdamW::new(config.adamw, model.variables().all(), place.compute())?;
        let batches = Batches::new(encoded, config.batch, config.seed);
        if batches.per_epoch() == 0 {
            return Err(LmError::Training("there is nothing to learn".to_owned()));
        }
        model.set_data(data.fingerprint());
        let (config, cpu) = (config.clone(), Arc::clone(place.cpu()));
        Ok(Self { model, config, tokenizer, optimizer, batches, mean_len, step: 0, cpu })
    }

    /// A run that keeps checkpoints in `folder`: from its last one if there is one, else from the start. While the
    /// lock lives no other process trains there.
    ///
    /// # Errors
    /// As [`Trainer::new`]; [`LmError::File`] if another process has the folder, or its checkpoint is of another
    /// configuration or other data, or damaged.
    pub fn open(
        folder: &Path,
        model: &ModelConfig,
        config: &TrainConfig,
        data: &Dataset,
        tokenizer: Tokenizer,
        place: impl Into<Place>,
    ) -> Result<(Self, Lock)> {
        let lock = Lock::take(folder)?;
        checkpoint::clear(folder)?;
        let mut trainer = Self::new(model, config, data, tokenizer, place)?;
        if let Some(saved) = latest(folder)? {
            trainer.restore(&saved)?;
        }
        Ok((trainer, lock))
    }

    /// One step.
    ///
    /// # Errors
    /// [`LmError::Training`] if the loss is no number; the model is then as it was before the step.
    pub fn step(&mut self) -> Result<Report> {
        let batch = self.batches.get(self.step);
        let logits = self.model.logits(&batch)?;
        let loss = cross_entropy(&logits, batch.targets.as_slice().into())?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(LmError::Training(format!("the loss of step {} is {value}", self.step + 1)));
        }
        let grads = loss.backward()?;
        let norm = self.optimizer.square_sum(&grads)?.sqrt();
        let scale = if norm > self.config.clip { self.config.clip / norm } else { 1.0 };
        let factor = self.config.schedule(self.step);
        self.optimizer.step(&grads, self.config.lr * factor, scale)?;
        let rows = match self.model.pool() {
            Some(pool) => pool.step(self.config.value_lr * factor, 1.0)?.touched,
            None => 0,
        };
        self.step += 1;
        Ok(Report { step: self.step, loss: value, norm, rows })
    }

    /// Steps made.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The mean number of tokens a sequence puts in.
    #[must_use]
    pub fn mean_len(&self) -> f64 {
        self.mean_len
    }

    /// Steps that go once through the data.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches.per_epoch()
    }

    /// Reads the model as it is now.
    ///
    /// # Errors
    /// What `look` gives.
    pub fn with_reader<R>(&self, look: impl FnOnce(&Reader<'_>, &Cpu) -> Result<R>) -> Result<R> {
        self.model.with_reader(|reader| look(reader, &self.cpu))
    }
}
