//! The whole way through a layer, forward and backward. It is the only file that knows it all, and it holds no
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
//! Layers that share a pool of values put their ids, weights and `dy` one after the other and make one plan.

use crate::config::{Config, Kind};
use crate::device::{Device, Scratch, ScratchReq};
use crate::error::{ArgError, check_len, product};
use crate::ops::bag::{BagDot, BagSum};
use crate::ops::dense::{Gate, GateBackward, Linear, LinearBackward, NormDims, RmsNorm, RmsNormBackward};
use crate::ops::select::{Select, SelectBackward, SelectDims};
use crate::ops::{Dense, EmbeddingBag, SelectRows};
use crate::storage::Table;

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

/// The parameters of a layer, where they lie.
pub struct Params<'a, D: Device, V, K> {
    /// D to `H·P·C`.
    pub query: Projection<'a, D>,
    /// The sub-keys.
    pub keys: Keys<'a, D, K>,
    /// `[H, P, C]`: the gain of the norm of queries, with qk-norm.
    pub query_gain: Option<D::View<'a, D::Scalar>>,
    /// `[N^P, V]`.
    pub values: &'a V,
    /// `[N^P, D]`: PEER's `u`.
    pub experts: Option<&'a V>,
    /// D to V, with the SiLU gate.
    pub silu: Option<Projection<'a, D>>,
    /// V to O, where [`Config::value_proj`] says so.
    pub value_proj: Option<Projection<'a, D>>,
    /// D to 1, with the sigmoid gate.
    pub sigmoid: Option<Projection<'a, D>>,
}

impl<D: Device, V: Table, K: Table> Params<'_, D, V, K> {
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

/// What [`forward`] needs besides the activations.
#[must_use]
pub fn forward_scratch<V: Table, K: Table, D: Backend<V, K>>(device: &D, config: &Config, tokens: usize) -> ScratchReq {
    let dims = SelectDims::new(config, tokens);
    let trained = <D as SelectRows<D::Rows<'_>>>::select_scratch(device, dims);
    trained.or(<D as SelectRows<K>>::select_scratch(device, dims))
}

/// Runs the layer over `x` (`[T, D]`) into `out` (`[T, O]`, overwritten), leaving in `activations` what
/// [`backward`] needs.
///
/// # Errors
/// [`ArgError`] if a size does not fit the configuration, an operand is missing or has no use, or the scratch is
/// smaller than [`forward_scratch`] says; or what the device reports.
pub fn forward<V: Table, K: Table, D: Backend<V, K>>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K>,
    x: D::View<'_, D::Scalar>,
    activations: &mut Activations<'_, D>,
    mut out: D::ViewMut<'_, D::Scalar>,
    scratch: Scratch<'_, D>,
) -> Result<(), D::Error> {
    let tokens = check_call::<V, K, D>(config, params, x, activations, "out", D::len_mut(&out))?;
    let act = activations;
    linear(device, tokens, x, &params.query, D::reborrow(&mut act.queries))?;
    if let (Some(norm), Some(gain)) = (&mut act.norm, params.query_gain) {
        let (x, out) = (D::read(&act.queries), D::reborrow(&mut norm.queries));
        device.rms_norm(RmsNorm { dims: query_norm(config, tokens), x, gain: D::shorten(gain), out })?;
    }
    let dims = SelectDims::new(config, tokens);
    let (ids, scores) = (D::reborrow(&mut act.ids), D::reborrow(&mut act.scores));
    let weights = D::reborrow(&mut act.weights);
    match &params.keys {
        Keys::Trained { keys, gain } => {
            let (queries, keys) = match (&mut act.norm, gain) {
                (Some(norm), Some(gain)) => {
                    let out = D::reborrow(&mut norm.keys);
                    device.rms_norm(RmsNorm {
                        dims: key_norm(config),
                        x: D::shorten(*keys),
                        gain: D::shorten(*gain),
                        out,
                    })?;
                    (D::read(&norm.queries), D::read(&norm.keys))
                }
                _ => (D::read(&act.queries), D::shorten(*keys)),
            };
            let keys = &D::rows(keys, config.half_dim());
            device.select(Select { dims, queries, keys, ids, scores, weights }, scratch)?;
        }
        Keys::Packed(keys) => {
            let queries = D::read(act.norm.as_ref().map_or(&act.queries, |norm| &norm.queries));
            device.select(Select { dims, queries, keys: *keys, ids, scores, weights }, scratch)?;
        }
    }

    let bag = config.bag_len();
    if let (Some(peer), Some(experts)) = (&mut act.peer, params.experts) {
        let (ids, out) = (D::read(&act.ids), D::reborrow(&mut peer.dots));
        device.bag_dot(experts, BagDot { bag, ids, vectors: D::shorten(x), out })?;
        let out = D::reborrow(&mut peer.coefficients);
        device.gelu_gate(Gate { y: D::read(&act.weights), gate: D::read(&peer.dots), out })?;
    }
    let weights = D::read(act.peer.as_ref().map_or(&act.weights, |peer| &peer.coefficients));
    device.bag_sum(
        params.values,
        BagSum { bag, ids: D::read(&act.ids), weights, out: D::reborrow(&mut act.y), accumulate: false },
    )?;

    let mut y = D::read(&act.y);
    if let (Some(silu), Some(projection)) = (&mut act.silu, &params.silu) {
        linear(device, tokens, x, projection, D::reborrow(&mut silu.gate))?;
        device.silu_gate(Gate { y: D::shorten(y), gate: D::read(&silu.gate), out: D::reborrow(&mut silu.gated) })?;
        y = D::read(&silu.gated);
    }
    match (&mut act.sigmoid, &params.sigmoid) {
        (Some(sigmoid), Some(projection)) => {
            linear(device, tokens, x, projection, D::reborrow(&mut sigmoid.gate))?;
            let y = match &params.value_proj {
                Some(projection) => {
                    linear(device, tokens, y, projection, D::reborrow(&mut sigmoid.out))?;
                    D::read(&sigmoid.out)
                }
                None => D::shorten(y),
            };
            device.sigmoid_gate(Gate { y, gate: D::read(&sigmoid.gate), out: D::reborrow(&mut out) })
        }
        _ => match &params.value_proj {
            Some(projection) => linear(device, tokens, y, projection, D::reborrow(&mut out)),
            None => device.copy(y, D::reborrow(&mut out)),
        },
    }
}

