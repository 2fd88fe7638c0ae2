//! Tables in the host's memory with a cache on the device: the bits of a table on the device. Skipped, and said so, where
//! there is none.

use memlayer_core::element::NEAREST;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Adam, Rounding, RowRule, RowUpdate, RowwiseAdagrad, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{ArgError, Bf16, Device, Trainable};
use memlayer_cuda::{Buffer, CachedTable, Cuda, CudaError, DeviceRule, Rows, TrainRows};
use memlayer_tests::conformance::skipped;
use memlayer_tests::device::{Memory, TestDevice};
use memlayer_tests::random::Random;

mod common;
use common::cuda;

const ROWS: usize = 5000;
const BAG: usize = 16;
const TOKENS: usize = 20;
const ENTRIES: usize = BAG * TOKENS;

/// Ids of which some come again and again.
fn ids(random: &mut Random) -> Vec<u32> {
    let (a, b) = (random.ids(ENTRIES, ROWS), random.ids(ENTRIES, ROWS));
    a.into_iter().zip(b).map(|(a, b)| if b % 2 == 0 { a % 300 } else { a.min(b) }).collect()
}

/// What one step leaves: sums and dots.
type Seen = (Vec<f32>, Vec<f32>);

/// A step over rows on the device, or over the cache.
fn step<E: Trainable, O: RowRule + DeviceRule>(
    cuda: &Cuda,
    (rule, dim, count): (&O, usize, u64),
    ids: &[u32],
    weights: &Buffer<f32>,
    table: &mut Stored<'_, E>,
) -> Seen {
    let ids = cuda.upload(ids).expect("ids");
    let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(ENTRIES)).expect("a plan");
    let (mut plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), ENTRIES).expect("a plan");
    let mut scratch = Memory::new(cuda, cuda.plan_scratch(ENTRIES));
    cuda.plan(ids.view(), ROWS, plan.reborrow(), scratch.lend()).expect("a plan");
    let mut places = cuda.upload(&vec![0u32; ENTRIES]).expect("places");
    let ids = match table {
        Stored::Device(..) => ids.view(),
        Stored::Cached(table) => {
            table.load(cuda, &plan.plan()).expect("a load");
            table.translate(cuda, ids.view(), &mut places.view_mut()).expect("places");
            places.view()
        }
    };
    let (mut sums, mut dots) =
        (cuda.zeros::<f32>(TOKENS * dim).expect("sums"), cuda.zeros::<f32>(ENTRIES).expect("dots"));
    let rows = match table {
        Stored::Device(codes, _) => Rows::new(codes.view(), dim),
        Stored::Cached(table) => table.rows(),
    };
    let args = BagSum { bag: BAG, ids, weights: weights.view(), out: sums.view_mut(), accumulate: false };
    cuda.bag_sum(&rows, args).expect("sums");
    cuda.bag_dot(&rows, BagDot { bag: BAG, ids, vectors: sums.view(), out: dots.view_mut() }).expect("dots");
    let gradient = RowGradient { bag: BAG, dim, weights: weights.view(), sources: sums.view() };
    let mut scratch = Memory::new(cuda, RowUpdate::<TrainRows<'_, E>, O>::reduce_and_update_scratch(cuda, dim));
    let mut step = Step::new(0.01, count);
    step.rounding = Rounding::Stochastic { seed: 7 };
    if let Stored::Cached(table) = table {
        table.translate_plan(cuda, &mut plan).expect("places");
    }
    let rows = match table {
        Stored::Device(codes, state) => {
            TrainRows::new(codes.view_mut(), dim, state.view_mut(), rule.state_len(dim)).expect("rows")
        }
        Stored::Cached(table) => table.train_rows(),
    };
    cuda.reduce_and_update(rows, rule, &step, plan.plan(), gradient, scratch.lend()).expect("an update");
    cuda.synchronize().expect("a step");
    (TestDevice::download(cuda, &sums), TestDevice::download(cuda, &dots))
}

enum Stored<'a, E> {
    Device(&'a mut Buffer<E>, &'a mut Buffer<f32>),
    Cached(&'a mut CachedTable<E>),
}

