//! Plans and the sums over them.

use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::{CHUNK, PlanBuffers, RowGradient};
use memlayer_core::{Reference, ScratchReq};

use super::{Subject, assert_same_bits, assert_within};
use crate::device::{Memory, TestDevice, poisoned};
use crate::random::Random;

/// A plan, on the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Planned {
    /// The touched rows, ascending.
    pub rows: Vec<u32>,
    /// Where each row's entries begin, and their number.
    pub starts: Vec<u32>,
    /// The entries, by row.
    pub entries: Vec<u32>,
}

/// A plan of `ids`, waited for.
///
/// # Panics
/// If none can be made, or the device reports an id.
pub fn plan<D: TestDevice + RowReduce>(device: &D, ids: &[u32], rows: usize) -> Planned {
    let mut buffer = device.upload(&vec![u32::MAX; PlanBuffers::<D>::ids_len(ids.len())]);
    let mut scratch = Memory::new(device, device.plan_scratch(ids.len()));
    let host_ids = ids;
    let ids = device.upload(ids);
    let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut buffer), host_ids.len()).expect("buffers");
    device.plan(D::view(&ids), rows, buffers.reborrow(), scratch.lend()).expect("a plan");
    device.synchronize().expect("a plan");
    drop(buffers);
    let (all, n) = (device.download(&buffer), host_ids.len());
    let unique = all[0] as usize;
    Planned {
        rows: all[1..=unique].to_vec(),
        starts: all[1 + n..][..=unique].to_vec(),
        entries: all[2 + 2 * n..][..n].to_vec(),
    }
}

/// `(E, rows, bag)`.
const SHAPES: [(usize, usize, usize); 10] = [
    (0, 5, 1),
    (1, 1, 1),
    (12, 1, 3),
    (40, 7, 4),
    (1000, 30, 8),
    (4096, 100_000, 32),
    (5000, 300, 5),
    (3000, 1 << 30, 1),
    (70_000, 4, 7),
    (20_000, 70_000, 16),
];

/// The plan is the reference's, to the last entry.
///
/// # Panics
/// If it differs.
pub fn is_the_references<D: Subject>(device: &D) {
    for (i, (entries, rows, _)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(i as u64);
        let mut ids = random.ids(entries, rows);
        if let (Some(last), true) = (ids.last_mut(), rows > 1) {
            *last = u32::try_from(rows - 1).expect("a row id");
        }
        assert_eq!(
            plan(&Reference::<f32>::new(), &ids, rows),
            plan(device, &ids, rows),
            "{entries} entries, {rows} rows"
        );
    }
}

fn reduce<D: TestDevice<Scalar = f32> + RowReduce>(
    device: &D,
    ids: &[u32],
    rows: usize,
    (bag, dim): (usize, usize),
    weights: &[f32],
    sources: &[f32],
) -> (Vec<f32>, f32) {
    let mut buffer = device.upload(&vec![u32::MAX; PlanBuffers::<D>::ids_len(ids.len())]);
    let mut scratch = Memory::new(device, device.plan_scratch(ids.len()));
    let mut norm_scratch = Memory::new(device, device.square_sum_scratch(ids.len()));
    let mut out = poisoned(device, ids.len() * dim);
    let mut norm = poisoned(device, 1);
    let entries = ids.len();
    let (ids, weights, sources) = (device.upload(ids), device.upload(weights), device.upload(sources));
    {
        let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut buffer), entries).expect("buffers");
        device.plan(D::view(&ids), rows, buffers.reborrow(), scratch.lend()).expect("a plan");
        let gradient = RowGradient { bag, dim, weights: D::view(&weights), sources: D::view(&sources) };
        device.reduce(buffers.plan(), gradient, D::view_mut(&mut out)).expect("sums");
        device
            .square_sum(buffers.plan(), dim, D::view(&out), D::view_mut(&mut norm), norm_scratch.lend())
            .expect("a norm");
        device.synchronize().expect("sums");
    }
    let unique = device.download(&buffer)[0] as usize;
    let mut out = device.download(&out);
    out.truncate(unique * dim);
    (out, device.download(&norm)[0])
}

