//! Weighted sums of rows and dots with rows.

use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::{ArgError, Element, Table};

use super::{aligned, number_of, size};
use crate::Cuda;
use crate::error::CudaError;
use crate::kernels::{File, Variant, format, packed_group};
use crate::launch::{Args, Shape};
use crate::memory::Rows;

const BLOCK: u32 = 128;

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

/// How a table is read: `lane` codes at once by each lane, `team` lanes for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    lane: usize,
    team: usize,
}

impl Reading {
    /// The widest loads that codes of `bytes` can be read with, of at most `most` codes, and that leave work for the least team:
    /// in rows of `dim` and groups of `group`, which begin at multiples of the powers of two that `pointer` is one of
    /// ([`Rows::beginnings`]).
    fn widest(pointer: u64, bytes: usize, dim: usize, group: usize, most: usize) -> Self {
        let mut lane = (16 / bytes).min(most);
        while lane > 1 && (!fits(lane, pointer, bytes, dim, group) || dim / lane < 8) {
            lane /= 2;
        }
        Self { lane, team: (dim / lane).next_power_of_two().clamp(8, 32) }
    }

    /// For dots: by 16 bytes. Codes of one byte leave a team little to load beside what its lanes then add up among
    /// themselves: two loads a lane of each row, and half of the lanes.
    fn for_dots(pointer: u64, bytes: usize, dim: usize, group: usize) -> Self {
        let Self { lane, team } = Self::widest(pointer, bytes, dim, group, 16);
        let loads = if bytes == 1 { 2 } else { 1 };
        Self { lane, team: team.min((dim / lane / loads).next_power_of_two().max(8)) }
    }

    /// For sums: by eight codes, or of narrow rows by four. Wider loads leave too few warps to hide how far the rows are.
    fn for_sums(pointer: u64, bytes: usize, dim: usize, group: usize) -> Self {
        let narrow = if bytes == 1 { dim < 128 } else { dim <= 128 };
        Self::widest(pointer, bytes, dim, group, if narrow { 4 } else { 8 })
    }

    /// The kernel that sums rows of codes of `bytes` so, which are `stride` codes apart. Those that know their team take rows of
    /// one scale at most, by loads of less than 16 bytes.
    fn sums(self, bytes: usize, stride: usize, one_scale: bool) -> &'static str {
        if one_scale && bytes <= 2 && u32::try_from(stride * bytes).is_ok() {
            match (self.lane, self.team) {
                (4, 8) => return "bag_sum_4_8",
                (4, 16) => return "bag_sum_4_16",
                (4, 32) => return "bag_sum_4_32",
                (8, 16) if bytes == 1 => return "bag_sum_8_16",
                (8, 32) if bytes == 1 => return "bag_sum_8_32",
                _ => {}
            }
        }
        named!("bag_sum", self.lane)
    }

    /// Of 4-bit integers in groups of `group`: four bytes, eight values, and a team for all of a row if it can be.
    fn packed(dim: usize, group: usize) -> Self {
        let lanes = dim.div_ceil(group) * group / 8;
        Self { lane: 8, team: lanes.next_power_of_two().clamp(8, 32) }
    }

    /// Loads of 4 bytes, for few tokens.
    fn narrow(pointer: u64, bytes: usize, dim: usize, group: usize) -> Option<Self> {
        let lane = 4 / bytes;
        fits(lane, pointer, bytes, dim, group).then_some(Self { lane, team: 32 })
    }
}

/// Whether `lane` codes at once divide rows and groups, and are aligned.
fn fits(lane: usize, pointer: u64, bytes: usize, dim: usize, group: usize) -> bool {
    dim.is_multiple_of(lane)
        && (group >= dim || group.is_multiple_of(lane))
        && pointer.is_multiple_of((lane * bytes) as u64)
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
        let (dim, bytes, pointer) = (table.dim, size_of::<E>(), table.beginnings());
        let (reading, name) = match packed_group(E::FORMAT) {
            Some(group) => (Reading::packed(dim, group), "bag_dot_packed"),
            None => {
                let reading = Reading::for_dots(pointer, bytes, dim, table.group);
                (reading, named!("bag_dot", reading.lane))
            }
        };
        let variant = Variant::of(File::Bag).format(format::<E>(OP)?);
        let kernel = self.kernels.get(variant, name)?;
        // A team takes eight rows of a bag.
        let lanes = tokens * args.bag.div_ceil(8) * reading.team;
        let mut launch = table_args(OP, table)?
            .read(args.ids)
            .read(args.vectors)
            .write(&args.out)
            .value(size(OP, "bag", args.bag)?)
            .value(size(OP, "tokens", tokens)?)
            .value(size(OP, "team", reading.team)?)
            .value(alignment::<E>(pointer, args.vectors.pointer(), dim))
            .value(self.flag.view().pointer())
            .value(number_of(OP));
        self.stream.launch(&kernel, Shape::new(lanes.div_ceil(BLOCK as usize), BLOCK), &mut launch)
    }
}

