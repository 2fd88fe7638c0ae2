//! Laws that hold for any input.

use memlayer_core::config::Kind;
use memlayer_core::health::Health;
use memlayer_core::ops::select::SelectDims;
use memlayer_core::{Config, DenseRows};
use memlayer_cpu::Cpu;
use memlayer_tests::conformance::select::{brute_force, select_over};
use proptest::prelude::*;

/// Small integers make ties; the rest is what must not matter.
fn key() -> impl Strategy<Value = f32> {
    prop_oneof![
        12 => (-2i8..=2).prop_map(f32::from),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
    ]
}

fn selection() -> impl Strategy<Value = (SelectDims, Vec<f32>, Vec<f32>)> {
    let sizes = (0usize..4, 1usize..4, 1usize..=2, 1usize..20, 1usize..6);
    let dims = sizes.prop_flat_map(|(tokens, heads, parts, sub_keys, half_dim)| {
        (1..=sub_keys).prop_map(move |top_k| SelectDims { tokens, heads, parts, sub_keys, half_dim, top_k })
    });
    dims.prop_flat_map(|dims| {
        let queries = proptest::collection::vec((-1i8..=1).prop_map(f32::from), dims.queries_len());
        // One special value a key at most, in front; queries there are 1, so its score is that value.
        let keys = proptest::collection::vec((-2i8..=2).prop_map(f32::from), dims.key_rows() * dims.half_dim);
        let first = proptest::collection::vec(key(), dims.key_rows());
        (queries, keys, first).prop_map(move |(mut queries, mut keys, first)| {
            queries.chunks_exact_mut(dims.half_dim).for_each(|query| query[0] = 1.0);
            keys.chunks_exact_mut(dims.half_dim).zip(first).for_each(|(key, first)| key[0] = first);
            (dims, queries, keys)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn selection_is_brute_force((dims, queries, keys) in selection()) {
        let cpu = Cpu::builder().threads(2).build().expect("a backend");
        let found = select_over(&cpu, dims, &queries, &DenseRows::new(&keys, dims.half_dim));
        prop_assert_eq!(found.ids, brute_force(dims, &queries, &keys));
    }

    #[test]
    fn health_is_of_the_masses_not_of_their_order(mut mass in proptest::collection::vec(0.0f64..10.0, 1..200), seed: u64) {
        let mut shuffled = mass.clone();
        memlayer_core::Random::new(seed).shuffle(&mut shuffled);
        let slots = mass.len();
        let (a, b) = (Health::of(&mut mass), Health::of(&mut shuffled));
        prop_assert_eq!(a, b);
        prop_assert!((0.0..=100.0).contains(&a.used_percent) && a.kl_nats >= 0.0);
        prop_assert!(a.top50 <= a.top90 && a.top90 <= a.top99 && a.top99 <= slots);
        prop_assert!(a.gini >= -1.0 / slots as f64 - 1e-9 && a.gini < 1.0);
    }

    #[test]
    fn any_sizes_make_a_layer_or_an_error(
        sizes in proptest::array::uniform7(prop_oneof![0usize..5, 1usize..70_000, Just(1usize << 40), any::<usize>()]),
        flat: bool, peer: bool, silu: bool, norm: bool,
    ) {
        let [input, output, value, heads, sub_keys, half, top_k] = sizes;
        let mut builder = Config::builder(input).output_dim(output).value_dim(value).heads(heads).sub_keys(sub_keys);
        builder = builder.half_dim(half).top_k(top_k).silu_gate(silu).qk_norm(norm);
        if flat { builder = builder.flat_keys(); }
        if peer { builder = builder.kind(Kind::Peer); }
        match builder.build() {
            Ok(config) => {
                prop_assert!(config.top_k() <= config.sub_keys() && config.slots() as u64 <= 1 << 32);
                prop_assert!(config.keys_len().checked_mul(8).is_some());
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
