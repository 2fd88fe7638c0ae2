//! Tables in a file, larger than the memory a process may take.
//!
//! The program runs itself once for every way to hold the table, inside a control group where it is to have little
//! memory: what the system keeps of a file counts there too.

use core::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use clap::Args;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::ops::optim::{RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowPlan};
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{Bf16, DenseRows, Element, Random, RowStore, ScaledRows, Scratch, TrainRows, TrainStore};
use memlayer_cpu::{CachedRows, Cpu, Durability, FileRows, MappedFile, TableMemory, TrainedFile};
use serde::{Deserialize, Serialize};

use crate::error::BenchError;

/// L: H = 4, K = 32.
const BAG: usize = 128;

/// Reads of a cache that are under way at once.
const READERS: usize = 16;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Size of the table.
    #[arg(long, value_name = "GIB", default_value_t = 8.0)]
    gib: f64,
    /// Memory that a process may take.
    #[arg(long, value_name = "GIB", default_value_t = 1.0)]
    limit: f64,
    /// Seconds for each figure.
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    seconds: f64,
    /// The folder for the table of the bench, which is removed afterwards.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    scratch: PathBuf,
    /// The file for the results, as Markdown.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// End with one line of JSON.
    #[arg(long)]
    json: bool,
}

/// How a table is held, and what for.
#[derive(Clone, Debug, Args)]
pub(crate) struct Serve {
    file: PathBuf,
    /// `int8` or `bf16`.
    format: String,
    v: usize,
    rows: usize,
    /// `ram`, `map`, the bytes of a cache, `train ram` or `train file`.
    way: String,
    seconds: f64,
}

/// One figure.
#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    zipf: bool,
    t: usize,
    tokens_per_s: f64,
    /// Of the first sums, bit for bit.
    checksum: u64,
}

#[derive(Serialize)]
struct Row {
    op: &'static str,
    format: String,
    v: usize,
    way: String,
    #[serde(flatten)]
    figure: Figure,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> BenchError + '_ {
    move |source| BenchError::Io { path: path.to_owned(), source }
}

/// Bytes of the scales of `rows` rows, which lie in front of the codes.
fn scales_len(format: &str, rows: usize) -> usize {
    if format == "int8" { (rows * 4).next_multiple_of(4096) } else { 0 }
}

pub(crate) fn run(options: &Options) -> Result<(), BenchError> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes somebody typed")]
    let (bytes, limit) = ((options.gib * f64::from(1 << 30)) as usize, (options.limit * f64::from(1 << 30)) as usize);
    let group = Group::new(limit);
    let mut text = format!("{}\n\n`{}`\n\n", crate::cpu::processor(), std::env::args().collect::<Vec<_>>().join(" "));
    let held = match &group {
        Some(group) => format!("a control group of {:.2} GiB ({})", options.limit, group.version),
        None => "no limit: no control group could be made here".to_owned(),
    };
    let _ = writeln!(
        text,
        "A table of {:.1} GiB; *held* processes are in {held}; H = 4, K = 32; a cache has {READERS} readers. Tokens a second:\n",
        options.gib
    );
    let heading = "| rows | held | way | uniform, T = 1 | uniform, T = 64 | Zipf, T = 1 | Zipf, T = 64 | same bits |";
    let _ = writeln!(text, "{heading}\n|---|---|---|---|---|---|---|---|");
    print!("{text}");
    let mut all = Vec::new();
    for (format, v) in [("int8", 1024), ("bf16", 256)] {
        let row = if format == "bf16" { 2 * v } else { v };
        let rows = bytes / row;
        let file = Temporary::write(&options.scratch, format, rows, row)?;
        let mut expected = None;
        let ways = [
            ("ram", "memory, huge pages".to_owned(), false),
            ("map", "mapped, warm".to_owned(), false),
            ("map", "mapped, cold at first".to_owned(), true),
            (&*(limit / 4).to_string(), format!("cached, {:.2} GiB", options.limit / 4.0), true),
            (&*(limit * 5 / 8).to_string(), format!("cached, {:.2} GiB", options.limit * 0.625), true),
        ];
        for (way, name, held) in ways {
            if held {
                forget();
            } else if way == "map" {
                io::copy(&mut File::open(&file.0).map_err(failed(&file.0))?, &mut io::sink())
                    .map_err(failed(&file.0))?;
            }
            let serve = Serve {
                file: file.0.clone(),
                format: format.to_owned(),
                v,
                rows,
                way: way.to_owned(),
                seconds: options.seconds,
            };
            let figures = serve.in_child(if held { group.as_ref() } else { None })?;
            let sums: Vec<_> = figures.iter().map(|figure| figure.checksum).collect();
            let same = *expected.get_or_insert_with(|| sums.clone()) == sums;
            let mut line = format!("| {format}, V = {v} | {} | {name} |", if held { "yes" } else { "no" });
            for figure in &figures {
                let _ = write!(line, " {:.0} |", figure.tokens_per_s);
            }
            let _ = write!(line, " {} |", if same { "yes" } else { "**no**" });
            println!("{line}");
            text = text + &line + "\n";
            let row = |figure| Row { op: "bag_sum", format: format.to_owned(), v, way: name.clone(), figure };
            all.extend(figures.into_iter().map(row));
            if !same {
                return Err(BenchError::Peer { program: name, problem: "other sums than from memory".to_owned() });
            }
        }
    }
    text += &train_all(options, bytes, group.as_ref(), &mut all)?;
    if let Some(path) = &options.out {
        fs::write(path, text).map_err(failed(path))?;
    }
    if options.json {
        println!("{}", serde_json::to_string(&serde_json::json!({ "rows": all })).unwrap_or_default());
    }
    Ok(())
}

