//! Row rules: how a touched row changes, and what it keeps for the next time.

use crate::device::{Scratch, ScratchReq};
use crate::element::Real;
use crate::error::ArgError;
use crate::ops::plan::{RowGradient, RowPlan, RowReduce};
use crate::random::mix;
use crate::storage::Table;

/// How new values are rounded to a row's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Up with a probability equal to the fraction cut off. The random bits depend on the seed, the step, the row and
    /// the position in it alone, so the result is the same for every order and number of threads.
    Stochastic {
        /// Picks the random bits.
        seed: u64,
    },
}

/// What a step has in common for all rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The learning rate.
    pub lr: f64,
    /// The number of this step, counted from 1. The bias correction of Adam depends on it.
    pub count: u64,
    /// What every gradient is multiplied by first: 1, or the factor of clipping by global norm.
    pub grad_scale: f64,
    /// How rows narrower than the scalar are rounded.
    pub rounding: Rounding,
}

impl Step {
    /// Step number `count` with learning rate `lr`, unclipped, rounded to nearest.
    #[must_use]
    pub const fn new(lr: f64, count: u64) -> Self {
        Self { lr, count, grad_scale: 1.0, rounding: Rounding::Nearest }
    }

    /// The noise for [`crate::Trainable::store`] of value `i` of row `id`: its lower 16 bits are independent of those of
    /// every other value.
    #[inline(always)]
    #[must_use]
    pub fn noise(&self, id: u32, i: usize) -> Option<u32> {
        match self.rounding {
            Rounding::Nearest => None,
            Rounding::Stochastic { seed } => {
                let row = mix(seed ^ mix(self.count).wrapping_add(u64::from(id)));
                // Four values share 64 random bits, 16 for each: a narrow row is rounded by no more.
                #[allow(clippy::cast_possible_truncation, reason = "the lower bits are this value's")]
                Some((mix(row.wrapping_add(i as u64 / 4)) >> (16 * (i % 4))) as u32)
            }
        }
    }
}

/// How a row changes.
///
/// Rules see the rows that a step touched and no others: weights of untouched rows do not decay, and neither do their
/// moments. That is PyTorch's `SparseAdam`, and differs from a dense optimizer.
pub trait RowRule: Copy + Send + Sync {
    /// What the rule multiplies by, made once a step.
    type Factors<F: Real>: Copy + Send + Sync;

    /// Scalars of state for a row of `dim` values. New state is zero.
    fn state_len(&self, dim: usize) -> usize;

    /// What all rows of a step share, in the scalar of the arithmetic.
    fn factors<F: Real>(&self, step: &Step) -> Self::Factors<F>;

    /// Changes `row` (`[V]`) and `state` ([`RowRule::state_len`]) by `grad` (`[V]`), already scaled.
    ///
    /// Implementations are loops over whole rows with the operations of `F` in the order they are written, unfused,
    /// so that compiled for any instruction set they give the same bits.
    fn step<F: Real>(&self, factors: Self::Factors<F>, row: &mut [F], state: &mut [F], grad: &[F]);
}

/// The mean of the squares, summed in 16 lanes that are then added in order: the same bits on every backend.
#[inline(always)]
pub fn mean_square<F: Real>(grad: &[F]) -> F {
    let mut lanes = [F::zero(); 16];
    let mut chunks = grad.chunks_exact(16);
    for chunk in &mut chunks {
        for (lane, &g) in lanes.iter_mut().zip(chunk) {
            *lane += g * g;
        }
    }
    for (lane, &g) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += g * g;
    }
    let sum = lanes.iter().fold(F::zero(), |sum, &lane| sum + lane);
    sum / F::of(grad.len() as f64)
}

/// `row -= lr · grad`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sgd;

