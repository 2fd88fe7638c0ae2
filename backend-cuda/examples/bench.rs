//! Times of the kernels on device 0: `cargo run --release --example bench -- [--json] [--quick] [NAME...]`.
//!
//! `--quick` leaves widths out and repeats less. Every time is the median of repeated calls between device events, their inputs rotated among several sets. What a call
//! must move (`bytes`) over that time is put beside what a device copy moves in the same run. Names pick what is measured:
//! `bag_sum`, `bag_dot`, `sparse`, `step`, `select`, `decode`.

use std::env;

use memlayer_core::element::Format;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Rounding, RowUpdate, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{Bf16, Device, E4m3, Element, Random, Scratch};
use memlayer_cuda::{Buffer, Cuda, CudaError, Rows, Scores, TrainRows};

const TOKENS: usize = 4096;
const BAG: usize = 128;
/// Sets of inputs that calls take turns with.
const SETS: usize = 4;

struct Bench {
    cuda: Cuda,
    json: bool,
    quick: bool,
    names: Vec<String>,
    /// GB/s of a device copy, read plus written.
    copy: f64,
}

/// A measurement's name and sizes.
#[derive(Clone, Copy)]
struct Row<'a> {
    op: &'a str,
    format: &'a str,
    ids: &'a str,
    tokens: usize,
    width: usize,
    slots: usize,
    /// What must be moved, or zero where that does not decide.
    bytes: f64,
}

