//! Selection among many sub-keys, which are scored by integers first: bit for bit what the reference selects. All
//! values are integers times a power of two whose sums are exact in `f32`, but of more bits than codes have.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

use memlayer_core::ops::SelectRows;
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::{ArgError, Bf16, DenseRows, Reference, RowStore, ScaledRows, Scratch, Table};
use memlayer_cpu::{Cpu, Isa, PanelKeys};

mod common;
use common::{Random, backends, bits};

/// Sub-keys and K: enough sub-keys for coarse scores.
const SIZES: [(usize, usize, usize); 5] = [(300, 3, 1), (300, 29, 1), (517, 17, 8), (800, 16, 32), (1500, 20, 20)];

/// Ids and scores.
fn selected<K: Table>(cpu: &Cpu, dims: SelectDims, queries: &[f32], keys: &K) -> (Vec<u32>, Vec<f32>)
where
    Cpu: SelectRows<K>,
{
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![u32::MAX; n], vec![f32::NAN; n], vec![f32::NAN; n]);
    let req = SelectRows::<K>::select_scratch(cpu, dims);
    let (mut reals, mut places) = (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids]);
    let scratch = Scratch { reals: &mut reals[..], ids: &mut places[..] };
    let (i, s, w) = (&mut ids[..], &mut scores[..], &mut weights[..]);
    cpu.select(Select { dims, queries, keys, ids: i, scores: s, weights: w }, scratch).unwrap();
    (ids, scores)
}

fn agree<K: RowStore + Sync>(what: &str, cpus: &[&Cpu], dims: SelectDims, queries: &[f32], keys: &K) {
    let n = dims.bags_len();
    let (mut ids, mut scores, mut weights) = (vec![u32::MAX; n], vec![f32::NAN; n], vec![f32::NAN; n]);
    let reference = Reference::<f32>::new();
    let req = SelectRows::<K>::select_scratch(&reference, dims);
    let (mut reals, mut places) = (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids]);
    let scratch = Scratch { reals: &mut reals[..], ids: &mut places[..] };
    let (i, s, w) = (&mut ids[..], &mut scores[..], &mut weights[..]);
    reference.select(Select { dims, queries, keys, ids: i, scores: s, weights: w }, scratch).unwrap();
    for cpu in cpus {
        let got = selected(cpu, dims, queries, keys);
        assert_eq!(got.0, ids, "{what}: {} {dims:?}", cpu.name());
        assert_eq!(bits(&got.1), bits(&scores), "{what}: {} {dims:?}", cpu.name());
        let panels = PanelKeys::new(cpu, keys, dims.sub_keys).unwrap();
        let got = selected(cpu, dims, queries, &panels);
        assert_eq!(got.0, ids, "{what}, panels: {} {dims:?}", cpu.name());
        assert_eq!(bits(&got.1), bits(&scores), "{what}, panels: {} {dims:?}", cpu.name());
    }
}

/// Integers from -`most` to `most`.
fn integers(random: &mut Random, n: usize, most: u64) -> Vec<f32> {
    (0..n).map(|_| (random.next() % (2 * most + 1)) as f32 - most as f32).collect()
}

/// Every instruction set and number of threads with every size. Where there are to be few cases, as on a processor that is
/// emulated, each instruction set has one number of threads after the other: all would be minutes, and change nothing.
fn each(mut run: impl FnMut(SelectDims, &mut Random, &[&Cpu])) {
    let (cpus, random) = (backends(), &mut Random(11));
    let few = std::env::var_os("PROPTEST_CASES").is_some();
    for (i, (sub_keys, half_dim, top_k)) in SIZES.into_iter().enumerate() {
        // Few, some whose scores are a product with the sub-keys where they lie, and many.
        for (j, (tokens, parts)) in [(1, 2), (5, 1), (16, 1), (43, 2), (67, 2), (70, 1)].into_iter().enumerate() {
            let of_isas = cpus.chunk_by(|a, b| a.isa() == b.isa());
            let by_turns = of_isas.map(|of_isa| &of_isa[(i + j) % of_isa.len()]);
            let cpus: Vec<_> = if few { by_turns.collect() } else { cpus.iter().collect() };
            run(SelectDims { tokens, heads: 2, parts, sub_keys, half_dim, top_k }, random, &cpus);
        }
    }
}

