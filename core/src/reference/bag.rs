//! Embedding bags, row by row.

use crate::element::Real;
use crate::error::{ArgError, check_ids};
use crate::ops::bag::{BagDot, BagSum, EmbeddingBag};
use crate::reference::{Reference, rows, rows_mut};
use crate::storage::RowStore;

impl<F: Real, S: RowStore> EmbeddingBag<S> for Reference<F> {
    fn bag_sum(&self, table: &S, args: BagSum<'_, Self>) -> Result<(), ArgError> {
        args.check(table.dim())?;
        check_ids("bag_sum", args.ids, table.rows())?;
        let bags = rows(args.ids, args.bag).zip(rows(args.weights, args.bag));
        for ((ids, weights), out) in bags.zip(rows_mut(args.out, table.dim())) {
            for (v, out) in out.iter_mut().enumerate() {
                let mut sum = F::zero();
                for (&id, &weight) in ids.iter().zip(weights) {
                    if let Some(row) = table.get(id) {
                        sum += weight * row.scale(v) * row.code(v);
                    }
                }
                *out = if args.accumulate { *out + sum } else { sum };
            }
        }
        Ok(())
    }

    fn bag_dot(&self, table: &S, args: BagDot<'_, Self>) -> Result<(), ArgError> {
        args.check(table.dim())?;
        check_ids("bag_dot", args.ids, table.rows())?;
        let bags = rows(args.ids, args.bag).zip(rows_mut(args.out, args.bag));
        for (vector, (ids, out)) in rows(args.vectors, table.dim()).zip(bags) {
            for (&id, out) in ids.iter().zip(out) {
                *out = F::zero();
                if let Some(row) = table.get(id) {
                    for (v, &x) in vector.iter().enumerate() {
                        *out += x * row.value(v);
                    }
                }
            }
        }
        Ok(())
    }
}