/// A training step over a table in memory, in its file, and in its file with little memory.
fn train_all(options: &Options, bytes: usize, group: Option<&Group>, all: &mut Vec<Row>) -> Result<String, BenchError> {
    let rows = bytes / (2 * TRAIN_V);
    let file = Temporary(options.scratch.join(format!("memlayer-bench-{}.train", std::process::id())));
    let made = TrainedFile::create(&file.0, (rows, TRAIN_V, 1), Durability::Process, |id, row| row.fill(start_of(id)))?;
    drop(made);
    let mut text = format!(
        "\nTraining it, bf16 rows of {TRAIN_V} values, {TRAIN_TOKENS} tokens a step: plan, sums of gradients and row-wise Adagrad, with a journal \
         that survives `kill -9` where it is in its file. Tokens a second:\n\n\
         | held | way | uniform | Zipf | same bits |\n|---|---|---|---|---|\n"
    );
    print!("{text}");
    let mut expected = None;
    let ways = [("train ram", "memory, huge pages"), ("train file", "in its file"), ("train file", "in its file")];
    for ((way, name), held) in ways.into_iter().zip([false, false, true]) {
        forget();
        let (format, way) = ("bf16".to_owned(), way.to_owned());
        let serve = Serve { file: file.0.clone(), format, v: TRAIN_V, rows, way, seconds: options.seconds };
        let figures = serve.in_child(if held { group } else { None })?;
        // Of the first step of all: later ones depend on how many there were, and the third way goes on where the second ended.
        let first = figures.first().map(|figure| figure.checksum);
        let same = if held { None } else { Some(*expected.get_or_insert(first) == first) };
        let mut line = format!("| {} | {name} |", if held { "yes" } else { "no" });
        for figure in &figures {
            let _ = write!(line, " {:.0} |", figure.tokens_per_s);
        }
        line += same.map_or(" |", |same| if same { " yes |" } else { " **no** |" });
        println!("{line}");
        text = text + &line + "\n";
        let row = |figure| Row {
            op: "train",
            format: "bf16".to_owned(),
            v: TRAIN_V,
            way: format!("{name}{}", if held { ", held" } else { "" }),
            figure,
        };
        all.extend(figures.into_iter().map(row));
        if same == Some(false) {
            return Err(BenchError::Peer { program: name.to_owned(), problem: "other rows than in memory".to_owned() });
        }
    }
    Ok(text)
}

/// Width of the rows that are trained.
const TRAIN_V: usize = 256;
/// Tokens of a training step.
const TRAIN_TOKENS: usize = 64;

