//! The best `K` slots of every token and head, and the way back.

use core::cmp::Ordering;

use crate::config::Config;
use crate::device::{Device, Scratch, ScratchReq};
use crate::element::Real;
use crate::error::{ArgError, check_len, product};
use crate::storage::Table;

/// The sizes of a selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectDims {
    /// T.
    pub tokens: usize,
    /// H.
    pub heads: usize,
    /// P: 2 for product keys, 1 for flat keys.
    pub parts: usize,
    /// N, sub-keys per part.
    pub sub_keys: usize,
    /// C, the width of one part of a key.
    pub half_dim: usize,
    /// K, rows kept per head.
    pub top_k: usize,
}

impl SelectDims {
    /// The sizes of `config`'s selection for `tokens` tokens.
    #[must_use]
    pub const fn new(config: &Config, tokens: usize) -> Self {
        Self {
            tokens,
            heads: config.heads(),
            parts: config.parts(),
            sub_keys: config.sub_keys(),
            half_dim: config.half_dim(),
            top_k: config.top_k(),
        }
    }
    /// `T·H·P·C`.
    #[must_use]
    pub const fn queries_len(&self) -> usize {
        product(&[self.tokens, self.heads, self.parts, self.half_dim])
    }
    /// `H·P·N`.
    #[must_use]
    pub const fn key_rows(&self) -> usize {
        product(&[self.heads, self.parts, self.sub_keys])
    }
    /// `T·H·K`.
    #[must_use]
    pub const fn bags_len(&self) -> usize {
        product(&[self.tokens, self.heads, self.top_k])
    }
    /// `T·H·P·K`: entries of the gradient of the keys.
    #[must_use]
    pub const fn key_entries(&self) -> usize {
        self.bags_len().saturating_mul(self.parts)
    }
    /// The key-table row of sub-key `n` of part `p` of head `h`.
    #[inline(always)]
    #[must_use]
    pub const fn key_row(&self, h: usize, p: usize, n: usize) -> usize {
        (h * self.parts + p) * self.sub_keys + n
    }
    /// The sub-key of part `p` of slot `id`.
    #[inline(always)]
    #[must_use]
    pub const fn sub_key(&self, id: u32, p: usize) -> usize {
        let id = id as usize;
        if self.parts == 1 {
            id
        } else if p == 0 {
            id / self.sub_keys
        } else {
            id % self.sub_keys
        }
    }

    fn check_keys<K: Table>(&self, op: &'static str, keys: &K) -> Result<(), ArgError> {
        if self.top_k > self.sub_keys || self.top_k == 0 {
            return Err(ArgError::Shape { op, operand: "top_k", expected: self.sub_keys, found: self.top_k });
        }
        // Then every size below is bounded by what the key table has: none is so large that a product of it wraps.
        if self.heads == 0 {
            return Err(ArgError::Size { op, operand: "heads", found: 0, multiple_of: 1 });
        }
        if self.parts != 1 && self.parts != 2 {
            return Err(ArgError::Shape { op, operand: "parts", expected: 2, found: self.parts });
        }
        // Ids have 32 bits: N² slots want N <= 2^16.
        let most = if self.parts == 2 { 1 << 16 } else { 1u64 << 32 };
        if self.sub_keys as u64 > most {
            let expected = usize::try_from(most).unwrap_or(usize::MAX);
            return Err(ArgError::Shape { op, operand: "sub_keys", expected, found: self.sub_keys });
        }
        check_len(op, "rows of keys", self.key_rows(), keys.rows())?;
        check_len(op, "width of keys", self.half_dim, keys.dim())
    }
}

/// The arguments of [`SelectRows::select`].
pub struct Select<'a, D: Device, K> {
    /// The sizes.
    pub dims: SelectDims,
    /// `[T, H, P, C]`.
    pub queries: D::View<'a, D::Scalar>,
    /// Rows `[H, P, N]` of width C.
    pub keys: &'a K,
    /// `[T, H, K]`, overwritten: slots, best first.
    pub ids: D::ViewMut<'a, u32>,
    /// `[T, H, K]`, overwritten: the sums of the half scores.
    pub scores: D::ViewMut<'a, D::Scalar>,
    /// `[T, H, K]`, overwritten: the softmax of the scores in each head.
    pub weights: D::ViewMut<'a, D::Scalar>,
}

