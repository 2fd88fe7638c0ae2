//! Projections, norms and gates against exact sums and the reference, for every instruction set.
#![allow(clippy::unwrap_used, reason = "tests")]

use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::*;
use memlayer_core::*;
use memlayer_cpu::{Cpu, Isa};

mod common;
use common::{Random, WIDTHS, backends, bits, close, wide};

#[test]
fn linear_maps() {
    let (cpus, oracle, random) = (backends(), Reference::<f64>::new(), &mut Random(8));
    let sizes = [
        (0, 3, 3),
        (1, 1, 1),
        (1, 70, 300),
        (3, 8, 130),
        (5, 1, 9),
        (4, 9, 1),
        (40, 64, 1),
        (40, 33, 2),
        (7, 17, 5),
        (20, 20, 20),
        (33, 300, 70),
        (64, 64, 64),
        (300, 16, 33),
        (70, 513, 8),
        (17, 31, 63),
        (17, 32, 65),
        (12, 300, 5),
        (13, 64, 512),
        (16, 513, 130),
        (28, 30, 700),
        (32, 257, 65),
    ];
    for (tokens, inputs, outputs) in sizes {
        let (x, weight) = (random.reals(tokens * inputs), random.reals(outputs * inputs));
        let (bias, dout) = (random.reals(outputs), random.reals(tokens * outputs));
        let (xw, ww, bw, dw) = (wide(&x), wide(&weight), wide(&bias), wide(&dout));
        for (with_bias, accumulate) in [(false, false), (true, true)] {
            let mut out = vec![0.0; tokens * outputs];
            let args = Linear::<Reference<f64>> {
                tokens,
                x: &xw,
                weight: &ww,
                bias: with_bias.then_some(&bw[..]),
                out: &mut out,
            };
            oracle.linear(args).unwrap();
            let start = random.reals(x.len());
            let (mut dx, mut dweight, mut dbias) = (wide(&start), vec![0.0; weight.len()], vec![0.0; outputs]);
            let args = LinearBackward::<Reference<f64>> {
                tokens,
                x: &xw,
                weight: &ww,
                dout: &dw,
                dx: Some(&mut dx),
                accumulate,
                dweight: Some(&mut dweight),
                dbias: Some(&mut dbias),
            };
            oracle.linear_backward(args).unwrap();
            let mut of_isa: Option<(Isa, Vec<f32>)> = None;
            for cpu in &cpus {
                let mut got = vec![f32::NAN; out.len()];
                let bias = with_bias.then_some(&bias[..]);
                cpu.linear(Linear { tokens, x: &x, weight: &weight, bias, out: &mut got }).unwrap();
                close(cpu.name(), &got, &out, inputs + 1, inputs as f64 + 1.0);
                let (mut gx, mut gw, mut gb) = (start.clone(), vec![f32::NAN; weight.len()], vec![f32::NAN; outputs]);
                let args = LinearBackward::<Cpu> {
                    tokens,
                    x: &x,
                    weight: &weight,
                    dout: &dout,
                    dx: Some(&mut gx),
                    accumulate,
                    dweight: Some(&mut gw),
                    dbias: Some(&mut gb),
                };
                cpu.linear_backward(args).unwrap();
                close(cpu.name(), &gx, &dx, outputs + 1, outputs as f64 + 1.0);
                close(cpu.name(), &gw, &dweight, tokens, tokens as f64);
                close(cpu.name(), &gb, &dbias, tokens, tokens as f64);
                got.extend(gx.iter().chain(&gw).chain(&gb));
                match &of_isa {
                    Some((isa, first)) if *isa == cpu.isa() => assert_eq!(bits(first), bits(&got), "{}", cpu.name()),
                    _ => of_isa = Some((cpu.isa(), got)),
                }
            }
        }
    }
}

