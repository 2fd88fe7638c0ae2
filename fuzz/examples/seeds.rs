//! Writes the seeds of the corpus, the same every time: `cargo run --example seeds`.
//!
//! Images and golden files are ones that are sound, small, and of every kind; the other targets make shapes and
//! values out of a few bytes, and start from bytes that look random.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use memlayer_core::config::Kind;
use memlayer_core::{Config, DenseRows, E4m3, E5m2, F16, Random, Reference};
use memlayer_infer::tokenizer::Merge;
use memlayer_infer::{MemorySizes, Sizes};
use memlayer_quantize::image::{Section, Writer, encoded_len};
use memlayer_tests::layer::{LayerInputs, parameters};
use safetensors::tensor::{Dtype, TensorView, serialize};

type Done<T> = Result<T, Box<dyn core::error::Error>>;

fn main() -> Done<()> {
    for (name, image) in [("everything", everything()?), ("nothing", image(&mut [], |_| Ok(()))?)] {
        for mode in [0u8, 1] {
            write("image", &format!("{name}-{mode}"), &[&[mode], &image[..]].concat())?;
        }
    }
    let text = b"What is it?";
    let (sized, tokenizer) = (|kind: u8| kind | (text.len() as u8) << 2, tokenizer());
    write("infer", "tokenizer", &[&[sized(0)][..], &text[..], &tokenizer[..]].concat())?;
    for (name, layers) in [("dense", 0), ("memory", 2)] {
        write("infer", name, &[&[sized(1)][..], &text[..], &model(layers, &tokenizer)?[..]].concat())?;
    }
    for (name, bytes) in goldens()? {
        write("golden", &name, &bytes)?;
    }
    for (at, target) in (0u64..).zip(["args", "bag", "config", "plan", "quantize", "select", "update"]) {
        for (i, len) in [3usize, 24, 96, 400].into_iter().enumerate() {
            let mut random = Random::new(10 * at + i as u64);
            let bytes: Vec<u8> = (0..len).map(|_| random.bits().to_le_bytes()[3]).collect();
            write(target, &format!("random-{len}"), &bytes)?;
        }
    }
    for (name, text) in [
        ("jsonl", &b"\x00{\"question\": \"Who?\", \"answer\": [\"Me\", \"I\"]}\n\n{\"question\":\"2?\",\"answer\":[\"x\"]}"[..]),
        ("world", b"\x01iso2\tname\tcapital\tcontinent\tcurrency\ttld\tcalling_code\nFR\tFrance\tParis\tEurope\tEuro\t.fr\t33\n\xffname\tcountry_iso2\tpopulation\ttimezone\nLyon\tFR\t500000\tEurope/Paris\n"),
        ("json", b"\x02{\"version\":\"1.0\",\"added_tokens\":[],\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[]}}"),
        ("text", b"\x03What is the capital of \xc3\x85land?"),
    ] {
        write("facts", name, text)?;
    }
    Ok(())
}

fn write(target: &str, name: &str, bytes: &[u8]) -> Done<()> {
    let folder: PathBuf = [env!("CARGO_MANIFEST_DIR"), "corpus", target].iter().collect();
    std::fs::create_dir_all(&folder)?;
    std::fs::write(Path::join(&folder, name), bytes)?;
    Ok(())
}

