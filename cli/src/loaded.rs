//! A model from a packed file or from a training folder.

use std::path::Path;
use std::sync::Arc;

use memlayer_core::element::Format;
use memlayer_cpu::Cpu;
use memlayer_lm::infer::Reader;
use memlayer_lm::model::Model;
use memlayer_lm::packed::PackedModel;
use memlayer_lm::tokenizer::Tokenizer;
use memlayer_lm::{LmError, ModelConfig, train};

use crate::error::CliError;

/// A model that answers.
pub(crate) enum Loaded {
    /// A packed file, read into memory.
    Packed(Box<PackedModel<Vec<u8>>>),
    /// The last checkpoint of a training.
    Trained(Box<Model>, Box<Tokenizer>),
}

impl Loaded {
    /// Loads what `path` is.
    pub(crate) fn open(path: &Path, cpu: &Arc<Cpu>) -> Result<Self, CliError> {
        let kind = std::fs::metadata(path).map_err(|e| LmError::io(path, e))?;
        if !kind.is_dir() {
            let bytes = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
            return Ok(Self::Packed(Box::new(PackedModel::new(path, bytes)?)));
        }
        let saved = train::latest(path)?.ok_or_else(|| LmError::file(path, "has no checkpoint"))?;
        Ok(Self::Trained(Box::new(saved.model(cpu)?), Box::new(saved.tokenizer()?)))
    }

    /// The sizes.
    pub(crate) fn config(&self) -> &ModelConfig {
        match self {
            Self::Packed(model) => model.config(),
            Self::Trained(model, _) => model.config(),
        }
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        match self {
            Self::Packed(model) => model.tokenizer(),
            Self::Trained(_, tokenizer) => tokenizer,
        }
    }

    /// The format of sub-keys and values.
    pub(crate) fn format(&self) -> Result<Format, CliError> {
        match self {
            Self::Packed(model) => Ok(model.format()?),
            Self::Trained(..) => Ok(Format::F32),
        }
    }

    /// The fingerprint of the data it was trained on; 0 if nobody said.
    pub(crate) fn data(&self) -> Result<u64, CliError> {
        match self {
            Self::Packed(model) => Ok(model.data()?),
            Self::Trained(model, _) => Ok(model.data()),
        }
    }

    /// Reads the model.
    pub(crate) fn with_reader<R>(&self, look: impl FnOnce(&Reader<'_>) -> Result<R, LmError>) -> Result<R, CliError> {
        match self {
            Self::Packed(model) => Ok(model.with_reader(look)?),
            Self::Trained(model, _) => Ok(model.with_reader(look)?),
        }
    }
}
