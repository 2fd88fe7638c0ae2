//! `check`: golden files on every backend and instruction set of this machine.

use std::path::PathBuf;

use clap::Args;
use memlayer_cpu::{Cpu, Isa};
use memlayer_tests::golden::{Outcome, check_file, files_in};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;

/// Runs golden files: input, parameters, selected slots, output and gradients by the published names.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Safetensors files, or folders of them.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    files: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    file: String,
    backend: String,
    ok: bool,
    worst: Worst,
    #[serde(skip_serializing_if = "Option::is_none")]
    indices_agree: Option<bool>,
    tensors: Vec<Worst>,
}

#[derive(Clone, Serialize)]
struct Worst {
    tensor: String,
    /// Absent if it is no number.
    error: Option<f64>,
    bound: f64,
}

impl From<Outcome> for Row {
    fn from(outcome: Outcome) -> Self {
        let compared = |c: &memlayer_tests::golden::Compared| Worst {
            tensor: c.tensor.clone(),
            error: c.error.is_finite().then_some(c.error),
            bound: c.bound,
        };
        let none = Worst { tensor: "none".to_owned(), error: None, bound: 0.0 };
        Self {
            ok: outcome.ok(),
            worst: outcome.worst().map_or(none, compared),
            tensors: outcome.tensors.iter().map(compared).collect(),
            file: outcome.file.display().to_string(),
            backend: outcome.backend,
            indices_agree: outcome.indices_agree,
        }
    }
}

/// The largest error of the tensors that `wanted` names, for the table.
fn largest(row: &Row, wanted: impl Fn(&str) -> bool) -> String {
    let mut errors = row.tensors.iter().filter(|t| wanted(&t.tensor)).map(|t| t.error.unwrap_or(f64::NAN)).peekable();
    if errors.peek().is_none() {
        return "-".to_owned();
    }
    format!("{:.1e}", errors.fold(0.0, |m: f64, e| if e > m || e.is_nan() { e } else { m }))
}

impl Check {
    /// Whether every file is in its bounds.
    pub(crate) fn run(&self, context: &Context) -> Result<bool, CliError> {
        let mut cpus = Vec::new();
        for isa in Isa::available() {
            let mut builder = Cpu::builder().isa(isa);
            if let Some(threads) = context.threads {
                builder = builder.threads(threads);
            }
            cpus.push(builder.build()?);
        }
        // All files are found before the first is run: a wrong path is known at once.
        let mut files = Vec::new();
        for path in &self.paths {
            let found = files_in(path)?;
            if found.is_empty() {
                return Err(CliError::Usage(format!("{}: has no safetensors files", path.display())));
            }
            files.extend(found);
        }
        let mut rows: Vec<Row> = Vec::new();
        for file in &files {
            context.say(format_args!("{}", file.display()))?;
            let mut shown = Vec::new();
            for outcome in check_file(file, &cpus)? {
                let row = Row::from(outcome);
                let verdict = if row.ok { "ok " } else { "BAD" };
                let indices = match row.indices_agree {
                    Some(true) => "all agree",
                    Some(false) => "DIFFER",
                    None => "-",
                };
                context.say(format_args!(
                    "  {verdict} {:<18} output {:>8}  gradients {:>8}  indices {indices:<9}  worst {} {}",
                    row.backend,
                    largest(&row, |t| !t.starts_with("grad.")),
                    largest(&row, |t| t.starts_with("grad.") && !t.ends_with(".rows")),
                    row.worst.tensor,
                    row.worst.error.map_or("NaN".to_owned(), |e| format!("{e:.1e} of {:.0e}", row.worst.bound)),
                ))?;
                shown.push(row);
            }
            rows.extend(shown);
        }
        let ok = rows.iter().all(|row| row.ok);
        let bad = rows.iter().filter(|row| !row.ok).count();
        context.say(format_args!("{} files, {} runs, {bad} out of bounds", files.len(), rows.len()))?;
        context.finish(&Report { files: rows })?;
        Ok(ok)
    }
}
