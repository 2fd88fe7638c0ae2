//! The way back from the gradient of the weights to those of scores, queries and keys.

use memlayer_core::error::check_ids;
use memlayer_core::ops::plan::CHUNK;
use memlayer_core::ops::select::{SelectBackward, SelectDims};
use memlayer_core::{ArgError, RowStore, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::rows::{Columns, add_row, columns, dot};
use crate::isa::{Lanes, Simd, dispatch};
use crate::ops::bag::row_cost;

/// The gradient of a half's keys wants a sum of up to [`CHUNK`] entries and their number for each row.
pub(super) fn scratch(cpu: &Cpu, dims: SelectDims, dkeys: bool) -> ScratchReq {
    if !dkeys {
        return ScratchReq::EMPTY;
    }
    let workers = cpu.threads().min(dims.heads * dims.parts);
    ScratchReq::new(dims.sub_keys * dims.half_dim, dims.sub_keys).times(workers)
}

pub(super) fn select_backward<K: RowStore + Sync>(
    cpu: &Cpu,
    args: SelectBackward<'_, Cpu, K>,
    workspace: Scratch<'_, Cpu>,
) -> Result<(), ArgError> {
    args.check()?;
    let dims = args.dims;
    check_ids("select_backward", args.ids, dims.sub_keys.pow(if dims.parts == 2 { 2 } else { 1 }))?;
    workspace.check("select_backward", scratch(cpu, dims, args.dkeys.is_some()))?;

    let (k, row) = (dims.top_k, dims.heads * dims.top_k);
    let tokens = cpu.piece(dims.tokens, dims.heads * dims.parts * k * row_cost(dims.half_dim));
    let bags = args.weights.chunks((tokens * row).max(1)).zip(args.dweights.chunks_mut((tokens * row).max(1)));
    cpu.pool.for_each(dims.bags_len() * 2, bags, |(weights, dweights)| {
        dispatch!(cpu.token, s => {
            for (w, dw) in weights.chunks_exact(k).zip(dweights.chunks_exact_mut(k)) {
                softmax_backward(s, w, dw);
            }
        });
    });
    let call = Call { dims, keys: args.keys, queries: args.queries, ids: args.ids, dscores: args.dweights };
    if let Some(dqueries) = args.dqueries {
        call.queries_backward(cpu, tokens, dqueries);
    }
    if let Some(dkeys) = args.dkeys {
        call.keys_backward(cpu, dkeys, workspace);
    }
    Ok(())
}

/// `dw`, the gradient of softmax weights `w`, becomes that of the scores: `w · (dw - <w, dw>)`.
#[inline(always)]
fn softmax_backward<S: Simd>(s: S, w: &[f32], dw: &mut [f32]) {
    // A list shorter than a vector still has a dot by narrower ones.
    let dot = if w.len() < S::LANES { dot(Lanes::<4>, w, dw) } else { dot(s, w, dw) };
    for (&w, dw) in w.iter().zip(dw) {
        *dw = w * (*dw - dot);
    }
}

/// [`SelectDims::sub_key`] in 32 bits, whose division is the faster one.
#[inline(always)]
fn sub_key(dims: &SelectDims, id: u32, part: usize) -> usize {
    #[allow(clippy::cast_possible_truncation, reason = "N <= 2^16 where keys have two parts")]
    let n = dims.sub_keys as u32;
    match (dims.parts, part) {
        (1, _) => id as usize,
        (_, 0) => (id / n) as usize,
        _ => (id % n) as usize,
    }
}

struct Call<'a, K> {
    dims: SelectDims,
    keys: &'a K,
    queries: &'a [f32],
    ids: &'a [u32],
    dscores: &'a [f32],
}

