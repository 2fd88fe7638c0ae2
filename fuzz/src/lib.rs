//! What the targets share: sizes and values out of a fuzzer's bytes, and the devices of this machine.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use memlayer_core::Random;
use memlayer_cpu::{Cpu, Isa};

pub mod file;

/// How the values of a tensor look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// Small integers: every sum of products is exact, and ties are many.
    Exact,
    /// Small integers, and now and then NaN or an infinity. Sums are still the same in every order.
    Special,
    /// Any bits there are.
    Any,
}

/// The fuzzer's bytes, read as sizes and values. Behind their end come numbers picked by what was read last, so that
/// a few bytes make a large tensor.
pub struct Input<'a> {
    bytes: Unstructured<'a>,
    more: Random,
}

impl<'a> Input<'a> {
    /// Reads from the front.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        let seed = bytes.iter().fold(0u64, |seed, &b| seed.wrapping_mul(31).wrapping_add(u64::from(b)));
        Self { bytes: Unstructured::new(bytes), more: Random::new(seed) }
    }

    /// A size in `range`.
    pub fn size(&mut self, range: RangeInclusive<usize>) -> usize {
        self.bytes.int_in_range(range.clone()).unwrap_or(*range.start())
    }

    /// One of `choices`.
    pub fn pick<T: Copy, const N: usize>(&mut self, choices: [T; N]) -> T {
        choices[self.size(0..=N - 1)]
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.size(0..=1) == 1
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        if self.bytes.is_empty() { self.more.bits() } else { self.bytes.arbitrary().unwrap_or_default() }
    }

    /// What was not read.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.bytes.take_rest()
    }

    fn byte(&mut self) -> u8 {
        if self.bytes.is_empty() { (self.more.bits() >> 32) as u8 } else { self.bytes.arbitrary().unwrap_or_default() }
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }

    /// `len` ids: of rows of a table of `rows`, but one of many anything there is if `wild`.
    pub fn ids(&mut self, len: usize, rows: usize, wild: bool) -> Vec<u32> {
        let one = |input: &mut Self| {
            let wide = rows > 256 || wild;
            let id = if wide { input.bits() >> 32 } else { u64::from(input.byte()) };
            if wild && id % 64 == 0 { id as u32 } else { (id % rows.max(1) as u64) as u32 }
        };
        (0..len).map(|_| one(self)).collect()
    }

    /// `len` values.
    pub fn values(&mut self, len: usize, kind: Values) -> Vec<f32> {
        let small = |byte: u8| f32::from(byte % 5) - 2.0;
        let one = |input: &mut Self| match kind {
            Values::Exact => small(input.byte()),
            Values::Special => match input.byte() {
                byte @ 0..240 => small(byte),
                240..246 => f32::NAN,
                246..251 => f32::INFINITY,
                _ => f32::NEG_INFINITY,
            },
            Values::Any => f32::from_bits((input.bits() >> 32) as u32),
        };
        (0..len).map(|_| one(self)).collect()
    }

    /// `len` scales: powers of two, so that products with small integers are exact; or any bits.
    pub fn scales(&mut self, len: usize, kind: Values) -> Vec<f32> {
        match kind {
            Values::Any => self.values(len, kind),
            _ => (0..len).map(|_| [0.25, 0.5, 1.0, 2.0][usize::from(self.byte() % 4)]).collect(),
        }
    }
}

/// Every instruction set of this machine, alone and with workers.
pub fn cpus() -> &'static [Cpu] {
    static CPUS: LazyLock<Vec<Cpu>> = LazyLock::new(|| {
        let build = |isa, threads| Cpu::builder().isa(isa).threads(threads).build().expect("a backend");
        Isa::available().flat_map(|isa| [build(isa, 1), build(isa, 3)]).collect()
    });
    &CPUS
}

/// Whether both are the same number: all NaNs are one, and so are the zeros.
#[must_use]
pub fn same(a: f32, b: f32) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// `values` in `f64`.
#[must_use]
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}
