//! Selection: exactly the brute force over all slots, whatever the scores.

use memlayer_core::ops::SelectRows;
use memlayer_core::ops::plan::CHUNK;
use memlayer_core::ops::select::{Select, SelectBackward, SelectDims, score_order};
use memlayer_core::{Device, Element, Reference, ScaledRows, Table};

use super::{Subject, assert_same_bits, assert_within};
use crate::device::{Memory, TestDevice, poisoned};
use crate::random::Random;

/// What a selection gave.
pub struct Selected {
    /// `[T, H, K]`.
    pub ids: Vec<u32>,
    /// `[T, H, K]`.
    pub scores: Vec<f32>,
    /// `[T, H, K]`.
    pub weights: Vec<f32>,
}

/// Queries and keys of small integers, up to `greatest`, whose scores bf16 has exactly; with `odds`, one in three times as many keys
/// begins with NaN, and as many with each infinity, as all of their scores then show.
#[must_use]
pub fn integers(dims: SelectDims, seed: u64, greatest: usize, odds: usize) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random::new(seed);
    let mut queries = random.integers::<f32>(dims.queries_len(), greatest);
    let mut keys = random.integers::<f32>(dims.key_rows() * dims.half_dim, greatest);
    if odds > 0 {
        queries.chunks_exact_mut(dims.half_dim).for_each(|query| query[0] = 1.0);
        for key in keys.chunks_exact_mut(dims.half_dim) {
            let kind = random.below(3 * odds);
            if let Some(&special) = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].get(kind) {
                key[0] = special;
            }
        }
    }
    (queries, keys)
}

/// Selects over any table of keys.
///
/// # Panics
/// If the device reports an error.
pub fn select_over<D, K>(device: &D, dims: SelectDims, queries: &[f32], keys: &K) -> Selected
where
    K: Table,
    D: TestDevice<Scalar = f32> + SelectRows<K>,
{
    let queries = device.upload(queries);
    let mut ids = device.upload(&vec![u32::MAX; dims.bags_len()]);
    let (mut scores, mut weights) = (poisoned(device, dims.bags_len()), poisoned(device, dims.bags_len()));
    let mut scratch = Memory::new(device, device.select_scratch(dims));
    let args = Select {
        dims,
        queries: D::view(&queries),
        keys,
        ids: D::view_mut(&mut ids),
        scores: D::view_mut(&mut scores),
        weights: D::view_mut(&mut weights),
    };
    device.select(args, scratch.lend()).expect("a selection");
    device.synchronize().expect("a selection");
    Selected { ids: device.download(&ids), scores: device.download(&scores), weights: device.download(&weights) }
}

fn select<D: Subject>(device: &D, dims: SelectDims, queries: &[f32], keys: &[f32]) -> Selected {
    let keys = device.upload(keys);
    select_over(device, dims, queries, &D::rows(D::view(&keys), dims.half_dim))
}

/// The law, word for word: all slots, ordered by score, then by the rank of the first and of the second half.
#[must_use]
pub fn brute_force(dims: SelectDims, queries: &[f32], keys: &[f32]) -> Vec<u32> {
    let (n, c) = (dims.sub_keys, dims.half_dim);
    let mut ids = Vec::new();
    for th in 0..dims.tokens * dims.heads {
        let halves: Vec<Vec<f32>> = (0..dims.parts)
            .map(|p| {
                let query = &queries[(th * dims.parts + p) * c..][..c];
                let key = |i| &keys[dims.key_row(th % dims.heads, p, i) * c..][..c];
                // From zero, in order: exact inputs have one sum only.
                (0..n).map(|i| query.iter().zip(key(i)).fold(0.0, |sum, (q, k)| sum + q * k)).collect()
            })
            .collect();
        let ranked: Vec<Vec<usize>> = halves
            .iter()
            .map(|half| {
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| score_order(half[a], half[b]));
                order
            })
            .collect();
        let mut slots: Vec<(f32, usize)> = Vec::new();
        for &i in &ranked[0] {
            if dims.parts == 1 {
                slots.push((halves[0][i], i));
                continue;
            }
            slots.extend(ranked[1].iter().map(|&j| (halves[0][i] + halves[1][j], i * n + j)));
        }
        slots.sort_by(|a, b| score_order(a.0, b.0));
        ids.extend(slots[..dims.top_k].iter().map(|&(_, id)| u32::try_from(id).expect("a slot")));
    }
    ids
}

