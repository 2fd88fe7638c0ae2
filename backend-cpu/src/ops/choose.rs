//! The best slots of one token and head, given the scores of its sub-keys.
//!
//! What does not read the keys is no generic code: it is compiled once, and not in every crate that selects.

use memlayer_core::ops::select::{Best, best_pairs, half_candidates};
use memlayer_core::{RowStore, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::rows::columns;
use crate::isa::{Simd, Token, dispatch};
use crate::math;
use crate::ops::bag::Dot;
use crate::ops::coarse::Coarse;
use crate::ops::pairs::{self, Bound};
use crate::ops::topk;

/// What is chosen among, and how many.
#[derive(Clone, Copy)]
pub(super) struct Choice {
    /// P.
    pub(super) parts: usize,
    /// N.
    pub(super) sub_keys: usize,
    /// K.
    pub(super) top_k: usize,
}

impl Choice {
    /// Pairs that can win.
    fn pairs(&self) -> usize {
        if self.parts == 2 { pairs::rows(self.top_k).sum() } else { 0 }
    }

    /// The most sub-keys of a half that are scored again: fewer than would take as long as scoring all of them exactly.
    const fn most(&self) -> usize {
        let (most, half) = (8 * self.top_k + 128, self.sub_keys / 2);
        if most < half { most } else { half }
    }

    /// Places for sums of pairs.
    fn sums(&self) -> usize {
        self.pairs().next_multiple_of(16) + 16
    }

    /// Places for the sub-keys of a half that are scored again.
    const fn near(&self) -> usize {
        self.most().next_multiple_of(16) + 16
    }

    /// Whether there are so many `times` as many sub-keys as leaders: coarse scores spare work where many more are scored than
    /// are scored again.
    pub(super) const fn has_many(&self, times: usize) -> bool {
        self.sub_keys >= times * pairs::leaders(self.top_k)
    }

    /// Whether the halves have leaders.
    const fn has_leaders(&self) -> bool {
        self.parts == 2 && self.sub_keys >= 2 * pairs::leaders(self.top_k)
    }

    /// What a [`Chooser`] needs.
    pub(super) fn scratch(&self) -> ScratchReq {
        let (k, pairs) = (self.top_k, self.pairs());
        let (lists, places) = (3 * topk::list(k) + 4 * k + 2 * self.near(), topk::work(k));
        ScratchReq::new(lists + 2 * places + self.sums(), lists + places + pairs + k)
    }
}

/// Where the best of a token and head go, `[K]` each.
pub(super) struct Bag<'a> {
    pub(super) ids: &'a mut [u32],
    pub(super) scores: &'a mut [f32],
    pub(super) weights: &'a mut [f32],
}

impl Bag<'_> {
    /// Piece `i` of `n` places.
    pub(super) fn part(&mut self, i: usize, n: usize) -> Bag<'_> {
        let at = i * n..(i + 1) * n;
        Bag { ids: &mut self.ids[at.clone()], scores: &mut self.scores[at.clone()], weights: &mut self.weights[at] }
    }
}

/// A half of a query and its sub-keys, with coarse scores.
#[derive(Clone, Copy)]
pub(super) struct Half<'a> {
    /// `[C]`.
    pub(super) query: &'a [f32],
    /// The row of the first sub-key.
    pub(super) first: usize,
    pub(super) coarse: Coarse,
}

type List<'a> = (&'a mut [f32], &'a mut [u32]);

/// A worker's workspace.
pub(super) struct Chooser<'a> {
    choice: Choice,
    first: List<'a>,
    second: List<'a>,
    best: List<'a>,
    /// `2K` candidates of each half.
    candidates: List<'a>,
    /// The sub-keys of each half that are scored again.
    near: [List<'a>; 2],
    /// Sums of pairs.
    sums: &'a mut [f32],
    /// The pairs that can win, as `a << 16 | b`.
    pairs: &'a mut [u32],
    /// [`pairs::rows`].
    rows: &'a mut [u32],
    work: topk::Work<'a>,
}

