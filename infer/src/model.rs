//! A model's parameters, borrowed from an image.

use core::fmt::Write;

use memlayer_core::element::Format;
use memlayer_core::layer::{self, Backend};
use memlayer_core::ops::Dense;
use memlayer_core::{ArgError, Config, DenseRows, Device, E4m3, E5m2, ScaledRows, Scratch, ScratchReq, Table};
use memlayer_quantize::Image;

use crate::error::Error;
use crate::session::Session;
use crate::sizes::Sizes;
use crate::tokenizer::{EOS, Tokenizer};

/// What a device must be able to do to answer: its memory is the host's, it has dense products, and memory layers over rows
/// of every format that models are packed to.
pub trait Runs:
    for<'x> Device<Scalar = f32, Error = ArgError, View<'x, f32> = &'x [f32], ViewMut<'x, f32> = &'x mut [f32]>
    + Dense
    + for<'x> Backend<DenseRows<'x, f32>, DenseRows<'x, f32>>
    + for<'x> Backend<ScaledRows<'x, i8>, ScaledRows<'x, i8>>
    + for<'x> Backend<ScaledRows<'x, E4m3>, ScaledRows<'x, E4m3>>
    + for<'x> Backend<ScaledRows<'x, E5m2>, ScaledRows<'x, E5m2>>
{
}
impl<D> Runs for D where
    D: for<'x> Device<Scalar = f32, Error = ArgError, View<'x, f32> = &'x [f32], ViewMut<'x, f32> = &'x mut [f32]>
        + Dense
        + for<'x> Backend<DenseRows<'x, f32>, DenseRows<'x, f32>>
        + for<'x> Backend<ScaledRows<'x, i8>, ScaledRows<'x, i8>>
        + for<'x> Backend<ScaledRows<'x, E4m3>, ScaledRows<'x, E4m3>>
        + for<'x> Backend<ScaledRows<'x, E5m2>, ScaledRows<'x, E5m2>>
{
}

/// Sub-keys (rows `[H, 2, N]` of width C, normalized) and values (`[N², V]`), in one format.
#[derive(Clone, Copy, Debug)]
pub enum Tables<'a> {
    /// As trained.
    F32(DenseRows<'a, f32>, DenseRows<'a, f32>),
    /// 8-bit integers.
    Int8(ScaledRows<'a, i8>, ScaledRows<'a, i8>),
    /// 8-bit floats with 4 exponent bits.
    E4m3(ScaledRows<'a, E4m3>, ScaledRows<'a, E4m3>),
    /// 8-bit floats with 5 exponent bits.
    E5m2(ScaledRows<'a, E5m2>, ScaledRows<'a, E5m2>),
}

/// The parameters of a block: a place for [`Model::open`] to put them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Block<'a> {
    pub(crate) attention_norm: &'a [f32],
    pub(crate) qkv: &'a [f32],
    pub(crate) out: &'a [f32],
    pub(crate) feed_forward_norm: &'a [f32],
    pub(crate) feed_forward: FeedForward<'a>,
}

#[allow(clippy::large_enum_variant, reason = "without an allocator there is no box, and the blocks are few")]
#[derive(Clone, Copy, Debug)]
pub(crate) enum FeedForward<'a> {
    Dense { up: &'a [f32], down: &'a [f32] },
    Memory(Memory<'a>),
}

impl Default for FeedForward<'_> {
    fn default() -> Self {
        Self::Dense { up: &[], down: &[] }
    }
}

