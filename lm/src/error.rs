//! What can go wrong, with the file, the field and the values.

use std::path::{Path, PathBuf};

/// An error of data, of a model or of a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LmError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of a data file is not what it must be.
    #[error("{}:{line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A file as a whole is not what it must be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Sizes that make no model.
    #[error("model configuration: {0}")]
    Config(String),
    /// A training run that cannot be.
    #[error("training configuration: {0}")]
    Training(String),
    /// The tokenizer's own.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A question that does not fit the model.
    #[error("a question of {found} tokens exceeds the {limit} this model reads")]
    TooLong {
        /// Its tokens.
        found: usize,
        /// The longest.
        limit: usize,
    },
    /// A memory layer's own.
    #[error(transparent)]
    Memory(#[from] memlayer_candle::Error),
    /// An operation's own.
    #[error(transparent)]
    Argument(#[from] memlayer_core::ArgError),
    /// A packed model's own.
    #[error(transparent)]
    Infer(#[from] memlayer_infer::Error),
    /// candle's own.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl LmError {
    /// An error of reading or writing `path`.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// An error of the content of `path`.
    pub fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into() }
    }

    /// An error of a line of `path`, counted from 1.
    pub fn line(path: &Path, line: usize, problem: impl Into<String>) -> Self {
        Self::Line { path: path.to_owned(), line, problem: problem.into() }
    }
}

/// What functions here return.
pub type Result<T, E = LmError> = core::result::Result<T, E>;
