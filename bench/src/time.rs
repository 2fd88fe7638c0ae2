//! Medians of interleaved pairs.

use core::time::Duration;
use std::time::Instant;

use crate::error::BenchError;

/// How long one measurement should take, so that the clock and a wake-up do not show.
const TARGET_US: f64 = 10_000.0;
/// Pairs, if the time allows.
const PAIRS: usize = 15;
/// Pairs even if it does not.
const FEWEST: usize = 3;

/// One side of a pair: makes so many calls and gives microseconds a call.
pub(crate) type Side<'a> = dyn FnMut(usize) -> Result<f64, BenchError> + 'a;

/// How long nothing disturbs before it is taken for over, and how long that is waited for.
const CALM: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);

/// What a pair of sides took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    /// Median microseconds of the first side.
    pub(crate) ours: f64,
    /// Median microseconds of the second side.
    pub(crate) other: f64,
    /// Median of second over first, pair by pair.
    pub(crate) ratio: f64,
    /// The lower and upper quartile of those ratios.
    pub(crate) spread: (f64, f64),
}

/// Microseconds a call of `f`, over so many calls.
pub(crate) fn clock(calls: usize, mut f: impl FnMut() -> Result<(), BenchError>) -> Result<f64, BenchError> {
    let start = Instant::now();
    for _ in 0..calls {
        f()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / calls as f64)
}

/// Calls until the system is done with what a peer's gigabytes cost it: for a second or
/// so calls then take up to a hundred times as long, perhaps because it moves pages. That is when [`CALM`] has gone by without a call of ten times the best.
pub(crate) fn settle(side: &mut Side<'_>) -> Result<(), BenchError> {
    let (start, mut calm) = (Instant::now(), Instant::now());
    let mut best = f64::INFINITY;
    while calm.elapsed() < CALM && start.elapsed() < PATIENCE {
        let once = side(1)?;
        best = best.min(once);
        if once > 10.0 * best {
            calm = Instant::now();
        }
    }
    Ok(())
}

/// Measures both sides in turn, for about so many seconds.
pub(crate) fn pair(seconds: f64, ours: &mut Side<'_>, other: &mut Side<'_>) -> Result<Pair, BenchError> {
    let calls = [calls(ours)?, calls(other)?];
    let start = Instant::now();
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    while ratios.len() < FEWEST || (ratios.len() < PAIRS && start.elapsed().as_secs_f64() < seconds) {
        // A library's workers may still spin for work that no longer comes.
        std::thread::sleep(Duration::from_millis(20));
        // Each side is measured right after a call of its own: whichever came first after the pause would pay for a
        // processor that has to wake up, and the second for what the first left in the caches.
        ours(1)?;
        let first = ours(calls[0])?;
        other(1)?;
        let second = other(calls[1])?;
        a.push(first);
        b.push(second);
        ratios.push(second / first);
    }
    let spread = (quantile(&mut ratios, 0.25), quantile(&mut ratios, 0.75));
    Ok(Pair { ours: quantile(&mut a, 0.5), other: quantile(&mut b, 0.5), ratio: quantile(&mut ratios, 0.5), spread })
}

/// Calls that take about [`TARGET_US`]; the first warm up.
fn calls(side: &mut Side<'_>) -> Result<usize, BenchError> {
    side(1)?;
    let once = side(1)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small positive number")]
    let calls = (TARGET_US / once.max(0.01)).clamp(1.0, 1e5) as usize;
    Ok(calls)
}

fn quantile(values: &mut [f64], at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
    let i = (at * (values.len() - 1) as f64).round() as usize;
    values[i]
}