/// A memory layer; of each projection the weight, then the bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory<'a> {
    pub(crate) config: Config,
    pub(crate) tables: Tables<'a>,
    pub(crate) query: [&'a [f32]; 2],
    pub(crate) query_gain: &'a [f32],
    pub(crate) silu: [&'a [f32]; 2],
    pub(crate) value_proj: [&'a [f32]; 2],
}

/// A model in an image.
#[derive(Clone, Copy, Debug)]
pub struct Model<'b, 'a> {
    pub(crate) sizes: Sizes,
    memory: Option<Config>,
    tokenizer: Tokenizer<'a>,
    pub(crate) embedding: &'a [f32],
    pub(crate) norm: &'a [f32],
    pub(crate) blocks: &'b [Block<'a>],
}

/// The sections of one block.
struct Sections<'i, 'a> {
    image: &'i Image<'a>,
    layer: Option<usize>,
}

impl<'a> Sections<'_, 'a> {
    /// The parameter `name`, of `expected` values.
    fn dense(&self, name: &'static str, expected: usize) -> Result<&'a [f32], Error> {
        let values = self.image.dense::<f32>(self.full(name).as_str())?.codes();
        if values.len() == expected {
            return Ok(values);
        }
        Err(Error::Parameter { name, layer: self.layer, found: values.len(), expected })
    }

    fn full(&self, name: &str) -> FullName {
        let mut full = FullName::default();
        // The longest is far shorter than a section's name may be.
        let _ = match self.layer {
            Some(layer) => write!(full, "layers.{layer}.{name}"),
            None => full.write_str(name),
        };
        full
    }

    /// Sub-keys and values, their sizes checked.
    fn tables(&self, config: &Config) -> Result<Tables<'a>, Error> {
        const KEYS: &str = "memory.keys";
        const VALUES: &str = "values";
        let keys = self.full(KEYS);
        let check = |name, layer, table: &dyn Sized2, rows: usize, dim: usize| {
            let (found, expected) = (table.values(), rows.saturating_mul(dim));
            if table.shape() == (rows, dim) { Ok(()) } else { Err(Error::Parameter { name, layer, found, expected }) }
        };
        macro_rules! tables {
            ($variant:ident, $e:ty, $read:ident) => {{
                let (keys, values) = (self.image.$read::<$e>(keys.as_str())?, self.image.$read::<$e>(VALUES)?);
                check(KEYS, self.layer, &keys, config.key_rows(), config.half_dim())?;
                check(VALUES, None, &values, config.slots(), config.value_dim())?;
                Ok(Tables::$variant(keys, values))
            }};
        }
        match self.image.section(VALUES).and_then(|section| section.content().format()) {
            Some(Format::F32) | None => tables!(F32, f32, dense),
            Some(Format::Int8) => tables!(Int8, i8, rows),
            Some(Format::E4m3) => tables!(E4m3, E4m3, rows),
            Some(Format::E5m2) => tables!(E5m2, E5m2, rows),
            Some(_) => Err(Error::Format),
        }
    }

    fn memory(&self, config: Config) -> Result<Memory<'a>, Error> {
        let (d, q, v) = (config.input_dim(), config.query_len(), config.value_dim());
        let pair = |[weight, bias]: [&'static str; 2], o: usize, i: usize| {
            Ok::<_, Error>([self.dense(weight, o.saturating_mul(i))?, self.dense(bias, o)?])
        };
        Ok(Memory {
            config,
            tables: self.tables(&config)?,
            query: pair(["memory.query_proj.query_mlps.0.weight", "memory.query_proj.query_mlps.0.bias"], q, d)?,
            query_gain: self.dense("memory.query_norm.weight", config.gain_len())?,
            silu: pair(["memory.swilu_projection.weight", "memory.swilu_projection.bias"], v, d)?,
            value_proj: pair(["memory.value_proj.weight", "memory.value_proj.bias"], d, v)?,
        })
    }
}

/// The shape of a table, whatever its format.
trait Sized2 {
    fn shape(&self) -> (usize, usize);
    fn values(&self) -> usize {
        self.shape().0.saturating_mul(self.shape().1)
    }
}
impl<T: Table> Sized2 for T {
    fn shape(&self) -> (usize, usize) {
        (self.rows(), self.dim())
    }
}

/// A section's name, put together.
struct FullName {
    bytes: [u8; 64],
    len: usize,
}

impl Default for FullName {
    fn default() -> Self {
        Self { bytes: [0; 64], len: 0 }
    }
}

impl FullName {
    fn as_str(&self) -> &str {
        self.bytes.get(..self.len).and_then(|bytes| core::str::from_utf8(bytes).ok()).unwrap_or("")
    }
}

impl Write for FullName {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        let end = self.len.saturating_add(s.len());
        let place = self.bytes.get_mut(self.len..end).ok_or(core::fmt::Error)?;
        for (place, byte) in place.iter_mut().zip(s.bytes()) {
            *place = byte;
        }
        self.len = end;
        Ok(())
    }
}

