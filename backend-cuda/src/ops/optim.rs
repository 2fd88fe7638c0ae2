//! Row updates.

use memlayer_core::error::check_len;
use memlayer_core::ops::optim::{
    Adagrad, Adam, AdamFactors, Rounding, RowRule, RowUpdate, RowwiseAdagrad, RowwiseAdam, Sgd, Step, check_state,
};
use memlayer_core::ops::plan::{CHUNK, RowGradient, RowPlan};
use memlayer_core::random::mix;
use memlayer_core::{Scratch, ScratchReq, Table, Trainable};

use super::gradient::{Gradient, MixedGradient};
use super::plan::{Destination, Lists, LongRows, PlanArg, SHORT, VARIANT, pieces, row_block, short_block};
use super::{aligned, number_of, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant, trained_format};
use crate::launch::{Args, Shape};
use crate::memory::{TrainRows, View, ViewMut};

/// Gradients of long rows that [`RowUpdate::reduce_and_update`] holds at a time.
const SLOTS: usize = 512;
/// Threads of a block that finds the dots of rows that are not short.
const DOT_BLOCK: u32 = 128;

/// What all rows of a step share, as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Factors {
    grad_scale: f32,
    rate: f32,
    eps: f32,
    beta1: f32,
    beta2: f32,
    one_less_beta1: f32,
    one_less_beta2: f32,
    stochastic: u32,
    seed: u64,
    count: u64,
}

/// The row rules that there are kernels for: those of [`memlayer_core::ops::optim`].
pub trait DeviceRule: RowRule + sealed::Sealed {
    /// The rule's number in `optim.cu`.
    #[doc(hidden)]
    const NUMBER: u32;
    /// Whether it needs a row's mean square.
    #[doc(hidden)]
    const ROWWISE: bool = false;
    /// What the rule multiplies by.
    #[doc(hidden)]
    fn device_factors(&self, step: &Step) -> Factors;
}

mod sealed {
    pub trait Sealed {}
}

fn adam(f: AdamFactors<f32>) -> Factors {
    Factors {
        rate: f.rate,
        eps: f.eps,
        beta1: f.beta1,
        beta2: f.beta2,
        one_less_beta1: f.one_less_beta1,
        one_less_beta2: f.one_less_beta2,
        ..Factors::default()
    }
}

macro_rules! rules {
    ($($rule:ty, $number:literal, $rowwise:literal, $factors:expr;)*) => {
        $(
            impl sealed::Sealed for $rule {}
            impl DeviceRule for $rule {
                const NUMBER: u32 = $number;
                const ROWWISE: bool = $rowwise;
                fn device_factors(&self, step: &Step) -> Factors {
                    $factors(self.factors::<f32>(step))
                }
            }
        )*
    };
}
rules! {
    Sgd, 0, false, |rate| Factors { rate, ..Factors::default() };
    Adagrad, 1, false, |(rate, eps)| Factors { rate, eps, ..Factors::default() };
    RowwiseAdagrad, 2, true, |(rate, eps)| Factors { rate, eps, ..Factors::default() };
    Adam, 3, false, adam;
    RowwiseAdam, 4, true, adam;
}

/// A table in training as kernels take it.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
struct RowsArg {
    codes: u64,
    state: u64,
    rows: u64,
    dim: u32,
    state_len: u32,
    names: u64,
}

/// An update of a table, checked.
struct Update {
    op: &'static str,
    rows: RowsArg,
    factors: Factors,
    plan: PlanArg,
    variant: Variant,
    /// Whether four columns may be read at once, as far as the table is concerned.
    wide: bool,
    /// Bytes of shared memory of a block.
    shared: usize,
}

impl Cuda {
    /// Fails unless a block can have `shared` bytes beside those that kernels declare.
    fn check_shared(&self, op: &'static str, shared: usize) -> Result<(), CudaError> {
        if shared > self.properties.shared.saturating_sub(1024) {
            return Err(CudaError::Unsupported { op, what: "a row-wise rule over rows as wide as these" });
        }
        Ok(())
    }