fn image(plan: &mut [Section], fill: impl FnOnce(&mut Writer<'_, &mut [u8]>) -> Done<()>) -> Done<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(encoded_len(plan)?)?];
    let mut writer = Writer::new(&mut bytes[..], plan)?;
    fill(&mut writer)?;
    writer.finish()?;
    Ok(bytes)
}

/// An image with a section of each kind and of the usual formats.
fn everything() -> Done<Vec<u8>> {
    let config = Config::builder(3).heads(1).sub_keys(2).half_dim(2).top_k(1).silu_gate(true).build()?;
    let values: Vec<f32> = (0..12).map(|i| (i as f32 * 0.7).sin()).collect();
    let table = DenseRows::new(&values, 3);
    let mut plan = [
        Section::config("c")?,
        Section::rows::<i8>("int8", 4, 3, 3)?,
        Section::rows::<E4m3>("e4m3", 4, 3, 2)?,
        Section::rows::<E5m2>("e5m2", 4, 3, 1)?,
        Section::dense::<f32>("f32", 4, 3)?,
        Section::dense::<F16>("f16", 2, 2)?,
        Section::bytes("text", 5)?,
        Section::bytes("none", 0)?,
    ];
    image(&mut plan, |writer| {
        writer.config("c", &config)?;
        writer.pack("int8", &table, &mut [0i8; 3])?;
        writer.pack("e4m3", &table, &mut [E4m3(0); 3])?;
        writer.pack("e5m2", &table, &mut [E5m2(0); 3])?;
        writer.dense("f32", &values)?;
        writer.dense("f16", &[F16::ONE; 4])?;
        writer.bytes("text", b"sines")?;
        writer.bytes("none", b"")?;
        Ok(())
    })
}

/// The tokenizer of a model: all bytes and two merges.
fn tokenizer() -> Vec<u8> {
    let mut texts: Vec<Vec<u8>> = ["<pad>", "<bos>", "<sep>", "<eos>"].map(|text| text.into()).to_vec();
    texts.extend((0..=255u8).map(|byte| vec![byte]));
    texts.extend([b"is".to_vec(), b" is".to_vec()]);
    let of = |byte: u8| 4 + u32::from(byte);
    let merges = [
        Merge { left: of(b' '), right: 260, rank: 1, token: 261 },
        Merge { left: of(b'i'), right: of(b's'), rank: 0, token: 260 },
    ];
    let word = |n: usize| (n as u32).to_le_bytes();
    let mut out = [1, texts.len(), merges.len(), texts.iter().map(Vec::len).sum()].map(word).concat();
    (0..256).for_each(|byte| out.extend(word(4 + byte)));
    let mut start = 0;
    for text in &texts {
        out.extend(word(start));
        start += text.len();
    }
    out.extend(word(start));
    merges.iter().for_each(|merge| out.extend(merge.encode()));
    out.extend(texts.concat());
    out
}

/// A language model of two blocks, with a memory where bits of `layers` say so.
fn model(layers: u64, tokenizer: &[u8]) -> Done<Vec<u8>> {
    let memory = MemorySizes { layers, heads: 1, sub_keys: 3, half_dim: 2, top_k: 2 };
    let memory = (layers != 0).then_some(memory);
    let sizes = Sizes { vocab: 262, dim: 4, layers: 2, heads: 2, hidden: 3, context: 40, memory };
    let mut dense = vec![("embedding.weight".to_owned(), 262, 4), ("norm.weight".to_owned(), 1, 4)];
    let mut keys = Vec::new();
    for layer in 0..2 {
        let mut push = |name: &str, rows, dim| dense.push((format!("layers.{layer}.{name}"), rows, dim));
        push("attention_norm.weight", 1, 4);
        push("attention.qkv.weight", 12, 4);
        push("attention.out.weight", 4, 4);
        push("feed_forward_norm.weight", 1, 4);
        if layers >> layer & 1 == 0 {
            push("feed_forward.up.weight", 6, 4);
            push("feed_forward.down.weight", 4, 3);
            continue;
        }
        push("memory.query_proj.query_mlps.0.weight", 4, 4);
        push("memory.query_proj.query_mlps.0.bias", 1, 4);
        push("memory.query_norm.weight", 1, 4);
        push("memory.swilu_projection.weight", 4, 4);
        push("memory.swilu_projection.bias", 1, 4);
        push("memory.value_proj.weight", 4, 4);
        push("memory.value_proj.bias", 1, 4);
        keys.push(format!("layers.{layer}.memory.keys"));
    }
    let values: Vec<f32> = (0..262 * 4).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut plan = vec![Section::bytes("model", Sizes::LEN)?, Section::bytes("tokenizer", tokenizer.len())?];
    for (name, rows, dim) in &dense {
        plan.push(Section::dense::<f32>(name, *rows, *dim)?);
    }
    for name in &keys {
        plan.push(Section::rows::<i8>(name, 6, 2, 2)?);
    }
    if memory.is_some() {
        plan.push(Section::rows::<i8>("values", 9, 4, 4)?);
    }
    image(&mut plan, |writer| {
        writer.bytes("model", &sizes.encode()?)?;
        writer.bytes("tokenizer", tokenizer)?;
        for (name, rows, dim) in &dense {
            writer.dense(name, &values[..rows * dim])?;
        }
        for name in &keys {
            writer.pack(name, &DenseRows::new(&values[..12], 2), &mut [0i8; 2])?;
        }
        if memory.is_some() {
            writer.pack("values", &DenseRows::new(&values[..36], 4), &mut [0i8; 4])?;
        }
        Ok(())
    })
}

/// Tensors on their way into a file.
#[derive(Default)]
struct Tensors(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn floats(&mut self, name: &str, shape: &[usize], values: &[f64]) {
        let bytes = values.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect();
        self.0.push((name.to_owned(), Dtype::F32, shape.to_vec(), bytes));
    }
    fn ids(&mut self, name: &str, shape: &[usize], ids: &[u32]) {
        let bytes = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
        self.0.push((name.to_owned(), Dtype::I64, shape.to_vec(), bytes));
    }
    fn file(&self, config: &str) -> Done<Vec<u8>> {
        let views: Vec<(&str, TensorView<'_>)> = self
            .0
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?)))
            .collect::<Done<_>>()?;
        let metadata = HashMap::from([("config".to_owned(), config.to_owned())]);
        Ok(serialize(views, Some(metadata))?)
    }
}