impl<'a> Chooser<'a> {
    /// Workspace in scratch of [`Choice::scratch`].
    pub(super) fn new(choice: Choice, scratch: Scratch<'a, Cpu>) -> Self {
        let (k, places) = (choice.top_k, topk::work(choice.top_k));
        let (mut reals, mut ids) = (scratch.reals, scratch.ids);
        let mut list = |n| (take(&mut reals, n), take(&mut ids, n));
        let (first, second, best) = (list(topk::list(k)), list(topk::list(k)), list(topk::list(k)));
        let (candidates, near) = (list(4 * k), [list(choice.near()), list(choice.near())]);
        let (work_scores, work_ids) = list(places);
        let work = topk::Work { scores: work_scores, ids: work_ids, ranks: take(&mut reals, places) };
        let (pairs, rows) = (take(&mut ids, choice.pairs()), take(&mut ids, k));
        let sums = take(&mut reals, choice.sums());
        #[allow(clippy::cast_possible_truncation, reason = "K <= N <= 2^16 where keys have two parts")]
        if choice.parts == 2 {
            rows.iter_mut().zip(pairs::rows(k)).for_each(|(to, row)| *to = row as u32);
            let all = (0..).zip(&*rows).flat_map(|(a, &row)| (0..row).map(move |b| a << 16 | b));
            pairs.iter_mut().zip(all).for_each(|(code, pair)| *code = pair);
        }
        Self { choice, first, second, best, candidates, near, sums, pairs, rows, work }
    }

    /// N.
    pub(super) fn sub_keys(&self) -> usize {
        self.choice.sub_keys
    }

    /// The best K by the scores of both halves, and their softmax. The scores have room for whole vectors.
    pub(super) fn choose(&mut self, token: Token, scores: (&mut [f32], &mut [f32]), bag: &mut Bag<'_>) {
        dispatch!(token, s => self.choose_by(s, scores, bag));
    }

    #[inline(always)]
    fn choose_by<S: Simd>(&mut self, s: S, (first, second): (&mut [f32], &mut [f32]), bag: &mut Bag<'_>) {
        let Choice { parts, sub_keys: n, top_k: k, .. } = self.choice;
        let Bag { ids, scores, weights } = bag;
        first[n..].fill(f32::NEG_INFINITY);
        if parts == 1 {
            if topk::best(s, first, n, k, (&mut *self.best.0, &mut *self.best.1), &mut self.work) {
                scores.copy_from_slice(&self.best.0[..k]);
                ids.copy_from_slice(&self.best.1[..k]);
            } else {
                let mut list = Best::new(scores, ids);
                (0..).zip(&first[..n]).for_each(|(i, &score)| list.offer(score, i));
            }
        } else {
            second[n..].fill(f32::NEG_INFINITY);
            if !self.choose_led(s, (first, second), ids, scores) && !self.choose_best(s, (first, second), ids, scores) {
                self.try_all_pairs(&first[..n], &second[..n], ids, scores);
            }
        }
        softmax(scores, weights);
    }

    /// The best pairs of what can be in one; false if that could not be told.
    #[inline(always)]
    fn choose_led<S: Simd>(
        &mut self,
        s: S,
        (first, second): (&[f32], &[f32]),
        ids: &mut [u32],
        scores: &mut [f32],
    ) -> bool {
        if !self.choice.has_leaders() {
            return false;
        }
        let k = self.choice.top_k;
        let bound = self.bound(s, (first, second), [1.0; 2]);
        let (a, b) = ((&mut *self.first.0, &mut *self.first.1), (&mut *self.second.0, &mut *self.second.1));
        let rows = topk::all_from(s, first, k, bound.half(0), a, &mut self.work);
        let columns = topk::all_from(s, second, k, bound.half(1), b, &mut self.work);
        let (Some(rows), Some(_)) = (rows, columns) else { return false };
        self.choose_pairs(s, Some(rows), ids, scores)
    }