impl<'b, 'a> Model<'b, 'a> {
    /// The model in an image; its blocks' parameters are put into the first of `blocks`. Costs grow with the number of
    /// sections and tokens, not with the values: those are read when they are needed, and [`Image::verify`] reads them all.
    ///
    /// # Errors
    /// [`Error`] with the section that is missing or of another size, and [`Error::Blocks`] if there are more than places.
    pub fn open(image: &Image<'a>, blocks: &'b mut [Block<'a>]) -> Result<Self, Error> {
        let sizes = Sizes::decode(image.bytes("model")?)?;
        let tokenizer = Tokenizer::new(image.bytes("tokenizer")?)?;
        tokenizer.check()?;
        if tokenizer.vocab() != sizes.vocab {
            return Err(Error::Tokenizer { what: "has another vocabulary than the model", at: tokenizer.vocab() });
        }
        let (d, hidden, memory) = (sizes.dim, sizes.hidden, sizes.memory_layer()?);
        let limit = blocks.len();
        let places = blocks.get_mut(..sizes.layers).ok_or(Error::Blocks { found: sizes.layers, limit })?;
        for (layer, block) in places.iter_mut().enumerate() {
            let sections = Sections { image, layer: Some(layer) };
            let feed_forward = match memory {
                Some(config) if sizes.is_memory(layer) => FeedForward::Memory(sections.memory(config)?),
                _ => FeedForward::Dense {
                    up: sections.dense("feed_forward.up.weight", hidden.saturating_mul(2 * d))?,
                    down: sections.dense("feed_forward.down.weight", hidden.saturating_mul(d))?,
                },
            };
            *block = Block {
                attention_norm: sections.dense("attention_norm.weight", d)?,
                qkv: sections.dense("attention.qkv.weight", d.saturating_mul(3 * d))?,
                out: sections.dense("attention.out.weight", d.saturating_mul(d))?,
                feed_forward_norm: sections.dense("feed_forward_norm.weight", d)?,
                feed_forward,
            };
        }
        let whole = Sections { image, layer: None };
        Ok(Self {
            sizes,
            memory,
            tokenizer,
            embedding: whole.dense("embedding.weight", sizes.vocab.saturating_mul(d))?,
            norm: whole.dense("norm.weight", d)?,
            blocks: places,
        })
    }

    /// The sizes.
    #[must_use]
    pub const fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// The tokenizer.
    #[must_use]
    pub const fn tokenizer(&self) -> &Tokenizer<'a> {
        &self.tokenizer
    }

    /// `<bos> question <sep>`, in the first places of `out` (overwritten).
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prompt<'t>(&self, question: &str, out: &'t mut [u32]) -> Result<&'t [u32], Error> {
        self.tokenizer.prompt(question, out)
    }

    /// What [`Model::answer`] takes for a question and an answer of at most `tokens` tokens together.
    #[must_use]
    pub fn scratch<D: Runs>(&self, device: &D, tokens: usize) -> ScratchReq {
        let Some(config) = &self.memory else { return self.sizes.scratch(tokens) };
        macro_rules! req {
            ($rows:ty) => {
                layer::forward_scratch::<$rows, $rows, D>(device, config, 1)
            };
        }
        let memory = self.blocks.iter().find_map(|block| match &block.feed_forward {
            FeedForward::Memory(memory) => Some(match memory.tables {
                Tables::F32(..) => req!(DenseRows<'a, f32>),
                Tables::Int8(..) => req!(ScaledRows<'a, i8>),
                Tables::E4m3(..) => req!(ScaledRows<'a, E4m3>),
                Tables::E5m2(..) => req!(ScaledRows<'a, E5m2>),
            }),
            FeedForward::Dense { .. } => None,
        });
        self.sizes.scratch(tokens).and(memory.unwrap_or(ScratchReq::EMPTY))
    }

    /// The tokens most likely to follow `prompt`, one after the other, in the first places of `out` (overwritten), until one
    /// of them would be [`EOS`] or there is no more room.
    ///
    /// # Errors
    /// [`Error::TooLong`] if prompt and answer exceed the model's context, [`Error::Empty`] for a prompt of no tokens,
    /// [`Error::Token`] for a token of none, [`Error::Argument`] if the scratch is smaller than [`Model::scratch`] says.
    pub fn answer<'t, D: Runs>(
        &self,
        device: &D,
        prompt: &[u32],
        out: &'t mut [u32],
        scratch: Scratch<'_, D>,
    ) -> Result<&'t [u32], Error> {
        let (found, limit) = (prompt.len().saturating_add(out.len()), self.sizes.context);
        if found > limit {
            return Err(Error::TooLong { found, limit });
        }
        let (last, before) = prompt.split_last().ok_or(Error::Empty)?;
        let mut session = Session::new(self, device, found, scratch)?;
        for &token in before {
            session.put(token)?;
        }
        let (mut token, mut len) = (*last, 0);
        for place in out.iter_mut() {
            token = session.next(token)?;
            if token == EOS {
                break;
            }
            *place = token;
            len += 1;
        }
        Ok(out.get(..len).unwrap_or(&[]))
    }

    /// The text of an answer in the first places of `out` (overwritten), without white space around it. What does not fit, and
    /// a character that is not whole, is left out.
    pub fn text<'t>(&self, tokens: &[u32], out: &'t mut [u8]) -> &'t str {
        let mut len = 0;
        for (place, byte) in out.iter_mut().zip(self.tokenizer.decode(tokens)) {
            *place = byte;
            len += 1;
        }
        let bytes = out.get(..len).unwrap_or(&[]);
        let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
        text.trim()
    }
}