impl RowRule for Sgd {
    type Factors<F: Real> = F;
    fn state_len(&self, _dim: usize) -> usize {
        0
    }
    fn factors<F: Real>(&self, step: &Step) -> F {
        F::of(step.lr)
    }
    #[inline(always)]
    fn step<F: Real>(&self, lr: F, row: &mut [F], _state: &mut [F], grad: &[F]) {
        for (x, &g) in row.iter_mut().zip(grad) {
            *x -= lr * g;
        }
    }
}

/// Adagrad (Duchi et al. 2011): `sum += grad²; row -= lr · grad / (sqrt(sum) + eps)`, a sum for every value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// Keeps the quotient finite.
    pub eps: f64,
}

impl RowRule for Adagrad {
    type Factors<F: Real> = (F, F);
    fn state_len(&self, dim: usize) -> usize {
        dim
    }
    fn factors<F: Real>(&self, step: &Step) -> (F, F) {
        (F::of(step.lr), F::of(self.eps))
    }
    #[inline(always)]
    fn step<F: Real>(&self, (lr, eps): (F, F), row: &mut [F], state: &mut [F], grad: &[F]) {
        for ((x, s), &g) in row.iter_mut().zip(state).zip(grad) {
            *s += g * g;
            *x -= lr * g / (s.sqrt() + eps);
        }
    }
}

/// Adagrad with one sum a row, of the mean square of its gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowwiseAdagrad {
    /// Keeps the quotient finite.
    pub eps: f64,
}

impl RowRule for RowwiseAdagrad {
    type Factors<F: Real> = (F, F);
    fn state_len(&self, _dim: usize) -> usize {
        1
    }
    fn factors<F: Real>(&self, step: &Step) -> (F, F) {
        (F::of(step.lr), F::of(self.eps))
    }
    #[inline(always)]
    fn step<F: Real>(&self, (lr, eps): (F, F), row: &mut [F], state: &mut [F], grad: &[F]) {
        state[0] += mean_square(grad);
        let rate = lr / (state[0].sqrt() + eps);
        for (x, &g) in row.iter_mut().zip(grad) {
            *x -= rate * g;
        }
    }
}

/// Lazy Adam (Kingma and Ba 2015): both moments for every value, those of untouched rows left alone, bias corrected
/// by the global step. State: the first moments, then the second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Keeps the quotient finite.
    pub eps: f64,
}

/// Adam with one second moment a row, of the mean square of its gradient. State: the first moments, then the second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowwiseAdam {
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Keeps the quotient finite.
    pub eps: f64,
}

/// What the Adam rules multiply by.
#[derive(Clone, Copy, Debug)]
pub struct AdamFactors<F> {
    /// The learning rate, with the corrections of both moments' bias.
    pub rate: F,
    /// Keeps the quotient finite.
    pub eps: F,
    /// Decay of the first moment.
    pub beta1: F,
    /// Decay of the second moment.
    pub beta2: F,
    /// `1 - beta1`, rounded once.
    pub one_less_beta1: F,
    /// `1 - beta2`, rounded once.
    pub one_less_beta2: F,
}

fn adam_factors<F: Real>((beta1, beta2): (f64, f64), eps: f64, step: &Step) -> AdamFactors<F> {
    let count = step.count as f64;
    let corrections = (1.0 - libm::pow(beta1, count), 1.0 - libm::pow(beta2, count));
    AdamFactors {
        rate: F::of(step.lr * libm::sqrt(corrections.1) / corrections.0),
        eps: F::of(eps),
        beta1: F::of(beta1),
        beta2: F::of(beta2),
        one_less_beta1: F::of(1.0 - beta1),
        one_less_beta2: F::of(1.0 - beta2),
    }
}

