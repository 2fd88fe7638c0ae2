//! One answer: the model, token after token, with a cache of keys and values.

use memlayer_core::layer::Backend;
use memlayer_core::layer::{self, Activations, Keys, Params, Projection};
use memlayer_core::ops::dense::{Linear, NormDims, RmsNorm};
use memlayer_core::{ArgError, Scratch, Table};

use crate::error::Error;
use crate::math::{add_scaled, angles, gate, greatest, softmax_scores, turn};
use crate::model::{FeedForward, Memory, Model, Runs, Tables};

/// The state of an answer, all of it in the caller's scratch.
pub(crate) struct Session<'m, 'b, 'a, 's, D: Runs> {
    model: &'m Model<'b, 'a>,
    device: &'m D,
    /// Tokens the cache holds.
    past: usize,
    /// Tokens it holds at most.
    capacity: usize,
    buffers: Buffers<'s>,
    /// For the memory layers.
    memory: Scratch<'s, D>,
}

/// Where the numbers of a token are.
struct Buffers<'s> {
    /// `[D]`: the token.
    x: &'s mut [f32],
    /// `[D]`.
    normed: &'s mut [f32],
    /// `[D]`: what is added to the token.
    added: &'s mut [f32],
    /// `[max(3·D, 2·hidden)]`.
    wide: &'s mut [f32],
    /// `[max(D, hidden)]`.
    gated: &'s mut [f32],
    /// `[2, width / 2]`, of the token's position.
    angles: &'s mut [f32],
    /// `[capacity]`: the probabilities of a head.
    attention: &'s mut [f32],
    /// `[vocab]`.
    logits: &'s mut [f32],
    /// `[layers, 2, heads, capacity, width]`: keys, then values.
    cache: &'s mut [f32],
}

impl<'m, 'b, 'a, 's, D: Runs> Session<'m, 'b, 'a, 's, D> {
    /// Room for `capacity` tokens in `scratch`.
    pub(crate) fn new(
        model: &'m Model<'b, 'a>,
        device: &'m D,
        capacity: usize,
        scratch: Scratch<'s, D>,
    ) -> Result<Self, Error> {
        scratch.check("answer", model.scratch(device, capacity))?;
        let sizes = &model.sizes;
        let (d, hidden) = (sizes.dim, sizes.hidden);
        let (x, scratch) = scratch.take_reals(d);
        let (normed, scratch) = scratch.take_reals(d);
        let (added, scratch) = scratch.take_reals(d);
        let (wide, scratch) = scratch.take_reals((3 * d).max(2 * hidden));
        let (gated, scratch) = scratch.take_reals(d.max(hidden));
        let (angles, scratch) = scratch.take_reals(sizes.head_dim());
        let (attention, scratch) = scratch.take_reals(capacity);
        let (logits, scratch) = scratch.take_reals(sizes.vocab);
        let (cache, memory) = scratch.take_reals(2 * sizes.layers * d * capacity);
        let buffers = Buffers { x, normed, added, wide, gated, angles, attention, logits, cache };
        Ok(Self { model, device, past: 0, capacity, buffers, memory })
    }

    /// Takes a token in.
    pub(crate) fn put(&mut self, token: u32) -> Result<(), Error> {
        self.step(token, false)
    }

    /// Takes a token in and gives the most likely next one.
    pub(crate) fn next(&mut self, token: u32) -> Result<u32, Error> {
        self.step(token, true)?;
        let Buffers { x, normed, logits, .. } = &mut self.buffers;
        norm(self.device, x, self.model.norm, normed)?;
        linear(self.device, normed, [self.model.embedding, &[]], logits)?;
        Ok(greatest(logits))
    }

    /// Runs the blocks over a token; of one that nothing is asked of, only as far as later tokens see it.
    fn step(&mut self, token: u32, wanted: bool) -> Result<(), Error> {
        let (model, device) = (self.model, self.device);
        let sizes = &model.sizes;
        let d = sizes.dim;
        let (position, limit) = (self.past, self.capacity);
        if position >= limit {
            return Err(Error::TooLong { found: position + 1, limit });
        }
        let start = (token as usize).saturating_mul(d);
        let row = model.embedding.get(start..start.saturating_add(d));
        let row = row.ok_or(Error::Token { token, vocab: sizes.vocab })?;
        copy(self.buffers.x, row);
        angles(position, self.buffers.angles);
        let last = model.blocks.len().saturating_sub(1);
        for (layer, block) in model.blocks.iter().enumerate() {
            let buffers = &mut self.buffers;
            norm(device, buffers.x, block.attention_norm, buffers.normed)?;
            let (qkv, _) = split(buffers.wide, 3 * d);
            linear(device, buffers.normed, [block.qkv, &[]], qkv)?;
            let attended = layer != last || wanted;
            self.attend(layer, attended);
            if !attended {
                break;
            }
            let buffers = &mut self.buffers;
            let (mixed, _) = split(buffers.gated, d);
            linear(device, mixed, [block.out, &[]], buffers.added)?;
            add(buffers.x, buffers.added);
            norm(device, buffers.x, block.feed_forward_norm, buffers.normed)?;
            match &block.feed_forward {
                FeedForward::Dense { up, down } => {
                    let (wide, _) = split(buffers.wide, 2 * sizes.hidden);
                    linear(device, buffers.normed, [up, &[]], wide)?;
                    let (gated, _) = split(buffers.gated, sizes.hidden);
                    gate(wide, sizes.hidden, gated);
                    linear(device, gated, [down, &[]], buffers.added)?;
                }
                FeedForward::Memory(memory) => {
                    run(memory, device, buffers.normed, buffers.added, self.memory.reborrow())?;
                }
            }
            add(self.buffers.x, self.buffers.added);
        }
        self.past += 1;
        Ok(())
    }

