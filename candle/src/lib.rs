//! Memory layers in candle models: one custom operation, forward and backward, with the value rows in a pool outside
//! candle's variables that is updated sparsely.
//!
//! ```
//! use std::sync::Arc;
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
//! use memlayer_candle::{Cpu, Config, LayerInit, MemoryLayer, Rule, ValuePool};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // A model of a projection and a Memory+ layer of 32² slots.
//! let config = Config::builder(16).heads(2).sub_keys(32).half_dim(8).top_k(8).silu_gate(true).qk_norm(true).build()?;
//! let variables = VarMap::new();
//! let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
//! let input = candle_nn::linear(4, 16, vb.pp("input"))?;
//! let pool = ValuePool::new(Arc::new(Cpu::new()?), config.slots(), 16, Rule::default(), 0.05, 42)?;
//! let memory = MemoryLayer::new(config, pool.clone(), &LayerInit { gain: 1.5 }, &vb.pp("memory"))?;
//!
//! // It learns to map 64 random points to random targets: the dense part by AdamW, the rows by lazy Adam.
//! let mut optimizer = AdamW::new(variables.all_vars(), ParamsAdamW { lr: 3e-3, ..Default::default() })?;
//! let x = Tensor::randn(0f32, 1.0, (64, 4), &Device::Cpu)?;
//! let target = Tensor::randn(0f32, 1.0, (64, 16), &Device::Cpu)?;
//! let mut losses = Vec::new();
//! for _ in 0..60 {
//!     let loss = (memory.forward(&input.forward(&x)?)? - &target)?.sqr()?.mean_all()?;
//!     optimizer.backward_step(&loss)?;
//!     pool.step(3e-2, 1.0)?;
//!     losses.push(loss.to_scalar::<f32>()?);
//! }
//! assert!(losses[59] < 0.5 * losses[0], "{losses:?}");
//! # Ok(())
//! # }
//! ```
//!
//! # On a GPU
//!
//! With the feature `cuda` a pool may be on an NVIDIA GPU: `ValuePool::new(Compute::for_device(&device)?, ..)`, and its layers
//! take tensors of that device. Rows, kernels and candle's own work share one stream; tensors are read and written where they
//! are. candle needs nvcc to be built so; on a machine without it `eval "$(candle/toolkit)"` fetches what is missing, and the
//! program then runs wherever CUDA 13 is installed.
//!
//! A pool larger than the GPU is made by [`ValuePool::cached`]: its rows are in the host's memory, those in use on the device.

#[cfg(feature = "cuda")]
pub mod adamw;
mod backend;
mod compute;
mod error;
mod layer;
mod op;
mod params;
mod pool;

pub use compute::Compute;
pub use error::Error;
pub use layer::{MemoryLayer, Reads};
pub use memlayer_core::Config;
pub use memlayer_core::ops::optim::{Adagrad, Adam, RowwiseAdagrad, RowwiseAdam, Sgd};
pub use memlayer_cpu::Cpu;
#[cfg(feature = "cuda")]
pub use memlayer_cuda::Cuda;
pub use params::LayerInit;
pub use pool::{Rule, StepReport, ValuePool};
