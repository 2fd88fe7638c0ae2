//! The mathematics of memory layers ("Memory Layers at Scale", Berges et al. 2024, arXiv 2412.09764),
//! forward and backward, without an allocator and without the standard library.
//!
//! A memory layer is a trainable key-value table inside a model: a token's query picks the best `K` of
//! millions of slots by product keys, a softmax weighs them, and the weighted sum of their value rows is the
//! output. This crate holds
//!
//! * [`config`]: the sizes of a layer, validated, computable in `const` contexts;
//! * [`element`] and [`storage`]: what a row is made of and where rows live, as traits;
//! * [`ops`]: the operations a backend implements, their arguments, and the laws they obey;
//! * [`mod@reference`]: those operations as plain loops over `f32` or `f64`: the oracle of every other backend, and
//!   the smallest one;
//! * [`layer`]: the whole way through a layer, forward and backward, for any backend;
//! * [`health`]: how evenly the slots are used;
//! * [`random`]: numbers that are the same on every machine.
//!
//! It is not a tensor framework and not an autograd engine: it has no shapes at run time beyond the sizes in
//! [`config::Config`], it allocates nothing, and every buffer belongs to the caller.
//!
//! # Symbols
//!
//! | | meaning | the paper's scale |
//! |---|---|---|
//! | T | tokens in a call | 8192 |
//! | D, O | width of the layer's input and output | 1024 |
//! | H | heads | 4 |
//! | P | parts of a key: 2 for product keys, 1 for flat keys | 2 |
//! | N | sub-keys per part; `N^P` slots | 1024 |
//! | C | width of one part of a key | 256 |
//! | K | rows kept per head | 32 |
//! | L = H·K | bag length per token | 128 |
//! | V | value width | 1024 |
//!
//! All arrays are row-major and dense.
#![no_std]
#![forbid(unsafe_code)]

pub mod config;
pub mod device;
pub mod element;
pub mod error;
pub mod health;
pub mod layer;
pub mod ops;
pub mod random;
pub mod reference;
pub mod storage;

pub use config::{Config, ConfigError};
pub use device::{Device, Host, Scratch, ScratchReq};
pub use element::{Bf16, E4m3, E5m2, Element, F16, Int4, Item, Real, Trainable};
pub use error::ArgError;
pub use random::Random;
pub use reference::Reference;
pub use storage::{DenseRows, DenseRowsMut, Extent, Row, RowId, RowStore, ScaledRows, Table, TrainRows, TrainStore};
