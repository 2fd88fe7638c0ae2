//! Checkpoints: a folder for each, complete or not there.
//!
//! `checkpoint-STEP/` holds `state.json`, `tokenizer.json`, `model.safetensors` (parameters by name, configuration in
//! the metadata), `moments.safetensors`, and with a memory `pool.safetensors` (rows and their state). It is written
//! under another name, synced and renamed: whatever happens, what bears the name is whole.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Tensor, Var};
use memlayer_cpu::Cpu;
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::{TrainConfig, Trainer};
use crate::config::ModelConfig;
use crate::error::{LmError, Result};
use crate::files::{sync_folder, write_synced};
use crate::model::{Model, PoolInit};
use crate::ops::with_values;
use crate::tokenizer::Tokenizer;

/// Where a run was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// The layout of this file.
    version: u32,
    step: u64,
    model: ModelConfig,
    train: TrainConfig,
    /// Of the questions and answers trained.
    data: String,
}

const VERSION: u32 = 1;

/// A complete checkpoint on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    folder: PathBuf,
    /// Steps made.
    pub step: u64,
}

/// The checkpoint of the most steps in a training folder.
///
/// # Errors
/// [`LmError::Io`] if the folder cannot be read.
pub fn latest(folder: &Path) -> Result<Option<Saved>> {
    Ok(all(folder)?.into_iter().max_by_key(|saved| saved.step))
}

fn all(folder: &Path) -> Result<Vec<Saved>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(|e| LmError::io(folder, e))? {
        let path = entry.map_err(|e| LmError::io(folder, e))?.path();
        let step = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix("checkpoint-"));
        if let Some(step) = step.and_then(|s| s.parse().ok()) {
            found.push(Saved { folder: path, step });
        }
    }
    Ok(found)
}

/// Removes what a killed process left: nobody else writes here while this one has the lock.
pub(super) fn clear(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(|e| LmError::io(folder, e))? {
        let path = entry.map_err(|e| LmError::io(folder, e))?.path();
        if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("unfinished-")) {
            fs::remove_dir_all(&path).map_err(|e| LmError::io(&path, e))?;
        }
    }
    Ok(())
}

/// `f32` values as a safetensors view.
struct Values<'a> {
    shape: Vec<usize>,
    values: Cow<'a, [f32]>,
}

impl View for &Values<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(bytemuck::cast_slice(&self.values))
    }
    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}

fn write_tensors(path: &Path, tensors: &[(String, Values<'_>)], metadata: Option<(&str, String)>) -> Result<()> {
    let metadata = metadata.map(|(key, text)| HashMap::from([(key.to_owned(), text)]));
    let views = tensors.iter().map(|(name, values)| (name, values));
    let io = |e: std::io::Error| LmError::io(path, e);
    safetensors::serialize_to_file(views, metadata, path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(e) => io(e),
        e => LmError::file(path, e.to_string()),
    })?;
    fs::File::open(path).and_then(|f| f.sync_all()).map_err(io)
}

fn json(path: &Path, value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|e| LmError::file(path, e.to_string()))
}

/// A safetensors file, read.
struct Tensors {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Tensors {
    fn open(path: PathBuf) -> Result<Self> {
        let bytes = fs::read(&path).map_err(|e| LmError::io(&path, e))?;
        SafeTensors::deserialize(&bytes).map_err(|e| LmError::file(&path, e.to_string()))?;
        Ok(Self { path, bytes })
    }

    /// The `f32` values of a tensor of this many.
    fn get(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let fail = |problem: String| Err(LmError::file(&self.path, problem));
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|e| LmError::file(&self.path, e.to_string()))?;
        let Ok(tensor) = tensors.tensor(name) else { return fail(format!("has no tensor `{name}`")) };
        let found: usize = tensor.shape().iter().product();
        if tensor.dtype() != Dtype::F32 || found != len {
            return fail(format!("tensor `{name}` is {found} of {:?}, not {len} of F32", tensor.dtype()));
        }
        let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => fail(format!("tensor `{name}`, element {at}: {} is no finite number", values[at])),
            None => Ok(values),
        }
    }
}

