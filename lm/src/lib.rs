//! A small language model in which any feed-forward layer may be a memory layer: what a memory layer is judged in.

pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod files;
pub mod flops;
pub mod infer;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod optim;
pub mod packed;
pub mod tokenizer;
pub mod train;

pub use config::{MemoryConfig, ModelConfig};
pub use error::{LmError, Result};
pub use model::Place;
