//! The suite and the golden files on device 0, and what only this backend has.
//!
//! Without a device the tests are skipped and say so; `MEMLAYER_REQUIRE=cuda` or `MEMLAYER_REQUIRE_CUDA=1` makes that a
//! failure.

use std::path::Path;

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Adagrad, Adam, Rounding, RowRule, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{ArgError, Bf16, DenseRows, Device, F16, Int4, Reference, Trainable};
use memlayer_cuda::{Buffer, Cuda, CudaError, Rows, Scores, TrainRows};
use memlayer_tests::conformance::{assert_same_bits, skipped};
use memlayer_tests::device::{Memory, TestDevice};
use memlayer_tests::golden::{check_on, files_in};
use memlayer_tests::random::Random;

mod common;
use common::cuda;

memlayer_tests::conformance!(cuda, cuda);

#[test]
fn golden_files_agree() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let folder = std::env::var("MEMLAYER_GOLDEN")
        .unwrap_or_else(|_| Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").display().to_string());
    let mut checked = 0;
    for file in files_in(Path::new(&folder)).expect("the folder of golden files") {
        if let Some(outcome) = check_on(&file, &cuda).expect("a golden file") {
            assert!(outcome.ok(), "{outcome:#?}");
            checked += 1;
        }
    }
    assert!(checked >= 13, "only {checked} golden files of layers and row rules in {folder}");
}

#[test]
fn a_bad_id_is_reported_once_and_by_name() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let table = cuda.upload(&[1f32; 12]).expect("a buffer");
    let (ids, weights) = (cuda.upload(&[0u32, 7]).expect("ids"), cuda.upload(&[1f32; 2]).expect("weights"));
    let mut out = cuda.zeros::<f32>(4).expect("a buffer");
    let args = BagSum { bag: 2, ids: ids.view(), weights: weights.view(), out: out.view_mut(), accumulate: false };
    cuda.bag_sum(&Rows::new(table.view(), 4), args).expect("a launch");
    let found = cuda.synchronize();
    assert_eq!(found, Err(CudaError::Arg(ArgError::RowOutOfRange { op: "bag_sum", row: 7, rows: 3 })));
    assert_eq!(cuda.synchronize(), Ok(()));
}

/// Plans and updates once, in rows of `E`.
fn step<E: Trainable, O>(cuda: &Cuda, rule: &O, step: &Step, case: &Case, table: &[E], ids: &[u32]) -> Vec<E>
where
    O: RowRule + memlayer_cuda::DeviceRule,
{
    let mut table = cuda.upload(table).expect("a table");
    let mut state = cuda.zeros::<f32>(case.rows * rule.state_len(case.dim)).expect("a state");
    update(cuda, rule, step, case, &mut table, &mut state, ids);
    TestDevice::download(cuda, &table)
}

/// The buffers of a plan of `ids`.
fn planned(cuda: &Cuda, case: &Case, ids: &[u32]) -> Buffer<u32> {
    let entries = ids.len();
    let ids = cuda.upload(ids).expect("ids");
    let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(entries)).expect("a plan");
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), entries).expect("a plan");
    let mut scratch = Memory::new(cuda, cuda.plan_scratch(entries));
    cuda.plan(ids.view(), case.rows, plan, scratch.lend()).expect("a plan");
    buffer
}

fn update<E: Trainable, O>(
    cuda: &Cuda,
    rule: &O,
    step: &Step,
    case: &Case,
    table: &mut Buffer<E>,
    state: &mut Buffer<f32>,
    ids: &[u32],
) where
    O: RowRule + memlayer_cuda::DeviceRule,
{
    let mut buffer = planned(cuda, case, ids);
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), ids.len()).expect("a plan");
    let (weights, sources) =
        (cuda.upload(&case.weights).expect("weights"), cuda.upload(&case.sources).expect("sources"));
    let gradient = RowGradient { bag: case.bag, dim: case.dim, weights: weights.view(), sources: sources.view() };
    let req = RowUpdate::<TrainRows<'_, E>, O>::reduce_and_update_scratch(cuda, case.dim);
    let mut scratch = Memory::new(cuda, req);
    let rows = TrainRows::new(table.view_mut(), case.dim, state.view_mut(), rule.state_len(case.dim)).expect("rows");
    cuda.reduce_and_update(rows, rule, step, plan.plan(), gradient, scratch.lend()).expect("an update");
}

