//! Row updates, row by row.

use crate::device::{Scratch, ScratchReq};
use crate::element::{Element, Real, Trainable};
use crate::error::{ArgError, check_ids, check_len};
use crate::ops::optim::{RowRule, RowUpdate, Step, check_state};
use crate::ops::plan::{RowGradient, RowPlan};
use crate::reference::Reference;
use crate::reference::plan::row_sum;
use crate::storage::TrainStore;

impl<F: Real, S: TrainStore<State = F>, O: RowRule> RowUpdate<S, O> for Reference<F> {
    fn update_scratch(&self, dim: usize) -> ScratchReq {
        ScratchReq::new(2 * dim, 0)
    }

    fn update(
        &self,
        mut table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        grads: &[F],
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "update";
        let dim = table.dim();
        let unique = plan.unique[0] as usize;
        check_state(OP, rule, dim, table.state_len())?;
        check_ids(OP, &plan.rows[..unique], table.rows())?;
        scratch.check(OP, RowUpdate::<S, O>::update_scratch(self, dim))?;
        if grads.len() < unique * dim {
            return Err(ArgError::Shape { op: OP, operand: "grads", expected: unique * dim, found: grads.len() });
        }
        let (wide, rest) = scratch.reals.split_at_mut(dim);
        let scaled = &mut rest[..dim];
        for u in 0..unique {
            scaled.copy_from_slice(&grads[u * dim..(u + 1) * dim]);
            change_row(&mut table, rule, step, plan.rows[u], scaled, wide);
        }
        Ok(())
    }

    fn reduce_and_update_scratch(&self, dim: usize) -> ScratchReq {
        ScratchReq::new(2 * dim, 0)
    }

    fn reduce_and_update(
        &self,
        table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        change_rows("reduce_and_update", table, rule, step, &plan, &gradient, None, scratch)
    }

    fn dot_reduce_and_update_scratch(&self, dim: usize, _entries: usize) -> ScratchReq {
        RowUpdate::<S, O>::reduce_and_update_scratch(self, dim)
    }

    fn dot_reduce_and_update(
        &self,
        table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        dots: &mut [F],
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "dot_reduce_and_update";
        check_len(OP, "dots", plan.entries.len(), dots.len())?;
        change_rows(OP, table, rule, step, &plan, &gradient, Some(dots), scratch)
    }
}

/// The pass over the touched rows, with the dots of their entries if they are asked for.
#[allow(clippy::too_many_arguments, reason = "the operations' own arguments, handed on")]
fn change_rows<F: Real, S: TrainStore<State = F>, O: RowRule>(
    op: &'static str,
    mut table: S,
    rule: &O,
    step: &Step,
    plan: &RowPlan<'_, Reference<F>>,
    gradient: &RowGradient<'_, Reference<F>>,
    mut dots: Option<&mut [F]>,
    scratch: Scratch<'_, Reference<F>>,
) -> Result<(), ArgError> {
    let dim = table.dim();
    let unique = plan.unique[0] as usize;
    gradient.check(op, plan)?;
    check_len(op, "width of the gradient", dim, gradient.dim)?;
    check_state(op, rule, dim, table.state_len())?;
    check_ids(op, &plan.rows[..unique], table.rows())?;
    scratch.check(op, ScratchReq::new(2 * dim, 0))?;
    let (wide, rest) = scratch.reals.split_at_mut(dim);
    let grad = &mut rest[..dim];
    for u in 0..unique {
        if let Some(dots) = &mut dots {
            let (codes, _) = table.row_and_state(plan.rows[u]);
            for &e in &plan.entries[plan.starts[u] as usize..plan.starts[u + 1] as usize] {
                let source = &gradient.sources[e as usize / gradient.bag * dim..][..dim];
                let terms = source.iter().enumerate().map(|(i, &x)| x * S::Elem::value::<F>(codes, i));
                dots[e as usize] = terms.fold(F::zero(), |sum, term| sum + term);
            }
        }
        row_sum(plan, gradient, u, grad);
        change_row(&mut table, rule, step, plan.rows[u], grad, wide);
    }
    Ok(())
}

/// Scales `grad`, widens row `id` into `wide`, changes it and stores it.
fn change_row<F: Real, S: TrainStore<State = F>, O: RowRule>(
    table: &mut S,
    rule: &O,
    step: &Step,
    id: u32,
    grad: &mut [F],
    wide: &mut [F],
) {
    let scale = F::of(step.grad_scale);
    for g in grad.iter_mut() {
        *g *= scale;
    }
    let (codes, state) = table.row_and_state(id);
    for (i, x) in wide.iter_mut().enumerate() {
        *x = S::Elem::value(codes, i);
    }
    rule.step(rule.factors(step), wide, state, grad);
    for (i, (code, &x)) in codes.iter_mut().zip(wide.iter()).enumerate() {
        *code = S::Elem::store(x, step.noise(id, i));
    }
}
