//! Selection: scores of a tile of tokens as a product into scratch that stays in the cache, then the best of them.

use memlayer_core::ops::select::{Best, Select, SelectBackward, SelectDims, SelectRows, best_pairs, half_candidates};
use memlayer_core::{ArgError, RowStore, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::product::{self, DEPTH, Left, MAX_WIDTH, Panel};
use crate::isa::rows::{BLOCK, as_f32, columns, widen};
use crate::isa::{Simd, dispatch};
use crate::math;
use crate::ops::bag::{Dot, row_cost};
use crate::ops::{piece, select_backward, topk};

/// With fewer tokens the keys are read where they are; with more they are first laid out for the product.
const FEW: usize = 16;

/// Sub-keys that one piece of work scores for few tokens.
const KEYS: usize = 128;

/// How a call is laid out in scratch.
#[derive(Clone, Copy)]
struct Layout {
    dims: SelectDims,
    /// N, up to whole panels of any instruction set.
    padded: usize,
    /// Tokens of a tile.
    tile: usize,
    /// Pairs that can win.
    pairs: usize,
    /// Scalars that all workers share: the keys laid out, or with few tokens all scores.
    shared: usize,
    /// What each worker needs.
    worker: ScratchReq,
}

impl Layout {
    fn new(dims: SelectDims, threads: usize) -> Self {
        let padded = dims.sub_keys.next_multiple_of(MAX_WIDTH);
        // The scores of a half stay in the second cache. No result depends on the tile.
        let share = dims.tokens.div_ceil(2 * threads).next_multiple_of(8);
        let tile = (32 * 1024 / padded.max(1)).clamp(8, 64).min(share) / 8 * 8;
        let tile = tile.max(1);
        let k = dims.top_k;
        let pairs = if dims.parts == 2 { topk::pairs(k).count() } else { 0 };
        let places = topk::work(k, pairs);
        // Three lists of the best, two of candidates; the pairs have a list of ids more.
        let mut worker =
            ScratchReq::new(3 * topk::list(k) + 4 * k + 2 * places, 3 * topk::list(k) + 4 * k + places + pairs);
        let halves = dims.heads * dims.parts;
        let shared = if dims.tokens < FEW {
            dims.tokens * halves * padded
        } else {
            worker.reals += dims.parts * tile * padded;
            halves * padded * dims.half_dim
        };
        Self { dims, padded, tile, pairs, shared, worker }
    }
}

impl<K: RowStore + Sync> SelectRows<K> for Cpu {
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq {
        let layout = Layout::new(dims, self.threads());
        layout.worker.times(self.threads()).and(ScratchReq::new(layout.shared, 0))
    }

    fn select(&self, args: Select<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dims = args.dims;
        scratch.check("select", SelectRows::<K>::select_scratch(self, dims))?;
        let layout = Layout::new(dims, self.threads());
        let (shared, scratch) = scratch.take_reals(layout.shared);
        if dims.tokens < FEW {
            self.score_few(&layout, args.queries, args.keys, shared);
            self.choose_few(&layout, args, shared, scratch);
        } else {
            self.lay_out_keys(&layout, args.keys, shared);
            self.select_tiles(&layout, args, shared, scratch);
        }
        Ok(())
    }

    fn select_backward_scratch(&self, dims: SelectDims, dkeys: bool) -> ScratchReq {
        select_backward::scratch(self, dims, dkeys)
    }

    fn select_backward(&self, args: SelectBackward<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        select_backward::select_backward(self, args, scratch)
    }
}

impl Cpu {
    /// `scores[t, h, p, n] = <query, key>` for few tokens.
    fn score_few<K: RowStore + Sync>(&self, layout: &Layout, queries: &[f32], keys: &K, scores: &mut [f32]) {
        let (dims, c) = (layout.dims, layout.dims.half_dim);
        let halves = dims.heads * dims.parts;
        let cost = dims.tokens * dims.key_rows() * row_cost(c);
        let rows = scores.chunks_mut(layout.padded).enumerate();
        let pieces = rows.flat_map(|(row, scores)| {
            scores[..dims.sub_keys].chunks_mut(KEYS).enumerate().map(move |(i, scores)| (row, i * KEYS, scores))
        });
        self.pool.for_each(cost, pieces, |(row, first, out)| {
            let (vector, first) = (&queries[row * c..(row + 1) * c], row % halves * dims.sub_keys + first);
            #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
            let id = |n: usize| (first + n < keys.rows()).then_some((first + n) as u32);
            dispatch!(self.token, s => columns(s, c, &mut Dot { table: keys, row: id, vector, out }));
        });
    }

    /// The best of what [`Cpu::score_few`] left.
    fn choose_few<K: RowStore>(
        &self,
        layout: &Layout,
        args: Select<'_, Self, K>,
        scores: &mut [f32],
        scratch: Scratch<'_, Self>,
    ) {
        let (dims, k) = (layout.dims, layout.dims.top_k);
        let cost = dims.tokens * dims.heads * (400 + dims.parts * dims.sub_keys / 4);
        let outputs = args.ids.chunks_mut(k).zip(args.scores.chunks_mut(k)).zip(args.weights.chunks_mut(k));
        let items = scores.chunks_mut(dims.parts * layout.padded).zip(outputs);
        self.pool.for_each_with(cost, items, workers(layout, scratch), |worker, (halves, ((ids, scores), weights))| {
            dispatch!(self.token, s => {
                let (first, second) = halves.split_at_mut(layout.padded);
                worker.choose(s, layout, (first, second), (&mut *ids, &mut *scores, &mut *weights));
            });
        });
    }

    /// The keys as panels `[H, P, N / width, C, width]`.
    fn lay_out_keys<K: RowStore + Sync>(&self, layout: &Layout, keys: &K, panels: &mut [f32]) {
        let (n, c) = (layout.dims.sub_keys, layout.dims.half_dim);
        let width = dispatch!(self.token, s => panel_width(s));
        let per_half = layout.padded / width;
        let cost = layout.dims.key_rows() * c;
        self.pool.for_each(cost, panels.chunks_mut(c * width).enumerate(), |(i, panel)| {
            let (half, first) = (i / per_half, i % per_half * width);
            let count = width.min(n.saturating_sub(first));
            dispatch!(self.token, s => lay_out(s, keys, half * n + first, count, c, panel));
        });
    }

    /// Scores and chooses, tile after tile.
    fn select_tiles<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        args: Select<'_, Self, K>,
        panels: &[f32],
        scratch: Scratch<'_, Self>,
    ) {
        let (dims, k) = (layout.dims, layout.dims.top_k);
        let row = dims.heads * k;
        let tiles = args.ids.chunks_mut(layout.tile * row).zip(args.scores.chunks_mut(layout.tile * row));
        let tiles = tiles.zip(args.weights.chunks_mut(layout.tile * row)).enumerate();
        let queries = args.queries;
        self.pool.for_each_with(
            usize::MAX,
            tiles,
            workers(layout, scratch),
            |worker, (i, ((ids, scores), weights))| {
                let tokens = ids.len() / row;
                for h in 0..dims.heads {
                    dispatch!(self.token, s => {
                        worker.score(s, layout, (i * layout.tile, tokens, h), queries, panels);
                        for t in 0..tokens {
                            let bag = t * row + h * k..t * row + (h + 1) * k;
                            let out = (&mut ids[bag.clone()], &mut scores[bag.clone()], &mut weights[bag]);
                            worker.choose_of_tile(s, layout, t, out);
                        }
                    });
                }
            },
        );
    }
}

