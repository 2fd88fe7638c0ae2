//! Selection: scores of a tile of tokens as a product into scratch that stays in the cache, then the best of them.

use core::array;

use memlayer_core::element::Format;
use memlayer_core::ops::select::{Select, SelectBackward, SelectDims, SelectRows};
use memlayer_core::{ArgError, Element, RowStore, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::int8::{self, Int8, MAX_DIM, ROWS};
use crate::isa::product::{self, DEPTH, Left, MAX_WIDTH, Panel};
use crate::isa::rows::{BLOCK, as_f32, columns, widen};
use crate::isa::{Level, Simd, dispatch};
use crate::ops::bag::{Dot, row_cost};
use crate::ops::choose::{Bag, Choice, Chooser, Half};
use crate::ops::coarse::{self, Bounds, Buffer, Coarse};
use crate::ops::panels::{PanelDims, Panels};
use crate::ops::select_backward;
use crate::ops::turned::{self, Turned};

/// With fewer tokens the keys are read where they are; with more they are first laid out for the product.
const FEW: usize = 16;

/// Sub-keys that one piece of work scores for few tokens.
const KEYS: usize = 512;

/// How many times as many sub-keys as leaders make coarse scores worth it, and how many products of a query with all sub-keys of a half:
/// else it takes longer to make integers and to score again. (One core of an AMD EPYC, 256 tokens, with and without, ms: K = 32, 256
/// sub-keys of 64 values, int8 that are laid out 1.19 and 1.51, f32 1.27 and 1.35; 512 of f32 1.60 and 2.09; 512 of 16 1.20 and 1.43. K = 8,
/// f32, 128 of 64 0.80 and 0.76, 512 of 16 0.96 and 0.91, 256 of 64 0.99 and 1.12.)
const MANY: usize = 8;
const PRODUCTS: usize = 8 * 1024;

/// Whether sub-keys are scored coarsely where there are products of integers. For few tokens each product is an effort.
fn coarse_pays(choice: Choice, half_dim: usize, tokens: usize) -> bool {
    half_dim <= MAX_DIM && choice.has_many(MANY) && (tokens < SOME || choice.sub_keys * half_dim > PRODUCTS)
}

/// With fewer tokens sub-keys that are not integers are not made such: it is as much work as to score some tokens. (32 tokens, 1024
/// sub-keys of f32: 0.48 ms, coarsely 0.56; 64 tokens 0.96 and 0.82.)
const SOME: usize = 64;

/// Scalars of a cache line: scores that begin with one are read in vectors that each lie in one. Selection among 1024 sub-keys
/// of int8 is 2 to 6 % faster for it on an AMD EPYC.
const LINE: usize = 16;

/// Scratch from where a cache line begins on.
pub(super) fn from_line(scratch: Scratch<'_, Cpu>) -> Scratch<'_, Cpu> {
    let (reals, ids) = (scratch.reals.as_ptr().align_offset(64), scratch.ids.as_ptr().align_offset(64));
    scratch.take_reals(reals.min(LINE)).1.take_ids(ids.min(LINE)).1
}

/// In whole lines.
fn lines(req: ScratchReq) -> ScratchReq {
    ScratchReq::new(req.reals.next_multiple_of(LINE), req.ids.next_multiple_of(LINE))
}

/// What a worker needs that scores coarsely: the scores of some tokens, and their queries as integers.
fn coarse_worker(dims: SelectDims, padded: usize) -> ScratchReq {
    ScratchReq::new(dims.parts * ROWS * padded, ROWS * int8::left_len(dims.half_dim))
}

/// How the sub-keys are scored.
#[derive(Clone, Copy)]
enum Way {
    /// Where they lie, for few tokens: in `f32`, or coarsely where they are int8.
    Few,
    /// Where they lie, for some tokens at a time.
    Turned(Turned),
    /// As a product of matrices in `f32`.
    Product,
    /// As a product of matrices of integers, coarsely.
    Coarse(Int8),
}

/// How a call is laid out in scratch.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    dims: SelectDims,
    choice: Choice,
    way: Way,
    /// N, up to whole panels of any instruction set.
    padded: usize,
    /// Tokens of a tile.
    tile: usize,
    /// What all workers share: with few tokens all scores and the bounds of their pieces, else the keys laid out, and
    /// if they are coarse their scales and bounds.
    shared: ScratchReq,
    /// What each worker needs.
    worker: ScratchReq,
}

impl Layout {
    fn new(dims: SelectDims, keys: Format, cpu: &Cpu) -> Self {
        let SelectDims { tokens, parts, sub_keys, half_dim, top_k, .. } = dims;
        let padded = sub_keys.next_multiple_of(MAX_WIDTH);
        let choice = Choice { parts, sub_keys, top_k };
        // Sub-keys that are integers need not be made such for each call.
        let as_they_lie = keys == Format::Int8 && cpu.int8.is_some();
        if tokens >= if as_they_lie { FEW } else { SOME }
            && let Some(coarse) = Self::coarse(dims, cpu)
        {
            return Self { shared: lines(PanelDims::new(dims).scratch()), ..coarse };
        }
        let way = match tokens {
            _ if turned::TOKENS.contains(&tokens) && !as_they_lie => Way::Turned(Turned::new(dims, cpu.threads())),
            ..FEW => Way::Few,
            _ => Way::Product,
        };
        let halves = dims.heads * parts;
        let choosing = choice.scratch();
        let (tile, shared, worker) = match way {
            Way::Few => {
                let shared = tokens * halves * (padded + Bounds::LEN * sub_keys.div_ceil(KEYS));
                (1, ScratchReq::new(shared, 0), choosing)
            }
            Way::Turned(turned) => (1, turned.shared(), turned.worker().and(choosing)),
            _ => {
                // The scores of a half stay in the second cache. No result depends on the tile.
                let share = tokens.div_ceil(2 * cpu.threads()).next_multiple_of(8);
                let tile = ((32 * 1024 / padded.max(1)).clamp(8, 64).min(share) / 8 * 8).max(1);
                let worker = ScratchReq::new(parts * tile * padded, 0);
                (tile, ScratchReq::new(halves * padded * half_dim, 0), worker.and(choosing))
            }
        };
        Self { dims, choice, way, padded, tile, shared: lines(shared), worker: lines(worker) }
    }

    /// For coarse scores by panels that lie elsewhere, where these are worth it.
    pub(super) fn coarse(dims: SelectDims, cpu: &Cpu) -> Option<Self> {
        let SelectDims { tokens, parts, sub_keys, half_dim, top_k, .. } = dims;
        let choice = Choice { parts, sub_keys, top_k };
        let int8 = cpu.int8.filter(|_| coarse_pays(choice, half_dim, tokens))?;
        let padded = sub_keys.next_multiple_of(MAX_WIDTH);
        // Few tokens are for all threads too. No result depends on the tile.
        let few = tokens.div_ceil(cpu.threads());
        let tile =
            if few <= ROWS { few.max(1) } else { tokens.div_ceil(2 * cpu.threads()).next_multiple_of(ROWS).min(256) };
        let worker = lines(coarse_worker(dims, padded).and(choice.scratch()));
        Some(Self { dims, choice, way: Way::Coarse(int8), padded, tile, shared: ScratchReq::default(), worker })
    }

    /// What a call needs, wherever its scratch begins.
    pub(super) fn scratch(&self, threads: usize) -> ScratchReq {
        self.worker.times(threads).and(self.shared).and(ScratchReq::new(LINE, LINE))
    }

    /// The scores of one token that begin at `start` in those of each half; flat keys have no second.
    fn of_token<'a>(
        &self,
        (first, second): (&'a mut [f32], &'a mut [f32]),
        start: usize,
    ) -> (&'a mut [f32], &'a mut [f32]) {
        let at = start..start + self.padded;
        let second = if self.dims.parts == 2 { &mut second[at.clone()] } else { &mut [] };
        (&mut first[at], second)
    }

    /// What each worker has: the scores of a tile or the integers of queries, and the rest for choosing.
    fn workers<'a>(
        self,
        scratch: Scratch<'a, Cpu>,
    ) -> impl Iterator<Item = (&'a mut [f32], &'a mut [u32], Chooser<'a>)> + Send + use<'a> {
        let choosing = self.choice.scratch();
        let (reals, ids) = (self.worker.reals - choosing.reals, self.worker.ids - choosing.ids);
        let all = scratch.reals.chunks_exact_mut(self.worker.reals).zip(scratch.ids.chunks_exact_mut(self.worker.ids));
        all.map(move |(all_reals, all_ids)| {
            let ((scores, reals), (codes, ids)) = (all_reals.split_at_mut(reals), all_ids.split_at_mut(ids));
            (scores, codes, Chooser::new(self.choice, Scratch { reals, ids }))
        })
    }
}

