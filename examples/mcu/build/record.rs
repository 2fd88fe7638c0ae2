//! Makes a model, and records on the host what it gives for some tokens.
//!
//! Scores, weights and outputs are computed in `f64` and rounded. Tokens are drawn until there are enough whose best
//! slots are so far apart that no rounding can change their order: the firmware must find exactly these.

use memlayer_core::layer::{Activations, Keys, Params, Projection, forward, forward_scratch};
use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::{Config, DenseRows, Random, Real, Reference, RowStore, Scratch};
use memlayer_quantize::image::{IN_PLACE_ALIGN, Section, Writer, encoded_len};
use memlayer_quantize::keys::prepare_keys;
use memlayer_quantize::{Image, Pack};

use crate::Done;
use crate::model::{CONFIG, Code, TOKENS, config, rows};

/// How far apart scores must be to be recorded. Those of the firmware are off by less than a hundredth of it.
const GAP: f64 = 2e-3;

fn random(len: usize, std: f64, mean: f32, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0f32; len];
    Random::new(seed).fill_normal(&mut values, std);
    values.iter_mut().for_each(|v| *v += mean);
    values
}

/// A section of rows in the model's format: packed, or as they are.
fn section<E: Pack>(name: &str, rows: usize, dim: usize) -> Done<Section> {
    Ok(if E::SCALED { Section::rows::<E>(name, rows, dim, dim)? } else { Section::dense::<E>(name, rows, dim)? })
}

/// The model's image. Its parameters are random, with the spread of a trained layer.
pub fn model() -> Done<Vec<u8>> {
    let (d, v, q) = (CONFIG.input_dim(), CONFIG.value_dim(), CONFIG.query_len());
    let spread = 1.0 / (d as f64).sqrt();
    let dense = [
        ("query.weight", q, d, random(q * d, spread, 0.0, 1)),
        ("query.bias", 1, q, random(q, 0.1, 0.0, 2)),
        ("query.gain", 1, q, random(q, 0.1, 1.0, 3)),
        ("silu.weight", v, d, random(v * d, spread, 0.0, 4)),
        ("silu.bias", 1, v, random(v, 0.1, 0.0, 5)),
        ("value.weight", d, v, random(d * v, spread, 0.0, 6)),
        ("value.bias", 1, d, random(d, 0.1, 0.0, 7)),
    ];
    let mut keys = vec![0.0; CONFIG.keys_len()];
    let gain = random(CONFIG.gain_len(), 0.1, 1.0, 8);
    prepare_keys(&CONFIG, &random(CONFIG.keys_len(), 1.0, 0.0, 9), &gain, &mut keys)?;
    let values = random(CONFIG.slots() * v, 0.5, 0.0, 10);

    let half = CONFIG.half_dim();
    let mut plan = vec![
        Section::config("config")?,
        section::<Code>("keys", CONFIG.key_rows(), half)?,
        section::<Code>("values", CONFIG.slots(), v)?,
    ];
    for (name, rows, dim, _) in &dense {
        plan.push(Section::dense::<f32>(name, *rows, *dim)?);
    }
    write(&mut plan, |writer| {
        writer.config("config", &CONFIG)?;
        writer.pack("keys", &DenseRows::new(&keys, half), &mut [Code::default(); CONFIG.half_dim()])?;
        writer.pack("values", &DenseRows::new(&values, v), &mut [Code::default(); CONFIG.value_dim()])?;
        for (name, _, _, values) in &dense {
            writer.dense(name, values)?;
        }
        Ok(())
    })
}

