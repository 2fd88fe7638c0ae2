//! A whole layer on any device: forward, backward, and the gradients of the rows.

use memlayer_core::config::Kind;
use memlayer_core::layer::{self, Activations, Backend, Grads, Keys, Params, Projection, backward, forward};
use memlayer_core::ops::RowReduce;
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::{ArgError, Config, Device, Real};

use crate::device::{Memory, TestDevice, poisoned};
use crate::random::Random;

const QUERY: &str = "query_proj.query_mlps.0";
const SILU: &str = "swilu_projection";
const VALUE_PROJ: &str = "value_proj";
const SIGMOID: &str = "gating";

/// The names and shapes of a layer's input and parameters, as the published implementation has them.
#[must_use]
pub fn parameters(config: &Config, tokens: usize) -> Vec<(String, Vec<usize>)> {
    let (d, v, o, q) = (config.input_dim(), config.value_dim(), config.output_dim(), config.query_len());
    let mut all =
        vec![("input".to_owned(), vec![tokens, d]), ("keys".to_owned(), vec![config.key_rows(), config.half_dim()])];
    let projections = [
        (QUERY, true, q, d),
        (SILU, config.silu_gate(), v, d),
        (VALUE_PROJ, config.value_proj(), o, v),
        (SIGMOID, config.sigmoid_gate(), 1, d),
    ];
    for (name, there, outputs, inputs) in projections {
        if there {
            all.push((format!("{name}.weight"), vec![outputs, inputs]));
            all.push((format!("{name}.bias"), vec![outputs]));
        }
    }
    if config.qk_norm() {
        for name in ["query_norm.weight", "key_norm.weight"] {
            all.push((name.to_owned(), vec![config.heads(), config.parts() * config.half_dim()]));
        }
    }
    if config.kind() == Kind::Peer {
        all.push(("values_u.weight".to_owned(), vec![config.slots(), d]));
        all.push(("values_v.weight".to_owned(), vec![config.slots(), v]));
    } else {
        all.push(("values.weight".to_owned(), vec![config.slots(), v]));
    }
    all
}

/// A layer's input and parameters, and the gradient of its output.
#[derive(Clone, Debug)]
pub struct LayerInputs {
    /// The sizes.
    pub config: Config,
    /// T.
    pub tokens: usize,
    /// Input and parameters, by the names of [`parameters`].
    pub tensors: Vec<(String, Vec<f64>)>,
    /// `[T, O]`.
    pub grad_output: Vec<f64>,
}

/// What a layer made of its inputs.
#[derive(Clone, Debug, Default)]
pub struct LayerResults {
    /// `[T, L]`.
    pub ids: Vec<u32>,
    /// Output, scores, weights, and the gradients, `grad.` before the name.
    pub tensors: Vec<(String, Vec<f64>)>,
    /// The touched rows of every table, `grad.NAME.rows`.
    pub rows: Vec<(String, Vec<u32>)>,
}

impl LayerInputs {
    /// Random inputs in which every parameter matters.
    #[must_use]
    pub fn random(config: Config, tokens: usize, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut tensors = Vec::new();
        for (name, shape) in parameters(&config, tokens) {
            let mut values: Vec<f64> = random.reals(shape.iter().product());
            if name.ends_with("norm.weight") {
                values.iter_mut().for_each(|v| *v += 1.5);
            }
            tensors.push((name, values));
        }
        let grad_output = random.reals(tokens * config.output_dim());
        Self { config, tokens, tensors, grad_output }
    }

    /// Runs the layer, with the gradients of what `wanted` says of a name.
    ///
    /// # Errors
    /// The device's.
    pub fn run<D>(&self, device: &D, wanted: impl Fn(&str) -> bool) -> Result<LayerResults, D::Error>
    where
        D: TestDevice + RowReduce,
        D: for<'x> Backend<<D as Device>::Rows<'x>, <D as Device>::Rows<'x>>,
    {
        Run::new(self, device).execute(wanted)
    }
}

impl LayerResults {
    /// A tensor by its name.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn tensor(&self, name: &str) -> &[f64] {
        let found = self.tensors.iter().find(|(n, _)| n == name);
        &found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }
}

