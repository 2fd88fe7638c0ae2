//! Selection, and what a single token takes.

use memlayer_core::ops::bag::BagSum;
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, SelectRows};
use memlayer_core::{Bf16, Scratch};
use memlayer_cuda::{Buffer, Cuda, CudaError, Rows, Scores};

use super::device::{Bench, SETS};
use super::{Case, TOKENS};

impl Bench<'_> {
    /// Selection for few and many tokens, scores made either way.
    pub(super) fn selections(&self) -> Result<(), CudaError> {
        if !self.wants("select") {
            return Ok(());
        }
        let rough = Cuda::builder(0).stream(self.cuda.stream().clone()).scores(Scores::Bf16).build()?;
        for tokens in [1, 32, TOKENS, 32_768] {
            self.select(&self.cuda, "f32", tokens)?;
            self.select(&rough, "bf16", tokens)?;
        }
        Ok(())
    }

    /// Selection and sum for one token, launched one by one and as a graph.
    pub(super) fn decode(&self) -> Result<(), CudaError> {
        if !self.wants("decode") {
            return Ok(());
        }
        let mut state = decode_state(self)?;
        let case = Case { op: "decode", format: "bf16", ids: "-", tokens: 1, width: DECODE_WIDTH, slots: 1 << 20 };
        let ms = self.time(|_| decode(&self.cuda, &mut state))?;
        self.report(case, 0.0, ms);
        // A hundred launches between two events: their own time would drown one.
        let mut graph = self.cuda.graph(state, decode)?;
        let ms = self.time(|_| (0..100).try_for_each(|_| graph.launch()))?;
        self.report(Case { op: "decode (graph)", ..case }, 0.0, ms / 100.0);
        Ok(())
    }

    fn select(&self, cuda: &Cuda, label: &'static str, tokens: usize) -> Result<(), CudaError> {
        let dims = SelectDims { tokens, heads: 4, parts: 2, sub_keys: 1024, half_dim: 256, top_k: 32 };
        let keys = self.reals(dims.key_rows() * dims.half_dim, 1)?;
        let sets: Result<Vec<_>, _> = (0..SETS).map(|s| self.reals(dims.queries_len(), 10 + s as u64)).collect();
        let sets = sets?;
        let req = SelectRows::<Rows<'_, f32>>::select_scratch(cuda, dims);
        let (mut reals, mut scratch_ids) = (cuda.zeros::<f32>(req.reals)?, cuda.zeros::<u32>(req.ids)?);
        let mut ids = cuda.zeros::<u32>(dims.bags_len())?;
        let (mut scores, mut weights) = (cuda.zeros::<f32>(dims.bags_len())?, cuda.zeros::<f32>(dims.bags_len())?);
        let table = Rows::new(keys.view(), dims.half_dim);
        let ms = self.time(|set| {
            let args = Select {
                dims,
                queries: sets[set].view(),
                keys: &table,
                ids: ids.view_mut(),
                scores: scores.view_mut(),
                weights: weights.view_mut(),
            };
            cuda.select(args, Scratch { reals: reals.view_mut(), ids: scratch_ids.view_mut() })
        })?;
        self.report(Case { op: "select", format: label, ids: "-", tokens, width: 256, slots: 1 << 20 }, 0.0, ms);
        Ok(())
    }
}

const DECODE: SelectDims = SelectDims { tokens: 1, heads: 4, parts: 2, sub_keys: 1024, half_dim: 256, top_k: 32 };
const DECODE_WIDTH: usize = 1024;

struct Decode {
    queries: Buffer<f32>,
    keys: Buffer<f32>,
    values: Buffer<Bf16>,
    ids: Buffer<u32>,
    scores: Buffer<f32>,
    weights: Buffer<f32>,
    out: Buffer<f32>,
    reals: Buffer<f32>,
    scratch_ids: Buffer<u32>,
}

/// A token's selection and sum.
fn decode(cuda: &Cuda, s: &mut Decode) -> Result<(), CudaError> {
    let keys = Rows::new(s.keys.view(), DECODE.half_dim);
    let select = Select {
        dims: DECODE,
        queries: s.queries.view(),
        keys: &keys,
        ids: s.ids.view_mut(),
        scores: s.scores.view_mut(),
        weights: s.weights.view_mut(),
    };
    cuda.select(select, Scratch { reals: s.reals.view_mut(), ids: s.scratch_ids.view_mut() })?;
    let (ids, weights, out) = (s.ids.view(), s.weights.view(), s.out.view_mut());
    let sum = BagSum { bag: DECODE.heads * DECODE.top_k, ids, weights, out, accumulate: false };
    cuda.bag_sum(&Rows::new(s.values.view(), DECODE_WIDTH), sum)
}

fn decode_state(bench: &Bench<'_>) -> Result<Decode, CudaError> {
    let cuda = &bench.cuda;
    let req = SelectRows::<Rows<'_, f32>>::select_scratch(cuda, DECODE);
    Ok(Decode {
        queries: bench.reals(DECODE.queries_len(), 1)?,
        keys: bench.reals(DECODE.key_rows() * DECODE.half_dim, 2)?,
        values: bench.codes(DECODE_WIDTH << 20, Bf16::from_f32)?,
        ids: cuda.zeros(DECODE.bags_len())?,
        scores: cuda.zeros(DECODE.bags_len())?,
        weights: cuda.zeros(DECODE.bags_len())?,
        out: cuda.zeros(DECODE_WIDTH)?,
        reals: cuda.zeros(req.reals)?,
        scratch_ids: cuda.zeros(req.ids)?,
    })
}