/// The parameters of a checkpoint, read but not yet in place.
struct Parameters {
    dense: Vec<(Vec<f32>, Var)>,
    /// Rows and their state.
    pool: Option<(Vec<f32>, Vec<f32>)>,
}

impl Parameters {
    fn put_into(self, model: &Model, step: u64) -> Result<()> {
        for (values, var) in self.dense {
            var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?;
        }
        if let (Some((rows, state)), Some(pool)) = (self.pool, model.pool()) {
            pool.restore(&rows, &state, step)?;
        }
        Ok(())
    }
}

impl Saved {
    /// The tokenizer.
    ///
    /// # Errors
    /// As [`Tokenizer::open`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::open(&self.folder.join("tokenizer.json"))
    }

    /// The configurations of model and training.
    ///
    /// # Errors
    /// [`LmError::File`] if they are not what they must be, or of another version.
    pub fn configs(&self) -> Result<(ModelConfig, TrainConfig)> {
        let state = self.state()?;
        Ok((state.model, state.train))
    }

    /// The model as it was, with a pool whose values can be read and trained on.
    ///
    /// # Errors
    /// [`LmError::File`] if a file is damaged or of other sizes.
    pub fn model(&self, cpu: &Arc<Cpu>) -> Result<Model> {
        let state = self.state()?;
        let init = PoolInit { rule: state.train.value_rule.into() };
        let mut model = Model::new(&state.model, init, &cpu.into(), state.train.seed)?;
        model.set_data(u64::from_str_radix(&state.data, 16).unwrap_or(0));
        self.parameters(&model)?.put_into(&model, state.step)?;
        Ok(model)
    }

    /// Reads the parameters of a model of these sizes.
    fn parameters(&self, model: &Model) -> Result<Parameters> {
        let file = Tensors::open(self.folder.join("model.safetensors"))?;
        let mut dense = Vec::new();
        for (name, var) in model.variables().all() {
            dense.push((file.get(&name, var.elem_count())?, var));
        }
        let pool = match model.pool() {
            Some(pool) => {
                let file = Tensors::open(self.folder.join("pool.safetensors"))?;
                let rows = file.get("values.weight", pool.rows() * pool.dim())?;
                let state_len = pool.rows() * pool.rule().state_len(pool.dim());
                Some((rows, file.get("values.state", state_len)?))
            }
            None => None,
        };
        Ok(Parameters { dense, pool })
    }

    fn state(&self) -> Result<State> {
        let path = self.folder.join("state.json");
        let text = fs::read_to_string(&path).map_err(|e| LmError::io(&path, e))?;
        let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| LmError::file(&path, e.to_string()))?;
        if value["version"] != VERSION {
            return Err(LmError::file(
                &path,
                format!("is of version {}, this program reads {VERSION}", value["version"]),
            ));
        }
        let state: State = serde_json::from_value(value).map_err(|e| LmError::file(&path, e.to_string()))?;
        state.model.check().map_err(|e| LmError::file(&path, e.to_string()))?;
        Ok(state)
    }
}