impl Bench {
    fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|n| n == name)
    }

    /// The median time of a call in milliseconds; `call` gets the number of the set of inputs.
    fn time(&self, mut call: impl FnMut(usize) -> Result<(), CudaError>) -> Result<f64, CudaError> {
        for set in 0..SETS {
            call(set)?;
        }
        self.cuda.synchronize()?;
        let repeats = if self.quick { 8 } else { 24 };
        let mut marks = vec![];
        for i in 0..repeats {
            let start = self.cuda.mark()?;
            call(i % SETS)?;
            marks.push((start, self.cuda.mark()?));
        }
        self.cuda.synchronize()?;
        let times: Result<Vec<f64>, _> = marks.iter().map(|(a, b)| a.milliseconds_until(b).map(f64::from)).collect();
        let mut times = times?;
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    }

    fn report(&self, row: Row<'_>, ms: f64) {
        let rate = row.bytes / ms / 1e6;
        let Row { op, format, ids, tokens, width, slots, .. } = row;
        if self.json {
            println!(
                r#"{{"by":"memlayer","op":"{op}","format":"{format}","ids":"{ids}","tokens":{tokens},"width":{width},"slots":{slots},"ms":{ms:.5},"gb_s":{rate:.1},"of_copy":{:.4}}}"#,
                rate / self.copy
            );
        } else {
            println!(
                "{op:<22} {format:<5} {ids:<8} T {tokens:<6} V {width:<5} slots 2^{:<3} {ms:>9.4} ms {rate:>8.0} GB/s {:>6.1} %",
                slots.max(1).ilog2(),
                rate / self.copy * 100.0
            );
        }
    }

    /// Ids of `count` entries: uniform, or with the frequencies of Zipf's law, spread over the table.
    fn ids(&self, count: usize, slots: usize, zipf: bool, seed: u64) -> Result<Buffer<u32>, CudaError> {
        let mut random = Random::new(seed);
        let ids: Vec<u32> = (0..count)
            .map(|_| {
                #[allow(clippy::cast_possible_truncation, reason = "a rank below the number of slots")]
                let id = if zipf {
                    let rank = (random.uniform() * (slots as f64).ln()).exp() as usize - 1;
                    rank.wrapping_mul(0x9e37_79b1) % slots
                } else {
                    random.below(slots)
                };
                u32::try_from(id).expect("fewer than 2^32 slots")
            })
            .collect();
        self.cuda.upload(&ids)
    }

    fn reals(&self, count: usize, seed: u64) -> Result<Buffer<f32>, CudaError> {
        let mut random = Random::new(seed);
        let mut values = vec![0f32; count];
        random.fill_normal(&mut values, 1.0);
        self.cuda.upload(&values)
    }

    /// Random codes: some that are made here, again and again.
    fn codes<E: Element>(&self, count: usize, of: impl Fn(f32) -> E) -> Result<Buffer<E>, CudaError> {
        let mut random = Random::new(7);
        let mut values = vec![0f32; count.min((4 << 20) + 1031)];
        random.fill_normal(&mut values, 1.0);
        let codes: Vec<E> = values.iter().map(|&v| of(v)).collect();
        let part = self.cuda.upload(&codes)?;
        let mut all = self.cuda.zeros::<E>(count)?;
        let mut rest = all.view_mut();
        while !rest.is_empty() {
            let len = rest.len().min(part.len());
            let (head, tail) = rest.split_at(len);
            self.cuda.copy(part.view().slice(0..len), head)?;
            rest = tail;
        }
        Ok(all)
    }

    fn measure_copy(&mut self) -> Result<(), CudaError> {
        let from = self.cuda.zeros::<u64>(128 << 20)?;
        let mut to = self.cuda.zeros::<u64>(128 << 20)?;
        let ms = self.time(|_| self.cuda.copy(from.view(), to.view_mut()))?;
        let bytes = 2.0 * from.len() as f64 * 8.0;
        self.copy = bytes / ms / 1e6;
        self.report(Row { op: "copy", format: "-", ids: "-", tokens: 0, width: 0, slots: 0, bytes }, ms);
        Ok(())
    }

    /// Sums and dots of bags in one format.
    fn bags<E: Element>(
        &self,
        tokens: usize,
        width: usize,
        slots: usize,
        of: impl Fn(f32) -> E,
    ) -> Result<(), CudaError> {
        let codes = self.codes(slots * width, of)?;
        let scaled = matches!(E::FORMAT, Format::Int8 | Format::E4m3 | Format::E5m2);
        let scales = self.cuda.upload(&vec![0.01f32; if scaled { slots } else { 0 }])?;
        let table = match scaled {
            true => Rows::scaled(codes.view(), scales.view(), width, width).expect("a scale for each row"),
            false => Rows::new(codes.view(), width),
        };
        let entries = tokens * BAG;
        let weights = self.reals(entries, 3)?;
        let vectors = self.reals(tokens * width, 4)?;
        let mut out = self.cuda.zeros::<f32>(tokens * width)?;
        let mut dots = self.cuda.zeros::<f32>(entries)?;
        let row_bytes = width * size_of::<E>() + if scaled { 4 } else { 0 };
        let bytes = (entries * (row_bytes + 8) + tokens * width * 4) as f64;
        for zipf in [false, true] {
            let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(entries, slots, zipf, s as u64)).collect();
            let sets = sets?;
            let row = Row {
                op: "bag_sum",
                format: E::FORMAT.name(),
                ids: if zipf { "zipf" } else { "uniform" },
                tokens,
                width,
                slots,
                bytes,
            };
            if self.wants("bag_sum") {
                let ms = self.time(|set| {
                    let (ids, weights, out) = (sets[set].view(), weights.view(), out.view_mut());
                    self.cuda.bag_sum(&table, BagSum { bag: BAG, ids, weights, out, accumulate: false })
                })?;
                self.report(row, ms);
            }
            if self.wants("bag_dot") {
                let ms = self.time(|set| {
                    let (ids, vectors, out) = (sets[set].view(), vectors.view(), dots.view_mut());
                    self.cuda.bag_dot(&table, BagDot { bag: BAG, ids, vectors, out })
                })?;
                self.report(Row { op: "bag_dot", ..row }, ms);
            }
        }
        Ok(())
    }

    /// The parts of a training step over a bf16 table, and the whole of it.
    fn step(&self, width: usize, slots: usize, zipf: bool) -> Result<(), CudaError> {
        let cuda = &self.cuda;
        let mut codes = self.codes(slots * width, Bf16::from_f32)?;
        let mut state = cuda.zeros::<f32>(slots)?;
        let entries = TOKENS * BAG;
        let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.ids(entries, slots, zipf, s as u64)).collect();
        let (sets, weights, dout) = (sets?, self.reals(entries, 3)?, self.reals(TOKENS * width, 4)?);
        let mut out = cuda.zeros::<f32>(TOKENS * width)?;
        let mut dots = cuda.zeros::<f32>(entries)?;
        let mut plan_ids = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries))?;
        let mut plan_scratch = cuda.zeros::<u32>(cuda.plan_scratch(entries).ids)?;
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(plan_ids.view_mut(), entries)?;
        let req = RowUpdate::<TrainRows<'_, Bf16>, RowwiseAdagrad>::reduce_and_update_scratch(cuda, width);
        let mut slots_scratch = cuda.zeros::<f32>(req.reals)?;
        let mut none = cuda.zeros::<f32>(0)?;
        let mut no_ids = cuda.zeros::<u32>(0)?;
        let mut step = Step::new(1e-3, 1);
        step.rounding = Rounding::Stochastic { seed: 1 };
        let rule = RowwiseAdagrad { eps: 1e-8 };

        macro_rules! sum {
            ($set:expr) => {{
                let table = Rows::new(codes.view(), width);
                let (ids, weights, out) = (sets[$set].view(), weights.view(), out.view_mut());
                cuda.bag_sum(&table, BagSum { bag: BAG, ids, weights, out, accumulate: false })?;
            }};
        }
        macro_rules! dot {
            ($set:expr) => {{
                let table = Rows::new(codes.view(), width);
                let (ids, vectors, out) = (sets[$set].view(), dout.view(), dots.view_mut());
                cuda.bag_dot(&table, BagDot { bag: BAG, ids, vectors, out })?;
            }};
        }
        macro_rules! plan {
            ($set:expr) => {{
                let scratch = Scratch { reals: none.view_mut(), ids: plan_scratch.view_mut() };
                cuda.plan(sets[$set].view(), slots, plan.reborrow(), scratch)?;
            }};
        }
        macro_rules! change {
            () => {{
                let rows = TrainRows::new(codes.view_mut(), width, state.view_mut(), 1).expect("a state for each row");
                let gradient = RowGradient { bag: BAG, dim: width, weights: weights.view(), sources: dout.view() };
                let scratch = Scratch { reals: slots_scratch.view_mut(), ids: no_ids.view_mut() };
                cuda.reduce_and_update(rows, &rule, &step, plan.plan(), gradient, scratch)?;
            }};
        }
        // The rows a step touches: how many there are decides what must be moved.
        plan!(0);
        let mut unique = [0u32];
        cuda.read(plan.plan().unique, &mut unique)?;
        let unique = f64::from(unique[0]);
        let (v, e) = (width as f64, entries as f64);
        let (sum, dot) = (e * (v * 2.0 + 8.0) + TOKENS as f64 * v * 4.0, e * (v * 2.0 + 8.0) + TOKENS as f64 * v * 4.0);
        // Sources are read from the second-level cache; from memory once.
        let change = unique * (v * 4.0 + 16.0) + e * 8.0 + TOKENS as f64 * v * 4.0;
        let ids = if zipf { "zipf" } else { "uniform" };
        let row = Row { op: "plan", format: "bf16", ids, tokens: TOKENS, width, slots, bytes: e * 4.0 * 14.0 };
        if self.wants("step") || self.wants("sparse") {
            let ms = self.time(|set| {
                plan!(set);
                Ok(())
            })?;
            self.report(row, ms);
            let ms = self.time(|_| {
                change!();
                Ok(())
            })?;
            self.report(Row { op: "reduce_and_update", bytes: change, ..row }, ms);
        }
        if self.wants("sparse") {
            let mut grads = cuda.zeros::<f32>(entries * width)?;
            let bytes = unique * v * 4.0 + e * 8.0 + TOKENS as f64 * v * 4.0;
            let ms = self.time(|_| {
                let gradient = RowGradient { bag: BAG, dim: width, weights: weights.view(), sources: dout.view() };
                cuda.reduce(plan.plan(), gradient, grads.view_mut())
            })?;
            self.report(Row { op: "reduce", bytes, ..row }, ms);
            let ms = self.time(|set| {
                sum!(set);
                dot!(set);
                plan!(set);
                let gradient = RowGradient { bag: BAG, dim: width, weights: weights.view(), sources: dout.view() };
                cuda.reduce(plan.plan(), gradient, grads.view_mut())
            })?;
            self.report(Row { op: "forward+backward", bytes: sum + dot + bytes, ..row }, ms);
        }
        if self.wants("step") {
            let ms = self.time(|set| {
                sum!(set);
                dot!(set);
                plan!(set);
                change!();
                Ok(())
            })?;
            self.report(Row { op: "step", bytes: sum + dot + change, ..row }, ms);
        }
        Ok(())
    }

    fn select(&self, cuda: &Cuda, label: &str, tokens: usize) -> Result<(), CudaError> {
        let dims = SelectDims { tokens, heads: 4, parts: 2, sub_keys: 1024, half_dim: 256, top_k: 32 };
        let keys = self.reals(dims.key_rows() * dims.half_dim, 1)?;
        let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.reals(dims.queries_len(), 10 + s as u64)).collect();
        let sets = sets?;
        let req = SelectRows::<Rows<'_, f32>>::select_scratch(cuda, dims);
        let (mut reals, mut scratch_ids) = (cuda.zeros::<f32>(req.reals)?, cuda.zeros::<u32>(req.ids)?);
        let mut ids = cuda.zeros::<u32>(dims.bags_len())?;
        let (mut scores, mut weights) = (cuda.zeros::<f32>(dims.bags_len())?, cuda.zeros::<f32>(dims.bags_len())?);
        let bench = Self { cuda: Cuda::builder(0).stream(cuda.stream().clone()).build()?, names: vec![], ..*self };
        let table = Rows::new(keys.view(), dims.half_dim);
        let ms = bench.time(|set| {
            let args = Select {
                dims,
                queries: sets[set].view(),
                keys: &table,
                ids: ids.view_mut(),
                scores: scores.view_mut(),
                weights: weights.view_mut(),
            };
            cuda.select(args, Scratch { reals: reals.view_mut(), ids: scratch_ids.view_mut() })
        })?;
        self.report(Row { op: "select", format: label, ids: "-", tokens, width: 256, slots: 1 << 20, bytes: 0.0 }, ms);
        Ok(())
    }
}

