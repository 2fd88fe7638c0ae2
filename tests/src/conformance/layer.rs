//! Whole layers: every variant against the reference in `f64`.

use memlayer_core::config::Kind;
use memlayer_core::layer::{
    self, Activations, Grads, Keys, Params, Projection, TableUpdate, backward_and_update, backward_and_update_scratch,
    backward_scratch, forward, forward_scratch,
};
use memlayer_core::ops::RowUpdate;
use memlayer_core::ops::optim::{Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::{Config, Device, Extent, Reference, ScratchReq};

use super::{Subject, assert_same_bits};
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
    let tensors = Tensors::new(device, inputs);
    let (values, experts) = (tensors.values(config), tensors.experts(config));
    let params = tensors.params(&values, experts.as_ref());
    let mut memory = Memory::new(device, config.activations_req(tokens));
    let mut act = Activations::new(config, tokens, memory.lend()).expect("activations");
    let x = tensors.find("input").expect("an input");
    let mut out = upload(device, &vec![0.0; tokens * config.output_dim()]);
    if forward(device, config, &params, x, &mut act, D::view_mut(&mut out), Memory::new(device, first).lend()).is_err()
    {
        return false;
    }
    let mut buffers = GradBuffers::new(device, inputs);
    let dout = upload(device, &inputs.grad_output);
    let mut memory = Memory::new(device, second);
    layer::backward(device, config, &params, x, &mut act, D::view(&dout), buffers.lend(config), memory.lend()).is_ok()
}

/// A backward that updates the values on its way leaves the bits in the table that one leaves which is followed by the
/// update, and the same gradients but for how their dots are rounded.
///
/// # Panics
/// If it does not.
pub fn updates_on_its_way_as_apart<D: Subject>(device: &D) {
    for (seed, config) in (0u64..).zip(variants()) {
        for tokens in [0, 1, 19] {
            let inputs = LayerInputs::random(config, tokens, 310 + seed);
            let (table, grads) = trained(device, &inputs, false);
            let (found_table, found_grads) = trained(device, &inputs, true);
            assert_same_bits(&table, &found_table, &format!("{config:?}, {tokens} tokens: values"));
            for (grads, found) in grads.iter().zip(&found_grads) {
                let wide = |grads: &[f32]| grads.iter().map(|&g| f64::from(g)).collect::<Vec<_>>();
                let error = relative_error(&wide(grads), &wide(found));
                assert!(error <= 1e-5, "{config:?}, {tokens} tokens: a gradient is off by {error:e}");
            }
        }
    }
}

/// The values after a step of a layer, and its gradients.
fn trained<D: Subject>(device: &D, inputs: &LayerInputs, on_its_way: bool) -> (Vec<f32>, [Vec<f32>; 4]) {
    let (config, tokens) = (&inputs.config, inputs.tokens);
    let (bag, v) = (config.bag_len(), config.value_dim());
    let tensors = Tensors::new(device, inputs);
    let name = if config.kind() == Kind::Peer { "values_v.weight" } else { "values.weight" };
    let values = inputs.tensors.iter().find(|(n, _)| n == name).expect("values");
    let (mut values, mut state) = (upload(device, &values.1), device.upload::<f32>(&[]));
    let mut memory = Memory::new(device, config.activations_req(tokens));
    let mut act = Activations::new(config, tokens, memory.lend()).expect("activations");
    let x = tensors.find("input").expect("an input");
    let mut out = upload(device, &vec![0.0; tokens * config.output_dim()]);
    let dout = upload(device, &inputs.grad_output);
    let mut buffers = GradBuffers::new(device, inputs);
    let mut ids = device.upload(&vec![0u32; PlanBuffers::<D>::ids_len(tokens * bag)]);
    let (mut plan, _) = PlanBuffers::<D>::carve(D::view_mut(&mut ids), tokens * bag).expect("buffers");
    {
        let (rows, experts) = (D::rows(D::view(&values), v), tensors.experts(config));
        let params = tensors.params(&rows, experts.as_ref());
        let mut scratch = Memory::new(device, forward_scratch::<D::Rows<'_>, D::Rows<'_>, D>(device, config, tokens));
        let (out, scratch) = (D::view_mut(&mut out), scratch.lend());
        forward(device, config, &params, x, &mut act, out, scratch).expect("forward");
        let mut scratch = Memory::new(device, device.plan_scratch(tokens * bag));
        device.plan(D::read(&act.ids), config.slots(), plan.reborrow(), scratch.lend()).expect("a plan");
        if !on_its_way {
            let req = backward_scratch::<D::Rows<'_>, D::Rows<'_>, D>(device, config, tokens);
            let (grads, mut scratch) = (buffers.lend(config), Memory::new(device, req));
            let done = layer::backward(device, config, &params, x, &mut act, D::view(&dout), grads, scratch.lend());
            done.expect("backward");
        }
    }
    let (rule, step) = (Sgd, Step::new(0.5, 1));
    if on_its_way {
        let (extent, experts) = (Extent { rows: config.slots(), dim: v }, tensors.experts(config));
        let params = tensors.params(&extent, experts.as_ref());
        let req = backward_and_update_scratch::<D::Train<'_>, Sgd, D::Rows<'_>, D::Rows<'_>, D>(device, config, tokens);
        let (grads, mut scratch) = (buffers.lend(config), Memory::new(device, req));
        let table = D::train(&mut values, v, &mut state, 0);
        let table = TableUpdate { table, rule: &rule, step: &step, plan: plan.plan() };
        let (dout, scratch) = (D::view(&dout), scratch.lend());
        backward_and_update(device, config, &params, x, &mut act, dout, grads, table, scratch).expect("backward");
    } else {
        let gradient = RowGradient { bag, dim: v, weights: act.coefficients(), sources: D::view(&buffers.sums) };
        let req = RowUpdate::<D::Train<'_>, Sgd>::reduce_and_update_scratch(device, v);
        let mut scratch = Memory::new(device, req);
        let table = D::train(&mut values, v, &mut state, 0);
        device.reduce_and_update(table, &rule, &step, plan.plan(), gradient, scratch.lend()).expect("an update");
    }
    device.synchronize().expect("a step");
    let grads = [&buffers.sums, &buffers.dots, &buffers.input, &buffers.keys];
    (device.download(&values), grads.map(|grads| device.download(grads)))
}

