//! Selection on every instruction set: the reference's slots where sums are exact, ties, NaN and infinities
//! included; for any other values scores that are as good as the exact ones, rank by rank.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::ops::SelectRows;
use memlayer_core::ops::select::{Select, SelectDims, score_order};
use memlayer_core::{Bf16, DenseRows, E4m3, Reference, RowStore, ScaledRows, Scratch};
use memlayer_fuzz::{Input, Values, cpus, same, wide};
use memlayer_tests::conformance::select::{Selected, brute_force, select_over};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    // With many sub-keys and few of them wanted the CPU scores integers first.
    let most = input.pick([4, 20, 70, 600]);
    let sub_keys = input.size(1..=most);
    let dims = SelectDims {
        tokens: input.size(0..=20),
        heads: input.size(1..=3),
        parts: input.size(1..=2),
        sub_keys,
        half_dim: input.size(1..=if most > 20 { 9 } else { 40 }),
        top_k: input.size(1..=if sub_keys > 280 { 8 } else { sub_keys }),
    };
    if dims.tokens * dims.key_rows() * (dims.half_dim + dims.top_k) > 1 << 17 {
        return;
    }
    let kind = input.pick([Values::Exact, Values::Special, Values::Any]);
    let queries = input.values(dims.queries_len(), kind);
    let (len, rows) = (dims.key_rows() * dims.half_dim, dims.key_rows());
    match input.size(0..=3) {
        0 => {
            let keys = input.values(len, kind);
            if kind != Values::Any && sub_keys <= 20 {
                let found = select_over(&cpus()[0], dims, &queries, &DenseRows::new(&keys, dims.half_dim));
                assert_eq!(found.ids, brute_force(dims, &queries, &keys), "{dims:?}");
            }
            check(dims, kind, &queries, &DenseRows::new(&keys, dims.half_dim));
        }
        1 => {
            let keys: Vec<Bf16> = input.values(len, kind).into_iter().map(Bf16::from_f32).collect();
            check(dims, kind, &queries, &DenseRows::new(&keys, dims.half_dim));
        }
        2 => {
            let codes: Vec<i8> = input.bytes(len).into_iter().map(|b| (b % 9) as i8 - 4).collect();
            let group = input.size(1..=dims.half_dim);
            let scales = input.scales(rows * dims.half_dim.div_ceil(group), kind);
            check(dims, kind, &queries, &ScaledRows::new(&codes, &scales, dims.half_dim, group).expect("rows"));
        }
        _ => {
            // Codes of small integers, that sums are exact.
            const CODES: [u8; 4] = [0, 0x38, 0xb8, 0x40];
            let codes: Vec<E4m3> = input.bytes(len).iter().map(|b| E4m3(CODES[usize::from(b % 4)])).collect();
            let scales = input.scales(rows, kind);
            check(dims, kind, &queries, &ScaledRows::new(&codes, &scales, dims.half_dim, dims.half_dim).expect("rows"));
        }
    }
});

fn check<K: RowStore + Sync>(dims: SelectDims, kind: Values, queries: &[f32], keys: &K) {
    let reference = select_over(&Reference::<f32>::new(), dims, queries, keys);
    for cpu in cpus() {
        let found = select_over(cpu, dims, queries, keys);
        if kind == Values::Any {
            ranks(dims, queries, keys, &found, cpu.name());
            continue;
        }
        assert_eq!(found.ids, reference.ids, "{}: {dims:?}", cpu.name());
        for (i, (&a, &b)) in found.scores.iter().zip(&reference.scores).enumerate() {
            assert!(same(a, b), "{}: score {i} is {a}, not {b}: {dims:?}", cpu.name());
        }
        for (i, (&a, &b)) in found.weights.iter().zip(&reference.weights).enumerate() {
            let close = (a - b).abs() <= 8.0 * f32::EPSILON || same(a, b);
            assert!(close, "{}: weight {i} is {a}, not {b}: {dims:?}", cpu.name());
        }
    }
}

/// What holds for scores that are rounded: slots are distinct, best first, and each rank's score is as near to the
/// exact score of that rank as a rounded sum may be.
fn ranks<K: RowStore>(dims: SelectDims, queries: &[f32], keys: &K, found: &Selected, name: &str) {
    let device = Reference::<f64>::new();
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![0; n], vec![0.0; n], vec![0.0; n]);
    let req = SelectRows::<K>::select_scratch(&device, dims);
    let (mut reals, mut more) = (vec![0.0; req.reals], vec![0; req.ids]);
    let queries = wide(queries);
    let (ids, out, weights) = (&mut ids[..], &mut scores[..], &mut weights[..]);
    let args = Select::<Reference<f64>, K> { dims, queries: &queries, keys, ids, scores: out, weights };
    device.select(args, Scratch { reals: &mut reals, ids: &mut more }).expect("a selection");

    for (th, bag) in found.ids.chunks(dims.top_k).enumerate() {
        let mut seen = bag.to_vec();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), bag.len(), "{name}: a slot twice: {dims:?}");
        let range = th * dims.top_k..(th + 1) * dims.top_k;
        let (found, exact) = (&found.scores[range.clone()], &scores[range]);
        assert!(found.windows(2).all(|pair| score_order(pair[0], pair[1]).is_le()), "{name}: not best first: {dims:?}");
        let Some(bound) = bound(dims, th, &queries, keys) else { continue };
        for (rank, (&found, &exact)) in found.iter().zip(exact).enumerate() {
            let off = (f64::from(found) - exact).abs();
            assert!(off <= bound, "{name}: rank {rank} is {found}, not {exact} within {bound}: {dims:?}");
        }
    }
}

/// How far the score of any slot may be off; `None` where products or sums leave the range of `f32`.
fn bound<K: RowStore>(dims: SelectDims, th: usize, queries: &[f64], keys: &K) -> Option<f64> {
    let mut bound = 0.0;
    for p in 0..dims.parts {
        let query = &queries[(th * dims.parts + p) * dims.half_dim..][..dims.half_dim];
        let mut worst = 0.0f64;
        for n in 0..dims.sub_keys {
            let row = keys.row(u32::try_from(dims.key_row(th % dims.heads, p, n)).ok()?);
            let mut terms = 0.0;
            for (c, &q) in query.iter().enumerate() {
                let (key, scale): (f64, f64) = (row.value(c), row.scale(c));
                // A sum that is scaled last meets the codes' own products on the way.
                let products = [q * key, q * row.code::<f64>(c), key, scale];
                if products.iter().any(|x| !x.is_finite() || x.abs() > 1e36) {
                    return None;
                }
                let lost = f64::from(f32::from_bits(1)) * (1.0 + q.abs() + scale.abs());
                terms += (q * key).abs() * f64::from(f32::EPSILON) * (dims.half_dim + 4) as f64 + lost;
            }
            worst = worst.max(terms);
        }
        bound += worst;
    }
    // The sum of two halves is rounded once more.
    let greatest = f64::from(f32::MAX);
    (bound < greatest).then_some(bound * 2.0)
}
