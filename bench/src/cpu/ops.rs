//! Single operations of ours, and the limit they run into.

use std::sync::Arc;

use memlayer_core::ops::bag::BagSum;
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, SelectRows};
use memlayer_core::{Bf16, DenseRows, E4m3, E5m2, Element, F16, Int4, ScaledRows, Scratch};
use memlayer_cpu::Cpu;

use super::Case;
use super::inputs::{INT4_GROUP, Rows, Tables, Turns, reals};
use crate::error::BenchError;

/// A call with the next inputs.
pub(super) type Call = Box<dyn FnMut() -> Result<(), BenchError>>;

/// Rows, or blocks of them, that the limit asks for ahead of time: the best of these counts.
pub(super) const AHEAD: [usize; 3] = [8, 16, 32];

/// Sets of queries that take turns.
const QUERIES: usize = 16;

/// `select` over f32 keys, or over int8 keys.
pub(super) fn select(case: &Case, cpu: &Arc<Cpu>) -> Call {
    let (t, heads, sub_keys, half_dim, top_k) = (case.t, case.heads, case.sub_keys, case.half_dim, case.top_k);
    let dims = SelectDims { tokens: t, heads, parts: 2, sub_keys, half_dim, top_k };
    let queries: Vec<_> = (0..QUERIES).map(|i| reals(dims.queries_len(), i as u64)).collect();
    let keys = reals(dims.key_rows() * half_dim, 99);
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    let (cpu, mut turn) = (cpu.clone(), 0);
    if case.format == "int8" {
        #[allow(clippy::cast_possible_truncation, reason = "-127 to 127")]
        let codes: Vec<i8> = keys.iter().map(|x| (x * 127.0).round() as i8).collect();
        let scales = vec![1.0 / 127.0; dims.key_rows()];
        let req = SelectRows::<ScaledRows<'_, i8>>::select_scratch(&*cpu, dims);
        let (mut reals, mut places) = (vec![0.0; req.reals], vec![0; req.ids]);
        return Box::new(move || {
            turn = (turn + 1) % QUERIES;
            let Some(keys) = &ScaledRows::new(&codes, &scales, half_dim, half_dim) else { return Ok(()) };
            let (ids, scores, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
            let scratch = Scratch { reals: &mut reals[..], ids: &mut places[..] };
            Ok(cpu.select(Select { dims, queries: &queries[turn], keys, ids, scores, weights }, scratch)?)
        });
    }
    let req = SelectRows::<DenseRows<'_, f32>>::select_scratch(&*cpu, dims);
    let (mut reals, mut places) = (vec![0.0; req.reals], vec![0; req.ids]);
    Box::new(move || {
        turn = (turn + 1) % QUERIES;
        let keys = &DenseRows::new(&keys, half_dim);
        let (ids, scores, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
        let scratch = Scratch { reals: &mut reals[..], ids: &mut places[..] };
        Ok(cpu.select(Select { dims, queries: &queries[turn], keys, ids, scores, weights }, scratch)?)
    })
}

/// `bag_sum` of rows of the case's format.
pub(super) fn bag_sum(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables) -> Result<Call, BenchError> {
    let rows = tables.get(case.format, case.v, case.slots)?;
    Ok(match case.format {
        "f32" => bag_of::<f32>(case, cpu, rows),
        "bf16" => bag_of::<Bf16>(case, cpu, rows),
        "f16" => bag_of::<F16>(case, cpu, rows),
        "int8" => bag_of::<i8>(case, cpu, rows),
        "e4m3" => bag_of::<E4m3>(case, cpu, rows),
        "e5m2" => bag_of::<E5m2>(case, cpu, rows),
        _ => bag_of::<Int4<INT4_GROUP>>(case, cpu, rows),
    })
}

fn bag_of<E: Element>(case: &Case, cpu: &Arc<Cpu>, rows: Rows) -> Call {
    let (v, bag, cpu) = (case.v, case.bag(), cpu.clone());
    let (weights, mut out) = (reals(case.t * bag, 3), vec![0.0; case.t * v]);
    let mut turns = Turns::new(case);
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

/// Plain reads of the same rows.
pub(super) fn limit(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables, ahead: usize) -> Result<Call, BenchError> {
    let rows = tables.get(case.format, case.v, case.slots)?;
    let (cpu, mut turns, bytes) = (cpu.clone(), Turns::new(case), case.row_bytes);
    Ok(Box::new(move || {
        core::hint::black_box(cpu.read_rows(&rows.codes, bytes, turns.next(), ahead)?);
        Ok(())
    }))
}