impl<D: Device, K: Table> Select<'_, D, K> {
    /// Fails unless all sizes fit.
    ///
    /// # Errors
    /// [`ArgError::Shape`].
    pub fn check(&self) -> Result<(), ArgError> {
        const OP: &str = "select";
        self.dims.check_keys(OP, self.keys)?;
        check_len(OP, "queries", self.dims.queries_len(), D::len(self.queries))?;
        check_len(OP, "ids", self.dims.bags_len(), D::len_mut(&self.ids))?;
        check_len(OP, "scores", self.dims.bags_len(), D::len_mut(&self.scores))?;
        check_len(OP, "weights", self.dims.bags_len(), D::len_mut(&self.weights))
    }
}

/// The arguments of [`SelectRows::select_backward`].
pub struct SelectBackward<'a, D: Device, K> {
    /// The sizes.
    pub dims: SelectDims,
    /// `[T, H, P, C]`, as they were selected with.
    pub queries: D::View<'a, D::Scalar>,
    /// Rows `[H, P, N]` of width C.
    pub keys: &'a K,
    /// `[T, H, K]`, as selected.
    pub ids: D::View<'a, u32>,
    /// `[T, H, K]`, as selected.
    pub weights: D::View<'a, D::Scalar>,
    /// `[T, H, K]`: the gradient of the weights; overwritten with that of the scores.
    pub dweights: D::ViewMut<'a, D::Scalar>,
    /// `[T, H, P, C]`, overwritten: the gradient of the queries, a vertical sum over the K rows of a head.
    pub dqueries: Option<D::ViewMut<'a, D::Scalar>>,
    /// `[H, P, N, C]`, overwritten: the gradient of the keys, a vertical sum over the entries `[T, H, P, K]` of each
    /// row in their order; rows that were not selected get zero.
    pub dkeys: Option<D::ViewMut<'a, D::Scalar>>,
}

impl<D: Device, K: Table> SelectBackward<'_, D, K> {
    /// Fails unless all sizes fit.
    ///
    /// # Errors
    /// [`ArgError::Shape`].
    pub fn check(&self) -> Result<(), ArgError> {
        const OP: &str = "select_backward";
        self.dims.check_keys(OP, self.keys)?;
        check_len(OP, "queries", self.dims.queries_len(), D::len(self.queries))?;
        check_len(OP, "ids", self.dims.bags_len(), D::len(self.ids))?;
        check_len(OP, "weights", self.dims.bags_len(), D::len(self.weights))?;
        check_len(OP, "dweights", self.dims.bags_len(), D::len_mut(&self.dweights))?;
        if let Some(dqueries) = &self.dqueries {
            check_len(OP, "dqueries", self.dims.queries_len(), D::len_mut(dqueries))?;
        }
        if let Some(dkeys) = &self.dkeys {
            check_len(OP, "dkeys", product(&[self.dims.key_rows(), self.dims.half_dim]), D::len_mut(dkeys))?;
        }
        Ok(())
    }
}

/// Finds slots.
pub trait SelectRows<K: Table>: Device {
    /// What [`SelectRows::select`] needs.
    fn select_scratch(&self, dims: SelectDims) -> ScratchReq;

    /// The best K slots of every token and head by the selection law, and the softmax of their scores.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit or the scratch is too small; nothing is written then.
    fn select(&self, args: Select<'_, Self, K>, scratch: Scratch<'_, Self>) -> Result<(), Self::Error>;

    /// What [`SelectRows::select_backward`] needs. `dkeys` says whether the gradient of the keys is asked for.
    fn select_backward_scratch(&self, dims: SelectDims, dkeys: bool) -> ScratchReq;

    /// From the gradient of the weights to those of scores, queries and keys. The slots stay as they are.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit, an id is no slot, or the scratch is too small.
    fn select_backward(&self, args: SelectBackward<'_, Self, K>, scratch: Scratch<'_, Self>)
    -> Result<(), Self::Error>;
}

