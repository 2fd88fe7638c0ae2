//! Forward: from the input to the output.

use super::{Activations, Backend, Keys, Params, check_call, key_norm, linear, query_norm};
use crate::config::Config;
use crate::device::{Scratch, ScratchReq};
use crate::ops::SelectRows;
use crate::ops::bag::{BagDot, BagSum};
use crate::ops::dense::{Gate, RmsNorm};
use crate::ops::select::{Select, SelectDims};
use crate::storage::Table;

/// What [`forward`] needs besides the activations.
#[must_use]
pub fn forward_scratch<V: Table, K: Table, D: Backend<V, K>>(device: &D, config: &Config, tokens: usize) -> ScratchReq {
    let dims = SelectDims::new(config, tokens);
    let trained = <D as SelectRows<D::Rows<'_>>>::select_scratch(device, dims);
    trained.or(<D as SelectRows<K>>::select_scratch(device, dims))
}

/// Runs the layer over `x` (`[T, D]`) into `out` (`[T, O]`, overwritten), leaving in `activations` what
/// [`super::backward()`] needs.
///
/// # Errors
/// [`ArgError`](crate::ArgError) if a size does not fit the configuration, an operand is missing or has no use, or the scratch is
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
    let tokens = check_call(config, params, x, activations, "out", D::len_mut(&out))?;
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
