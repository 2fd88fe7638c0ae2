//! Training steps over a table that stays on the host, with a cache of its rows on the device.

use core::cell::Cell;

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Rounding, RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient, RowPlan};
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::storage::TrainStore;
use memlayer_core::{Bf16, Scratch, Table};
use memlayer_cpu::Cpu;
use memlayer_cuda::{Buffer, CachedTable, Cuda, CudaError, TrainRows, View};

use super::device::{Bench, ids};
use super::{BAG, Case, TOKENS};

/// Sets of ids: every step that is measured has its own, as rows that come again are what a cache is for.
const SETS: usize = 28;
const WIDTH: usize = 1024;
const ENTRIES: usize = TOKENS * BAG;
const RULE: RowwiseAdagrad = RowwiseAdagrad { eps: 1e-8 };

/// Steps that come before those measured over a huge table: rows have to give way by then.
const WARM: usize = 96;
/// Tokens whose sums and rows are made anew on the CPU.
const CHECKED: usize = 8;

impl Bench<'_> {
    /// The step of `step.rs` at V = 1024 over 2^22 slots, of which the device has room for a quarter.
    pub(super) fn cached(&self) -> Result<(), CudaError> {
        if !self.wants("step cached") {
            return Ok(());
        }
        let slots = 1 << 22;
        for zipf in [true, false] {
            let mut steps = Steps::new(self, slots, slots / 4)?;
            let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(ENTRIES, slots, zipf, s as u64)).collect();
            let sets = sets?;
            // The cache as it is in the middle of a training.
            sets.iter().try_for_each(|ids| steps.step(&self.cuda, ids.view()))?;
            let turn = Cell::new(0);
            let ms = self.time(|_| steps.step(&self.cuda, sets[turn.replace((turn.get() + 1) % SETS)].view()))?;
            self.report(case("step cached", slots, zipf), 0.0, ms);
        }
        Ok(())
    }

    /// The same over a table that is larger than the device, and what it left beside what the CPU makes of the same steps.
    pub(super) fn huge(&self) -> Result<(), CudaError> {
        let Some(gib) = self.options.huge.filter(|_| self.wants("step cached huge")) else { return Ok(()) };
        let (cuda, slots) = (&self.cuda, ((gib as usize) << 30) / (WIDTH * size_of::<Bf16>()));
        let mut steps = Steps::new(self, slots, self.options.huge_cache)?;
        for zipf in [false, true] {
            let sets: Vec<_> = (0..WARM + SETS).map(|s| ids(ENTRIES, slots, zipf, s as u64)).collect();
            let on_device: Result<Vec<_>, _> = sets.iter().map(|ids| cuda.upload(ids)).collect();
            let (on_device, last) = (on_device?, WARM + SETS - 1);
            let mut sample = Sample::of(&sets[last][..CHECKED * BAG], slots);
            sample.read(steps.table.host(cuda)?);

            on_device[..WARM].iter().try_for_each(|ids| steps.step(cuda, ids.view()))?;
            let turn = Cell::new(WARM);
            let ms = self.time(|_| steps.step(cuda, on_device[turn.replace(turn.get() + 1)].view()))?;
            self.report(case("step cached huge", slots, zipf), 0.0, ms);

            let sums = steps.sums(cuda, on_device[last].view())?;
            let entries = sample.train(&sets[..turn.get()], &steps.host_gradient(cuda)?);
            let mut found = Sample::of(&sets[last][..CHECKED * BAG], slots);
            found.read(steps.table.host(cuda)?);
            assert!(found.codes == sample.codes && found.state == sample.state, "rows that are not the CPU's");
            assert!(sums == sample.sums(&sets[last], &steps.host_gradient(cuda)?.0), "sums that are not the CPU's");
            self.note(format!(
                "step cached huge, {}: {slots} rows, {} of them on the device. After {} steps {} rows with {entries} entries, \
                 and the sums of {CHECKED} tokens, have the bits of the CPU backend",
                if zipf { "zipf" } else { "uniform" },
                steps.table.capacity(),
                turn.get(),
                sample.rows.len(),
            ));
        }
        Ok(())
    }
}

const fn case(op: &'static str, slots: usize, zipf: bool) -> Case {
    Case { op, format: "bf16", ids: if zipf { "zipf" } else { "uniform" }, tokens: TOKENS, width: WIDTH, slots }
}

fn rounded_step() -> Step {
    let mut step = Step::new(1e-3, 1);
    step.rounding = Rounding::Stochastic { seed: 1 };
    step
}

