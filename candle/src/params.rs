//! A layer's dense parameters: their published names, and their places in one flat vector.
//!
//! candle's custom operations take three tensors at most. The layer therefore sees its parameters as one flat tensor,
//! concatenated from variables of their own: an optimizer, a checkpoint or another framework sees those.

use candle_nn::Init;
use memlayer_core::layer::{Grads, Keys, Params, Projection, ProjectionGrads};
use memlayer_core::{Config, Table};

use crate::backend::Backend;

/// How parameters start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerInit {
    /// With qk-norm: the gain of queries and of sub-keys. A score is then about `gain² · sqrt(C) · cos`, so larger
    /// gains make sharper selections.
    pub gain: f64,
}

impl Default for LayerInit {
    fn default() -> Self {
        Self { gain: 1.0 }
    }
}

/// One parameter.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) init: Init,
}

/// Uniform within `1 / sqrt(fan_in)`: PyTorch's default for linear maps, and the published one for sub-keys.
fn fan_in(fan_in: usize) -> Init {
    let bound = 1.0 / (fan_in as f64).sqrt();
    Init::Uniform { lo: -bound, up: bound }
}

/// The parameters of a layer in the order of the flat vector.
pub(crate) fn specs(config: &Config, init: &LayerInit) -> Vec<Spec> {
    let (d, v, o, q) = (config.input_dim(), config.value_dim(), config.output_dim(), config.query_len());
    let mut specs = Vec::new();
    let mut push = |name, shape: &[usize], init| specs.push(Spec { name, shape: shape.to_vec(), init });
    push("query_proj.query_mlps.0.weight", &[q, d], fan_in(d));
    push("query_proj.query_mlps.0.bias", &[q], fan_in(d));
    push("keys", &[config.key_rows(), config.half_dim()], fan_in(config.half_dim()));
    if config.qk_norm() {
        let shape = [config.heads(), config.parts() * config.half_dim()];
        push("query_norm.weight", &shape, Init::Const(init.gain));
        push("key_norm.weight", &shape, Init::Const(init.gain));
    }
    if config.silu_gate() {
        push("swilu_projection.weight", &[v, d], fan_in(d));
        push("swilu_projection.bias", &[v], Init::Const(0.0));
    }
    if config.value_proj() {
        push("value_proj.weight", &[o, v], fan_in(v));
        push("value_proj.bias", &[o], Init::Const(0.0));
    }
    if config.sigmoid_gate() {
        push("gating.weight", &[1, d], fan_in(d));
        push("gating.bias", &[1], Init::Const(0.0));
    }
    specs
}

/// Cuts a flat vector into the parameters of a configuration, in the order of [`specs`].
fn cut<T>(config: &Config, mut take: impl FnMut(usize) -> T) -> Cut<T> {
    let (d, v, o, q) = (config.input_dim(), config.value_dim(), config.output_dim(), config.query_len());
    let pair = |there: bool, outputs: usize, inputs: usize, take: &mut dyn FnMut(usize) -> T| {
        there.then(|| (take(outputs * inputs), take(outputs)))
    };
    let take: &mut dyn FnMut(usize) -> T = &mut take;
    Cut {
        query: (take(q * d), take(q)),
        keys: take(config.keys_len()),
        query_gain: config.qk_norm().then(|| take(config.gain_len())),
        key_gain: config.qk_norm().then(|| take(config.gain_len())),
        silu: pair(config.silu_gate(), v, d, take),
        value_proj: pair(config.value_proj(), o, v, take),
        sigmoid: pair(config.sigmoid_gate(), 1, d, take),
    }
}

struct Cut<T> {
    query: (T, T),
    keys: T,
    query_gain: Option<T>,
    key_gain: Option<T>,
    silu: Option<(T, T)>,
    value_proj: Option<(T, T)>,
    sigmoid: Option<(T, T)>,
}

/// The parameters in `flat`, with trained keys.
pub(crate) fn trained<'a, B: Backend, V: Table>(
    config: &Config,
    flat: B::View<'a, f32>,
    values: &'a V,
    experts: Option<&'a V>,
) -> Params<'a, B, V, B::Rows<'a>> {
    let mut at = 0;
    let c = cut(config, |len| {
        at += len;
        B::slice(flat, at - len..at)
    });
    let projection = |(weight, bias)| Projection { weight, bias: Some(bias) };
    Params {
        query: projection(c.query),
        keys: Keys::Trained { keys: c.keys, gain: c.key_gain },
        query_gain: c.query_gain,
        values,
        experts,
        silu: c.silu.map(projection),
        value_proj: c.value_proj.map(projection),
        sigmoid: c.sigmoid.map(projection),
    }
}

/// Asks for the gradients of all parameters, in `flat`.
pub(crate) fn grads<'a, B: Backend>(config: &Config, flat: B::ViewMut<'a, f32>, grads: &mut Grads<'a, B>) {
    let mut rest = Some(flat);
    let c = cut(config, |len| {
        let (head, tail) = B::split(rest.take().expect("each cut puts the rest back"), len);
        rest = Some(tail);
        head
    });
    let projection = |pair: Option<(B::ViewMut<'a, f32>, B::ViewMut<'a, f32>)>| match pair {
        Some((weight, bias)) => ProjectionGrads { weight: Some(weight), bias: Some(bias) },
        None => ProjectionGrads::default(),
    };
    grads.query = projection(Some(c.query));
    grads.keys = Some(c.keys);
    grads.query_gain = c.query_gain;
    grads.key_gain = c.key_gain;
    grads.silu = projection(c.silu);
    grads.value_proj = projection(c.value_proj);
    grads.sigmoid = projection(c.sigmoid);
}