fn same_bits<E: Trainable, O: RowRule + DeviceRule>(cuda: &Cuda, rule: &O, dim: usize, capacity: usize) {
    let mut random = Random::new(dim as u64);
    let start: Vec<E> = random.reals::<f32>(ROWS * dim).into_iter().map(|x| E::store(x, NEAREST)).collect();
    let state_len = rule.state_len(dim);
    let mut codes = cuda.upload(&start).expect("rows");
    let mut state = cuda.zeros::<f32>(ROWS * state_len).expect("a state");
    let mut cached = cuda.cached_table::<E>(ROWS, dim, state_len, capacity).expect("a table");
    cached.host(cuda).expect("the table").0.copy_from_slice(&start);
    for count in 1..=30 {
        let (ids, weights) = (ids(&mut random), cuda.upload(&random.reals::<f32>(ENTRIES)).expect("weights"));
        let expected = step(cuda, (rule, dim, count), &ids, &weights, &mut Stored::Device(&mut codes, &mut state));
        let found = step(cuda, (rule, dim, count), &ids, &weights, &mut Stored::Cached(&mut cached));
        assert!(expected == found, "step {count} over rows of {dim}");
        if count == 20 {
            // Lent and emptied on the way: nothing is lost.
            let rows = cached.host(cuda).expect("the table").0.to_vec();
            assert!(rows == TestDevice::download(cuda, &codes), "the table after step {count}");
        }
    }
    let (rows, states) = cached.host(cuda).expect("the table");
    assert!(rows == TestDevice::download(cuda, &codes), "rows of {dim}");
    assert!(states == TestDevice::download(cuda, &state), "states of rows of {dim}");
    assert!(states.is_empty() || states.iter().any(|x| *x != 0.0), "a state was kept");
}

#[test]
fn every_bit_is_that_of_a_table_on_the_device() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let adagrad = RowwiseAdagrad { eps: 1e-8 };
    let adam = Adam { betas: (0.9, 0.999), eps: 1e-8 };
    same_bits::<Bf16, _>(&cuda, &adagrad, 40, 700);
    same_bits::<Bf16, _>(&cuda, &adagrad, 17, ENTRIES);
    same_bits::<f32, _>(&cuda, &adam, 64, 400);
    same_bits::<f32, _>(&cuda, &Sgd, 20, ROWS);
}

#[test]
fn room_is_checked_before_a_load() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let table = cuda.cached_table::<f32>(100, 4, 0, 8).expect("a table");
    let check = |ids: Vec<u32>| {
        let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(ids.len())).expect("a plan");
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), ids.len()).expect("a plan");
        let mut scratch = Memory::new(&cuda, cuda.plan_scratch(ids.len()));
        let ids = cuda.upload(&ids).expect("ids");
        cuda.plan(ids.view(), 100, plan.reborrow(), scratch.lend()).expect("a plan");
        table.check_room(&cuda, &plan.plan())
    };
    assert_eq!(check((0..8).collect()), Ok(()));
    assert_eq!(check((0..20).map(|i| i % 8).collect()), Ok(()), "few rows of many entries");
    let error = check((0..20).map(|i| i % 9).collect()).expect_err("nine rows");
    assert_eq!(error, CudaError::Room { rows: 9, capacity: 8 });
    assert_eq!(error.to_string(), "9 rows at once do not fit into a cache of 8 rows");
}

#[test]
fn what_does_not_fit_is_reported() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    assert!(cuda.cached_table::<f32>(0, 4, 0, 4).is_err() && cuda.cached_table::<f32>(4, 4, 0, 0).is_err());
    let mut table = cuda.cached_table::<f32>(100, 4, 0, 8).expect("a table");
    let mut plan_of = |ids: &[u32], rows: usize| {
        let ids = cuda.upload(ids).expect("ids");
        let mut buffer = cuda.zeros::<u32>(PlanBuffers::<Cuda>::ids_len(ids.len())).expect("a plan");
        let (mut plan, _) = PlanBuffers::<Cuda>::carve(buffer.view_mut(), ids.len()).expect("a plan");
        let mut scratch = Memory::new(&cuda, cuda.plan_scratch(ids.len()));
        cuda.plan(ids.view(), rows, plan.reborrow(), scratch.lend()).expect("a plan");
        table.load(&cuda, &plan.plan()).expect("a load");
        let mut places = cuda.upload(&vec![0; ids.len()]).expect("places");
        table.translate(&cuda, ids.view(), &mut places.view_mut()).expect("places");
        cuda.synchronize().map(|()| TestDevice::download(&cuda, &places))
    };
    let found = plan_of(&[3, 5, 3, 99], 100).expect("places");
    assert!(found[0] == found[2] && found[0] != found[1] && found.iter().all(|place| *place < 8));
    let too_many: Vec<u32> = (0..9).collect();
    let error = CudaError::Arg(ArgError::RowOutOfRange { op: "load", row: 9, rows: 8 });
    assert_eq!(plan_of(&too_many, 100), Err(error));
    let error = CudaError::Arg(ArgError::RowOutOfRange { op: "load", row: 150, rows: 100 });
    assert_eq!(plan_of(&[150], 200), Err(error));
    assert!(plan_of(&[7, 8], 100).is_ok(), "it goes on");
    let other = Cuda::new(0).expect("the same device");
    assert!(matches!(table.host(&other), Err(CudaError::Unsupported { .. })), "another stream");
}
