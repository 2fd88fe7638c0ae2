//! Arguments that do not fit each other: sizes of any kind, 2^63 included, against buffers of other lengths. Every
//! device refuses what the reference refuses, writes nothing then, and nothing panics.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::dense::{Gate, Linear, NormDims, RmsNorm};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{Dense, EmbeddingBag, RowReduce, SelectRows};
use memlayer_core::{ArgError, DenseRows, Reference, Scratch, ScratchReq};
use memlayer_cpu::Cpu;
use memlayer_fuzz::{Input, cpus};

/// Kept small: what fits each other by chance is computed.
const LONGEST: usize = 64;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let input = &mut input;
    let [a, b, c] = [0; 3].map(|_| input.size(0..=LONGEST));
    let floats = vec![1.0f32; 4 * LONGEST];
    let ids = vec![input.size(0..=70) as u32; LONGEST];
    match input.size(0..=5) {
        0 => {
            let dim = absurd(input).max(1);
            let table = DenseRows::new(&floats[..a], dim);
            let (bag, accumulate) = (absurd(input), input.flag());
            all(c, |device, out| device.bag_sum(&table, bag, &ids[..b], accumulate, out));
        }
        1 => {
            let dim = absurd(input).max(1);
            let table = DenseRows::new(&floats[..a], dim);
            let bag = absurd(input);
            let vectors = &floats[..(a * b).min(4 * LONGEST)];
            all(c, |device, out| device.bag_dot(&table, bag, &ids[..b], vectors, out));
        }
        2 => {
            let dims =
                NormDims { rows: absurd(input), dim: absurd(input), groups: absurd(input), repeat: absurd(input) };
            all(c, |device, out| device.rms_norm(dims, &floats[..a], &floats[..b], out));
        }
        3 => {
            let tokens = absurd(input);
            let bias = input.flag();
            all(c, |device, out| device.linear(tokens, &floats[..a], &floats[..b], bias.then_some(&floats[..c]), out));
        }
        4 => {
            let shared = input.flag();
            all(c, |device, out| device.gate(shared, &floats[..a], &floats[..b], out));
        }
        _ => {
            let dims = SelectDims {
                tokens: absurd(input),
                heads: absurd(input),
                parts: absurd(input),
                sub_keys: absurd(input),
                half_dim: absurd(input),
                top_k: absurd(input),
            };
            let keys = DenseRows::new(&floats[..a], dims.half_dim.max(1));
            all(c, |device, out| device.select(dims, &floats[..b], &keys, out));
        }
    }
    let rows = absurd(input);
    all(0, |device, _| device.plan(&ids[..a], rows, b));
});

/// A size that fits now and then.
fn absurd(input: &mut Input<'_>) -> usize {
    match input.size(0..=7) {
        0 => 0,
        1 => 1 << input.size(0..=63),
        2 => input.bits() as usize,
        3 => usize::MAX,
        _ => input.size(0..=8),
    }
}

/// Runs a call on every device, with a buffer of `len` to write to: all accept it, or all refuse it and leave the
/// buffer alone.
fn all(len: usize, call: impl Fn(&dyn Calls, &mut [f32]) -> Done) {
    let mut expected = vec![7.0; len];
    let accepted = call(&Reference::<f32>::new(), &mut expected);
    for cpu in cpus() {
        let mut found = vec![7.0; len];
        let done = call(cpu, &mut found);
        assert_eq!(done.is_ok(), accepted.is_ok(), "{}: {done:?}, the reference {accepted:?}", cpu.name());
        if let Err(error) = done {
            assert!(!error.to_string().is_empty() && found == vec![7.0; len], "{}: {error}", cpu.name());
        }
    }
}

type Done = Result<(), ArgError>;
type Rows<'a> = DenseRows<'a, f32>;

