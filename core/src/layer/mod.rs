//! The whole way through a layer, [`forward`] and [`backward`]. It is the only module that knows it all, and it holds no
//! arithmetic.
//!
//! ```text
//! x [T,D] --query--> q [T,H,P,C] --(qk-norm)--> select over keys [H,P,N,C] --> ids, scores, weights [T,L]
//! memory:  y [T,V] = bag_sum(values, ids, weights)
//! peer:    a [T,L] = bag_dot(experts, x),  c = weights · gelu(a),  y = bag_sum(values, ids, c)
//! --(SiLU gate)--> y · silu(x Wg + bg) --(value projection)--> [T,O] --(sigmoid gate)--> · sigmoid(x ws + bs) --> out
//! ```
//!
//! The gradient of the value rows is sparse and belongs to the caller: [`backward`] leaves `dy` and the bags, from
//! which [`crate::ops::RowReduce::plan`] and [`crate::ops::RowUpdate::reduce_and_update`] change the touched rows.
//! Layers that share a pool of values put their ids, weights and `dy` one after the other and make one plan. A layer
//! with a table of its own, whose gradients need no norm first, has it changed by [`backward_and_update`], which reads
//! each touched row once for its dots and its update.

mod backward;
mod forward;

use crate::config::{Config, Kind};
use crate::device::{Device, Scratch};
use crate::error::{ArgError, check_len, product};
use crate::ops::dense::{Linear, NormDims};
use crate::ops::{Dense, EmbeddingBag, SelectRows};
use crate::storage::Table;

pub use backward::{
    Grads, ProjectionGrads, TableUpdate, backward, backward_and_update, backward_and_update_scratch, backward_scratch,
};
pub use forward::{forward, forward_scratch};

/// What a layer with values of type `V` and packed keys of type `K` needs of a device.
pub trait Backend<V: Table, K: Table>:
    Device + EmbeddingBag<V> + SelectRows<K> + for<'x> SelectRows<<Self as Device>::Rows<'x>> + Dense
{
}
impl<V: Table, K: Table, D> Backend<V, K> for D where
    D: Device + EmbeddingBag<V> + SelectRows<K> + for<'x> SelectRows<<D as Device>::Rows<'x>> + Dense
{
}

/// A linear map: `x · weightᵀ + bias`.
pub struct Projection<'a, D: Device> {
    /// `[outputs, inputs]`.
    pub weight: D::View<'a, D::Scalar>,
    /// `[outputs]`.
    pub bias: Option<D::View<'a, D::Scalar>>,
}

impl<D: Device> Clone for Projection<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Projection<'_, D> {}

/// The sub-keys.
pub enum Keys<'a, D: Device, K> {
    /// `[H, P, N, C]` as they are trained, and with qk-norm their gain `[H, P, C]`.
    Trained {
        /// The sub-keys.
        keys: D::View<'a, D::Scalar>,
        /// The gain of their norm.
        gain: Option<D::View<'a, D::Scalar>>,
    },
    /// Rows `[H, P, N]` of width C, packed for inference; norm and gain are already in them.
    Packed(&'a K),
}

/// The parameters of a layer, where they lie: values in a table of type `V`, experts in one of type `E`, packed keys
/// in one of type `K`.
pub struct Params<'a, D: Device, V, K, E = V> {
    /// D to `H·P·C`.
    pub query: Projection<'a, D>,
    /// The sub-keys.
    pub keys: Keys<'a, D, K>,
    /// `[H, P, C]`: the gain of the norm of queries, with qk-norm.
    pub query_gain: Option<D::View<'a, D::Scalar>>,
    /// `[N^P, V]`.
    pub values: &'a V,
    /// `[N^P, D]`: PEER's `u`.
    pub experts: Option<&'a E>,
    /// D to V, with the SiLU gate.
    pub silu: Option<Projection<'a, D>>,
    /// V to O, where [`Config::value_proj`] says so.
    pub value_proj: Option<Projection<'a, D>>,
    /// D to 1, with the sigmoid gate.
    pub sigmoid: Option<Projection<'a, D>>,
}