#[test]
fn wide_integers() {
    each(|dims, random, cpus| {
        let queries = integers(random, dims.queries_len(), 400);
        let mut keys = integers(random, dims.key_rows() * dims.half_dim, 400);
        agree("even", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
        keys.iter_mut().for_each(|x| *x *= f32::powi(2.0, -20));
        agree("small keys", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
        keys.iter_mut().for_each(|x| *x *= f32::powi(2.0, -40));
        agree("keys too small to be bounded", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
        keys.iter_mut().for_each(|x| *x *= f32::powi(2.0, 125));
        agree("keys too large to be bounded", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
    });
}

#[test]
fn far_from_even() {
    each(|dims, random, cpus| {
        let (c, queries) = (dims.half_dim, integers(random, dims.queries_len(), 20));
        let mut keys = integers(random, dims.key_rows() * c, 20);
        // One value in fifty is much greater: the codes of the others are coarse.
        for x in keys.iter_mut().filter(|_| random.next() % 50 == 0) {
            *x *= 1000.0;
        }
        agree("outliers", cpus, dims, &queries, &DenseRows::new(&keys, c));
        let mut queries = queries;
        queries.iter_mut().step_by(7).for_each(|x| *x *= 500.0);
        keys.iter_mut().for_each(|x| *x = x.clamp(-50.0, 50.0));
        agree("outliers of queries", cpus, dims, &queries, &DenseRows::new(&keys, c));
        // Sub-keys that differ by the last bit of one value: far more than can be scored again are near the best.
        for key in keys.chunks_mut(c) {
            key.fill(300.0);
            key[(random.next() % c as u64) as usize] += (random.next() % 3) as f32;
        }
        let queries = integers(random, dims.queries_len(), 100);
        agree("all alike", cpus, dims, &queries, &DenseRows::new(&keys, c));
        // Five sub-keys, many times: ties.
        let few = integers(random, 5 * c, 300);
        for key in keys.chunks_mut(c) {
            key.copy_from_slice(few.chunks(c).nth((random.next() % 5) as usize).unwrap());
        }
        agree("ties", cpus, dims, &queries, &DenseRows::new(&keys, c));
        keys.fill(0.0);
        agree("no keys", cpus, dims, &queries, &DenseRows::new(&keys, c));
        let keys = integers(random, dims.key_rows() * c, 300);
        agree("no queries", cpus, dims, &vec![0.0; queries.len()], &DenseRows::new(&keys, c));
    });
}

#[test]
fn no_numbers() {
    each(|dims, random, cpus| {
        for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut queries = integers(random, dims.queries_len(), 200);
            let mut keys = integers(random, dims.key_rows() * dims.half_dim, 200);
            let at = (random.next() % keys.len() as u64) as usize;
            keys[at] = strange;
            agree("keys", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
            keys[at] = 1.0;
            let at = (random.next() % queries.len() as u64) as usize;
            queries[at] = strange;
            agree("queries", cpus, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
        }
    });
}

#[test]
fn packed_keys() {
    each(|dims, random, cpus| {
        let (c, rows) = (dims.half_dim, dims.key_rows());
        let queries = integers(random, dims.queries_len(), 400);
        let codes: Vec<i8> = (0..rows * c).map(|_| random.next() as i8).collect();
        let mut scales: Vec<f32> = (0..rows).map(|_| [1.0, 0.5, 0.25, -0.5][(random.next() % 4) as usize]).collect();
        agree("int8", cpus, dims, &queries, &ScaledRows::new(&codes, &scales, c, c).unwrap());
        agree("int8 without scales", cpus, dims, &queries, &DenseRows::new(&codes, c));
        scales[rows / 2] = f32::NAN;
        agree("a scale that is no number", cpus, dims, &queries, &ScaledRows::new(&codes, &scales, c, c).unwrap());
        let groups = vec![0.5; rows * c.div_ceil(2)];
        agree("groups", cpus, dims, &queries, &ScaledRows::new(&codes, &groups, c, 2).unwrap());
        let codes: Vec<Bf16> = codes.iter().map(|&x| Bf16::from_f32(f32::from(x))).collect();
        agree("bf16", cpus, dims, &queries, &DenseRows::new(&codes, c));
    });
}

#[test]
fn threads_change_nothing() {
    for tokens in [3, 37, 97] {
        let dims = SelectDims { tokens, heads: 3, parts: 2, sub_keys: 900, half_dim: 50, top_k: 32 };
        let random = &mut Random(12);
        let (queries, keys) = (random.reals(dims.queries_len()), random.reals(dims.key_rows() * 50));
        let cpus = backends();
        for of_isa in cpus.chunk_by(|a, b| a.isa() == b.isa()) {
            let got = |cpu: &Cpu| selected(cpu, dims, &queries, &DenseRows::new(&keys, 50));
            let first = got(&of_isa[0]);
            of_isa[1..].iter().for_each(|cpu| assert_eq!(got(cpu), first, "{}, {tokens} tokens", cpu.name()));
        }
    }
}

#[test]
fn panels_of_another_processor_are_not_read() {
    let dims = SelectDims { tokens: 3, heads: 2, parts: 2, sub_keys: 517, half_dim: 8, top_k: 8 };
    let random = &mut Random(12);
    let queries = integers(random, dims.queries_len(), 400);
    let keys = integers(random, dims.key_rows() * dims.half_dim, 400);
    let keys = DenseRows::new(&keys, dims.half_dim);
    let expected = selected(&Cpu::new().unwrap(), dims, &queries, &keys);
    for maker in backends() {
        let panels = PanelKeys::new(&maker, keys, dims.sub_keys).unwrap();
        for cpu in backends() {
            assert_eq!(selected(&cpu, dims, &queries, &panels), expected, "{} for {}", maker.name(), cpu.name());
        }
    }
}

#[test]
fn panels_are_of_one_number_of_sub_keys() {
    let keys = vec![1.0; 2 * 2 * 300 * 8];
    let cpu = Cpu::builder().isa(Isa::Scalar).build().unwrap();
    for cpu in [cpu, Cpu::new().unwrap()] {
        // 300 sub-keys of two heads are 600 of one, but not in panels.
        let panels = PanelKeys::new(&cpu, DenseRows::new(&keys, 8), 300).unwrap();
        let dims = SelectDims { tokens: 1, heads: 1, parts: 2, sub_keys: 600, half_dim: 8, top_k: 8 };
        let (mut ids, mut scores, mut weights) = ([9; 8], [9.0; 8], [9.0; 8]);
        let req = SelectRows::<PanelKeys<DenseRows<'_, f32>>>::select_scratch(&cpu, dims);
        let (mut reals, mut places) = (vec![0.0; req.reals], vec![0; req.ids]);
        let (i, s, w) = (&mut ids[..], &mut scores[..], &mut weights[..]);
        let args = Select { dims, queries: &[1.0; 16][..], keys: &panels, ids: i, scores: s, weights: w };
        let error = cpu.select(args, Scratch { reals: &mut reals[..], ids: &mut places[..] }).unwrap_err();
        assert!(matches!(error, ArgError::Shape { operand: "sub_keys", expected: 300, found: 600, .. }), "{error}");
        assert_eq!(ids, [9; 8]);
    }
    // No number of sub-keys that fits is no reason to panic.
    for sub_keys in [0, 7, 10_000, usize::MAX] {
        for keys in [&keys[..], &[]] {
            assert!(PanelKeys::new(&Cpu::new().unwrap(), DenseRows::new(keys, 8), sub_keys).is_ok());
        }
    }
}
