//! Causal self-attention with rotary positions (Su et al. 2021).

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{add_scaled, slice, softmax_scores, with_values};

/// Attention of `heads` heads over `qkv` (`[B, S, 3·D]`: queries, keys, values), each token to itself and those
/// before it; `[B, S, D]`. Padding behind a sequence is seen by no token of it.
///
/// # Errors
/// candle's, if the widths do not fit.
pub fn attention(qkv: &Tensor, heads: usize) -> Result<Tensor> {
    if !qkv.device().is_cpu() {
        let dims = Dims::new(qkv.shape(), heads)?;
        return super::composed::attention(qkv, heads, &dims.angles);
    }
    qkv.contiguous()?.apply_op1(Attention { heads })
}

#[inline(always)]
fn turn(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
    (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
}

struct Attention {
    heads: usize,
}

/// The sizes of a call, and the angles of its positions.
struct Dims {
    tokens: usize,
    heads: usize,
    width: usize,
    /// `[S, width / 2]` of `(cos, sin)`.
    angles: Vec<(f32, f32)>,
}

/// `(cos, sin)` of the angles of positions and pairs, `[tokens, width / 2]`.
pub(super) fn angles(tokens: usize, width: usize) -> Vec<(f32, f32)> {
    let half = width / 2;
    let angle = |at: usize| (at / half) as f32 * 10_000f32.powf(-((at % half) as f32) / half as f32);
    (0..tokens * half).map(|at| angle(at).sin_cos()).map(|(sin, cos)| (cos, sin)).collect()
}

impl Dims {
    fn new(shape: &Shape, heads: usize) -> Result<Self> {
        let (_, tokens, three) = shape.dims3()?;
        if heads == 0 || !three.is_multiple_of(6 * heads) {
            candle_core::bail!("attention: {three} is not three times an even multiple of {heads} heads");
        }
        let width = three / (3 * heads);
        Ok(Self { tokens, heads, width, angles: angles(tokens, width) })
    }

    fn dim(&self) -> usize {
        self.heads * self.width
    }

    /// Copies one head of `which` (0 queries, 1 keys, 2 values) of a sequence into `[S, width]`, rotated if asked.
    fn gather(&self, qkv: &[f32], which: usize, head: usize, rotated: bool, out: &mut [f32]) {
        for (t, out) in out.chunks_exact_mut(self.width).enumerate() {
            let start = t * 3 * self.dim() + which * self.dim() + head * self.width;
            out.copy_from_slice(&qkv[start..start + self.width]);
            if rotated {
                self.turn(out, t, 1.0);
            }
        }
    }

    fn turn(&self, x: &mut [f32], t: usize, direction: f32) {
        let half = self.width / 2;
        let (a, b) = x.split_at_mut(half);
        for ((a, b), &(cos, sin)) in a.iter_mut().zip(b).zip(&self.angles[t * half..]) {
            turn(a, b, cos, direction * sin);
        }
    }
}

/// One head of one sequence, gathered.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Probabilities of the token at hand.
    p: Vec<f32>,
    dp: Vec<f32>,
}

impl Head {
    fn new(dims: &Dims) -> Self {
        let len = dims.tokens * dims.width;
        let (p, dp) = (vec![0.0; dims.tokens], vec![0.0; dims.tokens]);
        Self { q: vec![0.0; len], k: vec![0.0; len], v: vec![0.0; len], p, dp }
    }

    fn load(&mut self, dims: &Dims, qkv: &[f32], head: usize) {
        dims.gather(qkv, 0, head, true, &mut self.q);
        dims.gather(qkv, 1, head, true, &mut self.k);
        dims.gather(qkv, 2, head, false, &mut self.v);
    }

    /// The probabilities of token `t`, in `p[..=t]`.
    fn attend(&mut self, dims: &Dims, t: usize) {
        let w = dims.width;
        softmax_scores(&self.q[t * w..(t + 1) * w], &self.k, &mut self.p[..=t]);
    }
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let dims = Dims::new(layout.shape(), self.heads)?;
        let qkv = slice(qkv, layout)?;
        let (d, w) = (dims.dim(), dims.width);
        let mut out = vec![0.0; qkv.len() / 3];
        if !out.is_empty() {
            let sequences = qkv.par_chunks(dims.tokens * 3 * d).zip(out.par_chunks_mut(dims.tokens * d));
            sequences.with_min_len(8).for_each_init(
                || Head::new(&dims),
                |head, (qkv, out)| {
                    for h in 0..dims.heads {
                        head.load(&dims, qkv, h);
                        for t in 0..dims.tokens {
                            head.attend(&dims, t);
                            let out = &mut out[t * d + h * w..][..w];
                            for (p, v) in head.p[..=t].iter().zip(head.v.chunks_exact(w)) {
                                add_scaled(out, *p, v);
                            }
                        }
                    }
                },
            );
        }
        let (batch, tokens, _) = layout.shape().dims3()?;
        Ok((CpuStorage::F32(out), Shape::from((batch, tokens, d))))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let dims = Dims::new(qkv.shape(), self.heads)?;
        let dqkv = with_values(qkv, |qkv| with_values(dout, |dout| Ok(backward(&dims, qkv, dout))))?;
        Ok(Some(Tensor::from_vec(dqkv, qkv.shape(), qkv.device())?))
    }
}

