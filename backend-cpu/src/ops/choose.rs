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
        if self.parts == 2 { topk::pairs(self.top_k).count() } else { 0 }
    }

    /// The most sub-keys of a half that are scored again.
    const fn most(&self) -> usize {
        8 * self.top_k + 128
    }

    /// Sums of pairs, or sub-keys that are scored again.
    fn long(&self) -> usize {
        self.most().max(self.pairs()).next_multiple_of(16) + 16
    }

    /// Whether coarse scores can spare any work: there are many more sub-keys than are scored again.
    pub(super) const fn has_many(&self) -> bool {
        self.sub_keys >= 2 * self.most()
    }

    /// What a [`Chooser`] needs.
    pub(super) fn scratch(&self) -> ScratchReq {
        let (k, pairs) = (self.top_k, self.pairs());
        let (lists, places) = (3 * topk::list(k) + 4 * k + self.long(), topk::work(k));
        ScratchReq::new(lists + 2 * places, lists + places + pairs)
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
    /// How far a sub-key among the best can be below the K-th best coarse score.
    pub(super) margin: f32,
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
    /// [`Choice::long`].
    long: List<'a>,
    /// The pairs that can win, as `a << 16 | b`.
    pairs: &'a mut [u32],
    work: topk::Work<'a>,
}

impl<'a> Chooser<'a> {
    /// Workspace in scratch of [`Choice::scratch`].
    pub(super) fn new(choice: Choice, scratch: Scratch<'a, Cpu>) -> Self {
        let (k, places) = (choice.top_k, topk::work(choice.top_k));
        let (mut reals, mut ids) = (scratch.reals, scratch.ids);
        let mut list = |n| (take(&mut reals, n), take(&mut ids, n));
        let (first, second, best) = (list(topk::list(k)), list(topk::list(k)), list(topk::list(k)));
        let (candidates, long) = (list(4 * k), list(choice.long()));
        let (work_scores, work_ids) = list(places);
        let work = topk::Work { scores: work_scores, ids: work_ids, ranks: take(&mut reals, places) };
        let pairs = take(&mut ids, choice.pairs());
        if choice.parts == 2 {
            for (code, (a, b)) in pairs.iter_mut().zip(topk::pairs(k)) {
                #[allow(clippy::cast_possible_truncation, reason = "K <= N <= 2^16 where keys have two parts")]
                {
                    *code = (a << 16 | b) as u32;
                }
            }
        }
        Self { choice, first, second, best, candidates, long, pairs, work }
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
        let work = &mut self.work;
        if parts == 1 {
            if topk::best(s, first, n, k, (&mut *self.best.0, &mut *self.best.1), work) {
                scores.copy_from_slice(&self.best.0[..k]);
                ids.copy_from_slice(&self.best.1[..k]);
            } else {
                let mut list = Best::new(scores, ids);
                (0..).zip(&first[..n]).for_each(|(i, &score)| list.offer(score, i));
            }
        } else {
            second[n..].fill(f32::NEG_INFINITY);
            let plain = topk::best(s, first, n, k, (&mut *self.first.0, &mut *self.first.1), work)
                & topk::best(s, second, n, k, (&mut *self.second.0, &mut *self.second.1), work);
            if !plain || !self.choose_pairs(s, ids, scores) {
                self.try_all_pairs(&first[..n], &second[..n], ids, scores);
            }
        }
        softmax(scores, weights);
    }