struct Case {
    rows: usize,
    dim: usize,
    bag: usize,
    weights: Vec<f32>,
    sources: Vec<f32>,
}

impl Case {
    fn new(random: &mut Random, rows: usize, dim: usize, bag: usize, entries: usize) -> Self {
        Self { rows, dim, bag, weights: random.reals(entries), sources: random.reals(entries / bag * dim) }
    }
}

#[test]
fn bf16_rows_have_the_references_bits_rounded_either_way() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    for (seed, dim) in [(1, 64), (2, 100), (3, 17), (4, 1024)] {
        let mut random = Random::new(seed);
        let (rows, bag, entries) = (300, 4, 2400);
        let case = Case::new(&mut random, rows, dim, bag, entries);
        // Some rows are long, so that both ways of updating are used.
        let ids: Vec<u32> = random.ids(entries, rows).into_iter().map(|id| if id % 3 == 0 { 5 } else { id }).collect();
        let table: Vec<Bf16> = random.reals::<f32>(rows * dim).into_iter().map(Bf16::from_f32).collect();
        for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 99 }] {
            let mut the_step = Step::new(0.1, 3);
            the_step.rounding = rounding;
            let rule = RowwiseAdagrad { eps: 1e-8 };
            let found = step(&cuda, &rule, &the_step, &case, &table, &ids);
            cuda.synchronize().expect("an update");
            let expected = on_reference(&rule, &the_step, &case, &table, &ids);
            assert!(expected == found, "rows of {dim}, {rounding:?}");
        }
    }
}

/// A block of several warps takes one row after the other, each of them with shared memory for its gradient.
#[test]
fn wide_rows_do_not_disturb_each_other() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let (rule, the_step) = (RowwiseAdagrad { eps: 1e-8 }, Step::new(0.1, 1));
    // Rows of middle length, more than the device takes at once; short rows of more than one warp.
    for (seed, dim, rows, each) in [(1, 512, 2500, 34), (2, 2048, 5000, 1)] {
        let mut random = Random::new(seed);
        let case = Case::new(&mut random, rows, dim, each, rows * each);
        let ids: Vec<u32> = (0..rows * each).map(|e| u32::try_from(e % rows).expect("a row")).collect();
        let table: Vec<Bf16> = random.reals::<f32>(rows * dim).into_iter().map(Bf16::from_f32).collect();
        let expected = on_reference(&rule, &the_step, &case, &table, &ids);
        for _ in 0..3 {
            let found = step(&cuda, &rule, &the_step, &case, &table, &ids);
            cuda.synchronize().expect("an update");
            assert!(expected == found, "{rows} rows of {dim}");
        }
    }
}

