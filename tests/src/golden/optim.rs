//! Row rules: a table after each of three steps with repeated rows.

use memlayer_core::ops::optim::{Adagrad, Adam, RowRule, RowUpdate, RowwiseAdagrad, Sgd, Step};
use memlayer_core::ops::plan::{PlanBuffers, RowGradient};
use memlayer_core::{Real, Table};
use serde::Deserialize;

use super::file::{GoldenError, GoldenFile, Problem};
use super::{Compared, relative_error};
use crate::device::{Memory, TestDevice};

#[derive(Deserialize)]
struct OptimConfig {
    lr: f64,
    betas: (f64, f64),
    eps_adam: f64,
    eps_adagrad: f64,
}

/// A golden file of row rules.
pub(super) struct OptimFile<'a> {
    file: &'a GoldenFile,
    config: OptimConfig,
    dim: usize,
    table: Vec<f64>,
    steps: Vec<(Vec<u32>, Vec<f64>)>,
}

impl<'a> OptimFile<'a> {
    pub(super) fn read(file: &'a GoldenFile) -> Result<Self, GoldenError> {
        let (table, shape) = file.floats("values")?;
        let [rows, dim] = shape[..] else {
            let (tensor, expected) = ("values".to_owned(), vec![0, 0]);
            return Err(file.error(Problem::Shape { tensor, expected, found: shape }));
        };
        let mut steps = Vec::new();
        while file.has(&format!("step{}.rows", steps.len())) {
            let (ids, _) = file.ids(&format!("step{}.rows", steps.len()), rows)?;
            let grads = file.floats_of(&format!("step{}.grads", steps.len()), &[ids.len(), dim])?;
            steps.push((ids, grads));
        }
        Ok(Self { file, config: file.config()?, dim, table, steps })
    }

    pub(super) fn run<D>(&self, device: &D, bound: f64) -> Result<Vec<Compared>, GoldenError>
    where
        D: TestDevice<Error: core::error::Error + Send + Sync + 'static>,
        D: for<'x> RowUpdate<<D as TestDevice>::Train<'x>, Sgd>,
        D: for<'x> RowUpdate<<D as TestDevice>::Train<'x>, Adam>,
        D: for<'x> RowUpdate<<D as TestDevice>::Train<'x>, Adagrad>,
        D: for<'x> RowUpdate<<D as TestDevice>::Train<'x>, RowwiseAdagrad>,
    {
        let (eps, betas) = (self.config.eps_adagrad, self.config.betas);
        let mut all = self.run_rule(device, "sgd", Sgd, bound)?;
        all.extend(self.run_rule(device, "sparse_adam", Adam { betas, eps: self.config.eps_adam }, bound)?);
        all.extend(self.run_rule(device, "adagrad", Adagrad { eps }, bound)?);
        all.extend(self.run_rule(device, "rowwise_adagrad", RowwiseAdagrad { eps }, bound)?);
        Ok(all)
    }

    fn run_rule<D, O>(&self, device: &D, name: &str, rule: O, bound: f64) -> Result<Vec<Compared>, GoldenError>
    where
        D: TestDevice<Error: core::error::Error + Send + Sync + 'static>,
        D: for<'x> RowUpdate<<D as TestDevice>::Train<'x>, O>,
        O: RowRule,
    {
        let scalars = |values: &[f64]| values.iter().map(|&v| D::Scalar::of(v)).collect::<Vec<_>>();
        let mut compared = Vec::new();
        let mut table = device.upload(&scalars(&self.table));
        let state = vec![D::Scalar::of(0.0); self.table.len() / self.dim * rule.state_len(self.dim)];
        let mut state = device.upload(&state);
        for (count, (ids, grads)) in self.steps.iter().enumerate() {
            let tensor = format!("{name}.after{count}");
            let (expected, _) = self.file.floats(&tensor)?;
            // Every entry has a gradient of its own: a bag of one, with weight one.
            let weights = device.upload(&vec![D::Scalar::of(1.0); ids.len()]);
            let sources = device.upload(&scalars(grads));
            let gradient =
                RowGradient { bag: 1, dim: self.dim, weights: D::view(&weights), sources: D::view(&sources) };
            let rows = D::train(&mut table, self.dim, &mut state, rule.state_len(self.dim));
            let step = Step::new(self.config.lr, count as u64 + 1);
            change(device, rows, &rule, &step, ids, gradient)
                .map_err(|e| self.file.error(Problem::Device(Box::new(e))))?;
            let found: Vec<f64> = device.download(&table).iter().map(|v| v.wide()).collect();
            compared.push(Compared { error: relative_error(&expected, &found), tensor, bound });
        }
        Ok(compared)
    }
}

/// Plans, reduces and updates.
fn change<D, S, O>(
    device: &D,
    table: S,
    rule: &O,
    step: &Step,
    ids: &[u32],
    gradient: RowGradient<'_, D>,
) -> Result<(), D::Error>
where
    S: Table,
    D: TestDevice + RowUpdate<S, O>,
    O: RowRule,
{
    let rows = table.rows();
    let mut plan_ids = device.upload(&vec![0u32; PlanBuffers::<D>::ids_len(ids.len())]);
    let (mut buffers, _) = PlanBuffers::<D>::carve(D::view_mut(&mut plan_ids), ids.len())?;
    let mut scratch = Memory::new(device, device.plan_scratch(ids.len()));
    let ids = device.upload(ids);
    device.plan(D::view(&ids), rows, buffers.reborrow(), scratch.lend())?;
    let mut scratch = Memory::new(device, device.reduce_and_update_scratch(gradient.dim));
    device.reduce_and_update(table, rule, step, buffers.plan(), gradient, scratch.lend())?;
    device.synchronize()
}
