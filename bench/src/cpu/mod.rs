//! The cases of the CPU, and what they are measured against.

#[cfg(feature = "lm")]
mod candle;
mod inputs;
mod layer;
#[cfg(feature = "lm")]
mod lm;
mod ops;

use std::sync::Arc;

use memlayer_cpu::Cpu;
use serde::Serialize;

use crate::Options;
use crate::error::BenchError;
use crate::peer::Peer;
use crate::plot;
use crate::report::{HEADING, Report, Row, line};
use crate::time::{self, Pair};
use inputs::{Tables, row_bytes};
pub(crate) use inputs::{reals, slot};

/// What is measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Case {
    pub(crate) op: &'static str,
    /// Of rows, or of keys for `select`; the row rule for `step`.
    pub(crate) format: &'static str,
    pub(crate) v: usize,
    pub(crate) t: usize,
    pub(crate) slots: usize,
    pub(crate) threads: usize,
    /// Whether slots are picked by Zipf's law (exponent 1) instead of uniformly.
    pub(crate) zipf: bool,
    pub(crate) heads: usize,
    pub(crate) sub_keys: usize,
    pub(crate) half_dim: usize,
    pub(crate) top_k: usize,
    /// Bytes of a row's codes.
    pub(crate) row_bytes: usize,
    /// What it is measured against.
    pub(crate) peer: &'static str,
}

impl Case {
    fn new(op: &'static str, format: &'static str, (v, t, slots): (usize, usize, usize), threads: usize) -> Self {
        let peer = match (op, format) {
            ("bag_sum", "int8" | "int4" | "e4m3") => "FBGEMM",
            ("step", _) => "SparseAdam",
            ("rows step" | "grown step", _) => "as many rows of 2^16",
            ("lm step", _) => "dense, equal FLOPs",
            ("grown lm step", _) => "2^16 slots",
            _ => "PyTorch",
        };
        let rows = if matches!(op, "step" | "rows step" | "grown step" | "select") { "f32" } else { format };
        Self {
            op,
            format,
            v,
            t,
            slots,
            threads,
            zipf: false,
            heads: 4,
            sub_keys: slots.isqrt(),
            half_dim: 64,
            top_k: 32,
            row_bytes: row_bytes(rows, v),
            peer,
        }
    }

    fn name(&self) -> String {
        let Self { op, format, v, t, slots, threads, peer, .. } = self;
        format!("{op} {format} v{v} t{t} 2^{} x{threads} {peer}", slots.ilog2())
    }

    /// L.
    pub(crate) fn bag(&self) -> usize {
        self.heads * self.top_k
    }

    /// The least ratio that is aimed at.
    fn target(&self) -> Option<f64> {
        match (self.op, self.format, self.peer) {
            ("select", "f32", _) => Some(if self.t >= 16 { 6.0 } else { 3.0 }),
            ("select", "int8", _) => Some(10.0),
            ("bag_sum", "f32", _) => Some(1.0),
            ("bag_sum", "bf16", _) => Some(1.5),
            ("bag_sum", "int8", _) => Some(if self.v <= 256 { 1.7 } else { 1.3 }),
            ("bag_sum", "e4m3" | "e5m2", _) => Some(5.0),
            ("bag_sum", "int4", _) => Some(1.3),
            ("layer", "f32", _) => Some(if self.t == 1 { 3.0 } else { 3.5 }),
            ("layer", "int8", _) => Some(if self.t == 1 { 6.0 } else { 7.0 }),
            ("step", _, "AdamW") => Some(100.0),
            ("step", "adam", _) => Some(5.0),
            ("step", "adagrad", _) => Some(8.0),
            ("lm step", ..) => Some(0.9),
            // At most 1.5 times the time of the small table.
            ("rows step" | "grown step" | "grown lm step", ..) => Some(0.67),
            _ => None,
        }
    }
}

/// Formats of rows.
const FORMATS: [&str; 7] = ["f32", "bf16", "f16", "int8", "e4m3", "e5m2", "int4"];

