//! Answering: the model on plain slices, with a cache of keys and values, by the backend and nothing else.
//!
//! Training goes through candle; this does not. A [`Reader`] borrows parameters from wherever they lie, a model in
//! training or a packed file, and answers many questions of equal length at once, by all cores, and tells which slots it read.
//! One question of a packed file, without std and without an allocator, is `memlayer-infer`'s; the arithmetic is the same, and
//! so are the answers.

use memlayer_core::layer::{self, Activations, Keys, Params, Projection};
use memlayer_core::ops::Dense;
use memlayer_core::ops::dense::{Linear, NormDims, RmsNorm};
use memlayer_core::{Config, RowStore, Scratch, ScratchReq};
use memlayer_cpu::Cpu;
pub use memlayer_infer::Tables;
use memlayer_infer::math::{add_scaled, angles, gate, greatest, softmax_scores, turn};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::{LmError, Result};
use crate::tokenizer::EOS;

/// Where parameters lie.
pub trait Source<'a> {
    /// A dense parameter by its name.
    ///
    /// # Errors
    /// [`LmError`] if there is none of this length.
    fn dense(&self, name: &str, len: usize) -> Result<&'a [f32]>;
    /// The sub-keys of a memory layer, normalized, and the values all of them share.
    ///
    /// # Errors
    /// [`LmError`] if there are none, or their sizes are not the configuration's.
    fn tables(&self, layer: usize, config: &Config) -> Result<Tables<'a>>;
}

/// A model's parameters, borrowed.
#[derive(Debug)]
pub struct Reader<'a> {
    config: &'a ModelConfig,
    embedding: &'a [f32],
    norm: &'a [f32],
    blocks: Vec<Block<'a>>,
}

#[derive(Debug)]
struct Block<'a> {
    attention_norm: &'a [f32],
    qkv: &'a [f32],
    out: &'a [f32],
    feed_forward_norm: &'a [f32],
    feed_forward: FeedForward<'a>,
}

#[derive(Debug)]
enum FeedForward<'a> {
    Dense { up: &'a [f32], down: &'a [f32] },
    Memory(Box<Memory<'a>>),
}

#[derive(Debug)]
struct Memory<'a> {
    config: Config,
    tables: Tables<'a>,
    query: [&'a [f32]; 2],
    query_gain: &'a [f32],
    silu: [&'a [f32]; 2],
    value_proj: [&'a [f32]; 2],
}

/// Rows that one token read.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// The slot.
    pub slot: u32,
    /// Its weight.
    pub weight: f32,
}

/// An answer, and what was read to make each of its tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Answer {
    /// The tokens, without `<eos>`.
    pub tokens: Vec<u32>,
    /// For each step, the reads of all memory layers, one after the other; only where they were asked for.
    pub reads: Vec<Vec<Read>>,
}

impl<'a> Reader<'a> {
    /// Borrows a model of `config` from `source`.
    ///
    /// # Errors
    /// [`LmError::Config`] if the sizes make no model, or the source's.
    pub fn new(config: &'a ModelConfig, source: &impl Source<'a>) -> Result<Self> {
        config.check()?;
        let (d, memory) = (config.dim, config.memory_layer()?);
        let mut blocks = Vec::new();
        for layer in 0..config.layers {
            let dense = |name: &str, len: usize| source.dense(&format!("layers.{layer}.{name}"), len);
            let feed_forward = match memory {
                Some(m) if config.is_memory(layer) => {
                    let (q, v) = (m.query_len(), m.value_dim());
                    let pair = |name: &str, o: usize, i: usize| -> Result<[&'a [f32]; 2]> {
                        Ok([dense(&format!("memory.{name}.weight"), o * i)?, dense(&format!("memory.{name}.bias"), o)?])
                    };
                    FeedForward::Memory(Box::new(Memory {
                        config: m,
                        tables: source.tables(layer, &m)?,
                        query: pair("query_proj.query_mlps.0", q, d)?,
                        query_gain: dense("memory.query_norm.weight", m.gain_len())?,
                        silu: pair("swilu_projection", v, d)?,
                        value_proj: pair("value_proj", d, v)?,
                    }))
                }
                _ => FeedForward::Dense {
                    up: dense("feed_forward.up.weight", 2 * config.hidden * d)?,
                    down: dense("feed_forward.down.weight", config.hidden * d)?,
                },
            };
            blocks.push(Block {
                attention_norm: dense("attention_norm.weight", d)?,
                qkv: dense("attention.qkv.weight", 3 * d * d)?,
                out: dense("attention.out.weight", d * d)?,
                feed_forward_norm: dense("feed_forward_norm.weight", d)?,
                feed_forward,
            });
        }
        let embedding = source.dense("embedding.weight", config.vocab * d)?;
        Ok(Self { config, embedding, norm: source.dense("norm.weight", d)?, blocks })
    }

