//! Whole layers: every variant against the reference in `f64`.

use memlayer_core::config::Kind;
use memlayer_core::layer::{
    self, Activations, Grads, Keys, Params, Projection, backward_scratch, forward, forward_scratch,
};
use memlayer_core::{Config, Device, Reference, ScratchReq};

use super::Subject;
use crate::device::{Memory, TestDevice};
use crate::golden::relative_error;
use crate::layer::LayerInputs;

/// Every variant of the layer, in sizes that are odd where they can be.
///
/// # Panics
/// If one is no configuration.
#[must_use]
pub fn variants() -> Vec<Config> {
    let base = Config::builder(12).heads(2).sub_keys(9).half_dim(5).top_k(4);
    let odd = Config::builder(7).heads(5).sub_keys(17).half_dim(3).top_k(17).value_dim(11).output_dim(13);
    [
        base,
        base.qk_norm(true),
        base.value_dim(10),
        base.sigmoid_gate(true),
        base.silu_gate(true),
        base.silu_gate(true).sigmoid_gate(true).qk_norm(true).value_dim(9).output_dim(15),
        base.value_dim(6).sigmoid_gate(true),
        base.kind(Kind::Peer),
        base.kind(Kind::Peer).qk_norm(true).sigmoid_gate(true),
        base.kind(Kind::Peer).value_dim(8).output_dim(14),
        base.flat_keys().sub_keys(40),
        base.flat_keys().sub_keys(40).qk_norm(true).silu_gate(true),
        base.flat_keys().sub_keys(23).kind(Kind::Peer).sigmoid_gate(true),
        base.heads(1).top_k(1),
        odd,
        odd.silu_gate(true).qk_norm(true),
        Config::builder(32).heads(4).sub_keys(64).half_dim(16).top_k(32).silu_gate(true).qk_norm(true),
    ]
    .into_iter()
    .map(|builder| builder.build().expect("a configuration"))
    .collect()
}

/// Output and all gradients, each within 1e-5 relative to the reference in `f64`.
///
/// # Panics
/// If one is out of its bound, or another slot is selected.
pub fn every_variant_is_the_references<D: Subject>(device: &D) {
    for (seed, config) in (0u64..).zip(variants()) {
        for tokens in [0, 1, 6, 19] {
            let inputs = LayerInputs::random(config, tokens, 31 * seed + tokens as u64);
            let expected = inputs.run(&Reference::<f64>::new(), |_| true).expect("the reference");
            let found = inputs.run(device, |_| true).expect("a layer");
            assert_eq!(expected.ids, found.ids, "{config:?}: slots");
            assert_eq!(expected.rows, found.rows, "{config:?}: touched rows");
            for (name, expected) in &expected.tensors {
                let error = relative_error(expected, found.tensor(name));
                assert!(error <= 1e-5, "{config:?}, {tokens} tokens: {name} is off by {error:e}");
            }
        }
    }
}

/// Asking for one gradient gives what asking for all gives, bit for bit.
///
/// # Panics
/// If it does not.
pub fn gradients_are_optional<D: Subject>(device: &D) {
    for (seed, config) in (0u64..).zip(variants()) {
        let inputs = LayerInputs::random(config, 5, 77 + seed);
        let all = inputs.run(device, |_| true).expect("a layer");
        for (name, _) in &inputs.tensors {
            let alone = inputs.run(device, |n| n == name).expect("a layer");
            let name = format!("grad.{name}");
            let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(all.tensor(&name)), bits(alone.tensor(&name)), "{config:?}: {name} alone");
        }
        let none = inputs.run(device, |_| false).expect("a layer");
        assert!(none.tensors.iter().all(|(name, _)| !name.starts_with("grad.")), "nothing is made unasked");
        assert_eq!(none.tensor("output"), all.tensor("output"));
    }
}