/// A row-wise rule keeps a row's gradient in a block's shared memory. Rows that fit into it on every device from sm_80 on are
/// updated, and rows that fit on none are refused before anything is written.
#[test]
fn rows_that_no_block_holds_are_refused() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let (rule, the_step) = (RowwiseAdagrad { eps: 1e-8 }, Step::new(0.1, 1));
    let case_of = |dim| Case::new(&mut Random::new(1), 2, dim, 1, 3);
    let (ids, table_of) = ([1, 0, 1], |dim| vec![Bf16::from_f32(1.5); 2 * dim]);
    let (fits, case) = (table_of(40_000), case_of(40_000));
    let found = step(&cuda, &rule, &the_step, &case, &fits, &ids);
    assert!(found == on_reference(&rule, &the_step, &case, &fits, &ids), "rows of {}", case.dim);

    let case = case_of(65_536);
    let mut table = cuda.upload(&table_of(case.dim)).expect("a table");
    let mut state = cuda.zeros::<f32>(case.rows).expect("a state");
    let (mut buffer, mut dots) = (planned(&cuda, &case, &ids), cuda.zeros::<f32>(ids.len()).expect("dots"));
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), ids.len()).expect("a plan");
    let (weights, sources) =
        (cuda.upload(&case.weights).expect("weights"), cuda.upload(&case.sources).expect("sources"));
    let gradient = || RowGradient { bag: 1, dim: case.dim, weights: weights.view(), sources: sources.view() };
    let req = RowUpdate::<TrainRows<'_, Bf16>, RowwiseAdagrad>::reduce_and_update_scratch(&cuda, case.dim);
    let mut scratch = Memory::new(&cuda, req);
    for way in ["update", "reduce_and_update", "dot_reduce_and_update"] {
        let rows = TrainRows::new(table.view_mut(), case.dim, state.view_mut(), 1).expect("rows");
        let refused = match way {
            "update" => cuda.update(rows, &rule, &the_step, plan.plan(), sources.view(), scratch.lend()),
            "reduce_and_update" => {
                cuda.reduce_and_update(rows, &rule, &the_step, plan.plan(), gradient(), scratch.lend())
            }
            _ => {
                let dots = dots.view_mut();
                cuda.dot_reduce_and_update(rows, &rule, &the_step, plan.plan(), gradient(), dots, scratch.lend())
            }
        };
        let what = "a row-wise rule over rows as wide as these";
        assert_eq!(refused, Err(CudaError::Unsupported { op: way, what }));
    }
    assert!(TestDevice::download(&cuda, &table) == table_of(case.dim), "a refused update wrote");
    // A rule that keeps no rate for a row has no such limit.
    let found = step(&cuda, &Sgd, &the_step, &case, &table_of(case.dim), &ids);
    assert!(found == on_reference(&Sgd, &the_step, &case, &table_of(case.dim), &ids), "rows of {}", case.dim);
}

/// Rows of all three lengths, in one pass with their dots and in two: the same bits in table and state, dots within their
/// bound, and those the same from run to run.
fn check_one_pass<E: Trainable + PartialEq, O>(cuda: &Cuda, rule: &O, case: &Case, table: &[E], ids: &[u32])
where
    O: RowRule + memlayer_cuda::DeviceRule,
{
    let (entries, dim, bag) = (ids.len(), case.dim, case.bag);
    let mut the_step = Step::new(0.1, 3);
    the_step.rounding = Rounding::Stochastic { seed: 99 };
    let state_len = rule.state_len(dim);
    let (mut codes, mut state) =
        (cuda.upload(table).expect("a table"), cuda.zeros::<f32>(case.rows * state_len).expect("a state"));
    update(cuda, rule, &the_step, case, &mut codes, &mut state, ids);
    let expected = (TestDevice::download(cuda, &codes), TestDevice::download(cuda, &state));

    let mut buffer = planned(cuda, case, ids);
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), entries).expect("a plan");
    let (weights, sources) =
        (cuda.upload(&case.weights).expect("weights"), cuda.upload(&case.sources).expect("sources"));
    let req = RowUpdate::<TrainRows<'_, E>, O>::dot_reduce_and_update_scratch(cuda, dim, entries);
    let mut scratch = Memory::new(cuda, req);
    let mut before: Option<Vec<f32>> = None;
    for _ in 0..3 {
        let (mut codes, mut state) =
            (cuda.upload(table).expect("a table"), cuda.zeros::<f32>(case.rows * state_len).expect("a state"));
        let mut dots = cuda.upload(&vec![f32::NAN; entries]).expect("dots");
        let rows = TrainRows::new(codes.view_mut(), dim, state.view_mut(), state_len).expect("rows");
        let gradient = RowGradient { bag, dim, weights: weights.view(), sources: sources.view() };
        let out = dots.view_mut();
        cuda.dot_reduce_and_update(rows, rule, &the_step, plan.plan(), gradient, out, scratch.lend()).expect("a pass");
        cuda.synchronize().expect("a pass");
        let found = (TestDevice::download(cuda, &codes), TestDevice::download(cuda, &state));
        assert!(expected.0 == found.0, "rows of {dim}");
        assert_same_bits(&expected.1, &found.1, "state");
        let dots: Vec<f32> = TestDevice::download(cuda, &dots);
        for (e, (&found, &id)) in dots.iter().zip(ids).enumerate() {
            let (row, source) = (&table[id as usize * dim..][..dim], &case.sources[e / bag * dim..][..dim]);
            let terms = (0..dim).map(|v| f64::from(E::value::<f32>(row, v)) * f64::from(source[v]));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size): (f64, f64), t| (sum + t, size + t.abs()));
            let bound = 40.0 * f64::from(f32::EPSILON) * size;
            assert!((f64::from(found) - sum).abs() <= bound, "dot {e} with rows of {dim}: {found}, not {sum}");
        }
        if let Some(before) = &before {
            assert_same_bits(before, &dots, "dots");
        }
        before = Some(dots);
    }
}

