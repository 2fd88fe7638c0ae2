//! Times of single operations on every instruction set of this machine, on one thread, with inputs that stay in the caches:
//! what a change to a kernel did. `cargo bench -p memlayer-cpu`, or a part of it: `cargo bench -p memlayer-cpu -- int8`.
//!
//! What others take for the same, and what it takes with rows from memory, is `memlayer-bench`'s to say.
#![allow(clippy::unwrap_used, reason = "a benchmark")]

mod kernels;

use std::fmt;

use divan::Bencher;
use memlayer_cpu::{Cpu, Isa};

/// A kernel on an instruction set.
struct Case(&'static str, Isa);

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

fn cases() -> Vec<Case> {
    kernels::NAMES.into_iter().flat_map(|name| Isa::available().map(move |isa| Case(name, isa))).collect()
}

#[divan::bench(args = cases())]
fn operation(bencher: Bencher<'_, '_>, &Case(name, isa): &Case) {
    let cpu = Cpu::builder().threads(1).isa(isa).build().unwrap();
    bencher.bench_local(kernels::kernel(&cpu, name));
}

fn main() {
    divan::main();
}
