//! Whole layers of ours, and whole training steps.

use std::sync::Arc;

use memlayer_core::layer::{
    Activations, Backend, Grads, Keys, Params, Projection, ProjectionGrads, TableUpdate, backward_and_update,
    backward_and_update_scratch, forward as run, forward_scratch,
};
use memlayer_core::ops::RowReduce;
use memlayer_core::ops::optim::{Adam, RowRule, RowwiseAdagrad, Step};
use memlayer_core::ops::plan::PlanBuffers;
use memlayer_core::{Config, DenseRows, Extent, ScaledRows, Scratch, ScratchReq, Table, TrainRows};
use memlayer_cpu::Cpu;

use super::Case;
use super::inputs::{Tables, int8_panels, memory, reals};
use super::ops::Call;
use crate::error::BenchError;

/// Slots of the table that a step over a large one is measured against.
pub(super) const SMALL: usize = 1 << 16;

/// Sets of inputs that take turns.
const INPUTS: usize = 16;

type F32Rows<'a> = DenseRows<'a, f32>;
type Train<'a> = TrainRows<'a, f32, f32>;

fn config(case: &Case) -> Result<Config, BenchError> {
    let config = Config::builder(case.v).heads(case.heads).sub_keys(case.sub_keys).half_dim(case.half_dim);
    Ok(config.top_k(case.top_k).silu_gate(true).build()?)
}

struct Memory(Vec<f32>, Vec<u32>);

impl Memory {
    fn new(req: ScratchReq) -> Self {
        Self(vec![0.0; req.reals], vec![0; req.ids])
    }
    fn lend(&mut self) -> Scratch<'_, Cpu> {
        Scratch { reals: &mut self.0, ids: &mut self.1 }
    }
}

/// The dense parameters of a Memory+ layer: those of the query, gate and value projections, weights and biases.
struct Dense {
    query: [Vec<f32>; 2],
    gate: [Vec<f32>; 2],
    out: [Vec<f32>; 2],
}

impl Dense {
    fn new(config: &Config, scale: f32) -> Self {
        let make = |outputs: usize, seed: u64| {
            let scaled = |n, seed| reals(n, seed).iter().map(|x| x * scale).collect();
            [scaled(outputs * config.input_dim(), seed), scaled(outputs, seed + 1)]
        };
        Self {
            query: make(config.query_len(), 10),
            gate: make(config.value_dim(), 20),
            out: make(config.output_dim(), 30),
        }
    }

    fn params<'a, V, K, E>(&'a self, keys: Keys<'a, Cpu, K>, values: &'a V) -> Params<'a, Cpu, V, K, E> {
        let projection = |p: &'a [Vec<f32>; 2]| Projection { weight: &p[0][..], bias: Some(&p[1][..]) };
        Params {
            query: projection(&self.query),
            keys,
            query_gain: None,
            values,
            experts: None,
            silu: Some(projection(&self.gate)),
            value_proj: Some(projection(&self.out)),
            sigmoid: None,
        }
    }
}

/// A layer's forward, over f32 rows and keys, or over int8 rows and keys with panels.
pub(super) fn forward(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables) -> Result<Call, BenchError> {
    let config = config(case)?;
    let rows = tables.get(case.format, case.v, case.slots)?;
    let dense = Dense::new(&config, 0.06);
    let keys = reals(config.keys_len(), 5);
    let mut pass = Pass::new(case, cpu, config);
    if case.format == "f32" {
        return Ok(Box::new(move || {
            let values = DenseRows::<f32>::new(bytemuck::cast_slice(&rows.codes), pass.case.v);
            let params = dense.params::<_, F32Rows<'_>, _>(Keys::Trained { keys: &keys, gain: None }, &values);
            pass.forward(&params)
        }));
    }
    let keys = int8_panels(&keys, config.half_dim(), config.sub_keys(), cpu)?;
    Ok(Box::new(move || {
        let v = pass.case.v;
        let values = ScaledRows::<i8>::new(bytemuck::cast_slice(&rows.codes), &rows.scales, v, v);
        let Some(values) = values else { return Ok(()) };
        pass.forward(&dense.params(Keys::Packed(&keys), &values))
    }))
}

/// What a forward pass needs.
struct Pass {
    case: Case,
    cpu: Arc<Cpu>,
    config: Config,
    inputs: Vec<Vec<f32>>,
    turn: usize,
    activations: Memory,
    scratch: Option<Memory>,
    out: Vec<f32>,
}