#[test]
fn one_pass_over_the_rows_does_what_two_do() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    for (seed, dim) in [(1, 64), (2, 100), (3, 17), (4, 1024), (5, 2000), (6, 4096), (7, 1), (8, 30_000)] {
        let mut random = Random::new(seed);
        let (rows, bag, entries) = if dim > 10_000 { (40, 4, 640) } else { (900, 4, 4000) };
        let case = Case::new(&mut random, rows, dim, bag, entries);
        let ids = random.ids(entries, rows).into_iter();
        let ids: Vec<u32> = ids.map(|id| [5, id % 20, id, id, id][id as usize % 5]).collect();
        let reals = random.reals::<f32>(rows * dim);
        let codes: Vec<Bf16> = reals.iter().map(|&x| Bf16::from_f32(x)).collect();
        check_one_pass(&cuda, &RowwiseAdagrad { eps: 1e-8 }, &case, &codes, &ids);
        if dim < 30_000 {
            check_one_pass(&cuda, &RowwiseAdagrad { eps: 1e-8 }, &case, &reals, &ids);
            check_one_pass(&cuda, &Sgd, &case, &codes, &ids);
            check_one_pass(&cuda, &Adagrad { eps: 1e-8 }, &case, &reals, &ids);
            let (betas, eps) = ((0.9, 0.99), 1e-8);
            check_one_pass(&cuda, &Adam { betas, eps }, &case, &codes, &ids);
            check_one_pass(&cuda, &RowwiseAdam { betas, eps }, &case, &codes, &ids);
        }
    }
}

/// The same on the reference.
fn on_reference<O: RowRule>(rule: &O, step: &Step, case: &Case, table: &[Bf16], ids: &[u32]) -> Vec<Bf16> {
    type R = Reference<f32>;
    let reference = R::new();
    let (mut table, mut state) = (table.to_vec(), vec![0f32; case.rows * rule.state_len(case.dim)]);
    let mut buffer = vec![0u32; PlanBuffers::<R>::ids_len(ids.len())];
    let (mut plan, _) = PlanBuffers::<R>::carve(&mut buffer, ids.len()).expect("a plan");
    let mut scratch = Memory::new(&reference, reference.plan_scratch(ids.len()));
    reference.plan(ids, case.rows, plan.reborrow(), scratch.lend()).expect("a plan");
    let gradient = RowGradient { bag: case.bag, dim: case.dim, weights: &case.weights[..], sources: &case.sources[..] };
    let state_len = rule.state_len(case.dim);
    let rows = memlayer_core::TrainRows::new(&mut table, case.dim, &mut state, state_len).expect("rows");
    let mut scratch = Memory::new(&reference, memlayer_core::ScratchReq::new(2 * case.dim, 0));
    reference.reduce_and_update(rows, rule, step, plan.plan(), gradient, scratch.lend()).expect("an update");
    table
}