/// The gradients of a projection.
pub struct ProjectionGrads<'a, D: Device> {
    /// `[outputs, inputs]`, overwritten.
    pub weight: Option<D::ViewMut<'a, D::Scalar>>,
    /// `[outputs]`, overwritten.
    pub bias: Option<D::ViewMut<'a, D::Scalar>>,
}

impl<D: Device> Default for ProjectionGrads<'_, D> {
    fn default() -> Self {
        Self { weight: None, bias: None }
    }
}

impl<D: Device> ProjectionGrads<'_, D> {
    fn wanted(&self) -> bool {
        self.weight.is_some() || self.bias.is_some()
    }
}

/// Where [`backward`] writes. What is `None` is not computed; asking for the gradient of something the configuration
/// does not have is an error.
pub struct Grads<'a, D: Device> {
    /// `[T, D]`, overwritten.
    pub input: Option<D::ViewMut<'a, D::Scalar>>,
    /// The query projection's.
    pub query: ProjectionGrads<'a, D>,
    /// `[H, P, N, C]`, overwritten. Keys must be [`Keys::Trained`].
    pub keys: Option<D::ViewMut<'a, D::Scalar>>,
    /// `[H, P, C]`, overwritten.
    pub query_gain: Option<D::ViewMut<'a, D::Scalar>>,
    /// `[H, P, C]`, overwritten.
    pub key_gain: Option<D::ViewMut<'a, D::Scalar>>,
    /// The SiLU gate's projection's.
    pub silu: ProjectionGrads<'a, D>,
    /// The value projection's.
    pub value_proj: ProjectionGrads<'a, D>,
    /// The sigmoid gate's projection's.
    pub sigmoid: ProjectionGrads<'a, D>,
    /// `[T, V]`, overwritten: the gradient of the weighted sums. With [`Activations::coefficients`] it is the sparse
    /// gradient of the value rows (see [`crate::ops::plan::RowGradient`]).
    pub sums: D::ViewMut<'a, D::Scalar>,
    /// `[T, L]`, overwritten: the gradient of PEER's dots. With `x` it is the sparse gradient of the expert rows.
    /// Needed if that, the input's or any gradient behind the weights is; PEER only.
    pub dots: Option<D::ViewMut<'a, D::Scalar>>,
}

impl<'a, D: Device> Grads<'a, D> {
    /// Nothing but the gradient of the sums.
    #[must_use]
    pub fn new(sums: D::ViewMut<'a, D::Scalar>) -> Self {
        Self {
            input: None,
            query: ProjectionGrads::default(),
            keys: None,
            query_gain: None,
            key_gain: None,
            silu: ProjectionGrads::default(),
            value_proj: ProjectionGrads::default(),
            sigmoid: ProjectionGrads::default(),
            sums,
            dots: None,
        }
    }

