//! A small image that holds one of everything.
#![allow(dead_code, clippy::unwrap_used, reason = "each test uses a part; a test that cannot go on has failed")]

use memlayer_core::{Config, DenseRows, E4m3, F16};
use memlayer_quantize::image::{Section, Sink, WriteError, Writer, encoded_len};

pub(crate) const CONFIG: Config =
    match Config::builder(7).heads(2).sub_keys(4).half_dim(5).top_k(2).value_dim(6).build() {
        Ok(config) => config,
        Err(_) => panic!("sizes do not fit"),
    };

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Block([u8; 64]);

/// Bytes that lie at a multiple of 64.
#[derive(Clone)]
pub(crate) struct File {
    blocks: Vec<Block>,
    len: usize,
}

impl File {
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { blocks: vec![Block([0; 64]); len.div_ceil(64)], len }
    }
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut file = Self::zeroed(bytes.len());
        file.bytes_mut().copy_from_slice(bytes);
        file
    }
    pub(crate) fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks)[..self.len]
    }
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.blocks)[..self.len]
    }
}

pub(crate) fn table(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin() * 3.0).collect()
}

pub(crate) fn matrix() -> [f32; 21] {
    core::array::from_fn(|i| i as f32 - 10.0)
}

pub(crate) fn sections() -> [Section; 7] {
    [
        Section::config("0.config"),
        Section::rows::<E4m3>("0.keys", 16, 5, 2),
        Section::rows::<i8>("pool", 15, 6, 6),
        Section::dense::<f32>("0.query", 3, 7),
        Section::bytes("empty", 0),
        Section::dense::<F16>("half", 5, 1),
        Section::bytes("tokenizer.json", 17),
    ]
    .map(Result::unwrap)
}

pub(crate) fn fill<S: Sink>(writer: &mut Writer<'_, S>) -> Result<(), WriteError<S::Error>> {
    writer.config("0.config", &CONFIG)?;
    writer.pack("0.keys", &DenseRows::new(&table(16 * 5), 5), &mut [E4m3(0); 5])?;
    writer.pack("pool", &DenseRows::new(&table(15 * 6), 6), &mut [0i8; 6])?;
    writer.dense("0.query", &matrix())?;
    writer.bytes("empty", b"")?;
    writer.dense("half", &[F16::ONE; 5])?;
    writer.bytes("tokenizer.json", b"{\"vocabulary\":[]}")
}

/// The image of [`sections`]: there is padding behind codes, scales, values and bytes.
pub(crate) fn small() -> File {
    let mut plan = sections();
    let mut file = File::zeroed(usize::try_from(encoded_len(&plan).unwrap()).unwrap());
    let mut writer = Writer::new(file.bytes_mut(), &mut plan).unwrap();
    assert!(fill(&mut writer).is_ok());
    assert!(writer.finish().unwrap().is_empty());
    file
}
