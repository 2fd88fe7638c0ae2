//! The same operations put together from candle's own, for tensors that are not on the CPU.

use candle_core::{D, Result, Tensor};

/// [`super::rms_norm`].
pub(super) fn rms_norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(super::NORM_EPS))?.sqrt()?;
    x.broadcast_div(&rms)?.broadcast_mul(gain)
}

/// [`super::swiglu`].
pub(super) fn swiglu(x: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)? / 2;
    x.narrow(D::Minus1, 0, width)?.contiguous()?.silu()? * x.narrow(D::Minus1, width, width)?.contiguous()?
}

/// [`super::take_rows`].
pub(super) fn take_rows(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    table.index_select(&Tensor::from_slice(ids, ids.len(), table.device())?, 0)
}

/// [`super::cross_entropy`].
pub(super) fn cross_entropy(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    candle_nn::loss::cross_entropy(logits, &Tensor::from_slice(targets, targets.len(), logits.device())?)
}

/// [`super::attention`]; `angles` are `(cos, sin)` by position and pair, `[S, width / 2]`.
pub(super) fn attention(qkv: &Tensor, heads: usize, angles: &[(f32, f32)]) -> Result<Tensor> {
    let (batch, tokens, three) = qkv.dims3()?;
    let (width, device) = (three / (3 * heads), qkv.device());
    let table = |pick: fn(&(f32, f32)) -> f32| {
        Tensor::from_vec(angles.iter().map(pick).collect::<Vec<_>>(), (tokens, width / 2), device)
    };
    let (cos, sin) = (table(|a| a.0)?, table(|a| a.1)?);
    // [3, B, heads, S, width]
    let parts = qkv.reshape((batch, tokens, 3, heads, width))?.permute((2, 0, 3, 1, 4))?;
    let part = |i: usize| parts.narrow(0, i, 1)?.squeeze(0)?.contiguous();
    let rotated = |x: Tensor| -> Result<Tensor> {
        let (a, b) = (x.narrow(3, 0, width / 2)?.contiguous()?, x.narrow(3, width / 2, width / 2)?.contiguous()?);
        let turned =
            [(a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?, (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?];
        Tensor::cat(&turned, 3)
    };
    let (q, k, v) = (rotated(part(0)?)?, rotated(part(1)?)?, part(2)?);
    let later = |at: usize| if at % tokens > at / tokens { f32::NEG_INFINITY } else { 0.0 };
    let mask = Tensor::from_vec((0..tokens * tokens).map(later).collect::<Vec<_>>(), (tokens, tokens), device)?;
    let scores = (q.matmul(&k.t()?.contiguous()?)? * (1.0 / (width as f64).sqrt()))?.broadcast_add(&mask)?;
    let attended = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?;
    attended.transpose(1, 2)?.contiguous()?.reshape((batch, tokens, heads * width))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::super::tests::numbers;

    /// Values and gradients of both forms are the same to rounding.
    fn agree(shapes: &[&[usize]], fused: impl Fn(&[Tensor]) -> Tensor, composed: impl Fn(&[Tensor]) -> Tensor) {
        let run = |f: &dyn Fn(&[Tensor]) -> Tensor| {
            let vars: Vec<Var> = (1..)
                .zip(shapes)
                .map(|(seed, shape)| {
                    let values = numbers(shape.iter().product(), seed);
                    Var::from_tensor(&Tensor::from_vec(values, *shape, &Device::Cpu).expect("a tensor")).expect("a var")
                })
                .collect();
            let out = f(&vars.iter().map(|v| v.as_tensor().clone()).collect::<Vec<_>>());
            let g = Tensor::from_vec(numbers(out.elem_count(), 99), out.shape(), &Device::Cpu).expect("a tensor");
            let grads = (&out * g).expect("a product").sum_all().expect("a sum").backward().expect("gradients");
            let mut all = vec![out];
            all.extend(vars.iter().map(|v| grads.get(v).expect("a gradient").clone()));
            all
        };
        for (i, (a, b)) in run(&fused).iter().zip(run(&composed)).enumerate() {
            assert_eq!(a.dims(), b.dims());
            let values = |t: &Tensor| t.flatten_all().expect("flat").to_vec1::<f32>().expect("values");
            for (a, b) in values(a).iter().zip(values(&b)) {
                assert!((a - b).abs() < 2e-5 * (1.0 + a.abs()), "{i}: {a} and {b}");
            }
        }
    }

    #[test]
    fn they_are_the_fused_ones() {
        agree(
            &[&[3, 2, 6], &[6]],
            |t| super::super::rms_norm(&t[0], &t[1]).expect("fused"),
            |t| super::rms_norm(&t[0], &t[1]).expect("composed"),
        );
        agree(
            &[&[4, 10]],
            |t| super::super::swiglu(&t[0]).expect("fused"),
            |t| super::swiglu(&t[0]).expect("composed"),
        );
        let ids = [2u32, 0, 2, 3];
        agree(
            &[&[5, 3]],
            |t| super::super::take_rows(&t[0], ids.into()).expect("fused"),
            |t| super::take_rows(&t[0], &ids).expect("composed"),
        );
        let targets = [1u32, 4, 0];
        agree(
            &[&[3, 20]],
            |t| super::super::cross_entropy(&t[0], targets.into()).expect("fused"),
            |t| super::cross_entropy(&t[0], &targets).expect("composed"),
        );
        let angles = super::super::attention::angles(5, 4);
        agree(
            &[&[2, 5, 24]],
            |t| super::super::attention(&t[0], 2).expect("fused"),
            |t| super::attention(&t[0], 2, &angles).expect("composed"),
        );
    }
}