/// A layer's tensors on a device.
struct Run<'a, D: TestDevice> {
    inputs: &'a LayerInputs,
    device: &'a D,
    tensors: Vec<(&'a str, D::Buffer<D::Scalar>)>,
    grad_output: D::Buffer<D::Scalar>,
}

fn upload<D: TestDevice>(device: &D, values: &[f64]) -> D::Buffer<D::Scalar> {
    let values: Vec<_> = values.iter().map(|&v| D::Scalar::of(v)).collect();
    device.upload(&values)
}

fn download<D: TestDevice>(device: &D, buffer: &D::Buffer<D::Scalar>) -> Vec<f64> {
    device.download(buffer).iter().map(|v| v.wide()).collect()
}

impl<'a, D> Run<'a, D>
where
    D: TestDevice + RowReduce,
    D: for<'x> Backend<<D as Device>::Rows<'x>, <D as Device>::Rows<'x>>,
{
    fn new(inputs: &'a LayerInputs, device: &'a D) -> Self {
        let tensors = inputs.tensors.iter().map(|(name, values)| (name.as_str(), upload(device, values))).collect();
        Self { inputs, device, tensors, grad_output: upload(device, &inputs.grad_output) }
    }

    fn tensor(&self, name: &str) -> Option<D::View<'_, D::Scalar>> {
        self.tensors.iter().find(|(n, _)| *n == name).map(|(_, values)| D::view(values))
    }

    fn needed(&self, name: &'static str) -> Result<D::View<'_, D::Scalar>, ArgError> {
        self.tensor(name).ok_or(ArgError::Presence { op: "layer", operand: name, needed: true })
    }

    fn projection(&self, name: &str) -> Option<Projection<'_, D>> {
        let weight = self.tensor(&format!("{name}.weight"))?;
        Some(Projection { weight, bias: self.tensor(&format!("{name}.bias")) })
    }

    fn execute(&self, wanted: impl Fn(&str) -> bool) -> Result<LayerResults, D::Error> {
        let (device, config, tokens) = (self.device, &self.inputs.config, self.inputs.tokens);
        let is_peer = config.kind() == Kind::Peer;
        let (bag, v) = (config.bag_len(), config.value_dim());
        let values_name = if is_peer { "values_v.weight" } else { "values.weight" };
        let values = D::rows(self.needed(values_name)?, v);
        let experts = self.tensor("values_u.weight").map(|u| D::rows(u, config.input_dim()));
        let query = Projection {
            weight: self.needed("query_proj.query_mlps.0.weight")?,
            bias: self.tensor("query_proj.query_mlps.0.bias"),
        };
        let params = Params {
            query,
            keys: Keys::Trained { keys: self.needed("keys")?, gain: self.tensor("key_norm.weight") },
            query_gain: self.tensor("query_norm.weight"),
            values: &values,
            experts: experts.as_ref(),
            silu: self.projection(SILU),
            value_proj: self.projection(VALUE_PROJ),
            sigmoid: self.projection(SIGMOID),
        };
        let mut memory = Memory::new(device, config.activations_req(tokens));
        let mut act = Activations::new(config, tokens, memory.lend())?;
        let req = layer::forward_scratch::<<D as Device>::Rows<'_>, <D as Device>::Rows<'_>, D>(device, config, tokens);
        let mut out = poisoned(device, tokens * config.output_dim());
        let x = self.needed("input")?;
        forward(device, config, &params, x, &mut act, D::view_mut(&mut out), Memory::new(device, req).lend())?;

        let mut made: Vec<(&str, D::Buffer<D::Scalar>)> = Vec::new();
        for (name, values) in &self.inputs.tensors {
            if !name.starts_with("values") && wanted(name) {
                made.push((name, poisoned(device, values.len())));
            }
        }
        let mut sums = poisoned(device, tokens * v);
        let mut dots = poisoned(device, if is_peer { tokens * bag } else { 0 });
        let mut grads = Grads::new(D::view_mut(&mut sums));
        grads.dots = is_peer.then(|| D::view_mut(&mut dots));
        lend_grads(&mut made, &mut grads);
        let req =
            layer::backward_scratch::<<D as Device>::Rows<'_>, <D as Device>::Rows<'_>, D>(device, config, tokens);
        let dout = D::view(&self.grad_output);
        backward(device, config, &params, x, &mut act, dout, grads, Memory::new(device, req).lend())?;

        let mut results = LayerResults { ids: vec![], tensors: vec![], rows: vec![] };
        let gradient = RowGradient { bag, dim: v, weights: act.coefficients(), sources: D::view(&sums) };
        if wanted(values_name) {
            self.row_gradients(values_name, D::read(&act.ids), gradient, &mut results)?;
        }
        if is_peer && wanted("values_u.weight") {
            let gradient =
                RowGradient { bag, dim: config.input_dim(), weights: D::view(&dots), sources: D::shorten(x) };
            self.row_gradients("values_u.weight", D::read(&act.ids), gradient, &mut results)?;
        }
        for (name, values) in &made {
            results.tensors.push((format!("grad.{name}"), download(device, values)));
        }
        results.tensors.push(("output".to_owned(), download(device, &out)));
        let bags = tokens * bag;
        let (mut ids, mut scores) = (device.upload(&vec![0u32; bags]), poisoned(device, bags));
        let mut weights = poisoned(device, bags);
        device.copy(D::read(&act.ids), D::view_mut(&mut ids))?;
        device.copy(D::read(&act.scores), D::view_mut(&mut scores))?;
        device.copy(D::read(&act.weights), D::view_mut(&mut weights))?;
        device.synchronize()?;
        results.ids = device.download(&ids);
        results.tensors.push(("scores".to_owned(), download(device, &scores)));
        results.tensors.push(("weights".to_owned(), download(device, &weights)));
        Ok(results)
    }

    /// The gradient of the rows of a table, by a plan.
    fn row_gradients(
        &self,
        name: &str,
        ids: D::View<'_, u32>,
        gradient: RowGradient<'_, D>,
        results: &mut LayerResults,
    ) -> Result<(), D::Error> {
        let (device, entries) = (self.device, D::len(ids));
        let mut plan_ids = device.upload(&vec![0u32; PlanBuffers::<D>::ids_len(entries)]);
        let mut rows = poisoned(device, entries * gradient.dim);
        let unique = {
            let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut plan_ids), entries)?;
            let mut scratch = Memory::new(device, device.plan_scratch(entries));
            device.plan(ids, self.inputs.config.slots(), buffers.reborrow(), scratch.lend())?;
            device.reduce(buffers.plan(), gradient, D::view_mut(&mut rows))?;
            device.synchronize()?;
            PlanBuffers::<D>::ids_len(entries)
        };
        // The plan's buffers lie one after the other: how many rows there are, then the rows.
        let plan_ids = &device.download(&plan_ids)[..unique];
        let unique = plan_ids[0] as usize;
        results.rows.push((format!("grad.{name}.rows"), plan_ids[1..=unique].to_vec()));
        let mut rows = download(device, &rows);
        rows.truncate(unique * (rows.len() / entries.max(1)));
        results.tensors.push((format!("grad.{name}"), rows));
        Ok(())
    }
}

/// Lends gradients by name to [`backward`].
fn lend_grads<'a, D: TestDevice>(made: &'a mut [(&str, D::Buffer<D::Scalar>)], grads: &mut Grads<'a, D>) {
    for (name, values) in made {
        let values = Some(D::view_mut(values));
        match *name {
            "input" => grads.input = values,
            "keys" => grads.keys = values,
            "query_norm.weight" => grads.query_gain = values,
            "key_norm.weight" => grads.key_gain = values,
            _ => {
                let (module, part) = name.rsplit_once('.').unwrap_or((name, ""));
                let projection = match module {
                    SILU => &mut grads.silu,
                    VALUE_PROJ => &mut grads.value_proj,
                    SIGMOID => &mut grads.sigmoid,
                    _ => &mut grads.query,
                };
                *(if part == "bias" { &mut projection.bias } else { &mut projection.weight }) = values;
            }
        }
    }
}
