//! Laws of selection and of sparse gradients that hold for any input, on every instruction set and with workers.

use memlayer_core::health::Health;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::ops::plan::{CHUNK, PlanBuffers, RowGradient};
use memlayer_core::ops::select::SelectDims;
use memlayer_core::ops::{EmbeddingBag, RowReduce};
use memlayer_core::{DenseRows, Random};
use memlayer_cpu::{Cpu, Isa};
use memlayer_tests::conformance::assert_same_bits;
use memlayer_tests::conformance::select::{brute_force, select_over};
use memlayer_tests::device::Memory;
use proptest::prelude::*;

fn cpus() -> Vec<Cpu> {
    Isa::available().map(|isa| Cpu::builder().isa(isa).threads(3).build().expect("a backend")).collect()
}

/// The touched rows and their gradients, every entry with a source of its own.
fn gradients(cpu: &Cpu, ids: &[u32], rows: usize, weights: &[f32], sources: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let (entries, dim) = (ids.len(), sources.len() / ids.len().max(1));
    let mut buffer = vec![0; PlanBuffers::<Cpu>::ids_len(entries)];
    let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut buffer[..], entries).expect("buffers");
    let mut memory = Memory::new(cpu, cpu.plan_scratch(entries));
    cpu.plan(ids, rows, buffers.reborrow(), memory.lend()).expect("a plan");
    let plan = buffers.plan();
    let unique = plan.unique[0] as usize;
    let mut out = vec![f32::NAN; unique * dim];
    cpu.reduce(plan, RowGradient { bag: 1, dim, weights, sources }, &mut out).expect("sums");
    (plan.rows[..unique].to_vec(), out)
}

/// `order` shuffled, but for entries of the same row, which stay in their order.
fn interleaved(ids: &[u32], seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let mut left: Vec<Vec<usize>> = Vec::new();
    let mut rows: Vec<u32> = ids.to_vec();
    rows.sort_unstable();
    rows.dedup();
    for row in rows {
        left.push((0..ids.len()).filter(|&e| ids[e] == row).rev().collect());
    }
    let mut order = Vec::new();
    while !left.is_empty() {
        let at = random.below(left.len());
        order.extend(left[at].pop());
        if left[at].is_empty() {
            left.swap_remove(at);
        }
    }
    order
}

/// A row of so many entries is the sum of its chunks, whoever sums them.
#[test]
fn a_row_of_a_million_entries_is_summed_in_chunks() {
    const ENTRIES: usize = 1_000_000;
    let mut random = Random::new(5);
    let (mut weights, mut sources) = (vec![0.0f32; ENTRIES], vec![0.0f32; ENTRIES]);
    random.fill_normal(&mut weights, 1.0);
    random.fill_normal(&mut sources, 1.0);
    let products: Vec<f32> = weights.iter().zip(&sources).map(|(w, s)| w * s).collect();
    let chunk = |chunk: &[f32]| chunk.iter().fold(0.0f32, |sum, x| sum + x);
    let expected = products.chunks(CHUNK).fold(0.0f32, |sum, products| sum + chunk(products));
    // The same with one entry of another row in the middle.
    let mut ids = vec![7u32; ENTRIES];
    for cpu in cpus() {
        let (rows, found) = gradients(&cpu, &ids, 9, &weights, &sources);
        assert_eq!(rows, [7]);
        assert_same_bits(&[expected], &found, cpu.name());
    }
    ids[ENTRIES / 2] = 8;
    let rest = [&products[..ENTRIES / 2], &products[ENTRIES / 2 + 1..]].concat();
    let expected = rest.chunks(CHUNK).fold(0.0f32, |sum, products| sum + chunk(products));
    for cpu in cpus() {
        let (rows, found) = gradients(&cpu, &ids, 9, &weights, &sources);
        assert_eq!(rows, [7, 8]);
        assert_same_bits(&[expected, products[ENTRIES / 2]], &found, cpu.name());
    }
}

