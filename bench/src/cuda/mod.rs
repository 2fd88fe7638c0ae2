//! The cases of a GPU, and what they are measured against in the same run.
//!
//! The peers (`bench/peers/cuda.py`) run first, in a process of their own, and leave the device before ours begin: both time
//! with device events, medians, inputs rotated.

mod bags;
mod cached;
#[cfg(feature = "candle")]
mod candle;
mod device;
mod layer;
#[cfg(all(feature = "lm", feature = "candle"))]
mod lm;
mod select;
mod step;

use core::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use memlayer_core::Device as _;
use serde::{Deserialize, Serialize};

use crate::error::BenchError;
use crate::plot::chart;
use device::Bench;

const TOKENS: usize = 4096;
const BAG: usize = 128;

/// Our script, which travels in this program.
const SCRIPT: &str = include_str!("../../peers/cuda.py");

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
    /// A Python with PyTorch and Triton; without them ours alone is measured.
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    python: PathBuf,
    /// Only operations whose name contains this: bag_sum, bag_dot, sparse (gradients of rows), step, step cached, step cached
    /// huge (with `--huge`), select, decode, layer decode, lm step (built with the features lm and candle).
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Also a step over a table of so many GiB in pinned memory of the host, with a cache of its rows on the device: a table
    /// larger than the device.
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..8192))]
    huge: Option<u32>,
    /// Rows that the device has room for then.
    #[arg(long, value_name = "ROWS", default_value_t = 24 << 20)]
    huge_cache: usize,
    /// Fewer widths and repetitions.
    #[arg(long)]
    quick: bool,
    /// The folder for the table, the rows and the plots.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    op: &'static str,
    format: &'static str,
    ids: &'static str,
    tokens: usize,
    width: usize,
    slots: usize,
}

/// A time of ours.
#[derive(Clone, Copy, Debug, Serialize)]
struct Measured {
    #[serde(flatten)]
    case: Case,
    ms: f64,
    /// What must be moved in that time, over what a device copy moves in it.
    of_copy: Option<f64>,
}

/// A time of a peer, as its script prints it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Other {
    by: String,
    op: String,
    format: String,
    ids: String,
    tokens: usize,
    width: usize,
    slots: usize,
    /// None where it did not fit into memory.
    ms: Option<f64>,
}

impl Other {
    /// Whether it is what a case of ours would take its place: of the same operation and sizes. A format the peer has none of
    /// is compared with the nearest it has, which is named in `by`.
    fn is_of(&self, case: &Case) -> bool {
        // The peers' gradients, of sums and of rows, are bf16; ours are f32 unless it says so.
        let op = case.op.strip_suffix(", dY bf16").unwrap_or(case.op);
        let op = op.strip_suffix(" to bf16").or(op.strip_suffix(", padded, fetch 32")).unwrap_or(op);
        (&*self.op, &*self.format, &*self.ids) == (op, case.format, case.ids)
            && (self.tokens, self.width, self.slots) == (case.tokens, case.width, case.slots)
    }
}

impl Measured {
    fn line(&self) -> String {
        let Case { op, format, ids, tokens, width, slots } = self.case;
        let of_copy = self.of_copy.map_or_else(String::new, |f| format!("{:6.1} % of a copy", 100.0 * f));
        let slots = match slots.max(1) {
            slots if slots.is_power_of_two() => slots.ilog2().to_string(),
            slots => format!("{:.2}", (slots as f64).log2()),
        };
        format!("{op:<33} {format:<7} {ids:<8} T {tokens:<6} V {width:<5} 2^{slots:<5} {:>9.4} ms {of_copy}", self.ms)
    }
}

/// All that one run found.
#[derive(Debug, Serialize)]
struct Report {
    device: String,
    command: String,
    rows: Vec<Measured>,
    peers: Vec<Other>,
    notes: Vec<String>,
}

