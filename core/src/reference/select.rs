//! Selection by scoring every sub-key and trying every pair of candidates.

use crate::config::Config;
use crate::device::{Scratch, ScratchReq};
use crate::element::Real;
use crate::error::{ArgError, check_ids};
use crate::ops::plan::{PlanBuffers, RowGradient, RowReduce};
use crate::ops::select::{Best, Select, SelectBackward, SelectDims, SelectRows, best_pairs, half_candidates, softmax};
use crate::reference::plan::row_sum;
use crate::reference::{Reference, rows, rows_mut};
use crate::storage::RowStore;

impl<F: Real> Reference<F> {
    /// What [`crate::layer::forward_scratch`] says for this device, also in `const` contexts: a `static` for firmware.
    /// It does not depend on the number of tokens.
    #[must_use]
    pub const fn forward_scratch(config: &Config) -> ScratchReq {
        scratch_req(config.sub_keys(), config.top_k())
    }
}

/// The scores of a half, and the candidates of both.
const fn scratch_req(sub_keys: usize, top_k: usize) -> ScratchReq {
    ScratchReq::new(sub_keys, 0).and(ScratchReq::new(4, 4).times(top_k))
}

impl<F: Real, K: RowStore> SelectRows<K> for Reference<F> {
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq {
        scratch_req(dims.sub_keys, dims.top_k)
    }

    fn select(&self, args: Select<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dims = args.dims;
        scratch.check("select", SelectRows::<K>::select_scratch(self, dims))?;
        let k = dims.top_k;
        let (half, scratch) = scratch.take_reals(dims.sub_keys);
        let (first, scratch) = scratch.take_reals(2 * k);
        let (second, scratch) = scratch.take_reals(2 * k);
        let (first_ids, scratch) = scratch.take_ids(2 * k);
        let (second_ids, _) = scratch.take_ids(2 * k);

        let bags = rows_mut(args.ids, k).zip(rows_mut(args.scores, k)).zip(rows_mut(args.weights, k));
        let queries = rows(args.queries, dims.parts * dims.half_dim);
        for (h, (query, ((ids, scores), weights))) in (0..dims.heads).cycle().zip(queries.zip(bags)) {
            let (query, other) = query.split_at(dims.half_dim.min(query.len()));
            score_half(&dims, args.keys, h, 0, query, half);
            if dims.parts == 1 {
                let mut best = Best::new(scores, ids);
                for (n, &score) in (0u32..).zip(half.iter()) {
                    best.offer(score, n);
                }
            } else {
                let a = half_candidates(half, k, first, first_ids);
                score_half(&dims, args.keys, h, 1, other, half);
                let b = half_candidates(half, k, second, second_ids);
                best_pairs(filled(first, first_ids, a), filled(second, second_ids, b), dims.sub_keys, scores, ids);
            }
            softmax(scores, weights);
        }
        Ok(())
    }

    fn select_backward_scratch(&self, dims: SelectDims, dkeys: bool) -> ScratchReq {
        let entries = dims.key_entries();
        if dkeys {
            ScratchReq::new(entries, entries + PlanBuffers::<Self>::ids_len(entries)).and(self.plan_scratch(entries))
        } else {
            ScratchReq::EMPTY
        }
    }

    fn select_backward(&self, args: SelectBackward<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dims = args.dims;
        check_ids("select_backward", args.ids, dims.sub_keys.pow(if dims.parts == 2 { 2 } else { 1 }))?;
        let dkeys = args.dkeys.is_some();
        scratch.check("select_backward", SelectRows::<K>::select_backward_scratch(self, dims, dkeys))?;

        let k = dims.top_k;
        for (w, dw) in args.weights.chunks_exact(k).zip(args.dweights.chunks_exact_mut(k)) {
            softmax_backward(w, dw);
        }
        if let Some(dqueries) = args.dqueries {
            for (i, dq) in dqueries.chunks_exact_mut(dims.half_dim).enumerate() {
                let (th, p) = (i / dims.parts, i % dims.parts);
                dq.fill(F::zero());
                for e in th * k..(th + 1) * k {
                    let key = args.keys.row(row_id(&dims, th, p, args.ids[e]));
                    for (c, dq) in dq.iter_mut().enumerate() {
                        *dq += args.dweights[e] * key.scale(c) * key.code(c);
                    }
                }
            }
        }
        let Some(dkeys) = args.dkeys else { return Ok(()) };

        // The keys are a table like any other: their gradient is a sum over the entries of each row.
        let entries = dims.key_entries();
        let (weights, scratch) = scratch.take_reals(entries);
        let (rows, scratch) = scratch.take_ids(entries);
        for e in 0..entries {
            let (thp, slot) = (e / k, e % k);
            let (th, p) = (thp / dims.parts, thp % dims.parts);
            rows[e] = row_id(&dims, th, p, args.ids[th * k + slot]);
            weights[e] = args.dweights[th * k + slot];
        }
        let (mut buffers, ids) = PlanBuffers::<Self>::carve(scratch.ids, entries)?;
        self.plan(rows, dims.key_rows(), buffers.reborrow(), Scratch { reals: scratch.reals, ids })?;
        let plan = buffers.plan();
        let gradient = RowGradient { bag: k, dim: dims.half_dim, weights: &*weights, sources: args.queries };
        dkeys.fill(F::zero());
        for u in 0..plan.unique[0] as usize {
            let row = plan.rows[u] as usize * dims.half_dim;
            row_sum(&plan, &gradient, u, &mut dkeys[row..row + dims.half_dim]);
        }
        Ok(())
    }
}

/// The first `len` candidates.
fn filled<'a, F>(scores: &'a [F], ids: &'a [u32], len: usize) -> (&'a [F], &'a [u32]) {
    (scores.get(..len).unwrap_or_default(), ids.get(..len).unwrap_or_default())
}

/// The key-table row of part `p` of slot `id`, read by token and head `th`.
fn row_id(dims: &SelectDims, th: usize, p: usize, id: u32) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
    let row = dims.key_row(th % dims.heads, p, dims.sub_key(id, p)) as u32;
    row
}

/// `half[n] = <query, sub-key n of part p of head h>`.
fn score_half<F: Real, K: RowStore>(dims: &SelectDims, keys: &K, h: usize, p: usize, query: &[F], half: &mut [F]) {
    for (n, score) in half.iter_mut().enumerate() {
        #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
        let key = keys.get(dims.key_row(h, p, n) as u32);
        let mut sum = F::zero();
        if let Some(key) = key {
            for (c, &q) in query.iter().enumerate() {
                sum += q * key.value(c);
            }
        }
        *score = sum;
    }
}

/// `dw`, the gradient of softmax weights `w`, becomes that of the scores: `w · (dw - <w, dw>)`.
fn softmax_backward<F: Real>(w: &[F], dw: &mut [F]) {
    let mut dot = F::zero();
    for (&w, &dw) in w.iter().zip(dw.iter()) {
        dot += w * dw;
    }
    for (&w, dw) in w.iter().zip(dw) {
        *dw = w * (*dw - dot);
    }
}
