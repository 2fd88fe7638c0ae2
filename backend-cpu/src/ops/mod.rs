//! The operations, each in the file that has its name in `core`.

mod bag;
mod choose;
mod coarse;
mod dense;
mod optim;
mod pairs;
mod plan;
mod select;
mod select_backward;
mod topk;
mod turned;

/// Rows of a call that one piece of work takes, so that there are enough pieces and each is worth its start.
pub(crate) fn piece(rows: usize, cost_of_row: usize) -> usize {
    // Some 20 microseconds a piece.
    (20_000 / cost_of_row.max(1)).clamp(1, rows.max(1))
}