    /// Puts the token's keys and values (in `wide`, behind its queries) into the cache of a block, and, if it is asked for,
    /// the sums of the values it attends to into `gated`.
    fn attend(&mut self, layer: usize, wanted: bool) {
        let (d, width) = (self.model.sizes.dim, self.model.sizes.head_dim());
        let (position, capacity) = (self.past, self.capacity);
        let Buffers { wide, gated, angles, attention, cache, .. } = &mut self.buffers;
        let (q, rest) = split(wide, d);
        let (k, rest) = split(rest, d);
        let (v, _) = split(rest, d);
        let Some(cache) = cache.chunks_exact_mut((2 * d * capacity).max(1)).nth(layer) else { return };
        let (keys, values) = split(cache, d * capacity);
        let one = (width * capacity).max(1);
        let caches = keys.chunks_exact_mut(one).zip(values.chunks_exact_mut(one));
        let width = width.max(1);
        let parts = q.chunks_exact_mut(width).zip(k.chunks_exact_mut(width).zip(v.chunks_exact(width)));
        for (((q, (k, v)), (keys, values)), out) in parts.zip(caches).zip(gated.chunks_exact_mut(width)) {
            turn(k, angles);
            let at = position * width;
            for (row, new) in [(&mut *keys, &*k), (&mut *values, v)] {
                if let Some(row) = row.get_mut(at..at + width) {
                    copy(row, new);
                }
            }
            if !wanted {
                continue;
            }
            turn(q, angles);
            let (p, _) = split(attention, position + 1);
            softmax_scores(q, keys, p);
            out.fill(0.0);
            for (p, v) in p.iter().zip(values.chunks_exact(width)) {
                add_scaled(out, *p, v);
            }
        }
    }
}

/// The first `len` values, or as many as there are, and the rest.
fn split(values: &mut [f32], len: usize) -> (&mut [f32], &mut [f32]) {
    let len = len.min(values.len());
    values.split_at_mut(len)
}

fn copy(to: &mut [f32], from: &[f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

fn norm<D: Runs>(device: &D, x: &[f32], gain: &[f32], out: &mut [f32]) -> Result<(), ArgError> {
    let dims = NormDims { rows: 1, dim: gain.len(), groups: 1, repeat: 1 };
    device.rms_norm(RmsNorm { dims, x, gain, out })
}

/// `x · weightᵀ + bias`; an empty bias is none.
fn linear<D: Runs>(device: &D, x: &[f32], [weight, bias]: [&[f32]; 2], out: &mut [f32]) -> Result<(), ArgError> {
    let bias = (!bias.is_empty()).then_some(bias);
    device.linear(Linear { tokens: 1, x, weight, bias, out })
}

/// Runs a memory layer over `x` into `out`.
fn run<D: Runs>(
    memory: &Memory<'_>,
    device: &D,
    x: &[f32],
    out: &mut [f32],
    scratch: Scratch<'_, D>,
) -> Result<(), ArgError> {
    match &memory.tables {
        Tables::F32(keys, values) => run_over(memory, device, x, out, scratch, keys, values),
        Tables::Int8(keys, values) => run_over(memory, device, x, out, scratch, keys, values),
        Tables::E4m3(keys, values) => run_over(memory, device, x, out, scratch, keys, values),
        Tables::E5m2(keys, values) => run_over(memory, device, x, out, scratch, keys, values),
    }
}

fn run_over<S: Table, D: Runs + Backend<S, S>>(
    memory: &Memory<'_>,
    device: &D,
    x: &[f32],
    out: &mut [f32],
    scratch: Scratch<'_, D>,
    keys: &S,
    values: &S,
) -> Result<(), ArgError> {
    let config = &memory.config;
    let projection = |[weight, bias]: [_; 2]| Projection { weight, bias: Some(bias) };
    let params = Params {
        query: projection(memory.query),
        keys: Keys::Packed(keys),
        query_gain: Some(memory.query_gain),
        values,
        experts: None,
        silu: Some(projection(memory.silu)),
        value_proj: Some(projection(memory.value_proj)),
        sigmoid: None,
    };
    let req = config.activations_req(1);
    scratch.check("answer", req)?;
    let (reals, scratch) = scratch.take_reals(req.reals);
    let (ids, scratch) = scratch.take_ids(req.ids);
    let mut act = Activations::new(config, 1, Scratch { reals, ids })?;
    layer::forward(device, config, &params, x, &mut act, out, scratch)
}