fn write(plan: &mut [Section], fill: impl FnOnce(&mut Writer<'_, &mut [u8]>) -> Done<()>) -> Done<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(encoded_len(plan)?)?];
    let mut writer = Writer::new(&mut bytes[..], plan)?;
    fill(&mut writer)?;
    writer.finish()?;
    Ok(bytes)
}

/// What the host makes of one token.
struct Token {
    ids: Vec<u32>,
    scores: Vec<f64>,
    weights: Vec<f64>,
    out: Vec<f64>,
}

/// The layer in `f64`, with `config`, which may keep more rows a head.
fn run<R: RowStore>(config: &Config, image: &Image<'_>, keys: &R, values: &R, x: &[f32]) -> Done<Token> {
    let device = Reference::<f64>::new();
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let read = |name: &str| Ok::<_, memlayer_quantize::ImageError>(wide(image.dense::<f32>(name)?.codes()));
    let (query, query_bias, gain) = (read("query.weight")?, read("query.bias")?, read("query.gain")?);
    let (silu, silu_bias) = (read("silu.weight")?, read("silu.bias")?);
    let (value, value_bias) = (read("value.weight")?, read("value.bias")?);
    let params = Params::<Reference<f64>, R, R> {
        query: Projection { weight: &query, bias: Some(&query_bias) },
        keys: Keys::Packed(keys),
        query_gain: Some(&gain),
        values,
        experts: None,
        silu: Some(Projection { weight: &silu, bias: Some(&silu_bias) }),
        value_proj: Some(Projection { weight: &value, bias: Some(&value_bias) }),
        sigmoid: None,
    };
    let req = config.activations_req(1);
    let (mut reals, mut ids) = (vec![0.0; req.reals], vec![0; req.ids]);
    let mut act = Activations::new(config, 1, Scratch { reals: &mut reals[..], ids: &mut ids[..] })?;
    let req = forward_scratch::<R, R, _>(&device, config, 1);
    let (mut reals, mut ids) = (vec![0.0; req.reals], vec![0; req.ids]);
    let mut out = vec![0.0; config.output_dim()];
    let scratch = Scratch { reals: &mut reals[..], ids: &mut ids[..] };
    forward(&device, config, &params, &wide(x)[..], &mut act, &mut out[..], scratch)?;
    Ok(Token { ids: act.ids.to_vec(), scores: act.scores.to_vec(), weights: act.weights.to_vec(), out })
}

/// Whether no two of the best of a head, nor the last that is kept and the first that is not, are close.
fn decided(more: &Token, top_k: usize) -> bool {
    more.scores.chunks(top_k + 1).all(|head| head.windows(2).all(|pair| pair[0] - pair[1] > GAP))
}

/// The image of tokens and of what the host made of them.
pub fn recorded(model: &[u8]) -> Done<Vec<u8>> {
    // Images lie at multiples of four bytes, vectors of bytes anywhere.
    let mut room = vec![0; model.len() + IN_PLACE_ALIGN];
    let at = room.as_ptr().align_offset(IN_PLACE_ALIGN);
    room[at..at + model.len()].copy_from_slice(model);
    let image = Image::parse(&room[at..at + model.len()])?;
    image.verify()?;
    let (keys, values) = (rows(&image, "keys")?, rows(&image, "values")?);
    let (d, v, l) = (CONFIG.input_dim(), CONFIG.value_dim(), CONFIG.bag_len());
    let one_more = config(CONFIG.top_k() + 1);

    let (mut xs, mut ids) = (Vec::new(), Vec::new());
    let (mut weights, mut sums, mut outs) = (Vec::new(), Vec::new(), Vec::new());
    for seed in 1000.. {
        let x = random(d, 1.0, 0.0, seed);
        if !decided(&run(&one_more, &image, &keys, &values, &x)?, CONFIG.top_k()) {
            continue;
        }
        let token = run(&CONFIG, &image, &keys, &values, &x)?;
        let rounded: Vec<f32> = token.weights.iter().map(|&w| f32::of(w)).collect();
        // The law of vertical sums: these bits are those of every backend.
        let mut y = vec![0.0; v];
        let args = BagSum { bag: l, ids: &token.ids[..], weights: &rounded[..], out: &mut y[..], accumulate: false };
        Reference::<f32>::new().bag_sum(&values, args)?;
        xs.extend(x);
        ids.extend(token.ids.iter().flat_map(|id| id.to_le_bytes()));
        weights.extend(rounded);
        sums.extend(y);
        outs.extend(token.out.iter().map(|&o| f32::of(o)));
        if sums.len() == TOKENS * v {
            break;
        }
    }
    let mut plan = [
        Section::dense::<f32>("input", TOKENS, d)?,
        Section::bytes("ids", TOKENS * l * 4)?,
        Section::dense::<f32>("weights", TOKENS, l)?,
        Section::dense::<f32>("sums", TOKENS, v)?,
        Section::dense::<f32>("output", TOKENS, CONFIG.output_dim())?,
    ];
    write(&mut plan, |writer| {
        writer.dense("input", &xs)?;
        writer.bytes("ids", &ids)?;
        writer.dense("weights", &weights)?;
        writer.dense("sums", &sums)?;
        writer.dense("output", &outs)?;
        Ok(())
    })
}
