//! `train`: a training that goes on from its last checkpoint.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use memlayer_lm::train::{Trainer, latest};
use memlayer_lm::{Place, flops};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::recipe::{DataOptions, Point, Recipe, Run, dense_twin, mean_len, share};

/// Trains a model into a folder; the same command again goes on where it was.
#[derive(Debug, Args)]
pub(crate) struct Train {
    /// The folder of its checkpoints.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Train the dense model of the same cost instead.
    #[arg(long)]
    dense: bool,
    /// Where to train: cpu, cuda, or cuda:1 for another than the first GPU.
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Keep the values in the host's memory and N rows of them on the GPU, at least as many as a step touches; all of them
    /// there without this. The losses are the same.
    #[arg(long, value_name = "N", conflicts_with = "dense")]
    cache_rows: Option<usize>,
    /// Steps between checkpoints.
    #[arg(long, value_name = "N", default_value_t = 250)]
    checkpoint_every: u64,
    /// Write the loss of every step to this file, a line each: step, tab, loss.
    #[arg(long, value_name = "FILE")]
    losses: Option<PathBuf>,
    #[command(flatten)]
    data: DataOptions,
    #[command(flatten)]
    recipe: Recipe,
}

#[derive(Serialize)]
struct Trained {
    steps: u64,
    resumed_at: u64,
    train_seconds: f64,
    params: usize,
    memory_params: usize,
    flops_per_token: usize,
    curve: Vec<Point>,
}

impl Train {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let cpu = share(context.cpu()?);
        let place = Place::named(&self.device, &cpu)?.with_cache_rows(self.cache_rows);
        let data = self.data.load()?;
        // A run that goes on has its tokenizer already; it is the one its parameters know.
        let saved = if self.out.is_dir() { latest(&self.out)? } else { None };
        let tokenizer = match &saved {
            Some(saved) => saved.tokenizer()?,
            None => self.recipe.tokenizer(&data)?,
        };
        let mean_len = mean_len(&tokenizer, &data.train)?;
        let mut config = self.recipe.memory_model(tokenizer.vocab());
        if self.dense {
            config = dense_twin(&config, mean_len)?;
        }
        let cost = flops::cost(&config, mean_len)?;
        let training = self.recipe.training(self.data.seed);
        let (mut trainer, _lock) = Trainer::open(&self.out, &config, &training, &data, tokenizer, &place)?;
        let resumed_at = trainer.steps();
        context.say(format_args!(
            "{} facts; {} parameters and {} values; {} FLOPs a token; {:?}; from step {resumed_at} of {}",
            data.facts.len(),
            cost.dense_params,
            cost.memory_params,
            cost.flops_per_token,
            place.compute(),
            training.steps,
        ))?;
        let mut losses = self.losses.as_ref().map(LossFile::open).transpose()?;
        let mut failed = None;
        let start = Instant::now();
        let run = Run {
            name: if self.dense { "dense" } else { "memory" },
            data: &data,
            checkpoints: Some((&self.out, self.checkpoint_every)),
            after_step: &mut |report| {
                if let Some(file) = &mut losses {
                    failed = failed.take().or(file.write(report.step, report.loss).err());
                }
            },
        };
        let (curve, train_seconds) = run.finish(&mut trainer)?;
        if let Some(error) = failed {
            return Err(error);
        }
        if let Some(last) = curve.last() {
            context.say(format_args!(
                "loss {:.4}, recall about {:.1} % after {} steps; {train_seconds:.1} s of training, {:.1} s in all",
                last.loss,
                100.0 * last.recall,
                trainer.steps(),
                start.elapsed().as_secs_f64(),
            ))?;
        }
        context.finish(&Trained {
            steps: trainer.steps(),
            resumed_at,
            train_seconds,
            params: cost.dense_params + cost.memory_params,
            memory_params: cost.memory_params,
            flops_per_token: cost.flops_per_token,
            curve,
        })
    }
}

/// A file of losses, appended to as they come.
struct LossFile {
    path: PathBuf,
    file: std::fs::File,
}

impl LossFile {
    fn open(path: &PathBuf) -> Result<Self, CliError> {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        Ok(Self { path: path.clone(), file: file.map_err(|e| memlayer_lm::LmError::io(path, e))? })
    }

    fn write(&mut self, step: u64, loss: f64) -> Result<(), CliError> {
        use std::io::Write;
        writeln!(self.file, "{step}\t{loss:e}").map_err(|e| memlayer_lm::LmError::io(&self.path, e).into())
    }
}