/// Shapes around every edge: one token, none, `K = N`, odd widths, flat keys, blocks and their neighbours.
#[must_use]
pub fn shapes() -> Vec<SelectDims> {
    let mut shapes = Vec::new();
    for (tokens, heads, parts, sub_keys, half_dim, top_k) in [
        (1, 1, 2, 1, 1, 1),
        (0, 2, 2, 8, 4, 2),
        (1, 5, 2, 17, 3, 5),
        (3, 1, 2, 17, 7, 17),
        (2, 2, 2, 16, 8, 16),
        (5, 3, 2, 33, 5, 7),
        (9, 2, 2, 64, 16, 32),
        (17, 1, 2, 63, 15, 31),
        (8, 2, 2, 128, 32, 33),
        (4, 1, 2, 100, 9, 64),
        (6, 2, 1, 50, 6, 8),
        (3, 1, 1, 300, 10, 300),
        (33, 4, 2, 65, 17, 9),
    ] {
        shapes.push(SelectDims { tokens, heads, parts, sub_keys, half_dim, top_k });
    }
    shapes
}

fn inputs(dims: SelectDims, random: &mut Random, greatest: usize) -> (Vec<f32>, Vec<f32>) {
    (random.integers(dims.queries_len(), greatest), random.integers(dims.key_rows() * dims.half_dim, greatest))
}

/// Small integers have exact scores and many ties: every index is decided by the law.
///
/// # Panics
/// If it is not obeyed.
pub fn obeys_the_law_with_ties<D: Subject>(device: &D) {
    for (i, dims) in shapes().into_iter().enumerate() {
        for greatest in [0, 1, 3] {
            let (queries, keys) = inputs(dims, &mut Random::new(i as u64), greatest);
            let found = select(device, dims, &queries, &keys);
            assert_eq!(found.ids, brute_force(dims, &queries, &keys), "{dims:?}, integers to {greatest}");
        }
    }
}

/// NaN counts as greatest, and so does the sum of opposite infinities, wherever the halves have them.
///
/// # Panics
/// If the law is not obeyed.
pub fn obeys_the_law_with_nan_and_infinities<D: Subject>(device: &D) {
    const SPECIAL: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (i, dims) in shapes().into_iter().enumerate() {
        for round in 0..12u64 {
            let mut random = Random::new(1000 * i as u64 + round);
            let (mut queries, mut keys) = inputs(dims, &mut random, 2);
            // One value a row is special, and the query there is not zero: the score is that special value.
            for query in queries.chunks_exact_mut(dims.half_dim) {
                query[0] = 1.0;
            }
            let (odds, kinds) = [(3, 3), (10, 3), (2, 2), (40, 3)][random.below(4)];
            for key in keys.chunks_exact_mut(dims.half_dim) {
                if random.below(odds) == 0 {
                    key[0] = SPECIAL[3 - kinds + random.below(kinds)];
                }
            }
            let found = select(device, dims, &queries, &keys);
            assert_eq!(found.ids, brute_force(dims, &queries, &keys), "{dims:?}, round {round}");
        }
    }
}

/// Scores and weights against `f64`, each within the bound of its own terms.
///
/// # Panics
/// If one is out of its bound.
pub fn scores_are_in_their_bound<D: Subject>(device: &D) {
    for (i, dims) in shapes().into_iter().enumerate() {
        let mut random = Random::new(77 + i as u64);
        let (queries, keys) = (random.reals::<f32>(dims.queries_len()), random.reals(dims.key_rows() * dims.half_dim));
        let found = select(device, dims, &queries, &keys);
        let (mut scores, mut bounds, mut weights) = (vec![], vec![], vec![]);
        for (at, &id) in found.ids.iter().enumerate() {
            let th = at / dims.top_k;
            let (mut score, mut terms) = (0.0, 0.0);
            for p in 0..dims.parts {
                let query = &queries[(th * dims.parts + p) * dims.half_dim..][..dims.half_dim];
                let row = dims.key_row(th % dims.heads, p, dims.sub_key(id, p));
                for (&q, &k) in query.iter().zip(&keys[row * dims.half_dim..][..dims.half_dim]) {
                    score += f64::from(q) * f64::from(k);
                    terms += (f64::from(q) * f64::from(k)).abs();
                }
            }
            scores.push(score);
            bounds.push((dims.half_dim + 2) as f64 * f64::from(f32::EPSILON) * terms);
        }
        assert_within(&scores, &found.scores, &bounds, &format!("scores of {dims:?}"));
        for bag in scores.chunks(dims.top_k) {
            let sum: f64 = bag.iter().map(|s| (s - bag[0]).exp()).sum();
            weights.extend(bag.iter().map(|s| (s - bag[0]).exp() / sum));
        }
        // A score off by b moves its weight by a factor of exp(2b) at most; the rest is rounding.
        let bounds: Vec<f64> = weights
            .iter()
            .zip(bounds.chunks(dims.top_k).flat_map(|b| {
                let greatest = b.iter().copied().fold(0.0, f64::max);
                vec![greatest; b.len()]
            }))
            .map(|(w, b)| w * (2.5 * b + (dims.top_k + 16) as f64 * f64::from(f32::EPSILON)))
            .collect();
        assert_within(&weights, &found.weights, &bounds, &format!("weights of {dims:?}"));
    }
}

