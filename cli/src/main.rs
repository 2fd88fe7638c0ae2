//! Train, pack, ask and check memory layers.
//!
//! Results go to standard output, progress and errors to standard error. The exit code is 0, 1 if a check found an
//! error out of bounds, and 2 if something could not be done.

mod commands;
mod error;
mod loaded;
mod plot;
mod progress;
mod recipe;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use error::CliError;

/// candle makes and drops tensors of a few hundred KiB all the time. The system's allocator gives each back to the
/// system and takes it anew, page by page: that was half of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Memory layers: learn facts, pack them, answer.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
struct Arguments {
    /// Print results as JSON: the last line of the output is the whole result.
    #[arg(long, global = true)]
    json: bool,
    /// Threads that compute, those of candle too; all cores if not given.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole way once: train with a memory and without at the same cost, pack, answer, compare.
    Tour(commands::tour::Tour),
    /// Train a model, or go on training it.
    Train(commands::train::Train),
    /// Pack a trained model into one file.
    Quantize(commands::quantize::Quantize),
    /// Ask one question, or many at a prompt.
    Ask(commands::ask::Ask),
    /// Measure recall.
    Eval(commands::eval::Eval),
    /// Show a model: sizes, cost, and how evenly its slots are used.
    Inspect(commands::inspect::Inspect),
    /// Run golden files on every backend and instruction set of this machine.
    Check(commands::check::Check),
}

/// What commands share.
struct Context {
    json: bool,
    threads: Option<usize>,
}

impl Context {
    /// The CPU backend, with the best instruction set of this machine.
    fn cpu(&self) -> Result<memlayer_cpu::Cpu, CliError> {
        let mut builder = memlayer_cpu::Cpu::builder();
        if let Some(threads) = self.threads {
            builder = builder.threads(threads);
        }
        Ok(builder.build()?)
    }

    /// What candle does in parallel takes the threads of the whole program.
    fn limit_candle(&self) -> Result<(), CliError> {
        let Some(threads) = self.threads else { return Ok(()) };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(|e| CliError::Usage(format!("{threads} threads: {e}")))
    }

    /// Prints `value` as the last line, if JSON is asked for.
    fn finish(&self, value: &impl serde::Serialize) -> Result<(), CliError> {
        if self.json {
            let line = serde_json::to_string(value).map_err(|e| CliError::Usage(e.to_string()))?;
            self.line(format_args!("{line}"))?;
        }
        Ok(())
    }

    /// Prints a line for people, unless JSON is asked for.
    fn say(&self, line: core::fmt::Arguments<'_>) -> Result<(), CliError> {
        if self.json { Ok(()) } else { self.line(line) }
    }

    fn line(&self, line: core::fmt::Arguments<'_>) -> Result<(), CliError> {
        match writeln!(std::io::stdout().lock(), "{line}") {
            // Whoever reads us has seen enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(CliError::Quiet),
            result => result.map_err(CliError::Output),
        }
    }
}

fn main() -> ExitCode {
    let Arguments { json, threads, command } = Arguments::parse();
    let context = Context { json, threads: threads.map(usize::from) };
    let result = context.limit_candle().and_then(|()| match command {
        Command::Tour(tour) => tour.run(&context).map(|()| true),
        Command::Train(train) => train.run(&context).map(|()| true),
        Command::Quantize(quantize) => quantize.run(&context).map(|()| true),
        Command::Ask(ask) => ask.run(&context).map(|()| true),
        Command::Eval(eval) => eval.run(&context).map(|()| true),
        Command::Inspect(inspect) => inspect.run(&context).map(|()| true),
        Command::Check(check) => check.run(&context),
    });
    match result {
        Ok(true) | Err(CliError::Quiet) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::from(2)
        }
    }
}
