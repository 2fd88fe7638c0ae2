//! Row updates: the touched rows in pieces, each with its part of the table.

use memlayer_core::error::{check_ids, check_len};
use memlayer_core::ops::optim::{RowRule, RowUpdate, Step, check_state};
use memlayer_core::ops::plan::{RowGradient, RowPlan};
use memlayer_core::{ArgError, Element, Scratch, ScratchReq, TrainStore, Trainable};

use crate::Cpu;
use crate::isa::rows::{self, as_f32, widen};
use crate::isa::{Level, Simd, dispatch};
use crate::ops::bag::{BURST, row_cost};
use crate::ops::plan::{ROWS, row_sum};
use crate::scalar::Single;

/// Rows between those that are asked for, [`BURST`] at once, and the first of them that is changed.
const AHEAD: usize = 4;

impl<T: TrainStore<State = f32> + Send, O: RowRule> RowUpdate<T, O> for Cpu {
    fn update_scratch(&self, dim: usize) -> ScratchReq {
        ScratchReq::new(2 * dim, 0).times(self.threads())
    }

    fn update(
        &self,
        table: T,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        grads: &[f32],
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "update";
        let dim = table.dim();
        let unique = plan.unique[0] as usize;
        check_state(OP, rule, dim, table.state_len())?;
        check_ids(OP, &plan.rows[..unique], table.rows())?;
        scratch.check(OP, RowUpdate::<T, O>::update_scratch(self, dim))?;
        if grads.len() < unique * dim {
            return Err(ArgError::Shape { op: OP, operand: "grads", expected: unique * dim, found: grads.len() });
        }
        let change = Change { rule, factors: rule.factors::<Single>(step), step };
        let workers = scratch.reals.chunks_exact_mut(2 * dim);
        let pieces = Pieces::new(table, &plan.rows[..unique]).zip(grads.chunks(ROWS * dim));
        self.pool.for_each_with(unique * row_cost(dim) * 4, pieces, workers, |worker, (piece, grads)| {
            dispatch!(self.token, s => {
                let grads = &mut grads.chunks_exact(dim);
                let gradient = |_, grad: &mut [f32]| grad.copy_from_slice(grads.next().unwrap_or(&[]));
                change.rows(s, piece, worker, gradient, |_, _| ());
            });
        });
        Ok(())
    }

    fn reduce_and_update_scratch(&self, dim: usize) -> ScratchReq {
        ScratchReq::new(2 * dim, 0).times(self.threads())
    }

    fn reduce_and_update(
        &self,
        table: T,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "reduce_and_update";
        scratch.check(OP, RowUpdate::<T, O>::reduce_and_update_scratch(self, table.dim()))?;
        let change = Change { rule, factors: rule.factors::<Single>(step), step };
        self.change_rows(OP, table, change, &plan, &gradient, None, scratch.reals)
    }

    fn dot_reduce_and_update_scratch(&self, dim: usize, entries: usize) -> ScratchReq {
        // The dots in the plan's order, in which a piece's lie together.
        RowUpdate::<T, O>::reduce_and_update_scratch(self, dim).and(ScratchReq::new(entries, 0))
    }

    fn dot_reduce_and_update(
        &self,
        table: T,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        dots: &mut [f32],
        scratch: Scratch<'_, Self>,
    ) -> Result<(), ArgError> {
        const OP: &str = "dot_reduce_and_update";
        let entries = plan.entries.len();
        check_len(OP, "dots", entries, dots.len())?;
        scratch.check(OP, RowUpdate::<T, O>::dot_reduce_and_update_scratch(self, table.dim(), entries))?;
        let (sorted, workers) = scratch.reals.split_at_mut(entries);
        let change = Change { rule, factors: rule.factors::<Single>(step), step };
        self.change_rows(OP, table, change, &plan, &gradient, Some(&mut *sorted), workers)?;
        for (&entry, &dot) in plan.entries.iter().zip(&*sorted) {
            dots[entry as usize] = dot;
        }
        Ok(())
    }
}

impl Cpu {
    /// Reduces and updates, each row once; `dots` takes those of the entries in the plan's order.
    #[allow(clippy::too_many_arguments, reason = "the operations' own arguments, handed on")]
    fn change_rows<T: TrainStore<State = f32> + Send, O: RowRule>(
        &self,
        op: &'static str,
        table: T,
        change: Change<'_, O>,
        plan: &RowPlan<'_, Self>,
        gradient: &RowGradient<'_, Self>,
        mut dots: Option<&mut [f32]>,
        workers: &mut [f32],
    ) -> Result<(), ArgError> {
        let dim = table.dim();
        let unique = plan.unique[0] as usize;
        gradient.check(op, plan)?;
        check_len(op, "width of the gradient", dim, gradient.dim)?;
        check_state(op, change.rule, dim, table.state_len())?;
        check_ids(op, &plan.rows[..unique], table.rows())?;
        let pieces = Pieces::new(table, &plan.rows[..unique]).enumerate().map(|(i, piece)| {
            let (first, end) = (i * ROWS, i * ROWS + piece.rows.len());
            let entries = (plan.starts[end] - plan.starts[first]) as usize;
            (first, piece, dots.as_mut().and_then(|dots| dots.split_off_mut(..entries)))
        });
        let cost = (plan.entries.len() + 4 * unique) * row_cost(dim);
        let workers = workers.chunks_exact_mut(2 * dim);
        self.pool.for_each_with(cost, pieces, workers, |worker, (first, piece, mut dots)| {
            dispatch!(self.token, s => {
                change.rows(
                    s,
                    piece,
                    worker,
                    #[inline(always)]
                    |u, grad| row_sum(s, plan, gradient, first + u, grad),
                    #[inline(always)]
                    |u, row| {
                        let (start, end) = (plan.starts[first + u] as usize, plan.starts[first + u + 1] as usize);
                        let Some(dots) = dots.as_mut().and_then(|dots| dots.split_off_mut(..end - start)) else { return };
                        for (dot, &entry) in dots.iter_mut().zip(&plan.entries[start..end]) {
                            *dot = rows::dot(s, &gradient.sources[entry as usize / gradient.bag * dim..][..dim], row);
                        }
                    },
                );
            });
        });
        Ok(())
    }
}

