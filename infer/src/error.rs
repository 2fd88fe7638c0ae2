//! What can go wrong.

use core::fmt;

use memlayer_core::{ArgError, ConfigError};
use memlayer_quantize::ImageError;

/// Why a model cannot be read or a question not be answered.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The image's own.
    Image(ImageError),
    /// An operation's own.
    Argument(ArgError),
    /// The memory's sizes make no layer.
    Memory(ConfigError),
    /// The section `model` is not as long as sizes are, or of another version.
    Model {
        /// Its bytes.
        bytes: usize,
        /// Its version, 0 if it is too short to have one.
        version: u32,
    },
    /// A size is none that a model can have.
    Size {
        /// Its name.
        name: &'static str,
        /// What it is.
        found: u64,
        /// The greatest it may be; from 1.
        limit: u64,
    },
    /// The width of the model is no even multiple of its heads.
    Heads {
        /// The width.
        dim: usize,
        /// The heads.
        heads: usize,
    },
    /// The model has more blocks than there is room for.
    Blocks {
        /// Its blocks.
        found: usize,
        /// The room.
        limit: usize,
    },
    /// A parameter has another size than the model's sizes say.
    Parameter {
        /// The end of its name.
        name: &'static str,
        /// The block it belongs to, if it does.
        layer: Option<usize>,
        /// Its values.
        found: usize,
        /// The values it must have.
        expected: usize,
    },
    /// Sub-keys and values are in a format that models are not packed to.
    Format,
    /// The section `tokenizer` is not what it must be.
    Tokenizer {
        /// What is wrong.
        what: &'static str,
        /// Where: a token, a merge, or a number of bytes.
        at: usize,
    },
    /// A question, or a question with its answer, is longer than the model reads or the caller has room for.
    TooLong {
        /// Its tokens, as far as they were counted.
        found: usize,
        /// The most there may be.
        limit: usize,
    },
    /// A word is longer than any that is worth splitting.
    Word {
        /// Its bytes.
        bytes: usize,
        /// The most there may be.
        limit: usize,
    },
    /// A token is none of the vocabulary.
    Token {
        /// The token.
        token: u32,
        /// The vocabulary.
        vocab: usize,
    },
    /// There is nothing to answer.
    Empty,
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}
impl From<ArgError> for Error {
    fn from(error: ArgError) -> Self {
        Self::Argument(error)
    }
}
impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Self::Memory(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Image(error) => error.fmt(f),
            Self::Argument(error) => error.fmt(f),
            Self::Memory(error) => write!(f, "model configuration: memory: {error}"),
            Self::Model { bytes, version } => {
                let (len, read) = (crate::Sizes::LEN, crate::sizes::VERSION);
                write!(
                    f,
                    "section `model` is {bytes} bytes of version {version}; this program reads {len} of version {read}"
                )
            }
            Self::Size { name, found, limit } => write!(f, "model configuration: {name} {found} is not in 1..={limit}"),
            Self::Heads { dim, heads } => {
                write!(f, "model configuration: dim {dim} is no even multiple of heads {heads}")
            }
            Self::Blocks { found, limit } => write!(f, "{found} layers exceed the {limit} this program has room for"),
            Self::Parameter { name, layer, found, expected } => {
                match layer {
                    Some(layer) => write!(f, "section `layers.{layer}.{name}`")?,
                    None => write!(f, "section `{name}`")?,
                }
                write!(f, " has {found} values, not {expected}")
            }
            Self::Format => f.write_str("sub-keys and values are not f32, int8, e4m3 or e5m2"),
            Self::Tokenizer { what, at } => write!(f, "section `tokenizer`: {what} ({at})"),
            Self::TooLong { found, limit } => {
                write!(f, "a question of {found} tokens exceeds the {limit} this model reads")
            }
            Self::Word { bytes, limit } => write!(f, "a word of {bytes} bytes exceeds {limit}"),
            Self::Token { token, vocab } => write!(f, "token {token} of a vocabulary of {vocab}"),
            Self::Empty => f.write_str("there is nothing to answer"),
        }
    }
}

impl core::error::Error for Error {}
