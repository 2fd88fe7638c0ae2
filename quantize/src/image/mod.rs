//! The image: a packed model in one file that is read where it lies, in a map of the file or in flash.
//!
//! All numbers are little-endian. The file is, without gaps:
//!
//! | bytes | |
//! |---|---|
//! | 64 | header |
//! | | sections in the table's order, each starting at a multiple of 64; zeros between them |
//! | 128 each | the table, an entry for each section, at a multiple of 64 |
//! | 4 | CRC-32 of the table |
//!
//! The header:
//!
//! | at | | |
//! |---|---|---|
//! | 0 | 8 bytes | `memlayer` |
//! | 8 | u32 | version: [`VERSION`] |
//! | 12 | u32 | sections, at most [`MAX_SECTIONS`] |
//! | 16 | u64 | length of the whole file |
//! | 24 | u64 | where the table is |
//! | 32 | 28 bytes | zero |
//! | 60 | u32 | CRC-32 of the 60 bytes before |
//!
//! An entry of the table:
//!
//! | at | | |
//! |---|---|---|
//! | 0 | 64 bytes | name, UTF-8 without control characters, filled up with zeros |
//! | 64 | u16 | kind: 1 rows, 2 dense, 3 bytes, 4 config |
//! | 66 | u16 | format of rows and dense: 1 f32, 2 f16, 3 bf16, 4 int8, 5 e4m3, 6 e5m2; else 0 |
//! | 68 | u32 | dim: values in a row of rows and dense; else 0 |
//! | 72 | u64 | rows of rows and dense, at most 2^32; the bytes of bytes; else 0 |
//! | 80 | u32 | group: values that share a scale, of rows; else 0 |
//! | 84 | u32 | CRC-32 of the data, then the scales, without padding |
//! | 88 | u64 | where the data is |
//! | 96 | u64 | bytes of data |
//! | 104 | u64 | where the scales are (f32, row after row, `ceil(dim / group)` each), of rows; else 0 |
//! | 112 | u64 | bytes of scales |
//! | 120 | 8 bytes | zero |
//!
//! A config is 64 bytes: kind (u8: 0 memory, 1 peer), parts (u8), flags (u8: 1 qk-norm, 2 SiLU gate, 4 sigmoid gate),
//! 5 zeros, then D, O, V, H, N, C, K (u64 each).
//!
//! The CRC is that of zlib and PNG (polynomial 0x04c11db7, reflected). It finds every flipped bit and every burst of
//! up to 32; it is no defence against someone who means harm, and nothing here relies on it for memory safety.
//!
//! An image has a single form: sections lie where the sizes before them put them, so there are no hidden bytes, no
//! overlaps and no choices. Whatever differs is refused.
//!
//! Names are the writer's business. By convention the sections of the memory layer in block `i` are `i.config`,
//! `i.keys`, `i.values` and, for each dense parameter, `i.` and its name in the checkpoint. A pool that several layers
//! share is stored once, as `values`: a layer without `i.values` reads that.
//!
//! # Two steps of checking
//!
//! [`Image::parse`] trusts nothing, but reads only header and table: opening an image of any size is instant, and
//! every accessor is safe from then on. [`Image::verify`] reads every byte once and finds what parsing cannot:
//! damaged data, stray padding, scales that are not finite. Verify what came over a wire, once.

mod codec;
mod config;
mod error;
mod read;
mod section;
mod write;

pub use error::{ImageError, Part};
pub use read::{Entry, Image};
pub use section::{Content, LayoutError, Name, Section, encoded_len};
pub use write::{Full, Sink, WriteError, Writer};

/// The version of the format that this crate reads and writes.
pub const VERSION: u32 = 1;
/// Sections of an image start at multiples of this.
pub const ALIGN: usize = 64;
/// Where the bytes of an image must lie for its rows to be read in place.
pub const IN_PLACE_ALIGN: usize = 4;
/// An image has at most so many sections.
pub const MAX_SECTIONS: usize = 4096;

/// Lays bytes at a multiple of [`ALIGN`]: an image in a `static`.
///
/// ```
/// # use memlayer_quantize::image::Aligned;
/// # macro_rules! include_bytes { ($path:literal) => { &[0u8; 128] } }
/// static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!("model.image"));
/// assert_eq!(MODEL.0.as_ptr() as usize % 64, 0);
/// ```
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Aligned<B: ?Sized>(
    /// The bytes.
    pub B,
);
