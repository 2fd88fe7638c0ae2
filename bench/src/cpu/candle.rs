//! The same in candle's own operations, in this process: they use all cores.

use std::sync::Arc;

use candle_core::{D, Device, Result, Tensor};
use memlayer_core::Random;
use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::Linear;
use memlayer_cpu::Cpu;

use super::Case;
use super::inputs::{Tables, reals, slot};
use super::ops::{self, Call};
use crate::error::BenchError;
use crate::time::{Pair, clock, pair};

/// Sets of inputs that take turns.
const SETS: usize = 16;

/// Ours beside candle's: a linear map, sums of rows, selection.
pub(super) fn measure(
    case: &Case,
    seconds: f64,
    cpu: &Arc<Cpu>,
    tables: &mut Tables,
) -> core::result::Result<Pair, BenchError> {
    let mut ours = match case.op {
        "linear" => linear(case, cpu),
        "bag_sum" => ops::bag_sum(case, cpu, tables, ops::Of::Table)?,
        _ => ops::select(case, cpu)?,
    };
    let theirs = match case.op {
        "linear" => their_linear(case),
        "bag_sum" => their_bag_sum(case),
        _ => their_select(case),
    };
    let (mut theirs, mut turn) = (theirs?, 0);
    let ours = &mut |calls| clock(calls, &mut ours);
    let theirs = &mut |calls| {
        clock(calls, || {
            turn = (turn + 1) % SETS;
            Ok((theirs)(turn).map(|out| drop(core::hint::black_box(out)))?)
        })
    };
    pair(seconds, ours, theirs)
}

/// A projection of width V to twice that, of our own product.
fn linear(case: &Case, cpu: &Arc<Cpu>) -> Call {
    let (cpu, tokens, v) = (cpu.clone(), case.t, case.v);
    let sets: Vec<_> = (0..SETS).map(|set| reals(tokens * v, set as u64)).collect();
    let (weight, mut out, mut turn) = (reals(2 * v * v, 99), vec![0.0; 2 * tokens * v], 0);
    Box::new(move || {
        turn = (turn + 1) % SETS;
        let (x, weight) = (&sets[turn][..], &weight[..]);
        Ok(cpu.linear(Linear { tokens, x, weight, bias: None, out: &mut out[..] })?)
    })
}

/// A call with set of inputs `turn`.
type Theirs = Box<dyn FnMut(usize) -> Result<Tensor>>;

fn tensor<const N: usize>(shape: [usize; N], seed: u64) -> Result<Tensor> {
    Tensor::from_vec(reals(shape.iter().product(), seed), shape.to_vec(), &Device::Cpu)
}

/// `x · weightᵀ`, by the gemm crate.
fn their_linear(case: &Case) -> Result<Theirs> {
    let sets: Vec<_> = (0..SETS).map(|set| tensor([case.t, case.v], set as u64)).collect::<Result<_>>()?;
    let weight = tensor([2 * case.v, case.v], 99)?;
    Ok(Box::new(move |turn| sets[turn].matmul(&weight.t()?)))
}

/// Rows by `index_select`, and their weighted sum as a product of matrices.
fn their_bag_sum(case: &Case) -> Result<Theirs> {
    let (t, bag, v) = (case.t, case.bag(), case.v);
    let mut random = Random::new(5);
    let mut ids = || {
        let ids: Vec<u32> = (0..t * bag).map(|_| slot(&mut random, case.slots, false)).collect();
        Tensor::from_vec(ids, t * bag, &Device::Cpu)
    };
    let sets: Vec<_> = (0..SETS).map(|_| ids()).collect::<Result<_>>()?;
    let (table, weights) = (tensor([case.slots, v], 1)?, tensor([t, 1, bag], 2)?);
    Ok(Box::new(move |turn| weights.matmul(&table.index_select(&sets[turn], 0)?.reshape((t, bag, v))?)))
}

/// Products of matrices, `arg_sort_last_dim` for the best of the halves and of their pairs (candle has no top-k), and a
/// softmax.
fn their_select(case: &Case) -> Result<Theirs> {
    let (t, h, n, c, k) = (case.t, case.heads, case.sub_keys, case.half_dim, case.top_k);
    let sets: Vec<_> = (0..SETS).map(|set| tensor([2 * h, t, c], set as u64)).collect::<Result<_>>()?;
    let keys = tensor([2 * h, c, n], 99)?;
    Ok(Box::new(move |turn| {
        let best = |scores: &Tensor| -> Result<(Tensor, Tensor)> {
            let ids = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, k)?.contiguous()?;
            Ok((scores.gather(&ids, D::Minus1)?, ids))
        };
        let (scores, ids) = best(&sets[turn].matmul(&keys)?)?;
        let (scores, ids) = (scores.reshape((h, 2, t, k))?, ids.reshape((h, 2, t, k))?);
        let half = |of: &Tensor, p: usize| of.narrow(1, p, 1)?.squeeze(1)?.contiguous();
        let pairs = half(&scores, 0)?.unsqueeze(3)?.broadcast_add(&half(&scores, 1)?.unsqueeze(2)?)?;
        let slots = (half(&ids, 0)?.unsqueeze(3)? * n as f64)?.broadcast_add(&half(&ids, 1)?.unsqueeze(2)?)?;
        let (scores, places) = best(&pairs.reshape((h, t, k * k))?)?;
        let slots = slots.reshape((h, t, k * k))?.gather(&places, D::Minus1)?;
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        core::hint::black_box(slots);
        exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)
    }))
}
