//! What a whole layer takes for one token.

use memlayer_core::device::Scratch;
use memlayer_core::layer::{Activations, Keys, Params, Projection, forward, forward_scratch};
use memlayer_core::{Bf16, Config, ScratchReq};
use memlayer_cuda::{Buffer, Cuda, CudaError, Rows};

use super::Case;
use super::device::{Bench, SETS};

const WIDTH: usize = 1024;

/// Memory+ at the paper's scale: queries with qk-norm, SiLU gate, value projection.
fn config() -> Config {
    let builder = Config::builder(WIDTH).heads(4).sub_keys(1024).half_dim(256).top_k(32).value_dim(WIDTH);
    builder.qk_norm(true).silu_gate(true).build().expect("a configuration")
}

/// A layer as it is packed for inference: sub-keys hold their norm and gain.
struct Weights {
    query: Buffer<f32>,
    query_gain: Buffer<f32>,
    keys: Buffer<Bf16>,
    silu: Buffer<f32>,
    value: Buffer<f32>,
}

struct State {
    layers: Vec<Weights>,
    values: Buffer<Bf16>,
    x: Buffer<f32>,
    out: Buffer<f32>,
    reals: Buffer<f32>,
    ids: Buffer<u32>,
    scratch: (Buffer<f32>, Buffer<u32>),
}

impl State {
    fn new(bench: &Bench<'_>, layers: usize) -> Result<Self, CudaError> {
        let (cuda, config) = (&bench.cuda, config());
        let weights = |layer: usize| {
            let seed = 10 * layer as u64;
            Ok(Weights {
                query: bench.reals(config.query_len() * WIDTH, seed)?,
                query_gain: bench.reals(config.gain_len(), seed + 1)?,
                keys: bench.codes(config.keys_len(), Bf16::from_f32)?,
                silu: bench.reals(WIDTH * WIDTH, seed + 2)?,
                value: bench.reals(WIDTH * WIDTH, seed + 3)?,
            })
        };
        let req = config.activations_req(1);
        let scratch = forward_scratch::<Rows<'_, Bf16>, Rows<'_, Bf16>, Cuda>(cuda, &config, 1);
        let buffers = |req: ScratchReq| Ok::<_, CudaError>((cuda.zeros(req.reals)?, cuda.zeros(req.ids)?));
        let (reals, ids) = buffers(req)?;
        Ok(Self {
            layers: (0..layers).map(weights).collect::<Result<_, CudaError>>()?,
            values: bench.codes(config.slots() * WIDTH, Bf16::from_f32)?,
            x: bench.reals(WIDTH, 5)?,
            out: cuda.zeros(WIDTH)?,
            reals,
            ids,
            scratch: buffers(scratch)?,
        })
    }
}

/// A token through all layers.
fn decode(cuda: &Cuda, state: &mut State) -> Result<(), CudaError> {
    let config = config();
    for layer in &state.layers {
        let keys = Rows::new(layer.keys.view(), config.half_dim());
        let values = Rows::new(state.values.view(), WIDTH);
        let project = |weight| Projection { weight, bias: None };
        let params = Params {
            query: project(layer.query.view()),
            keys: Keys::Packed(&keys),
            query_gain: Some(layer.query_gain.view()),
            values: &values,
            experts: None,
            silu: Some(project(layer.silu.view())),
            value_proj: Some(project(layer.value.view())),
            sigmoid: None,
        };
        let memory = Scratch { reals: state.reals.view_mut(), ids: state.ids.view_mut() };
        let mut activations = Activations::new(&config, 1, memory)?;
        let scratch = Scratch { reals: state.scratch.0.view_mut(), ids: state.scratch.1.view_mut() };
        forward(cuda, &config, &params, state.x.view(), &mut activations, state.out.view_mut(), scratch)?;
    }
    Ok(())
}

impl Bench<'_> {
    /// A layer for one token, as a graph: several layers with weights of their own, as a model has them, so that those of one
    /// have left the second-level cache when it is its turn again; and one alone, whose weights stay there.
    pub(super) fn layers(&self) -> Result<(), CudaError> {
        if !self.wants("layer decode (graph)") {
            return Ok(());
        }
        for (layers, ids) in [(SETS, "-"), (1, "cached")] {
            let mut state = State::new(self, layers)?;
            decode(&self.cuda, &mut state)?;
            let mut graph = self.cuda.graph(state, decode)?;
            // A hundred layers between two events: their own time would drown one.
            let ms = self.time(|_| (0..100 / layers).try_for_each(|_| graph.launch()))?;
            let case =
                Case { op: "layer decode (graph)", format: "bf16", ids, tokens: 1, width: WIDTH, slots: 1 << 20 };
            self.report(case, 0.0, ms / 100.0);
        }
        Ok(())
    }
}