impl RowRule for Adam {
    type Factors<F: Real> = AdamFactors<F>;
    fn state_len(&self, dim: usize) -> usize {
        2 * dim
    }
    fn factors<F: Real>(&self, step: &Step) -> AdamFactors<F> {
        adam_factors(self.betas, self.eps, step)
    }
    #[inline(always)]
    fn step<F: Real>(&self, f: AdamFactors<F>, row: &mut [F], state: &mut [F], grad: &[F]) {
        let (first, second) = state.split_at_mut(row.len());
        for (((x, m), v), &g) in row.iter_mut().zip(first).zip(second).zip(grad) {
            *m = f.beta1 * *m + f.one_less_beta1 * g;
            *v = f.beta2 * *v + f.one_less_beta2 * (g * g);
            *x -= f.rate * *m / (v.sqrt() + f.eps);
        }
    }
}

impl RowRule for RowwiseAdam {
    type Factors<F: Real> = AdamFactors<F>;
    fn state_len(&self, dim: usize) -> usize {
        dim + 1
    }
    fn factors<F: Real>(&self, step: &Step) -> AdamFactors<F> {
        adam_factors(self.betas, self.eps, step)
    }
    #[inline(always)]
    fn step<F: Real>(&self, f: AdamFactors<F>, row: &mut [F], state: &mut [F], grad: &[F]) {
        let (first, second) = state.split_at_mut(row.len());
        second[0] = f.beta2 * second[0] + f.one_less_beta2 * mean_square(grad);
        let rate = f.rate / (second[0].sqrt() + f.eps);
        for ((x, m), &g) in row.iter_mut().zip(first).zip(grad) {
            *m = f.beta1 * *m + f.one_less_beta1 * g;
            *x -= rate * *m;
        }
    }
}

/// Changes the touched rows of a table of type `S` by rule `O`.
pub trait RowUpdate<S: Table, O: RowRule>: RowReduce {
    /// What [`RowUpdate::update`] needs for rows of `dim` values.
    fn update_scratch(&self, dim: usize) -> ScratchReq;

    /// Changes row `rows[u]` of `table` by `grads[u]`, for each of the U touched rows. `grads` is what
    /// [`RowReduce::reduce`] wrote.
    ///
    /// # Errors
    /// [`ArgError`] if a size does not fit or the plan has a row the table has not.
    fn update(
        &self,
        table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        grads: Self::View<'_, Self::Scalar>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), Self::Error>;

    /// What [`RowUpdate::reduce_and_update`] needs for rows of `dim` values.
    fn reduce_and_update_scratch(&self, dim: usize) -> ScratchReq;

    /// [`RowReduce::reduce`] and [`RowUpdate::update`] in one pass over the touched rows, with the same bits, for a
    /// step that needs no norm of all gradients first.
    ///
    /// # Errors
    /// As both.
    fn reduce_and_update(
        &self,
        table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), Self::Error>;

    /// What [`RowUpdate::dot_reduce_and_update`] needs for `entries` entries and rows of `dim` values.
    fn dot_reduce_and_update_scratch(&self, dim: usize, entries: usize) -> ScratchReq;

    /// [`RowUpdate::reduce_and_update`], with the same bits, that also writes each entry's dot of its source with its
    /// row as it was before: `dots[e] = Σ_v sources[e / bag, v] · row(e)[v]` (`[E]`, overwritten), a horizontal sum.
    /// It is what [`EmbeddingBag::bag_dot`](crate::ops::EmbeddingBag::bag_dot) writes, without reading the rows again.
    ///
    /// # Errors
    /// As [`RowUpdate::reduce_and_update`], and [`ArgError`] if `dots` is not one for each entry.
    #[allow(clippy::too_many_arguments, reason = "what reduce_and_update takes, and where the dots go")]
    fn dot_reduce_and_update(
        &self,
        table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        dots: Self::ViewMut<'_, Self::Scalar>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), Self::Error>;
}

/// Fails unless the table's state is what `rule` keeps.
///
/// # Errors
/// [`ArgError::Shape`].
pub fn check_state<O: RowRule>(op: &'static str, rule: &O, dim: usize, state_len: usize) -> Result<(), ArgError> {
    crate::error::check_len(op, "state of a row", rule.state_len(dim), state_len)
}
