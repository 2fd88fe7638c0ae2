//! Scores of some tokens: too few to lay out the sub-keys for a product, which would take longer than the product. So the
//! tokens are laid out, as its columns, and the sub-keys are read where they lie.

use memlayer_core::ops::select::SelectDims;
use memlayer_core::{Element, Row, RowStore, ScratchReq};

use crate::Cpu;
use crate::isa::product::{self, DEPTH, Left, MAX_WIDTH, Panel};
use crate::isa::rows::{as_f32, widen};
use crate::isa::{Simd, Token, dispatch};

/// Sub-keys that one piece of work scores.
const KEYS: usize = 128;

/// Tokens for which this is faster than reading the sub-keys for each, and than laying them out.
pub(super) const TOKENS: core::ops::RangeInclusive<usize> = 6..=MOST;
/// The most of them.
pub(super) const MOST: usize = 64;

/// How some tokens are scored.
#[derive(Clone, Copy)]
pub(super) struct Turned {
    dims: SelectDims,
    /// Whoever scores a head chooses from its scores, which so stay near: where there is work for everyone in that. Else all
    /// score all heads first.
    pub(super) by_head: bool,
    /// T, up to whole vectors of any instruction set.
    tokens: usize,
    /// Pieces of a half.
    pieces: usize,
}

impl Turned {
    pub(super) fn new(dims: SelectDims, threads: usize) -> Self {
        let tokens = dims.tokens.next_multiple_of(MAX_WIDTH / 2);
        Self { dims, by_head: dims.heads.is_multiple_of(threads), tokens, pieces: dims.sub_keys.div_ceil(KEYS) }
    }

    fn halves(&self) -> usize {
        self.dims.heads * self.dims.parts
    }

    /// Scalars of the laid out queries of a half, `[panels, C, width]`, whatever the width.
    fn columns(&self) -> usize {
        self.dims.half_dim * self.dims.tokens.next_multiple_of(MAX_WIDTH)
    }

    /// From the scores of a token to those of the next, where one worker has those of a head, `[P, tokens, stride]`.
    pub(super) fn stride(&self) -> usize {
        self.pieces * KEYS
    }

    /// Scalars of the scores of a half.
    pub(super) fn scores(&self) -> usize {
        self.tokens * self.stride()
    }

    /// What all workers share: unless they go by heads, all queries laid out and all scores `[H, P, pieces, tokens, KEYS]`.
    pub(super) fn shared(&self) -> ScratchReq {
        let all = self.halves() * (self.columns() + self.scores());
        ScratchReq::new(if self.by_head { 0 } else { all }, 0)
    }

    /// What each worker needs: sub-keys in `f32` and a tile of the product; the scores of a head and the queries of a half, or
    /// in the place of all that the scores of a token.
    pub(super) fn worker(&self) -> ScratchReq {
        let (parts, tile) = (self.dims.parts, KEYS * (self.dims.half_dim + MAX_WIDTH));
        let reals =
            if self.by_head { parts * self.scores() + self.columns() + tile } else { tile.max(parts * self.stride()) };
        ScratchReq::new(reals, 0)
    }

    /// The scores of half `half` of token `t`, copied together from where all are.
    pub(super) fn gather(&self, scores: &[f32], half: usize, t: usize, to: &mut [f32]) {
        let pieces = scores[self.halves() * self.columns()..].chunks_exact(self.tokens * KEYS);
        for (piece, to) in pieces.skip(half * self.pieces).zip(to.chunks_mut(KEYS).take(self.pieces)) {
            to.copy_from_slice(&piece[t * KEYS..][..to.len()]);
        }
    }
}

