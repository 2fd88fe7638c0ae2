//! Backward: from the gradient of the output to those of everything that is asked for.

use super::{Activations, Backend, Keys, Params, Projection, check_call, key_norm, query_norm};
use crate::config::{Config, Kind};
use crate::device::{Device, Scratch, ScratchReq};
use crate::error::{ArgError, check_len};
use crate::ops::bag::{BagDot, BagSum};
use crate::ops::dense::{GateBackward, LinearBackward, RmsNormBackward};
use crate::ops::optim::{RowRule, RowUpdate, Step};
use crate::ops::plan::{RowGradient, RowPlan};
use crate::ops::select::{SelectBackward, SelectDims};
use crate::ops::{Dense, SelectRows};
use crate::storage::{Extent, Table};

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

/// The gradients of [`super::forward()`], from `dout` (`[T, O]`), with the same `x`, parameters and activations.
///
/// # Errors
/// As [`super::forward()`]; and [`ArgError::Presence`] if a gradient is asked for that the configuration has not, or that of
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
    let tokens = check_call(config, params, x, activations, "dout", D::len(dout))?;
    check_grads(config, params, tokens, &grads)?;
    scratch.check("backward", backward_scratch::<V, K, D>(device, config, tokens))?;
    let wanted = grads.through_selection() || grads.dots.is_some();

    let mut input = InputGrad { view: grads.input.take(), started: false };
    gates_backward(device, config, params, x, activations, dout, &mut grads, &mut input, scratch.reborrow())?;
    if wanted {
        let dots =
            |bags: RowGradient<'_, D>, ids: D::View<'_, u32>, mut out: D::ViewMut<'_, D::Scalar>, _: Scratch<'_, D>| {
                let (ids, vectors, out) = (D::shorten(ids), D::shorten(bags.sources), D::reborrow(&mut out));
                device.bag_dot(params.values, BagDot { bag: bags.bag, ids, vectors, out })
            };
        selection_backward(device, config, params, x, activations, grads, input, dots, scratch)?;
    }
    Ok(())
}

/// A table of values in training, and how a step changes it.
pub struct TableUpdate<'a, D: Device, S, O> {
    /// `[N^P, V]`: the values that forward read.
    pub table: S,
    /// The rule its rows change by.
    pub rule: &'a O,
    /// What the step has in common for all rows.
    pub step: &'a Step,
    /// The plan of [`Activations::ids`].
    pub plan: RowPlan<'a, D>,
}

/// What [`backward_and_update`] needs besides the activations: for every gradient, asked for or not.
#[must_use]
pub fn backward_and_update_scratch<S, O, K, E, D>(device: &D, config: &Config, tokens: usize) -> ScratchReq
where
    S: Table,
    O: RowRule,
    K: Table,
    E: Table,
    D: Backend<E, K> + RowUpdate<S, O>,
{
    let update = device.dot_reduce_and_update_scratch(config.value_dim(), tokens * config.bag_len());
    backward_scratch::<E, K, D>(device, config, tokens).or(ScratchReq::new(own_scratch(config, tokens), 0).and(update))
}

/// [`backward`] that changes the touched rows of the values on its way: each is read once, for its dots and for its
/// update. For a table that no other layer shares, and a step that needs no norm of all gradients first.
///
/// As `values` has the table, `params.values` says only how large it is.
///
/// # Errors
/// As [`backward`] and [`RowUpdate::dot_reduce_and_update`].
#[allow(clippy::too_many_arguments, reason = "what backward takes, and the table")]
pub fn backward_and_update<S, O, K, E, D>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, Extent, K, E>,
    x: D::View<'_, D::Scalar>,
    activations: &mut Activations<'_, D>,
    dout: D::View<'_, D::Scalar>,
    mut grads: Grads<'_, D>,
    values: TableUpdate<'_, D, S, O>,
    mut scratch: Scratch<'_, D>,
) -> Result<(), D::Error>
where
    S: Table,
    O: RowRule,
    K: Table,
    E: Table,
    D: Backend<E, K> + RowUpdate<S, O>,
{
    const OP: &str = "backward_and_update";
    let tokens = check_call(config, params, x, activations, "dout", D::len(dout))?;
    check_grads(config, params, tokens, &grads)?;
    check_len(OP, "rows of the table", config.slots(), values.table.rows())?;
    check_len(OP, "width of the table", config.value_dim(), values.table.dim())?;
    check_len(OP, "entries of the plan", tokens * config.bag_len(), D::len(values.plan.entries))?;
    scratch.check(OP, backward_and_update_scratch::<S, O, K, E, D>(device, config, tokens))?;

    let mut input = InputGrad { view: grads.input.take(), started: false };
    gates_backward(device, config, params, x, activations, dout, &mut grads, &mut input, scratch.reborrow())?;
    let TableUpdate { table, rule, step, plan } = values;
    let dots =
        |bags: RowGradient<'_, D>, _: D::View<'_, u32>, out: D::ViewMut<'_, D::Scalar>, scratch: Scratch<'_, D>| {
            device.dot_reduce_and_update(table, rule, step, plan, bags, out, scratch)
        };
    selection_backward(device, config, params, x, activations, grads, input, dots, scratch)
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
fn gates_backward<V, K, E, D: Dense>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K, E>,
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

/// From the weighted sums to the queries, the keys and the input. `dots` writes the gradients of the coefficients (`[T, L]`): the
/// dots of the value rows, by their ids, with the gradient of the sums.
#[allow(clippy::too_many_arguments, reason = "backward's own arguments, handed on")]
fn selection_backward<V: Table, K: Table, E: Table, D: Backend<E, K>>(
    device: &D,
    config: &Config,
    params: &Params<'_, D, V, K, E>,
    x: D::View<'_, D::Scalar>,
    act: &Activations<'_, D>,
    mut grads: Grads<'_, D>,
    mut input: InputGrad<'_, D>,
    dots: impl FnOnce(
        RowGradient<'_, D>,
        D::View<'_, u32>,
        D::ViewMut<'_, D::Scalar>,
        Scratch<'_, D>,
    ) -> Result<(), D::Error>,
    scratch: Scratch<'_, D>,
) -> Result<(), D::Error> {
    let tokens = D::len(x) / config.input_dim();
    let bag = config.bag_len();
    let through_queries = input.view.is_some() || grads.through_queries();
    let through_selection = through_queries || grads.keys.is_some() || grads.key_gain.is_some();

    let (mut dcoefficients, scratch) = scratch.take_reals(tokens * bag);
    let (mut dweights, mut scratch) = scratch.take_reals(tokens * bag);
    {
        let out = if act.peer.is_some() { &mut dcoefficients } else { &mut dweights };
        let (weights, sources) = (act.coefficients(), D::read(&grads.sums));
        let bags = RowGradient { bag, dim: config.value_dim(), weights, sources };
        dots(bags, D::read(&act.ids), D::reborrow(out), scratch.reborrow())?;
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

/// Fails unless every gradient asked for exists; their sizes are checked by the operations that write them.
fn check_grads<D: Device, V, K, E>(
    config: &Config,
    params: &Params<'_, D, V, K, E>,
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