/// The order of the selection law, best first: `Less` if score `a` is better than score `b`.
#[inline(always)]
pub fn score_order<F: Real>(a: F, b: F) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => b.partial_cmp(&a).unwrap_or(Ordering::Equal),
        (a, b) => b.cmp(&a),
    }
}

/// A list of the best candidates seen, best first; of equal ones the earlier stays ahead.
pub struct Best<'a, F> {
    scores: &'a mut [F],
    ids: &'a mut [u32],
    len: usize,
}

impl<'a, F: Real> Best<'a, F> {
    /// An empty list of as many places as both slices have.
    pub fn new(scores: &'a mut [F], ids: &'a mut [u32]) -> Self {
        debug_assert_eq!(scores.len(), ids.len());
        Self { scores, ids, len: 0 }
    }

    /// Takes `(score, id)` in if it is among the best.
    #[inline]
    pub fn offer(&mut self, score: F, id: u32) {
        let mut filled = self.scores.iter().take(self.len);
        let at = filled.rposition(|&s| score_order(score, s) != Ordering::Less).map_or(0, |last| last + 1);
        // It takes the place of the first that is worse, which takes that of the next.
        let (mut score, mut id, moved) = (score, id, self.len - at + 1);
        for (s, i) in self.scores.iter_mut().zip(self.ids.iter_mut()).skip(at).take(moved) {
            core::mem::swap(&mut score, s);
            core::mem::swap(&mut id, i);
        }
        self.len = (self.len + 1).min(self.scores.len());
    }
}

/// The candidates of one half: its best K sub-keys, and after them as many of its sub-keys with a score of negative
/// infinity as can still win.
///
/// They can win only against the other half's positive infinity, where the sum is NaN and so counts as greatest; for
/// finite scores the best K alone decide. Returns how many of `scores` and `ids` (`2K` places each) are filled.
pub fn half_candidates<F: Real>(half: &[F], top_k: usize, scores: &mut [F], ids: &mut [u32]) -> usize {
    let (scores, more_scores) = scores.split_at_mut(top_k.min(scores.len()));
    let (ids, more_ids) = ids.split_at_mut(top_k.min(ids.len()));
    let mut best = Best::new(scores, ids);
    for (n, &score) in half.iter().enumerate() {
        best.offer(score, index(n));
    }
    let lowest = -F::INFINITY;
    // Sub-keys of equal score rank by index, and all of negative infinity rank last: those already taken are the
    // first of them.
    let taken = scores.iter().filter(|&&s| s == lowest).count();
    let rest = half.iter().enumerate().filter(|&(_, &s)| s == lowest).skip(taken).take(top_k);
    let mut len = top_k;
    for ((n, &score), (s, i)) in rest.zip(more_scores.iter_mut().zip(more_ids)) {
        (*s, *i) = (score, index(n));
        len += 1;
    }
    len
}

#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "sub-keys are checked to be at most 2^32")]
fn index(n: usize) -> u32 {
    n as u32
}

/// The best K pairs of two lists of candidates (see [`half_candidates`]) by trying them all: exact for every input,
/// NaN and infinities included.
pub fn best_pairs<F: Real>(
    first: (&[F], &[u32]),
    second: (&[F], &[u32]),
    sub_keys: usize,
    scores: &mut [F],
    ids: &mut [u32],
) {
    let mut best = Best::new(scores, ids);
    for (&u, &i) in first.0.iter().zip(first.1) {
        for (&v, &j) in second.0.iter().zip(second.1) {
            // Below 2^32 for every pair of sub-keys: N <= 2^16, and (N - 1)·N + N - 1 = N² - 1.
            best.offer(u + v, i * index(sub_keys) + j);
        }
    }
}

/// The softmax of `scores` into `weights`, the greatest subtracted first.
pub fn softmax<F: Real>(scores: &[F], weights: &mut [F]) {
    let greatest = scores.iter().fold(-F::INFINITY, |m, &s| if s > m { s } else { m });
    let mut sum = F::zero();
    for (w, &s) in weights.iter_mut().zip(scores) {
        *w = (s - greatest).exp();
        sum += *w;
    }
    for w in weights {
        *w /= sum;
    }
}