const DECODE: SelectDims = SelectDims { tokens: 1, heads: 4, parts: 2, sub_keys: 1024, half_dim: 256, top_k: 32 };
const DECODE_WIDTH: usize = 1024;

struct Decode {
    queries: Buffer<f32>,
    keys: Buffer<f32>,
    values: Buffer<Bf16>,
    ids: Buffer<u32>,
    scores: Buffer<f32>,
    weights: Buffer<f32>,
    out: Buffer<f32>,
    reals: Buffer<f32>,
    scratch_ids: Buffer<u32>,
}

/// A token's selection and sum.
fn decode(cuda: &Cuda, s: &mut Decode) -> Result<(), CudaError> {
    let keys = Rows::new(s.keys.view(), DECODE.half_dim);
    let select = Select {
        dims: DECODE,
        queries: s.queries.view(),
        keys: &keys,
        ids: s.ids.view_mut(),
        scores: s.scores.view_mut(),
        weights: s.weights.view_mut(),
    };
    cuda.select(select, Scratch { reals: s.reals.view_mut(), ids: s.scratch_ids.view_mut() })?;
    let (ids, weights, out) = (s.ids.view(), s.weights.view(), s.out.view_mut());
    let sum = BagSum { bag: DECODE.heads * DECODE.top_k, ids, weights, out, accumulate: false };
    cuda.bag_sum(&Rows::new(s.values.view(), DECODE_WIDTH), sum)
}

