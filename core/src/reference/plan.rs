//! Plans by sorting, and the sums over them.

use crate::device::{Scratch, ScratchReq};
use crate::element::Real;
use crate::error::{ArgError, check_ids, check_len};
use crate::ops::plan::{CHUNK, PlanBuffers, RowGradient, RowPlan, RowReduce};
use crate::reference::Reference;

impl<F: Real> RowReduce for Reference<F> {
    fn plan_scratch(&self, _entries: usize) -> ScratchReq {
        ScratchReq::EMPTY
    }

    fn plan(
        &self,
        ids: &[u32],
        rows: usize,
        out: PlanBuffers<'_, Self>,
        _scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        out.check(ids.len())?;
        check_ids("plan", ids, rows)?;
        for (entry, e) in out.entries.iter_mut().zip(0u32..) {
            *entry = e;
        }
        // Entries are distinct, so the order is total and sorting in place is stable.
        out.entries.sort_unstable_by_key(|&e| (ids[e as usize], e));
        let mut unique = 0;
        for (at, &e) in (0u32..).zip(out.entries.iter()) {
            let row = ids[e as usize];
            if unique == 0 || out.rows[unique - 1] != row {
                out.rows[unique] = row;
                out.starts[unique] = at;
                unique += 1;
            }
        }
        #[allow(clippy::cast_possible_truncation, reason = "checked: fewer than 2^32 entries")]
        {
            out.starts[unique] = ids.len() as u32;
            out.unique[0] = unique as u32;
        }
        Ok(())
    }

    fn reduce(&self, plan: RowPlan<'_, Self>, gradient: RowGradient<'_, Self>, out: &mut [F]) -> Result<(), ArgError> {
        gradient.check("reduce", &plan)?;
        let unique = plan.unique[0] as usize;
        if out.len() < unique * gradient.dim {
            return Err(ArgError::Shape {
                op: "reduce",
                operand: "out",
                expected: unique * gradient.dim,
                found: out.len(),
            });
        }
        for u in 0..unique {
            row_sum(&plan, &gradient, u, &mut out[u * gradient.dim..(u + 1) * gradient.dim]);
        }
        Ok(())
    }

    fn square_sum_scratch(&self, _entries: usize) -> ScratchReq {
        ScratchReq::EMPTY
    }

    fn square_sum(
        &self,
        plan: RowPlan<'_, Self>,
        dim: usize,
        grads: &[F],
        out: &mut [F],
        _scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "square_sum";
        check_len(OP, "out", 1, out.len())?;
        let len = plan.unique[0] as usize * dim;
        let Some(grads) = grads.get(..len) else {
            return Err(ArgError::Shape { op: OP, operand: "grads", expected: len, found: grads.len() });
        };
        out[0] = F::zero();
        for &g in grads {
            out[0] += g * g;
        }
        Ok(())
    }
}

/// The gradient of the plan's row `u`, by the law of vertical sums: chunks from zero, added in order.
pub(super) fn row_sum<F: Real>(
    plan: &RowPlan<'_, Reference<F>>,
    gradient: &RowGradient<'_, Reference<F>>,
    u: usize,
    out: &mut [F],
) {
    let entries = &plan.entries[plan.starts[u] as usize..plan.starts[u + 1] as usize];
    for (v, out) in out.iter_mut().enumerate() {
        *out = F::zero();
        for chunk in entries.chunks(CHUNK) {
            let mut sum = F::zero();
            for &e in chunk {
                let e = e as usize;
                sum += gradient.weights[e] * gradient.sources[e / gradient.bag * gradient.dim + v];
            }
            *out += sum;
        }
    }
}
