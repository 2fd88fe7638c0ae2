//! How evenly the slots of a memory are used (Lample et al. 2019, "Large Memory Layers with Product Keys").
//!
//! Use collapses early in training and must recover: watch it.

use core::fmt;

/// How evenly a mass is spread over slots.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Health {
    /// The share of slots with any mass, in percent.
    pub used_percent: f64,
    /// The Kullback-Leibler divergence from the uniform distribution over all slots, in nats: 0 is even.
    pub kl_nats: f64,
    /// The Gini coefficient from the Lorenz curve at each slot: `1 - 2/n · Σ F(i)`, `F(i)` being the share of the `i`
    /// slots with the least mass. Even use gives `-1/n`, all mass in one slot `1 - 2/n`.
    pub gini: f64,
    /// The fewest slots that hold 50 % of the mass.
    pub top50: usize,
    /// The fewest slots that hold 90 % of the mass.
    pub top90: usize,
    /// The fewest slots that hold 99 % of the mass.
    pub top99: usize,
}

impl Health {
    /// The health of `mass` (`[slots]`: reads counted, or weights summed), which is sorted in place.
    ///
    /// Negative and NaN masses count as none. Without any mass every figure is 0.
    #[must_use]
    pub fn of(mass: &mut [f64]) -> Self {
        for m in mass.iter_mut() {
            if m.is_nan() || *m < 0.0 {
                *m = 0.0;
            }
        }
        mass.sort_unstable_by(f64::total_cmp);
        let total: f64 = mass.iter().sum();
        let slots = mass.len() as f64;
        let used = mass.iter().filter(|&&m| m > 0.0).count();
        if total <= 0.0 {
            return Self { used_percent: 0.0, kl_nats: 0.0, gini: 0.0, top50: 0, top90: 0, top99: 0 };
        }
        let (mut entropy, mut share, mut lorenz) = (0.0, 0.0, 0.0);
        for &m in mass.iter() {
            let p = m / total;
            if p > 0.0 {
                entropy -= p * libm::log(p);
            }
            share += p;
            lorenz += share;
        }
        let top = |share: f64| {
            let mut sum = 0.0;
            for (n, &m) in mass.iter().rev().enumerate() {
                sum += m;
                if sum >= share * total {
                    return n + 1;
                }
            }
            mass.len()
        };
        Self {
            used_percent: 100.0 * used as f64 / slots,
            kl_nats: (libm::log(slots) - entropy).max(0.0),
            gini: 1.0 - 2.0 * lorenz / slots,
            top50: top(0.50),
            top90: top(0.90),
            top99: top(0.99),
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} % used, KL to uniform {:.3} nats, Gini {:.3}, 50/90/99 % of the mass in {}/{}/{} slots",
            self.used_percent, self.kl_nats, self.gini, self.top50, self.top90, self.top99
        )
    }
}

/// Counts reads: adds 1 to `counts[id]` for every id. Ids behind the end are not counted.
pub fn count_reads(ids: &[u32], counts: &mut [f64]) {
    for &id in ids {
        if let Some(count) = counts.get_mut(id as usize) {
            *count += 1.0;
        }
    }
}

/// Weighs reads: adds the weight to `mass[id]` for every id. Ids behind the end are not counted.
pub fn weigh_reads(ids: &[u32], weights: &[f32], mass: &mut [f64]) {
    for (&id, &weight) in ids.iter().zip(weights) {
        if let Some(mass) = mass.get_mut(id as usize) {
            *mass += f64::from(weight);
        }
    }
}