fn upload<D: Subject>(device: &D, values: &[f64]) -> D::Buffer<f32> {
    #[allow(clippy::cast_possible_truncation, reason = "the device's scalar is f32")]
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    device.upload(&values)
}

/// A layer's input and parameters on a device.
struct Tensors<'a, D: TestDevice>(Vec<(&'a str, D::Buffer<f32>)>);

impl<'a, D: Subject> Tensors<'a, D> {
    fn new(device: &D, inputs: &'a LayerInputs) -> Self {
        Self(inputs.tensors.iter().map(|(name, values)| (name.as_str(), upload(device, values))).collect())
    }

    fn find(&self, name: &str) -> Option<D::View<'_, f32>> {
        self.0.iter().find(|(n, _)| *n == name).map(|(_, t)| D::view(t))
    }

    fn values(&self, config: &Config) -> D::Rows<'_> {
        let name = if config.kind() == Kind::Peer { "values_v.weight" } else { "values.weight" };
        D::rows(self.find(name).expect("values"), config.value_dim())
    }

    fn experts(&self, config: &Config) -> Option<D::Rows<'_>> {
        self.find("values_u.weight").map(|u| D::rows(u, config.input_dim()))
    }

    fn projection(&self, name: &str) -> Option<Projection<'_, D>> {
        let weight = self.find(&format!("{name}.weight"))?;
        Some(Projection { weight, bias: self.find(&format!("{name}.bias")) })
    }

    /// The parameters with these tables; they need lifetimes of their own.
    fn params<'p, 'k, V, E>(&'p self, values: &'p V, experts: Option<&'p E>) -> Params<'p, D, V, D::Rows<'k>, E> {
        Params {
            query: self.projection("query_proj.query_mlps.0").expect("a query projection"),
            keys: Keys::Trained { keys: self.find("keys").expect("keys"), gain: self.find("key_norm.weight") },
            query_gain: self.find("query_norm.weight"),
            values,
            experts,
            silu: self.projection("swilu_projection"),
            value_proj: self.projection("value_proj"),
            sigmoid: self.projection("gating"),
        }
    }
}

/// Where some of a layer's gradients go.
struct GradBuffers<D: TestDevice> {
    sums: D::Buffer<f32>,
    dots: D::Buffer<f32>,
    input: D::Buffer<f32>,
    keys: D::Buffer<f32>,
}

impl<D: Subject> GradBuffers<D> {
    fn new(device: &D, inputs: &LayerInputs) -> Self {
        let (config, tokens) = (&inputs.config, inputs.tokens);
        let zeros = |len: usize| upload(device, &vec![0.0; len]);
        Self {
            sums: zeros(tokens * config.value_dim()),
            dots: zeros(tokens * config.bag_len()),
            input: zeros(tokens * config.input_dim()),
            keys: zeros(config.keys_len()),
        }
    }

    fn lend(&mut self, config: &Config) -> Grads<'_, D> {
        let mut grads = Grads::new(D::view_mut(&mut self.sums));
        grads.dots = (config.kind() == Kind::Peer).then(|| D::view_mut(&mut self.dots));
        grads.input = Some(D::view_mut(&mut self.input));
        grads.keys = Some(D::view_mut(&mut self.keys));
        grads
    }
}