/// A table, and what a step over it needs.
struct Steps {
    table: CachedTable<Bf16>,
    weights: Buffer<f32>,
    dout: Buffer<f32>,
    out: Buffer<f32>,
    dots: Buffer<f32>,
    places: Buffer<u32>,
    plan: Buffer<u32>,
    plan_scratch: Buffer<u32>,
    update_scratch: Buffer<f32>,
}

impl Steps {
    fn new(bench: &Bench<'_>, slots: usize, capacity: usize) -> Result<Self, CudaError> {
        let cuda = &bench.cuda;
        let req = RowUpdate::<TrainRows<'_, Bf16>, RowwiseAdagrad>::reduce_and_update_scratch(cuda, WIDTH);
        Ok(Self {
            table: cuda.cached_table(slots, WIDTH, 1, capacity)?,
            weights: bench.reals(ENTRIES, 3)?,
            dout: bench.reals(TOKENS * WIDTH, 4)?,
            out: cuda.zeros(TOKENS * WIDTH)?,
            dots: cuda.zeros(ENTRIES)?,
            places: cuda.zeros(ENTRIES)?,
            plan: cuda.zeros(PlanBuffers::<Cuda>::ids_len(ENTRIES))?,
            plan_scratch: cuda.zeros(cuda.plan_scratch(ENTRIES).ids)?,
            update_scratch: cuda.zeros(req.reals)?,
        })
    }

    /// Loads the rows of `ids`, sums them, and changes them where it is wanted.
    fn run(&mut self, cuda: &Cuda, ids: View<'_, u32>, change: bool) -> Result<(), CudaError> {
        let (mut none, mut no_ids) = (cuda.zeros::<f32>(0)?, cuda.zeros::<u32>(0)?);
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(self.plan.view_mut(), ENTRIES)?;
        let scratch = Scratch { reals: none.view_mut(), ids: self.plan_scratch.view_mut() };
        cuda.plan(ids, self.table.len(), plan.reborrow(), scratch)?;
        self.table.load(cuda, &plan.plan())?;
        self.table.translate(cuda, ids, &mut self.places.view_mut())?;
        let (ids, weights) = (self.places.view(), self.weights.view());
        let sum = BagSum { bag: BAG, ids, weights, out: self.out.view_mut(), accumulate: false };
        cuda.bag_sum(&self.table.rows(), sum)?;
        if !change {
            return Ok(());
        }
        self.table.translate_plan(cuda, &mut plan)?;
        let dot = BagDot { bag: BAG, ids, vectors: self.dout.view(), out: self.dots.view_mut() };
        cuda.bag_dot(&self.table.rows(), dot)?;
        let gradient = RowGradient { bag: BAG, dim: WIDTH, weights, sources: self.dout.view() };
        let scratch = Scratch { reals: self.update_scratch.view_mut(), ids: no_ids.view_mut() };
        cuda.reduce_and_update(self.table.train_rows(), &RULE, &rounded_step(), plan.plan(), gradient, scratch)
    }

    fn step(&mut self, cuda: &Cuda, ids: View<'_, u32>) -> Result<(), CudaError> {
        self.run(cuda, ids, true)
    }

    /// Sums of the first tokens, by themselves.
    fn sums(&mut self, cuda: &Cuda, ids: View<'_, u32>) -> Result<Vec<f32>, CudaError> {
        self.run(cuda, ids, false)?;
        let mut sums = vec![0.0; CHECKED * WIDTH];
        cuda.read(self.out.view().slice(0..sums.len()), &mut sums)?;
        Ok(sums)
    }

    /// Weights, and the gradient of the sums.
    fn host_gradient(&self, cuda: &Cuda) -> Result<(Vec<f32>, Vec<f32>), CudaError> {
        let (mut weights, mut dout) = (vec![0.0; ENTRIES], vec![0.0; TOKENS * WIDTH]);
        cuda.read(self.weights.view(), &mut weights)?;
        cuda.read(self.dout.view(), &mut dout)?;
        Ok((weights, dout))
    }
}

/// Some rows of a table of `slots`, with the state of each.
struct Sample {
    slots: usize,
    rows: Vec<u32>,
    codes: Vec<Bf16>,
    state: Vec<f32>,
}

impl Sample {
    /// The rows of `ids`, not read yet.
    fn of(ids: &[u32], slots: usize) -> Self {
        let mut rows = ids.to_vec();
        rows.sort_unstable();
        rows.dedup();
        let (codes, state) = (vec![Bf16::default(); rows.len() * WIDTH], vec![0.0; rows.len()]);
        Self { slots, rows, codes, state }
    }