impl Trainer {
    /// Writes a checkpoint into `folder` and removes the older ones but the last.
    ///
    /// # Errors
    /// [`LmError::Io`] with the file; checkpoints that were there stay.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let target = folder.join(format!("checkpoint-{}", self.step));
        if target.exists() {
            return Ok(());
        }
        let temporary = folder.join(format!("unfinished-{}", std::process::id()));
        let result = self.write_all(&temporary).and_then(|()| {
            fs::rename(&temporary, &target).map_err(|e| LmError::io(&target, e))?;
            sync_folder(&target)
        });
        if result.is_err() {
            let _ = fs::remove_dir_all(&temporary);
            return result;
        }
        let mut saved = all(folder)?;
        saved.sort_by_key(|saved| core::cmp::Reverse(saved.step));
        for old in saved.iter().skip(2) {
            // Renamed first: a removal that is cut off must not leave a folder that looks whole.
            let doomed = folder.join(format!("unfinished-{}", old.step));
            if fs::rename(&old.folder, &doomed).is_ok() {
                let _ = fs::remove_dir_all(&doomed);
            }
        }
        Ok(())
    }

    fn write_all(&self, folder: &Path) -> Result<()> {
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(|e| LmError::io(folder, e))?;
        }
        fs::create_dir_all(folder).map_err(|e| LmError::io(folder, e))?;
        let text = |name: &str, text: String| {
            let path = folder.join(name);
            write_synced(&path, |w| std::io::Write::write_all(w, text.as_bytes()).map_err(|e| LmError::io(&path, e)))
        };
        text("tokenizer.json", self.tokenizer.to_json()?.to_owned())?;
        let state = self.state();
        text("state.json", json(folder, &state)?)?;

        let mut tensors = Vec::new();
        for (name, var) in self.model.variables().all() {
            let values = Cow::Owned(with_values(var.as_tensor(), |v| Ok(v.to_vec()))?);
            tensors.push((name, Values { shape: var.dims().to_vec(), values }));
        }
        write_tensors(&folder.join("model.safetensors"), &tensors, Some(("config", json(folder, &state.model)?)))?;
        let mut tensors = Vec::new();
        for moments in self.optimizer.moments() {
            let (name, [first, second]) = moments?;
            for (moment, values) in [("first", first), ("second", second)] {
                tensors.push((format!("{name}.{moment}"), Values { shape: vec![values.len()], values }));
            }
        }
        write_tensors(&folder.join("moments.safetensors"), &tensors, None)?;
        if let Some(pool) = self.model.pool() {
            pool.read(|rows, state| {
                let tensors = [
                    ("values.weight".to_owned(), Values { shape: vec![pool.rows(), pool.dim()], values: rows.into() }),
                    ("values.state".to_owned(), Values { shape: vec![state.len()], values: state.into() }),
                ];
                write_tensors(&folder.join("pool.safetensors"), &tensors, None)
            })??;
        }
        sync_folder(&folder.join("x"))
    }

    fn state(&self) -> State {
        let (model, train) = (self.model.config().clone(), self.config.clone());
        State { version: VERSION, step: self.step, model, train, data: format!("{:016x}", self.model.data()) }
    }

    /// Goes on from a checkpoint of the same configuration and data.
    pub(super) fn restore(&mut self, saved: &Saved) -> Result<()> {
        let (state, expected) = (saved.state()?, self.state());
        let path = saved.folder.join("state.json");
        let differs = |field: &str, found: &dyn core::fmt::Debug, wanted: &dyn core::fmt::Debug| {
            Err(LmError::file(&path, format!("{field} is {found:?}, but this run's is {wanted:?}")))
        };
        if state.model != expected.model {
            return differs("model", &state.model, &expected.model);
        }
        if state.train != expected.train {
            return differs("train", &state.train, &expected.train);
        }
        if state.data != expected.data {
            return differs("data", &state.data, &expected.data);
        }
        self.tokenizer = saved.tokenizer()?;

        // All is read and checked before anything changes.
        let parameters = saved.parameters(&self.model)?;
        let lengths: HashMap<String, usize> =
            self.model.variables().all().into_iter().map(|(name, var)| (name, var.elem_count())).collect();
        let moments = Tensors::open(saved.folder.join("moments.safetensors"))?;
        self.optimizer.restore(state.step, |name| {
            let len = lengths.get(name).copied().unwrap_or(0);
            Ok((moments.get(&format!("{name}.first"), len)?, moments.get(&format!("{name}.second"), len)?))
        })?;
        parameters.put_into(&self.model, state.step)?;
        self.step = state.step;
        Ok(())
    }
}