fn goldens() -> Done<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for (name, peer, rich) in [("layer", false, false), ("layer-plus", false, true), ("layer-peer", true, false)] {
        let mut builder = Config::builder(2).heads(1).sub_keys(2).half_dim(1).top_k(1);
        if peer {
            builder = builder.kind(Kind::Peer);
        }
        if rich {
            builder = builder.qk_norm(true).silu_gate(true).sigmoid_gate(true).value_dim(3);
        }
        files.push((name.to_owned(), layer(builder.build()?)?));
    }
    let mut health = Tensors::default();
    health.ids("indices", &[4], &[0, 1, 1, 2]);
    health.floats("weights", &[4], &[0.5, 0.25, 0.25, 1.0]);
    health.floats("counted", &[6], &[75.0, 0.3, 0.1, 1.0, 3.0, 3.0]);
    health.floats("weighted", &[6], &[75.0, 0.3, 0.1, 1.0, 3.0, 3.0]);
    files.push(("health".to_owned(), health.file("{\"slots\":4}")?));
    let mut optim = Tensors::default();
    optim.floats("values", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    optim.ids("step0.rows", &[3], &[2, 0, 2]);
    optim.floats("step0.grads", &[3, 2], &[0.5; 6]);
    for rule in ["sgd", "sparse_adam", "adagrad", "rowwise_adagrad"] {
        optim.floats(&format!("{rule}.after0"), &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
    let config = "{\"lr\":0.1,\"betas\":[0.9,0.99],\"eps_adam\":1e-8,\"eps_adagrad\":1e-8}";
    files.push(("optim".to_owned(), optim.file(config)?));
    let mut formats = Tensors::default();
    let bytes = |name: &str, shape: &[usize], bytes: Vec<u8>| (name.to_owned(), Dtype::U8, shape.to_vec(), bytes);
    formats.0.push(("f16_all".to_owned(), Dtype::F16, vec![2], vec![0, 0x3c, 0, 0xc0]));
    formats.0.push(bytes("e4m3_bits", &[2], vec![0x38, 0xc0]));
    formats.0.push(bytes("e5m2_bits", &[2], vec![0x3c, 0xc0]));
    formats.floats("e4m3_decode", &[256], &[0.0; 256]);
    formats.floats("e5m2_decode", &[256], &[0.0; 256]);
    formats.floats("rows", &[1, 2], &[0.0, 1.0]);
    let row = [&[0u8, 255][..], &(1.0f32 / 255.0).to_le_bytes(), &0.0f32.to_le_bytes()].concat();
    formats.0.push(bytes("fbgemm_byte_rowwise", &[1, 10], row));
    files.push(("formats".to_owned(), formats.file("{}")?));
    Ok(files)
}

/// A golden file of a layer of two tokens.
fn layer(config: Config) -> Done<Vec<u8>> {
    let inputs = LayerInputs::random(config, 2, 7);
    let results = inputs.run(&Reference::<f64>::new(), |_| true)?;
    let mut tensors = Tensors::default();
    for ((name, values), (_, shape)) in inputs.tensors.iter().zip(parameters(&config, 2)) {
        tensors.floats(name, &shape, values);
    }
    tensors.floats("grad_output", &[2, config.output_dim()], &inputs.grad_output);
    tensors.ids("indices", &[2, config.heads(), config.top_k()], &results.ids);
    for (name, values) in &results.tensors {
        tensors.floats(name, &[values.len()], values);
    }
    for (name, rows) in &results.rows {
        tensors.ids(name, &[rows.len()], rows);
    }
    let kind = if config.kind() == Kind::Peer { "peer" } else { "memory" };
    tensors.file(&format!(
        "{{\"kind\":\"{kind}\",\"input_dim\":{},\"output_dim\":{},\"value_dim\":{},\"key_dim\":{},\"heads\":{},\
         \"sub_keys\":{},\"knn\":{},\"tokens\":2,\"swilu\":{},\"gated\":{},\"qk_norm\":{}}}",
        config.input_dim(),
        config.output_dim(),
        config.value_dim(),
        2 * config.half_dim(),
        config.heads(),
        config.sub_keys(),
        config.top_k(),
        config.silu_gate(),
        config.sigmoid_gate(),
        config.qk_norm()
    ))
}