    fn update_of<E: Trainable, O: DeviceRule>(
        &self,
        op: &'static str,
        table: &TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: &RowPlan<'_, Self>,
    ) -> Result<Update, CudaError> {
        check_state(op, rule, table.dim, table.state_len)?;
        let format = trained_format::<E>(op)?;
        let mut factors = rule.device_factors(step);
        #[allow(clippy::cast_possible_truncation, reason = "as core's own: rounded to the scalar")]
        {
            factors.grad_scale = step.grad_scale as f32;
        }
        if let Rounding::Stochastic { seed } = step.rounding {
            (factors.stochastic, factors.seed, factors.count) = (1, seed, mix(step.count));
        }
        let shared = if O::ROWWISE { table.dim * size_of::<f32>() } else { 0 };
        self.check_shared(op, shared)?;
        let state_aligned = O::ROWWISE || table.state_len == 0 || aligned(table.state.pointer(), table.dim);
        let codes_aligned =
            table.dim.is_multiple_of(4) && table.codes.pointer().is_multiple_of(4 * size_of::<E>() as u64);
        Ok(Update {
            op,
            rows: RowsArg {
                codes: table.codes.pointer(),
                state: table.state.pointer(),
                rows: table.rows() as u64,
                dim: size(op, "width of the rows", table.dim)?,
                state_len: size(op, "state of a row", table.state_len)?,
                names: table.names.map_or(0, View::pointer),
            },
            factors,
            plan: PlanArg::new(op, plan)?,
            variant: Variant::of(File::Optim).format(format).rule(O::NUMBER),
            wide: state_aligned && codes_aligned,
            shared,
        })
    }
}

impl Update {
    /// The parameters that every kernel begins with.
    fn args(&self) -> Args {
        Args::new().value(self.rows).value(self.factors).value(self.plan)
    }
    /// Pieces of a row.
    fn pieces(&self, wide: bool) -> usize {
        pieces(self.rows.dim as usize, wide)
    }
}

impl<E: Trainable, O: DeviceRule> RowUpdate<TrainRows<'_, E>, O> for Cuda {
    fn update_scratch(&self, _dim: usize) -> ScratchReq {
        ScratchReq::EMPTY
    }

    fn update(
        &self,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        grads: View<'_, f32>,
        _scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        const OP: &str = "update";
        let update = self.update_of(OP, &table, rule, step, &plan)?;
        let wide = update.wide && aligned(grads.pointer(), table.dim);
        let block = short_block(update.pieces(wide));
        let entries = plan.entries.len();
        if entries == 0 {
            return Ok(());
        }
        let mut args = update
            .args()
            .read(grads)
            .value((grads.len() / table.dim) as u64)
            .value(self.flag.view().pointer())
            .value(number_of(OP));
        let kernel = self.kernels.get(update.variant, if wide { "update_4" } else { "update_1" })?;
        let shape = Shape::new(self.row_blocks(entries, block), block).shared(update.shared);
        self.stream.launch(&kernel, shape, &mut args)
    }

    fn reduce_and_update_scratch(&self, dim: usize) -> ScratchReq {
        // Gradients of long rows, which many blocks sum before one changes the row.
        ScratchReq::new(SLOTS * dim, 0)
    }

    fn reduce_and_update(
        &self,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        self.reduce_and_update_as(table, rule, step, plan, gradient.into(), scratch)
    }

    fn dot_reduce_and_update_scratch(&self, dim: usize, _entries: usize) -> ScratchReq {
        RowUpdate::<TrainRows<'_, E>, O>::reduce_and_update_scratch(self, dim)
    }

    fn dot_reduce_and_update(
        &self,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: RowGradient<'_, Self>,
        dots: ViewMut<'_, f32>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        self.dot_reduce_and_update_as(table, rule, step, plan, gradient.into(), dots, scratch)
    }
}

impl Cuda {
    /// [`RowUpdate::reduce_and_update`] of sources in `S`, with its scratch.
    ///
    /// # Errors
    /// As there; rows and sources other than f32 and bf16 are not supported.
    pub fn reduce_and_update_as<E: Trainable, O: DeviceRule, S: Trainable>(
        &self,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: MixedGradient<'_, S>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        self.change_rows("reduce_and_update", table, rule, step, plan, gradient, None, scratch)
    }

    /// [`RowUpdate::dot_reduce_and_update`] of sources in `S`, with its scratch. Dots are with the sources as they are stored.
    ///
    /// # Errors
    /// As there; rows and sources other than f32 and bf16 are not supported.
    #[allow(clippy::too_many_arguments, reason = "what the operation takes")]
    pub fn dot_reduce_and_update_as<E: Trainable, O: DeviceRule, S: Trainable>(
        &self,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: MixedGradient<'_, S>,
        dots: ViewMut<'_, f32>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        const OP: &str = "dot_reduce_and_update";
        check_len(OP, "dots", plan.entries.len(), dots.len())?;
        self.change_rows(OP, table, rule, step, plan, gradient, Some(dots), scratch)
    }