fn decode_state(bench: &Bench) -> Result<Decode, CudaError> {
    let cuda = &bench.cuda;
    let req = SelectRows::<Rows<'_, f32>>::select_scratch(cuda, DECODE);
    Ok(Decode {
        queries: bench.reals(DECODE.queries_len(), 1)?,
        keys: bench.reals(DECODE.key_rows() * DECODE.half_dim, 2)?,
        values: bench.codes(DECODE_WIDTH << 20, Bf16::from_f32)?,
        ids: cuda.zeros(DECODE.bags_len())?,
        scores: cuda.zeros(DECODE.bags_len())?,
        weights: cuda.zeros(DECODE.bags_len())?,
        out: cuda.zeros(DECODE_WIDTH)?,
        reals: cuda.zeros(req.reals)?,
        scratch_ids: cuda.zeros(req.ids)?,
    })
}

fn main() -> Result<(), CudaError> {
    let args: Vec<String> = env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let names = args.iter().filter(|a| !a.starts_with("--")).cloned().collect();
    let mut bench = Bench { cuda: Cuda::new(0)?, json: has("--json"), quick: has("--quick"), names, copy: 1.0 };
    eprintln!("{}", bench.cuda.name());
    bench.measure_copy()?;

    #[allow(clippy::cast_possible_truncation, reason = "any code does")]
    let int8 = |x: f32| (x * 30.0) as i8;
    #[allow(clippy::cast_possible_truncation, reason = "any code does")]
    let e4m3 = |x: f32| E4m3((x.to_bits() >> 20) as u8 & 0x77);
    if bench.wants("bag_sum") || bench.wants("bag_dot") {
        let widths: &[usize] = if bench.quick { &[256, 1024] } else { &[64, 100, 256, 1000, 1024, 4096] };
        for &width in widths {
            bench.bags(TOKENS, width, 1 << 20, |x| x)?;
            bench.bags(TOKENS, width, 1 << 20, Bf16::from_f32)?;
            bench.bags(TOKENS, width, 1 << 20, int8)?;
            bench.bags(TOKENS, width, 1 << 20, e4m3)?;
        }
        bench.bags(TOKENS, 1024, 1 << 22, Bf16::from_f32)?;
        for tokens in [1, 32, 32_768] {
            bench.bags(tokens, 1024, 1 << 20, Bf16::from_f32)?;
        }
    }
    if bench.wants("step") || bench.wants("sparse") {
        for zipf in [false, true] {
            bench.step(256, 1 << 20, zipf)?;
            bench.step(1024, 1 << 20, zipf)?;
            bench.step(4096, 1 << 20, zipf)?;
            bench.step(1024, 1 << 22, zipf)?;
            bench.step(1024, 1 << 24, zipf)?;
        }
    }
    if bench.wants("select") {
        let rough = Cuda::builder(0).stream(bench.cuda.stream().clone()).scores(Scores::Bf16).build()?;
        for tokens in [1, 32, TOKENS, 32_768] {
            bench.select(&bench.cuda, "f32", tokens)?;
            bench.select(&rough, "bf16", tokens)?;
        }
    }
    if bench.wants("decode") {
        let mut state = decode_state(&bench)?;
        let row =
            Row { op: "decode", format: "bf16", ids: "-", tokens: 1, width: DECODE_WIDTH, slots: 1 << 20, bytes: 0.0 };
        let ms = bench.time(|_| decode(&bench.cuda, &mut state))?;
        bench.report(row, ms);
        // A hundred launches between two events: their own time would drown one.
        let mut graph = bench.cuda.graph(state, decode)?;
        let ms = bench.time(|_| (0..100).try_for_each(|_| graph.launch()))?;
        bench.report(Row { op: "decode (graph)", ..row }, ms / 100.0);
    }
    bench.cuda.synchronize()
}