/// All cases, those that share a table one after the other.
fn cases(options: &Options) -> Vec<Case> {
    let mut cases = Vec::new();
    let tokens: &[usize] = if options.quick { &[1, 256] } else { &[1, 16, 256, 4096] };
    let threads = &options.threads;
    let mut add = |case: Case| cases.push(case);
    for format in ["f32", "int8"] {
        for slots in [1 << 20, 1 << 16, 1 << 18, 1 << 22] {
            for &t in tokens.iter().filter(|&&t| slots == 1 << 20 || t == 256 && !options.quick) {
                threads.iter().for_each(|&n| add(Case::new("select", format, (256, t, slots), n)));
            }
        }
    }
    for &t in tokens {
        threads.iter().for_each(|&n| add(Case::new("select", "int8 rows", (256, t, 1 << 20), n)));
    }
    for format in FORMATS {
        for v in [64, 256, 1024] {
            for slots in [1 << 20, 1 << 16, 1 << 18, 1 << 22] {
                let swept = slots == 1 << 20 || v == 256 && !options.quick;
                for &t in tokens.iter().filter(|&&t| swept && (slots == 1 << 20 || t == 256)) {
                    for &n in threads {
                        let case = Case::new("bag_sum", format, (v, t, slots), n);
                        add(case.clone());
                        if t == 256 && v == 256 && slots == 1 << 20 {
                            add(Case { zipf: true, ..case });
                        }
                    }
                }
            }
        }
    }
    for format in ["f32", "int8"] {
        for &t in tokens {
            threads.iter().for_each(|&n| add(Case::new("layer", format, (256, t, 1 << 20), n)));
        }
    }
    for format in ["adam", "adagrad"] {
        let sizes = [
            (256, 256, 1 << 16),
            (256, 256, 1 << 20),
            (256, 256, 1 << 22),
            (256, 16, 1 << 20),
            (256, 4096, 1 << 20),
            (64, 256, 1 << 16),
            (64, 256, 1 << 22),
        ];
        for (v, t, slots) in sizes {
            for &n in threads.iter().filter(|_| !options.quick || t == 256 && (v == 64 || slots == 1 << 20)) {
                let case = Case::new("step", format, (v, t, slots), n);
                if format == "adam" {
                    add(Case { peer: "AdamW", ..case.clone() });
                }
                add(case);
            }
        }
    }
    for v in [64, 256] {
        threads.iter().for_each(|&n| add(Case::new("rows step", "adam", (v, 1024, 1 << 22), n)));
    }
    for (format, v) in [("adam", 64), ("adam", 256), ("adagrad", 64), ("adagrad", 256), ("adagrad", 1024)] {
        threads.iter().for_each(|&n| add(Case::new("grown step", format, (v, 256, 1 << 22), n)));
    }
    // candle's operations take all cores.
    #[cfg(feature = "lm")]
    for t in [16, 256] {
        let all = std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
        for op in ["linear", "bag_sum", "select"] {
            add(Case { peer: "candle", ..Case::new(op, "f32", (256, t, 1 << 20), all) });
        }
    }
    #[cfg(feature = "lm")]
    for (op, slots) in [("lm step", 1 << 14), ("grown lm step", 1 << 22)] {
        threads.iter().for_each(|&n| add(Case::new(op, "f32", (32, 256, slots), n)));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a size somebody typed")]
    let most = (options.memory * f64::from(1 << 30)) as usize;
    // Tables and their state, ours and the peer's: a dense step has a gradient of the table too.
    let copies = |case: &Case| match (case.op, case.format, case.peer) {
        ("step", "adam", "AdamW") => 3 + 4,
        ("step", "adam", _) => 3 + 3,
        ("step", ..) => 1 + 3,
        ("grown step" | "rows step", "adam", _) => 3,
        ("grown step" | "rows step", ..) => 1,
        _ => 2,
    };
    cases.retain(|case| case.slots * case.row_bytes * copies(case) <= most);
    if let Some(only) = &options.only {
        cases.retain(|case| case.name().contains(only.as_str()));
    }
    cases
}

/// Runs all cases and prints the table.
pub(crate) fn run(options: &Options) -> Result<(), BenchError> {
    let cpu = |threads| Cpu::builder().threads(threads).build().map(Arc::new);
    let (mut peer, versions) = match Peer::start(&options.python) {
        Ok((peer, versions)) => (Some(peer), versions),
        Err(why) => (None, format!("no peers: {why}")),
    };
    let machine = format!("{}, {}", processor(), versions);
    println!("{machine}\n{}; H = 4, K = 32, C = 64\n{HEADING}", cpu(1)?.isa());
    let mut tables = Tables::default();
    let mut rows: Vec<Row> = Vec::new();
    for case in cases(options) {
        // What was measured is kept, whatever becomes of the rest.
        if let (Some(folder), Some(last)) = (&options.out, rows.last())
            && last.case.op != case.op
        {
            plot::write(folder, &machine, &rows)?;
        }
        let row = measure(&case, options.seconds, &cpu(case.threads)?, peer.as_mut(), &mut tables)?;
        println!("{}", line(&row));
        rows.push(row);
    }
    if let Some(folder) = &options.out {
        plot::write(folder, &machine, &rows)?;
    }
    if options.json {
        let json = serde_json::to_string(&Report { rows: &rows });
        println!("{}", json.map_err(|e| BenchError::Plot(e.to_string()))?);
    }
    Ok(())
}

fn measure(
    case: &Case,
    seconds: f64,
    cpu: &Arc<Cpu>,
    peer: Option<&mut Peer>,
    tables: &mut Tables,
) -> Result<Row, BenchError> {
    let mut row = Row {
        case: case.clone(),
        ours_us: 0.0,
        peer_us: None,
        ratio: None,
        spread: None,
        limit_fraction: None,
        work_fraction: None,
        missing: None,
        target: case.target(),
    };
    let keep = |row: &mut Row, pair: Pair| {
        (row.ours_us, row.peer_us) = (pair.ours, Some(pair.other));
        (row.ratio, row.spread) = (Some(pair.ratio), Some(pair.spread));
    };
    #[cfg(feature = "lm")]
    if matches!(case.op, "lm step" | "grown lm step") {
        let steps = if case.op == "lm step" { lm::steps } else { lm::grown_steps };
        keep(&mut row, steps(4.0 * seconds, cpu)?);
        return Ok(row);
    }
    #[cfg(feature = "lm")]
    if case.peer == "candle" {
        keep(&mut row, candle::measure(case, seconds, cpu, tables)?);
        return Ok(row);
    }
    if matches!(case.op, "rows step" | "grown step") {
        tables.clear();
        let [mut large, mut small] = match case.op {
            "rows step" => [ops::rows_step(case, cpu, case.slots)?, ops::rows_step(case, cpu, layer::SMALL)?],
            _ => layer::grown_step(case, cpu, tables)?,
        };
        let small = &mut |calls| time::clock(calls, &mut small);
        keep(&mut row, time::pair(4.0 * seconds, &mut |calls| time::clock(calls, &mut large), small)?);
        return Ok(row);
    }
    let mut call = match case.op {
        "select" => ops::select(case, cpu)?,
        "bag_sum" => ops::bag_sum(case, cpu, tables, ops::Of::Table)?,
        "layer" => layer::forward(case, cpu, tables)?,
        _ => layer::step(case, cpu, tables)?,
    };
    let mut ours = |calls| time::clock(calls, &mut call);
    if case.op == "bag_sum" {
        let mut fraction: f64 = f64::INFINITY;
        for ahead in ops::AHEAD {
            let mut limit = ops::limit(case, cpu, tables, ahead)?;
            let pair = time::pair(seconds, &mut ours, &mut |calls| time::clock(calls, &mut limit))?;
            (row.ours_us, fraction) = (pair.ours, fraction.min(pair.ratio));
        }
        row.limit_fraction = Some(fraction);
        let mut work = ops::bag_sum(case, cpu, tables, ops::Of::FirstCache)?;
        let pair = time::pair(seconds, &mut ours, &mut |calls| time::clock(calls, &mut work))?;
        row.work_fraction = Some(pair.ratio);
    }
    match peer {
        None => row.missing = Some("not there".to_owned()),
        Some(peer) => {
            let json = serde_json::to_value(case).map_err(|e| BenchError::Plot(e.to_string()))?;
            row.missing = peer.prepare(&json)?;
            if row.missing.is_none() {
                time::settle(&mut ours)?;
                keep(&mut row, time::pair(seconds, &mut ours, &mut |calls| peer.run(calls))?);
            }
        }
    }
    if row.ours_us == 0.0 {
        row.ours_us = time::pair(seconds, &mut ours, &mut |_| Ok(1.0))?.ours;
    }
    Ok(row)
}

/// The processor's name and cores.
pub(crate) fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, core::num::NonZero::get);
    format!("{}, {cores} cores", name.map_or("unknown processor", |(_, name)| name))
}