impl Cpu {
    /// All scores into `shared`, of [`Turned::shared`]; each of `workers` has [`Turned::worker`].
    pub(super) fn score_turned<'w, K: RowStore + Sync>(
        &self,
        turned: &Turned,
        queries: &[f32],
        keys: &K,
        shared: &mut [f32],
        workers: impl Iterator<Item = &'w mut [f32]> + Send,
    ) {
        let SelectDims { tokens, half_dim: c, .. } = turned.dims;
        let (columns, scores) = shared.split_at_mut(turned.halves() * turned.columns());
        self.pool.for_each(queries.len(), columns.chunks_mut(turned.columns()).enumerate(), |(half, columns)| {
            self.lay_out_queries(turned, queries, half, columns);
        });
        let columns = &*columns;
        let cost = tokens * turned.dims.key_rows() * c / 16;
        let pieces = scores.chunks_exact_mut(turned.tokens * KEYS).enumerate();
        self.pool.for_each_with(cost, pieces, workers, |worker, (i, out)| {
            let (half, piece) = (i / turned.pieces, i % turned.pieces);
            let columns = &columns[half * turned.columns()..];
            self.score_piece(turned, keys, (half, piece), columns, worker, (out, KEYS));
        });
    }

    /// The scores of half `half` into the first [`Turned::scores`] of `out`, [`Turned::stride`] apart; `worker`
    /// is the rest of [`Turned::worker`].
    pub(super) fn score_half<K: RowStore>(
        &self,
        turned: &Turned,
        queries: &[f32],
        keys: &K,
        half: usize,
        worker: &mut [f32],
        out: &mut [f32],
    ) {
        let (columns, worker) = worker.split_at_mut(turned.columns());
        self.lay_out_queries(turned, queries, half, columns);
        for piece in 0..turned.pieces {
            let out = (&mut out[piece * KEYS..], turned.stride());
            self.score_piece(turned, keys, (half, piece), columns, worker, out);
        }
    }

    fn lay_out_queries(&self, turned: &Turned, queries: &[f32], half: usize, columns: &mut [f32]) {
        let SelectDims { tokens, half_dim: c, .. } = turned.dims;
        let row = turned.halves() * c;
        dispatch!(self.token, s => lay_out(s, &queries[half * c..], (row, tokens, c), columns));
    }

    /// The scores `[tokens, KEYS]` of a piece of a half, from one token's to the next `stride` apart. Behind the last sub-key they
    /// mean nothing.
    fn score_piece<K: RowStore>(
        &self,
        turned: &Turned,
        keys: &K,
        (half, piece): (usize, usize),
        columns: &[f32],
        worker: &mut [f32],
        out: (&mut [f32], usize),
    ) {
        let SelectDims { sub_keys, half_dim: c, .. } = turned.dims;
        let first = piece * KEYS;
        let count = KEYS.min(sub_keys - first);
        let (wide, tile) = worker.split_at_mut(KEYS * c);
        let rows = rows(self.token, keys, (half * sub_keys + first, count, c), wide);
        multiply(self.token, rows, (count, turned.tokens, c), columns, tile, out);
    }
}

/// The queries of a half, from one token's to the next `row` apart, as the columns of panels.
#[inline(always)]
fn lay_out<S: Simd>(s: S, queries: &[f32], (row, tokens, c): (usize, usize, usize), panels: &mut [f32]) {
    let width = product::width::<S>();
    for (j, panel) in panels.chunks_exact_mut(c * width).take(tokens.div_ceil(width)).enumerate() {
        let count = width.min(tokens - j * width);
        product::transpose(s, &queries[j * width * row..], row, count, c, panel);
    }
}

/// Rows `first..first + count` of the keys, one after the other: where they lie, or else in `wide`.
fn rows<'a, K: RowStore>(
    token: Token,
    keys: &'a K,
    (first, count, c): (usize, usize, usize),
    wide: &'a mut [f32],
) -> &'a [f32] {
    #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
    let id = |n: usize| (first + n) as u32;
    let run = keys.run(id(0), count).filter(|run| run.scales.is_empty());
    if let Some(codes) = run.and_then(|run| as_f32(run.codes)) {
        return codes;
    }
    dispatch!(token, s => {
        for (n, wide) in wide.chunks_exact_mut(c).take(count).enumerate() {
            write_row(s, &keys.row(id(n)), wide);
        }
    });
    wide
}

/// The values of a row.
#[inline(always)]
fn write_row<S: Simd, E: Element>(s: S, row: &Row<'_, E>, to: &mut [f32]) {
    let mut vectors = to.chunks_exact_mut(S::LANES);
    let mut col = 0;
    for to in &mut vectors {
        s.store(s.widen(row.codes, col), to);
        col += S::LANES;
    }
    widen(row.codes, col, vectors.into_remainder());
    match row.scales {
        [] => {}
        [scale] => to.iter_mut().for_each(|x| *x *= scale),
        _ => to.iter_mut().enumerate().for_each(|(i, x)| *x *= row.scale::<f32>(i)),
    }
}

/// The scores `[tokens, KEYS]` of `count` sub-keys, from one token's to the next `stride` apart.
fn multiply(
    token: Token,
    rows: &[f32],
    size: (usize, usize, usize),
    columns: &[f32],
    tile: &mut [f32],
    out: (&mut [f32], usize),
) {
    dispatch!(token, s => multiply_by(s, rows, size, columns, tile, out));
}

#[inline(always)]
fn multiply_by<S: Simd>(
    s: S,
    rows: &[f32],
    (count, tokens, c): (usize, usize, usize),
    columns: &[f32],
    tile: &mut [f32],
    (out, stride): (&mut [f32], usize),
) {
    let width = product::width::<S>();
    for (first, panel) in (0..tokens).step_by(width).zip(columns.chunks_exact(c * width)) {
        let tokens = width.min(tokens - first);
        let used = if tokens <= S::LANES { S::LANES } else { width };
        for k in (0..c).step_by(DEPTH) {
            let left = Left { data: &rows[k..], row: c, step: 1 };
            let panel = Panel { data: &panel[k * width..], step: width };
            product::multiply(s, (count, DEPTH.min(c - k), used), left, panel, (&mut *tile, width), k > 0);
        }
        for n in (0..KEYS).step_by(S::LANES) {
            for t in (0..tokens).step_by(S::LANES) {
                s.turn((&tile[n * width + t..], width), (&mut out[(first + t) * stride + n..], stride));
            }
        }
    }
}