impl<K: RowStore + Sync> Call<'_, K> {
    /// For each token, head and part the sum of its keys.
    fn queries_backward(&self, cpu: &Cpu, tokens: usize, dqueries: &mut [f32]) {
        let (dims, c) = (self.dims, self.dims.half_dim);
        let halves = dims.heads * dims.parts;
        let cost = dims.key_entries() * row_cost(c);
        let pieces = dqueries.chunks_mut((tokens * halves * c).max(1)).enumerate();
        cpu.pool.for_each(cost, pieces, |(i, dqueries)| {
            dispatch!(cpu.token, s => {
                for (j, dquery) in dqueries.chunks_exact_mut(c).enumerate() {
                    let (th, part) = (i * tokens * dims.heads + j / dims.parts, j % dims.parts);
                    columns(s, c, &mut QuerySum { call: self, th, part, dquery });
                }
            });
        });
    }

    /// Each half of a head has its owner, who runs through its entries in their order.
    fn keys_backward(&self, cpu: &Cpu, dkeys: &mut [f32], workspace: Scratch<'_, Cpu>) {
        let (dims, c) = (self.dims, self.dims.half_dim);
        let half = dims.sub_keys * c;
        let cost = dims.key_entries() * row_cost(c) + dkeys.len() / 8;
        let workers = workspace.reals.chunks_exact_mut(half).zip(workspace.ids.chunks_exact_mut(dims.sub_keys));
        cpu.pool.for_each_with(cost, dkeys.chunks_exact_mut(half).enumerate(), workers, |worker, (hp, dkeys)| {
            let (sums, counts) = worker;
            let mut owner = KeySum { call: self, head: hp / dims.parts, part: hp % dims.parts, dkeys, sums, counts };
            dispatch!(cpu.token, s => owner.run(s));
        });
    }
}

/// `dquery = Σ dscores · keys` of one token, head and part.
struct QuerySum<'a, 'b, K> {
    call: &'a Call<'b, K>,
    th: usize,
    part: usize,
    dquery: &'a mut [f32],
}

impl<K: RowStore + Sync> Columns for QuerySum<'_, '_, K> {
    #[inline(always)]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        let Call { dims, keys, ids, dscores, .. } = *self.call;
        let bag = self.th * dims.top_k..(self.th + 1) * dims.top_k;
        let head = self.th % dims.heads;
        let mut acc = [s.splat(0.0); NV];
        for (&id, &weight) in ids[bag.clone()].iter().zip(&dscores[bag]) {
            #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
            let row = dims.key_row(head, self.part, sub_key(&dims, id, self.part)) as u32;
            add_row(s, &mut acc, weight, &keys.row(row), col);
        }
        let dquery = &mut self.dquery[col..col + NV * S::LANES];
        for (i, &acc) in acc.iter().enumerate() {
            s.store(acc, &mut dquery[i * S::LANES..]);
        }
    }
}

/// The gradient of the keys of one half of a head: a sum of up to [`CHUNK`] entries for each row, added to `dkeys`
/// when it is full.
struct KeySum<'a, 'b, K> {
    call: &'a Call<'b, K>,
    head: usize,
    part: usize,
    dkeys: &'a mut [f32],
    sums: &'a mut [f32],
    counts: &'a mut [u32],
}

impl<K> KeySum<'_, '_, K> {
    #[inline(always)]
    fn run<S: Simd>(&mut self, s: S) {
        let Call { dims, queries, ids, dscores, .. } = *self.call;
        let (k, c) = (dims.top_k, dims.half_dim);
        self.dkeys.fill(0.0);
        self.sums.fill(0.0);
        self.counts.fill(0);
        for t in 0..dims.tokens {
            let th = t * dims.heads + self.head;
            let query = &queries[(th * dims.parts + self.part) * c..][..c];
            let bag = th * k..(th + 1) * k;
            for (&id, &weight) in ids[bag.clone()].iter().zip(&dscores[bag]) {
                let n = sub_key(&dims, id, self.part);
                let sum = &mut self.sums[n * c..(n + 1) * c];
                columns(s, c, &mut Add { weight, query, sum });
                self.counts[n] += 1;
                if self.counts[n] as usize == CHUNK {
                    self.flush(n);
                    self.sums[n * c..(n + 1) * c].fill(0.0);
                    self.counts[n] = 0;
                }
            }
        }
        // Adding a sum without entries, which is zero, changes no bit: totals started at zero, and are never -0.
        for (dkey, sum) in self.dkeys.iter_mut().zip(&*self.sums) {
            *dkey += sum;
        }
    }

    fn flush(&mut self, n: usize) {
        let c = self.call.dims.half_dim;
        let row = n * c..(n + 1) * c;
        for (dkey, sum) in self.dkeys[row.clone()].iter_mut().zip(&self.sums[row]) {
            *dkey += sum;
        }
    }
}

/// `sum += weight · query`.
struct Add<'a> {
    weight: f32,
    query: &'a [f32],
    sum: &'a mut [f32],
}

impl Columns for Add<'_> {
    #[inline(always)]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        let width = NV * S::LANES;
        let (query, sum) = (&self.query[col..col + width], &mut self.sum[col..col + width]);
        let weight = s.splat(self.weight);
        for i in 0..NV {
            let at = i * S::LANES;
            let product = s.mul(weight, s.load(&query[at..]));
            s.store(s.add(s.load(&sum[at..]), product), &mut sum[at..]);
        }
    }
}
