//! Embedding bags, row by row.

use crate::element::Real;
use crate::error::{ArgError, check_ids};
use crate::ops::bag::{BagDot, BagSum, EmbeddingBag};
use crate::reference::Reference;
use crate::storage::RowStore;

impl<F: Real, S: RowStore> EmbeddingBag<S> for Reference<F> {
    fn bag_sum(&self, table: &S, args: BagSum<'_, Self>) -> Result<(), ArgError> {
        let tokens = args.check(table.dim())?;
        check_ids("bag_sum", args.ids, table.rows())?;
        for t in 0..tokens {
            for v in 0..table.dim() {
                let mut sum = F::zero();
                for e in t * args.bag..(t + 1) * args.bag {
                    let row = table.row(args.ids[e]);
                    sum += args.weights[e] * row.scale(v) * row.code(v);
                }
                let out = &mut args.out[t * table.dim() + v];
                *out = if args.accumulate { *out + sum } else { sum };
            }
        }
        Ok(())
    }

    fn bag_dot(&self, table: &S, args: BagDot<'_, Self>) -> Result<(), ArgError> {
        args.check(table.dim())?;
        check_ids("bag_dot", args.ids, table.rows())?;
        for (e, out) in args.out.iter_mut().enumerate() {
            let row = table.row(args.ids[e]);
            let vector = &args.vectors[e / args.bag * table.dim()..][..table.dim()];
            *out = F::zero();
            for (v, &x) in vector.iter().enumerate() {
                *out += x * row.value(v);
            }
        }
        Ok(())
    }
}
