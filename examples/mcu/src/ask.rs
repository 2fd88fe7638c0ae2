//! Firmware: a whole language model with a memory layer answers questions from flash. The image is the one that
//! `memlayer quantize` writes on a server, and the code that reads it the same. Nothing is allocated.
#![no_std]
#![no_main]

mod measure;

use cortex_m_rt::entry;
use cortex_m_semihosting::{debug, hprintln};
use memlayer_core::{Config, Reference, Scratch, ScratchReq};
use memlayer_infer::{Block, Error, MemorySizes, Model, Sizes};
use memlayer_quantize::image::{Aligned, Image};
use panic_semihosting as _;

use crate::measure::{Instructions, memory};

/// The model, in flash.
static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/world.image")));

/// The sizes of that model.
const SIZES: Sizes = include!(concat!(env!("OUT_DIR"), "/sizes.rs"));

/// Tokens of the longest question, and of the longest answer.
const QUESTION: usize = 40;
const ANSWER: usize = 16;

const SCRATCH: ScratchReq = SIZES.scratch(QUESTION + ANSWER).and(match MEMORY {
    Some(config) => Reference::<f32>::forward_scratch(&config),
    None => ScratchReq::EMPTY,
});
const MEMORY: Option<Config> = match SIZES.memory_layer() {
    Ok(memory) => memory,
    Err(_) => panic!("the memory's sizes make no layer"),
};

/// What is asked.
const QUESTIONS: [&str; 4] = [
    "What is the capital of France?",
    "What currency is used in Japan?",
    "In which country does Osaka lie?",
    "Which time zone does Wollongong use?",
];

/// All memory that an answer takes, but for the stack.
struct Buffers {
    reals: [f32; SCRATCH.reals],
    ids: [u32; SCRATCH.ids],
    question: [u32; 2 * QUESTION],
    answer: [u32; ANSWER],
    text: [u8; 128],
}

#[entry]
fn main() -> ! {
    static mut BUFFERS: Buffers = Buffers {
        reals: [0.0; SCRATCH.reals],
        ids: [0; SCRATCH.ids],
        question: [0; 2 * QUESTION],
        answer: [0; ANSWER],
        text: [0; 128],
    };
    let status = match cortex_m::Peripherals::take().map(|p| run(BUFFERS, p.SYST)) {
        Some(Ok(())) => debug::EXIT_SUCCESS,
        Some(Err(error)) => {
            hprintln!("{}", error);
            debug::EXIT_FAILURE
        }
        None => debug::EXIT_FAILURE,
    };
    loop {
        debug::exit(status);
    }
}

fn run(buffers: &mut Buffers, timer: cortex_m::peripheral::SYST) -> Result<(), Error> {
    let device = Reference::<f32>::new();
    let mut counter = Instructions::new(timer);
    let image = Image::parse(&MODEL.0)?;
    image.verify()?;
    let mut blocks = [Block::default(); SIZES.layers];
    let model = Model::open(&image, &mut blocks)?;
    let (mut instructions, mut tokens) = (0, 0);
    for question in QUESTIONS {
        let mut answered = Ok((0, ""));
        let Buffers { reals, ids, question: prompt, answer, text } = &mut *buffers;
        instructions += counter.of(|| {
            answered = model.prompt(question, prompt).and_then(|prompt| {
                let scratch = Scratch { reals: &mut reals[..], ids: &mut ids[..] };
                let answer = model.answer(&device, prompt, answer, scratch)?;
                // The token after the answer, which says that it ends, was made too.
                Ok((prompt.len() + answer.len(), model.text(answer, text)))
            });
        });
        let (count, text) = answered?;
        tokens += count as u64;
        hprintln!("{} {}", question, text);
    }
    let memory = memory();
    hprintln!(
        "{} | {} | {} | {} | {}",
        memory.flash,
        MODEL.0.len(),
        memory.ram,
        memory.stack,
        instructions / tokens.max(1)
    );
    Ok(())
}