/// The gradients of touched rows in rows of `E`, beside the reference's.
fn check_sums<E: Trainable>(cuda: &Cuda, case: &Case, ids: &[u32]) {
    type R = Reference<f32>;
    let (entries, dim, reference) = (ids.len(), case.dim, R::new());
    let mut buffer = vec![0u32; PlanBuffers::<R>::ids_len(entries)];
    let (mut plan, _) = PlanBuffers::<R>::carve(&mut buffer, entries).expect("a plan");
    let mut scratch = Memory::new(&reference, reference.plan_scratch(entries));
    reference.plan(ids, case.rows, plan.reborrow(), scratch.lend()).expect("a plan");
    let unique = plan.plan().unique[0] as usize;
    let mut sums = vec![0f32; unique * dim];
    let gradient = RowGradient { bag: case.bag, dim, weights: &case.weights[..], sources: &case.sources[..] };
    reference.reduce(plan.plan(), gradient, &mut sums).expect("sums");
    let expected: Vec<E> = sums.into_iter().map(|sum| E::store(sum, None)).collect();

    let mut buffer = planned(cuda, case, ids);
    let (plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), entries).expect("a plan");
    let (weights, sources) =
        (cuda.upload(&case.weights).expect("weights"), cuda.upload(&case.sources).expect("sources"));
    let mut found = cuda.zeros::<E>(unique * dim).expect("sums");
    let gradient = RowGradient { bag: case.bag, dim, weights: weights.view(), sources: sources.view() };
    cuda.reduce_as(plan.plan(), gradient.into(), found.view_mut()).expect("sums");
    cuda.synchronize().expect("sums");
    let found: Vec<E> = TestDevice::download(cuda, &found);
    for (at, pair) in expected.iter().zip(&found).enumerate() {
        let [expected, found] = [pair.0, pair.1].map(|code| E::value::<f32>(core::slice::from_ref(code), 0));
        let same = expected.to_bits() == found.to_bits() || expected.is_nan() && found.is_nan();
        assert!(same, "value {at} in rows of {dim}, {}: {expected}, not {found}", E::FORMAT.name());
    }
}

#[test]
fn sums_are_the_references_rounded_once_and_slice_by_slice() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    // The last are more sources than a second-level cache holds: they are summed a slice of columns at a time.
    for (seed, dim, tokens) in
        [(1, 1, 300), (2, 17, 600), (3, 100, 600), (4, 1024, 900), (5, 1100, 12_000), (6, 257, 30_000)]
    {
        let mut random = Random::new(seed);
        let (rows, bag) = (tokens, 2);
        let mut case = Case::new(&mut random, rows, dim, bag, tokens * bag);
        // NaN and infinity stay what they are.
        case.weights[7] = f32::NAN;
        case.weights[9] = f32::INFINITY;
        // Rows of all three lengths.
        let ids = random.ids(tokens * bag, rows).into_iter();
        let ids: Vec<u32> = ids.map(|id| [5, id % 50, id, id][id as usize % 4]).collect();
        check_sums::<f32>(&cuda, &case, &ids);
        check_sums::<Bf16>(&cuda, &case, &ids);
    }
}

