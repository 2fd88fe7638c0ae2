//! Selection and its way back.

use memlayer_core::element::Format;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::ops::select::{Select, SelectBackward, SelectDims};
use memlayer_core::ops::{RowReduce, SelectRows};
use memlayer_core::{Element, Scratch, ScratchReq};

use super::gradient::{Gradient, MixedGradient};
use super::plan::{Destination, PlanArg};
use super::tiles;
use super::{number_of, size};
use crate::error::CudaError;
use crate::kernels::{File, Variant, format, packed_group};
use crate::launch::{Args, Matrix, Operands, Product, Shape};
use crate::memory::{Rows, View, ViewMut};
use crate::{Cuda, Scores};

/// The greatest K that the selection kernels take. They are fast to 32, and made for up to 128.
pub const MAX_TOP_K: usize = 1024;

const THREADS: u32 = 128;
/// Calls of so many tokens or fewer score sub-keys without cuBLAS: keys are read once for four tokens.
const FEW: usize = 8;
/// Sub-keys that a warp scores there.
const FEW_KEYS: usize = 4;
/// Threads of a block that chooses for a token and head, and the greatest K it takes.
pub(crate) const FEW_THREADS: u32 = 512;
pub(crate) const FEW_K: usize = 32;
/// Scores of a tile of tokens, at most. Tiles that fit into the second-level cache were slower: each is one more round of
/// launches that do not fill the device.
const TILE_SCORES: usize = 16 << 20;

/// How a call is cut into tiles, and what its scratch holds.
#[derive(Clone, Copy, Debug)]
struct Tiles {
    dims: SelectDims,
    /// Tokens in a tile.
    tokens: usize,
    /// Floats that keys are decoded or rounded to.
    keys: usize,
    /// Floats that queries are rounded to.
    queries: usize,
}

impl Tiles {
    fn new(dims: SelectDims, scores: Scores, packed: bool) -> Self {
        let token = (dims.heads * dims.parts * dims.sub_keys).max(1);
        let tokens = (TILE_SCORES / token).max(1).min(dims.tokens);
        let few = dims.tokens <= FEW;
        let keys_len = dims.key_rows() * dims.half_dim;
        let keys = if packed && !few { keys_len.next_multiple_of(4) } else { 0 };
        // bf16 takes half a float.
        let rounded = |len: usize| if scores == Scores::Bf16 && !few { len.div_ceil(2).next_multiple_of(4) } else { 0 };
        Self { dims, tokens, keys: keys + rounded(keys_len), queries: rounded(dims.queries_len()) }
    }

    const fn scores(&self) -> usize {
        self.tokens * self.dims.heads * self.dims.parts * self.dims.sub_keys
    }
    /// Entries of the lists of a tile.
    const fn lists(&self) -> usize {
        self.tokens * self.dims.heads * self.dims.parts * self.dims.top_k
    }
    fn scratch(&self) -> ScratchReq {
        if self.dims.tokens == 0 {
            return ScratchReq::EMPTY;
        }
        // 16 bytes more at each place, so that all of them can be aligned.
        ScratchReq::new(self.scores() + self.keys + self.queries + 3 * SLACK, 2 * self.lists())
    }
}

/// Floats that aligning a view may cost.
const SLACK: usize = 3;

/// The first `len` floats of `scratch` from an address that is a multiple of 16.
fn take_aligned<'a>(scratch: Scratch<'a, Cuda>, len: usize) -> (ViewMut<'a, f32>, Scratch<'a, Cuda>) {
    take_aligned_to(16, scratch, len)
}

/// The same of as many `bytes`; it may cost all floats in so many but one.
pub(crate) fn take_aligned_to<'a>(
    bytes: usize,
    scratch: Scratch<'a, Cuda>,
    len: usize,
) -> (ViewMut<'a, f32>, Scratch<'a, Cuda>) {
    let bytes = bytes as u64;
    let skip = (scratch.reals.pointer().next_multiple_of(bytes) - scratch.reals.pointer()) / 4;
    let (_, scratch) = scratch.take_reals(usize::try_from(skip).unwrap_or(0));
    scratch.take_reals(len)
}

/// Whether four codes of a row can be read at once.
pub(crate) fn reads_by_four<E: Element>(table: &Rows<'_, E>) -> bool {
    table.dim.is_multiple_of(4)
        && (table.group >= table.dim || table.group.is_multiple_of(4))
        && table.codes.pointer().is_multiple_of(4 * size_of::<E>() as u64)
}

/// How many pairs (a, b) have (a + 1)(b + 1) <= k.
pub(crate) fn pairs(k: usize) -> usize {
    (1..=k).map(|a| k / a).sum()
}