    /// Whether a gradient is wanted that goes through the queries or the keys.
    fn through_selection(&self) -> bool {
        self.through_queries() || self.keys.is_some() || self.key_gain.is_some()
    }

    fn through_queries(&self) -> bool {
        self.input.is_some() || self.query.wanted() || self.query_gain.is_some()
    }
}

/// What [`backward`] needs besides the activations: for every gradient, asked for or not.
#[must_use]
pub fn backward_scratch<V: Table, K: Table, D: Backend<V, K>>(
    device: &D,
    config: &Config,
    tokens: usize,
) -> ScratchReq {
    let dims = SelectDims::new(config, tokens);
    let trained = <D as SelectRows<D::Rows<'_>>>::select_backward_scratch(device, dims, true);
    let select = trained.or(<D as SelectRows<K>>::select_backward_scratch(device, dims, false));
    ScratchReq::new(own_scratch(config, tokens), 0).and(select)
}

/// Scalars that backward keeps for itself; what is needed at different times shares its place.
fn own_scratch(config: &Config, tokens: usize) -> usize {
    let gates = tokens * (config.output_dim() + 1 + 2 * config.value_dim());
    let keys = if config.qk_norm() { config.keys_len() } else { 0 };
    let select = tokens * (2 * config.bag_len() + config.query_len()) + keys;
    gates.max(select)
}

/// The gradients of [`forward`], from `dout` (`[T, O]`), with the same `x`, parameters and activations.
///
/// # Errors
/// As [`forward`]; and [`ArgError::Presence`] if a gradient is asked for that the configuration has not, or that of
/// packed keys, or PEER's without [`Grads::dots`].
#[allow(clippy::too_many_arguments, reason = "what forward takes, and the gradients")]
pub fn backward<V: Table, K: Table, D: Backend<V, K>>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K>,
    x: D::View<'_, D::Scalar>,
    activations: &mut Activations<'_, D>,
    dout: D::View<'_, D::Scalar>,
    mut grads: Grads<'_, D>,
    mut scratch: Scratch<'_, D>,
) -> Result<(), D::Error> {
    let tokens = check_call::<V, K, D>(config, params, x, activations, "dout", D::len(dout))?;
    check_grads::<V, K, D>(config, params, tokens, &grads)?;
    scratch.check("backward", backward_scratch::<V, K, D>(device, config, tokens))?;
    let through_selection = grads.through_selection();

    let mut input = InputGrad { view: grads.input.take(), started: false };
    gates_backward(device, config, params, x, activations, dout, &mut grads, &mut input, scratch.reborrow())?;
    if through_selection || grads.dots.is_some() {
        selection_backward(device, config, params, x, activations, grads, input, scratch)?;
    }
    Ok(())
}

/// The gradient of the input, to which every path adds in turn.
struct InputGrad<'a, D: Device> {
    view: Option<D::ViewMut<'a, D::Scalar>>,
    started: bool,
}

impl<D: Device> InputGrad<'_, D> {
    /// The view, and whether to add to it.
    fn next(&mut self) -> (Option<D::ViewMut<'_, D::Scalar>>, bool) {
        let accumulate = core::mem::replace(&mut self.started, true);
        (self.view.as_mut().map(D::reborrow), accumulate)
    }
}

