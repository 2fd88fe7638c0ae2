//! Selection for one token, where kernels begin before those before them have ended. Skipped, and said so, where there is no
//! device.

use memlayer_core::ops::select::SelectDims;
use memlayer_core::{Bf16, DenseRows, Device, Reference};
use memlayer_cuda::Rows;
use memlayer_tests::conformance::select::{integers, select_over};
use memlayer_tests::conformance::skipped;

mod common;
use common::cuda;

#[test]
fn one_token_is_chosen_for_as_by_the_reference_again_and_again() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let reference = Reference::<f32>::new();
    for (seed, (heads, parts, sub_keys, half_dim, top_k)) in (60..).zip([
        (1, 2, 32, 8, 32),
        (4, 2, 1024, 256, 32),
        (3, 2, 1023, 17, 20),
        (40, 1, 65, 100, 1),
        (2, 1, 5000, 64, 31),
        (2, 2, 70, 12, 7),
    ]) {
        let dims = SelectDims { tokens: 1, heads, parts, sub_keys, half_dim, top_k };
        // Integers that bf16 has: scores are exact. Small ones have more ties than lists have room; NaN and infinities.
        for (greatest, odds) in [(100, 0), (1, 0), (40, 50), (40, 5)] {
            let (queries, keys) = integers(dims, seed, greatest, odds);
            let codes: Vec<Bf16> = keys.iter().map(|&x| Bf16::from_f32(x)).collect();
            let expected = select_over(&reference, dims, &queries, &DenseRows::new(&keys, half_dim));
            let (reals, packed) = (cuda.upload(&keys).expect("keys"), cuda.upload(&codes).expect("keys"));
            for _ in 0..3 {
                let found = select_over(&cuda, dims, &queries, &Rows::new(reals.view(), half_dim));
                assert_eq!(found.ids, expected.ids, "{dims:?}, integers to {greatest}");
                let found = select_over(&cuda, dims, &queries, &Rows::new(packed.view(), half_dim));
                assert_eq!(found.ids, expected.ids, "{dims:?}, integers to {greatest}, keys in bf16");
                for (a, b) in found.weights.iter().zip(&expected.weights) {
                    assert!(a.is_nan() && b.is_nan() || (a - b).abs() <= 1e-6, "{dims:?}: weight {a}, not {b}");
                }
            }
        }
    }
    cuda.synchronize().expect("all of it");
}