#[test]
fn no_token_is_no_work_and_no_error() {
    for cpu in cpus() {
        for parts in [1, 2] {
            let dims = SelectDims { tokens: 0, heads: 2, parts, sub_keys: 5, half_dim: 3, top_k: 5 };
            let keys = vec![1.0; dims.key_rows() * 3];
            assert!(select_over(&cpu, dims, &[], &DenseRows::new(&keys, 3)).ids.is_empty());
        }
        let table = DenseRows::new(&[1.0f32; 12], 4);
        let args = BagSum::<Cpu> { bag: 3, ids: &[], weights: &[], out: &mut [], accumulate: false };
        cpu.bag_sum(&table, args).expect("no sums");
        assert_eq!(gradients(&cpu, &[], 3, &[], &[]), (vec![], vec![]));
    }
}

/// Even use, and all mass in one slot.
#[test]
fn health_of_the_extremes() {
    for slots in [1usize, 2, 10, 1000] {
        let n = slots as f64;
        let even = Health::of(&mut vec![3.0; slots]);
        assert_eq!((even.used_percent, even.top99), (100.0, (99 * slots).div_ceil(100)));
        assert!(even.kl_nats < 1e-9 && (even.gini + 1.0 / n).abs() < 1e-9);
        let mut mass = vec![0.0; slots];
        mass[slots / 2] = 1e-300;
        let one = Health::of(&mut mass);
        assert_eq!((one.top50, one.top99), (1, 1));
        assert!((one.kl_nats - n.ln()).abs() < 1e-9 && (one.gini - (1.0 - 2.0 / n)).abs() < 1e-9);
        let none = Health::of(&mut vec![0.0; slots]);
        assert_eq!((none.used_percent, none.kl_nats, none.top99), (0.0, 0.0, 0));
    }
    assert_eq!(Health::of(&mut []).top99, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// The gradient of a row is a sum over its own entries, in their order: how they lie between others is nothing.
    #[test]
    fn entries_of_other_rows_change_nothing(
        ids in prop::collection::vec(0u32..12, 1..300), dim in 1usize..20, seed: u64,
    ) {
        let mut random = Random::new(seed);
        let (mut weights, mut sources) = (vec![0.0f32; ids.len()], vec![0.0f32; ids.len() * dim]);
        random.fill_normal(&mut weights, 1.0);
        random.fill_normal(&mut sources, 1.0);
        let order = interleaved(&ids, seed);
        let moved_ids: Vec<u32> = order.iter().map(|&e| ids[e]).collect();
        let moved_weights: Vec<f32> = order.iter().map(|&e| weights[e]).collect();
        let moved: Vec<f32> = order.iter().flat_map(|&e| sources[e * dim..(e + 1) * dim].to_vec()).collect();
        for cpu in cpus() {
            let before = gradients(&cpu, &ids, 12, &weights, &sources);
            let after = gradients(&cpu, &moved_ids, 12, &moved_weights, &moved);
            prop_assert_eq!(&before.0, &after.0);
            assert_same_bits(&before.1, &after.1, cpu.name());
        }
    }

    /// With K = N every sub-key is kept: of flat keys all slots, each once.
    #[test]
    fn all_slots_are_each_selected_once(sub_keys in 1usize..40, tokens in 1usize..5, seed: u64) {
        let mut random = Random::new(seed);
        let flat = SelectDims { tokens, heads: 1, parts: 1, sub_keys, half_dim: 3, top_k: sub_keys };
        let (mut queries, mut keys) = (vec![0.0f32; flat.queries_len()], vec![0.0f32; flat.key_rows() * 3]);
        random.fill_normal(&mut queries, 1.0);
        random.fill_normal(&mut keys, 1.0);
        for cpu in cpus() {
            let found = select_over(&cpu, flat, &queries, &DenseRows::new(&keys, 3));
            for bag in found.ids.chunks(sub_keys) {
                let mut ids = bag.to_vec();
                ids.sort_unstable();
                prop_assert!(ids.iter().copied().eq(0..u32::try_from(sub_keys).expect("small")));
            }
            let sums = found.weights.chunks(sub_keys).map(|bag| bag.iter().sum::<f32>());
            prop_assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-5));
        }
    }

    /// Sub-keys that are the same have the same score: the law's order decides, and all of a group come before what is worse.
    #[test]
    fn equal_rows_rank_by_their_index(
        kinds in prop::collection::vec(0usize..3, 1..30), top_k in 1usize..30, parts in 1usize..=2,
    ) {
        let (sub_keys, top_k) = (kinds.len(), top_k.min(kinds.len()));
        let dims = SelectDims { tokens: 2, heads: 1, parts, sub_keys, half_dim: 2, top_k };
        let row = |&kind: &usize| [[1.0f32, -2.0], [0.0, 1.0], [2.0, 2.0]][kind];
        let keys: Vec<f32> = (0..parts).flat_map(|_| kinds.iter().flat_map(row)).collect();
        let queries: Vec<f32> = (0..dims.queries_len()).map(|i| [1.0, 1.0, -1.0, 2.0][i % 4]).collect();
        for cpu in cpus() {
            let found = select_over(&cpu, dims, &queries, &DenseRows::new(&keys, 2));
            prop_assert_eq!(found.ids, brute_force(dims, &queries, &keys), "{}", cpu.name());
        }
    }

    /// A row that a bag names several times counts so many times, in the bag's order.
    #[test]
    fn duplicates_in_a_bag_add_up(ids in prop::collection::vec(0u32..3, 1..40), dim in 1usize..40, seed: u64) {
        let mut random = Random::new(seed);
        let (mut table, mut weights) = (vec![0.0f32; 3 * dim], vec![0.0f32; ids.len()]);
        random.fill_normal(&mut table, 1.0);
        random.fill_normal(&mut weights, 1.0);
        let value = |v: usize| {
            ids.iter().zip(&weights).fold(0.0f32, |sum, (&id, &w)| sum + w * table[id as usize * dim + v])
        };
        let expected: Vec<f32> = (0..dim).map(value).collect();
        for cpu in cpus() {
            let mut out = vec![f32::NAN; dim];
            let args = BagSum { bag: ids.len(), ids: &ids[..], weights: &weights[..], out: &mut out[..], accumulate: false };
            cpu.bag_sum(&DenseRows::new(&table, dim), args).expect("a sum");
            assert_same_bits(&expected, &out, cpu.name());
        }
    }

    /// A scale does not matter, nor do slots without mass, but for the share of those in use.
    #[test]
    fn health_is_of_shares(mass in prop::collection::vec(0.0f64..10.0, 1..200), exponent in -30i32..30) {
        let scaled: Vec<f64> = mass.iter().map(|m| m * 2f64.powi(exponent)).collect();
        prop_assert_eq!(Health::of(&mut mass.clone()), Health::of(&mut scaled.clone()));
        let bad: Vec<f64> = mass.iter().flat_map(|&m| [m, -m, f64::NAN]).collect();
        let zeros: Vec<f64> = mass.iter().flat_map(|&m| [m, 0.0, 0.0]).collect();
        let (bad, zeros, health) = (Health::of(&mut bad.clone()), Health::of(&mut zeros.clone()), Health::of(&mut mass.clone()));
        prop_assert_eq!(bad, zeros);
        prop_assert_eq!((bad.top50, bad.top90, bad.top99), (health.top50, health.top90, health.top99));
        prop_assert!((bad.used_percent * 3.0 - health.used_percent).abs() < 1e-9);
        prop_assert!(health.kl_nats <= (mass.len() as f64).ln() + 1e-9 && bad.kl_nats >= health.kl_nats - 1e-9);
    }
}
