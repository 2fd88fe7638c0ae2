//! Single operations of ours, and the limit they run into.

use std::sync::Arc;

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::optim::{Adam, RowUpdate, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, Element, F16, Int4, Random, ScaledRows, Scratch, Table, TrainRows};
use memlayer_cpu::Cpu;

use super::Case;
use super::inputs::{INT4_GROUP, OwnedRows, Rows, Tables, Turns, int8_panels, memory, reals};
use crate::error::BenchError;

/// A call with the next inputs.
pub(super) type Call = Box<dyn FnMut() -> Result<(), BenchError>>;

/// Rows, or blocks of them, that the limit asks for ahead of time: the best of these counts.
pub(super) const AHEAD: [usize; 4] = [8, 16, 32, 64];

/// Sets of queries that take turns.
const QUERIES: usize = 16;

/// `select` over f32 keys, over int8 keys with panels, which inference makes once, or over int8 rows alone.
pub(super) fn select(case: &Case, cpu: &Arc<Cpu>) -> Result<Call, BenchError> {
    let (t, heads, sub_keys, half_dim, top_k) = (case.t, case.heads, case.sub_keys, case.half_dim, case.top_k);
    let dims = SelectDims { tokens: t, heads, parts: 2, sub_keys, half_dim, top_k };
    let keys = reals(dims.key_rows() * half_dim, 99);
    Ok(match case.format {
        "int8" => select_over(dims, cpu, int8_panels(&keys, half_dim, sub_keys, cpu)?),
        "int8 rows" => select_over(dims, cpu, OwnedRows::int8(&keys, half_dim)),
        _ => select_over(dims, cpu, OwnedRows::new(keys, half_dim)),
    })
}

