//! `tour`: the whole way once.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use memlayer_core::element::Format;
use memlayer_cpu::Cpu;
use memlayer_lm::data::Dataset;
use memlayer_lm::eval::{LONGEST_ANSWER, Questions, Recall};
use memlayer_lm::flops::{Cost, cost};
use memlayer_lm::metrics::Normalization;
use memlayer_lm::packed::{PackedModel, pack};
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::train::{TrainConfig, Trainer};
use memlayer_lm::{LmError, ModelConfig};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::plot::{Curve, learning_curves};
use crate::recipe::{DataOptions, Point, Recipe, Run, dense_twin, mean_len, share};

/// Trains a model with a Memory+ layer and a dense one of the same FLOPs a token on the same facts, packs the memory,
/// answers from the packed files, and compares.
#[derive(Debug, Args)]
pub(crate) struct Tour {
    /// The folder for the packed models and the plot.
    #[arg(long, value_name = "FOLDER", default_value = "runs/tour")]
    out: PathBuf,
    /// Learning rate of the dense model: its own best one.
    #[arg(long, default_value_t = 2e-2)]
    dense_lr: f64,
    #[command(flatten)]
    data: DataOptions,
    #[command(flatten)]
    recipe: Recipe,
}

#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
}

/// A line of the table.
#[derive(Serialize)]
struct Row {
    system: &'static str,
    format: &'static str,
    params: usize,
    memory_params: usize,
    flops_per_token: usize,
    train_seconds: f64,
    facts: usize,
    recall_em: f64,
    recall_f1: f64,
    bytes: u64,
    us_per_token: f64,
}

/// A model after its training.
struct Finished {
    system: &'static str,
    config: ModelConfig,
    cost: Cost,
    trainer: Trainer,
    curve: Vec<Point>,
    seconds: f64,
}

/// The question everyone asks first.
const FIRST: &str = "What is the capital of France?";

/// Held-out questions that are shown with their answers.
const SHOWN: usize = 6;

impl Tour {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let start = Instant::now();
        std::fs::create_dir_all(&self.out).map_err(|e| LmError::io(&self.out, e))?;
        let cpu = share(context.cpu()?);
        let data = self.data.load()?;
        let tokenizer = self.recipe.tokenizer(&data)?;
        let mean_len = mean_len(&tokenizer, &data.train)?;
        let memory = self.recipe.memory_model(tokenizer.vocab());
        let dense = dense_twin(&memory, mean_len)?;
        self.introduce(context, &cpu, &data, &memory, &dense, mean_len)?;

        let training = self.recipe.training(self.data.seed);
        let dense_training = TrainConfig { lr: self.dense_lr, ..training.clone() };
        let mut finished = Vec::new();
        for (system, config, training) in [("memory+", memory, training), ("dense", dense, dense_training)] {
            let cost = cost(&config, mean_len)?;
            let mut trainer = Trainer::new(&config, &training, &data, tokenizer.clone(), &cpu)?;
            let run = Run { name: system, data: &data, checkpoints: None, after_step: &mut |_| {} };
            let (curve, seconds) = run.finish(&mut trainer)?;
            finished.push(Finished { system, config, cost, trainer, curve, seconds });
        }
        let plot = self.out.join("learning.svg");
        self.draw(&plot, &data, &finished)?;