/// From the output to the weighted sums, whose gradient is left in `grads.sums`.
#[allow(clippy::too_many_arguments, reason = "backward's own arguments, handed on")]
fn gates_backward<V: Table, K: Table, D: Backend<V, K>>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K>,
    x: D::View<'_, D::Scalar>,
    act: &Activations<'_, D>,
    dout: D::View<'_, D::Scalar>,
    grads: &mut Grads<'_, D>,
    input: &mut InputGrad<'_, D>,
    scratch: Scratch<'_, D>,
) -> Result<(), D::Error> {
    let tokens = D::len(dout) / config.output_dim();
    let v = tokens * config.value_dim();
    let (mut dprojected, scratch) = scratch.take_reals(D::len(dout));
    let (mut dsigmoid, scratch) = scratch.take_reals(tokens);
    let (mut dgated, scratch) = scratch.take_reals(v);
    let (mut dsilu, _) = scratch.take_reals(v);

    let gated = act.silu.as_ref().map_or(&act.y, |silu| &silu.gated);
    let mut dprojected_view = D::shorten(dout);
    if let (Some(sigmoid), Some(projection)) = (&act.sigmoid, &params.sigmoid) {
        let y = if params.value_proj.is_some() { D::read(&sigmoid.out) } else { D::read(gated) };
        let (dy, dgate) = (D::reborrow(&mut dprojected), D::reborrow(&mut dsigmoid));
        device.sigmoid_gate_backward(GateBackward {
            y,
            gate: D::read(&sigmoid.gate),
            dout: D::shorten(dout),
            dy,
            dgate,
        })?;
        let dgate = D::read(&dsigmoid);
        linear_backward(device, tokens, x, projection, dgate, input.next(), &mut grads.sigmoid)?;
        dprojected_view = D::read(&dprojected);
    }
    {
        let sums = D::reborrow(&mut grads.sums);
        let dy = if act.silu.is_some() { D::reborrow(&mut dgated) } else { sums };
        match &params.value_proj {
            Some(projection) => {
                let (y, dx) = (D::read(gated), (Some(dy), false));
                linear_backward(device, tokens, y, projection, dprojected_view, dx, &mut grads.value_proj)?;
            }
            None => device.copy(dprojected_view, dy)?,
        }
    }
    if let (Some(silu), Some(projection)) = (&act.silu, &params.silu) {
        device.silu_gate_backward(GateBackward {
            y: D::read(&act.y),
            gate: D::read(&silu.gate),
            dout: D::read(&dgated),
            dy: D::reborrow(&mut grads.sums),
            dgate: D::reborrow(&mut dsilu),
        })?;
        linear_backward(device, tokens, x, projection, D::read(&dsilu), input.next(), &mut grads.silu)?;
    }
    Ok(())
}

/// From the weighted sums to the queries, the keys and the input.
#[allow(clippy::too_many_arguments, reason = "backward's own arguments, handed on")]
fn selection_backward<V: Table, K: Table, D: Backend<V, K>>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K>,
    x: D::View<'_, D::Scalar>,
    act: &Activations<'_, D>,
    mut grads: Grads<'_, D>,
    mut input: InputGrad<'_, D>,
    scratch: Scratch<'_, D>,
) -> Result<(), D::Error> {
    let tokens = D::len(x) / config.input_dim();
    let bag = config.bag_len();
    let through_queries = input.view.is_some() || grads.through_queries();
    let through_selection = through_queries || grads.keys.is_some() || grads.key_gain.is_some();

    let (mut dcoefficients, scratch) = scratch.take_reals(tokens * bag);
    let (mut dweights, scratch) = scratch.take_reals(tokens * bag);
    {
        let out = if act.peer.is_some() { &mut dcoefficients } else { &mut dweights };
        let (ids, vectors, out) = (D::read(&act.ids), D::read(&grads.sums), D::reborrow(out));
        device.bag_dot(params.values, BagDot { bag, ids, vectors, out })?;
    }
    if let (Some(peer), Some(experts), Some(ddots)) = (&act.peer, params.experts, &mut grads.dots) {
        device.gelu_gate_backward(GateBackward {
            y: D::read(&act.weights),
            gate: D::read(&peer.dots),
            dout: D::read(&dcoefficients),
            dy: D::reborrow(&mut dweights),
            dgate: D::reborrow(ddots),
        })?;
        if let (Some(out), accumulate) = input.next() {
            let (ids, weights) = (D::read(&act.ids), D::read(ddots));
            device.bag_sum(experts, BagSum { bag, ids, weights, out, accumulate })?;
        }
    }
    if !through_selection {
        return Ok(());
    }

    let (mut dqueries, scratch) = scratch.take_reals(tokens * config.query_len());
    let dims = SelectDims::new(config, tokens);
    match &params.keys {
        Keys::Trained { keys, gain } => {
            let (spare, mut scratch) = scratch.take_reals(if config.qk_norm() { config.keys_len() } else { 0 });
            let (normed, queries) = match &act.norm {
                Some(norm) => (D::read(&norm.keys), D::read(&norm.queries)),
                None => (D::shorten(*keys), D::read(&act.queries)),
            };
            // The gain's gradient goes through that of the keys, wanted or not.
            let mut spare = grads.key_gain.is_some().then_some(spare);
            let mut dkeys = match &mut grads.keys {
                Some(dkeys) => Some(D::reborrow(dkeys)),
                None => spare.as_mut().map(D::reborrow),
            };
            let table = D::rows(normed, config.half_dim());
            device.select_backward(
                SelectBackward {
                    dims,
                    queries,
                    keys: &table,
                    ids: D::read(&act.ids),
                    weights: D::read(&act.weights),
                    dweights: D::reborrow(&mut dweights),
                    dqueries: through_queries.then(|| D::reborrow(&mut dqueries)),
                    dkeys: dkeys.as_mut().map(D::reborrow),
                },
                scratch.reborrow(),
            )?;
            if let (Some(dkeys), Some(gain)) = (&mut dkeys, gain) {
                let (dims, x, gain) = (key_norm(config), D::shorten(*keys), D::shorten(*gain));
                let (dx, dgain) = (D::reborrow(dkeys), grads.key_gain.as_mut().map(D::reborrow));
                device.rms_norm_backward(RmsNormBackward { dims, x, gain, dx, dgain })?;
            }
        }
        Keys::Packed(keys) => device.select_backward(
            SelectBackward {
                dims,
                queries: D::read(act.norm.as_ref().map_or(&act.queries, |norm| &norm.queries)),
                keys: *keys,
                ids: D::read(&act.ids),
                weights: D::read(&act.weights),
                dweights: D::reborrow(&mut dweights),
                dqueries: through_queries.then(|| D::reborrow(&mut dqueries)),
                dkeys: None,
            },
            scratch,
        )?,
    }
    if !through_queries {
        return Ok(());
    }
    if let Some(gain) = params.query_gain {
        device.rms_norm_backward(RmsNormBackward {
            dims: query_norm(config, tokens),
            x: D::read(&act.queries),
            gain: D::shorten(gain),
            dx: D::reborrow(&mut dqueries),
            dgain: grads.query_gain.as_mut().map(D::reborrow),
        })?;
    }
    linear_backward(device, tokens, x, &params.query, D::read(&dqueries), input.next(), &mut grads.query)
}

