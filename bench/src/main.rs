//! memlayer beside what a user would pick instead: `cargo run --release -p memlayer-bench -- cpu`.
//!
//! Every row compares medians of interleaved pairs measured in one run on one machine. Speed decides no test.

mod cpu;
mod cuda;
mod disk;
mod error;
mod peer;
mod plot;
mod report;
mod time;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::error::BenchError;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(name = "memlayer-bench", about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The CPU backend, the limits of this machine, and PyTorch and FBGEMM where Python has them.
    Cpu(Options),
    /// The CUDA backend, a device copy, and PyTorch and Triton where Python has them.
    Cuda(cuda::Options),
    /// A table in a file, larger than the memory that a process may take.
    Disk(disk::Options),
    /// One way to hold a table, for `disk`.
    #[command(hide = true)]
    Serve(disk::Serve),
}

#[derive(Debug, Args)]
struct Options {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// The Python with the packages of bench/peers/requirements.txt; without them ours and the limits are measured.
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    python: PathBuf,
    /// Only cases whose name contains this, such as `bag_sum int8`.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Thread counts.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2])]
    threads: Vec<usize>,
    /// The most that tables and what is trained beside them take, ours and the peer's together, in GiB.
    #[arg(long, value_name = "GIB", default_value_t = 8.0)]
    memory: f64,
    /// Seconds for a case, and again for each way to measure its limit.
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    seconds: f64,
    /// Fewer sizes: the corners of the grid.
    #[arg(long)]
    quick: bool,
    /// The folder for the table, the rows and the plots.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Cpu(options) => cpu::run(&options),
        Command::Cuda(options) => cuda::run(&options),
        Command::Disk(options) => disk::run(&options),
        Command::Serve(serve) => disk::serve(&serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("error: {error}");
            if let (BenchError::File(_), Some(source)) = (&error, core::error::Error::source(&error)) {
                eprint!(": {source}");
            }
            eprintln!();
            ExitCode::from(2)
        }
    }
}