    /// The sizes.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.config
    }

    /// Greedy answers of at most `longest` tokens to prompts of equal length, `reads` with them if asked for.
    ///
    /// # Errors
    /// [`LmError::TooLong`] if prompt and answer exceed the model's context, [`LmError::Config`] if a token is none of
    /// the vocabulary or the prompts differ in length.
    pub fn answer(&self, cpu: &Cpu, prompts: &[&[u32]], longest: usize, reads: bool) -> Result<Vec<Answer>> {
        let length = prompts.first().map_or(0, |p| p.len());
        if prompts.iter().any(|p| p.len() != length) || length == 0 {
            return Err(LmError::Config("prompts must be of equal length, and not empty".to_owned()));
        }
        if length + longest > self.config.context {
            return Err(LmError::TooLong { found: length + longest, limit: self.config.context });
        }
        let mut session = Session::new(self, cpu, prompts.len(), length + longest, reads);
        let mut answers = vec![Answer::default(); prompts.len()];
        let mut done = vec![false; prompts.len()];
        let mut tokens: Vec<u32> = prompts.iter().flat_map(|p| p.iter().copied()).collect();
        for _ in 0..longest {
            let next = session.step(&tokens)?;
            for (i, (answer, &token)) in answers.iter_mut().zip(&next).enumerate() {
                if done[i] {
                    continue;
                }
                if reads {
                    answer.reads.push(session.reads_of(i));
                }
                done[i] = token == EOS;
                if !done[i] {
                    answer.tokens.push(token);
                }
            }
            if done.iter().all(|&d| d) {
                break;
            }
            tokens = next;
        }
        Ok(answers)
    }
}

/// The state of answering: the cache, and buffers that are used again.
struct Session<'r, 'a> {
    reader: &'r Reader<'a>,
    cpu: &'r Cpu,
    /// B.
    batch: usize,
    /// Tokens the cache holds at most.
    capacity: usize,
    /// Tokens it holds.
    past: usize,
    /// For each block `[B, capacity, D]` of keys, then of values.
    cache: Vec<(Vec<f32>, Vec<f32>)>,
    /// The reads of the last step: for each memory layer slots and weights, `[B, L]`.
    reads: Vec<(Vec<u32>, Vec<f32>)>,
    keep_reads: bool,
    buffers: Buffers,
}

/// Scalars and ids of a [`Scratch`].
type Workspace = (Vec<f32>, Vec<u32>);

/// Buffers that grow to what was asked for and stay.
#[derive(Default)]
struct Buffers {
    normed: Vec<f32>,
    wide: Vec<f32>,
    narrow: Vec<f32>,
    attended: Vec<f32>,
    memory: Workspace,
    scratch: Workspace,
    logits: Vec<f32>,
}

/// The first `len` elements, the buffer made longer if it must be.
fn sized<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
    &mut buffer[..len]
}

fn lend(buffer: &mut Workspace, req: ScratchReq) -> Scratch<'_, Cpu> {
    Scratch { reals: sized(&mut buffer.0, req.reals), ids: sized(&mut buffer.1, req.ids) }
}

impl<'r, 'a> Session<'r, 'a> {
    fn new(reader: &'r Reader<'a>, cpu: &'r Cpu, batch: usize, capacity: usize, keep_reads: bool) -> Self {
        let len = batch * capacity * reader.config.dim;
        let cache = reader.blocks.iter().map(|_| (vec![0.0; len], vec![0.0; len])).collect();
        let buffers = Buffers::default();
        Self { reader, cpu, batch, capacity, past: 0, cache, reads: Vec::new(), keep_reads, buffers }
    }