    /// Sums the gradients of rows and applies them; where `dots` are wanted, each entry's is found before its row changes.
    #[allow(clippy::too_many_arguments, reason = "what the operations take, and where the dots go")]
    fn change_rows<E: Trainable, O: DeviceRule, S: Trainable>(
        &self,
        op: &'static str,
        table: TrainRows<'_, E>,
        rule: &O,
        step: &Step,
        plan: RowPlan<'_, Self>,
        gradient: MixedGradient<'_, S>,
        dots: Option<ViewMut<'_, f32>>,
        scratch: Scratch<'_, Self>,
    ) -> Result<(), CudaError> {
        let gradient = Gradient::new(op, &gradient, &plan)?;
        check_len(op, "width of the gradient", table.dim, gradient.dim())?;
        scratch.check(op, RowUpdate::<TrainRows<'_, E>, O>::reduce_and_update_scratch(self, table.dim))?;
        let mut update = self.update_of(op, &table, rule, step, &plan)?;
        update.variant = update.variant.source(gradient.format);
        let entries = plan.entries.len();
        if entries == 0 {
            return Ok(());
        }
        let lists = self.lists()?;
        let wide = update.wide && gradient.is_wide();
        let args = || update.args().value(gradient.arg).value(lists);
        let flagged = |args: Args| args.value(self.flag.view().pointer()).value(number_of(op));
        let block = short_block(update.pieces(wide));
        // A float a thread where warps share a row and add up their parts of a dot.
        let parts = if block > 32 { block as usize * size_of::<f32>() } else { 0 };
        let shape = Shape::new(self.row_blocks(entries, block), block);
        if let Some(dots) = &dots {
            let kernel = self.kernels.get(update.variant, if wide { "dot_short_4" } else { "dot_short_1" })?;
            self.check_shared(op, update.shared + parts)?;
            self.stream.launch(&kernel, shape.shared(update.shared + parts), &mut flagged(args().write(dots)))?;
            if entries > SHORT {
                let kernel = self.kernels.get(update.variant, if wide { "dot_rows_4" } else { "dot_rows_1" })?;
                let mut args =
                    Args::new().value(update.rows).value(update.plan).value(gradient.arg).value(lists).write(dots);
                args = args.value(self.flag.view().pointer());
                let blocks = self.row_blocks(entries.div_ceil(SHORT), DOT_BLOCK);
                self.stream.launch(&kernel, Shape::new(blocks, DOT_BLOCK), &mut args)?;
            }
        } else {
            let kernel = self.kernels.get(update.variant, if wide { "update_short_4" } else { "update_short_1" })?;
            self.stream.launch(&kernel, shape.shared(update.shared), &mut flagged(args()))?;
        }
        if entries > SHORT {
            let kernel = self.kernels.get(update.variant, if wide { "update_middle_4" } else { "update_middle_1" })?;
            let block = row_block(update.pieces(wide));
            let shape = Shape::new(self.row_blocks(entries.div_ceil(SHORT), block), block).shared(update.shared);
            self.stream.launch(&kernel, shape, &mut flagged(args()))?;
        }
        if entries > CHUNK {
            let (slots, _) = scratch.take_reals(SLOTS * table.dim);
            self.update_long_rows(&update, gradient, lists, &slots, entries / CHUNK)?;
        }
        Ok(())
    }

    /// Sums and applies the gradients of the longest rows. The plan stays on the device, so how many they are is not
    /// known here: there are launches for as many as there can be, SLOTS at a time.
    fn update_long_rows(
        &self,
        update: &Update,
        gradient: Gradient,
        lists: Lists,
        slots: &ViewMut<'_, f32>,
        most: usize,
    ) -> Result<(), CudaError> {
        let op = update.op;
        let wide = update.wide && aligned(slots.pointer(), update.rows.dim as usize);
        let kernel = self.kernels.get(update.variant, if wide { "update_long_4" } else { "update_long_1" })?;
        let to = Destination::new(slots.pointer(), SLOTS, false);
        for first in (0..most).step_by(SLOTS) {
            let count = SLOTS.min(most - first);
            self.reduce_long(
                op,
                update.plan,
                gradient,
                lists,
                to,
                LongRows { format: VARIANT.format, first, count, slots: true },
            )?;
            let mut args = update
                .args()
                .value(lists)
                .value(slots.pointer())
                .value(size(op, "entries", first)?)
                .value(self.flag.view().pointer());
            let shape = Shape::new(count, row_block(update.pieces(wide))).shared(update.shared);
            self.stream.launch(&kernel, shape, &mut args)?;
        }
        Ok(())
    }
}
