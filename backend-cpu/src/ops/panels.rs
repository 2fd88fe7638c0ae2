//! Sub-keys as panels of integers, which coarse scores are products with: laid out for a call, or once for many.

use std::io;

use memlayer_core::ops::select::{Select, SelectBackward, SelectDims, SelectRows};
use memlayer_core::{ArgError, RowStore, Scratch, ScratchReq, Table};

use crate::isa::int8::{self, Int8, ROWS, WIDTH, left_len, pack_left, words};
use crate::isa::product::MAX_WIDTH;
use crate::isa::{Token, dispatch};
use crate::ops::coarse::{Bounds, Buffer, Coarse, as_int8, square};
use crate::ops::select::{Layout, from_line};
use crate::{Cpu, TableMemory};

/// Sizes of the sub-keys of a layer as panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct PanelDims {
    /// `H·P`.
    pub(super) halves: usize,
    /// N.
    pub(super) sub_keys: usize,
    /// C.
    pub(super) dim: usize,
}

impl PanelDims {
    /// Of a selection.
    pub(super) const fn new(dims: SelectDims) -> Self {
        Self { halves: dims.heads * dims.parts, sub_keys: dims.sub_keys, dim: dims.half_dim }
    }
    /// N, up to whole panels, those of products in `f32` too.
    const fn padded(self) -> usize {
        self.sub_keys.next_multiple_of(MAX_WIDTH)
    }
    /// Panels of all halves.
    const fn panels(self) -> usize {
        self.halves * self.padded() / WIDTH
    }
    /// Words of a panel.
    const fn words(self) -> usize {
        words(self.dim) * WIDTH
    }
    /// Scales and bounds, and codes.
    pub(super) const fn scratch(self) -> ScratchReq {
        ScratchReq::new(self.panels() * (WIDTH + Bounds::LEN), self.panels() * self.words())
    }
}

/// The sub-keys of a layer for inference on a [`Cpu`], with what [`SelectRows::select`] else makes of them in every call, or goes
/// without where there are few tokens: integers, in the order that the processor multiplies them in.
///
/// It selects what `keys` select: their scores decide. It takes a byte for each of their values and some more, and pays where a head has
/// a few hundred sub-keys or more, most of all for few tokens. On a processor without products of integers, or a [`Cpu`] that does
/// not use them, it is the keys alone, as it is for half keys of more than 1024 values.
///
/// ```
/// use memlayer_core::ScaledRows;
/// use memlayer_cpu::{Cpu, PanelKeys};
///
/// // [H, P, N, C]: 4 heads, 2 halves, 1024 sub-keys of 64 values.
/// let (codes, scales) = (vec![1_i8; 4 * 2 * 1024 * 64], vec![0.1; 4 * 2 * 1024]);
/// let rows = ScaledRows::new(&codes, &scales, 64, 64).expect("whole rows");
/// let cpu = Cpu::new()?;
/// let keys = PanelKeys::new(&cpu, rows, 1024)?;
/// // From here on `Keys::Packed(&keys)` of a layer, or `keys: &keys` of a selection.
/// # let _ = keys;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PanelKeys<K> {
    keys: K,
    sub_keys: usize,
    panels: Option<Owned>,
}

/// Panels in memory of their own.
#[derive(Debug)]
struct Owned {
    int8: Int8,
    dims: PanelDims,
    codes: TableMemory<u32>,
    scales: TableMemory<f32>,
    bounds: Vec<f32>,
}

impl<K: RowStore + Sync> PanelKeys<K> {
    /// Lays out `keys`, rows `[H, P, N]` of width C, where `sub_keys` is N: a selection with another N is an [`ArgError::Shape`].
    ///
    /// # Errors
    /// The system's, if it gives no memory for them.
    pub fn new(cpu: &Cpu, keys: K, sub_keys: usize) -> io::Result<Self> {
        let (rows, dim) = (keys.rows(), keys.dim());
        // Of no rows any number would be whole, even one too great for panels.
        let whole = rows > 0 && sub_keys > 0 && rows.is_multiple_of(sub_keys);
        let Some(int8) = cpu.int8.filter(|_| whole && (1..=int8::MAX_DIM).contains(&dim)) else {
            return Ok(Self { keys, sub_keys, panels: None });
        };
        let dims = PanelDims { halves: rows / sub_keys, sub_keys, dim };
        let (panels, words) = (dims.panels(), dims.words());
        let mut codes = TableMemory::zeroed(panels * words)?;
        let mut scales = TableMemory::zeroed(panels * WIDTH)?;
        let mut bounds = vec![0.0; panels * Bounds::LEN];
        cpu.lay_out_codes(dims, int8, &keys, (&mut codes, &mut scales, &mut bounds));
        Ok(Self { keys, sub_keys, panels: Some(Owned { int8, dims, codes, scales, bounds }) })
    }

