//! The dense rest: products for few tokens, AdamW, sums of squares. Skipped, and said so, where there is no device.

use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::Linear;
use memlayer_core::{ArgError, Device};
use memlayer_cuda::{AdamW, Buffer, CudaError, SQUARE_PARTS};
use memlayer_tests::conformance::skipped;
use memlayer_tests::device::TestDevice;
use memlayer_tests::random::Random;

mod common;
use common::cuda;

#[test]
fn products_for_few_tokens_are_exact_where_they_can_be() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let mut random = Random::new(50);
    for (inputs, outputs, skip) in [(1024, 64, 0), (1300, 5, 0), (1024, 9, 1), (7, 3, 0), (36, 130, 0)] {
        for tokens in 1..=9 {
            let (x, weight) =
                (random.integers::<f32>(tokens * inputs, 9), random.integers::<f32>(outputs * inputs + skip, 9));
            let bias = random.integers::<f32>(outputs, 9);
            let (there, rows) = (cuda.upload(&x).expect("inputs"), cuda.upload(&weight).expect("weights"));
            let shift = cuda.upload(&bias).expect("a bias");
            let mut out = cuda.zeros::<f32>(tokens * outputs).expect("outputs");
            for bias in [None, Some(&bias)] {
                cuda.linear(Linear {
                    tokens,
                    x: there.view(),
                    weight: rows.view().slice(skip..weight.len()),
                    bias: bias.map(|_| shift.view()),
                    out: out.view_mut(),
                })
                .expect("a product");
                let expected: Vec<f32> = (0..tokens * outputs)
                    .map(|i| {
                        let (t, o) = (i / outputs, i % outputs);
                        let row = &weight[skip + o * inputs..][..inputs];
                        let sum: f32 = row.iter().zip(&x[t * inputs..][..inputs]).map(|(a, b)| a * b).sum();
                        sum + bias.map_or(0.0, |bias| bias[o])
                    })
                    .collect();
                assert_eq!(TestDevice::download(&cuda, &out), expected, "{tokens} tokens, {inputs} to {outputs}");
            }
        }
    }
    cuda.synchronize().expect("all of it");
}

/// The loop that [`AdamW`] describes, in one pass on the device: the same bits.
#[test]
fn a_step_of_adamw_has_the_bits_of_the_loop() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let s = AdamW { rate: 3e-3, eps: 1e-7, beta1: 0.9, beta2: 0.98, scale: 0.7, keep: 0.999 };
    for len in [1, 31, 100_003] {
        let mut random = Random::new(len as u64);
        let mut x: Vec<f32> = random.reals(len);
        let (mut first, mut second) = (vec![0f32; len], vec![0f32; len]);
        let upload = |values: &[f32]| cuda.upload(values).expect("a buffer");
        let (mut x_there, mut first_there, mut second_there) = (upload(&x), upload(&first), upload(&second));
        for _ in 0..3 {
            let grad: Vec<f32> = random.reals(len);
            let grad_there = upload(&grad);
            let (m, v) = (first_there.view_mut(), second_there.view_mut());
            cuda.adamw(s, grad_there.view(), x_there.view_mut(), m, v).expect("a step");
            for (((x, &g), m), v) in x.iter_mut().zip(&grad).zip(&mut first).zip(&mut second) {
                let g = g * s.scale;
                *m = s.beta1 * *m + (1.0 - s.beta1) * g;
                *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
                *x = s.keep * *x - s.rate * *m / (v.sqrt() + s.eps);
            }
        }
        for (found, expected) in [(&x_there, &x), (&first_there, &first), (&second_there, &second)] {
            assert!(TestDevice::download(&cuda, found) == *expected, "{len} values");
        }
    }
    let (mut three, mut two) = (cuda.zeros::<f32>(3).expect("a buffer"), cuda.zeros::<f32>(2).expect("a buffer"));
    let grad = cuda.zeros::<f32>(3).expect("a buffer");
    let mut other = cuda.zeros::<f32>(3).expect("a buffer");
    let refused = cuda.adamw(s, grad.view(), three.view_mut(), two.view_mut(), other.view_mut());
    assert_eq!(refused, Err(CudaError::Arg(ArgError::Shape { op: "adamw", operand: "first", expected: 3, found: 2 })));
}

/// Within `c · eps` of the exact sum, and the same from run to run.
#[test]
fn squares_of_several_buffers_are_summed_in_their_bound() {
    let Some(cuda) = cuda() else { return skipped("cuda") };
    let values: Vec<Vec<f32>> = [1, 0, 1000, 300_001].map(|len| Random::new(7 + len as u64).reals(len)).into();
    let buffers: Vec<_> = values.iter().map(|v| cuda.upload(v).expect("a buffer")).collect();
    let views: Vec<_> = buffers.iter().map(Buffer::view).collect();
    let mut parts = cuda.zeros::<f32>(views.len() * SQUARE_PARTS).expect("a buffer");
    let mut sum = || {
        let mut out = cuda.upload(&[f32::NAN]).expect("a buffer");
        cuda.sum_squares(&views, parts.view_mut(), out.view_mut()).expect("a launch");
        TestDevice::download(&cuda, &out)[0]
    };
    let exact: f64 = values.iter().flatten().map(|&x| f64::from(x) * f64::from(x)).sum();
    let found = sum();
    // No value passes through more than a hundred sums.
    assert!((f64::from(found) - exact).abs() <= 100.0 * f64::from(f32::EPSILON) * exact, "{found} for {exact}");
    assert_eq!(found.to_bits(), sum().to_bits());
}