/// The kernel that selects from halves, and the places of a warp's list in it.
fn half_kernel(k: usize) -> (&'static str, usize) {
    match k {
        0..=32 => ("select_halves_32", 128),
        33..=128 => ("select_halves_128", 512),
        _ => ("select_halves_more", k.next_power_of_two()),
    }
}

impl<E: Element> SelectRows<Rows<'_, E>> for Cuda {
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq {
        match tiles::Call::of(self, dims) {
            Some(call) => call.scratch(),
            None => Tiles::new(dims, self.scores, E::FORMAT != Format::F32).scratch(),
        }
    }

    fn select(&self, args: Select<'_, Self, Rows<'_, E>>, scratch: Scratch<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "select";
        args.check()?;
        let dims = args.dims;
        scratch.check(OP, SelectRows::<Rows<'_, E>>::select_scratch(self, dims))?;
        if dims.top_k > MAX_TOP_K {
            return Err(CudaError::Unsupported { op: OP, what: "so great a K" });
        }
        if args.keys.stride != E::codes(args.keys.dim) {
            return Err(CudaError::Unsupported { op: OP, what: "padded sub-keys" });
        }
        if dims.tokens * dims.heads == 0 {
            return Ok(());
        }
        if packed_group(E::FORMAT).is_some() {
            return Err(CudaError::Unsupported { op: OP, what: "a table of 4-bit keys" });
        }
        let variant = Variant::of(File::Select).format(format::<E>(OP)?);
        let packed = E::FORMAT != Format::F32;
        if !packed && args.keys.scales.is_some() {
            return Err(CudaError::Unsupported { op: OP, what: "keys in f32 with scales" });
        }
        if let Some(call) = tiles::Call::of(self, dims) {
            return self.select_tiles(&call, &args, scratch);
        }
        let tiles = Tiles::new(dims, self.scores, packed);
        let (scores, scratch) = take_aligned(scratch, tiles.scores());
        let (keys, scratch) = take_aligned(scratch, tiles.keys);
        let (queries, scratch) = take_aligned(scratch, tiles.queries);
        let (list_keys, scratch) = scratch.take_ids(tiles.lists());
        let (list_ids, _) = scratch.take_ids(tiles.lists());
        let lists = (list_keys, list_ids);

        if dims.tokens <= FEW {
            self.score_few(variant, &dims, args.keys, args.queries, &scores)?;
            return self.choose(&args, 0..dims.tokens, &scores, &lists);
        }
        let operands = self.operands(variant, &dims, args.keys, args.queries, &keys, &queries)?;
        let mut first = 0;
        while first < dims.tokens {
            let tokens = tiles.tokens.min(dims.tokens - first);
            self.blas.product(&operands.tile(&dims, first, tokens, scores.pointer()))?;
            self.choose(&args, first..first + tokens, &scores, &lists)?;
            first += tokens;
        }
        Ok(())
    }

    fn select_backward_scratch(&self, dims: SelectDims, dkeys: bool) -> ScratchReq {
        let entries = dims.key_entries();
        let own = ScratchReq::new(entries, entries);
        if dkeys {
            own.and(ScratchReq::new(0, PlanBuffers::<Self>::ids_len(entries))).and(self.plan_scratch(entries))
        } else {
            own
        }
    }

    fn select_backward(
        &self,
        args: SelectBackward<'_, Self, Rows<'_, E>>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        const OP: &str = "select_backward";
        args.check()?;
        let dims = args.dims;
        let wanted = SelectRows::<Rows<'_, E>>::select_backward_scratch(self, dims, args.dkeys.is_some());
        scratch.check(OP, wanted)?;
        let (entries, k) = (dims.key_entries(), dims.top_k);
        if let Some(dkeys) = &args.dkeys {
            self.stream.zero(dkeys.pointer(), dkeys.len() * size_of::<f32>())?;
        }
        if entries == 0 {
            return Ok(());
        }
        let variant = Variant::of(File::Select);
        let kernel = self.kernels.get(variant, "softmax_backward")?;
        let rows = dims.tokens * dims.heads;
        let mut launch =
            Args::new().read(args.weights).write(&args.dweights).value(rows as u64).value(size(OP, "top_k", k)?);
        self.stream.launch(&kernel, Shape::new(rows.div_ceil(4), THREADS), &mut launch)?;

        let (weights, scratch) = scratch.take_reals(entries);
        let (key_ids, scratch) = scratch.take_ids(entries);
        let slots = (dims.sub_keys as u64).saturating_pow(if dims.parts == 2 { 2 } else { 1 });
        let kernel = self.kernels.get(variant, "key_entries")?;
        let mut launch = Args::new()
            .read(args.ids)
            .write(&args.dweights)
            .value(entries as u64)
            .value(size(OP, "heads", dims.heads)?)
            .value(size(OP, "parts", dims.parts)?)
            .value(size(OP, "sub_keys", dims.sub_keys)?)
            .value(size(OP, "top_k", k)?)
            .value(slots)
            .write(&key_ids)
            .write(&weights)
            .value(self.flag.view().pointer())
            .value(number_of(OP));
        self.stream.launch(&kernel, Shape::new(self.blocks_for(entries, 256), 256), &mut launch)?;

        if let Some(dqueries) = args.dqueries {
            let sum = BagSum { bag: k, ids: key_ids.read(), weights: weights.read(), out: dqueries, accumulate: false };
            self.sum_bags(OP, args.keys, entries / k, sum)?;
        }
        let Some(dkeys) = args.dkeys else { return Ok(()) };
        // The keys are a table like any other: their gradient is a sum over the entries of each row.
        let (mut buffers, ids) = PlanBuffers::<Self>::carve(scratch.ids, entries)?;
        self.plan(key_ids.read(), dims.key_rows(), buffers.reborrow(), Scratch { reals: scratch.reals, ids })?;
        let gradient = MixedGradient { bag: k, dim: dims.half_dim, weights: weights.read(), sources: args.queries };
        let (to, plan) = (Destination::new(dkeys.pointer(), dims.key_rows(), true), buffers.plan());
        self.reduce_to(OP, PlanArg::new(OP, &plan)?, Gradient::new(OP, &gradient, &plan)?, to)
    }
}