#[test]
fn norms() {
    let (cpus, oracle, random) = (backends(), Reference::<f64>::new(), &mut Random(9));
    for dim in WIDTHS {
        for (rows, groups, repeat) in [(0, 1, 1), (1, 1, 1), (12, 3, 1), (700, 4, 1), (60, 4, 15), (7, 2, 2)] {
            let dims = NormDims { rows, dim, groups, repeat };
            let (x, gain, dout) = (random.reals(rows * dim), random.reals(groups * dim), random.reals(rows * dim));
            let (xw, gw) = (wide(&x), wide(&gain));
            let (mut out, mut dx, mut dgain) = (vec![0.0; rows * dim], wide(&dout), vec![0.0; groups * dim]);
            oracle.rms_norm(RmsNorm { dims, x: &xw, gain: &gw, out: &mut out }).unwrap();
            let args =
                RmsNormBackward::<Reference<f64>> { dims, x: &xw, gain: &gw, dx: &mut dx, dgain: Some(&mut dgain) };
            oracle.rms_norm_backward(args).unwrap();
            for cpu in &cpus {
                let (mut go, mut gx, mut gg) = (vec![f32::NAN; out.len()], dout.clone(), vec![f32::NAN; dgain.len()]);
                cpu.rms_norm(RmsNorm { dims, x: &x, gain: &gain, out: &mut go }).unwrap();
                let args = RmsNormBackward::<Cpu> { dims, x: &x, gain: &gain, dx: &mut gx, dgain: Some(&mut gg) };
                cpu.rms_norm_backward(args).unwrap();
                close(cpu.name(), &go, &out, dim, 2.0);
                for ((&got, &exact), &x) in gx.iter().zip(&dx).zip(&x) {
                    // A row of one small value has a steep norm.
                    let bound = (dim as f64 + 20.0) * 1e-7 * (2.0 + 4.0 / (x.abs() as f64 + 1e-3));
                    assert!((f64::from(got) - exact).abs() <= bound, "{} {dim}: {got} {exact}", cpu.name());
                }
                close(cpu.name(), &gg, &dgain, rows + dim, 2.0 * rows as f64);
            }
        }
    }
}

#[test]
fn gates() {
    let (cpus, oracle, random) = (backends(), Reference::<f64>::new(), &mut Random(10));
    for (tokens, width) in [(0, 1), (1, 1), (3, 7), (19, 16), (100, 130), (9000, 1)] {
        let n = tokens * width;
        let (y, dout) = (random.reals(n), random.reals(n));
        let shared: Vec<f32> = (0..tokens).map(|_| random.real() * 20.0).collect();
        let own: Vec<f32> = (0..n).map(|_| random.real() * 20.0).collect();
        macro_rules! gate {
            ($forward:ident, $backward:ident, $gate:expr) => {{
                let gate: &[f32] = $gate;
                let (yw, gw, dw) = (wide(&y), wide(gate), wide(&dout));
                let (mut out, mut dy, mut dgate) = (vec![0.0; n], vec![0.0; n], vec![0.0; gate.len()]);
                oracle.$forward(Gate { y: &yw, gate: &gw, out: &mut out }).unwrap();
                let args =
                    GateBackward::<Reference<f64>> { y: &yw, gate: &gw, dout: &dw, dy: &mut dy, dgate: &mut dgate };
                oracle.$backward(args).unwrap();
                for cpu in &cpus {
                    let (mut go, mut gy, mut gg) = (vec![f32::NAN; n], vec![f32::NAN; n], vec![f32::NAN; gate.len()]);
                    cpu.$forward(Gate { y: &y, gate, out: &mut go }).unwrap();
                    let args = GateBackward::<Cpu> { y: &y, gate, dout: &dout, dy: &mut gy, dgate: &mut gg };
                    cpu.$backward(args).unwrap();
                    close(cpu.name(), &go, &out, 8, 20.0);
                    close(cpu.name(), &gy, &dy, 8, 20.0);
                    close(cpu.name(), &gg, &dgate, 8 + width, 20.0 + width as f64);
                }
            }};
        }
        gate!(silu_gate, silu_gate_backward, &own);
        gate!(gelu_gate, gelu_gate_backward, &own);
        gate!(sigmoid_gate, sigmoid_gate_backward, &shared);
    }
}