    /// Takes `tokens` (`[B, S]`) in and gives the most likely next token of each sequence.
    fn step(&mut self, tokens: &[u32]) -> Result<Vec<u32>> {
        let (d, cpu) = (self.reader.config.dim, self.cpu);
        let s = tokens.len() / self.batch;
        let mut x = Vec::with_capacity(tokens.len() * d);
        for &token in tokens {
            let start = token as usize * d;
            let row = self.reader.embedding.get(start..start + d);
            x.extend_from_slice(row.ok_or_else(|| {
                LmError::Config(format!("token {token} of a vocabulary of {}", self.reader.config.vocab))
            })?);
        }
        self.reads.clear();
        let last = self.reader.blocks.len() - 1;
        for (layer, block) in self.reader.blocks.iter().enumerate() {
            let rows = x.len() / d;
            norm(cpu, &x, block.attention_norm, sized(&mut self.buffers.normed, rows * d))?;
            let qkv = sized(&mut self.buffers.wide, rows * 3 * d);
            linear(cpu, rows, &self.buffers.normed[..rows * d], [block.qkv, &[]], qkv)?;
            let attended = sized(&mut self.buffers.attended, rows * d);
            let (keys, values) = &mut self.cache[layer];
            let sizes = Attend { heads: self.reader.config.heads, d, s, past: self.past, capacity: self.capacity };
            sizes.run(qkv, keys, values, attended);
            // Behind the last attention only the last position of each sequence matters.
            let rows = if layer == last { keep_last(&mut x, attended, s, d) } else { rows };
            let narrow = sized(&mut self.buffers.narrow, rows * d);
            linear(cpu, rows, &attended[..rows * d], [block.out, &[]], narrow)?;
            add(&mut x, narrow);
            let normed = sized(&mut self.buffers.normed, rows * d);
            norm(cpu, &x, block.feed_forward_norm, normed)?;
            match &block.feed_forward {
                FeedForward::Dense { up, down } => {
                    let hidden = self.reader.config.hidden;
                    let wide = sized(&mut self.buffers.wide, rows * 2 * hidden);
                    linear(cpu, rows, normed, [up, &[]], wide)?;
                    let gated = sized(&mut self.buffers.attended, rows * hidden);
                    gate(wide, hidden, gated);
                    linear(cpu, rows, gated, [down, &[]], narrow)?;
                }
                FeedForward::Memory(memory) => {
                    let buffers = [&mut self.buffers.memory, &mut self.buffers.scratch];
                    let reads = memory.run(cpu, normed, narrow, buffers)?;
                    if self.keep_reads {
                        let skip = (rows - self.batch) / self.batch;
                        self.reads.push(last_reads(reads, self.batch, skip + 1));
                    }
                }
            }
            add(&mut x, narrow);
        }
        self.past += s;
        let normed = sized(&mut self.buffers.normed, self.batch * d);
        norm(cpu, &x, self.reader.norm, normed)?;
        let vocab = self.reader.config.vocab;
        let logits = sized(&mut self.buffers.logits, self.batch * vocab);
        linear(cpu, self.batch, normed, [self.reader.embedding, &[]], logits)?;
        Ok(logits.chunks_exact(vocab).map(greatest).collect())
    }

    /// What sequence `i` read at the last step.
    fn reads_of(&self, i: usize) -> Vec<Read> {
        let mut all = Vec::new();
        for (slots, weights) in &self.reads {
            let bag = slots.len() / self.batch;
            let range = i * bag..(i + 1) * bag;
            all.extend(slots[range.clone()].iter().zip(&weights[range]).map(|(&slot, &weight)| Read { slot, weight }));
        }
        all
    }
}

/// Of the bags of `[B, S]` tokens, those of the last token of each sequence.
fn last_reads((slots, weights): (&[u32], &[f32]), batch: usize, s: usize) -> (Vec<u32>, Vec<f32>) {
    let bag = slots.len() / (batch * s).max(1);
    let mut out = (Vec::new(), Vec::new());
    for b in 0..batch {
        let range = ((b + 1) * s - 1) * bag..(b + 1) * s * bag;
        out.0.extend_from_slice(&slots[range.clone()]);
        out.1.extend_from_slice(&weights[range]);
    }
    out
}