/// Runs the peers, then ours, and prints the table.
pub(crate) fn run(options: &Options) -> Result<(), BenchError> {
    // Before the peers take minutes: is there a device?
    let name = memlayer_cuda::Cuda::new(0)?.name().to_owned();
    eprintln!("{name}");
    let peers = peers(options)?;
    let mut bench = Bench::new(options)?;
    bench.measure_copy()?;
    bench.bags()?;
    bench.steps()?;
    bench.cached()?;
    bench.huge()?;
    bench.selections()?;
    bench.decode()?;
    bench.layers()?;
    bench.cuda.synchronize()?;
    let command = std::env::args().collect::<Vec<_>>().join(" ");
    // candle is of this process: it comes behind ours, so that the device is as others left it.
    #[cfg(feature = "candle")]
    let peers = [peers, candle::others(options)?].concat();
    #[cfg(all(feature = "lm", feature = "candle"))]
    let peers = [peers, bench.lm_steps()?].concat();
    let (rows, notes) = bench.into_found();
    let report = Report { device: name, command, rows, peers, notes };
    let table = table(&report);
    println!("{table}");
    let json = serde_json::to_string(&report).map_err(|e| BenchError::Plot(e.to_string()))?;
    if let Some(folder) = &options.out {
        let io = |source| BenchError::Io { path: folder.clone(), source };
        std::fs::create_dir_all(folder).map_err(io)?;
        std::fs::write(folder.join("cuda.txt"), &table).map_err(io)?;
        std::fs::write(folder.join("cuda.json"), json.clone() + "\n").map_err(io)?;
        plots(folder, &report)?;
    }
    if options.json {
        println!("{json}");
    }
    Ok(())
}

/// What the peers took; nothing where Python or PyTorch is not there.
fn peers(options: &Options) -> Result<Vec<Other>, BenchError> {
    let program = options.python.display().to_string();
    let fail = |problem: String| BenchError::Peer { program: program.clone(), problem };
    let mut command = Command::new(&options.python);
    // Triton reads the source of its kernels from a file.
    let script = std::env::temp_dir().join(format!("memlayer-peers-{}.py", std::process::id()));
    std::fs::write(&script, SCRIPT).map_err(|source| BenchError::Io { path: script.clone(), source })?;
    command.arg(&script).stderr(Stdio::inherit());
    if options.quick {
        command.arg("--quick");
    }
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    let output = command.output();
    let _ = std::fs::remove_file(&script);
    let output = match output {
        Ok(output) if output.status.success() => output,
        Ok(output) => {
            eprintln!("no peers: {program} ended with {}", output.status);
            return Ok(Vec::new());
        }
        Err(error) => {
            eprintln!("no peers: {program}: {error}");
            return Ok(Vec::new());
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).map_err(|e| fail(format!("{line}: {e}")))).collect()
}

/// Each case of ours, and under it what else does the same, with how many times as long it takes.
fn table(report: &Report) -> String {
    let mut text = format!("{}\n{}\n\n", report.device, report.command);
    // Writing to a string does not fail.
    for row in &report.rows {
        let _ = writeln!(text, "{}", row.line());
        for other in report.peers.iter().filter(|other| other.is_of(&row.case)) {
            let _ = match other.ms {
                Some(ms) => writeln!(text, "    {:<55} {ms:>9.4} ms {:>7.2} times ours", other.by, ms / row.ms),
                None => writeln!(text, "    {:<55} out of memory", other.by),
            };
        }
    }
    let copy = report.peers.iter().filter(|other| other.op == "copy");
    for other in copy {
        let _ = writeln!(text, "{}: a copy of 1 GiB takes {:.4} ms", other.by, other.ms.unwrap_or(f64::NAN));
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    text
}

/// Cost against width and against slots.
fn plots(folder: &Path, report: &Report) -> Result<(), BenchError> {
    type Curves = Vec<(String, Vec<(f64, f64)>)>;
    let put = |curves: &mut Curves, name: String, at: (f64, f64)| match curves.iter_mut().find(|(n, _)| *n == name) {
        Some((_, points)) => points.push(at),
        None => curves.push((name, vec![at])),
    };
    let curves = |keep: &dyn Fn(&str, usize, usize) -> bool, x: fn(usize, usize) -> f64| {
        let mut all = Curves::new();
        for row in &report.rows {
            let Case { op, format, ids, tokens, width, slots } = row.case;
            if tokens == TOKENS && ids == "uniform" && keep(op, width, slots) {
                put(&mut all, format!("ours, {format}"), (x(width, slots), row.ms));
            }
        }
        for other in &report.peers {
            // What stands for several of our formats is one of its own.
            let wanted = other.tokens == TOKENS && other.ids == "uniform" && other.format == "bf16";
            if let (Some(ms), true) = (other.ms, wanted && keep(&other.op, other.width, other.slots)) {
                put(&mut all, other.by.clone(), (x(other.width, other.slots), ms));
            }
        }
        all
    };
    let bags = curves(&|op, _, slots| op == "bag_sum" && slots == 1 << 20, |v, _| v as f64);
    chart(&folder.join("cuda-bag-width.svg"), "bag_sum, 4096 tokens of 128 rows, 2^20 slots", ("V", "ms"), bags)?;
    let steps = curves(&|op, v, _| op == "step" && v == 1024, |_, slots| slots as f64);
    chart(&folder.join("cuda-step-slots.svg"), "a training step, V = 1024", ("slots", "ms"), steps)
}