/// What a kernel is told of alignment: whether a team's floats can be read by fours, or of rows of 4-bit integers, whether
/// their groups begin at even addresses.
fn alignment<E: Element>(codes: u64, floats: u64, dim: usize) -> u32 {
    u32::from(if packed_group(E::FORMAT).is_some() { codes.is_multiple_of(2) } else { aligned(floats, dim) })
}

/// The parameters that describe a table.
fn table_args<E: Element>(op: &'static str, table: &Rows<'_, E>) -> Result<Args, CudaError> {
    Ok(Args::new()
        .read(table.codes)
        .read_or_null::<f32>(table.scales)
        .value(table.rows() as u64)
        .value(size(op, "width of the rows", table.dim)?)
        .value(size(op, "stride of the rows", table.stride)?)
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
        let pointer = table.beginnings();
        let mut reading = Reading::for_sums(pointer, bytes, dim, table.group);
        let mut name = reading.sums(bytes, table.stride, table.group >= dim);
        let mut columns = dim;
        if let Some(group) = packed_group(E::FORMAT) {
            (reading, name) = (Reading::packed(dim, group), "bag_sum_packed");
            columns = dim.next_multiple_of(group);
        } else if tokens * dim / reading.lane < self.properties.multiprocessors as usize * 64
            && let Some(narrow) = Reading::narrow(pointer, bytes, dim, table.group)
        {
            // So few tokens would leave most of the device idle: more and narrower teams read them.
            (reading, name) = (narrow, "bag_sum_few");
        }
        let variant = Variant::of(File::Bag).format(format::<E>(op)?);
        let kernel = self.kernels.get(variant, name)?;
        let slices = columns.div_ceil(reading.team * reading.lane);
        let lanes = tokens * slices * reading.team;
        let mut launch = table_args(op, table)?
            .read(args.ids)
            .read(args.weights)
            .write(&args.out)
            .value(size(op, "bag", args.bag)?)
            .value(size(op, "tokens", tokens)?)
            .value(u32::from(args.accumulate))
            .value(size(op, "team", reading.team)?)
            .value(alignment::<E>(pointer, args.out.pointer(), dim))
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
        let lane = |pointer, bytes, dim, group| Reading::for_dots(pointer, bytes, dim, group).lane;
        assert_eq!(lane(0, 2, 1024, 1024), 8);
        assert_eq!(lane(0, 2, 100, 100), 4);
        assert_eq!(lane(0, 1, 1000, 1000), 8);
        assert_eq!(lane(0, 1, 17, 17), 1);
        assert_eq!(lane(4, 4, 1024, 1024), 1);
        assert_eq!(lane(0, 1, 1024, 4), 4, "a group is not split by a load");
        assert_eq!(lane(0, 2, 24, 24), 2, "a team has eight lanes");
        assert_eq!(Reading::for_dots(0, 1, 64, 64), Reading { lane: 8, team: 8 });
        assert_eq!(Reading::for_dots(0, 1, 100, 100), Reading { lane: 4, team: 16 });
        assert_eq!(Reading::for_dots(0, 2, 100, 100), Reading { lane: 4, team: 32 });
        assert_eq!(Reading::for_dots(0, 1, 256, 256), Reading { lane: 16, team: 8 });
        assert_eq!(Reading::for_dots(0, 1, 1024, 1024), Reading { lane: 16, team: 32 });
        assert_eq!(Reading::for_sums(0, 1, 256, 256), Reading { lane: 8, team: 32 });
        assert_eq!(Reading::for_sums(0, 2, 256, 256), Reading { lane: 8, team: 32 });
        assert_eq!(Reading::for_sums(0, 1, 128, 128), Reading { lane: 8, team: 16 });
        assert_eq!(Reading::for_sums(0, 2, 128, 128), Reading { lane: 4, team: 32 });
        assert_eq!(Reading::for_sums(0, 2, 64, 64), Reading { lane: 4, team: 16 });
        assert_eq!(Reading::for_sums(0, 2, 100, 100), Reading { lane: 4, team: 32 });
        assert_eq!(Reading::for_sums(0, 4, 2, 2), Reading { lane: 1, team: 8 });
        assert_eq!(Reading::narrow(0, 1, 100, 100), Some(Reading { lane: 4, team: 32 }));
        assert_eq!(Reading::narrow(0, 2, 17, 17), None);
    }

    #[test]
    fn kernels_that_know_their_team_take_one_scale_and_short_loads() {
        let name = |bytes, dim, stride, one| Reading::for_sums(0, bytes, dim, dim).sums(bytes, stride, one);
        assert_eq!(name(1, 64, 64, true), "bag_sum_4_16");
        assert_eq!(name(1, 64, 64, false), "bag_sum_4");
        assert_eq!(name(1, 1024, 1024, true), "bag_sum_8_32");
        assert_eq!(name(2, 100, 100, true), "bag_sum_4_32");
        assert_eq!(name(2, 100, 1 << 31, true), "bag_sum_4");
        assert_eq!(name(2, 256, 256, true), "bag_sum_8");
        assert_eq!(name(4, 64, 64, true), "bag_sum_4");
    }
}
