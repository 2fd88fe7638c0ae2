//! The way back from the gradient of the weights to those of scores, queries and keys.

use memlayer_core::error::check_ids;
use memlayer_core::ops::plan::CHUNK;
use memlayer_core::ops::select::{SelectBackward, SelectDims};
use memlayer_core::{ArgError, Row, RowStore, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::rows::{Columns, add_row, columns, dot};
use crate::isa::{Lanes, Level, Simd, dispatch};
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
        call.queries_backward(cpu, dqueries);
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
    fn queries_backward(&self, cpu: &Cpu, dqueries: &mut [f32]) {
        let (dims, c) = (self.dims, self.dims.half_dim);
        let halves = dims.heads * dims.parts;
        let cost = dims.key_entries() * row_cost(c);
        // As many tokens as there can be: they read the keys of one half after the other, which so stay near.
        let tokens = dims.tokens.div_ceil(2 * cpu.threads());
        let pieces = dqueries.chunks_mut((tokens * halves * c).max(1)).enumerate();
        cpu.pool.for_each(cost, pieces, |(i, dqueries)| {
            dispatch!(cpu.token, s => for half in 0..halves {
                for (t, dqueries) in dqueries.chunks_exact_mut(halves * c).enumerate() {
                    let (half, dquery) = ((i * tokens + t) * halves + half, &mut dqueries[half * c..(half + 1) * c]);
                    columns(s, c, &mut QuerySum { call: self, half, dquery });
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

/// `dquery = Σ dscores · keys` of one half of a query, of all `[T, H, P]`.
struct QuerySum<'a, 'b, K> {
    call: &'a Call<'b, K>,
    half: usize,
    dquery: &'a mut [f32],
}

impl<K: RowStore + Sync> QuerySum<'_, '_, K> {
    /// The keys of half `half`.
    #[inline(always)]
    fn rows(&self, half: usize) -> impl Iterator<Item = Row<'_, K::Elem>> {
        let Call { dims, keys, ids, .. } = *self.call;
        let (th, part) = (half / dims.parts, half % dims.parts);
        let ids = ids.get(th * dims.top_k..(th + 1) * dims.top_k).unwrap_or(&[]);
        #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
        ids.iter().map(move |&id| keys.row(dims.key_row(th % dims.heads, part, sub_key(&dims, id, part)) as u32))
    }
}

impl<K: RowStore + Sync> Columns for QuerySum<'_, '_, K> {
    #[inline(always)]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        // Those of the next token, while these are summed: the keys of a half may be more than what is near. (2048 sub-keys of 64 values,
        // one core of an AMD EPYC: a third off this sum; with 256 sub-keys as long as without.)
        if col == 0 {
            let halves = self.call.dims.heads * self.call.dims.parts;
            self.rows(self.half + halves).for_each(|row| s.prefetch_all(Level::Second, row.codes));
        }
        let mut acc = [s.splat(0.0); NV];
        let Call { dims, dscores, .. } = *self.call;
        let weights = &dscores[self.half / dims.parts * dims.top_k..][..dims.top_k];
        for (row, &weight) in self.rows(self.half).zip(weights) {
            add_row(s, &mut acc, weight, &row, col);
        }
        let dquery = &mut self.dquery[col..col + NV * S::LANES];
        for (i, &acc) in acc.iter().enumerate() {
            s.store(acc, &mut dquery[i * S::LANES..]);
        }
    }
}

/// The gradient of the keys of one half of a head: for each row the sum of its first [`CHUNK`] entries in `dkeys`, to which those of
/// the next, in `sums`, are added.
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
        // All of it in order, which brings it near: rows that their first entry started took twice as long (2048 sub-keys).
        self.dkeys.fill(0.0);
        self.counts.fill(0);
        for t in 0..dims.tokens {
            let th = t * dims.heads + self.head;
            let query = &queries[(th * dims.parts + self.part) * c..][..c];
            let bag = th * k..(th + 1) * k;
            for (&id, &weight) in ids[bag.clone()].iter().zip(&dscores[bag]) {
                let n = sub_key(&dims, id, self.part);
                let (row, count) = (n * c..(n + 1) * c, self.counts[n] as usize);
                self.counts[n] += 1;
                let sum = if count < CHUNK {
                    &mut self.dkeys[row]
                } else {
                    if count.is_multiple_of(CHUNK) {
                        self.end_chunk(n, count);
                    }
                    &mut self.sums[row]
                };
                columns(s, c, &mut Add { weight, query, sum });
            }
        }
        for n in 0..dims.sub_keys {
            self.end_chunk(n, self.counts[n] as usize);
        }
    }

    /// Adds the sum of the last chunk of row `n`, which has `count` entries, and starts one from zero. That of the first is in its
    /// place: zero and a sum are the sum, for one that starts at zero is never -0.
    fn end_chunk(&mut self, n: usize, count: usize) {
        let c = self.call.dims.half_dim;
        if count > CHUNK {
            for (dkey, sum) in self.dkeys[n * c..(n + 1) * c].iter_mut().zip(&self.sums[n * c..(n + 1) * c]) {
                *dkey += sum;
            }
        }
        if count >= CHUNK {
            self.sums[n * c..(n + 1) * c].fill(0.0);
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