/// What the values of a row are before the training.
fn start_of(id: u32) -> Bf16 {
    Bf16::from_f32((id % 1000) as f32 * 1e-3)
}

/// Steps over a table held in one of the ways; the checksum is of the rows that the first step changed.
fn train(serve: &Serve) -> Result<Vec<Figure>, BenchError> {
    let (cpu, rule, v) = (Cpu::new()?, RowwiseAdagrad { eps: 1e-8 }, serve.v);
    let io = |source| BenchError::Io { path: serve.file.clone(), source };
    let hash = |sum: u64, row: &[Bf16]| {
        row.iter().fold(sum, |sum, x| (sum ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3))
    };
    if serve.way == "train ram" {
        let mut codes = TableMemory::<Bf16>::zeroed(serve.rows * v).map_err(io)?;
        (0..).zip(codes.chunks_exact_mut(v)).for_each(|(id, row)| row.fill(start_of(id)));
        let mut state = TableMemory::<f32>::zeroed(serve.rows).map_err(io)?;
        return measure_training(serve, &cpu, |plan, gradient, step, scratch| {
            if let Some(table) = TrainRows::new(&mut codes[..], v, &mut state[..], 1) {
                cpu.reduce_and_update(table, &rule, step, plan, gradient, scratch)?;
            }
            let touched = &plan.rows[..plan.unique[0] as usize];
            Ok(touched.iter().fold(0, |sum, &id| hash(sum, &codes[id as usize * v..][..v])))
        });
    }
    let mut file = TrainedFile::<Bf16>::open(&serve.file, Durability::Process)?;
    let readers = Cpu::builder().threads(READERS).build()?;
    measure_training(serve, &cpu, |plan, gradient, step, scratch| {
        let touched = &plan.rows[..plan.unique[0] as usize];
        let table = file.load(&readers, touched)?;
        cpu.reduce_and_update(table, &rule, step, plan, gradient, scratch)?;
        file.commit(&readers)?;
        let mut table = file.load(&readers, if step.count == 1 { touched } else { &[] })?;
        let rows = if step.count == 1 { touched } else { &[] };
        Ok(rows.iter().fold(0, |sum, &id| hash(sum, table.row_and_state(id).0)))
    })
}

