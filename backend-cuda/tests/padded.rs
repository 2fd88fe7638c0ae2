//! Rows with room between them: the bits of rows without. Skipped, and said so, where there is no device.

use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{EmbeddingBag, SelectRows};
use memlayer_core::{Bf16, Device, E4m3, Element, F16, Int4, Table};
use memlayer_cuda::{Cuda, CudaError, Rows};
use memlayer_tests::conformance::{assert_same_bits, skipped};
use memlayer_tests::device::{Memory, TestDevice};
use memlayer_tests::random::Random;

mod common;
use common::cuda;

const ROWS: usize = 700;
const BAG: usize = 8;

/// Rows of `width` codes, `stride` apart, with `between` them.
fn spread<E: Copy>(codes: &[E], width: usize, stride: usize, between: E) -> Vec<E> {
    let mut spread = vec![between; codes.len() / width * stride];
    for (to, from) in spread.chunks_exact_mut(stride).zip(codes.chunks_exact(width)) {
        to[..width].copy_from_slice(from);
    }
    spread
}

/// Sums and dots of `tokens` bags. Vectors are integers, so that dots with integers are exact, whatever their order.
fn bags<E: Element>(cuda: &Cuda, table: &Rows<'_, E>, tokens: usize) -> (Vec<f32>, Vec<f32>) {
    let (mut random, dim) = (Random::new(9), table.dim());
    let ids = cuda.upload(&random.ids(tokens * BAG, ROWS)).expect("ids");
    let weights = cuda.upload(&random.reals::<f32>(tokens * BAG)).expect("weights");
    let vectors = cuda.upload(&random.integers::<f32>(tokens * dim, 3)).expect("vectors");
    let (mut sums, mut dots) =
        (cuda.zeros::<f32>(tokens * dim).expect("sums"), cuda.zeros::<f32>(tokens * BAG).expect("dots"));
    let args = BagSum { bag: BAG, ids: ids.view(), weights: weights.view(), out: sums.view_mut(), accumulate: false };
    cuda.bag_sum(table, args).expect("sums");
    let args = BagDot { bag: BAG, ids: ids.view(), vectors: vectors.view(), out: dots.view_mut() };
    cuda.bag_dot(table, args).expect("dots");
    cuda.synchronize().expect("bags");
    (TestDevice::download(cuda, &sums), TestDevice::download(cuda, &dots))
}

fn read_alike<E: Element>(cuda: &Cuda, between: E, scaled: bool, of: impl Fn(f32) -> E) {
    for (dim, more) in [(1, 3), (17, 1), (64, 8), (100, 28), (100, 4), (1000, 24), (1000, 7)] {
        let (mut random, width) = (Random::new(dim as u64), E::codes(dim));
        let codes: Vec<E> = random.integers::<f32>(ROWS * width, 3).into_iter().map(&of).collect();
        let scales = cuda.upload(&random.reals::<f32>(if scaled { ROWS } else { 0 })).expect("scales");
        let scales = scaled.then_some(scales.view());
        let (dense, stride) = (cuda.upload(&codes).expect("rows"), width + more);
        let padded = cuda.upload(&spread(&codes, width, stride, between)).expect("rows");
        let dense = Rows::padded(dense.view(), scales, dim, dim, width).expect("rows");
        let padded = Rows::padded(padded.view(), scales, dim, dim, stride).expect("rows");
        assert_eq!((padded.rows(), padded.dim()), (ROWS, dim));
        // Few tokens are read by narrow loads.
        for tokens in [3, 2000] {
            let (expected, found) = (bags(cuda, &dense, tokens), bags(cuda, &padded, tokens));
            let case = format!("{} rows of {dim}, {stride} apart", E::FORMAT.name());
            assert_same_bits(&expected.0, &found.0, &format!("sums of {case}"));
            assert_same_bits(&expected.1, &found.1, &format!("dots of {case}"));
        }
    }
}

#[test]
fn sums_and_dots_of_padded_rows() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    read_alike(&cuda, f32::NAN, false, |x| x);
    read_alike(&cuda, Bf16::from_f32(f32::NAN), false, Bf16::from_f32);
    read_alike(&cuda, F16::from_f32(f32::NAN), false, F16::from_f32);
    #[allow(clippy::cast_possible_truncation, reason = "an integer up to 3")]
    read_alike(&cuda, 127i8, true, |x| x as i8);
    let e4m3 = |x: f32| {
        E4m3(
            [0, 0x38, 0x40, 0x44].into_iter().find(|c| E4m3(*c).to_f32() == x.abs()).expect("a code")
                | if x < 0.0 { 0x80 } else { 0 },
        )
    };
    read_alike(&cuda, E4m3(0x7f), true, e4m3);
    // A scale is two such bytes; those between the rows are NaN.
    #[allow(clippy::cast_possible_truncation, reason = "any code does")]
    read_alike(&cuda, Int4::<32>(0xff), false, |x| Int4::<32>((x.to_bits() >> 20) as u8 & 0x1f));
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let (codes, scales) = (cuda.zeros::<f32>(40).expect("rows"), cuda.zeros::<f32>(5).expect("scales"));
    let rows = |scales, dim, group, stride| Rows::padded(codes.view(), scales, dim, group, stride);
    assert!(rows(None, 6, 6, 8).is_some() && rows(Some(scales.view()), 6, 6, 8).is_some());
    assert!(rows(None, 6, 6, 5).is_none(), "rows that overlap");
    assert!(rows(None, 6, 6, 7).is_none(), "a part of a row");
    assert!(rows(None, 0, 1, 8).is_none() && rows(None, 6, 0, 8).is_none());
    assert!(rows(Some(scales.view()), 6, 3, 8).is_none(), "a scale for each row, not for each group");

    let dims = SelectDims { tokens: 1, heads: 1, parts: 1, sub_keys: 5, half_dim: 6, top_k: 2 };
    let queries = cuda.zeros::<f32>(dims.queries_len()).expect("queries");
    let mut scratch = Memory::new(&cuda, SelectRows::<Rows<'_, f32>>::select_scratch(&cuda, dims));
    let mut ids = cuda.zeros::<u32>(dims.bags_len()).expect("ids");
    let (mut scores, mut weights) =
        (cuda.zeros(dims.bags_len()).expect("scores"), cuda.zeros(dims.bags_len()).expect("weights"));
    let args = Select {
        dims,
        queries: queries.view(),
        keys: &rows(None, 6, 6, 8).expect("rows"),
        ids: ids.view_mut(),
        scores: scores.view_mut(),
        weights: weights.view_mut(),
    };
    let refused = CudaError::Unsupported { op: "select", what: "padded sub-keys" };
    assert_eq!(cuda.select(args, scratch.lend()), Err(refused));
}

/// What a miss fetches is a wish, whatever it is: it changes no result.
#[test]
fn any_fetch_gives_the_same_bits() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let codes = cuda.upload(&Random::new(1).reals::<f32>(ROWS * 100)).expect("rows");
    let expected = bags(&cuda, &Rows::new(codes.view(), 100), 2000);
    for bytes in [32, 128, 1 << 20, 64] {
        let wishing = Cuda::builder(0).stream(cuda.stream().clone()).fetch(bytes).build().expect("a device");
        assert!(bags(&wishing, &Rows::new(codes.view(), 100), 2000) == expected, "{bytes} bytes");
    }
}
