//! Firmware: a Memory+ layer of 4,096 slots whose rows stay in flash. It runs the tokens that the host recorded, compares,
//! and says what a token costs. Nothing is allocated: all buffers are `static`, their sizes computed from the
//! configuration when the program is compiled.
#![no_std]
#![no_main]

mod measure;
mod model;

use core::fmt;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use heapless::Vec;
use memlayer_core::layer::{Activations, Keys, Params, Projection, forward};
use memlayer_core::ops::EmbeddingBag;
use memlayer_core::ops::bag::BagSum;
use memlayer_core::{ArgError, Config, Element, Reference, Scratch, ScratchReq};
use memlayer_quantize::image::{Aligned, Image, ImageError};
use panic_semihosting as _;

use crate::measure::{Instructions, memory};
use crate::model::{BOUND, CONFIG, Code, Rows, TOKENS, rows};

#[cfg(feature = "defmt")]
use defmt_semihosting as _;

/// The model, in flash.
static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/model.image")));
/// Tokens, and what the host made of them.
static RECORDED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/recorded.image")));

const ACTIVATIONS: ScratchReq = CONFIG.activations_req(1);
const SCRATCH: ScratchReq = Reference::<f32>::forward_scratch(&CONFIG);

/// All memory that a token needs.
struct Buffers {
    activations: ([f32; ACTIVATIONS.reals], [u32; ACTIVATIONS.ids]),
    scratch: ([f32; SCRATCH.reals], [u32; SCRATCH.ids]),
    out: [f32; CONFIG.output_dim()],
    sum: [f32; CONFIG.value_dim()],
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Error {
    Image(ImageError),
    Args(ArgError),
    /// The image is of another layer than the program.
    Config(Config),
    /// The recorded tokens are cut off.
    Recorded,
    /// Other slots than the host's.
    Slots {
        token: usize,
    },
    /// A sum has other bits than the host's.
    Bits {
        token: usize,
        at: usize,
    },
    /// An error beyond the bound.
    Bound {
        token: usize,
        what: &'static str,
        error: f64,
    },
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}
impl From<ArgError> for Error {
    fn from(error: ArgError) -> Self {
        Self::Args(error)
    }
}
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error) => error.fmt(f),
            Self::Args(error) => error.fmt(f),
            Self::Config(found) => write!(f, "the image is of another layer: {found:?}"),
            Self::Recorded => f.write_str("the recorded tokens are cut off"),
            Self::Slots { token } => write!(f, "token {token}: other slots than the host's"),
            Self::Bits { token, at } => {
                write!(f, "token {token}: value {at} of the sum has other bits than the host's")
            }
            Self::Bound { token, what, error } => write!(f, "token {token}: {what} are off by {error:e}"),
        }
    }
}

#[entry]
fn main() -> ! {
    static mut BUFFERS: Buffers = Buffers {
        activations: ([0.0; ACTIVATIONS.reals], [0; ACTIVATIONS.ids]),
        scratch: ([0.0; SCRATCH.reals], [0; SCRATCH.ids]),
        out: [0.0; CONFIG.output_dim()],
        sum: [0.0; CONFIG.value_dim()],
    };
    let status = match cortex_m::Peripherals::take().ok_or(Error::Recorded).and_then(|p| run(BUFFERS, p.SYST)) {
        Ok(()) => debug::EXIT_SUCCESS,
        Err(error) => {
            hprintln!("{}", error);
            debug::EXIT_FAILURE
        }
    };
    loop {
        debug::exit(status);
    }
}

/// The layer, in the image.
struct Layer<'a> {
    keys: Rows<'a>,
    values: Rows<'a>,
    query: (&'a [f32], &'a [f32]),
    query_gain: &'a [f32],
    silu: (&'a [f32], &'a [f32]),
    value: (&'a [f32], &'a [f32]),
}

impl<'a> Layer<'a> {
    fn open(image: &Image<'a>) -> Result<Self, Error> {
        let config = image.config("config")?;
        if config != CONFIG {
            return Err(Error::Config(config));
        }
        let dense = |name: &str| image.dense::<f32>(name).map(|rows| rows.codes());
        Ok(Self {
            keys: rows(image, "keys")?,
            values: rows(image, "values")?,
            query: (dense("query.weight")?, dense("query.bias")?),
            query_gain: dense("query.gain")?,
            silu: (dense("silu.weight")?, dense("silu.bias")?),
            value: (dense("value.weight")?, dense("value.bias")?),
        })
    }