/// Keys and queries as cuBLAS reads them.
#[derive(Clone, Copy, Debug)]
struct OperandsOf {
    operands: Operands,
    keys: u64,
    queries: u64,
}

impl OperandsOf {
    /// The scores of a tile, `[H * P, tokens, N]`: for each half, queries times keys transposed.
    fn tile(&self, dims: &SelectDims, first: usize, tokens: usize, scores: u64) -> Product {
        let (halves, n, c) = (dims.heads * dims.parts, dims.sub_keys, dims.half_dim);
        let bytes = match self.operands {
            Operands::F32 => 4,
            Operands::Bf16 => 2,
        };
        Product {
            operands: self.operands,
            sizes: [tokens, n, c],
            batch: halves,
            a: Matrix {
                pointer: self.queries + (first * halves * c * bytes) as u64,
                stride: halves * c,
                batch: c,
                transposed: false,
            },
            b: Matrix { pointer: self.keys, stride: c, batch: n * c, transposed: true },
            out: Matrix { pointer: scores, stride: n, batch: tokens * n, transposed: false },
            accumulate: false,
        }
    }
}

impl Cuda {
    /// Decodes keys that are not plain floats, and rounds both to bf16 in that mode.
    fn operands<E: Element>(
        &self,
        variant: Variant,
        dims: &SelectDims,
        table: &Rows<'_, E>,
        queries: View<'_, f32>,
        key_room: &ViewMut<'_, f32>,
        query_room: &ViewMut<'_, f32>,
    ) -> Result<OperandsOf, CudaError> {
        const OP: &str = "select";
        let len = dims.key_rows() * dims.half_dim;
        let (mut keys, mut rounded) = (table.codes.pointer(), key_room.pointer());
        if E::FORMAT != Format::F32 {
            let kernel = self.kernels.get(variant, "decode_keys")?;
            let mut launch = Args::new()
                .read(table.codes)
                .read_or_null::<f32>(table.scales)
                .value(size(OP, "width of keys", table.dim)?)
                .value(size(OP, "group", table.group.min(table.dim))?)
                .value(len as u64)
                .write(key_room);
            self.stream.launch(&kernel, Shape::new(self.blocks_for(len, 256), 256), &mut launch)?;
            keys = key_room.pointer();
            rounded += (len.next_multiple_of(4) * size_of::<f32>()) as u64;
        }
        if self.scores == Scores::Exact {
            return Ok(OperandsOf { operands: Operands::F32, keys, queries: queries.pointer() });
        }
        self.round_to(keys, len, rounded)?;
        self.round_to(queries.pointer(), queries.len(), query_room.pointer())?;
        Ok(OperandsOf { operands: Operands::Bf16, keys: rounded, queries: query_room.pointer() })
    }

