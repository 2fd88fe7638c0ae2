//! Numbers that look random and are the same on every machine: for starting values, orders and rounding.

use crate::element::Real;

/// A bijection of 64 bits whose output looks random (the finalizer of `SplitMix64`, Steele et al. 2014).
#[inline(always)]
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of numbers picked by a seed (`SplitMix64`). Not for secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    pub const fn bits(&mut self) -> u64 {
        let bits = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits
    }

    /// A number between 0 and 1, neither of them.
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// A number below `n`, which must not be zero; the bias of 64 bits is not removed.
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn below(&mut self, n: usize) -> usize {
        #[allow(clippy::cast_possible_truncation, reason = "less than n, which is a usize")]
        let below = (self.bits() % n as u64) as usize;
        below
    }

    /// Two independent numbers of the normal distribution (Box and Muller 1958).
    pub fn normal_pair(&mut self) -> [f64; 2] {
        let radius = libm::sqrt(-2.0 * libm::log(self.uniform()));
        let angle = core::f64::consts::TAU * self.uniform();
        [radius * libm::cos(angle), radius * libm::sin(angle)]
    }

    /// Fills `values` (overwritten) with numbers of the normal distribution times `std`.
    pub fn fill_normal<F: Real>(&mut self, values: &mut [F], std: f64) {
        for pair in values.chunks_mut(2) {
            for (value, x) in pair.iter_mut().zip(self.normal_pair()) {
                *value = F::of(std * x);
            }
        }
    }

    /// Puts `items` in random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