    /// [`Chooser::choose`] by coarse scores: what may be among the best is scored again. Returns whether it could; if
    /// not, the bag means nothing.
    pub(super) fn choose_coarse<K: RowStore>(
        &mut self,
        token: Token,
        keys: &K,
        halves: [Half<'_>; 2],
        (first, second): (&mut [f32], &mut [f32]),
        bag: &mut Bag<'_>,
    ) -> bool {
        for (p, (half, scores)) in halves.into_iter().zip([first, second]).take(self.choice.parts).enumerate() {
            let Some(len) = self.near(token, half.margin, scores) else { return false };
            let (scores, ids) = (&mut self.long.0[..len], &self.long.1[..len]);
            #[allow(clippy::cast_possible_truncation, reason = "a row of a table: ids have 32 bits")]
            let row = |l: usize| ids.get(l).map(|id| half.first as u32 + id);
            let mut dot = Dot { table: keys, row, vector: half.query, out: scores, far: false };
            dispatch!(token, s => columns(s, half.query.len(), &mut dot));
            if !self.best_of_near(token, len, p) {
                return false;
            }
        }
        self.finish(token, bag)
    }

    /// The positions of the sub-keys that may be among the best, in `long`, and how many they are.
    fn near(&mut self, token: Token, margin: f32, scores: &mut [f32]) -> Option<usize> {
        let Choice { sub_keys: n, top_k: k, .. } = self.choice;
        scores[n..].fill(f32::NEG_INFINITY);
        let (most, ids) = (self.choice.most(), &mut *self.long.1);
        dispatch!(token, s => topk::near(s, scores, k, margin, ids, most, &mut self.work))
    }

    /// The best of `len` scores in `long` as list `p`; false if one is NaN or infinite.
    fn best_of_near(&mut self, token: Token, len: usize, p: usize) -> bool {
        let k = self.choice.top_k;
        let (scores, near) = (&mut *self.long.0, &*self.long.1);
        let best = if p == 0 { &mut self.first } else { &mut self.second };
        let found = dispatch!(token, s => {
            let padded = len.next_multiple_of(lanes(s));
            scores[len..padded].fill(f32::NEG_INFINITY);
            topk::best(s, &scores[..padded], len, k, (&mut *best.0, &mut *best.1), &mut self.work)
        });
        if found {
            best.1[..k].iter_mut().for_each(|id| *id = near[*id as usize]);
        }
        found
    }

    /// The bag, by the lists of the halves; false if a sum of two is infinite.
    fn finish(&mut self, token: Token, bag: &mut Bag<'_>) -> bool {
        let k = self.choice.top_k;
        dispatch!(token, s => {
            let found = if self.choice.parts == 1 {
                bag.scores.copy_from_slice(&self.first.0[..k]);
                bag.ids.copy_from_slice(&self.first.1[..k]);
                true
            } else {
                self.choose_pairs(s, bag.ids, bag.scores)
            };
            softmax(bag.scores, bag.weights);
            found
        })
    }

    /// The best pairs of two lists without NaN and positive infinity; false if they have such a sum.
    #[inline(always)]
    fn choose_pairs<S: Simd>(&mut self, s: S, ids: &mut [u32], scores: &mut [f32]) -> bool {
        let Choice { sub_keys: n, top_k: k, .. } = self.choice;
        let sums = &mut *self.long.0;
        let mut len = 0;
        for (a, &u) in self.first.0[..k].iter().enumerate() {
            let u = s.splat(u);
            let many = k / (a + 1);
            // Whole vectors; what is too much is overwritten by the next, or filled below.
            for b in (0..many).step_by(S::LANES) {
                s.store(s.add(u, s.load(&self.second.0[b..])), &mut sums[len + b..]);
            }
            len += many;
        }
        let padded = len.next_multiple_of(S::LANES);
        sums[len..padded].fill(f32::NEG_INFINITY);
        if !topk::best(s, &sums[..padded], len, k, (&mut *self.best.0, &mut *self.best.1), &mut self.work) {
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

/// Scalars of a vector.
#[inline(always)]
const fn lanes<S: Simd>(_: S) -> usize {
    S::LANES
}

/// Takes the first `n` places out of a slice.
pub(super) fn take<'a, T>(from: &mut &'a mut [T], n: usize) -> &'a mut [T] {
    let (head, tail) = core::mem::take(from).split_at_mut(n);
    *from = tail;
    head
}

/// The softmax of `scores` into `weights`, the greatest subtracted first.
#[inline(always)]
fn softmax(scores: &[f32], weights: &mut [f32]) {
    let greatest = scores.iter().fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
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
