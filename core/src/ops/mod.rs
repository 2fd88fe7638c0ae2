//! The operations a backend implements, and the laws that make every backend give the same numbers.
//!
//! # Laws
//!
//! * **Selection** ([`select`]): descending by score; a NaN counts as greatest; equal scores: the lower index first;
//!   equal pair scores: the pair that comes first when both halves are ranked, the first half leading.
//! * **Vertical sums** ([`bag`]'s `bag_sum`, [`plan`]'s `reduce`) multiply, then add, unfused, in the order of the
//!   entries, from zero; a row with more than [`plan::CHUNK`] entries sums each chunk of that many from zero and
//!   adds the chunks in order. Every backend and every number of threads gives the same bits.
//! * **Horizontal sums** (scores, dots, dense products) differ from the exact value by at most
//!   `c · eps · sum |terms|` with `c` their number; exact inputs give exact sums.
//! * **Untouched rows never change**: no decay reaches them, and the moments of their row rule stay as they are.
//! * **Features only add**: none changes a number or picks a backend.
//!
//! Arguments are structs with public fields. An operation checks them all before it writes anything.

pub mod bag;
pub mod dense;
pub mod optim;
pub mod plan;
pub mod select;

pub use bag::EmbeddingBag;
pub use dense::Dense;
pub use optim::{RowRule, RowUpdate};
pub use plan::RowReduce;
pub use select::SelectRows;