#[inline(always)]
fn panel_width<S: Simd>(_: S) -> usize {
    product::width::<S>()
}

/// Rows `first..first + count` of the keys as the columns of `panel`, the other columns zero.
#[inline(always)]
fn lay_out<S: Simd, K: RowStore>(_: S, keys: &K, first: usize, count: usize, dim: usize, panel: &mut [f32]) {
    let width = product::width::<S>();
    if count < width {
        panel.fill(0.0);
    }
    for n in 0..count {
        #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
        let row = keys.row((first + n) as u32);
        let mut wide = [0.0; BLOCK];
        for col in (0..dim).step_by(BLOCK) {
            let end = (col + BLOCK).min(dim);
            let to = panel[col * width + n..].iter_mut().step_by(width);
            match as_f32(row.codes) {
                Some(codes) if row.scales.is_empty() => codes[col..end].iter().zip(to).for_each(|(&x, to)| *to = x),
                _ => {
                    widen(row.codes, col, &mut wide[..end - col]);
                    let values = wide.iter().enumerate().map(|(i, &x)| x * row.scale::<f32>((col + i).min(dim - 1)));
                    values.take(end - col).zip(to).for_each(|(x, to)| *to = x);
                }
            }
        }
    }
}

/// A worker's workspace.
struct Worker<'a> {
    /// `[P, tile, N]`.
    tile: &'a mut [f32],
    first: (&'a mut [f32], &'a mut [u32]),
    second: (&'a mut [f32], &'a mut [u32]),
    best: (&'a mut [f32], &'a mut [u32]),
    /// `2K` candidates of each half.
    candidates: (&'a mut [f32], &'a mut [u32]),
    /// The pairs that can win, as `a << 16 | b`.
    pairs: &'a mut [u32],
    work: topk::Work<'a>,
}