    /// The best pairs of the best of each half; false if a score or sum is NaN or infinite.
    #[inline(never)]
    fn choose_best<S: Simd>(
        &mut self,
        s: S,
        (first, second): (&[f32], &[f32]),
        ids: &mut [u32],
        scores: &mut [f32],
    ) -> bool {
        s.vectorize(
            #[inline(always)]
            || {
                let Choice { sub_keys: n, top_k: k, .. } = self.choice;
                topk::best(s, first, n, k, (&mut *self.first.0, &mut *self.first.1), &mut self.work)
                    & topk::best(s, second, n, k, (&mut *self.second.0, &mut *self.second.1), &mut self.work)
                    && self.choose_pairs(s, None, ids, scores)
            },
        )
    }

    /// What a pair among the best has at least, by scores of whole vectors, times their scales.
    #[inline(always)]
    fn bound<S: Simd>(&mut self, s: S, scores: (&[f32], &[f32]), scales: [f32; 2]) -> Bound {
        // The lists are not in use yet.
        let leaders = pairs::leaders(self.choice.top_k);
        pairs::lead(s, scores.0, scales[0], &mut self.first.0[..leaders], &mut self.work);
        pairs::lead(s, scores.1, scales[1], &mut self.second.0[..leaders], &mut self.work);
        Bound::new(s, (self.first.0, self.second.0), self.rows, self.sums)
    }