/// Moves the last of every `s` rows of both to the front; says how many they are.
fn keep_last(x: &mut Vec<f32>, attended: &mut [f32], s: usize, d: usize) -> usize {
    let sequences = x.len() / (s * d);
    for b in 0..sequences {
        let from = ((b + 1) * s - 1) * d;
        x.copy_within(from..from + d, b * d);
        attended.copy_within(from..from + d, b * d);
    }
    x.truncate(sequences * d);
    sequences
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// The sizes of an attention with a cache.
struct Attend {
    heads: usize,
    d: usize,
    s: usize,
    past: usize,
    capacity: usize,
}

impl Attend {
    /// Puts the keys and values of `qkv` (`[B, S, 3·D]`) into the cache and attends from its queries.
    fn run(&self, qkv: &mut [f32], keys: &mut [f32], values: &mut [f32], out: &mut [f32]) {
        let (d, row) = (self.d, self.capacity * self.d);
        let sequences = qkv.par_chunks_mut(self.s * 3 * d).zip(out.par_chunks_mut(self.s * d));
        let caches = keys.par_chunks_mut(row).zip(values.par_chunks_mut(row));
        sequences.zip(caches).with_min_len(8).for_each(|((qkv, out), (keys, values))| {
            self.sequence(qkv, keys, values, out);
        });
    }

    fn sequence(&self, qkv: &mut [f32], keys: &mut [f32], values: &mut [f32], out: &mut [f32]) {
        let (d, w) = (self.d, self.d / self.heads);
        // The cache holds each head's rows one after the other: `[heads, capacity, width]`.
        let place = |h: usize, t: usize| (h * self.capacity + t) * w;
        let mut turned = vec![0.0; w];
        for (t, qkv) in qkv.chunks_exact_mut(3 * d).enumerate() {
            let (position, (q, kv)) = (self.past + t, qkv.split_at_mut(d));
            angles(position, &mut turned);
            for h in 0..self.heads {
                turn(&mut q[h * w..(h + 1) * w], &turned);
                let at = place(h, position);
                keys[at..at + w].copy_from_slice(&kv[h * w..(h + 1) * w]);
                turn(&mut keys[at..at + w], &turned);
                values[at..at + w].copy_from_slice(&kv[d + h * w..][..w]);
            }
        }
        let mut p = vec![0.0; self.past + self.s];
        out.fill(0.0);
        for (t, (qkv, out)) in qkv.chunks_exact(3 * d).zip(out.chunks_exact_mut(d)).enumerate() {
            let p = &mut p[..=self.past + t];
            for h in 0..self.heads {
                let out = &mut out[h * w..(h + 1) * w];
                softmax_scores(&qkv[h * w..(h + 1) * w], &keys[place(h, 0)..], p);
                for (p, v) in p.iter().zip(values[place(h, 0)..].chunks_exact(w)) {
                    add_scaled(out, *p, v);
                }
            }
        }
    }
}

fn norm(cpu: &Cpu, x: &[f32], gain: &[f32], out: &mut [f32]) -> Result<()> {
    let dims = NormDims { rows: x.len() / gain.len(), dim: gain.len(), groups: 1, repeat: 1 };
    Ok(cpu.rms_norm(RmsNorm { dims, x, gain, out })?)
}

/// `x · weightᵀ + bias`; an empty bias is none.
fn linear(cpu: &Cpu, tokens: usize, x: &[f32], [weight, bias]: [&[f32]; 2], out: &mut [f32]) -> Result<()> {
    let bias = (!bias.is_empty()).then_some(bias);
    Ok(cpu.linear(Linear { tokens, x, weight, bias, out })?)
}

impl Memory<'_> {
    /// Runs the layer over `x` into `out`; gives the slots read and their weights.
    fn run<'b>(
        &self,
        cpu: &Cpu,
        x: &[f32],
        out: &mut [f32],
        buffers: [&'b mut Workspace; 2],
    ) -> Result<(&'b [u32], &'b [f32])> {
        match &self.tables {
            Tables::F32(keys, values) => self.run_over(cpu, x, out, buffers, keys, values),
            Tables::Int8(keys, values) => self.run_over(cpu, x, out, buffers, keys, values),
            Tables::E4m3(keys, values) => self.run_over(cpu, x, out, buffers, keys, values),
            Tables::E5m2(keys, values) => self.run_over(cpu, x, out, buffers, keys, values),
        }
    }

    fn run_over<'b, S: RowStore + Sync>(
        &self,
        cpu: &Cpu,
        x: &[f32],
        out: &mut [f32],
        [memory, scratch]: [&'b mut Workspace; 2],
        keys: &S,
        values: &S,
    ) -> Result<(&'b [u32], &'b [f32])> {
        let tokens = x.len() / self.config.input_dim();
        let params = Params {
            query: Projection::<Cpu> { weight: self.query[0], bias: Some(self.query[1]) },
            keys: Keys::Packed(keys),
            query_gain: Some(self.query_gain),
            values,
            experts: None,
            silu: Some(Projection { weight: self.silu[0], bias: Some(self.silu[1]) }),
            value_proj: Some(Projection { weight: self.value_proj[0], bias: Some(self.value_proj[1]) }),
            sigmoid: None,
        };
        let mut act = Activations::new(&self.config, tokens, lend(memory, self.config.activations_req(tokens)))?;
        let req = layer::forward_scratch::<S, S, Cpu>(cpu, &self.config, tokens);
        layer::forward(cpu, &self.config, &params, x, &mut act, out, lend(scratch, req))?;
        Ok((act.ids, act.weights))
    }
}
