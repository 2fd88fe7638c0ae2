//! Rows of a matrix by their numbers: embeddings, and the positions that carry a loss.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{slice, with_values};

/// Rows `ids` of `table` (`[R, D]`), as `[ids, D]`. Rows may come more than once: their gradients add.
///
/// # Errors
/// candle's, if an id is no row.
pub fn take_rows(table: &Tensor, ids: Arc<[u32]>) -> Result<Tensor> {
    if !table.device().is_cpu() {
        return super::composed::take_rows(table, &ids);
    }
    table.contiguous()?.apply_op1(TakeRows { ids })
}

struct TakeRows {
    ids: Arc<[u32]>,
}

impl CustomOp1 for TakeRows {
    fn name(&self) -> &'static str {
        "take-rows"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, dim) = layout.shape().dims2()?;
        let table = slice(table, layout)?;
        let mut out = Vec::with_capacity(self.ids.len() * dim);
        for &id in self.ids.iter() {
            let start = id as usize * dim;
            match table.get(start..start + dim) {
                Some(row) => out.extend_from_slice(row),
                None => candle_core::bail!("take-rows: row {id} of {rows}"),
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((self.ids.len(), dim))))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let (rows, dim) = table.dims2()?;
        let dtable = with_values(dout, |dout| {
            let mut dtable = vec![0.0; rows * dim];
            for (&id, dout) in self.ids.iter().zip(dout.chunks_exact(dim)) {
                let row = &mut dtable[id as usize * dim..][..dim];
                row.iter_mut().zip(dout).for_each(|(row, dout)| *row += dout);
            }
            Ok(dtable)
        })?;
        Ok(Some(Tensor::from_vec(dtable, (rows, dim), table.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_gradients, numbers};
    use super::take_rows;

    #[test]
    fn gradients_are_slopes() {
        let ids = [2u32, 0, 2, 3];
        check_gradients(&[(&[5, 3][..], numbers(15, 4))], |t| take_rows(&t[0], ids.into()).expect("rows"));
    }

    #[test]
    fn a_row_out_of_range_is_an_error() {
        let table = candle_core::Tensor::zeros((5, 3), candle_core::DType::F32, &candle_core::Device::Cpu);
        let error = take_rows(&table.expect("a tensor"), [5u32].into()).expect_err("row 5 of 5");
        assert!(error.to_string().contains("row 5 of 5"), "{error}");
    }
}
