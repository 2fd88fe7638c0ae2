//! Which sub-keys can be in a pair among the best K, without the best K of each half.
//!
//! The greatest scores of some groups of sub-keys, the leaders of a half, make pairs too. Where `B` is the K-th best of
//! these, the K-th best pair of all is no worse; so a sub-key in a pair among the best reaches `B` together with the
//! greatest of the other half. Of 1024 random scores some 14 do for K = 32, fewer than the best K of the half, of which
//! most are in no pair.
//!
//! Where scores are off, those of a half by `m` at most, `B` is a guess, and what a sub-key has may be `m` more. Whether the
//! guess was good the pairs tell that were chosen by it, see [`missed`]: what they are is not left to it.

use crate::isa::Simd;
use crate::ops::topk::{self, Work};

/// Of each `a < k` how many pairs `(a, b)` have `(a + 1)(b + 1) <= k`: no other can be among the best `k` of two lists, for
/// at least `k` go before it: those with no greater positions in both lists have no lesser sums, and come first of equal ones.
pub(super) fn rows(k: usize) -> impl Iterator<Item = usize> {
    (0..k).map(move |a| k / (a + 1))
}

/// Writes the sums of pairs of two lists, with `rows[a]` pairs of place `a` of the first, one row after the other, and
/// negative infinity up to sixteen; returns how many.
///
/// There is at least one row. The lists are read, and `sums` written, in whole vectors.
#[inline(always)]
pub(super) fn sum<S: Simd>(s: S, first: &[f32], second: &[f32], rows: &[u32], sums: &mut [f32]) -> usize {
    // Rows of more than one pair. K is the length of the first.
    let wide = rows.len().min(rows[0] as usize / 2);
    let mut len = 0;
    for (&u, &row) in first.iter().zip(&rows[..wide]) {
        let (u, row) = (s.splat(u), row as usize);
        let mut b = 0;
        // What is too much is overwritten by the next row, or filled below.
        while b < row {
            s.store(s.add(u, s.load(&second[b..])), &mut sums[len + b..]);
            b += S::LANES;
        }
        len += row;
    }
    let v = s.splat(second[0]);
    for a in (wide..rows.len()).step_by(S::LANES) {
        s.store(s.add(s.load(&first[a..]), v), &mut sums[len + a - wide..]);
    }
    len += rows.len() - wide;
    sums[len..len.next_multiple_of(16)].fill(f32::NEG_INFINITY);
    len
}

/// Leaders of a half: whole vectors of any instruction set.
pub(super) const fn leaders(k: usize) -> usize {
    k.next_multiple_of(16)
}

/// Writes the leaders of a half, times `factor`, greatest first. The scores are whole vectors, at least two for each of
/// leaders.
#[inline(always)]
pub(super) fn lead<S: Simd>(s: S, scores: &[f32], factor: f32, to: &mut [f32], work: &mut Work<'_>) {
    let maxima = &mut work.scores[..to.len()];
    topk::maxima(s, scores, maxima);
    for to in maxima.chunks_exact_mut(S::LANES) {
        s.store(s.mul(s.splat(factor), s.load(to)), to);
    }
    topk::sort(s, maxima, to, work.ranks);
}

/// What a pair among the best has at least: NaN, or negative infinity, where nothing is known.
#[derive(Clone, Copy)]
pub(super) struct Bound {
    /// Of the sum of scores.
    pair: f32,
    /// What the halves add to it at most.
    greatest: [f32; 2],
}

impl Bound {
    /// From scores of both halves, greatest first, the greatest among them. `rows` are those of [`rows`], and `sums` has room for the
    /// sums of all pairs.
    #[inline(always)]
    pub(super) fn new<S: Simd>(s: S, (first, second): (&[f32], &[f32]), rows: &[u32], sums: &mut [f32]) -> Self {
        let len = sum(s, first, second, rows, sums).next_multiple_of(16);
        let (pair, greatest) = (reached(s, &sums[..len], rows.len()), [first[0], second[0]]);
        Self { pair: pair - ROUNDING * (pair.abs() + first[0].abs() + second[0].abs()), greatest }
    }

    /// Of the score of a sub-key of half `p`.
    #[inline(always)]
    pub(super) fn half(self, p: usize) -> f32 {
        self.pair - self.greatest[1 - p]
    }
}

/// More than roundings take from or add to a few sums and products of numbers, as part of the sum of their magnitudes.
const ROUNDING: f32 = 8.0 * f32::EPSILON;

/// What a sub-key of a half must have at least so that one with less is in no pair among the best, of which K are known that reach
/// `kth`; nothing if that is so for what was passed over in this half, which has `most` at most. `other` is the most that the other
/// half adds.
pub(super) fn missed(most: f32, other: f32, kth: f32) -> Option<f32> {
    let slack = ROUNDING * (most.abs() + other.abs() + kth.abs());
    let none = most + other + slack < kth;
    // Twice: what is passed over then is to be less by more than the roundings.
    if none { None } else { Some(kth - other - 2.0 * slack) }
}

/// The greatest of the first `k` sums, which descend, that at least `k` of all reach; the last is one.
#[inline(always)]
pub(super) fn reached<S: Simd>(s: S, sums: &[f32], k: usize) -> f32 {
    let (mut first, mut left) = (0, k - 1);
    while left > 0 {
        let half = left / 2;
        let bound = s.splat(sums[first + half]);
        let mut count = 0;
        for v in sums.chunks_exact(S::LANES) {
            count += s.ge_bits(s.load(v), bound).count_ones() as usize;
        }
        // Without a branch, which nobody can predict.
        let few = count < k;
        first = if few { first + half + 1 } else { first };
        left = if few { left - half - 1 } else { half };
    }
    sums[first]
}