impl<D: Device, V: Table, K: Table, E: Table> Params<'_, D, V, K, E> {
    fn check(&self, config: &Config) -> Result<(), ArgError> {
        const OP: &str = "layer";
        let (d, v, o, q) = (config.input_dim(), config.value_dim(), config.output_dim(), config.query_len());
        projection(OP, "query_proj", Some(&self.query), true, q, d)?;
        projection(OP, "swilu_projection", self.silu.as_ref(), config.silu_gate(), v, d)?;
        projection(OP, "value_proj", self.value_proj.as_ref(), config.value_proj(), o, v)?;
        projection(OP, "gating", self.sigmoid.as_ref(), config.sigmoid_gate(), 1, d)?;
        optional::<D>(OP, "query_norm", self.query_gain, config.qk_norm(), config.gain_len())?;
        match &self.keys {
            Keys::Trained { keys, gain } => {
                check_len(OP, "keys", config.keys_len(), D::len(*keys))?;
                optional::<D>(OP, "key_norm", *gain, config.qk_norm(), config.gain_len())?;
            }
            Keys::Packed(keys) => {
                check_len(OP, "rows of keys", config.key_rows(), keys.rows())?;
                check_len(OP, "width of keys", config.half_dim(), keys.dim())?;
            }
        }
        check_len(OP, "rows of values", config.slots(), self.values.rows())?;
        check_len(OP, "width of values", v, self.values.dim())?;
        let peer = matches!(config.kind(), Kind::Peer);
        if self.experts.is_some() != peer {
            return Err(ArgError::Presence { op: OP, operand: "experts", needed: peer });
        }
        if let Some(experts) = self.experts {
            check_len(OP, "rows of experts", config.slots(), experts.rows())?;
            check_len(OP, "width of experts", d, experts.dim())?;
        }
        Ok(())
    }
}

fn projection<D: Device>(
    op: &'static str,
    operand: &'static str,
    projection: Option<&Projection<'_, D>>,
    needed: bool,
    outputs: usize,
    inputs: usize,
) -> Result<(), ArgError> {
    match projection {
        Some(p) if needed => {
            check_len(op, operand, outputs * inputs, D::len(p.weight))?;
            p.bias.map_or(Ok(()), |bias| check_len(op, operand, outputs, D::len(bias)))
        }
        None if !needed => Ok(()),
        _ => Err(ArgError::Presence { op, operand, needed }),
    }
}

fn optional<D: Device>(
    op: &'static str,
    operand: &'static str,
    view: Option<D::View<'_, D::Scalar>>,
    needed: bool,
    len: usize,
) -> Result<(), ArgError> {
    match view {
        Some(view) if needed => check_len(op, operand, len, D::len(view)),
        None if !needed => Ok(()),
        _ => Err(ArgError::Presence { op, operand, needed }),
    }
}

/// What [`forward`] leaves for [`backward`] and for who wants to see which slots were read.
pub struct Activations<'a, D: Device> {
    /// `[T, L]`: the slots read, best first in each head.
    pub ids: D::ViewMut<'a, u32>,
    /// `[T, L]`: their scores.
    pub scores: D::ViewMut<'a, D::Scalar>,
    /// `[T, L]`: the softmax of the scores in each head.
    pub weights: D::ViewMut<'a, D::Scalar>,
    /// `[T, V]`: the weighted sums.
    pub y: D::ViewMut<'a, D::Scalar>,
    /// `[T, H, P, C]`, before the norm.
    queries: D::ViewMut<'a, D::Scalar>,
    norm: Option<Normed<'a, D>>,
    peer: Option<Peer<'a, D>>,
    silu: Option<SiluState<'a, D>>,
    sigmoid: Option<SigmoidState<'a, D>>,
}

struct Normed<'a, D: Device> {
    queries: D::ViewMut<'a, D::Scalar>,
    keys: D::ViewMut<'a, D::Scalar>,
}

struct Peer<'a, D: Device> {
    /// `[T, L]`: `<x, u>`.
    dots: D::ViewMut<'a, D::Scalar>,
    /// `[T, L]`: weight times GELU of the dot.
    coefficients: D::ViewMut<'a, D::Scalar>,
}

struct SiluState<'a, D: Device> {
    /// `[T, V]`, before SiLU.
    gate: D::ViewMut<'a, D::Scalar>,
    /// `[T, V]`.
    gated: D::ViewMut<'a, D::Scalar>,
}

struct SigmoidState<'a, D: Device> {
    /// `[T]`, before the sigmoid.
    gate: D::ViewMut<'a, D::Scalar>,
    /// `[T, O]`: what the gate is applied to.
    out: D::ViewMut<'a, D::Scalar>,
}

