//! Inputs that look random and are the same every time.

use memlayer_core::Real;

/// A stream of numbers picked by a seed (`SplitMix64`).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.bits() % n as u64).expect("below a usize")
    }

    /// A number in -1..1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// `len` numbers in -1..1.
    pub fn reals<F: Real>(&mut self, len: usize) -> Vec<F> {
        (0..len).map(|_| F::of(self.unit())).collect()
    }

    /// `len` small integers: sums of their products are exact, and ties are many.
    pub fn integers<F: Real>(&mut self, len: usize, greatest: usize) -> Vec<F> {
        (0..len).map(|_| F::of(self.below(2 * greatest + 1) as f64 - greatest as f64)).collect()
    }

    /// `len` ids of rows of a table of `rows`.
    pub fn ids(&mut self, len: usize, rows: usize) -> Vec<u32> {
        (0..len).map(|_| u32::try_from(self.below(rows)).expect("a row id")).collect()
    }
}
