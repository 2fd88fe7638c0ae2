//! A layer: selection, output and all gradients.

use memlayer_core::config::Kind;
use memlayer_core::layer::Backend;
use memlayer_core::ops::RowReduce;
use memlayer_core::{Config, Device};
use serde::Deserialize;

use super::file::{GoldenError, GoldenFile, Problem};
use super::{Compared, relative_error};
use crate::device::TestDevice;
use crate::layer::{LayerInputs, parameters};

#[derive(Deserialize)]
struct LayerConfig {
    kind: String,
    input_dim: usize,
    output_dim: usize,
    value_dim: usize,
    key_dim: usize,
    heads: usize,
    sub_keys: usize,
    knn: usize,
    tokens: usize,
    #[serde(default)]
    swilu: bool,
    #[serde(default)]
    gated: bool,
    #[serde(default)]
    qk_norm: bool,
}

/// A golden file of a layer.
pub(super) struct LayerFile<'a> {
    file: &'a GoldenFile,
    layer: LayerInputs,
    ids: Vec<u32>,
}

impl<'a> LayerFile<'a> {
    pub(super) fn read(file: &'a GoldenFile) -> Result<Self, GoldenError> {
        let c: LayerConfig = file.config()?;
        let kind = match c.kind.as_str() {
            "memory" => Kind::Memory,
            "peer" => Kind::Peer,
            other => return Err(file.error(Problem::Config(format!("kind `{other}` is neither memory nor peer")))),
        };
        if !c.key_dim.is_multiple_of(2) {
            return Err(file.error(Problem::Config(format!("key_dim {} is odd", c.key_dim))));
        }
        let config = Config::builder(c.input_dim)
            .kind(kind)
            .output_dim(c.output_dim)
            .value_dim(c.value_dim)
            .heads(c.heads)
            .sub_keys(c.sub_keys)
            .half_dim(c.key_dim / 2)
            .top_k(c.knn)
            .qk_norm(c.qk_norm)
            .silu_gate(c.swilu)
            .sigmoid_gate(c.gated)
            .build()
            .map_err(|e| file.error(Problem::Config(e.to_string())))?;

        let mut tensors = Vec::new();
        for (name, shape) in parameters(&config, c.tokens) {
            // The projections of the published layer all have a bias, but a file without one is as good.
            if name.ends_with(".bias") && !file.has(&name) {
                continue;
            }
            let values = file.floats_of(&name, &shape)?;
            tensors.push((name, values));
        }
        let (ids, shape) = file.ids("indices", config.slots())?;
        if ids.len() != c.tokens * config.bag_len() {
            let (tensor, expected) = ("indices".to_owned(), vec![c.tokens, config.heads(), config.top_k()]);
            return Err(file.error(Problem::Shape { tensor, expected, found: shape }));
        }
        let grad_output = file.floats_of("grad_output", &[c.tokens, config.output_dim()])?;
        let layer = LayerInputs { config, tokens: c.tokens, tensors, grad_output };
        Ok(Self { file, layer, ids })
    }

    /// Runs the layer on `device`: every tensor compared, and whether every index agrees.
    pub(super) fn run<D>(&self, device: &D, bound: f64) -> Result<(Vec<Compared>, bool), GoldenError>
    where
        D: TestDevice<Error: core::error::Error + Send + Sync + 'static> + RowReduce,
        D: for<'x> Backend<<D as Device>::Rows<'x>, <D as Device>::Rows<'x>>,
    {
        let results = self.layer.run(device, |_| true).map_err(|e| self.file.error(Problem::Device(Box::new(e))))?;
        let mut compared = Vec::new();
        for (tensor, found) in results.tensors {
            let (expected, _) = self.file.floats(&tensor)?;
            compared.push(Compared { error: relative_error(&expected, &found), tensor, bound });
        }
        for (tensor, rows) in results.rows {
            let (expected, _) = self.file.ids(&tensor, self.layer.config.slots())?;
            let differing = expected.iter().zip(&rows).filter(|(e, f)| e != f).count();
            let missing = expected.len().abs_diff(rows.len());
            compared.push(Compared { tensor, error: (differing + missing) as f64, bound: 0.0 });
        }
        Ok((compared, results.ids == self.ids))
    }
}