fn workers<'a>(layout: &Layout, scratch: Scratch<'a, Cpu>) -> impl Iterator<Item = Worker<'a>> + Send + use<'a> {
    let layout = *layout;
    let reals = scratch.reals.chunks_exact_mut(layout.worker.reals);
    reals.zip(scratch.ids.chunks_exact_mut(layout.worker.ids)).map(move |(reals, ids)| Worker::new(&layout, reals, ids))
}

impl<'a> Worker<'a> {
    fn new(layout: &Layout, mut reals: &'a mut [f32], mut ids: &'a mut [u32]) -> Self {
        let k = layout.dims.top_k;
        let places = topk::work(k, layout.pairs);
        let mut list = |n| (take(&mut reals, n), take(&mut ids, n));
        let (first, second, best) = (list(topk::list(k)), list(topk::list(k)), list(topk::list(k)));
        let candidates = list(4 * k);
        let (work_scores, work_ids) = list(places);
        let work = topk::Work { scores: work_scores, ids: work_ids, ranks: take(&mut reals, places) };
        let pairs = take(&mut ids, layout.pairs);
        if layout.pairs > 0 {
            for (code, (a, b)) in pairs.iter_mut().zip(topk::pairs(k)) {
                #[allow(clippy::cast_possible_truncation, reason = "K <= N <= 2^16 where keys have two parts")]
                {
                    *code = (a << 16 | b) as u32;
                }
            }
        }
        Self { tile: reals, first, second, best, candidates, pairs, work }
    }

    /// The scores of head `h` of `tokens` tokens from `start` on.
    #[inline(always)]
    fn score<S: Simd>(
        &mut self,
        s: S,
        layout: &Layout,
        (start, tokens, h): (usize, usize, usize),
        queries: &[f32],
        panels: &[f32],
    ) {
        let SelectDims { heads, parts, half_dim: c, .. } = layout.dims;
        let (row, width) = (heads * parts * c, product::width::<S>());
        for p in 0..parts {
            let half = h * parts + p;
            let queries = &queries[start * row + half * c..];
            let panels = &panels[half * layout.padded * c..(half + 1) * layout.padded * c];
            let scores = &mut self.tile[p * layout.tile * layout.padded..][..tokens * layout.padded];
            for (j, panel) in panels.chunks_exact(c * width).enumerate() {
                for k in (0..c).step_by(DEPTH) {
                    let left = Left { data: &queries[k..], row, step: 1 };
                    let panel = Panel { data: &panel[k * width..], step: width };
                    let size = (tokens, DEPTH.min(c - k), width);
                    product::multiply(s, size, left, panel, (&mut scores[j * width..], layout.padded), k > 0);
                }
            }
        }
    }

    /// The best of token `t` of the tile.
    #[inline(always)]
    fn choose_of_tile<S: Simd>(&mut self, s: S, layout: &Layout, t: usize, out: (&mut [u32], &mut [f32], &mut [f32])) {
        let tile = core::mem::take(&mut self.tile);
        let (first, second) = tile.split_at_mut(layout.tile * layout.padded);
        let row = t * layout.padded..(t + 1) * layout.padded;
        let second = if layout.dims.parts == 2 { &mut second[row.clone()] } else { second };
        self.choose(s, layout, (&mut first[row], second), out);
        self.tile = tile;
    }