/// Tokens a second by each kind of ids; `change` makes a step and hashes the rows it changed.
fn measure_training(
    serve: &Serve,
    cpu: &Cpu,
    mut change: impl FnMut(RowPlan<'_, Cpu>, RowGradient<'_, Cpu>, &Step, Scratch<'_, Cpu>) -> Result<u64, BenchError>,
) -> Result<Vec<Figure>, BenchError> {
    let entries = TRAIN_TOKENS * BAG;
    let (weights, sources) = (super::cpu::reals(entries, 3), super::cpu::reals(TRAIN_TOKENS * serve.v, 4));
    let req = cpu
        .plan_scratch(entries)
        .or(RowUpdate::<TrainRows<'_, Bf16, f32>, RowwiseAdagrad>::reduce_and_update_scratch(cpu, serve.v));
    let (mut reals, mut words) = (vec![0.0; req.reals], vec![0; req.ids]);
    let mut buffer = vec![0; PlanBuffers::<Cpu>::ids_len(entries)];
    let mut figures = Vec::new();
    for zipf in [false, true] {
        let (mut random, mut ids) = (Random::new(11), vec![0; entries]);
        let (mut seconds, mut count, mut checksum, start) = (0.0, 0, 0, Instant::now());
        while start.elapsed().as_secs_f64() < serve.seconds || count < 3 {
            ids.iter_mut().for_each(|id| *id = super::cpu::slot(&mut random, serve.rows, zipf));
            let call = Instant::now();
            count += 1;
            let mut scratch = Scratch { reals: &mut reals[..], ids: &mut words[..] };
            let (mut plan, _) = PlanBuffers::<Cpu>::carve(&mut buffer[..], entries)?;
            cpu.plan(&ids[..], serve.rows, plan.reborrow(), scratch.reborrow())?;
            let gradient = RowGradient { bag: BAG, dim: serve.v, weights: &weights[..], sources: &sources[..] };
            let found = change(plan.plan(), gradient, &Step::new(1e-3, count), scratch)?;
            if count == 1 {
                checksum = found;
            } else {
                // The first was hashed, and finds nothing in the cache.
                seconds += call.elapsed().as_secs_f64();
            }
        }
        let tokens_per_s = (count - 1) as f64 * TRAIN_TOKENS as f64 / seconds;
        figures.push(Figure { zipf, t: TRAIN_TOKENS, tokens_per_s, checksum });
    }
    Ok(figures)
}

/// Asks the system to drop what it keeps of files. Without the right to it "cold" is what the control group makes of it.
fn forget() {
    let _ = Command::new("sync").status();
    let _ = fs::write("/proc/sys/vm/drop_caches", "1");
}

/// The table's file; removed when dropped.
struct Temporary(PathBuf);

impl Temporary {
    fn write(folder: &Path, format: &str, rows: usize, row: usize) -> Result<Self, BenchError> {
        let this = Self(folder.join(format!("memlayer-bench-{}.{format}", std::process::id())));
        let path = &this.0;
        let mut file = File::create(path).map_err(failed(path))?;
        let scales = vec![0.01f32; scales_len(format, rows) / 4];
        file.write_all(bytemuck::cast_slice(&scales)).map_err(failed(path))?;
        let mut random = Random::new(7);
        let mut left = rows * row;
        let mut block = vec![0u64; 1 << 17];
        while left > 0 {
            // Finite bf16 from -2 to 2; int8 takes any bits.
            let mask = if format == "bf16" { 0xbfff_bfff_bfff_bfff } else { u64::MAX };
            block.iter_mut().for_each(|word| *word = random.bits() & mask);
            let bytes = &bytemuck::cast_slice::<u64, u8>(&block)[..left.min(8 << 17)];
            file.write_all(bytes).map_err(failed(path))?;
            left -= bytes.len();
        }
        file.sync_all().map_err(failed(path))?;
        Ok(this)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        // A table in training has one.
        let _ = fs::remove_file(self.0.with_added_extension("journal"));
    }
}

/// A control group with little memory; removed when dropped.
struct Group {
    folder: PathBuf,
    version: &'static str,
}

impl Group {
    fn new(limit: usize) -> Option<Self> {
        let name = format!("memlayer-bench-{}", std::process::id());
        let kinds = [("/sys/fs/cgroup", "memory.max", "v2"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "v1")];
        kinds.into_iter().find_map(|(root, file, version)| {
            let folder = Path::new(root).join(&name);
            fs::create_dir(&folder).ok()?;
            let group = Self { folder, version };
            // The file is there only if the group has the controller: it is not made.
            let mut limits = File::options().write(true).open(group.folder.join(file)).ok()?;
            limits.write_all(limit.to_string().as_bytes()).ok()?;
            Some(group)
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

impl Serve {
    fn in_child(&self, group: Option<&Group>) -> Result<Vec<Figure>, BenchError> {
        let peer = |problem: String| BenchError::Peer { program: format!("serve {}", self.way), problem };
        let program = std::env::current_exe().map_err(failed(&self.file))?;
        let mut command = Command::new("sh");
        let join = r#"if [ -n "$1" ]; then echo $$ > "$1/cgroup.procs" || exit 1; fi; shift; exec "$@""#;
        command.args(["-c", join, "sh"]).arg(group.map_or(Path::new(""), |group| &group.folder)).arg(program);
        command.arg("serve").arg(&self.file).args([
            &self.format,
            &self.v.to_string(),
            &self.rows.to_string(),
            &self.way,
        ]);
        let output = command.arg(self.seconds.to_string()).output().map_err(failed(&self.file))?;
        if !output.status.success() {
            return Err(peer(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| peer(error.to_string()))
    }
}

/// Measures one way to hold the table, and prints the figures.
pub(crate) fn serve(serve: &Serve) -> Result<(), BenchError> {
    let figures = match (serve.way.starts_with("train"), &*serve.format) {
        (true, _) => train(serve)?,
        (_, "int8") => serve_as::<i8>(serve)?,
        _ => serve_as::<Bf16>(serve)?,
    };
    println!("{}", serde_json::to_string(&figures).unwrap_or_default());
    Ok(())
}

fn serve_as<E: Element>(serve: &Serve) -> Result<Vec<Figure>, BenchError> {
    let Serve { file, v, rows, .. } = serve;
    let (v, scales_len) = (*v, scales_len(&serve.format, *rows));
    let cpu = Cpu::new()?;
    let io = |source| BenchError::Io { path: file.clone(), source };
    match serve.way.as_str() {
        "ram" => {
            let mut memory = TableMemory::<u8>::zeroed(scales_len + rows * E::codes(v) * size_of::<E>()).map_err(io)?;
            io::Read::read_exact(&mut File::open(file).map_err(io)?, &mut memory).map_err(io)?;
            serve_bytes::<E>(serve, &cpu, &memory, scales_len)
        }
        "map" => serve_bytes::<E>(serve, &cpu, &MappedFile::open(file).map_err(io)?, scales_len),
        bytes => {
            let wrong =
                || BenchError::Peer { program: "serve".to_owned(), problem: format!("no way to hold: {bytes}") };
            let budget = bytes.parse().map_err(|_| wrong())?;
            let scales = (scales_len > 0).then_some(0);
            let layout = FileRows { codes: scales_len as u64, scales, rows: *rows, dim: v, group: v };
            let mut cache = CachedRows::<E>::new(File::open(file).map_err(io)?, layout, budget)?;
            let mut places = vec![0; 64 * BAG];
            // They wait, so they may be more than there are cores.
            let readers = Cpu::builder().threads(READERS).build()?;
            measure(serve, |ids, weights, out| {
                let places = &mut places[..ids.len()];
                let view = cache.load(&readers, ids, places)?;
                sum(&cpu, &view, places, weights, out)
            })
        }
    }
}

fn serve_bytes<E: Element>(serve: &Serve, cpu: &Cpu, bytes: &[u8], scales: usize) -> Result<Vec<Figure>, BenchError> {
    let (scales, codes) = bytes.split_at(scales);
    let codes: &[E] = bytemuck::cast_slice(codes);
    let scales = &bytemuck::cast_slice(scales)[..if scales.is_empty() { 0 } else { serve.rows }];
    measure(serve, |ids, weights, out| match ScaledRows::new(codes, scales, serve.v, serve.v) {
        Some(table) => sum(cpu, &table, ids, weights, out),
        None => sum(cpu, &DenseRows::new(codes, serve.v), ids, weights, out),
    })
}

fn sum<T: RowStore + Sync>(
    cpu: &Cpu,
    table: &T,
    ids: &[u32],
    weights: &[f32],
    out: &mut [f32],
) -> Result<(), BenchError> {
    Ok(cpu.bag_sum(table, BagSum { bag: BAG, ids, weights, out, accumulate: false })?)
}

/// Tokens a second by each kind of ids and number of tokens; making ids is not counted.
fn measure(
    serve: &Serve,
    mut sum: impl FnMut(&[u32], &[f32], &mut [f32]) -> Result<(), BenchError>,
) -> Result<Vec<Figure>, BenchError> {
    let mut figures = Vec::new();
    for zipf in [false, true] {
        for t in [1, 64] {
            let (mut random, mut ids) = (Random::new(11), vec![0; t * BAG]);
            let (weights, mut out) = (super::cpu::reals(t * BAG, 3), vec![0.0; t * serve.v]);
            let (mut seconds, mut tokens, mut checksum, start) = (0.0, 0, 0u64, Instant::now());
            while start.elapsed().as_secs_f64() < serve.seconds || tokens < 64 {
                ids.iter_mut().for_each(|id| *id = super::cpu::slot(&mut random, serve.rows, zipf));
                let call = Instant::now();
                sum(&ids, &weights, &mut out)?;
                seconds += call.elapsed().as_secs_f64();
                if tokens < 64 {
                    let bits = out.iter().map(|x| u64::from(x.to_bits()));
                    checksum = bits.fold(checksum, |sum, bits| (sum ^ bits).wrapping_mul(0x0100_0000_01b3));
                }
                tokens += t;
            }
            figures.push(Figure { zipf, t, tokens_per_s: tokens as f64 / seconds, checksum });
        }
    }
    Ok(figures)
}