impl<K: RowStore + Sync> SelectRows<K> for Cpu {
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq {
        Layout::new(dims, K::Elem::FORMAT, self).scratch(self.threads())
    }

    fn select(&self, args: Select<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dims = args.dims;
        scratch.check("select", SelectRows::<K>::select_scratch(self, dims))?;
        let layout = Layout::new(dims, K::Elem::FORMAT, self);
        let scratch = from_line(scratch);
        let (shared, scratch) = scratch.take_reals(layout.shared.reals);
        let (shared_ids, scratch) = scratch.take_ids(layout.shared.ids);
        match layout.way {
            Way::Few => self.select_few(&layout, args, shared, scratch),
            Way::Turned(turned) if turned.by_head => self.select_heads(&layout, turned, args, scratch),
            Way::Turned(turned) => self.select_turned(&layout, turned, args, shared, scratch),
            Way::Product => {
                self.lay_out_keys(&layout, args.keys, shared);
                self.select_tiles(&layout, args, shared, scratch);
            }
            Way::Coarse(int8) => {
                let (dims, codes) = (PanelDims::new(dims), shared_ids);
                let (scales, bounds) = shared.split_at_mut(dims.halves * layout.padded);
                self.lay_out_codes(dims, int8, args.keys, (&mut *codes, &mut *scales, &mut *bounds));
                self.select_coarse(&layout, args, Panels { int8, dims, codes, scales, bounds }, scratch);
            }
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
    /// Few tokens: all scores first, by every worker.
    fn select_few<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        args: Select<'_, Self, K>,
        shared: &mut [f32],
        scratch: Scratch<'_, Self>,
    ) {
        let dims = layout.dims;
        let (scores, bounds) = shared.split_at_mut(dims.tokens * dims.heads * dims.parts * layout.padded);
        let many = coarse_pays(layout.choice, dims.half_dim, dims.tokens);
        let packed = many && coarse::lie_as_int8(args.keys, dims.key_rows());
        if let (Some(int8), true) = (self.int8, packed) {
            self.score_few_coarsely(layout, int8, args.queries, args.keys, (&mut *scores, &mut *bounds));
            self.choose_few(layout, args, scores, Some(bounds), scratch);
        } else {
            self.score_few(layout, args.queries, args.keys, scores);
            self.choose_few(layout, args, scores, None, scratch);
        }
    }

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
            self.score(keys, first, vector, out);
        });
    }

    /// The same with int8 sub-keys, coarsely, and the bounds `[T, H, P, N / KEYS]` of the pieces.
    fn score_few_coarsely<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        int8: Int8,
        queries: &[f32],
        keys: &K,
        (scores, bounds): (&mut [f32], &mut [f32]),
    ) {
        let (dims, c) = (layout.dims, layout.dims.half_dim);
        let halves = dims.heads * dims.parts;
        let cost = dims.tokens * dims.key_rows() * row_cost(c) / 8;
        let pieces_of_row = dims.sub_keys.div_ceil(KEYS);
        let rows = scores.chunks_mut(layout.padded).zip(bounds.chunks_mut(pieces_of_row * Bounds::LEN)).enumerate();
        let pieces = rows.flat_map(|(row, (scores, bounds))| {
            let pieces = scores[..dims.sub_keys].chunks_mut(KEYS).zip(bounds.chunks_mut(Bounds::LEN));
            pieces.enumerate().map(move |(i, (scores, bounds))| (row, i * KEYS, scores, bounds))
        });
        self.pool.for_each(cost, pieces, |(row, first, out, bounds)| {
            let (vector, first) = (&queries[row * c..(row + 1) * c], row % halves * dims.sub_keys + first);
            #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
            let Some(keys) = keys.run(first as u32, out.len()) else { return };
            let codes = bytemuck::cast_slice(keys.codes);
            coarse::score_rows(self.token, int8, (codes, keys.scales), vector, out).store(bounds);
        });
    }

    /// The best of what [`Cpu::score_few`] left, or with `bounds` what [`Cpu::score_few_coarsely`] did.
    fn choose_few<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        args: Select<'_, Self, K>,
        scores: &mut [f32],
        bounds: Option<&mut [f32]>,
        scratch: Scratch<'_, Self>,
    ) {
        let (dims, k, c) = (layout.dims, layout.dims.top_k, layout.dims.half_dim);
        let cost = dims.tokens * dims.heads * (400 + dims.parts * dims.sub_keys / 4);
        let bags = bags(k, args.ids, args.scores, args.weights);
        let items = scores.chunks_mut(dims.parts * layout.padded).zip(bags).enumerate();
        let bounds = bounds.as_deref();
        let bounds_of_row = dims.sub_keys.div_ceil(KEYS) * Bounds::LEN;
        self.pool.for_each_with(cost, items, layout.workers(scratch), |(_, _, chooser), (th, (halves, mut bag))| {
            let scores = halves.split_at_mut(layout.padded);
            let Some(bounds) = bounds else { return chooser.choose(self.token, scores, &mut bag) };
            let half = |p: usize| {
                let row = th * dims.parts + p;
                let query = &args.queries[row * c..(row + 1) * c];
                let keys = Bounds::load(&bounds[row * bounds_of_row..(row + 1) * bounds_of_row]);
                let coarse = Buffer::new().quantize(self.token, query).0.coarse(c, keys);
                Half { query, first: dims.key_row(th % dims.heads, p, 0), coarse }
            };
            self.choose_or_score(chooser, args.keys, [half(0), half(dims.parts - 1)], scores, &mut bag);
        });
    }

    /// Some tokens, head after head: who scores one chooses from its scores, which so stay near.
    fn select_heads<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        turned: Turned,
        args: Select<'_, Self, K>,
        scratch: Scratch<'_, Self>,
    ) {
        let SelectDims { tokens, heads, parts, sub_keys, half_dim: c, top_k: k } = args.dims;
        let mut rows = bags(heads * k, args.ids, args.scores, args.weights);
        let mut rows: [_; turned::MOST] =
            array::from_fn(|_| rows.next().map(|row| bags(k, row.ids, row.scores, row.weights)));
        let mut bags_of_head = move || -> [_; turned::MOST] { array::from_fn(|t| rows[t].as_mut()?.next()) };
        let pieces = (0..heads).map(|h| (h, bags_of_head()));
        let cost = tokens * heads * (400 + parts * sub_keys * (4 + c) / 16);
        self.pool.for_each_with(cost, pieces, layout.workers(scratch), |(scores, _, chooser), (h, mut bags)| {
            let (scores, worker) = scores.split_at_mut(parts * turned.scores());
            for (p, scores) in scores.chunks_exact_mut(turned.scores()).enumerate() {
                self.score_half(&turned, args.queries, args.keys, h * parts + p, worker, scores);
            }
            let (first, second) = scores.split_at_mut(turned.scores());
            for (t, bag) in bags.iter_mut().flatten().enumerate() {
                let scores = layout.of_token((&mut *first, &mut *second), t * turned.stride());
                chooser.choose(self.token, scores, bag);
            }
        });
    }

    /// Some tokens: all scores first, by every worker.
    fn select_turned<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        turned: Turned,
        args: Select<'_, Self, K>,
        shared: &mut [f32],
        mut scratch: Scratch<'_, Self>,
    ) {
        let dims = layout.dims;
        let workers = layout.workers(scratch.reborrow()).map(|(scores, ..)| scores);
        self.score_turned(&turned, args.queries, args.keys, shared, workers);
        let shared = &*shared;
        let bags = bags(dims.top_k, args.ids, args.scores, args.weights).enumerate();
        let cost = dims.tokens * dims.heads * (400 + dims.parts * dims.sub_keys / 4);
        self.pool.for_each_with(cost, bags, layout.workers(scratch), |(scores, _, chooser), (th, mut bag)| {
            let (t, h) = (th / dims.heads, th % dims.heads);
            for (p, scores) in scores.chunks_exact_mut(layout.padded).take(dims.parts).enumerate() {
                turned.gather(shared, h * dims.parts + p, t, &mut scores[..dims.sub_keys]);
            }
            let scores = layout.of_token(scores.split_at_mut(layout.padded), 0);
            chooser.choose(self.token, scores, &mut bag);
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
        let Select { dims, queries, .. } = args;
        let row = dims.heads * dims.top_k;
        let tiles = bags(layout.tile * row, args.ids, args.scores, args.weights).enumerate();
        self.pool.for_each_with(usize::MAX, tiles, layout.workers(scratch), |(scores, _, chooser), (i, mut tile)| {
            let tokens = tile.ids.len() / row;
            for h in 0..dims.heads {
                self.score_tile(layout, (i * layout.tile, tokens, h), queries, panels, scores);
                let (first, second) = scores.split_at_mut(layout.tile * layout.padded);
                for t in 0..tokens {
                    let scores = layout.of_token((&mut *first, &mut *second), t * layout.padded);
                    let bag = &mut tile.part(t * dims.heads + h, dims.top_k);
                    chooser.choose(self.token, scores, bag);
                }
            }
        });
    }

    /// Scores coarsely and chooses, a few tokens at a time, so that their scores stay near; a head at a time, so that
    /// its sub-keys do.
    pub(super) fn select_coarse<K: RowStore + Sync>(
        &self,
        layout: &Layout,
        args: Select<'_, Self, K>,
        panels: Panels<'_>,
        scratch: Scratch<'_, Self>,
    ) {
        let Select { dims, queries, keys: table, .. } = args;
        let c = dims.half_dim;
        // The heads of a token lie one after the other: where a piece is no more than a token, each can be one.
        let heads = if layout.tile == 1 { 1 } else { dims.heads };
        let row = heads * dims.top_k;
        let tiles = bags(layout.tile * row, args.ids, args.scores, args.weights).enumerate();
        let cost = dims.tokens * dims.heads * (1000 + dims.parts * dims.sub_keys * (16 + c) / 64);
        self.pool.for_each_with(cost, tiles, layout.workers(scratch), |(scores, codes, chooser), (i, mut tile)| {
            let (start, head, tokens) =
                (i * heads / dims.heads * layout.tile, i * heads % dims.heads, tile.ids.len() / row);
            let (first, second) = scores.split_at_mut(ROWS * layout.padded);
            let mut buffer = Buffer::new();
            for h in head..head + heads {
                let bounds = [0, dims.parts - 1].map(|p| panels.bounds(h * dims.parts + p));
                for from in (0..tokens).step_by(ROWS) {
                    let count = ROWS.min(tokens - from);
                    let query = |t: usize, p: usize| {
                        let at = ((start + from + t) * dims.heads + h) * dims.parts + p;
                        &queries[at * c..(at + 1) * c]
                    };
                    // The queries of the next tokens: they are too far apart for the processor to see what comes.
                    let next = from + count..(from + 2 * count).min(tokens);
                    dispatch!(self.token, s => for t in next {
                        let at = ((start + t) * dims.heads + h) * dims.parts * c;
                        s.prefetch_all(Level::First, &queries[at..at + dims.parts * c]);
                    });
                    let mut coarse = [[Coarse::NONE; ROWS]; 2];
                    for (p, out) in [&mut *first, &mut *second].into_iter().take(dims.parts).enumerate() {
                        let queries: [&[f32]; ROWS] = array::from_fn(|t| query(t.min(count - 1), p));
                        let half = (h * dims.parts + p, bounds[p]);
                        coarse[p] = panels.score(self.token, half, &queries[..count], (&mut buffer, codes), out);
                    }
                    let [a, b] = coarse;
                    for (t, (a, b)) in a.into_iter().zip(b).take(count).enumerate() {
                        let half = |p: usize, coarse| Half { query: query(t, p), first: dims.key_row(h, p, 0), coarse };
                        let halves = [half(0, a), half(dims.parts - 1, b)];
                        let scores = layout.of_token((&mut *first, &mut *second), t * layout.padded);
                        let bag = &mut tile.part((from + t) * heads + h - head, dims.top_k);
                        self.choose_or_score(chooser, table, halves, scores, bag);
                    }
                }
            }
        });
    }

    /// Chooses by coarse scores, or by all of them where those do not tell.
    fn choose_or_score<K: RowStore>(
        &self,
        chooser: &mut Chooser<'_>,
        keys: &K,
        halves: [Half<'_>; 2],
        (first, second): (&mut [f32], &mut [f32]),
        bag: &mut Bag<'_>,
    ) {
        if chooser.choose_coarse(self.token, keys, halves, (&mut *first, &mut *second), bag) {
            return;
        }
        for (half, scores) in halves.iter().zip([&mut *first, &mut *second]).filter(|(_, scores)| !scores.is_empty()) {
            self.score(keys, half.first, half.query, &mut scores[..chooser.sub_keys()]);
        }
        chooser.choose(self.token, (first, second), bag);
    }

    /// The scores of rows `first..` of the keys.
    fn score<K: RowStore>(&self, keys: &K, first: usize, vector: &[f32], out: &mut [f32]) {
        let left = keys.rows() - first;
        #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
        let row = |n: usize| (n < left).then_some((first + n) as u32);
        // One after the other: the processor sees what comes next.
        let mut dot = Dot { table: keys, row, vector, out, far: false };
        dispatch!(self.token, s => columns(s, vector.len(), &mut dot));
    }

    /// The scores `[P, tile, N]` of head `h` of `tokens` tokens from `start` on.
    fn score_tile(
        &self,
        layout: &Layout,
        (start, tokens, h): (usize, usize, usize),
        queries: &[f32],
        panels: &[f32],
        scores: &mut [f32],
    ) {
        let SelectDims { heads, parts, half_dim: c, .. } = layout.dims;
        let row = heads * parts * c;
        for p in 0..parts {
            let half = h * parts + p;
            let queries = &queries[start * row + half * c..];
            let panels = &panels[half * layout.padded * c..(half + 1) * layout.padded * c];
            let scores = &mut scores[p * layout.tile * layout.padded..][..tokens * layout.padded];
            dispatch!(self.token, s => {
                let width = panel_width(s);
                for (j, panel) in panels.chunks_exact(c * width).enumerate() {
                    for k in (0..c).step_by(DEPTH) {
                        let left = Left { data: &queries[k..], row, step: 1 };
                        let panel = Panel { data: &panel[k * width..], step: width };
                        let size = (tokens, DEPTH.min(c - k), width);
                        product::multiply(s, size, left, panel, (&mut scores[j * width..], layout.padded), k > 0);
                    }
                }
            });
        }
    }
}

/// The outputs in pieces of `n` places.
fn bags<'a>(
    n: usize,
    ids: &'a mut [u32],
    scores: &'a mut [f32],
    weights: &'a mut [f32],
) -> impl Iterator<Item = Bag<'a>> + Send + use<'a> {
    let outputs = ids.chunks_mut(n).zip(scores.chunks_mut(n)).zip(weights.chunks_mut(n));
    outputs.map(|((ids, scores), weights)| Bag { ids, scores, weights })
}

#[inline(always)]
fn panel_width<S: Simd>(_: S) -> usize {
    product::width::<S>()
}

/// Rows `first..first + count` of the keys as the columns of `panel`, the other columns zero.
#[inline(always)]
fn lay_out<S: Simd, K: RowStore>(s: S, keys: &K, first: usize, count: usize, dim: usize, panel: &mut [f32]) {
    let width = product::width::<S>();
    #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
    let run = keys.run(first as u32, count).filter(|run| run.scales.is_empty());
    if let Some(codes) = run.and_then(|run| as_f32(run.codes)) {
        return product::transpose(s, codes, dim, count, dim, panel);
    }
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
