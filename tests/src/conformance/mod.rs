//! The laws, as tests of a backend against the reference.
//!
//! Every function here takes a device and panics where it breaks a law. [`conformance!`](crate::conformance!) makes
//! a test of each.

pub mod bag;
pub mod layer;
pub mod optim;
pub mod plan;
pub mod select;

use memlayer_core::layer::Backend;
use memlayer_core::ops::optim::{Adagrad, Adam, RowwiseAdagrad, RowwiseAdam, Sgd};
use memlayer_core::ops::{Dense, EmbeddingBag, RowReduce, RowUpdate, SelectRows};
use memlayer_core::{Bf16, Device, E4m3, E5m2, F16};

use crate::device::TestDevice;

/// Says once what a subject can do, for the trait and for its implementation.
macro_rules! subject {
    ($($bounds:tt)+) => {
        /// A device in `f32` with every operation over every kind of table the suite uses.
        pub trait Subject: $($bounds)+ {}
        impl<D> Subject for D where Self: $($bounds)+ {}
    };
}

subject! {
    TestDevice<Scalar = f32>
    + RowReduce
    + Dense
    + for<'x> Backend<<Self as Device>::Rows<'x>, <Self as Device>::Rows<'x>>
    + for<'x> EmbeddingBag<<Self as TestDevice>::Packed<'x, i8>>
    + for<'x> EmbeddingBag<<Self as TestDevice>::Packed<'x, E4m3>>
    + for<'x> EmbeddingBag<<Self as TestDevice>::Packed<'x, E5m2>>
    + for<'x> EmbeddingBag<<Self as TestDevice>::Packed<'x, F16>>
    + for<'x> EmbeddingBag<<Self as TestDevice>::Packed<'x, Bf16>>
    + for<'x> SelectRows<<Self as TestDevice>::Packed<'x, i8>>
    + for<'x> SelectRows<<Self as TestDevice>::Packed<'x, E4m3>>
    + for<'x> RowUpdate<<Self as TestDevice>::Train<'x>, Sgd>
    + for<'x> RowUpdate<<Self as TestDevice>::Train<'x>, Adagrad>
    + for<'x> RowUpdate<<Self as TestDevice>::Train<'x>, RowwiseAdagrad>
    + for<'x> RowUpdate<<Self as TestDevice>::Train<'x>, Adam>
    + for<'x> RowUpdate<<Self as TestDevice>::Train<'x>, RowwiseAdam>
}

/// Makes a module of tests of a device: `conformance!(avx2, || Cpu::builder().isa(Isa::Avx2).build().ok());`.
///
/// The expression gives `None` where this machine cannot run the device. That skips its tests, says so, and is a
/// failure if the environment variable `MEMLAYER_REQUIRE` names the module: set it where the hardware is known to
/// be there.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $device:expr) => {
        mod $name {
            use super::*;

            $crate::conformance!(@group $name, $device, select,
                obeys_the_law_with_ties, obeys_the_law_with_nan_and_infinities, scores_are_in_their_bound,
                reads_packed_keys, backward_is_the_references, refuses_what_does_not_fit);
            $crate::conformance!(@group $name, $device, bag,
                sums_have_the_references_bits, sums_of_packed_rows_have_the_references_bits,
                dots_are_in_their_bound, refuses_what_does_not_fit);
            $crate::conformance!(@group $name, $device, plan,
                is_the_references, sums_have_the_references_bits, hot_rows_are_summed_in_chunks,
                square_sums_are_in_their_bound, refuses_what_does_not_fit);
            $crate::conformance!(@group $name, $device, optim,
                rows_have_the_references_bits, untouched_rows_never_change, one_pass_is_as_two,
                dots_are_of_the_rows_before);
            $crate::conformance!(@group $name, $device, layer,
                every_variant_is_the_references, asks_for_no_more_than_its_scratch, gradients_are_optional,
                updates_on_its_way_as_apart);
        }
    };
    (@group $name:ident, $device:expr, $group:ident, $($test:ident),* $(,)?) => {
        mod $group {
            use super::*;

            $(#[test]
            fn $test() {
                let device = $device;
                match device() {
                    Some(device) => $crate::conformance::$group::$test(&device),
                    None => $crate::conformance::skipped(stringify!($name)),
                }
            })*
        }
    };
}

/// Says that a module's tests are skipped, or fails if they must not be.
///
/// # Panics
/// If `MEMLAYER_REQUIRE` names the module.
pub fn skipped(module: &str) {
    let required = std::env::var("MEMLAYER_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|name| name == module),
        "{module} is required here, but this machine cannot run it"
    );
    eprintln!("skipped: this machine cannot run {module}");
}

/// Panics unless both hold the same bits; all NaNs count as one.
///
/// # Panics
/// At the first difference.
pub fn assert_same_bits(expected: &[f32], found: &[f32], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: lengths");
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        assert!(e.to_bits() == f.to_bits() || e.is_nan() && f.is_nan(), "{what}[{i}]: {f:?} where {e:?} is right");
    }
}

/// Panics if an element is off by more than its bound.
///
/// # Panics
/// At the first one.
pub fn assert_within(expected: &[f64], found: &[f32], bounds: &[f64], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: lengths");
    for (i, ((e, &f), bound)) in expected.iter().zip(found).zip(bounds).enumerate() {
        let error = (e - f64::from(f)).abs();
        assert!(error <= *bound, "{what}[{i}]: {f} where {e} is right, off by {error:e} with a bound of {bound:e}");
    }
}