fn select_over<K: Table + 'static>(dims: SelectDims, cpu: &Arc<Cpu>, keys: K) -> Call
where
    Cpu: SelectRows<K>,
{
    let queries: Vec<_> = (0..QUERIES).map(|i| reals(dims.queries_len(), i as u64)).collect();
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    let req = SelectRows::<K>::select_scratch(&**cpu, dims);
    let (mut reals, mut places) = (vec![0.0; req.reals], vec![0; req.ids]);
    let (cpu, mut turn) = (cpu.clone(), 0);
    Box::new(move || {
        turn = (turn + 1) % QUERIES;
        let (ids, scores, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
        let scratch = Scratch { reals: &mut reals[..], ids: &mut places[..] };
        Ok(cpu.select(Select { dims, queries: &queries[turn], keys: &keys, ids, scores, weights }, scratch)?)
    })
}

/// Which rows are summed.
#[derive(Clone, Copy)]
pub(super) enum Of {
    /// The case's.
    Table,
    /// As many, over and over the few that the first cache holds: what the instructions alone take.
    FirstCache,
}

/// Bytes of rows that the first cache of any processor holds beside the rest of a bag.
const FIRST_CACHE: usize = 16 << 10;

/// `bag_sum` of rows of the case's format.
pub(super) fn bag_sum(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables, of: Of) -> Result<Call, BenchError> {
    let rows = tables.get(case.format, case.v, case.slots)?;
    let turns = match of {
        Of::Table => Turns::new(case, 0),
        Of::FirstCache => {
            Turns::new(&Case { slots: (FIRST_CACHE / case.row_bytes).clamp(1, case.slots), ..case.clone() }, 0)
        }
    };
    Ok(match case.format {
        "f32" => bag_of::<f32>(case, cpu, rows, turns),
        "bf16" => bag_of::<Bf16>(case, cpu, rows, turns),
        "f16" => bag_of::<F16>(case, cpu, rows, turns),
        "int8" => bag_of::<i8>(case, cpu, rows, turns),
        "e4m3" => bag_of::<E4m3>(case, cpu, rows, turns),
        "e5m2" => bag_of::<E5m2>(case, cpu, rows, turns),
        _ => bag_of::<Int4<INT4_GROUP>>(case, cpu, rows, turns),
    })
}

fn bag_of<E: Element>(case: &Case, cpu: &Arc<Cpu>, rows: Rows, mut turns: Turns) -> Call {
    let (v, bag, cpu) = (case.v, case.bag(), cpu.clone());
    let (weights, mut out) = (reals(case.t * bag, 3), vec![0.0; case.t * v]);
    Box::new(move || {
        let ids = turns.next();
        let codes: &[E] = bytemuck::cast_slice(&rows.codes);
        let args = BagSum { bag, ids, weights: &weights[..], out: &mut out[..], accumulate: false };
        match ScaledRows::new(codes, &rows.scales, v, v) {
            Some(table) => Ok(cpu.bag_sum(&table, args)?),
            None => Ok(cpu.bag_sum(&DenseRows::new(codes, v), args)?),
        }
    })
}

/// Distinct rows that [`rows_step`] touches, in a table of any size.
const TOUCHED: usize = 1 << 15;

/// Sums, gradients of weights, plan and update by lazy Adam: what a step does with the rows, over [`TOUCHED`] rows of a
/// table of `slots`, a power of two.
pub(super) fn rows_step(case: &Case, cpu: &Arc<Cpu>, slots: usize) -> Result<Call, BenchError> {
    type Train<'a> = TrainRows<'a, f32, f32>;
    let rule = Adam { betas: (0.9, 0.999), eps: 1e-8 };
    let (v, bag, cpu, entries) = (case.v, case.bag(), cpu.clone(), case.t * case.bag());
    let mut random = Random::new(1);
    // An odd factor permutes the slots: as many distinct rows of every table, scattered without a stride that would make
    // them share sets of the caches.
    #[allow(clippy::cast_possible_truncation, reason = "ids have 32 bits")]
    let id = |chosen: usize| (chosen as u32).wrapping_mul(0x9e37_79b1) & (slots as u32 - 1);
    let ids: Vec<u32> = (0..entries).map(|_| id(random.below(TOUCHED))).collect();
    let (mut values, mut state) = (memory::<f32>(slots * v)?, memory::<f32>(slots * v * 2)?);
    values.fill(0.1);
    state.fill(0.1);
    let (weights, mut out, mut dots) = (reals(entries, 3), vec![0.0; case.t * v], vec![0.0; entries]);
    let req = cpu.plan_scratch(entries).or(RowUpdate::<Train<'_>, Adam>::reduce_and_update_scratch(&*cpu, v));
    let (mut places, mut scratch_reals) = (vec![0; req.ids], vec![0.0; req.reals]);
    let mut plan = vec![0; PlanBuffers::<Cpu>::ids_len(entries)];
    let mut count = 0;
    Ok(Box::new(move || {
        count += 1;
        let table = DenseRows::new(&values[..], v);
        let args = BagSum { bag, ids: &ids[..], weights: &weights[..], out: &mut out[..], accumulate: false };
        cpu.bag_sum(&table, args)?;
        cpu.bag_dot(&table, BagDot { bag, ids: &ids[..], vectors: &out[..], out: &mut dots[..] })?;
        let (mut plan, _) = PlanBuffers::<Cpu>::carve(&mut plan[..], entries)?;
        let mut scratch = Scratch { reals: &mut scratch_reals[..], ids: &mut places[..] };
        cpu.plan(&ids[..], slots, plan.reborrow(), scratch.reborrow())?;
        let gradient = RowGradient::<Cpu> { bag, dim: v, weights: &weights[..], sources: &out[..] };
        let Some(table) = TrainRows::new(&mut values[..], v, &mut state[..], 2 * v) else { return Ok(()) };
        Ok(cpu.reduce_and_update(table, &rule, &Step::new(1e-3, count), plan.plan(), gradient, scratch)?)
    }))
}

/// Plain reads of the same rows.
pub(super) fn limit(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables, ahead: usize) -> Result<Call, BenchError> {
    let rows = tables.get(case.format, case.v, case.slots)?;
    let (cpu, mut turns, bytes) = (cpu.clone(), Turns::new(case, 1), case.row_bytes);
    Ok(Box::new(move || {
        core::hint::black_box(cpu.read_rows(&rows.codes, bytes, turns.next(), ahead)?);
        Ok(())
    }))
}
