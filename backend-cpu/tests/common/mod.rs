//! What the tests of this folder share.
#![allow(dead_code, reason = "no test uses all of it")]
#![allow(clippy::cast_possible_truncation, reason = "ids below a number of rows")]

use memlayer_cpu::{Cpu, Isa};

pub(crate) const WIDTHS: [usize; 30] =
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300];

pub(crate) fn backends() -> Vec<Cpu> {
    let build = |isa, threads| Cpu::builder().isa(isa).threads(threads).build().unwrap();
    Isa::available().flat_map(|isa| [1, 2, 7].map(|threads| build(isa, threads))).collect()
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    pub(crate) fn real(&mut self) -> f32 {
        (self.next() % (1 << 20)) as f32 / (1 << 19) as f32 - 1.0
    }
    pub(crate) fn reals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.real()).collect()
    }
    pub(crate) fn ids(&mut self, n: usize, rows: usize) -> Vec<u32> {
        (0..n).map(|_| (self.next() % rows as u64) as u32).collect()
    }
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[track_caller]
pub(crate) fn close(what: &str, got: &[f32], exact: &[f64], terms: usize, magnitude: f64) {
    for (i, (&got, &exact)) in got.iter().zip(exact).enumerate() {
        let bound = (terms as f64 + 8.0) * f64::from(f32::EPSILON) * magnitude;
        assert!((f64::from(got) - exact).abs() <= bound, "{what} [{i}]: {got} is not {exact} within {bound}");
    }
}

pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}
