//! The commands, a file each.

pub(crate) mod ask;
pub(crate) mod check;
pub(crate) mod eval;
pub(crate) mod inspect;
pub(crate) mod quantize;
pub(crate) mod tour;
pub(crate) mod train;
