//! Runs one kernel a few times, for instruction counts: `kernels NAME CALLS`. `bench/guard/run` compares them with
//! those on record. Without a name it lists the names.
#![allow(clippy::unwrap_used, reason = "an example")]

#[path = "../benches/kernels/mod.rs"]
mod kernels;

use memlayer_cpu::Cpu;

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(name), Some(calls)) = (args.next(), args.next()) else {
        kernels::NAMES.iter().for_each(|name| println!("{name}"));
        return;
    };
    let (calls, cpu) = (calls.parse().unwrap(), Cpu::builder().threads(1).build().unwrap());
    let mut call = kernels::kernel(&cpu, &name);
    (0..calls).for_each(|_| call());
}
