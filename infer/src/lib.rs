//! Answers of a packed model: a small transformer with memory layers and its tokenizer, read in place from one image,
//! without std and without an allocator. The same code answers on a microcontroller, by the reference backend, and on a
//! server, by whichever backend a program brings.
//!
//! ```
//! # fn answer(bytes: &[u8]) -> Result<(), memlayer_infer::Error> {
//! use memlayer_core::{Reference, Scratch};
//! use memlayer_infer::{Block, Model};
//! use memlayer_quantize::Image;
//!
//! let image = Image::parse(bytes)?;
//! let mut blocks = [Block::default(); 8];
//! let model = Model::open(&image, &mut blocks)?;
//!
//! let (mut prompt, mut answer) = ([0; 64], [0; 16]);
//! let prompt = model.prompt("What is the capital of France?", &mut prompt)?;
//! let device = Reference::<f32>::new();
//! let req = model.scratch(&device, prompt.len() + answer.len());
//! let (mut reals, mut ids) = (vec![0.0; req.reals], vec![0; req.ids]);
//! let tokens = model.answer(&device, prompt, &mut answer, Scratch { reals: &mut reals, ids: &mut ids })?;
//!
//! let mut text = [0; 256];
//! println!("{}", model.text(tokens, &mut text));
//! # Ok(())
//! # }
//! ```
//!
//! Firmware knows its model when it is built, and keeps the scratch in a `static`: see [`Sizes::scratch`].
//!
//! # Sections of the image
//!
//! | | |
//! |---|---|
//! | `model` | the sizes: [`Sizes::encode`] |
//! | `tokenizer` | the tokens and how they merge: [`tokenizer`] |
//! | `embedding.weight`, `norm.weight`, `layers.I.*` | dense parameters, `f32` |
//! | `layers.I.memory.keys`, `values` | sub-keys with norm and gain in them, and the values all memory layers share, in one format |
//!
//! Nothing of it is trusted: [`Model::open`] checks every size, and what it cannot see at once (a merge that is none, a code
//! that is no number) gives another answer, never a panic.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate alloc;

mod error;
pub mod math;
mod model;
mod session;
mod sizes;
pub mod tokenizer;

pub use error::Error;
pub use model::{Block, Model, Runs, Tables};
pub use sizes::{MemorySizes, Sizes};
pub use tokenizer::{BOS, EOS, PAD, SEP, Tokenizer};
