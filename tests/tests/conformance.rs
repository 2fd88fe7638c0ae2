//! The suite, for every backend.

use memlayer_core::Reference;

memlayer_tests::conformance!(reference, || Some(Reference::<f32>::new()));
