//! Projections, norms and gates as loops.

use crate::element::Real;
use crate::error::ArgError;
use crate::ops::dense::{Dense, Gate, GateBackward, Linear, LinearBackward, NORM_EPS, RmsNorm, RmsNormBackward};
use crate::reference::{Reference, rows, rows_mut};

impl<F: Real> Dense for Reference<F> {
    fn linear(&self, args: Linear<'_, Self>) -> Result<(), ArgError> {
        let dims = args.check()?;
        for (x, out) in rows(args.x, dims.inputs).zip(rows_mut(args.out, dims.outputs)) {
            for (o, (weight, out)) in rows(args.weight, dims.inputs).zip(out).enumerate() {
                let mut sum = F::zero();
                for (&x, &w) in x.iter().zip(weight) {
                    sum += x * w;
                }
                if let Some(&bias) = args.bias.and_then(|bias| bias.get(o)) {
                    sum += bias;
                }
                *out = sum;
            }
        }
        Ok(())
    }

    fn linear_backward(&self, args: LinearBackward<'_, Self>) -> Result<(), ArgError> {
        let dims = args.check()?;
        let (inputs, outputs) = (dims.inputs, dims.outputs);
        if let Some(dx) = args.dx {
            for t in 0..dims.tokens {
                for i in 0..inputs {
                    let mut sum = F::zero();
                    for o in 0..outputs {
                        sum += args.dout[t * outputs + o] * args.weight[o * inputs + i];
                    }
                    let dx = &mut dx[t * inputs + i];
                    *dx = if args.accumulate { *dx + sum } else { sum };
                }
            }
        }
        if let Some(dweight) = args.dweight {
            dweight.fill(F::zero());
            for t in 0..dims.tokens {
                for o in 0..outputs {
                    for i in 0..inputs {
                        dweight[o * inputs + i] += args.dout[t * outputs + o] * args.x[t * inputs + i];
                    }
                }
            }
        }
        if let Some(dbias) = args.dbias {
            dbias.fill(F::zero());
            for t in 0..dims.tokens {
                for (dbias, &dout) in dbias.iter_mut().zip(&args.dout[t * outputs..(t + 1) * outputs]) {
                    *dbias += dout;
                }
            }
        }
        Ok(())
    }

    fn rms_norm(&self, args: RmsNorm<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dim = args.dims.dim;
        for (r, (x, out)) in rows(args.x, dim).zip(rows_mut(args.out, dim)).enumerate() {
            // One gain; an iterator of it, so that there is nothing to fail.
            let gains = rows(args.gain, dim).skip(args.dims.group(r)).take(1).flatten();
            let inverse = inverse_rms(x);
            for ((out, &x), &gain) in out.iter_mut().zip(x).zip(gains) {
                *out = x * inverse * gain;
            }
        }
        Ok(())
    }

    fn rms_norm_backward(&self, args: RmsNormBackward<'_, Self>) -> Result<(), ArgError> {
        args.check()?;
        let dim = args.dims.dim;
        let mut dgain = args.dgain;
        if let Some(dgain) = &mut dgain {
            dgain.fill(F::zero());
        }
        for r in 0..args.dims.rows {
            let x = &args.x[r * dim..(r + 1) * dim];
            let group = args.dims.group(r) * dim;
            let gain = &args.gain[group..group + dim];
            let dx = &mut args.dx[r * dim..(r + 1) * dim];
            let inverse = inverse_rms(x);
            // With n = x / rms: dn = dout · gain, and dx = (dn - n · mean(dn · n)) / rms.
            let mut mean = F::zero();
            for c in 0..dim {
                let n = x[c] * inverse;
                mean += dx[c] * gain[c] * n;
                if let Some(dgain) = &mut dgain {
                    dgain[group + c] += dx[c] * n;
                }
            }
            mean /= F::of(dim as f64);
            for c in 0..dim {
                dx[c] = (dx[c] * gain[c] - x[c] * inverse * mean) * inverse;
            }
        }
        Ok(())
    }

    fn silu_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        args.check("silu_gate", false)?;
        for ((out, &y), &g) in args.out.iter_mut().zip(args.y).zip(args.gate) {
            *out = y * (g * sigmoid(g));
        }
        Ok(())
    }

    fn silu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        args.check("silu_gate_backward", false)?;
        for i in 0..args.y.len() {
            let (g, s) = (args.gate[i], sigmoid(args.gate[i]));
            args.dy[i] = args.dout[i] * (g * s);
            args.dgate[i] = args.dout[i] * args.y[i] * (s + g * s * (F::one() - s));
        }
        Ok(())
    }

    fn sigmoid_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        let width = args.check("sigmoid_gate", true)?;
        for ((out, y), &g) in rows_mut(args.out, width).zip(rows(args.y, width)).zip(args.gate) {
            for (out, &y) in out.iter_mut().zip(y) {
                *out = y * sigmoid(g);
            }
        }
        Ok(())
    }

    fn sigmoid_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        let width = args.check("sigmoid_gate_backward", true)?;
        args.dgate.fill(F::zero());
        for i in 0..args.y.len() {
            let s = sigmoid(args.gate[i / width]);
            args.dy[i] = args.dout[i] * s;
            args.dgate[i / width] += args.dout[i] * args.y[i] * (s * (F::one() - s));
        }
        Ok(())
    }

    fn gelu_gate(&self, args: Gate<'_, Self>) -> Result<(), ArgError> {
        args.check("gelu_gate", false)?;
        for ((out, &y), &g) in args.out.iter_mut().zip(args.y).zip(args.gate) {
            *out = y * (g * normal_cdf(g));
        }
        Ok(())
    }

    fn gelu_gate_backward(&self, args: GateBackward<'_, Self>) -> Result<(), ArgError> {
        args.check("gelu_gate_backward", false)?;
        // The density of the normal distribution is exp(-g²/2) / sqrt(2π).
        let norm = F::of(core::f64::consts::FRAC_2_SQRT_PI * core::f64::consts::FRAC_1_SQRT_2 / 2.0);
        for i in 0..args.y.len() {
            let g = args.gate[i];
            let density = norm * (g * g * F::of(-0.5)).exp();
            args.dy[i] = args.dout[i] * (g * normal_cdf(g));
            args.dgate[i] = args.dout[i] * args.y[i] * (normal_cdf(g) + g * density);
        }
        Ok(())
    }
}

fn inverse_rms<F: Real>(x: &[F]) -> F {
    let mut sum = F::zero();
    for &x in x {
        sum += x * x;
    }
    F::one() / (sum / F::of(x.len() as f64) + F::of(NORM_EPS)).sqrt()
}

fn sigmoid<F: Real>(x: F) -> F {
    F::one() / (F::one() + (-x).exp())
}

/// The distribution function of the normal distribution: exact GELU is `x` times it.
fn normal_cdf<F: Real>(x: F) -> F {
    F::of(0.5) * (F::one() + (x * F::of(core::f64::consts::FRAC_1_SQRT_2)).erf())
}
