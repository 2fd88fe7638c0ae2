//! The operations: arguments checked, kernels launched.

pub(crate) mod adamw;
pub(crate) mod bag;
pub(crate) mod cache;
pub(crate) mod dense;
pub(crate) mod gradient;
pub(crate) mod optim;
pub(crate) mod plan;
pub(crate) mod select;
pub(crate) mod tiles;

use memlayer_core::ArgError;

use crate::error::CudaError;

/// The operations that a kernel can find an id in that is no row, by the numbers they raise the flag with.
const NAMES: [&str; 12] = [
    "",
    "bag_sum",
    "bag_dot",
    "plan",
    "reduce",
    "update",
    "reduce_and_update",
    "select_backward",
    "square_sum",
    "load",
    "translate",
    "dot_reduce_and_update",
];

/// The number of an operation.
pub(crate) fn number_of(op: &str) -> u32 {
    (1..).zip(&NAMES[1..]).find(|(_, name)| **name == op).map_or(0, |(number, _)| number)
}

/// The operation of a number.
pub(crate) fn name_of(number: u32) -> &'static str {
    NAMES.get(number as usize).copied().unwrap_or("an operation")
}

/// A size as kernels take it.
pub(crate) fn size(op: &'static str, operand: &'static str, value: usize) -> Result<u32, CudaError> {
    u32::try_from(value).map_err(|_| ArgError::Shape { op, operand, expected: u32::MAX as usize, found: value }.into())
}

/// Whether 16-byte accesses may be used at `pointer` for rows of `width` floats.
pub(crate) const fn aligned(pointer: u64, width: usize) -> bool {
    pointer.is_multiple_of(16) && width.is_multiple_of(4)
}

/// What `divide` in `common.cuh` takes for a divisor.
pub(crate) const fn magic(divisor: usize) -> u64 {
    // For 2^64 / d + 1 with d > 1; d divides 2^64 exactly only where d is a power of two, and that is right too.
    if divisor <= 1 { 0 } else { u64::MAX / divisor as u64 + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_numbers() {
        for (number, name) in (0..).zip(NAMES).skip(1) {
            assert_eq!((number_of(name), name_of(number)), (number, name));
        }
    }

    #[test]
    fn dividing_by_magic_is_exact() {
        for d in [2usize, 3, 5, 7, 64, 100, 127, 128, 1000, 65_535, 65_536, 1 << 31, u32::MAX as usize] {
            let wide = u128::from(magic(d));
            for n in [0u64, 1, 2, 99, 100, 127, 128, 12_345_678, (1 << 31) - 1, 1 << 31, u64::from(u32::MAX) - 1] {
                for n in [n, (n / d as u64 * d as u64).saturating_sub(1), n / d as u64 * d as u64] {
                    assert_eq!((wide * u128::from(n)) >> 64, u128::from(n / d as u64), "{n} / {d}");
                }
            }
        }
    }
}