/// Sums and dots of rows of 4-bit integers, `skip` bytes into a buffer, beside the reference's.
fn packed_rows<const G: usize>(cuda: &Cuda, dim: usize, skip: usize, seed: u64) {
    const ROWS: usize = 50;
    const TOKENS: usize = 9;
    const BAG: usize = 21;
    let mut random = Random::new(seed);
    let mut codes: Vec<Int4<G>> = vec![Int4(0); skip];
    for _ in 0..ROWS * dim.div_ceil(G) {
        let [low, high] = F16::from_f32(0.01 + random.reals::<f32>(1)[0].abs()).to_bits().to_le_bytes();
        codes.extend([Int4(low), Int4(high)]);
        codes.extend(random.ids(G / 2, 256).into_iter().map(|byte| Int4(u8::try_from(byte).expect("a byte"))));
    }
    let (ids, weights) = (random.ids(TOKENS * BAG, ROWS), random.reals::<f32>(TOKENS * BAG));
    let vectors = random.reals::<f32>(TOKENS * dim);
    let reference = Reference::<f32>::new();
    let rows = DenseRows::new(&codes[skip..], dim);
    let (mut sums, mut dots) = (vec![0f32; TOKENS * dim], vec![0f32; TOKENS * BAG]);
    let sum = BagSum { bag: BAG, ids: &ids[..], weights: &weights[..], out: &mut sums[..], accumulate: false };
    reference.bag_sum(&rows, sum).expect("sums");
    let dot = BagDot { bag: BAG, ids: &ids[..], vectors: &vectors[..], out: &mut dots[..] };
    reference.bag_dot(&rows, dot).expect("dots");

    let table = cuda.upload(&codes).expect("codes");
    let rows = Rows::new(table.view().slice(skip..codes.len()), dim);
    let (there, factors) = (cuda.upload(&ids).expect("ids"), cuda.upload(&weights).expect("weights"));
    let mut found = cuda.zeros::<f32>(TOKENS * dim).expect("sums");
    for accumulate in [false, true] {
        let out = found.view_mut();
        let sum = BagSum { bag: BAG, ids: there.view(), weights: factors.view(), out, accumulate };
        cuda.bag_sum(&rows, sum).expect("sums");
        assert_same_bits(&sums, &TestDevice::download(cuda, &found), "sums");
        sums.iter_mut().for_each(|sum| *sum += *sum);
    }
    let directions = cuda.upload(&vectors).expect("vectors");
    let mut found = cuda.zeros::<f32>(TOKENS * BAG).expect("dots");
    let dot = BagDot { bag: BAG, ids: there.view(), vectors: directions.view(), out: found.view_mut() };
    cuda.bag_dot(&rows, dot).expect("dots");
    let found = TestDevice::download(cuda, &found);
    for (at, (expected, found)) in dots.iter().zip(&found).enumerate() {
        // Both are sums of dim products of at most 9.
        let bound = 2.0 * dim as f32 * f32::EPSILON * 9.0 * dim as f32;
        assert!((expected - found).abs() <= bound, "dot {at} of rows of {dim}: {expected}, not {found}");
    }
    cuda.synchronize().expect("all of it");
}

#[test]
fn rows_of_four_bits_are_the_references() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    for (seed, dim) in [(1, 64), (2, 100), (3, 17), (4, 256), (5, 1024), (6, 1)] {
        for skip in [0, 1, 2] {
            packed_rows::<32>(&cuda, dim, skip, seed);
            packed_rows::<64>(&cuda, dim, skip, seed);
        }
    }
}

#[test]
fn more_rows_of_middle_length_than_the_list_holds() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let (rows, dim, each) = (70_000, 4, 34);
    let mut random = Random::new(17);
    let case = Case::new(&mut random, rows, dim, 2, rows * each);
    let ids: Vec<u32> = (0..rows * each).map(|e| u32::try_from(e % rows).expect("a row")).collect();
    let table = vec![Bf16::from_f32(0.5); rows * dim];
    let found = step(&cuda, &Sgd, &Step::new(0.1, 1), &case, &table, &ids);
    cuda.synchronize().expect("an update");
    assert!(on_reference(&Sgd, &Step::new(0.1, 1), &case, &table, &ids) == found);
}

#[test]
fn a_plan_of_a_bad_id_changes_no_row() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(11);
    let case = Case::new(&mut random, 8, 12, 1, 2000);
    let table = random.reals::<f32>(8 * 12);
    let mut ids = random.ids(2000, 8);
    ids[1234] = 8;
    let found = step(&cuda, &Sgd, &Step::new(0.1, 1), &case, &table, &ids);
    assert_same_bits(&table, &found, "a table");
    let error = CudaError::Arg(ArgError::RowOutOfRange { op: "plan", row: 8, rows: 8 });
    assert_eq!(cuda.synchronize(), Err(error));
}

