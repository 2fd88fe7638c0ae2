//! The suite, for every backend, instruction set and number of threads.

use memlayer_core::Reference;
use memlayer_cpu::{Cpu, Isa};

/// The CPU backend, where this machine can run it.
fn cpu(isa: Isa, threads: usize) -> Option<Cpu> {
    Cpu::builder().isa(isa).threads(threads).build().ok()
}

memlayer_tests::conformance!(reference, || Some(Reference::<f32>::new()));
memlayer_tests::conformance!(scalar_1, || cpu(Isa::Scalar, 1));
memlayer_tests::conformance!(scalar_2, || cpu(Isa::Scalar, 2));
memlayer_tests::conformance!(scalar_7, || cpu(Isa::Scalar, 7));
memlayer_tests::conformance!(avx2_1, || cpu(Isa::Avx2, 1));
memlayer_tests::conformance!(avx2_2, || cpu(Isa::Avx2, 2));
memlayer_tests::conformance!(avx2_7, || cpu(Isa::Avx2, 7));
memlayer_tests::conformance!(avx512_1, || cpu(Isa::Avx512, 1));
memlayer_tests::conformance!(avx512_2, || cpu(Isa::Avx512, 2));
memlayer_tests::conformance!(avx512_7, || cpu(Isa::Avx512, 7));
memlayer_tests::conformance!(neon_1, || cpu(Isa::Neon, 1));
memlayer_tests::conformance!(neon_2, || cpu(Isa::Neon, 2));
memlayer_tests::conformance!(neon_7, || cpu(Isa::Neon, 7));
