//! Memory health of a list of reads.

use memlayer_core::health::{Health, count_reads, weigh_reads};
use serde::Deserialize;

use super::file::{GoldenError, GoldenFile};
use super::{Compared, relative_error};

#[derive(Deserialize)]
struct HealthConfig {
    slots: usize,
}

pub(super) fn check(file: &GoldenFile) -> Result<Vec<Compared>, GoldenError> {
    let HealthConfig { slots } = file.config()?;
    let (ids, shape) = file.ids("indices", slots)?;
    let weights = file.floats_of("weights", &shape)?;
    #[allow(clippy::cast_possible_truncation, reason = "the file holds f32")]
    let weights: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
    let mut compared = Vec::new();
    for tensor in ["counted", "weighted"] {
        let mut mass = vec![0.0; slots];
        match tensor {
            "counted" => count_reads(&ids, &mut mass),
            _ => weigh_reads(&ids, &weights, &mut mass),
        }
        let h = Health::of(&mut mass);
        let (expected, _) = file.floats(tensor)?;
        let found = [h.used_percent, h.kl_nats, h.gini, h.top50 as f64, h.top90 as f64, h.top99 as f64];
        // Each figure by itself: the large ones would hide the small ones.
        for (i, name) in ["used_percent", "kl_nats", "gini", "top50", "top90", "top99"].into_iter().enumerate() {
            let expected = expected.get(i).copied().unwrap_or(f64::NAN);
            let error = relative_error(&[expected], &[found[i]]);
            compared.push(Compared { tensor: format!("{tensor}.{name}"), error, bound: super::BOUND_F64 });
        }
    }
    Ok(compared)
}