    /// The best K by the scores of both halves, and their softmax.
    #[inline(always)]
    fn choose<S: Simd>(
        &mut self,
        s: S,
        layout: &Layout,
        (first, second): (&mut [f32], &mut [f32]),
        (ids, scores, weights): (&mut [u32], &mut [f32], &mut [f32]),
    ) {
        let (n, k) = (layout.dims.sub_keys, layout.dims.top_k);
        first[n..].fill(f32::NEG_INFINITY);
        let work = &mut self.work;
        if layout.dims.parts == 1 {
            if topk::best(s, first, n, k, (&mut *self.best.0, &mut *self.best.1), work) {
                scores.copy_from_slice(&self.best.0[..k]);
                ids.copy_from_slice(&self.best.1[..k]);
            } else {
                let mut list = Best::new(scores, ids);
                (0..).zip(&first[..n]).for_each(|(i, &score)| list.offer(score, i));
            }
        } else {
            second[n..].fill(f32::NEG_INFINITY);
            let plain = topk::best(s, first, n, k, (&mut *self.first.0, &mut *self.first.1), work)
                & topk::best(s, second, n, k, (&mut *self.second.0, &mut *self.second.1), work);
            if plain {
                self.choose_pairs(s, n, k, ids, scores);
            } else {
                self.try_all_pairs(&first[..n], &second[..n], k, ids, scores);
            }
        }
        softmax(scores, weights);
    }

    /// The best pairs of two lists without NaN and positive infinity.
    #[inline(always)]
    fn choose_pairs<S: Simd>(&mut self, s: S, n: usize, k: usize, ids: &mut [u32], scores: &mut [f32]) {
        let sums = &mut *self.work.scores;
        let mut len = 0;
        for (a, &u) in self.first.0[..k].iter().enumerate() {
            let u = s.splat(u);
            let many = k / (a + 1);
            // Whole vectors; what is too much is overwritten by the next, or filled below.
            for b in (0..many).step_by(S::LANES) {
                s.store(s.add(u, s.load(&self.second.0[b..])), &mut sums[len + b..]);
            }
            len += many;
        }
        let padded = len.next_multiple_of(S::LANES);
        sums[len..padded].fill(f32::NEG_INFINITY);
        let (pairs, best) = (&*self.pairs, (&mut *self.best.0, &mut *self.best.1));
        topk::place(s, &sums[..padded], len, k, |i| pairs[i], best, self.work.ranks);
        scores.copy_from_slice(&self.best.0[..k]);
        for (id, &pair) in ids.iter_mut().zip(&*self.best.1) {
            let (i, j) = (self.first.1[(pair >> 16) as usize], self.second.1[(pair & 0xffff) as usize]);
            // Below 2^32 for every pair of sub-keys: N <= 2^16, so that N itself fits too.
            #[allow(clippy::cast_possible_truncation, reason = "N <= 2^16 where keys have two parts")]
            {
                *id = i * n as u32 + j;
            }
        }
    }

    /// The law in full: NaN and infinities.
    #[cold]
    fn try_all_pairs(&mut self, first: &[f32], second: &[f32], k: usize, ids: &mut [u32], scores: &mut [f32]) {
        let (u, v) = self.candidates.0.split_at_mut(2 * k);
        let (i, j) = self.candidates.1.split_at_mut(2 * k);
        let (a, b) = (half_candidates(first, k, u, i), half_candidates(second, k, v, j));
        best_pairs((&u[..a], &i[..a]), (&v[..b], &j[..b]), first.len(), scores, ids);
    }
}

/// Takes the first `n` places out of a slice.
pub(super) fn take<'a, T>(from: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = core::mem::take(from).split_at_mut(n);
    *from = tail;
    head
}

/// The softmax of `scores` into `weights`, the greatest subtracted first.
#[inline(always)]
fn softmax(scores: &[f32], weights: &mut [f32]) {
    let greatest = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    let mut sum = 0.0;
    for (weights, scores) in weights.chunks_mut(16).zip(scores.chunks(16)) {
        // Always sixteen, for a vector or two: a list is short.
        let mut lanes = [greatest; 16];
        lanes[..scores.len()].copy_from_slice(scores);
        for lane in &mut lanes {
            *lane = math::exp(*lane - greatest);
        }
        for (weight, lane) in weights.iter_mut().zip(lanes) {
            *weight = lane;
            sum += lane;
        }
    }
    for weight in weights {
        *weight /= sum;
    }
}

/// Bags that one piece of work takes in the backward.
pub(super) fn bags_of_piece(dims: &SelectDims) -> usize {
    piece(dims.tokens, dims.heads * dims.parts * dims.top_k * row_cost(dims.half_dim))
}