    fn params(&self) -> Params<'_, Reference<f32>, Rows<'a>, Rows<'a>> {
        let projection = |(weight, bias)| Projection { weight, bias: Some(bias) };
        Params {
            query: projection(self.query),
            keys: Keys::Packed(&self.keys),
            query_gain: Some(self.query_gain),
            values: &self.values,
            experts: None,
            silu: Some(projection(self.silu)),
            value_proj: Some(projection(self.value)),
            sigmoid: None,
        }
    }
}

/// A recorded token.
struct Token<'a> {
    x: &'a [f32],
    ids: Vec<u32, { CONFIG.bag_len() }>,
    weights: &'a [f32],
    sum: &'a [f32],
    out: &'a [f32],
}

impl<'a> Token<'a> {
    fn read(image: &Image<'a>, token: usize) -> Result<Self, Error> {
        let floats = |name: &str, len: usize| {
            let all = image.dense::<f32>(name)?.codes();
            all.chunks_exact(len).nth(token).ok_or(Error::Recorded)
        };
        let (ids, _) = image.bytes("ids")?.as_chunks::<4>();
        let ids = ids.chunks_exact(CONFIG.bag_len()).nth(token).ok_or(Error::Recorded)?;
        Ok(Self {
            x: floats("input", CONFIG.input_dim())?,
            ids: ids.iter().map(|id| u32::from_le_bytes(*id)).collect(),
            weights: floats("weights", CONFIG.bag_len())?,
            sum: floats("sums", CONFIG.value_dim())?,
            out: floats("output", CONFIG.output_dim())?,
        })
    }
}

fn run(buffers: &mut Buffers, timer: cortex_m::peripheral::SYST) -> Result<(), Error> {
    let device = Reference::<f32>::new();
    let mut counter = Instructions::new(timer);
    let image = Image::parse(&MODEL.0)?;
    let mut verify = Ok(());
    let verified = counter.of(|| verify = image.verify());
    verify?;
    let recorded = Image::parse(&RECORDED.0)?;
    recorded.verify()?;
    let layer = Layer::open(&image)?;
    #[cfg(feature = "defmt")]
    defmt::info!("{}", CONFIG);

    let (mut all, mut most) = (0, 0);
    let mut read: Vec<u32, { TOKENS * CONFIG.bag_len() }> = Vec::new();
    for token in 0..TOKENS {
        let expected = Token::read(&recorded, token)?;
        let (reals, ids) = (&mut buffers.activations.0[..], &mut buffers.activations.1[..]);
        let mut act = Activations::new(&CONFIG, 1, Scratch { reals, ids })?;
        let scratch = Scratch { reals: &mut buffers.scratch.0[..], ids: &mut buffers.scratch.1[..] };
        let out = &mut buffers.out[..];
        let mut done = Ok(());
        let instructions = counter.of(|| {
            done = forward(&device, &CONFIG, &layer.params(), expected.x, &mut act, out, scratch);
        });
        done?;
        (all, most) = (all + instructions, most.max(instructions));

        if *act.ids != *expected.ids {
            return Err(Error::Slots { token });
        }
        within(token, "weights", act.weights, expected.weights)?;
        within(token, "sums", act.y, expected.sum)?;
        within(token, "outputs", &buffers.out, expected.out)?;
        // With the host's weights the sum has the host's bits.
        let (ids, weights, out) = (&expected.ids[..], expected.weights, &mut buffers.sum[..]);
        device.bag_sum(&layer.values, BagSum { bag: CONFIG.bag_len(), ids, weights, out, accumulate: false })?;
        let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
        if let Some(at) = buffers.sum.iter().zip(expected.sum).position(differs) {
            return Err(Error::Bits { token, at });
        }
        for &id in act.ids.iter() {
            if !read.contains(&id) && read.push(id).is_err() {
                return Err(Error::Recorded);
            }
        }
    }

    let memory = memory();
    hprintln!("{} tokens as on the host, {} of {} slots read", TOKENS, read.len(), CONFIG.slots());
    hprintln!(
        "{} | {} | {} | {} | {} | {} | {} | {}",
        Code::FORMAT,
        memory.flash,
        MODEL.0.len(),
        memory.ram,
        memory.stack,
        all / TOKENS as u64,
        most,
        verified
    );
    Ok(())
}

/// Fails if the relative error is beyond the bound.
fn within(token: usize, what: &'static str, found: &[f32], expected: &[f32]) -> Result<(), Error> {
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&found, &expected) in found.iter().zip(expected) {
        let (found, expected) = (f64::from(found), f64::from(expected));
        difference += (found - expected) * (found - expected);
        norm += expected * expected;
    }
    let error = memlayer_core::Real::sqrt(difference / norm);
    if error <= BOUND { Ok(()) } else { Err(Error::Bound { token, what, error }) }
}