        let mut rows = Vec::new();
        for (of, format) in [(1, Format::F32), (0, Format::F32), (0, Format::Int8), (0, Format::E4m3)] {
            rows.push(self.pack_and_ask(&finished[of], format, &cpu, &data)?);
        }
        self.show(context, &rows, &finished[0], &data)?;
        context.say(format_args!(
            "\nLearning curves: {}. Packed models: {}. Everything took {:.0} s.",
            plot.display(),
            self.out.display(),
            start.elapsed().as_secs_f64()
        ))?;
        let packed = self.out.join("memory-int8.mem");
        context.say(format_args!("Ask it yourself: memlayer ask {} --explain \"{}\"", packed.display(), FIRST))?;
        context.finish(&Report { rows })
    }

    fn introduce(
        &self,
        context: &Context,
        cpu: &Arc<Cpu>,
        data: &Dataset,
        memory: &ModelConfig,
        dense: &ModelConfig,
        mean_len: f64,
    ) -> Result<(), CliError> {
        let (a, b) = (cost(memory, mean_len)?, cost(dense, mean_len)?);
        let (judged, was_trained) = data.judged();
        let what = if was_trained { "the trained questions" } else { "held-out questions" };
        context.say(format_args!(
            "Two small language models learn {} facts from {} questions; {} {what} judge them.\n\
             memory+: {} parameters and a memory of {} values, {} FLOPs a token\n\
             dense:   {} parameters, feed-forward widened from {} to {}, {} FLOPs a token\n\
             Same data, order, steps ({}) and seed ({}). Backend: {}.\n",
            data.facts.len(),
            data.train.len(),
            judged.len(),
            a.dense_params,
            a.memory_params,
            a.flops_per_token,
            b.dense_params,
            memory.hidden,
            dense.hidden,
            b.flops_per_token,
            self.recipe.steps,
            self.data.seed,
            memlayer_core::Host::name(&**cpu),
        ))
    }

    fn draw(&self, path: &Path, data: &Dataset, finished: &[Finished]) -> Result<(), CliError> {
        let title = format!("{} facts, equal FLOPs a token", data.facts.len());
        let curves: Vec<_> = finished
            .iter()
            .map(|f| Curve {
                name: format!("{} ({} FLOPs a token)", f.system, f.cost.flops_per_token),
                points: &f.curve,
            })
            .collect();
        learning_curves(path, &title, &curves)
    }

    /// Packs a model, opens the file again, and asks it everything that was held out.
    fn pack_and_ask(
        &self,
        finished: &Finished,
        format: Format,
        cpu: &Arc<Cpu>,
        data: &Dataset,
    ) -> Result<Row, CliError> {
        // 8-bit floats go by the name people know.
        let name = if format == Format::E4m3 { "fp8" } else { format.name() };
        let path = self.out.join(format!("{}-{name}.mem", finished.system.trim_end_matches('+')));
        let packing = pack(finished.trainer.model(), finished.trainer.tokenizer(), format, &path)?;
        let bytes = std::fs::read(&path).map_err(|e| LmError::io(&path, e))?;
        let model = PackedModel::new(&path, bytes)?;
        let questions = Questions::new(data.judged().0, model.tokenizer())?;
        let (recall, us_per_token) = model.with_reader(|reader| {
            let recall = questions.ask(reader, cpu, model.tokenizer(), Normalization::Squad, |_, _, _| {})?;
            Ok((recall, microseconds_per_token(reader, cpu, model.tokenizer(), data)?))
        })?;
        let Recall { em, f1, .. } = recall;
        Ok(Row {
            system: finished.system,
            format: name,
            params: finished.cost.dense_params + finished.cost.memory_params,
            memory_params: finished.cost.memory_params,
            flops_per_token: finished.cost.flops_per_token,
            train_seconds: finished.seconds,
            facts: data.facts.len(),
            recall_em: em,
            recall_f1: f1,
            bytes: packing.bytes,
            us_per_token,
        })
    }

    fn show(&self, context: &Context, rows: &[Row], memory: &Finished, data: &Dataset) -> Result<(), CliError> {
        context.say(format_args!(
            "{:<9}{:<7}{:>11}{:>10}{:>9}{:>10}{:>9}{:>12}{:>10}",
            "system", "format", "parameters", "FLOPs/tok", "train s", "recall EM", "F1", "bytes", "us/token"
        ))?;
        for row in rows {
            context.say(format_args!(
                "{:<9}{:<7}{:>11}{:>10}{:>9.1}{:>9.2} %{:>7.2} %{:>12}{:>10.1}",
                row.system,
                row.format,
                row.params,
                row.flops_per_token,
                row.train_seconds,
                100.0 * row.recall_em,
                100.0 * row.recall_f1,
                row.bytes,
                row.us_per_token,
            ))?;
        }
        context.say(format_args!(
            "\nRecall on held-out phrasings only. us/token: one question at a time, tokens read and written, from the packed file.\n"
        ))?;
        let (judged, tokenizer) = (data.judged().0, memory.trainer.tokenizer());
        let some = judged.iter().step_by((judged.len() / SHOWN).max(1)).map(|e| (e.question.as_str(), &e.answers[..]));
        for (question, right) in core::iter::once((FIRST, &[][..])).chain(some) {
            let prompt = tokenizer.prompt(question)?;
            let longest = LONGEST_ANSWER.min(memory.config.context.saturating_sub(prompt.len()));
            let answers = memory.trainer.with_reader(|reader, cpu| reader.answer(cpu, &[&prompt], longest, false))?;
            let answer = tokenizer.decode(&answers[0].tokens)?;
            let wrong = !right.is_empty() && !right.contains(&answer);
            let note = if wrong { format!("  (it is {})", right.join(" or ")) } else { String::new() };
            context.say(format_args!("  {question} {answer}{note}"))?;
        }
        Ok(())
    }
}

/// The median time of a token, one question at a time.
fn microseconds_per_token(
    reader: &memlayer_lm::infer::Reader<'_>,
    cpu: &Cpu,
    tokenizer: &Tokenizer,
    data: &Dataset,
) -> Result<f64, LmError> {
    let mut times = Vec::new();
    for example in data.judged().0.iter().step_by((data.judged().0.len() / 300).max(1)) {
        let prompt = tokenizer.prompt(&example.question)?;
        let start = Instant::now();
        let answers = reader.answer(cpu, &[&prompt], LONGEST_ANSWER, false)?;
        let tokens = prompt.len() + answers.iter().map(|a| a.tokens.len()).sum::<usize>();
        times.push(1e6 * start.elapsed().as_secs_f64() / tokens as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(0.0))
}
