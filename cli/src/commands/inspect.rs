//! `inspect`: what a model is and how evenly its slots are used.

use std::path::PathBuf;

use clap::Args;
use memlayer_core::health::Health;
use memlayer_lm::eval::Questions;
use memlayer_lm::{ModelConfig, flops};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::loaded::Loaded;
use crate::plot;
use crate::recipe::{DataOptions, mean_len, share};

/// Shows a model.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// A packed file or the folder of a training.
    model: PathBuf,
    /// Write a picture of slot use (SVG) to this file.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    data: DataOptions,
}

#[derive(Serialize)]
struct Report<'a> {
    model: String,
    format: &'static str,
    config: &'a ModelConfig,
    params: usize,
    memory_params: usize,
    flops_per_token: usize,
    health: Option<HealthRow>,
}

#[derive(Serialize)]
struct HealthRow {
    reads: usize,
    counted: Figures,
    weighted: Figures,
}

#[derive(Serialize)]
struct Figures {
    used_percent: f64,
    kl_nats: f64,
    gini: f64,
    top50: usize,
    top90: usize,
    top99: usize,
}

impl From<Health> for Figures {
    fn from(h: Health) -> Self {
        let Health { used_percent, kl_nats, gini, top50, top90, top99 } = h;
        Self { used_percent, kl_nats, gini, top50, top90, top99 }
    }
}

impl Inspect {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let cpu = share(context.cpu()?);
        let model = Loaded::open(&self.model, &cpu)?;
        let config = model.config();
        let data = self.data.load()?;
        let mean_len = mean_len(model.tokenizer(), &data.train)?;
        let cost = flops::cost(config, mean_len)?;
        let format = model.format()?;
        context.say(format_args!(
            "{}: width {}, {} blocks of {} heads, feed-forward {}, vocabulary {}",
            self.model.display(),
            config.dim,
            config.layers,
            config.heads,
            config.hidden,
            config.vocab
        ))?;
        if let Some(m) = &config.memory {
            let (n, slots) = (m.sub_keys, m.sub_keys * m.sub_keys);
            context.say(format_args!(
                "memory in block {:?}: {slots} slots of {} values in {format}, {} heads, {n} sub-keys of width {}, {} rows a head",
                m.layers, config.dim, m.heads, m.half_dim, m.top_k
            ))?;
        }
        context.say(format_args!(
            "{} parameters besides {} values; {} FLOPs a token at {mean_len:.1} tokens",
            cost.dense_params, cost.memory_params, cost.flops_per_token
        ))?;
        let health = self.health(context, &model, &cpu, &data)?;
        context.finish(&Report {
            model: self.model.display().to_string(),
            format: format.name(),
            config,
            params: cost.dense_params + cost.memory_params,
            memory_params: cost.memory_params,
            flops_per_token: cost.flops_per_token,
            health,
        })
    }

    /// Which slots the judged questions read, for the tokens of their answers.
    fn health(
        &self,
        context: &Context,
        model: &Loaded,
        cpu: &memlayer_cpu::Cpu,
        data: &memlayer_lm::data::Dataset,
    ) -> Result<Option<HealthRow>, CliError> {
        let Some(memory) = &model.config().memory else {
            if self.plot.is_some() {
                return Err(CliError::Usage("--plot shows a memory's slots, and this model has none".to_owned()));
            }
            return Ok(None);
        };
        let slots = memory.sub_keys * memory.sub_keys;
        let (mut counted, mut weighted) = (vec![0.0; slots], vec![0.0; slots]);
        let questions = Questions::new(data.judged().0, model.tokenizer())?;
        let reads = model.with_reader(|reader| {
            questions.reads(reader, cpu, |read| {
                counted[read.slot as usize] += 1.0;
                weighted[read.slot as usize] += f64::from(read.weight);
            })
        })?;
        if let Some(path) = &self.plot {
            plot::slot_use(path, &counted, memory.sub_keys)?;
            context.say(format_args!("slot use drawn in {}", path.display()))?;
        }
        let (counted, weighted) = (Health::of(&mut counted), Health::of(&mut weighted));
        context.say(format_args!("{reads} reads of {} questions", data.judged().0.len()))?;
        context.say(format_args!("  counted:  {counted}"))?;
        context.say(format_args!("  weighted: {weighted}"))?;
        Ok(Some(HealthRow { reads, counted: counted.into(), weighted: weighted.into() }))
    }
}