/// The operations of a device, on slices.
trait Calls {
    fn bag_sum(&self, table: &Rows<'_>, bag: usize, ids: &[u32], accumulate: bool, out: &mut [f32]) -> Done;
    fn bag_dot(&self, table: &Rows<'_>, bag: usize, ids: &[u32], vectors: &[f32], out: &mut [f32]) -> Done;
    fn rms_norm(&self, dims: NormDims, x: &[f32], gain: &[f32], out: &mut [f32]) -> Done;
    fn linear(&self, tokens: usize, x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) -> Done;
    fn gate(&self, shared: bool, y: &[f32], gate: &[f32], out: &mut [f32]) -> Done;
    fn select(&self, dims: SelectDims, queries: &[f32], keys: &Rows<'_>, out: &mut [f32]) -> Done;
    fn plan(&self, ids: &[u32], rows: usize, entries: usize) -> Done;
}

/// What a selection could need without leaving a machine's memory.
fn plausible(dims: &SelectDims) -> bool {
    let sizes = [
        dims.tokens.max(1),
        dims.heads.max(1),
        dims.parts.max(1),
        dims.sub_keys.max(1),
        dims.half_dim.max(1),
        dims.top_k.max(1),
    ];
    sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size)).is_some_and(|n| n < 1 << 20)
}

macro_rules! calls {
    ($device:ty) => {
        impl Calls for $device {
            fn bag_sum(&self, table: &Rows<'_>, bag: usize, ids: &[u32], accumulate: bool, out: &mut [f32]) -> Done {
                let weights = &vec![1.0; ids.len()][..];
                EmbeddingBag::bag_sum(self, table, BagSum { bag, ids, weights, out, accumulate })
            }
            fn bag_dot(&self, table: &Rows<'_>, bag: usize, ids: &[u32], vectors: &[f32], out: &mut [f32]) -> Done {
                EmbeddingBag::bag_dot(self, table, BagDot { bag, ids, vectors, out })
            }
            fn rms_norm(&self, dims: NormDims, x: &[f32], gain: &[f32], out: &mut [f32]) -> Done {
                Dense::rms_norm(self, RmsNorm { dims, x, gain, out })
            }
            fn linear(&self, tokens: usize, x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32]) -> Done {
                Dense::linear(self, Linear { tokens, x, weight, bias, out })
            }
            fn gate(&self, shared: bool, y: &[f32], gate: &[f32], out: &mut [f32]) -> Done {
                let args = Gate { y, gate, out };
                if shared { self.sigmoid_gate(args) } else { self.silu_gate(args) }
            }
            fn select(&self, dims: SelectDims, queries: &[f32], keys: &Rows<'_>, scores: &mut [f32]) -> Done {
                let (mut ids, mut weights) = (vec![7; scores.len()], vec![7.0; scores.len()]);
                // Sizes that no memory holds are refused before anyone looks at the workspace.
                let req = plausible(&dims).then(|| SelectRows::<Rows<'_>>::select_scratch(self, dims));
                let req = req.unwrap_or(ScratchReq::EMPTY);
                let (mut reals, mut more) = (vec![0.0; req.reals], vec![0; req.ids]);
                let args = Select { dims, queries, keys, ids: &mut ids[..], scores, weights: &mut weights[..] };
                let done = SelectRows::select(self, args, Scratch { reals: &mut reals[..], ids: &mut more[..] });
                if done.is_err() {
                    assert!(ids.iter().all(|&id| id == 7) && weights.iter().all(|&w| w == 7.0));
                }
                done
            }
            fn plan(&self, ids: &[u32], rows: usize, entries: usize) -> Done {
                let mut buffer = vec![7; PlanBuffers::<Self>::ids_len(entries)];
                let (buffers, _) = PlanBuffers::<Self>::carve(&mut buffer[..], entries)?;
                let req = self.plan_scratch(ids.len());
                let (mut reals, mut more) = (vec![0.0; req.reals], vec![0; req.ids]);
                let done =
                    RowReduce::plan(self, ids, rows, buffers, Scratch { reals: &mut reals[..], ids: &mut more[..] });
                if done.is_err() {
                    assert!(buffer.iter().all(|&id| id == 7));
                }
                done
            }
        }
    };
}
calls!(Reference<f32>);
calls!(Cpu);
