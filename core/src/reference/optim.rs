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
        mut table: S,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "reduce_and_update";
        let dim = table.dim();
        let unique = plan.unique[0] as usize;
        gradient.check(OP, &plan)?;
        check_len(OP, "width of the gradient", dim, gradient.dim)?;
        check_state(OP, rule, dim, table.state_len())?;
        check_ids(OP, &plan.rows[..unique], table.rows())?;
        scratch.check(OP, RowUpdate::<S, O>::reduce_and_update_scratch(self, dim))?;
        let (wide, rest) = scratch.reals.split_at_mut(dim);
        let grad = &mut rest[..dim];
        for u in 0..unique {
            row_sum(&plan, &gradient, u, grad);
            change_row(&mut table, rule, step, plan.rows[u], grad, wide);
        }
        Ok(())
    }
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
