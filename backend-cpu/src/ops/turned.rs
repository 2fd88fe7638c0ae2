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
pub(super) const TOKENS: core::ops::RangeInclusive<usize> = 6..=64;

/// The scores of some tokens, `[H, P, pieces, tokens, KEYS]`.
#[derive(Clone, Copy)]
pub(super) struct Turned {
    dims: SelectDims,
    /// T, up to whole vectors of any instruction set.
    tokens: usize,
    /// Pieces of a half.
    pieces: usize,
}

impl Turned {
    pub(super) fn new(dims: SelectDims) -> Self {
        Self { dims, tokens: dims.tokens.next_multiple_of(MAX_WIDTH / 2), pieces: dims.sub_keys.div_ceil(KEYS) }
    }

    fn halves(&self) -> usize {
        self.dims.heads * self.dims.parts
    }

    /// Scalars of the laid out queries `[H, P, panels, C, width]`, whatever the width.
    fn columns(&self) -> usize {
        self.halves() * self.dims.half_dim * self.dims.tokens.next_multiple_of(MAX_WIDTH)
    }

    /// What all workers share.
    pub(super) fn shared(&self) -> ScratchReq {
        ScratchReq::new(self.columns() + self.halves() * self.pieces * self.tokens * KEYS, 0)
    }

    /// What each worker needs to score: sub-keys in `f32`, and a tile of the product.
    pub(super) fn worker(&self) -> ScratchReq {
        ScratchReq::new(KEYS * (self.dims.half_dim + MAX_WIDTH), 0)
    }

    /// The scores of half `half` of token `t`, copied together.
    pub(super) fn gather(&self, scores: &[f32], half: usize, t: usize, to: &mut [f32]) {
        let pieces = scores[self.columns()..].chunks_exact(self.tokens * KEYS);
        for (piece, to) in pieces.skip(half * self.pieces).zip(to.chunks_mut(KEYS).take(self.pieces)) {
            to.copy_from_slice(&piece[t * KEYS..][..to.len()]);
        }
    }
}

impl Cpu {
    /// Scores into `shared`, of [`Turned::shared`]; each of `workers` has [`Turned::worker`].
    pub(super) fn score_turned<'w, K: RowStore + Sync>(
        &self,
        turned: &Turned,
        queries: &[f32],
        keys: &K,
        shared: &mut [f32],
        workers: impl Iterator<Item = &'w mut [f32]> + Send,
    ) {
        let SelectDims { tokens, sub_keys, half_dim: c, .. } = turned.dims;
        let (columns, scores) = shared.split_at_mut(turned.columns());
        let half_len = columns.len() / turned.halves();
        let row = turned.halves() * c;
        self.pool.for_each(queries.len(), columns.chunks_mut(half_len).enumerate(), |(half, columns)| {
            dispatch!(self.token, s => lay_out(s, &queries[half * c..], (row, tokens, c), columns));
        });
        let columns = &*columns;
        let cost = tokens * turned.dims.key_rows() * c / 16;
        let pieces = scores.chunks_exact_mut(turned.tokens * KEYS).enumerate();
        self.pool.for_each_with(cost, pieces, workers, |worker, (i, out)| {
            let (half, first) = (i / turned.pieces, i % turned.pieces * KEYS);
            let count = KEYS.min(sub_keys - first);
            let (wide, tile) = worker.split_at_mut(KEYS * c);
            let rows = rows(self.token, keys, (half * sub_keys + first, count, c), wide);
            multiply(self.token, rows, (count, c), &columns[half * half_len..], tile, out);
        });
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

/// The scores `[tokens, KEYS]` of `count` sub-keys. Behind them they mean nothing.
fn multiply(
    token: Token,
    rows: &[f32],
    (count, c): (usize, usize),
    columns: &[f32],
    tile: &mut [f32],
    out: &mut [f32],
) {
    dispatch!(token, s => multiply_by(s, rows, (count, c), columns, tile, out));
}

#[inline(always)]
fn multiply_by<S: Simd>(
    s: S,
    rows: &[f32],
    (count, c): (usize, usize),
    columns: &[f32],
    tile: &mut [f32],
    out: &mut [f32],
) {
    let width = product::width::<S>();
    for (panel, out) in columns.chunks_exact(c * width).zip(out.chunks_mut(width * KEYS)) {
        let tokens = out.len() / KEYS;
        let used = if tokens <= S::LANES { S::LANES } else { width };
        for k in (0..c).step_by(DEPTH) {
            let left = Left { data: &rows[k..], row: c, step: 1 };
            let panel = Panel { data: &panel[k * width..], step: width };
            product::multiply(s, (count, DEPTH.min(c - k), used), left, panel, (&mut *tile, width), k > 0);
        }
        for n in (0..KEYS).step_by(S::LANES) {
            for t in (0..tokens).step_by(S::LANES) {
                s.turn((&tile[n * width + t..], width), (&mut out[t * KEYS + n..], KEYS));
            }
        }
    }
}
