//! Training in a file: the bits of training in memory, and whole steps whatever happens.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use memlayer_core::ops::optim::{Adagrad, Adam, Rounding, RowRule, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowPlan, RowReduce};
use memlayer_core::{Bf16, Scratch, TrainRows, TrainStore, Trainable};
use memlayer_cpu::{Cpu, Durability, FileError, LoadedRows, MappedFile, TrainedFile};

const ROWS: usize = 200;
const DIM: usize = 12;
const BAG: usize = 4;
const ENTRIES: usize = 240;

/// A folder that goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("memlayer-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
    fn table(&self) -> PathBuf {
        self.0.join("table")
    }
    fn journal(&self) -> PathBuf {
        self.0.join("table.journal")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What a step is told: made from its number alone.
struct Entries {
    ids: Vec<u32>,
    weights: Vec<f32>,
    sources: Vec<f32>,
}

fn entries(step: u64) -> Entries {
    let mut random = memlayer_core::Random::new(step);
    let ids = (0..ENTRIES).map(|_| (random.below(ROWS) * random.below(ROWS) / ROWS) as u32).collect();
    let mut reals = |len: usize| (0..len).map(|_| random.uniform() as f32 - 0.5).collect();
    Entries { ids, weights: reals(ENTRIES), sources: reals(ENTRIES / BAG * DIM) }
}

fn start<E: Trainable>(id: u32, row: &mut [E]) {
    let mut random = memlayer_core::Random::new(1000 + u64::from(id));
    row.iter_mut().for_each(|v| *v = E::store(random.uniform() as f32, None));
}

/// Plans step `number` and hands the update to `update`.
fn step<E: Trainable, O: RowRule>(
    cpu: &Cpu,
    rule: &O,
    number: u64,
    update: impl FnOnce(&dyn Fn(&mut dyn FnMut(&RowPlan<'_, Cpu>, RowGradient<'_, Cpu>, &Step, Scratch<'_, Cpu>))),
) {
    let _ = rule;
    let Entries { ids, weights, sources } = entries(number);
    let mut buffer = vec![0; PlanBuffers::<Cpu>::ids_len(ENTRIES)];
    let (mut plan, _) = PlanBuffers::<Cpu>::carve(&mut buffer, ENTRIES).unwrap();
    let req = cpu.plan_scratch(ENTRIES);
    let (mut reals, mut words) = (vec![0.0; req.reals], vec![0; req.ids]);
    cpu.plan(&ids, ROWS, plan.reborrow(), Scratch { reals: &mut reals, ids: &mut words }).unwrap();
    let mut the_step = Step::new(0.1, number);
    the_step.rounding = Rounding::Stochastic { seed: 5 };
    let gradient = RowGradient { bag: BAG, dim: DIM, weights: &weights[..], sources: &sources[..] };
    update(&|apply| {
        let req = RowUpdate::<TrainRows<'_, E, f32>, Sgd>::reduce_and_update_scratch(cpu, DIM);
        let (mut reals, mut words) = (vec![0.0; req.reals], vec![0; req.ids]);
        apply(&plan.plan(), gradient, &the_step, Scratch { reals: &mut reals, ids: &mut words });
    });
}

fn change<T: TrainStore<State = f32> + Send, O: RowRule>(
    cpu: &Cpu,
    table: T,
    rule: &O,
    plan: &RowPlan<'_, Cpu>,
    gradient: RowGradient<'_, Cpu>,
    the_step: &Step,
    scratch: Scratch<'_, Cpu>,
) {
    cpu.reduce_and_update(table, rule, the_step, *plan, gradient, scratch).unwrap();
}

/// The table after so many steps, in memory.
fn in_memory<E: Trainable, O: RowRule>(rule: &O, steps: u64) -> (Vec<E>, Vec<f32>) {
    let cpu = Cpu::builder().threads(1).build().unwrap();
    let mut codes = vec![E::default(); ROWS * DIM];
    (0u32..).zip(codes.chunks_exact_mut(DIM)).for_each(|(id, row)| start(id, row));
    let mut state = vec![0.0; ROWS * rule.state_len(DIM)];
    for number in 1..=steps {
        step::<E, O>(&cpu, rule, number, |with| {
            with(&mut |plan, gradient, the_step, scratch| {
                let rows = TrainRows::new(&mut codes, DIM, &mut state, rule.state_len(DIM)).unwrap();
                change(&cpu, rows, rule, plan, gradient, the_step, scratch);
            });
        });
    }
    (codes, state)
}

/// One step in a file.
fn in_file<E: Trainable, O: RowRule>(cpu: &Cpu, file: &mut TrainedFile<E>, rule: &O) -> Result<u64, FileError> {
    let mut committed = Ok(0);
    step::<E, O>(cpu, rule, file.step() + 1, |with| {
        with(&mut |plan, gradient, the_step, scratch| {
            let unique = plan.unique[0] as usize;
            let rows: LoadedRows<'_, E> = file.load(cpu, &plan.rows[..unique]).unwrap();
            change(cpu, rows, rule, plan, gradient, the_step, scratch);
            committed = file.commit(cpu);
        });
    });
    committed
}

fn create<E: Trainable>(path: &Path, state_len: usize) -> TrainedFile<E> {
    TrainedFile::create(path, (ROWS, DIM, state_len), Durability::Process, start).unwrap()
}

/// All rows and states of a file.
fn contents<E: Trainable>(file: &mut TrainedFile<E>, state_len: usize) -> (Vec<E>, Vec<f32>) {
    let cpu = Cpu::builder().threads(1).build().unwrap();
    let ids: Vec<u32> = (0..ROWS as u32).collect();
    let mut rows = file.load(&cpu, &ids).unwrap();
    assert_eq!(rows.state_len(), state_len);
    let (mut codes, mut state) = (Vec::new(), Vec::new());
    for id in ids {
        let (row, its) = rows.row_and_state(id);
        codes.extend_from_slice(row);
        state.extend_from_slice(its);
    }
    (codes, state)
}

#[track_caller]
fn same<E: Trainable>(expected: &(Vec<E>, Vec<f32>), found: &(Vec<E>, Vec<f32>)) {
    assert!(bytemuck::cast_slice::<E, u8>(&expected.0) == bytemuck::cast_slice::<E, u8>(&found.0), "rows differ");
    let bits = |state: &[f32]| state.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(&expected.1) == bits(&found.1), "state differs");
}

fn agree<E: Trainable, O: RowRule>(name: &str, rule: &O) {
    let expected = in_memory::<E, O>(rule, 7);
    for threads in [1, 2, 7] {
        let folder = Folder::new(&format!("train-{name}-{threads}"));
        let cpu = Cpu::builder().threads(threads).build().unwrap();
        let mut file = create::<E>(&folder.table(), rule.state_len(DIM));
        for number in 1..=7 {
            // The journal begins anew in between, and the file is opened again.
            file.set_journal_limit(if number == 3 { 0 } else { 1 << 20 });
            assert_eq!(in_file(&cpu, &mut file, rule).unwrap(), number);
            if number == 5 {
                drop(file);
                file = TrainedFile::open(&folder.table(), Durability::Power).unwrap();
                assert_eq!(file.step(), 5);
            }
        }
        same(&expected, &contents(&mut file, rule.state_len(DIM)));
        drop(file);
        // Trained, it is a table like any other.
        let map = MappedFile::open(&folder.table()).unwrap();
        let rows = &map[4096..4096 + size_of_val(&expected.0[..])];
        assert!(rows == bytemuck::cast_slice::<E, u8>(&expected.0));
    }
}

#[test]
fn every_rule_gives_the_bits_of_memory() {
    agree::<f32, _>("sgd", &Sgd);
    agree::<f32, _>("adagrad", &Adagrad { eps: 1e-8 });
    agree::<f32, _>("rowwise", &RowwiseAdagrad { eps: 1e-8 });
    agree::<f32, _>("adam", &Adam { betas: (0.9, 0.99), eps: 1e-8 });
    agree::<f32, _>("rowwise-adam", &RowwiseAdam { betas: (0.9, 0.99), eps: 1e-8 });
    agree::<Bf16, _>("bf16", &RowwiseAdagrad { eps: 1e-8 });
    agree::<Bf16, _>("bf16-sgd", &Sgd);
}

#[test]
fn a_journal_cut_anywhere_gives_whole_steps() {
    let (folder, rule) = (Folder::new("train-cut"), RowwiseAdagrad { eps: 1e-8 });
    let cpu = Cpu::builder().threads(1).build().unwrap();
    let mut file = create::<f32>(&folder.table(), 1);
    let before = std::fs::read(folder.table()).unwrap();
    let mut ends = vec![std::fs::metadata(folder.journal()).unwrap().len()];
    for _ in 0..3 {
        in_file(&cpu, &mut file, &rule).unwrap();
        ends.push(std::fs::metadata(folder.journal()).unwrap().len());
    }
    drop(file);
    let (after, journal) = (std::fs::read(folder.table()).unwrap(), std::fs::read(folder.journal()).unwrap());
    let expected: Vec<_> = (0..=3).map(|steps| in_memory::<f32, _>(&rule, steps)).collect();
    let attempt = |table: &[u8], journal: &[u8]| {
        std::fs::write(folder.table(), table).unwrap();
        std::fs::write(folder.journal(), journal).unwrap();
        TrainedFile::<f32>::open(&folder.table(), Durability::Process)
    };
    for cut in (0..journal.len()).step_by(97).chain(ends.iter().map(|&end| end as usize)) {
        let steps = ends.iter().filter(|&&end| end as usize <= cut).count();
        match attempt(&before, &journal[..cut]) {
            Ok(mut file) => {
                assert_eq!(file.step() + 1, steps as u64, "cut at {cut}");
                same(&expected[steps - 1], &contents(&mut file, 1));
            }
            Err(error) => {
                assert!(steps == 0, "cut at {cut}: {error}");
                assert!(matches!(error, FileError::Header { field: "journal", .. }), "{error}");
            }
        }
    }
    // Rows half-written, and rows of a later step: the records are whole, and mend both.
    let torn = [&before[..5000], &after[5000..9000], &before[9000..]].concat();
    for table in [&after, &torn] {
        same(&expected[3], &contents(&mut attempt(table, &journal).unwrap(), 1));
    }
    for at in (0..journal.len()).step_by(61) {
        let mut flipped = journal.clone();
        flipped[at] ^= 0x10;
        if let Ok(mut file) = attempt(&before, &flipped) {
            let step = file.step() as usize;
            assert!(at < 24 || at as u64 >= ends[step], "byte {at} of record {step}");
            // Padding is in no checksum.
            same(&expected[step], &contents(&mut file, 1));
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = Folder::new("train-refused");
    let cpu = Cpu::builder().threads(1).build().unwrap();
    let path = folder.table();
    let refused = |found: Result<TrainedFile<f32>, FileError>, named: &str| {
        let error = found.unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    let sizes = |sizes| TrainedFile::<f32>::create(&path, sizes, Durability::Process, |_, _| {});
    refused(sizes((0, DIM, 1)), "rows cannot be 0");
    refused(sizes((ROWS, 0, 1)), "dim cannot be 0");
    refused(sizes((1 << 33, DIM, 1)), "rows cannot be");
    refused(sizes((1 << 32, usize::MAX / 8, 1)), "cannot be");
    refused(TrainedFile::open(&path, Durability::Process), "table");
    let mut file = create::<f32>(&path, 1);
    refused(sizes((ROWS, DIM, 1)), "exists");
    refused(TrainedFile::open(&path, Durability::Process), "another process");
    assert!(MappedFile::open(&path).is_err(), "a table in training is not mapped");
    assert!(matches!(file.load(&cpu, &[3, 3]).unwrap_err(), FileError::Size { .. }));
    assert!(matches!(file.load(&cpu, &[3, ROWS as u32]).unwrap_err(), FileError::Row { .. }));
    // Nothing was loaded: a step without rows.
    assert_eq!(file.commit(&cpu).unwrap(), 1);
    drop(file);
    let good = std::fs::read(&path).unwrap();
    refused(TrainedFile::open(&path, Durability::Process).map(|_: TrainedFile<Bf16>| unreachable!()), "format");
    for (len, named) in [(100, "length"), (good.len() - 1, "length")] {
        std::fs::write(&path, &good[..len]).unwrap();
        refused(TrainedFile::open(&path, Durability::Process), named);
    }
    for (at, named) in [(0, "magic"), (9, "checksum"), (41, "checksum")] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        refused(TrainedFile::open(&path, Durability::Process), named);
    }
}

const CHILD: &str = "MEMLAYER_TRAINED_FILE";

/// Trains until it is killed, where [`kills_lose_no_step`] says.
#[test]
fn child_that_is_killed() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let cpu = Cpu::builder().threads(2).build().unwrap();
    let mut file = TrainedFile::<Bf16>::open(Path::new(&path), Durability::Process).unwrap();
    file.set_journal_limit(100_000);
    for _ in 0..1_000_000 {
        let step = in_file(&cpu, &mut file, &RowwiseAdagrad { eps: 1e-8 }).unwrap();
        println!("committed {step}");
    }
}

#[test]
fn kills_lose_no_step() {
    use std::io::{BufRead, BufReader};
    let kills = std::env::var("MEMLAYER_KILLS").map_or(6, |n| n.parse().unwrap());
    let (folder, rule) = (Folder::new("train-killed"), RowwiseAdagrad { eps: 1e-8 });
    drop(create::<Bf16>(&folder.table(), 1));
    let mut random = memlayer_core::Random::new(std::process::id().into());
    let mut last = 0;
    for _ in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed", "--nocapture"])
            .env(CHILD, folder.table())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (mut committed, least) = (0, 1 + random.below(40));
        let mut lines = output
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| line.rsplit_once("committed ").and_then(|(_, step)| step.parse::<u64>().ok()));
        for step in lines.by_ref().take(least) {
            committed = step;
        }
        std::thread::sleep(core::time::Duration::from_micros(random.below(3000) as u64));
        child.kill().unwrap();
        committed = lines.last().unwrap_or(committed);
        child.wait().unwrap();
        let mut file = TrainedFile::<Bf16>::open(&folder.table(), Durability::Process).unwrap();
        let step = file.step();
        assert!(committed > last, "nothing was trained");
        assert!(step == committed || step == committed + 1, "{step} steps, {committed} of them said to be in it");
        same(&in_memory::<Bf16, _>(&rule, step), &contents(&mut file, 1));
        last = step;
    }
}
