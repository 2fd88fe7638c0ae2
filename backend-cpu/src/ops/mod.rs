//! The operations, each in the file that has its name in `core`.

pub(crate) mod bag;
mod choose;
mod coarse;
mod dense;
mod optim;
mod pairs;
mod panels;
mod plan;
mod select;
mod select_backward;
mod topk;
mod turned;

pub use panels::PanelKeys;

use crate::Cpu;

impl Cpu {
    /// Rows of a call that one piece of work takes: some 20 microseconds, or less, so that every thread has two pieces. No
    /// result depends on it.
    pub(crate) fn piece(&self, rows: usize, cost_of_row: usize) -> usize {
        let share = rows.div_ceil(2 * self.threads());
        (20_000 / cost_of_row.max(1)).clamp(1, share.max(1))
    }
}