/// The number of tokens, if parameters, input, activations and output (or its gradient) fit the configuration.
fn check_call<V: Table, K: Table, D: Backend<V, K>>(
    config: &Config,
    params: &Params<'_, D, V, K>,
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

/// Fails unless every gradient asked for exists; their sizes are checked by the operations that write them.
fn check_grads<V: Table, K: Table, D: Backend<V, K>>(
    config: &Config,
    params: &Params<'_, D, V, K>,
    tokens: usize,
    grads: &Grads<'_, D>,
) -> Result<(), ArgError> {
    const OP: &str = "backward";
    check_len(OP, "sums", tokens * config.value_dim(), D::len_mut(&grads.sums))?;
    let trained = matches!(params.keys, Keys::Trained { .. });
    let peer = matches!(config.kind(), Kind::Peer);
    let exists = [
        ("gradient of keys", grads.keys.is_some(), trained),
        ("gradient of key_norm", grads.key_gain.is_some(), trained && config.qk_norm()),
        ("gradient of query_norm", grads.query_gain.is_some(), config.qk_norm()),
        ("gradient of query_proj's bias", grads.query.bias.is_some(), params.query.bias.is_some()),
        ("gradient of swilu_projection", grads.silu.wanted(), config.silu_gate()),
        ("gradient of value_proj", grads.value_proj.wanted(), config.value_proj()),
        ("gradient of gating", grads.sigmoid.wanted(), config.sigmoid_gate()),
        ("gradient of dots", grads.dots.is_some(), peer),
    ];
    for (operand, wanted, exists) in exists {
        if wanted && !exists {
            return Err(ArgError::Presence { op: OP, operand, needed: false });
        }
    }
    if peer && grads.dots.is_none() && grads.through_selection() {
        return Err(ArgError::Presence { op: OP, operand: "gradient of dots", needed: true });
    }
    if let Some(dots) = &grads.dots {
        check_len(OP, "gradient of dots", tokens * config.bag_len(), D::len_mut(dots))?;
    }
    if let Some(input) = &grads.input {
        check_len(OP, "gradient of the input", tokens * config.input_dim(), D::len_mut(input))?;
    }
    Ok(())
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

fn linear_backward<D: Dense>(
    device: &D,
    tokens: usize,
    x: D::View<'_, D::Scalar>,
    projection: &Projection<'_, D>,
    dout: D::View<'_, D::Scalar>,
    (mut dx, accumulate): (Option<D::ViewMut<'_, D::Scalar>>, bool),
    grads: &mut ProjectionGrads<'_, D>,
) -> Result<(), D::Error> {
    if dx.is_none() && !grads.wanted() {
        return Ok(());
    }
    let (dweight, dbias) = (grads.weight.as_mut().map(D::reborrow), grads.bias.as_mut().map(D::reborrow));
    let dx = dx.as_mut().map(D::reborrow);
    let (x, weight, dout) = (D::shorten(x), D::shorten(projection.weight), D::shorten(dout));
    device.linear_backward(LinearBackward { tokens, x, weight, dout, dx, accumulate, dweight, dbias })
}