/// Rows to change, ascending, and the part of the table they are in.
struct Piece<'a, T> {
    rows: &'a [u32],
    table: T,
}

/// Cuts a table into [`Piece`]s of [`ROWS`] touched rows.
struct Pieces<'a, T> {
    rows: &'a [u32],
    table: Option<T>,
}

impl<'a, T: TrainStore> Pieces<'a, T> {
    fn new(table: T, rows: &'a [u32]) -> Self {
        Self { rows, table: Some(table) }
    }
}

impl<'a, T: TrainStore> Iterator for Pieces<'a, T> {
    type Item = Piece<'a, T>;

    fn next(&mut self) -> Option<Piece<'a, T>> {
        if self.rows.is_empty() {
            return None;
        }
        let table = self.table.take()?;
        let (rows, rest) = self.rows.split_at(ROWS.min(self.rows.len()));
        self.rows = rest;
        let Some(&first) = rest.first() else { return Some(Piece { rows, table }) };
        let (table, rest) = table.split_at(first);
        self.table = Some(rest);
        Some(Piece { rows, table })
    }
}

/// What a step does to a row.
struct Change<'a, O: RowRule> {
    rule: &'a O,
    factors: O::Factors<Single>,
    step: &'a Step,
}

impl<O: RowRule> Change<'_, O> {
    /// Changes all rows of a piece; `gradient` writes that of the piece's row `u`, and `before` then sees the row as it
    /// still is.
    #[inline(always)]
    fn rows<S: Simd, T: TrainStore<State = f32>>(
        &self,
        s: S,
        mut piece: Piece<'_, T>,
        worker: &mut [f32],
        mut gradient: impl FnMut(usize, &mut [f32]),
        mut before: impl FnMut(usize, &[f32]),
    ) {
        let (wide, grad) = worker.split_at_mut(worker.len() / 2);
        for (u, &id) in piece.rows.iter().enumerate() {
            if u.is_multiple_of(BURST) {
                for &next in piece.rows.iter().skip(u + AHEAD).take(BURST) {
                    let (codes, state) = piece.table.row_and_state(next);
                    s.prefetch_all(Level::Second, codes);
                    s.prefetch_all(Level::Second, state);
                }
            }
            // And the next one in the first-level cache: a tenth of an update of many rows.
            if let Some(&next) = piece.rows.get(u + 1) {
                let (codes, state) = piece.table.row_and_state(next);
                s.prefetch_all(Level::First, codes);
                s.prefetch_all(Level::First, state);
            }
            gradient(u, grad);
            self.row(id, piece.table.row_and_state(id), grad, wide, |row| before(u, row));
        }
    }

    /// Scales `grad` and changes a row by it, by way of `wide` where rows are narrower than the scalar.
    ///
    /// The rule's loops are inlined into code of the instruction set: multiplications and additions stay apart, and
    /// roots and quotients are correctly rounded, so that they have the reference's bits.
    #[inline(always)]
    fn row<E: Trainable>(
        &self,
        id: u32,
        (codes, state): (&mut [E], &mut [f32]),
        grad: &mut [f32],
        wide: &mut [f32],
        before: impl FnOnce(&[f32]),
    ) {
        #[allow(clippy::cast_possible_truncation, reason = "rounded as the reference rounds it")]
        let scale = self.step.grad_scale as f32;
        // One more pass over the row, which most steps have no use for.
        if scale != 1.0 {
            for g in grad.iter_mut() {
                *g *= scale;
            }
        }
        let (grad, state) = (Single::slice(grad), Single::slice_mut(state));
        if let Some(row) = as_f32(codes) {
            before(row);
            let row = Single::slice_mut(bytemuck::cast_slice_mut(codes));
            self.rule.step(self.factors, row, state, grad);
            return;
        }
        widen(codes, 0, wide);
        before(wide);
        self.rule.step(self.factors, Single::slice_mut(wide), state, grad);
        store(self.step, id, codes, wide);
    }
}

/// Rounds `wide` to a row's codes.
#[inline(always)]
fn store<E: Trainable>(step: &Step, id: u32, codes: &mut [E], wide: &[f32]) {
    debug_assert_eq!(<E as Element>::codes(wide.len()), codes.len());
    for (i, (code, &x)) in codes.iter_mut().zip(wide).enumerate() {
        *code = E::store(x, step.noise(id, i));
    }
}