    fn read(&mut self, (codes, state): (&mut [Bf16], &mut [f32])) {
        for ((&id, row), own) in self.rows.iter().zip(self.codes.chunks_exact_mut(WIDTH)).zip(&mut self.state) {
            row.copy_from_slice(&codes[id as usize * WIDTH..][..WIDTH]);
            *own = state[id as usize];
        }
    }

    /// What steps over these sets of ids make of the rows, on the CPU; gives how many entries were theirs.
    fn train(&mut self, sets: &[Vec<u32>], (weights, dout): &(Vec<f32>, Vec<f32>)) -> usize {
        let cpu = Cpu::builder().build().expect("a CPU");
        let req = RowUpdate::<Part<'_>, RowwiseAdagrad>::reduce_and_update_scratch(&cpu, WIDTH);
        let (mut reals, mut scratch_ids) = (vec![0.0; req.reals], vec![0; req.ids]);
        let mut all = 0;
        for ids in sets {
            let mut found: Vec<(u32, u32)> =
                (0..).zip(ids).filter_map(|(e, id)| self.rows.binary_search(id).is_ok().then_some((*id, e))).collect();
            found.sort_unstable();
            all += found.len();
            // A plan of those rows alone; the rest of its buffers is not looked at.
            let (mut rows, mut starts, mut entries) = (vec![0; ENTRIES], vec![0; ENTRIES + 1], vec![0; ENTRIES]);
            let (mut unique, mut at) = (0, 0);
            for row in found.chunk_by(|a, b| a.0 == b.0) {
                rows[unique] = row[0].0;
                for &(_, e) in row {
                    entries[at as usize] = e;
                    at += 1;
                }
                unique += 1;
                starts[unique] = at;
            }
            let unique = [u32::try_from(unique).expect("no more than entries")];
            let plan = RowPlan { unique: &unique[..], rows: &rows[..], starts: &starts[..], entries: &entries[..] };
            let gradient = RowGradient { bag: BAG, dim: WIDTH, weights: &weights[..], sources: &dout[..] };
            let part = Part { slots: self.slots, rows: &self.rows, codes: &mut self.codes, state: &mut self.state };
            let scratch = Scratch { reals: &mut reals[..], ids: &mut scratch_ids[..] };
            cpu.reduce_and_update(part, &RULE, &rounded_step(), plan, gradient, scratch).expect("a step");
        }
        all
    }

    /// The sums of the first tokens.
    fn sums(&self, ids: &[u32], weights: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; CHECKED * WIDTH];
        for ((sum, ids), weights) in sums.chunks_exact_mut(WIDTH).zip(ids.chunks(BAG)).zip(weights.chunks(BAG)) {
            for (id, weight) in ids.iter().zip(weights) {
                let row = self.rows.binary_search(id).expect("a row of the sample");
                for (x, code) in sum.iter_mut().zip(&self.codes[row * WIDTH..][..WIDTH]) {
                    *x += weight * f32::from(*code);
                }
            }
        }
        sums
    }
}

/// A sample to be changed, by the ids of the whole table.
struct Part<'a> {
    slots: usize,
    rows: &'a [u32],
    codes: &'a mut [Bf16],
    state: &'a mut [f32],
}

impl Table for Part<'_> {
    type Elem = Bf16;
    fn rows(&self) -> usize {
        self.slots
    }
    fn dim(&self) -> usize {
        WIDTH
    }
}

impl TrainStore for Part<'_> {
    type State = f32;
    fn state_len(&self) -> usize {
        1
    }
    fn row_and_state(&mut self, id: u32) -> (&mut [Bf16], &mut [f32]) {
        let row = self.rows.binary_search(&id).expect("a row of the sample");
        (&mut self.codes[row * WIDTH..][..WIDTH], &mut self.state[row..=row])
    }
    fn split_at(self, id: u32) -> (Self, Self) {
        let row = self.rows.partition_point(|other| *other < id);
        let (rows, state, codes) =
            (self.rows.split_at(row), self.state.split_at_mut(row), self.codes.split_at_mut(row * WIDTH));
        let slots = self.slots;
        (
            Self { slots, rows: rows.0, codes: codes.0, state: state.0 },
            Self { slots, rows: rows.1, codes: codes.1, state: state.1 },
        )
    }
}
