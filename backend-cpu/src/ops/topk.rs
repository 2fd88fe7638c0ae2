//! The best K of a list by the selection law, without sorting the list.
//!
//! The K-th greatest of some 2K group maxima is a lower bound of the K-th best score; about 1.4 K random scores reach
//! it. Those are collected in their order, and each counts how many go before it: its rank, and so its place.

use memlayer_core::ops::select::Best;

use crate::isa::Simd;

/// Places that a list of `k` needs: one for all that are not among the best, and room to read whole vectors.
pub(super) const fn list(k: usize) -> usize {
    k + 16
}

/// Candidates that are ranked before the scan gives up on its bound: most scores are then equal, or in a bad order.
const fn most(k: usize) -> usize {
    4 * k + 16
}

/// Places of [`Work`] for lists of `k`.
pub(super) const fn work(k: usize) -> usize {
    most(k) + 48
}

/// Pairs `(a, b)` with `(a + 1)(b + 1) <= k`: no other can be among the best `k` of two lists, for at least `k` go
/// before it: those with no greater positions in both lists have no lesser sums, and come first of equal ones.
pub(super) fn pairs(k: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..k).flat_map(move |a| (0..k / (a + 1)).map(move |b| (a, b)))
}

/// Workspace of one worker.
pub(super) struct Work<'a> {
    /// [`work`] places.
    pub(super) scores: &'a mut [f32],
    /// [`work`] places.
    pub(super) ranks: &'a mut [f32],
    /// [`work`] places.
    pub(super) ids: &'a mut [u32],
}

/// Writes the best `k` of the first `n` scores and their positions to `best`, best first, and returns true; or returns
/// false if a score is NaN or positive infinity.
///
/// `scores` are filled up to a whole vector with negative infinity, and `best` has [`list`] places.
#[inline(always)]
pub(super) fn best<S: Simd>(
    s: S,
    scores: &[f32],
    n: usize,
    k: usize,
    best: (&mut [f32], &mut [u32]),
    work: &mut Work<'_>,
) -> bool {
    let infinity = s.splat(f32::INFINITY);
    let vectors = n.div_ceil(S::LANES);
    let scores = &scores[..vectors * S::LANES];
    let groups = (2 * k).div_ceil(S::LANES);
    if vectors < 2 * groups {
        let mut strange = 0;
        for v in scores.chunks_exact(S::LANES) {
            strange |= s.not_lt_bits(s.load(v), infinity);
        }
        #[allow(clippy::cast_possible_truncation, reason = "a position in a half: ids have 32 bits")]
        place(s, scores, n, k, |i| i as u32, best, work.ranks);
        return strange == 0;
    }

    let mut base = 0;
    let (mut len, mut strange) = (0, 0);
    let bound = s.splat(bound(s, scores, groups, k, work));
    for v in scores.chunks_exact(S::LANES) {
        let v = s.load(v);
        strange |= s.not_lt_bits(v, infinity);
        len += s.compress(s.ge_bits(v, bound), v, base, &mut work.scores[len..], &mut work.ids[len..]);
        if len > most(k) {
            break;
        }
        #[allow(clippy::cast_possible_truncation, reason = "16 at most")]
        {
            base += S::LANES as u32;
        }
    }
    if len > most(k) || len < k {
        // Too many that reach the bound, or NaN among the maxima. Those that are strange rank first.
        let (best_scores, best_ids) = (&mut best.0[..k], &mut best.1[..k]);
        let mut list = Best::new(best_scores, best_ids);
        for (i, &score) in (0..).zip(&scores[..n]) {
            list.offer(score, i);
        }
        return best.0[0] < f32::INFINITY;
    }
    let padded = len.next_multiple_of(S::LANES);
    work.scores[len..padded].fill(f32::NEG_INFINITY);
    let ids = &*work.ids;
    place(s, &work.scores[..padded], len, k, |i| ids[i], best, work.ranks);
    strange == 0
}

/// Collects, in their order, the positions of the scores that are not below the `k`-th best less `margin`; returns how
/// many, or nothing if they are more than `most`, or the margin is infinite or NaN.
///
/// `scores` are whole vectors, at least `2k` of them, filled up with negative infinity and else finite; `near` has a
/// vector more places than `most`.
#[inline(always)]
pub(super) fn near<S: Simd>(
    s: S,
    scores: &[f32],
    k: usize,
    margin: f32,
    near: &mut [u32],
    most: usize,
    work: &mut Work<'_>,
) -> Option<usize> {
    if margin.is_nan() || margin == f32::INFINITY {
        return None;
    }
    let least = s.splat(bound(s, scores, (2 * k).div_ceil(S::LANES), k, work) - margin);
    let (mut base, mut len) = (0, 0);
    for v in scores.chunks_exact(S::LANES) {
        len += s.compress_ids(s.ge_bits(s.load(v), least), base, &mut near[len..]);
        if len > most {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "16 at most")]
        {
            base += S::LANES as u32;
        }
    }
    Some(len)
}

/// Group maxima that are ranked, of which one becomes the bound.
const SAMPLE: usize = 16;

