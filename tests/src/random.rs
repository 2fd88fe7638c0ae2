//! Inputs that look random and are the same every time.

use memlayer_core::Real;

/// A stream of inputs.
#[derive(Clone, Debug)]
pub struct Random(memlayer_core::Random);

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(memlayer_core::Random::new(seed))
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0.bits()
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0.below(n)
    }

    /// A number in -1..1.
    pub fn unit(&mut self) -> f64 {
        2.0 * self.0.uniform() - 1.0
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