#[test]
fn hot_rows_are_the_same_from_run_to_run() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(12);
    let (rows, dim, entries) = (1000, 256, 200_000);
    let case = Case::new(&mut random, rows, dim, 8, entries);
    // Half of all entries belong to a few rows.
    let ids: Vec<u32> = random.ids(entries, rows).into_iter().map(|id| if id % 2 == 0 { id % 7 } else { id }).collect();
    let table = random.reals::<f32>(rows * dim);
    let run = || step(&cuda, &RowwiseAdagrad { eps: 1e-8 }, &Step::new(0.1, 1), &case, &table, &ids);
    let first = run();
    for _ in 0..3 {
        assert_same_bits(&first, &run(), "rows");
    }
    cuda.synchronize().expect("updates");
}

const DECODE: SelectDims = SelectDims { tokens: 1, heads: 4, parts: 2, sub_keys: 256, half_dim: 64, top_k: 32 };

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

fn decode(cuda: &Cuda, s: &mut Decode) -> Result<(), CudaError> {
    let scratch = memlayer_core::Scratch { reals: s.reals.view_mut(), ids: s.scratch_ids.view_mut() };
    let keys = Rows::new(s.keys.view(), DECODE.half_dim);
    let select = Select {
        dims: DECODE,
        queries: s.queries.view(),
        keys: &keys,
        ids: s.ids.view_mut(),
        scores: s.scores.view_mut(),
        weights: s.weights.view_mut(),
    };
    cuda.select(select, scratch)?;
    let sum = BagSum {
        bag: DECODE.heads * DECODE.top_k,
        ids: s.ids.view(),
        weights: s.weights.view(),
        out: s.out.view_mut(),
        accumulate: false,
    };
    cuda.bag_sum(&Rows::new(s.values.view(), 64), sum)
}

#[test]
fn a_graph_does_what_was_recorded_on_new_inputs() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(13);
    let req = SelectRows::<Rows<'_, f32>>::select_scratch(&cuda, DECODE);
    let values: Vec<Bf16> = random.reals::<f32>(256 * 256 * 64).into_iter().map(Bf16::from_f32).collect();
    let queries: Vec<f32> = random.reals(DECODE.queries_len());
    let mut state = Decode {
        queries: cuda.upload(&queries).expect("queries"),
        keys: cuda.upload(&random.reals::<f32>(DECODE.key_rows() * 64)).expect("keys"),
        values: cuda.upload(&values).expect("values"),
        ids: cuda.zeros(DECODE.bags_len()).expect("ids"),
        scores: cuda.zeros(DECODE.bags_len()).expect("scores"),
        weights: cuda.zeros(DECODE.bags_len()).expect("weights"),
        out: cuda.zeros(64).expect("sums"),
        reals: cuda.zeros(req.reals).expect("scratch"),
        scratch_ids: cuda.zeros(req.ids).expect("scratch"),
    };
    decode(&cuda, &mut state).expect("a step");
    let first: Vec<f32> = TestDevice::download(&cuda, &state.out);
    let mut graph = cuda.graph(state, decode).expect("a graph");
    let other: Vec<f32> = random.reals(DECODE.queries_len());
    graph.write(&cuda, |s| &s.queries, &other).expect("queries");
    graph.launch().expect("a launch");
    let second: Vec<f32> = TestDevice::download(&cuda, &graph.state().out);
    assert_ne!(first, second, "other queries read other rows");
    graph.write(&cuda, |s| &s.queries, &queries).expect("queries");
    graph.launch().expect("a launch");
    assert_same_bits(&first, &TestDevice::download(&cuda, &graph.state().out), "sums");
    cuda.synchronize().expect("all of it");
}