/// Forward and backward accept exactly the scratch they ask for, and not one element less.
///
/// # Panics
/// If the exact scratch is refused, or a shorter one is not.
pub fn asks_for_no_more_than_its_scratch<D: Subject>(device: &D) {
    for (seed, config) in (0u64..).zip(variants()) {
        let inputs = LayerInputs::random(config, 3, seed);
        let forward = forward_scratch::<<D as Device>::Rows<'_>, <D as Device>::Rows<'_>, D>(device, &config, 3);
        let backward = backward_scratch::<<D as Device>::Rows<'_>, <D as Device>::Rows<'_>, D>(device, &config, 3);
        assert!(runs_in(device, &inputs, forward, backward), "{config:?}: exact scratch");
        for short in [ScratchReq::new(1, 0), ScratchReq::new(0, 1)] {
            let less = |req: ScratchReq| {
                ScratchReq::new(req.reals.saturating_sub(short.reals), req.ids.saturating_sub(short.ids))
            };
            if less(forward) != forward {
                assert!(!runs_in(device, &inputs, less(forward), backward), "{config:?}: forward, {short:?} short");
            }
            if less(backward) != backward {
                assert!(!runs_in(device, &inputs, forward, less(backward)), "{config:?}: backward, {short:?} short");
            }
        }
    }
}

/// Whether a forward and a backward of everything run in these scratches.
fn runs_in<D: Subject>(device: &D, inputs: &LayerInputs, first: ScratchReq, second: ScratchReq) -> bool {
    let (config, tokens) = (&inputs.config, inputs.tokens);
    let upload = |values: &[f64]| {
        #[allow(clippy::cast_possible_truncation, reason = "the device's scalar is f32")]
        let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        device.upload(&values)
    };
    let tensors: Vec<_> = inputs.tensors.iter().map(|(name, values)| (name.as_str(), upload(values))).collect();
    let find = |name: &str| find::<D>(&tensors, name);
    let projection = |name: &str| {
        let weight = find(&format!("{name}.weight"))?;
        Some(Projection { weight, bias: find(&format!("{name}.bias")) })
    };
    let peer = config.kind() == Kind::Peer;
    // Tables and other parameters meet in one struct: each needs a lifetime of its own.
    let table = |name: &str, dim| self::find::<D>(&tensors, name).map(|t| D::rows(t, dim));
    let values = if peer { "values_v.weight" } else { "values.weight" };
    let values = table(values, config.value_dim()).expect("values");
    let experts = table("values_u.weight", config.input_dim());
    let keys: Keys<'_, D, <D as Device>::Rows<'_>> =
        Keys::Trained { keys: find("keys").expect("keys"), gain: find("key_norm.weight") };
    let params = Params {
        query: projection("query_proj.query_mlps.0").expect("a query projection"),
        keys,
        query_gain: find("query_norm.weight"),
        values: &values,
        experts: experts.as_ref(),
        silu: projection("swilu_projection"),
        value_proj: projection("value_proj"),
        sigmoid: projection("gating"),
    };
    let mut memory = Memory::new(device, config.activations_req(tokens));
    let mut act = Activations::new(config, tokens, memory.lend()).expect("activations");
    let x = find("input").expect("an input");
    let mut out = upload(&vec![0.0; tokens * config.output_dim()]);
    if forward(device, config, &params, x, &mut act, D::view_mut(&mut out), Memory::new(device, first).lend()).is_err()
    {
        return false;
    }
    let mut sums = upload(&vec![0.0; tokens * config.value_dim()]);
    let mut dots = upload(&vec![0.0; tokens * config.bag_len()]);
    let (mut dx, mut dkeys) = (upload(&vec![0.0; tokens * config.input_dim()]), upload(&vec![0.0; config.keys_len()]));
    let mut grads = Grads::new(D::view_mut(&mut sums));
    grads.dots = peer.then(|| D::view_mut(&mut dots));
    grads.input = Some(D::view_mut(&mut dx));
    grads.keys = Some(D::view_mut(&mut dkeys));
    let dout = upload(&inputs.grad_output);
    let mut memory = Memory::new(device, second);
    layer::backward(device, config, &params, x, &mut act, D::view(&dout), grads, memory.lend()).is_ok()
}

fn find<'a, D: TestDevice>(tensors: &'a [(&str, D::Buffer<D::Scalar>)], name: &str) -> Option<D::View<'a, D::Scalar>> {
    tensors.iter().find(|(n, _)| *n == name).map(|(_, t)| D::view(t))
}