    /// The scores of a call of few tokens: a warp reads a sub-key.
    fn score_few<E: Element>(
        &self,
        variant: Variant,
        dims: &SelectDims,
        table: &Rows<'_, E>,
        queries: View<'_, f32>,
        scores: &ViewMut<'_, f32>,
    ) -> Result<(), CudaError> {
        const OP: &str = "select";
        let (halves, n, c) = (dims.heads * dims.parts, dims.sub_keys, dims.half_dim);
        let wide = reads_by_four(table) && queries.pointer().is_multiple_of(16);
        let kernel = self.kernels.get(variant, if dims.tokens == 1 { "select_scores_1" } else { "select_scores_4" })?;
        let mut launch = Args::new()
            .read(table.codes)
            .read_or_null::<f32>(table.scales)
            .value(size(OP, "group", table.group.min(c))?)
            .read(queries)
            .value(size(OP, "tokens", dims.tokens)?)
            .value(size(OP, "heads", halves)?)
            .value(size(OP, "sub_keys", n)?)
            .value(size(OP, "width of keys", c)?)
            .value(u32::from(wide))
            .write(scores);
        let warps = halves * n.div_ceil(FEW_KEYS);
        // The kernel counts them in 32 bits.
        size(OP, "sub_keys", warps + 4)?;
        self.stream.launch(&kernel, Shape::new(warps.div_ceil(THREADS as usize / 32), THREADS).early(), &mut launch)
    }

    /// The best K of the halves of a tile, and then of their pairs.
    fn choose<K>(
        &self,
        args: &Select<'_, Self, K>,
        tokens: core::ops::Range<usize>,
        scores: &ViewMut<'_, f32>,
        (list_keys, list_ids): &(ViewMut<'_, u32>, ViewMut<'_, u32>),
    ) -> Result<(), CudaError> {
        const OP: &str = "select";
        let dims = &args.dims;
        let (k, halves) = (dims.top_k, dims.heads * dims.parts);
        let tile = size(OP, "tokens", tokens.len())?;
        let (n, top_k) = (size(OP, "sub_keys", dims.sub_keys)?, size(OP, "top_k", k)?);
        let from = tokens.start * dims.heads * k;
        let part = |pointer: u64| pointer + (from * 4) as u64;
        let rows = tokens.len() * dims.heads;
        // What both ways begin with, and where both write.
        let sizes = |args: Args| {
            let (heads, parts) = (size(OP, "heads", dims.heads)?, size(OP, "parts", dims.parts)?);
            Ok::<_, CudaError>(args.value(tile).value(heads).value(parts).value(n).value(top_k))
        };
        let outputs = |launch: Args| {
            let launch = launch.value(part(args.ids.pointer())).value(part(args.scores.pointer()));
            launch.value(part(args.weights.pointer()))
        };
        // Blocks that are on the device at once anyway: then each head's steps are as few as can be.
        if k <= FEW_K && rows <= 2 * self.properties.multiprocessors as usize {
            let kernel = self.kernels.get(Variant::of(File::Select), "select_few")?;
            let mut launch = outputs(sizes(Args::new().write(scores))?.value(size(OP, "top_k", pairs(k))?));
            return self.stream.launch(&kernel, Shape::new(rows, FEW_THREADS).early(), &mut launch);
        }
        let (name, capacity) = half_kernel(k);
        let warps = warps_for(capacity * 8);
        let kernel = self.kernels.get(Variant::of(File::Select), name)?;
        let mut launch = Args::new()
            .write(scores)
            .value(tile)
            .value(size(OP, "heads", halves)?)
            .value(n)
            .value(top_k)
            .value(size(OP, "top_k", capacity)?)
            .write(list_keys)
            .write(list_ids);
        let shape =
            Shape::new((tokens.len() * halves).div_ceil(warps), warps_block(warps)).shared(warps * capacity * 8);
        self.stream.launch(&kernel, shape, &mut launch)?;

        let pairs = pairs(k);
        let capacity = pairs.next_power_of_two();
        let warp_bytes = (capacity + 4 * k) * 8;
        let warps = warps_for(warp_bytes);
        let kernel = self.kernels.get(Variant::of(File::Select), "select_pairs")?;
        let mut launch = sizes(Args::new().write(scores))?
            .value(size(OP, "top_k", pairs)?)
            .value(size(OP, "top_k", capacity)?)
            .write(list_keys)
            .write(list_ids);
        launch = outputs(launch);
        let blocks = rows.div_ceil(warps).min(self.properties.multiprocessors as usize * 16);
        let shape = Shape::new(blocks, warps_block(warps)).shared(warps * warp_bytes + pairs * 4);
        self.stream.launch(&kernel, shape, &mut launch)
    }
}

/// Warps of a block, where each takes so many bytes of shared memory.
fn warps_for(bytes: usize) -> usize {
    (32 * 1024 / bytes).clamp(1, 4)
}

fn warps_block(warps: usize) -> u32 {
    u32::try_from(32 * warps).unwrap_or(THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_papers_pairs() {
        assert_eq!(pairs(32), 119);
        assert_eq!(pairs(1), 1);
        let most = (pairs(MAX_TOP_K).next_power_of_two() + 4 * MAX_TOP_K) * 8 + pairs(MAX_TOP_K) * 4;
        assert!(most < 163 << 10, "{most} bytes of shared memory fit into a block of every device from sm_80 on");
    }
}
