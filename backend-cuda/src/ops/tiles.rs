//! Selection of many tokens on Hopper, by scores on tensor cores that are never stored (`tiles.cu`).

use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::{Element, Scratch, ScratchReq};

use super::select::{FEW_K, FEW_THREADS, pairs, reads_by_four, take_aligned_to};
use super::{aligned, size};
use crate::error::CudaError;
use crate::kernels::{File, Variant, format};
use crate::launch::{Args, Shape};
use crate::memory::Rows;
use crate::{Cuda, Scores};

const TILE_TOKENS: usize = 128;
const TILE_KEYS: usize = 256;
/// Values of a query or sub-key that are multiplied at once.
const DEPTH: usize = 64;
/// Bytes of so many values of the sub-keys of a tile.
const PIECE: usize = TILE_KEYS * DEPTH * 2;
/// Survivors of a half, and the words of one.
const SURVIVORS: usize = 4 * 32;
const SURVIVOR: usize = 2;
/// Bytes that everything is aligned to: a segment of survivors lies at a multiple of its length.
const ALIGNED: usize = 256;
/// Words of survivors at most, for tokens that are worked on at once.
const MOST_WORDS: usize = 16 << 20;
/// Scores of heads that are done again, at most.
const MOST_AGAIN: usize = 4 << 20;
const SCORE_THREADS: u32 = 384;
const CHOOSE_THREADS: u32 = 128;
/// Pieces of sub-keys that are under way at most.
const MOST_STAGES: usize = 5;

/// A call that can be done this way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    dims: SelectDims,
    /// Tokens that are worked on at once.
    tokens: usize,
    /// Blocks that do heads again.
    again: usize,
    stages: usize,
    /// Shared memory of a block.
    shared: usize,
}

impl Call {
    /// If the device has what it takes, the sizes fit, and there are tokens enough to keep it busy.
    pub(crate) fn of(cuda: &Cuda, dims: SelectDims) -> Option<Self> {
        let (halves, n, c) = (dims.heads * dims.parts, dims.sub_keys, dims.half_dim);
        let fits = cuda.scores == Scores::Bf16
            && cuda.properties.capability == (9, 0)
            && dims.top_k <= FEW_K
            && n.is_multiple_of(TILE_KEYS)
            && c.is_multiple_of(8)
            && halves <= 65_535
            && dims.tokens.div_ceil(TILE_TOKENS) * halves * 4 >= cuda.properties.multiprocessors as usize;
        if !fits {
            return None;
        }
        // 1024 bytes to align what follows.
        let queries = 1024 + TILE_TOKENS * c.next_multiple_of(DEPTH) * 2;
        let stages = (cuda.properties.shared.checked_sub(queries + 1024)? / PIECE).min(MOST_STAGES);
        let tokens = (MOST_WORDS / (halves * SURVIVORS * SURVIVOR)).max(TILE_TOKENS).min(dims.tokens);
        let again = (MOST_AGAIN / (dims.parts * n)).clamp(1, cuda.properties.multiprocessors as usize);
        (stages >= 2).then_some(Self { dims, tokens, again, stages, shared: queries + stages * PIECE })
    }

    /// Floats of the image of the sub-keys.
    fn image(&self) -> usize {
        self.dims.key_rows() * self.dims.half_dim.next_multiple_of(DEPTH) / 2
    }
    fn rows(&self) -> usize {
        self.tokens * self.dims.heads * self.dims.parts
    }
    fn again(&self) -> usize {
        self.again * self.dims.parts * self.dims.sub_keys
    }

    pub(crate) fn scratch(&self) -> ScratchReq {
        let reals = self.image() + self.rows() * SURVIVORS * SURVIVOR + self.rows() * 4 + self.again();
        ScratchReq::new(reals + 4 * (ALIGNED / 4 - 1), 1 + self.tokens * self.dims.heads)
    }
}