/// Packed keys with scales that are powers of two have exact scores.
///
/// # Panics
/// If the law is not obeyed.
pub fn reads_packed_keys<D: Subject>(device: &D) {
    fn check<D, E: Element>(device: &D, dims: SelectDims, queries: &[f32], codes: &[E], scales: &[f32])
    where
        D: Subject + for<'x> SelectRows<<D as TestDevice>::Packed<'x, E>>,
    {
        let widths = dims.half_dim;
        let rows = codes.chunks_exact(widths).zip(scales);
        let keys: Vec<f32> =
            rows.flat_map(|(row, s)| (0..widths).map(|i| s * E::value::<f32>(row, i)).collect::<Vec<_>>()).collect();
        let (codes, scales) = (device.upload(codes), device.upload(scales));
        let found = select_over(device, dims, queries, &D::packed(&codes, &scales, widths));
        assert_eq!(found.ids, brute_force(dims, queries, &keys), "{dims:?} {}", E::FORMAT);
    }
    for (i, dims) in shapes().into_iter().enumerate() {
        let mut random = Random::new(500 + i as u64);
        let queries = random.integers::<f32>(dims.queries_len(), 3);
        let scales: Vec<f32> = (0..dims.key_rows()).map(|_| [0.25, 0.5, 1.0, 2.0][random.below(4)]).collect();
        let bytes: Vec<u8> =
            (0..dims.key_rows() * dims.half_dim).map(|_| u8::try_from(random.below(9)).expect("a byte")).collect();
        let int8: Vec<i8> = bytes.iter().map(|&b| i8::try_from(b).expect("a code") - 4).collect();
        check(device, dims, &queries, &int8, &scales);
        // Codes 0x30 to 0x38 are 0.5 to 1 in steps of an eighth of their power of two.
        let fp8: Vec<memlayer_core::E4m3> = bytes.iter().map(|&b| memlayer_core::E4m3(0x30 + b)).collect();
        check(device, dims, &queries, &fp8, &scales);
    }
}

/// The way back: scores' gradients in their bound, and with those given the queries' and keys' bit for bit.
///
/// # Panics
/// If one differs.
pub fn backward_is_the_references<D: Subject>(device: &D) {
    // Sub-keys with a chunk of entries, with one more, and with several.
    let hot = [(CHUNK, 1), (CHUNK + 1, 1), (2 * CHUNK, 1), (2 * CHUNK + 1, 1), (4 * CHUNK, 3)];
    let hot = hot.map(|(tokens, n)| SelectDims { tokens, heads: 2, parts: 2, sub_keys: n, half_dim: 9, top_k: n });
    for (i, dims) in shapes().into_iter().chain(hot).enumerate() {
        let mut random = Random::new(900 + i as u64);
        let queries = random.reals::<f32>(dims.queries_len());
        let keys = random.reals::<f32>(dims.key_rows() * dims.half_dim);
        let chosen = select(device, dims, &queries, &keys);
        let dweights = random.integers::<f32>(dims.bags_len(), 4);
        let both = |weights: &[f32]| {
            let reference = Reference::<f32>::new();
            let expected = backward(&reference, dims, &queries, &keys, &chosen.ids, weights, &dweights);
            (expected, backward(device, dims, &queries, &keys, &chosen.ids, weights, &dweights))
        };
        // Of equal weights, a power of two, and small integers the softmax's backward is exact in whatever order it sums.
        let (expected, found) = both(&vec![1.0 / 128.0; dims.bags_len()]);
        for (i, name) in ["dscores", "dqueries", "dkeys"].iter().enumerate() {
            assert_same_bits(&expected[i], &found[i], &format!("{name} of {dims:?}"));
        }
        let ([expected, ..], [found, ..]) = both(&chosen.weights);
        let bound = (dims.top_k + 4) as f64 * 5.0 * f64::from(f32::EPSILON);
        let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
        assert_within(&expected, &found, &vec![bound; expected.len()], &format!("dscores of {dims:?}"));
    }
}