/// Sums over the entries of rows, with many rows and few.
///
/// # Panics
/// If a bit differs.
pub fn sums_have_the_references_bits<D: Subject>(device: &D) {
    for (i, (entries, rows, bag)) in SHAPES.into_iter().enumerate() {
        for dim in [1, 5, 16, 33, 64] {
            let mut random = Random::new(40 + i as u64);
            let entries = entries / bag * bag;
            let (ids, weights) = (random.ids(entries, rows), random.reals::<f32>(entries));
            let sources = random.reals::<f32>(entries / bag * dim);
            let (expected, _) = reduce(&Reference::new(), &ids, rows, (bag, dim), &weights, &sources);
            let (found, _) = reduce(device, &ids, rows, (bag, dim), &weights, &sources);
            assert_same_bits(&expected, &found, &format!("reduce of {entries} entries over {rows} rows of {dim}"));
        }
    }
}

/// One row with a chunk's worth of entries, one fewer, one more, and very many.
///
/// # Panics
/// If a bit differs.
pub fn hot_rows_are_summed_in_chunks<D: Subject>(device: &D) {
    for entries in [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 20 * CHUNK + 3] {
        let mut random = Random::new(entries as u64);
        let ids: Vec<u32> = (0..entries).map(|_| if random.below(50) == 0 { 2 } else { 1 }).collect();
        let (weights, sources) = (random.reals::<f32>(entries), random.reals::<f32>(entries * 17));
        let (expected, _) = reduce(&Reference::new(), &ids, 3, (1, 17), &weights, &sources);
        let (found, _) = reduce(device, &ids, 3, (1, 17), &weights, &sources);
        assert_same_bits(&expected, &found, &format!("a row of about {entries} entries"));
    }
}

/// The norm of all gradients against `f64`.
///
/// # Panics
/// If it is out of its bound.
pub fn square_sums_are_in_their_bound<D: Subject>(device: &D) {
    for (i, (entries, rows, _)) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(80 + i as u64);
        let (ids, weights) = (random.ids(entries, rows), random.reals::<f32>(entries));
        let sources = random.reals::<f32>(entries * 9);
        let (grads, norm) = reduce(device, &ids, rows, (1, 9), &weights, &sources);
        let exact: f64 = grads.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        let bound = (grads.len() + 1) as f64 * f64::from(f32::EPSILON) * exact;
        assert_within(&[exact], &[norm], &[bound], &format!("the norm of {entries} entries"));
    }
}

/// Ids that are no rows, wrong sizes and a scratch one element short are errors.
///
/// # Panics
/// If one is accepted.
pub fn refuses_what_does_not_fit<D: Subject>(device: &D) {
    let run = |ids: &[u32], entries: usize, short: ScratchReq| {
        let mut buffer = device.upload(&vec![0u32; PlanBuffers::<D>::ids_len(entries)]);
        let (buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut buffer), entries).expect("buffers");
        let req = device.plan_scratch(ids.len());
        let req = ScratchReq::new(req.reals.saturating_sub(short.reals), req.ids.saturating_sub(short.ids));
        let ids = device.upload(ids);
        let mut scratch = Memory::new(device, req);
        let result = device.plan(D::view(&ids), 4, buffers, scratch.lend());
        result.and_then(|()| device.synchronize()).is_ok()
    };
    let ids: Vec<u32> = (0..1000).map(|i| i % 4).collect();
    assert!(run(&ids, 1000, ScratchReq::EMPTY), "exact sizes");
    assert!(!run(&ids, 999, ScratchReq::EMPTY), "buffers too small");
    assert!(!run(&[0, 4], 2, ScratchReq::EMPTY), "row 4 of 4");
    let req = device.plan_scratch(1000);
    assert_eq!(run(&ids, 1000, ScratchReq::new(1, 0)), req.reals == 0, "scratch one scalar short");
    assert_eq!(run(&ids, 1000, ScratchReq::new(0, 1)), req.ids == 0, "scratch one id short");
}
