//! A program of inference alone: an image is parsed, verified and read, a layer runs over it on the reference
//! backend, in every format, and a whole language model answers a question. Its panic handler calls a function that exists nowhere. So if it links, no panic can be
//! reached: no index out of bounds, no division by zero, no `unwrap`, for any bytes as the image and any sizes,
//! which all come from behind `black_box`.
//!
//! Built without overflow checks, as releases are. It is not run.
#![no_std]
#![no_main]

use core::hint::black_box;
use core::panic::PanicInfo;

use memlayer_core::layer::{Activations, Keys, Params, Projection, forward, forward_scratch};
use memlayer_core::ops::bag::{BagDot, BagSum};
use memlayer_core::ops::dense::{Gate, Linear, NormDims, RmsNorm};
use memlayer_core::ops::select::{Select, SelectDims};
use memlayer_core::ops::{Dense, EmbeddingBag, SelectRows};
use memlayer_core::{
    ArgError, Bf16, Config, DenseRows, E4m3, E5m2, Element, F16, Int4, Reference, Row, RowStore, ScaledRows, Scratch,
    Table,
};
use memlayer_infer::{Block, Error, Model};
use memlayer_quantize::image::{Entry, Image, ImageError};

type Device = Reference<f32>;

/// What went wrong, which is not the question here.
struct Wrong;

impl From<ArgError> for Wrong {
    fn from(_: ArgError) -> Self {
        Self
    }
}
impl From<Error> for Wrong {
    fn from(_: Error) -> Self {
        Self
    }
}
impl From<ImageError> for Wrong {
    fn from(_: ImageError) -> Self {
        Self
    }
}

/// All memory there is.
struct Memory<'a> {
    reals: &'a mut [f32],
    ids: &'a mut [u32],
    more_reals: &'a mut [f32],
    more_ids: &'a mut [u32],
    x: &'a [f32],
    out: &'a mut [f32],
}

/// Every accessor of an image of any bytes.
fn read(bytes: &[u8]) -> Result<f32, Wrong> {
    let mut sum = Image::stated_len(bytes)? as f32;
    let image = Image::parse(bytes)?;
    image.verify()?;
    for entry in image.sections() {
        entry.verify()?;
        sum += entry.name().len() as f32 + entry.checksum() as f32;
        sum += entry.bytes().map_or(0.0, |bytes| bytes.len() as f32);
        sum += entry.config().map_or(0.0, |config| config.slots() as f32);
        sum += rows::<f32>(&entry) + rows::<F16>(&entry) + rows::<Bf16>(&entry);
        sum += rows::<i8>(&entry) + rows::<E4m3>(&entry) + rows::<E5m2>(&entry);
    }
    Ok(sum)
}

fn rows<E: Element>(entry: &Entry<'_>) -> f32 {
    let (id, i) = black_box((3, 5));
    let value = |row: Option<Row<'_, E>>| row.map_or(0.0, |row| row.value::<f32>(i));
    let packed = entry.rows::<E>().map_or(0.0, |rows| value(rows.get(id)) + rows.rows() as f32);
    packed + entry.dense::<E>().map_or(0.0, |rows| value(rows.get(id)) + rows.dim() as f32)
}

/// The operations of inference, over a table of any sizes.
fn operations<S: RowStore>(table: &S, m: &mut Memory<'_>) -> Result<(), Wrong> {
    let device = Device::new();
    let (bag, accumulate) = black_box((4, true));
    let args = BagSum { bag, ids: &*m.ids, weights: &*m.reals, out: &mut *m.out, accumulate };
    device.bag_sum(table, args)?;
    device.bag_dot(table, BagDot { bag, ids: &*m.ids, vectors: m.x, out: &mut *m.out })?;
    let dims = black_box(SelectDims { tokens: 1, heads: 2, parts: 2, sub_keys: 4, half_dim: 3, top_k: 2 });
    let _ = SelectRows::<S>::select_scratch(&device, dims);
    let (scores, weights) = (&mut *m.out, &mut *m.reals);
    let args = Select { dims, queries: m.x, keys: table, ids: &mut *m.ids, scores, weights };
    device.select(args, Scratch { reals: &mut *m.more_reals, ids: &mut *m.more_ids })?;
    Ok(())
}

fn dense(m: &mut Memory<'_>) -> Result<(), Wrong> {
    let device = Device::new();
    let (tokens, bias) = black_box((2, true));
    let bias = bias.then_some(&*m.more_reals);
    device.linear(Linear { tokens, x: m.x, weight: &*m.reals, bias, out: &mut *m.out })?;
    let dims = black_box(NormDims { rows: 2, dim: 3, groups: 2, repeat: 1 });
    device.rms_norm(RmsNorm { dims, x: m.x, gain: &*m.reals, out: &mut *m.out })?;
    device.silu_gate(Gate { y: m.x, gate: &*m.reals, out: &mut *m.out })?;
    device.sigmoid_gate(Gate { y: m.x, gate: &*m.reals, out: &mut *m.out })?;
    device.gelu_gate(Gate { y: m.x, gate: &*m.reals, out: &mut *m.out })?;
    Ok(())
}

