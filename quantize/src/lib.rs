//! Packed memory layers: int8 and fp8 rows, error budgets, and an image that is read in place.
//!
//! A trained table is packed to a quarter of its size, and stored in one file that a server maps and a
//! microcontroller reads from flash:
//!
//! * [`formats`]: casts to 8-bit floats, and each format's error bound;
//! * [`rows`]: packing rows, a scale each, into buffers of the caller;
//! * [`int4`]: 4-bit rows, their scales beside their codes;
//! * [`report`]: what packing lost, measured, and the budget it must keep;
//! * [`keys`]: sub-keys, which are packed like values once they are normalized;
//! * [`image`]: the file: written in one pass, read without an allocator, checked against every damage;
//! * [`fbgemm`]: tables that PyTorch packed.
//!
//! Nothing here allocates, opens files or needs the standard library. Packed rows are a
//! [`memlayer_core::RowStore`], which every backend of the host reads.
//!
//! ```
//! use memlayer_core::{Config, DenseRows, RowStore, Table};
//! use memlayer_quantize::image::{Aligned, Image, Section, Writer, encoded_len};
//! use memlayer_quantize::report::Budget;
//!
//! const CONFIG: Config = match Config::builder(32).heads(1).sub_keys(4).half_dim(8).top_k(2).build() {
//!     Ok(config) => config,
//!     Err(_) => panic!("sizes do not fit"),
//! };
//! // A table of 16 rows as training left it.
//! let values: Vec<f32> = (0..CONFIG.slots() * 32).map(|i| (i as f32).sin()).collect();
//!
//! // Say what the image will hold, then write it, packing on the way with room for one row.
//! let mut sections = [
//!     Section::config("3.config")?,
//!     Section::rows::<i8>("3.values", CONFIG.slots(), 32, 32)?,
//!     Section::bytes("about", 13)?,
//! ];
//! let mut file = Aligned([0; 2048]);
//! let len = encoded_len(&sections)? as usize;
//! let mut writer = Writer::new(&mut file.0[..len], &mut sections)?;
//! writer.config("3.config", &CONFIG)?;
//! let report = writer.pack("3.values", &DenseRows::new(&values, 32), &mut [0i8; 32])?;
//! writer.bytes("about", b"sines, mostly")?;
//! writer.finish()?;
//! report.within(&Budget { relative_rms: 0.01, ..Budget::default() })?;
//!
//! // Read it where it lies.
//! let image = Image::parse(&file.0[..len])?;
//! image.verify()?;
//! assert_eq!(image.config("3.config")?, CONFIG);
//! let packed = image.rows::<i8>("3.values")?;
//! assert_eq!((packed.rows(), packed.dim()), (16, 32));
//! assert!((packed.row(5).value::<f32>(7) - values[5 * 32 + 7]).abs() < 0.004);
//! # Ok::<(), Box<dyn core::error::Error>>(())
//! ```
#![no_std]
#![forbid(unsafe_code)]

pub mod fbgemm;
pub mod formats;
pub mod image;
pub mod int4;
pub mod keys;
pub mod report;
pub mod rows;

pub use formats::Pack;
pub use image::{Image, ImageError, Section, Writer};
pub use int4::pack_int4_rows;
pub use report::{Budget, PackReport};
pub use rows::{PackError, pack_rows};