impl<'a, D: Device> Activations<'a, D> {
    /// Lays them out in the first [`Config::activations_req`] of `memory`.
    ///
    /// # Errors
    /// [`ArgError::Scratch`] if it is smaller.
    pub fn new(config: &Config, tokens: usize, memory: Scratch<'a, D>) -> Result<Self, ArgError> {
        memory.check("activations", config.activations_req(tokens))?;
        let (bags, v, q) = (tokens * config.bag_len(), tokens * config.value_dim(), tokens * config.query_len());
        let (ids, memory) = memory.take_ids(bags);
        let (scores, memory) = memory.take_reals(bags);
        let (weights, memory) = memory.take_reals(bags);
        let (y, memory) = memory.take_reals(v);
        let (queries, memory) = memory.take_reals(q);
        let (qk, peer) = (config.qk_norm(), matches!(config.kind(), Kind::Peer));
        let (silu, sigmoid) = (config.silu_gate(), config.sigmoid_gate());
        let when = |wanted: bool, len: usize| if wanted { len } else { 0 };
        let (normed_queries, memory) = memory.take_reals(when(qk, q));
        let (normed_keys, memory) = memory.take_reals(when(qk, config.keys_len()));
        let (dots, memory) = memory.take_reals(when(peer, bags));
        let (coefficients, memory) = memory.take_reals(when(peer, bags));
        let (silu_gate, memory) = memory.take_reals(when(silu, v));
        let (gated, memory) = memory.take_reals(when(silu, v));
        let (sigmoid_gate, memory) = memory.take_reals(when(sigmoid, tokens));
        let (out, _) = memory.take_reals(when(sigmoid, tokens * config.output_dim()));
        Ok(Self {
            ids,
            scores,
            weights,
            y,
            queries,
            norm: qk.then_some(Normed { queries: normed_queries, keys: normed_keys }),
            peer: peer.then_some(Peer { dots, coefficients }),
            silu: silu.then_some(SiluState { gate: silu_gate, gated }),
            sigmoid: sigmoid.then_some(SigmoidState { gate: sigmoid_gate, out }),
        })
    }

    /// `[T, L]`: what the value rows were multiplied by: the weights, or PEER's weight times GELU.
    #[must_use]
    pub fn coefficients(&self) -> D::View<'_, D::Scalar> {
        D::read(self.peer.as_ref().map_or(&self.weights, |peer| &peer.coefficients))
    }
}

/// The number of tokens, if parameters, input, activations and output (or its gradient) fit the configuration.
fn check_call<D: Device, V: Table, K: Table, E: Table>(
    config: &Config,
    params: &Params<'_, D, V, K, E>,
    x: D::View<'_, D::Scalar>,
    act: &Activations<'_, D>,
    operand: &'static str,
    out: usize,
) -> Result<usize, ArgError> {
    const OP: &str = "layer";
    params.check(config)?;
    let len = D::len(x);
    if !len.is_multiple_of(config.input_dim()) {
        return Err(ArgError::Size { op: OP, operand: "x", found: len, multiple_of: config.input_dim() });
    }
    let tokens = len.checked_div(config.input_dim()).unwrap_or(0);
    check_len(OP, operand, product(&[tokens, config.output_dim()]), out)?;
    check_len(OP, "activations (ids)", product(&[tokens, config.bag_len()]), D::len_mut(&act.ids))?;
    check_len(OP, "activations (queries)", product(&[tokens, config.query_len()]), D::len_mut(&act.queries))?;
    check_len(OP, "activations (sums)", product(&[tokens, config.value_dim()]), D::len_mut(&act.y))?;
    let presences = [
        ("activations of qk-norm", act.norm.is_some(), config.qk_norm()),
        ("activations of peer", act.peer.is_some(), matches!(config.kind(), Kind::Peer)),
        ("activations of the SiLU gate", act.silu.is_some(), config.silu_gate()),
        ("activations of the sigmoid gate", act.sigmoid.is_some(), config.sigmoid_gate()),
    ];
    for (operand, found, needed) in presences {
        if found != needed {
            return Err(ArgError::Presence { op: OP, operand, needed });
        }
    }
    Ok(tokens)
}

fn query_norm(config: &Config, tokens: usize) -> NormDims {
    let groups = config.heads() * config.parts();
    NormDims { rows: tokens * groups, dim: config.half_dim(), groups, repeat: 1 }
}

fn key_norm(config: &Config) -> NormDims {
    let groups = config.heads() * config.parts();
    NormDims { rows: config.key_rows(), dim: config.half_dim(), groups, repeat: config.sub_keys() }
}

fn linear<D: Dense>(
    device: &D,
    tokens: usize,
    x: D::View<'_, D::Scalar>,
    projection: &Projection<'_, D>,
    mut out: D::ViewMut<'_, D::Scalar>,
) -> Result<(), D::Error> {
    let out = D::reborrow(&mut out);
    let (weight, bias) = (D::shorten(projection.weight), projection.bias.map(D::shorten));
    device.linear(Linear { tokens, x: D::shorten(x), weight, bias, out })
}