/// About the `k`-th greatest of the maxima of `groups` vectors of groups, and no greater: at least `k` scores are not less.
///
/// Of the first [`SAMPLE`] maxima it is the best that `k - 1` go before. Ranking all for the very `k`-th is four times the
/// work for K = 32: 1.82 ms in place of 1.68 for a selection of 256 tokens among 256 sub-keys.
#[inline(always)]
fn bound<S: Simd>(s: S, scores: &[f32], groups: usize, k: usize, work: &mut Work<'_>) -> f32 {
    let count = groups * S::LANES;
    let maxima = &mut work.scores[..count];
    for (g, to) in maxima.chunks_exact_mut(S::LANES).enumerate() {
        let mut max = s.load(&scores[g * S::LANES..]);
        for v in scores[g * S::LANES..].chunks(count).skip(1) {
            // The last chunk may end before this group's vector begins: a chunk is whole vectors.
            max = s.max(max, s.load(v));
        }
        s.store(max, to);
    }
    // Where all that are sampled are among the first `k`, all are ranked. No such score then only if there is NaN: nothing
    // reaches that bound.
    for sample in [SAMPLE.min(count), count] {
        if let Some(bound) = sampled(s, maxima, sample, k, work.ranks) {
            return bound;
        }
    }
    f32::NAN
}

/// The greatest of the first `sample` scores that at least `k - 1` go before.
#[inline(always)]
fn sampled<S: Simd>(s: S, scores: &[f32], sample: usize, k: usize, ranks: &mut [f32]) -> Option<f32> {
    rank(s, scores, sample, scores.len(), ranks);
    let wanted = rank_bits(k - 1);
    let (mut least, mut at) = (u32::MAX, 0);
    for (i, rank) in (0u32..).zip(&ranks[..sample]) {
        let bits = rank.to_bits();
        let better = bits >= wanted && bits < least;
        (least, at) = if better { (bits, i) } else { (least, at) };
    }
    (least < u32::MAX).then(|| scores[at as usize])
}

fn rank_bits(rank: usize) -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "a position in a list of candidates")]
    let rank = rank as u32;
    <crate::isa::Lanes<1> as Simd>::COUNT.to_bits() + rank
}

/// Writes the best `k` of the first `n` scores, filled up to a whole vector, to their places in `best`.
#[inline(always)]
pub(super) fn place<S: Simd>(
    s: S,
    scores: &[f32],
    n: usize,
    k: usize,
    id: impl Fn(usize) -> u32,
    best: (&mut [f32], &mut [u32]),
    ranks: &mut [f32],
) {
    rank(s, scores, scores.len(), n, ranks);
    let (best_scores, best_ids) = (&mut best.0[..=k], &mut best.1[..=k]);
    for (i, (rank, &score)) in ranks[..n].iter().zip(scores).enumerate() {
        // Place k is for those that are not among the best: cheaper than a branch nobody can predict.
        let at = ((rank.to_bits() - rank_bits(0)) as usize).min(k);
        best_scores[at] = score;
        best_ids[at] = id(i);
    }
}

/// For the first `ranked` scores, whole vectors: `ranks[i]` counts, from [`Simd::COUNT`] on, those of the first `n` scores
/// that go before score `i`: the greater, and of equal ones the earlier.
#[inline(always)]
fn rank<S: Simd>(s: S, scores: &[f32], ranked: usize, n: usize, ranks: &mut [f32]) {
    for (b, mine) in scores[..ranked].chunks_exact(S::LANES).enumerate() {
        let mine = s.load(mine);
        let (start, end) = ((b * S::LANES).min(n), ((b + 1) * S::LANES).min(n));
        // Four counters, for one would wait for itself. `start` is a multiple of four, or there is no such score.
        let (mut c0, mut c1, mut c2, mut c3) = (s.splat(S::COUNT), s.splat(0.0), s.splat(0.0), s.splat(0.0));
        for four in scores[..start].chunks_exact(4) {
            c0 = s.count_ge(c0, s.splat(four[0]), mine);
            c1 = s.count_ge(c1, s.splat(four[1]), mine);
            c2 = s.count_ge(c2, s.splat(four[2]), mine);
            c3 = s.count_ge(c3, s.splat(four[3]), mine);
        }
        for (lane, &other) in scores[start..end].iter().enumerate() {
            let other = s.splat(other);
            c0 = s.count_gt(c0, other, mine);
            c1 = s.count_eq_behind(c1, other, mine, lane);
        }
        let mut rest = scores[end..n].chunks_exact(4);
        for four in &mut rest {
            c0 = s.count_gt(c0, s.splat(four[0]), mine);
            c1 = s.count_gt(c1, s.splat(four[1]), mine);
            c2 = s.count_gt(c2, s.splat(four[2]), mine);
            c3 = s.count_gt(c3, s.splat(four[3]), mine);
        }
        for &other in rest.remainder() {
            c2 = s.count_gt(c2, s.splat(other), mine);
        }
        let count = s.add(s.add(c0, c1), s.add(c2, c3));
        s.store(count, &mut ranks[b * S::LANES..]);
    }
}
