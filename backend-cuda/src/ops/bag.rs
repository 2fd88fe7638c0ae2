//! Weighted sums of rows and dots with rows.

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{ArgError, Element, Table};

use super::{aligned, number_of, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant, format};
use crate::launch::{Args, Shape};
use crate::memory::Rows;

const BLOCK: u32 = 128;

/// How a table is read: `lane` codes at once by each lane, `team` lanes for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    lane: usize,
    team: usize,
}

impl Reading {
    /// The widest loads that codes of `bytes` at `pointer`, in rows of `dim` and groups of `group`, can be read with.
    fn widest(pointer: u64, bytes: usize, dim: usize, group: usize) -> Self {
        let fits = |lane: usize| {
            dim.is_multiple_of(lane)
                && (group >= dim || group.is_multiple_of(lane))
                && pointer.is_multiple_of((lane * bytes) as u64)
        };
        let mut lane = 16 / bytes;
        while !fits(lane) {
            lane /= 2;
        }
        Self::new(lane, dim)
    }

    fn new(lane: usize, dim: usize) -> Self {
        Self { lane, team: (dim / lane).next_power_of_two().min(32) }
    }

    /// Narrower loads, of 4 bytes at the least, where `tokens` bags would leave most of the device idle otherwise.
    fn spread(mut self, bytes: usize, dim: usize, tokens: usize, multiprocessors: u32) -> Self {
        while self.lane * bytes > 4 && tokens * dim / self.lane < multiprocessors as usize * 256 {
            self = Self::new(self.lane / 2, dim);
        }
        self
    }
}

macro_rules! named {
    ($prefix:literal, $lane:expr) => {
        match $lane {
            1 => concat!($prefix, "_1"),
            2 => concat!($prefix, "_2"),
            4 => concat!($prefix, "_4"),
            8 => concat!($prefix, "_8"),
            _ => concat!($prefix, "_16"),
        }
    };
}

/// Fails where a table has no rows to read: a kernel needs one to turn bad ids to.
pub(crate) fn check_rows(op: &'static str, rows: usize, ids: usize) -> Result<(), ArgError> {
    if rows == 0 && ids > 0 { Err(ArgError::RowOutOfRange { op, row: 0, rows }) } else { Ok(()) }
}

impl<E: Element> EmbeddingBag<Rows<'_, E>> for Cuda {
    fn bag_sum(&self, table: &Rows<'_, E>, args: BagSum<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "bag_sum";
        let tokens = args.check(table.dim())?;
        check_rows(OP, table.rows(), args.ids.len())?;
        self.sum_bags(OP, table, tokens, args)
    }

    fn bag_dot(&self, table: &Rows<'_, E>, args: BagDot<'_, Self>) -> Result<(), CudaError> {
        const OP: &str = "bag_dot";
        let tokens = args.check(table.dim())?;
        check_rows(OP, table.rows(), args.ids.len())?;
        if tokens == 0 {
            return Ok(());
        }
        let (dim, bytes) = (table.dim, size_of::<E>());
        let reading = Reading::widest(table.codes.pointer(), bytes, dim, table.group);
        let variant = Variant::of(File::Bag).format(format::<E>(OP)?);
        let kernel = self.kernels.get(variant, named!("bag_dot", reading.lane))?;
        // A team takes four rows of a bag.
        let lanes = tokens * args.bag.div_ceil(4) * reading.team;
        let mut launch = table_args(OP, table)?
            .read(args.ids)
            .read(args.vectors)
            .write(&args.out)
            .value(size(OP, "bag", args.bag)?)
            .value(size(OP, "tokens", tokens)?)
            .value(size(OP, "team", reading.team)?)
            .value(u32::from(aligned(args.vectors.pointer(), dim)))
            .value(self.flag.view().pointer())
            .value(number_of(OP));
        self.stream.launch(&kernel, Shape::new(lanes.div_ceil(BLOCK as usize), BLOCK), &mut launch)
    }
}

/// The parameters that describe a table.
fn table_args<E: Element>(op: &'static str, table: &Rows<'_, E>) -> Result<Args, CudaError> {
    Ok(Args::new()
        .read(table.codes)
        .read_or_null::<f32>(table.scales)
        .value(table.rows() as u64)
        .value(size(op, "width of the rows", table.dim)?)
        .value(size(op, "group", table.group.min(table.dim))?))
}

impl Cuda {
    /// `bag_sum` under the name of the operation that asks for it, its arguments checked.
    pub(crate) fn sum_bags<E: Element>(
        &self,
        op: &'static str,
        table: &Rows<'_, E>,
        tokens: usize,
        args: BagSum<'_, Self>,
    ) -> Result<(), CudaError> {
        if tokens == 0 {
            return Ok(());
        }
        let (dim, bytes) = (table.dim, size_of::<E>());
        let reading = Reading::widest(table.codes.pointer(), bytes, dim, table.group).spread(
            bytes,
            dim,
            tokens,
            self.properties.multiprocessors,
        );
        let variant = Variant::of(File::Bag).format(format::<E>(op)?);
        let kernel = self.kernels.get(variant, named!("bag_sum", reading.lane))?;
        let slices = dim.div_ceil(reading.team * reading.lane);
        let lanes = tokens * slices * reading.team;
        let mut launch = table_args(op, table)?
            .read(args.ids)
            .read(args.weights)
            .write(&args.out)
            .value(size(op, "bag", args.bag)?)
            .value(size(op, "tokens", tokens)?)
            .value(u32::from(args.accumulate))
            .value(size(op, "team", reading.team)?)
            .value(u32::from(aligned(args.out.pointer(), dim)))
            .value(self.flag.view().pointer())
            .value(number_of(op));
        self.stream.launch(&kernel, Shape::new(lanes.div_ceil(BLOCK as usize), BLOCK), &mut launch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_as_wide_as_rows_allow() {
        let lane = |pointer, bytes, dim, group| Reading::widest(pointer, bytes, dim, group).lane;
        assert_eq!(lane(0, 2, 1024, 1024), 8);
        assert_eq!(lane(0, 2, 100, 100), 4);
        assert_eq!(lane(0, 1, 1000, 1000), 8);
        assert_eq!(lane(0, 1, 17, 17), 1);
        assert_eq!(lane(4, 4, 1024, 1024), 1);
        assert_eq!(lane(0, 1, 1024, 4), 4, "a group is not split by a load");
        assert_eq!(Reading::widest(0, 2, 256, 256), Reading { lane: 8, team: 32 });
        assert_eq!(Reading::widest(0, 2, 100, 100), Reading { lane: 4, team: 32 });
        assert_eq!(Reading::widest(0, 2, 24, 24), Reading { lane: 8, team: 4 });
    }

    #[test]
    fn few_tokens_are_spread() {
        let spread = |tokens| Reading::widest(0, 2, 1024, 1024).spread(2, 1024, tokens, 132).lane;
        assert_eq!(spread(1), 2);
        assert_eq!(spread(4096), 8);
    }
}