impl Cuda {
    /// The arguments and the scratch are checked.
    pub(crate) fn select_tiles<E: Element>(
        &self,
        call: &Call,
        args: &Select<'_, Self, Rows<'_, E>>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        const OP: &str = "select";
        let Call { dims, .. } = *call;
        let (halves, k, c) = (dims.heads * dims.parts, dims.top_k, dims.half_dim);
        let (image, scratch) = take_aligned_to(ALIGNED, scratch, call.image());
        let (survivors, scratch) = take_aligned_to(ALIGNED, scratch, call.rows() * SURVIVORS * SURVIVOR);
        let (counts, scratch) = take_aligned_to(ALIGNED, scratch, call.rows() * 4);
        let (room, scratch) = take_aligned_to(ALIGNED, scratch, call.again());
        let (failed, _) = scratch.take_ids(1 + call.tokens * dims.heads);
        let variant = Variant::of(File::Tiles);

        let rows = dims.key_rows();
        let kernel = self.kernels.get(variant.format(format::<E>(OP)?), "tile_keys")?;
        let mut launch = Args::new()
            .read(args.keys.codes)
            .read_or_null::<f32>(args.keys.scales)
            .value(size(OP, "width of keys", c)?)
            .value(size(OP, "group", args.keys.group.min(c))?)
            .value(size(OP, "rows of keys", rows)?)
            .value(u32::from(reads_by_four(args.keys)))
            .write(&image);
        let blocks = self.blocks_for(rows * c.next_multiple_of(DEPTH) / 8, 256);
        self.stream.launch(&kernel, Shape::new(blocks, 256), &mut launch)?;

        let (heads, parts) = (size(OP, "heads", dims.heads)?, size(OP, "parts", dims.parts)?);
        let (n, top_k) = (size(OP, "sub_keys", dims.sub_keys)?, size(OP, "top_k", k)?);
        let (dim, all_pairs) = (size(OP, "width of keys", c)?, size(OP, "top_k", pairs(k))?);
        let mut first = 0;
        while first < dims.tokens {
            let count = call.tokens.min(dims.tokens - first);
            let tokens = size(OP, "tokens", count)?;
            let queries = args.queries.slice(first * halves * c..(first + count) * halves * c);
            let part = |pointer: u64| pointer + (first * dims.heads * k * 4) as u64;
            let out = [args.ids.pointer(), args.scores.pointer(), args.weights.pointer()].map(part);
            let kernel = self.kernels.get(variant, "score_tiles")?;
            let mut launch = Args::new()
                .write(&image)
                .read(queries)
                .value(tokens)
                .value(size(OP, "heads", halves)?)
                .value(n)
                .value(dim)
                .value(u32::from(aligned(queries.pointer(), c)))
                .value(size(OP, "stages", call.stages)?)
                .value(top_k)
                .write(&survivors)
                .write(&counts);
            let shape = Shape::new(count.div_ceil(TILE_TOKENS), SCORE_THREADS).by(halves).shared(call.shared);
            self.stream.launch(&kernel, shape, &mut launch)?;

            self.stream.zero(failed.pointer(), 4)?;
            let kernel = self.kernels.get(variant, "choose_tiles")?;
            let [ids, scores, weights] = out;
            let mut launch = Args::new()
                .write(&survivors)
                .write(&counts)
                .value(tokens)
                .value(heads)
                .value(parts)
                .value(n)
                .value(top_k)
                .value(all_pairs)
                .write(&failed)
                .value(ids)
                .value(scores)
                .value(weights);
            let blocks = (count * dims.heads).div_ceil(CHOOSE_THREADS as usize / 32);
            self.stream.launch(&kernel, Shape::new(blocks, CHOOSE_THREADS), &mut launch)?;

            let kernel = self.kernels.get(variant, "choose_rest")?;
            let mut launch = Args::new()
                .write(&image)
                .read(queries)
                .value(heads)
                .value(parts)
                .value(n)
                .value(dim)
                .value(top_k)
                .value(all_pairs)
                .write(&failed)
                .write(&room)
                .value(ids)
                .value(scores)
                .value(weights);
            self.stream.launch(&kernel, Shape::new(call.again, FEW_THREADS), &mut launch)?;
            first += count;
        }
        Ok(())
    }
}