#[test]
fn scores_on_tensor_cores_find_nearly_the_same_slots() {
    let (Some(exact), Some(_)) = (cuda(), cuda()) else { return skipped("cuda") };
    let rough = Cuda::builder(0).scores(Scores::Bf16).build().expect("a device");
    let dims = SelectDims { tokens: 300, heads: 2, parts: 2, sub_keys: 512, half_dim: 128, top_k: 32 };
    let mut random = Random::new(14);
    let queries = random.reals::<f32>(dims.queries_len());
    let keys = random.reals::<f32>(dims.key_rows() * dims.half_dim);
    let select = |cuda: &Cuda| {
        let table = cuda.upload(&keys).expect("keys");
        let rows = Rows::new(table.view(), dims.half_dim);
        memlayer_tests::conformance::select::select_over(cuda, dims, &queries, &rows).ids
    };
    let (expected, found) = (select(&exact), select(&rough));
    let shared: usize =
        expected.chunks(32).zip(found.chunks(32)).map(|(e, f)| f.iter().filter(|id| e.contains(id)).count()).sum();
    assert!(shared * 100 >= expected.len() * 90, "{shared} of {} slots", expected.len());
}

#[test]
fn selection_of_many_tokens_is_exact() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    for (seed, (tokens, heads, sub_keys, half_dim, top_k)) in
        (20..).zip([(140, 2, 200, 24, 32), (130, 1, 257, 8, 100), (9, 3, 1100, 16, 20), (70, 1, 160, 40, 128)])
    {
        let dims = SelectDims { tokens, heads, parts: 2, sub_keys, half_dim, top_k };
        let mut random = Random::new(seed);
        // Small integers: scores are exact, and many are equal.
        let queries = random.integers::<f32>(dims.queries_len(), 3);
        let keys = random.integers::<f32>(dims.key_rows() * half_dim, 3);
        let table = cuda.upload(&keys).expect("keys");
        let rows = Rows::new(table.view(), half_dim);
        let found = memlayer_tests::conformance::select::select_over(&cuda, dims, &queries, &rows).ids;
        assert_eq!(found, memlayer_tests::conformance::select::brute_force(dims, &queries, &keys), "{dims:?}");
    }
}

#[test]
fn scores_on_tensor_cores_are_chosen_from_exactly() {
    use memlayer_tests::conformance::select::{integers, select_over};
    let Some(_) = cuda() else { return skipped("cuda") };
    let rough = Cuda::builder(0).scores(Scores::Bf16).build().expect("a device");
    let reference = Reference::<f32>::new();
    for (seed, (tokens, heads, parts, sub_keys, half_dim, top_k)) in (40..).zip([
        (140, 9, 2, 256, 64, 32),
        (700, 3, 2, 512, 40, 20),
        (300, 17, 1, 256, 264, 32),
        (257, 6, 2, 1024, 512, 31),
        (129, 17, 2, 768, 8, 1),
    ]) {
        let dims = SelectDims { tokens, heads, parts, sub_keys, half_dim, top_k };
        // Integers that bf16 has: scores are exact. Small ones have more ties than lists have room, large ones hardly any.
        for (greatest, odds) in [(100, 0), (3, 0), (40, 50)] {
            let (queries, keys) = integers(dims, seed, greatest, odds);
            let codes: Vec<Bf16> = keys.iter().map(|&x| Bf16::from_f32(x)).collect();
            let expected = select_over(&reference, dims, &queries, &DenseRows::new(&keys, half_dim));
            let (reals, packed) = (rough.upload(&keys).expect("keys"), rough.upload(&codes).expect("keys"));
            let found = select_over(&rough, dims, &queries, &Rows::new(reals.view(), half_dim));
            assert_eq!(found.ids, expected.ids, "{dims:?}, integers to {greatest}");
            let found = select_over(&rough, dims, &queries, &Rows::new(packed.view(), half_dim));
            assert_eq!(found.ids, expected.ids, "{dims:?}, integers to {greatest}, keys in bf16");
            for (a, b) in found.weights.iter().zip(&expected.weights) {
                assert!(a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-6, "{dims:?}: weight {a}, not {b}");
            }
        }
    }
}