fn backward(dims: &Dims, qkv: &[f32], dout: &[f32]) -> Vec<f32> {
    let d = dims.dim();
    let mut dqkv = vec![0.0; qkv.len()];
    if dqkv.is_empty() {
        return dqkv;
    }
    let sequences = qkv.par_chunks(dims.tokens * 3 * d).zip(dout.par_chunks(dims.tokens * d));
    sequences.zip(dqkv.par_chunks_mut(dims.tokens * 3 * d)).with_min_len(8).for_each_init(
        || (Head::new(dims), Head::new(dims)),
        |(head, grad), ((qkv, dout), dqkv)| {
            for h in 0..dims.heads {
                head.load(dims, qkv, h);
                head_backward(dims, head, grad, &dout[h * dims.width..]);
                scatter(dims, grad, h, dqkv);
            }
        },
    );
    dqkv
}

/// The gradients of one head's rotated queries and keys and of its values; `dout` begins at the head's columns.
fn head_backward(dims: &Dims, head: &mut Head, grad: &mut Head, dout: &[f32]) {
    let (d, w) = (dims.dim(), dims.width);
    let scale = 1.0 / (w as f32).sqrt();
    for values in [&mut grad.q, &mut grad.k, &mut grad.v] {
        values.fill(0.0);
    }
    for t in 0..dims.tokens {
        head.attend(dims, t);
        let dout = &dout[t * d..][..w];
        let mut mean = 0.0;
        for s in 0..=t {
            let (p, v) = (head.p[s], &head.v[s * w..][..w]);
            head.dp[s] = dout.iter().zip(v).map(|(d, v)| d * v).sum();
            mean += p * head.dp[s];
            add_scaled(&mut grad.v[s * w..][..w], p, dout);
        }
        for s in 0..=t {
            let dscore = head.p[s] * (head.dp[s] - mean) * scale;
            add_scaled(&mut grad.q[t * w..][..w], dscore, &head.k[s * w..][..w]);
            add_scaled(&mut grad.k[s * w..][..w], dscore, &head.q[t * w..][..w]);
        }
    }
}

/// Puts a head's gradients in their place, rotated back.
fn scatter(dims: &Dims, grad: &mut Head, h: usize, dqkv: &mut [f32]) {
    let (d, w) = (dims.dim(), dims.width);
    for (which, values) in [&mut grad.q, &mut grad.k, &mut grad.v].into_iter().enumerate() {
        for (t, x) in values.chunks_exact_mut(w).enumerate() {
            if which < 2 {
                dims.turn(x, t, -1.0);
            }
            dqkv[t * 3 * d + which * d + h * w..][..w].copy_from_slice(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check_gradients, numbers};
    use super::*;

    #[test]
    fn gradients_are_slopes() {
        check_gradients(&[(&[2, 5, 24][..], numbers(240, 6))], |t| attention(&t[0], 2).expect("attention"));
    }

    #[test]
    fn later_tokens_are_not_seen() {
        let mut qkv = numbers(9 * 24, 7);
        let run = |qkv: &[f32]| {
            let tensor = Tensor::from_slice(qkv, (1, 9, 24), &candle_core::Device::Cpu).expect("a tensor");
            attention(&tensor, 2).expect("attention").flatten_all().expect("flat").to_vec1::<f32>().expect("values")
        };
        let before = run(&qkv);
        qkv[5 * 24..].fill(3.0);
        assert_eq!(before[..5 * 8], run(&qkv)[..5 * 8]);
    }

    #[test]
    fn only_distances_matter() {
        // Equal tokens everywhere: scores depend on distance alone, and every output is the common value.
        let one = numbers(24, 8);
        let qkv: Vec<f32> = (0..6).flat_map(|_| one.clone()).collect();
        let tensor = Tensor::from_vec(qkv, (1, 6, 24), &candle_core::Device::Cpu).expect("a tensor");
        let out = attention(&tensor, 2).expect("attention").flatten_all().expect("flat").to_vec1::<f32>();
        for row in out.expect("values").chunks_exact(8) {
            assert!(row.iter().zip(&one[16..]).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }
}