/// Gradients of scores, queries and keys.
fn backward<D>(
    device: &D,
    dims: SelectDims,
    queries: &[f32],
    keys: &[f32],
    ids: &[u32],
    weights: &[f32],
    dweights: &[f32],
) -> [Vec<f32>; 3]
where
    D: TestDevice<Scalar = f32> + for<'x> SelectRows<<D as Device>::Rows<'x>>,
{
    let (queries, keys) = (device.upload(queries), device.upload(keys));
    let (ids, weights) = (device.upload(ids), device.upload(weights));
    let mut dscores = device.upload(dweights);
    let (mut dqueries, mut dkeys) =
        (poisoned(device, dims.queries_len()), poisoned(device, dims.key_rows() * dims.half_dim));
    let table = D::rows(D::view(&keys), dims.half_dim);
    let req = SelectRows::<<D as Device>::Rows<'_>>::select_backward_scratch(device, dims, true);
    let mut scratch = Memory::new(device, req);
    let args = SelectBackward {
        dims,
        queries: D::view(&queries),
        keys: &table,
        ids: D::view(&ids),
        weights: D::view(&weights),
        dweights: D::view_mut(&mut dscores),
        dqueries: Some(D::view_mut(&mut dqueries)),
        dkeys: Some(D::view_mut(&mut dkeys)),
    };
    device.select_backward(args, scratch.lend()).expect("a backward");
    device.synchronize().expect("a backward");
    [device.download(&dscores), device.download(&dqueries), device.download(&dkeys)]
}

/// Wrong sizes are errors, and the scratch is asked for to the element.
///
/// # Panics
/// If one is accepted, or the exact scratch is refused.
pub fn refuses_what_does_not_fit<D: Subject>(device: &D) {
    let dims = SelectDims { tokens: 3, heads: 2, parts: 2, sub_keys: 9, half_dim: 5, top_k: 4 };
    let keys = device.upload(&vec![0.5f32; dims.key_rows() * dims.half_dim]);
    let run = |dims: SelectDims, queries: usize, short: [usize; 2]| {
        let table = D::rows(D::view(&keys), 5);
        let queries = device.upload(&vec![0.5f32; queries]);
        let mut ids = device.upload(&[0u32; 24]);
        let (mut scores, mut weights) = (device.upload(&[0f32; 24]), device.upload(&[0f32; 24]));
        let mut req = SelectRows::<<D as Device>::Rows<'_>>::select_scratch(device, dims);
        let needs = [req.reals > 0, req.ids > 0];
        req.reals = req.reals.saturating_sub(short[0]);
        req.ids = req.ids.saturating_sub(short[1]);
        let args = Select {
            dims,
            queries: D::view(&queries),
            keys: &table,
            ids: D::view_mut(&mut ids),
            scores: D::view_mut(&mut scores),
            weights: D::view_mut(&mut weights),
        };
        let mut memory = Memory::new(device, req);
        (device.select(args, memory.lend()).is_ok(), needs)
    };
    assert!(run(dims, 60, [0, 0]).0, "exact sizes");
    assert!(!run(dims, 59, [0, 0]).0, "a query too short");
    assert!(!run(SelectDims { top_k: 10, ..dims }, 60, [0, 0]).0, "more rows than sub-keys");
    assert!(!run(SelectDims { sub_keys: 8, ..dims }, 60, [0, 0]).0, "another number of keys");
    let (_, needs) = run(dims, 60, [0, 0]);
    for (short, needed) in [([1, 0], needs[0]), ([0, 1], needs[1])] {
        assert_eq!(run(dims, 60, short).0, !needed, "scratch one element short: {short:?}");
    }
}

/// Packed rows on the host.
#[must_use]
pub fn host_rows<'a, E: Element>(codes: &'a [E], scales: &'a [f32], dim: usize) -> ScaledRows<'a, E> {
    ScaledRows::new(codes, scales, dim, dim).expect("sizes of packed rows")
}
