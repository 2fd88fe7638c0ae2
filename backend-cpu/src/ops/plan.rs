//! Plans by radix sort, and the sums over them.

use memlayer_core::error::{check_ids, check_len};
use memlayer_core::ops::plan::{CHUNK, PlanBuffers, RowGradient, RowPlan, RowReduce};
use memlayer_core::{ArgError, Scratch, ScratchReq};

use crate::Cpu;
use crate::isa::rows::{Columns, columns, dot};
use crate::isa::{Simd, dispatch};
use crate::ops::bag::row_cost;

/// Bits of an id that one pass of the sort looks at, at most.
const DIGIT: u32 = 11;

/// Rows whose squares are summed in one go.
const SQUARES: usize = 64;

/// Touched rows that one piece of work takes.
pub(super) const ROWS: usize = 64;

impl RowReduce for Cpu {
    fn plan_scratch(&self, entries: usize) -> ScratchReq {
        ScratchReq::new(0, 2 * entries + (1 << DIGIT))
    }

    fn plan(
        &self,
        ids: &[u32],
        rows: usize,
        out: PlanBuffers<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        out.check(ids.len())?;
        check_ids("plan", ids, rows)?;
        scratch.check("plan", self.plan_scratch(ids.len()))?;
        let greatest = ids.iter().fold(0, |m, &id| m.max(id));
        let (counts, rest) = scratch.ids.split_at_mut(1 << DIGIT);
        let (other_rows, rest) = rest.split_at_mut(ids.len());
        let other_entries = &mut rest[..ids.len()];

        // As few passes as the greatest id needs, of as few bits as that leaves.
        let bits = (u32::BITS - greatest.leading_zeros()).max(1);
        let passes = bits.div_ceil(DIGIT);
        let digit = bits.div_ceil(passes);
        // The last pass writes to `out`; those before it alternate.
        let mut here = (&mut *out.rows, &mut *out.entries);
        let mut there = (other_rows, other_entries);
        if passes.is_multiple_of(2) {
            core::mem::swap(&mut here, &mut there);
        }
        let identity = (0..).zip(ids).map(|(e, &id)| (id, e));
        sort_pass(identity, ids, (0, digit), counts, &mut here);
        for pass in 1..passes {
            core::mem::swap(&mut here, &mut there);
            let pairs = there.0.iter().copied().zip(there.1.iter().copied());
            sort_pass(pairs, ids, (pass * digit, digit), counts, &mut here);
        }

        let mut unique = 0;
        for (at, i) in (0u32..).zip(0..ids.len()) {
            let row = out.rows[i];
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

    fn reduce(
        &self,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        out: &mut [f32],
    ) -> Result<(), ArgError> {
        gradient.check("reduce", &plan)?;
        let (unique, dim) = (plan.unique[0] as usize, gradient.dim);
        let Some(out) = out.get_mut(..unique * dim) else {
            let (expected, found) = (unique * dim, out.len());
            return Err(ArgError::Shape { op: "reduce", operand: "out", expected, found });
        };
        if dim == 0 {
            return Ok(());
        }
        let cost = plan.entries.len() * row_cost(dim);
        self.pool.for_each(cost, out.chunks_mut(ROWS * dim).enumerate(), |(i, out)| {
            dispatch!(self.token, s => {
                for (u, out) in out.chunks_exact_mut(dim).enumerate() {
                    row_sum(s, &plan, &gradient, i * ROWS + u, out);
                }
            });
        });
        Ok(())
    }

    fn square_sum_scratch(&self, entries: usize) -> ScratchReq {
        ScratchReq::new(entries.div_ceil(SQUARES), 0)
    }

    fn square_sum(
        &self,
        plan: RowPlan<'_, Self>,
        dim: usize,
        grads: &[f32],
        out: &mut [f32],
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "square_sum";
        check_len(OP, "out", 1, out.len())?;
        scratch.check(OP, self.square_sum_scratch(plan.entries.len()))?;
        let len = plan.unique[0] as usize * dim;
        let Some(grads) = grads.get(..len) else {
            return Err(ArgError::Shape { op: OP, operand: "grads", expected: len, found: grads.len() });
        };
        // Parts of a fixed size, added in order: the same sum for every number of threads.
        let parts = grads.chunks((SQUARES * dim).max(1));
        let count = parts.len();
        self.pool.for_each(len / 8, parts.zip(scratch.reals.iter_mut()), |(part, sum)| {
            *sum = dispatch!(self.token, s => dot(s, part, part));
        });
        out[0] = scratch.reals[..count].iter().fold(0.0, |sum, part| sum + part);
        Ok(())
    }
}

/// Moves pairs of a row and an entry to `to`, by the digit of `bits` bits from bit `shift` of the row on, otherwise in
/// their order. The rows are those of `ids`, in any order.
fn sort_pass(
    pairs: impl Iterator<Item = (u32, u32)>,
    ids: &[u32],
    (shift, bits): (u32, u32),
    counts: &mut [u32],
    to: &mut (&mut [u32], &mut [u32]),
) {
    let counts = &mut counts[..1 << bits];
    let mask = (1u32 << bits) - 1;
    counts.fill(0);
    for &id in ids {
        counts[((id >> shift) & mask) as usize] += 1;
    }
    let mut start = 0;
    for count in counts.iter_mut() {
        start += core::mem::replace(count, start);
    }
    for (row, entry) in pairs {
        let place = &mut counts[((row >> shift) & mask) as usize];
        let at = *place as usize;
        *place += 1;
        to.0[at] = row;
        to.1[at] = entry;
    }
}

/// The gradient of the plan's row `u`, by the law of vertical sums: chunks from zero, added in order.
#[inline(always)]
pub(super) fn row_sum<S: Simd>(
    s: S,
    plan: &RowPlan<'_, Cpu>,
    gradient: &RowGradient<'_, Cpu>,
    u: usize,
    out: &mut [f32],
) {
    let entries = &plan.entries[plan.starts[u] as usize..plan.starts[u + 1] as usize];
    columns(s, gradient.dim, &mut RowSum { gradient, entries, out });
}

struct RowSum<'a, 'b> {
    gradient: &'a RowGradient<'b, Cpu>,
    entries: &'a [u32],
    out: &'a mut [f32],
}

impl Columns for RowSum<'_, '_> {
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "a bag is no longer than all entries, which 32 bits count")]
    fn block<S: Simd, const NV: usize>(&mut self, s: S, col: usize) {
        let RowGradient { bag, dim, weights, sources } = *self.gradient;
        let width = NV * S::LANES;
        let out = &mut self.out[col..col + width];
        for (i, chunk) in self.entries.chunks(CHUNK).enumerate() {
            let mut acc = [s.splat(0.0); NV];
            for &e in chunk {
                let weight = s.splat(weights[e as usize]);
                let source = &sources[(e / bag as u32) as usize * dim + col..][..width];
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = s.add(*acc, s.mul(weight, s.load(&source[i * S::LANES..])));
                }
            }
            for (j, &acc) in acc.iter().enumerate() {
                let out = &mut out[j * S::LANES..];
                // A sum that started at zero is never -0, so that the first chunk added to zero is itself.
                s.store(if i == 0 { acc } else { s.add(s.load(out), acc) }, out);
            }
        }
    }
}