    /// The keys, as they are.
    pub fn keys(&self) -> &K {
        &self.keys
    }

    /// The panels, where they are those of `cpu`.
    fn panels(&self, cpu: &Cpu) -> Option<Panels<'_>> {
        let Owned { int8, dims, codes, scales, bounds } = self.panels.as_ref()?;
        let same = cpu.int8.is_some_and(|other| core::mem::discriminant(&other) == core::mem::discriminant(int8));
        same.then_some(Panels { int8: *int8, dims: *dims, codes, scales, bounds })
    }
}

impl<K: Table> Table for PanelKeys<K> {
    type Elem = K::Elem;
    fn rows(&self) -> usize {
        self.keys.rows()
    }
    fn dim(&self) -> usize {
        self.keys.dim()
    }
}

impl<K: RowStore + Sync> SelectRows<PanelKeys<K>> for Cpu {
    /// Enough for keys with panels and without: only the call knows which.
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq {
        let rows = SelectRows::<K>::select_scratch(self, dims);
        Layout::coarse(dims, self).map_or(rows, |layout| layout.scratch(self.threads()).or(rows))
    }

    fn select(&self, args: Select<'_, Self, PanelKeys<K>>, scratch: Scratch<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let Select { dims, queries, keys, ids, scores, weights } = args;
        scratch.check("select", SelectRows::<PanelKeys<K>>::select_scratch(self, dims))?;
        if dims.sub_keys != keys.sub_keys {
            let (expected, found) = (keys.sub_keys, dims.sub_keys);
            return Err(ArgError::Shape { op: "select", operand: "sub_keys", expected, found });
        }
        let args = Select { dims, queries, keys: &keys.keys, ids, scores, weights };
        match (Layout::coarse(dims, self), keys.panels(self)) {
            (Some(layout), Some(panels)) => {
                self.select_coarse(&layout, args, panels, from_line(scratch));
                Ok(())
            }
            _ => self.select(args, scratch),
        }
    }

    fn select_backward_scratch(&self, dims: SelectDims, dkeys: bool) -> ScratchReq {
        SelectRows::<K>::select_backward_scratch(self, dims, dkeys)
    }

    fn select_backward(
        &self,
        args: SelectBackward<'_, Self, PanelKeys<K>>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        let SelectBackward { dims, queries, keys, ids, weights, dweights, dqueries, dkeys } = args;
        let keys = &keys.keys;
        let args = SelectBackward { dims, queries, keys, ids, weights, dweights, dqueries, dkeys };
        self.select_backward(args, scratch)
    }
}

impl Cpu {
    /// The keys as panels of integers `[H, P, N / WIDTH]`, with their scales `[H, P, N]` and bounds.
    pub(super) fn lay_out_codes<K: RowStore + Sync>(
        &self,
        dims: PanelDims,
        int8: Int8,
        keys: &K,
        (codes, scales, bounds): (&mut [u32], &mut [f32], &mut [f32]),
    ) {
        let PanelDims { sub_keys: n, dim: c, .. } = dims;
        let (per_half, words) = (dims.padded() / WIDTH, dims.words());
        let (panels, cost) = (dims.panels(), WIDTH * c / 2);
        let piece = self.piece(panels, cost);
        let pieces = codes.chunks_mut(piece * words).zip(scales.chunks_mut(piece * WIDTH));
        let pieces = pieces.zip(bounds.chunks_mut(piece * Bounds::LEN)).enumerate();
        self.pool.for_each(panels * cost, pieces, |(p, ((codes, scales), bounds))| {
            let panels = codes.chunks_mut(words).zip(scales.chunks_mut(WIDTH)).zip(bounds.chunks_mut(Bounds::LEN));
            for (i, ((codes, scales), bounds)) in (p * piece..).zip(panels) {
                let (half, first) = (i / per_half, i % per_half * WIDTH);
                let count = WIDTH.min(n.saturating_sub(first));
                let mut panel = Panel { codes, scales, bounds };
                panel.lay_out((self.token, int8), keys, half * n + first, count, c);
            }
        });
    }
}