    /// [`Chooser::choose`] by coarse scores: what may be among the best is scored again. Returns whether it could; if
    /// not, the bag means nothing.
    ///
    /// What may be among the best is first guessed, narrowly. With the pairs that were found it is known: where the guess passed
    /// anything over that could be in one of the best, it is all done again with what is known then.
    pub(super) fn choose_coarse<K: RowStore>(
        &mut self,
        token: Token,
        keys: &K,
        halves: [Half<'_>; 2],
        (first, second): (&mut [f32], &mut [f32]),
        bag: &mut Bag<'_>,
    ) -> bool {
        let coarse = halves.map(|half| half.coarse);
        let mut least = dispatch!(token, s => self.guess(s, coarse, (first, second)));
        for _ in 0..2 {
            let from = [coarse[0].from(least[0]), coarse[1].from(least[1])];
            let Some(lens) = self.find_near(token, from, (first, second)) else { return false };
            dispatch!(token, s => for (half, ((scores, ids), len)) in halves.iter().zip(self.near.iter_mut().zip(lens)) {
                let (scores, ids) = (&mut scores[..len], &ids[..len]);
                #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
                let row = |l: usize| ids.get(l).map(|id| half.first as u32 + id);
                let mut dot = Dot { table: keys, row, vector: half.query, out: scores, far: false };
                columns(s, half.query.len(), &mut dot);
            });
            if !self.choose_near(token, lens, bag) {
                return false;
            }
            if !self.missed([coarse[0].most(from[0]), coarse[1].most(from[1])], bag, &mut least) {
                return true;
            }
        }
        false
    }

    /// What a sub-key in a pair among the best, or among the best itself, has at least, if the coarse scores are right.
    #[inline(always)]
    fn guess<S: Simd>(&mut self, s: S, coarse: [Coarse; 2], (first, second): (&mut [f32], &mut [f32])) -> [f32; 2] {
        let Choice { parts, sub_keys: n, top_k: k } = self.choice;
        first[n..].fill(f32::NEG_INFINITY);
        if parts == 1 {
            return [coarse[0].scale * topk::bound(s, first, k, &mut self.work), 0.0];
        }
        second[n..].fill(f32::NEG_INFINITY);
        let bound = self.bound(s, (first, second), coarse.map(|coarse| coarse.scale));
        [bound.half(0), bound.half(1)]
    }

    /// Collects the positions of the sub-keys with coarse scores of at least `from` as `near`; how many of each half.
    fn find_near(&mut self, token: Token, from: [f32; 2], (first, second): (&[f32], &[f32])) -> Option<[usize; 2]> {
        let (parts, most) = (self.choice.parts, self.choice.most());
        let [a, b] = &mut self.near;
        dispatch!(token, s => {
            let first = topk::near_from(s, first, from[0], a.1, most);
            let second = if parts == 2 { topk::near_from(s, second, from[1], b.1, most) } else { Some(0) };
            first.zip(second).map(|(a, b)| [a, b])
        })
    }

    /// Whether anything that was not near could change the bag: in each half it has `most` at most. If so, `least` becomes what a
    /// sub-key must have at least.
    fn missed(&self, most: [f32; 2], bag: &Bag<'_>, least: &mut [f32; 2]) -> bool {
        let Choice { parts, top_k: k, .. } = self.choice;
        let others = if parts == 2 {
            [self.second.0[0].max(most[1]), self.first.0[0].max(most[0])]
        } else {
            // Flat keys have no other half.
            [0.0; 2]
        };
        let mut missed = false;
        for p in 0..parts {
            if let Some(known) = pairs::missed(most[p], others[p], bag.scores[k - 1]) {
                (missed, least[p]) = (true, known);
            }
        }
        missed
    }

    /// The bag, by the scores of what is near, so many of each half; false if one is NaN, or one or a sum infinite.
    fn choose_near(&mut self, token: Token, lens: [usize; 2], bag: &mut Bag<'_>) -> bool {
        let Choice { parts, top_k: k, .. } = self.choice;
        dispatch!(token, s => {
            let found = if parts == 1 {
                let found = self.best_of_near(s, lens[0], 0);
                bag.scores.copy_from_slice(&self.first.0[..k]);
                bag.ids.copy_from_slice(&self.first.1[..k]);
                found
            } else {
                self.best_of_near(s, lens[0], 0)
                    && self.best_of_near(s, lens[1], 1)
                    && self.choose_pairs(s, Some(lens[0]), bag.ids, bag.scores)
            };
            softmax(bag.scores, bag.weights);
            found
        })
    }

    /// The best of `len` that are near as list `p`; false if a score is NaN or infinite.
    #[inline(always)]
    fn best_of_near<S: Simd>(&mut self, s: S, len: usize, p: usize) -> bool {
        let k = self.choice.top_k;
        let (scores, ids) = &mut self.near[p];
        let best = if p == 0 { &mut self.first } else { &mut self.second };
        let padded = len.next_multiple_of(S::LANES);
        scores[len..padded].fill(f32::NEG_INFINITY);
        topk::best_of(s, (&scores[..padded], &ids[..padded]), len, k, (&mut *best.0, &mut *best.1), &mut self.work)
    }

    /// The best pairs of two lists without NaN and positive infinity: of the best K of each half, or of what can be in a pair
    /// among the best, and then the first has so many `rows`. False if they have an infinite sum.
    #[inline(always)]
    fn choose_pairs<S: Simd>(&mut self, s: S, rows: Option<usize>, ids: &mut [u32], scores: &mut [f32]) -> bool {
        let Choice { sub_keys: n, top_k: k, .. } = self.choice;
        let sums = &mut *self.sums;
        let len = pairs::sum(s, self.first.0, self.second.0, &self.rows[..rows.unwrap_or(k).min(k)], sums);
        let sums = &sums[..len.next_multiple_of(S::LANES)];
        let best = (&mut *self.best.0, &mut *self.best.1);
        let bound = pairs::reached(s, sums, k);
        let plain = topk::best_from(s, sums, len, k, bound, best, &mut self.work);
        // A list that is not full ends in negative infinities, which are no scores of sub-keys.
        if !plain || (rows.is_some() && self.best.0[k - 1] == f32::NEG_INFINITY) {
            return false;
        }
        scores.copy_from_slice(&self.best.0[..k]);
        for (id, &pair) in ids.iter_mut().zip(&*self.best.1) {
            let pair = self.pairs[pair as usize];
            let (i, j) = (self.first.1[(pair >> 16) as usize], self.second.1[(pair & 0xffff) as usize]);
            // Below 2^32 for every pair of sub-keys: N <= 2^16, so that N itself fits too.
            #[allow(clippy::cast_possible_truncation, reason = "N <= 2^16 where keys have two parts")]
            {
                *id = i * n as u32 + j;
            }
        }
        true
    }

    /// The law in full: NaN and infinities.
    #[cold]
    fn try_all_pairs(&mut self, first: &[f32], second: &[f32], ids: &mut [u32], scores: &mut [f32]) {
        let k = self.choice.top_k;
        let (u, v) = self.candidates.0.split_at_mut(2 * k);
        let (i, j) = self.candidates.1.split_at_mut(2 * k);
        let (a, b) = (half_candidates(first, k, u, i), half_candidates(second, k, v, j));
        best_pairs((&u[..a], &i[..a]), (&v[..b], &j[..b]), first.len(), scores, ids);
    }
}

/// Takes the first `n` places out of scratch that has been checked.
fn take<'a, T>(from: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    from.split_off_mut(..n).unwrap_or_default()
}