/// A layer out of an image, its configuration too: any kind, any gates, keys packed or not.
fn layer<E: Element>(bytes: &[u8], m: &mut Memory<'_>) -> Result<(), Wrong> {
    let image = Image::parse(bytes)?;
    let config: Config = image.config("0.config")?;
    let (keys, values) = (image.rows::<E>("0.keys")?, image.rows::<E>("values")?);
    let projection = |weight: &str, bias: &str| {
        let weight = image.dense::<f32>(weight).ok()?.codes();
        let bias = image.dense::<f32>(bias).ok().map(|rows| rows.codes());
        Some(Projection::<Device> { weight, bias })
    };
    let experts = image.rows::<E>("experts").ok();
    let trained = image.dense::<f32>("0.trained").ok().map(|rows| rows.codes());
    let gain = image.dense::<f32>("0.gain").ok().map(|rows| rows.codes());
    let params = Params {
        query: projection("0.query", "0.query.bias").ok_or(Wrong)?,
        keys: trained.map_or(Keys::Packed(&keys), |keys| Keys::Trained { keys, gain }),
        query_gain: gain,
        values: &values,
        experts: experts.as_ref(),
        silu: projection("0.silu", "0.silu.bias"),
        value_proj: projection("0.value", "0.value.bias"),
        sigmoid: projection("0.sigmoid", "0.sigmoid.bias"),
    };
    let device = Device::new();
    let tokens = black_box(3);
    black_box(forward_scratch::<ScaledRows<'_, E>, ScaledRows<'_, E>, _>(&device, &config, tokens));
    let memory = Scratch { reals: &mut *m.reals, ids: &mut *m.ids };
    let mut act = Activations::new(&config, tokens, memory)?;
    let scratch = Scratch { reals: &mut *m.more_reals, ids: &mut *m.more_ids };
    forward(&device, &config, &params, m.x, &mut act, &mut *m.out, scratch)?;
    black_box(act.coefficients());
    Ok(())
}

/// A language model out of an image: its tokenizer, a question, an answer.
fn model(bytes: &[u8], m: &mut Memory<'_>) -> Result<(), Wrong> {
    let image = Image::parse(bytes)?;
    let mut blocks = black_box([Block::default(); 4]);
    let model = Model::open(&image, black_box(&mut blocks[..]))?;
    black_box(model.sizes().encode()?);
    let device = Device::new();
    let (question, tokens) = (black_box("What is it?"), black_box(9));
    let prompt = model.prompt(question, &mut *m.more_ids)?;
    black_box(model.scratch(&device, tokens));
    let (reals, (ids, out)) = (&mut *m.reals, m.ids.split_at_mut_checked(black_box(400)).ok_or(Wrong)?);
    let answer = model.answer(&device, prompt, out, Scratch { reals, ids })?;
    let mut text = black_box([0; 64]);
    black_box(model.text(answer, black_box(&mut text[..])));
    Ok(())
}

fn all(bytes: &[u8], m: &mut Memory<'_>) -> Result<(), Wrong> {
    black_box(read(bytes)?);
    model(bytes, m)?;
    dense(m)?;
    let codes = black_box([0.5f32; 64]);
    operations(&DenseRows::new(black_box(&codes[..]), black_box(4)), m)?;
    let codes = black_box([Int4::<32>(3); 64]);
    operations(&DenseRows::new(black_box(&codes[..]), black_box(40)), m)?;
    if let Some(entry) = Image::parse(bytes)?.section("rows") {
        operations(&entry.rows::<i8>()?, m)?;
        operations(&entry.rows::<E4m3>()?, m)?;
        operations(&entry.dense::<Bf16>()?, m)?;
    }
    layer::<i8>(bytes, m)?;
    layer::<E4m3>(bytes, m)?;
    layer::<E5m2>(bytes, m)?;
    layer::<f32>(bytes, m)
}

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    let (mut reals, mut ids, mut more_reals, mut more_ids) = ([1.0; 512], [0; 512], [0.0; 512], [0; 512]);
    let (x, mut out, bytes) = ([1.0; 64], [0.0; 64], [0u8; 1024]);
    let mut memory = Memory {
        reals: black_box(&mut reals[..]),
        ids: black_box(&mut ids[..]),
        more_reals: black_box(&mut more_reals[..]),
        more_ids: black_box(&mut more_ids[..]),
        x: black_box(&x[..]),
        out: black_box(&mut out[..]),
    };
    // Slices of a length that the optimizer does not know.
    let bytes: &[u8] = &bytes;
    black_box(all(black_box(bytes), &mut memory).is_ok());
    loop {
        core::hint::spin_loop();
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    unsafe extern "C" {
        fn a_panic_is_reachable() -> !;
    }
    // SAFETY: there is no such function: a program that could call this does not link.
    unsafe { a_panic_is_reachable() }
}
