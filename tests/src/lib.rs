//! What it means to be a memlayer backend: one suite, instantiated for each backend and instruction set, and the golden
//! files that tie them all to the published layer.
//!
//! A new backend implements [`device::TestDevice`] and adds one line to `tests/conformance.rs`. [`golden`] is also
//! what the program's `check` command runs.

pub mod conformance;
pub mod device;
pub mod golden;
pub mod layer;
pub mod random;