/// The softmax of `scores`, best first, into `weights`, the first subtracted from all.
#[inline(always)]
fn softmax(scores: &[f32], weights: &mut [f32]) {
    let greatest = scores.first().copied().unwrap_or_default();
    let mut sum = 0.0;
    for (weights, scores) in weights.chunks_mut(16).zip(scores.chunks(16)) {
        // Always sixteen, for a vector or two: a list is short.
        let mut lanes = [greatest; 16];
        lanes[..scores.len()].copy_from_slice(scores);
        for lane in &mut lanes {
            *lane = math::exp(*lane - greatest);
        }
        for (weight, lane) in weights.iter_mut().zip(lanes) {
            *weight = lane;
            sum += lane;
        }
    }
    for weight in weights {
        *weight /= sum;
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "random numbers are rounded")]
mod tests {
    use memlayer_core::{DenseRows, Random};

    use super::*;
    use crate::isa::Isa;

    /// A bag by the law, from the scores of both halves.
    fn by_law(k: usize, first: &[f32], second: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut u, mut i, mut v, mut j) = (vec![0.0; 2 * k], vec![0; 2 * k], vec![0.0; 2 * k], vec![0; 2 * k]);
        let (a, b) = (half_candidates(first, k, &mut u, &mut i), half_candidates(second, k, &mut v, &mut j));
        let (mut ids, mut scores) = (vec![0; k], vec![0.0; k]);
        best_pairs((&u[..a], &i[..a]), (&v[..b], &j[..b]), first.len(), &mut scores, &mut ids);
        (ids, scores)
    }

    type Draw = fn(&mut Random) -> f32;

    /// What is hard about scores.
    const KINDS: [(&str, Draw); 9] = [
        ("random", |r| r.normal_pair()[0] as f32),
        ("few values", |r| r.below(5) as f32),
        ("long tails", |r| (r.normal_pair()[0] as f32).powi(9)),
        ("an outlier", |r| if r.below(200) == 0 { 1e6 } else { r.normal_pair()[0] as f32 }),
        ("sums that overflow", |r| r.normal_pair()[0] as f32 * 2e38),
        ("negative infinity", |r| if r.below(3) > 0 { f32::NEG_INFINITY } else { r.uniform() as f32 }),
        ("infinity", |r| if r.below(100) == 0 { f32::INFINITY } else { r.uniform() as f32 }),
        ("NaN", |r| if r.below(100) == 0 { f32::NAN } else { r.uniform() as f32 }),
        ("small", |r| r.uniform() as f32 * 1e-40),
    ];

    /// Runs `test` on every instruction set with every size and pair of kinds.
    fn for_all(mut test: impl FnMut(Token, Choice, &str, [&[f32]; 2], &mut Random)) {
        let mut random = Random::new(7);
        for token in Isa::available().filter_map(Token::new) {
            for (n, k) in [(33, 1), (40, 3), (64, 32), (100, 17), (256, 16), (500, 32), (1024, 32), (600, 128)] {
                for (a, b) in (0..KINDS.len()).flat_map(|a| [(a, a), (a, 0), (0, a)]) {
                    let mut draw = |kind: usize| -> Vec<f32> { (0..n).map(|_| KINDS[kind].1(&mut random)).collect() };
                    let (first, second) = (draw(a), draw(b));
                    let name = format!("{} and {}, N = {n}, K = {k}, {token:?}", KINDS[a].0, KINDS[b].0);
                    let choice = Choice { parts: 2, sub_keys: n, top_k: k };
                    test(token, choice, &name, [&first, &second], &mut random);
                }
            }
        }
    }

    fn padded(scores: impl Iterator<Item = f32>) -> Vec<f32> {
        let mut scores: Vec<f32> = scores.collect();
        scores.resize(scores.len().next_multiple_of(32), f32::NAN);
        scores
    }

    /// A bag of the `chooser` that `choose` fills.
    fn chosen<R>(choice: Choice, choose: impl FnOnce(&mut Chooser<'_>, &mut Bag<'_>) -> R) -> (R, Vec<u32>, Vec<f32>) {
        let req = choice.scratch();
        let (mut reals, mut all_ids) = (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids]);
        let mut chooser = Chooser::new(choice, Scratch { reals: &mut reals, ids: &mut all_ids });
        let k = choice.top_k;
        let (mut ids, mut scores, mut weights) = (vec![0; k], vec![0.0; k], vec![0.0; k]);
        let mut bag = Bag { ids: &mut ids, scores: &mut scores, weights: &mut weights };
        (choose(&mut chooser, &mut bag), ids, scores)
    }

    fn bits(scores: &[f32]) -> Vec<u32> {
        scores.iter().map(|&x| if x.is_nan() { f32::NAN } else { x }.to_bits()).collect()
    }

    #[test]
    fn the_best_pairs_are_those_of_the_law() {
        for_all(|token, choice, name, [first, second], _| {
            let (mut a, mut b) = (padded(first.iter().copied()), padded(second.iter().copied()));
            let ((), ids, scores) = chosen(choice, |chooser, bag| chooser.choose(token, (&mut a, &mut b), bag));
            let expected = by_law(choice.top_k, first, second);
            assert_eq!((ids, bits(&scores)), (expected.0, bits(&expected.1)), "{name}");
        });
    }

    #[test]
    fn scores_with_errors_choose_the_same_pairs() {
        let mut done = 0;
        for_all(|token, choice, name, [first, second], random| {
            if first.iter().chain(second).any(|x| !x.is_finite() || x.abs() > 1e15) {
                return;
            }
            // Sub-keys of one value and a query of 1: the values are the exact scores.
            let table: Vec<f32> = first.iter().chain(second).copied().collect();
            let keys = DenseRows::new(&table, 1);
            let mut coarse = |scores: &[f32], scale: f32, size: f32| {
                let spread = scores.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
                let error = size * spread;
                let mut off = |x: &f32| (x + error * (2.0 * random.uniform() as f32 - 1.0)) / scale;
                (padded(scores.iter().map(&mut off)), Coarse { scale, error: error * 1.0001 + spread * 1e-6 })
            };
            for size in [0.0, 1e-3, 0.02] {
                let ((mut a, ca), (mut b, cb)) = (coarse(first, 0.25, size), coarse(second, 3.0, 0.5 * size));
                let half = |first, coarse| Half { query: &[1.0], first, coarse };
                let halves = [half(0, ca), half(choice.sub_keys, cb)];
                let (told, ids, scores) =
                    chosen(choice, |chooser, bag| chooser.choose_coarse(token, &keys, halves, (&mut a, &mut b), bag));
                let expected = by_law(choice.top_k, first, second);
                assert!(!told || (ids, scores) == expected, "{name}, errors {size}");
                done += usize::from(told);
            }
        });
        assert!(done > 200, "told {done} times");
    }
}