impl Pass {
    fn new(case: &Case, cpu: &Arc<Cpu>, config: Config) -> Self {
        Self {
            case: case.clone(),
            cpu: cpu.clone(),
            config,
            inputs: (0..INPUTS).map(|i| reals(case.t * case.v, 40 + i as u64)).collect(),
            turn: 0,
            activations: Memory::new(config.activations_req(case.t)),
            scratch: None,
            out: vec![0.0; case.t * config.output_dim()],
        }
    }

    fn forward<V: Table, K: Table>(&mut self, params: &Params<'_, Cpu, V, K>) -> Result<(), BenchError>
    where
        Cpu: Backend<V, K>,
    {
        let (cpu, config, t) = (&*self.cpu, &self.config, self.case.t);
        self.turn = (self.turn + 1) % INPUTS;
        let scratch = self.scratch.get_or_insert_with(|| Memory::new(forward_scratch::<V, K, Cpu>(cpu, config, t)));
        let mut act = Activations::new(config, t, self.activations.lend())?;
        Ok(run(cpu, config, params, &self.inputs[self.turn], &mut act, &mut self.out, scratch.lend())?)
    }
}

/// Forward, backward and update of everything; the row rule is the case's format.
pub(super) fn step(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables) -> Result<Call, BenchError> {
    // The table is changed: it is this case's own, and the last one is in the way of its state.
    tables.clear();
    step_of(case, cpu, case.t)
}

/// A step over the case's table, and one over [`SMALL`] slots that touches as many rows.
pub(super) fn grown_step(case: &Case, cpu: &Arc<Cpu>, tables: &mut Tables) -> Result<[Call; 2], BenchError> {
    tables.clear();
    let mut small = case.clone();
    (small.slots, small.sub_keys) = (SMALL, SMALL.isqrt());
    // The tokens of a small table share rows; in the large one about as many rows are touched by fewer tokens, some twice.
    let (slots, entries) = (SMALL as f64, (case.t * case.bag()) as f64);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most T")]
    let distinct = (slots * (1.0 - (-entries / slots).exp()) / case.bag() as f64).ceil() as usize;
    Ok([step_of(case, cpu, distinct)?, step_of(&small, cpu, case.t)?])
}

fn step_of(case: &Case, cpu: &Arc<Cpu>, distinct: usize) -> Result<Call, BenchError> {
    if case.format == "adam" {
        step_by(Adam { betas: (0.9, 0.999), eps: 1e-8 }, case, cpu, distinct)
    } else {
        step_by(RowwiseAdagrad { eps: 1e-8 }, case, cpu, distinct)
    }
}

/// The same by a rule; of the tokens `distinct` differ.
fn step_by<O: RowRule + 'static>(rule: O, case: &Case, cpu: &Arc<Cpu>, distinct: usize) -> Result<Call, BenchError> {
    let (config, t, v, bag, cpu) = (config(case)?, case.t, case.v, case.bag(), cpu.clone());
    let (mut values, mut state) = (memory::<f32>(case.slots * v)?, memory::<f32>(case.slots * rule.state_len(v))?);
    values.fill(0.01);
    state.fill(0.01);
    let (mut dense, mut grads) = (Dense::new(&config, 0.06), Dense::new(&config, 0.0));
    let (mut keys, mut dkeys) = (reals(config.keys_len(), 5), vec![0.0; config.keys_len()]);
    let mut adam_w = AdamW::default();
    let mut inputs: Vec<_> = (0..INPUTS).map(|i| reals(t * v, 40 + i as u64)).collect();
    inputs.iter_mut().for_each(|x| x.copy_within(..(t - distinct) * v, distinct * v));
    let mut activations = Memory::new(config.activations_req(t));
    let (entries, threads, mut count, mut turn) = (t * bag, case.threads, 0, 0);
    let req = forward_scratch::<F32Rows<'_>, F32Rows<'_>, Cpu>(&cpu, &config, t)
        .or(backward_and_update_scratch::<Train<'_>, O, F32Rows<'_>, F32Rows<'_>, Cpu>(&cpu, &config, t))
        .or(cpu.plan_scratch(entries));
    let mut scratch = Memory::new(req);
    let (mut out, mut dout, mut sums) = (vec![0.0; t * v], vec![0.0; t * v], vec![0.0; t * v]);
    let mut plan = vec![0; PlanBuffers::<Cpu>::ids_len(entries)];
    Ok(Box::new(move || {
        count += 1;
        turn = (turn + 1) % INPUTS;
        let x = &inputs[turn][..];
        let table = DenseRows::new(&values[..], v);
        let extent = Extent { rows: table.rows(), dim: v };
        let params = dense.params::<_, F32Rows<'_>, F32Rows<'_>>(Keys::Trained { keys: &keys, gain: None }, &table);
        let mut act = Activations::new(&config, t, activations.lend())?;
        run(&*cpu, &config, &params, x, &mut act, &mut out[..], scratch.lend())?;
        // The gradient of the mean square.
        let factor = 2.0 / out.len() as f32;
        dout.iter_mut().zip(&out).for_each(|(d, y)| *d = factor * y);
        let mut wanted = Grads::new(&mut sums[..]);
        wanted.keys = Some(&mut dkeys[..]);
        for (to, from) in [
            (&mut wanted.query, &mut grads.query),
            (&mut wanted.silu, &mut grads.gate),
            (&mut wanted.value_proj, &mut grads.out),
        ] {
            let [weight, bias] = from;
            *to = ProjectionGrads { weight: Some(&mut weight[..]), bias: Some(&mut bias[..]) };
        }
        let (mut buffers, _) = PlanBuffers::<Cpu>::carve(&mut plan[..], entries)?;
        cpu.plan(&*act.ids, extent.rows, buffers.reborrow(), scratch.lend())?;
        let params = dense.params::<_, F32Rows<'_>, F32Rows<'_>>(Keys::Trained { keys: &keys, gain: None }, &extent);
        let state_len = rule.state_len(v);
        let Some(table) = TrainRows::new(&mut values[..], v, &mut state[..], state_len) else { return Ok(()) };
        let step = Step::new(1e-3, count);
        let table = TableUpdate { table, rule: &rule, step: &step, plan: buffers.plan() };
        backward_and_update(&*cpu, &config, &params, x, &mut act, &dout[..], wanted, table, scratch.lend())?;
        let parts = dense.query.iter_mut().chain(&mut dense.gate).chain(&mut dense.out).chain([&mut keys]);
        let from = grads.query.iter().chain(&grads.gate).chain(&grads.out).chain([&dkeys]);
        adam_w.step(threads, parts.zip(from).map(|(x, grad)| (&mut x[..], &grad[..])));
        Ok(())
    }))
}

/// AdamW of the dense part, as the peer has it: its arithmetic, by as many threads and in as wide vectors.
#[derive(Default)]
struct AdamW {
    /// Both moments of every part.
    moments: Vec<[Vec<f32>; 2]>,
    arch: pulp::Arch,
}

impl AdamW {
    fn step<'a>(&mut self, threads: usize, parts: impl Iterator<Item = (&'a mut [f32], &'a [f32])>) {
        let mut shares: Vec<Vec<_>> = (0..threads).map(|_| vec![]).collect();
        let parts: Vec<_> = parts.collect();
        self.moments.resize_with(parts.len(), Default::default);
        for ((x, grad), [first, second]) in parts.into_iter().zip(&mut self.moments) {
            first.resize(x.len(), 0.0);
            second.resize(x.len(), 0.0);
            let len = x.len().div_ceil(threads).max(1);
            let moments = first.chunks_mut(len).zip(second.chunks_mut(len));
            for (share, part) in shares.iter_mut().zip(x.chunks_mut(len).zip(grad.chunks(len)).zip(moments)) {
                share.push(part);
            }
        }
        let arch = self.arch;
        std::thread::scope(|scope| {
            let mine = shares.pop();
            for share in shares {
                scope
                    .spawn(move || share.into_iter().for_each(|((x, g), (m, v))| arch.dispatch(|| adam_w(x, g, m, v))));
            }
            for ((x, g), (m, v)) in mine.into_iter().flatten() {
                arch.dispatch(|| adam_w(x, g, m, v));
            }
        });
    }
}

#[inline(always)]
fn adam_w(x: &mut [f32], grad: &[f32], first: &mut [f32], second: &mut [f32]) {
    for (((x, m), v), &g) in x.iter_mut().zip(first).zip(second).zip(grad) {
        *m = 0.9 * *m + 0.1 * g;
        *v = 0.999 * *v + 0.001 * g * g;
        *x -= 1e-3 * (*m / (v.sqrt() + 1e-8) + 0.01 * *x);
    }
}