/// Some sub-keys.
struct Panel<'a> {
    /// [`words`] of each column, see [`Int8::pack_column`].
    codes: &'a mut [u32],
    /// `[WIDTH]`.
    scales: &'a mut [f32],
    /// [`Bounds`].
    bounds: &'a mut [f32],
}

impl Panel<'_> {
    /// Rows `first..first + count` of `keys` as columns; those behind them mean nothing.
    fn lay_out<K: RowStore>(&mut self, (token, int8): (Token, Int8), keys: &K, first: usize, count: usize, dim: usize) {
        let mut bounds = Bounds::NONE;
        #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
        let together = if count == WIDTH { keys.run(first as u32, WIDTH) } else { None };
        if let Some((codes, scales)) = together.and_then(|rows| as_int8(&rows, WIDTH))
            && let Some(squares) = int8.pack_rows(token, codes, dim, self.codes)
        {
            self.scales.fill(1.0);
            self.scales[..scales.len()].copy_from_slice(scales);
            return dispatch!(token, _s => Bounds::of_codes(self.scales, &squares)).root().store(self.bounds);
        }
        self.scales.fill(0.0);
        if count < WIDTH {
            self.codes.fill(0);
        }
        let mut buffer = Buffer::new();
        dispatch!(token, s => for n in 0..count {
            #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
            let row = keys.row((first + n) as u32);
            let (scale, squared, codes) = match as_int8(&row, 1) {
                Some((codes, scales)) => {
                    let scale = scales.first().copied().unwrap_or(1.0);
                    (scale, Bounds { norm: square(scale, codes), ..Bounds::of_scale(scale, dim) }, codes)
                }
                None => buffer.quantize_row(s, &row, dim),
            };
            int8.pack_column(codes, n, self.codes);
            self.scales[n] = scale;
            bounds = bounds.and(squared);
        });
        bounds.root().store(self.bounds);
    }
}

/// All panels.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) int8: Int8,
    pub(super) dims: PanelDims,
    /// `[H, P, panels]`, panels of `C` codes a column.
    pub(super) codes: &'a [u32],
    /// `[H, P, panels, WIDTH]`.
    pub(super) scales: &'a [f32],
    /// `[H, P, panels]`.
    pub(super) bounds: &'a [f32],
}

impl Panels<'_> {
    /// Of the sub-keys of half `half`.
    pub(super) fn bounds(&self, half: usize) -> Bounds {
        let len = self.dims.padded() / WIDTH * Bounds::LEN;
        Bounds::load(&self.bounds[half * len..(half + 1) * len])
    }

    /// The coarse scores `[queries, panels · WIDTH]` of the sub-keys of a half, which have such bounds, in units of each query's
    /// scale, for at most [`ROWS`] queries, and what these are. `codes` is workspace for [`ROWS`] queries.
    pub(super) fn score(
        &self,
        token: Token,
        (half, keys): (usize, Bounds),
        queries: &[&[f32]],
        (buffer, codes): (&mut Buffer, &mut [u32]),
        out: &mut [f32],
    ) -> [Coarse; ROWS] {
        let mut scores = [Coarse::NONE; ROWS];
        let (dim, padded) = (self.dims.dim, self.dims.padded());
        let len = left_len(dim);
        dispatch!(token, s => for ((query, to), scores) in queries.iter().zip(codes.chunks_exact_mut(len)).zip(&mut scores) {
            let (quantized, codes) = buffer.quantize_by(s, query);
            pack_left(codes, to);
            *scores = quantized.coarse(dim, keys);
        });
        let (words, panels) = (self.dims.words(), padded / WIDTH);
        let panels = self.codes[half * panels * words..].chunks_exact(words).take(panels);
        let scales = self.scales[half * padded..].chunks_exact(WIDTH);
        for (j, (panel, scales)) in panels.zip(scales).enumerate() {
            self.int8.multiply(&codes[..queries.len() * len], panel, scales, &mut out[j * WIDTH..], padded);
        }
        scores
    }
}
