//! A packed model that answers in a browser or in Node: `core`, `quantize` and `infer` as one WebAssembly module without
//! imports.
//!
//! The host writes an image to where [`reserve`] says, opens it, then writes questions to [`text`] and reads answers there:
//! `answer.mjs` beside this crate does so. The module has one model at a time; memory only grows.
#![no_std]

use core::fmt::Write;
use core::panic::PanicInfo;

use memlayer_core::{Reference, Scratch};
use memlayer_infer::{Block, Model, Sizes};
use memlayer_quantize::Image;

/// Tokens of the longest answer.
const ANSWER: usize = 24;
/// Bytes of the longest question, of the longest answer, and of the longest error.
const TEXT: usize = 4096;
/// What grows is counted in pages of this many bytes.
const PAGE: usize = 65_536;

/// Everything the module holds but for what it grows.
struct State {
    text: [u8; TEXT],
    prompt: [u32; TEXT + 3],
    image: &'static [u8],
}

static mut STATE: State = State { text: [0; TEXT], prompt: [0; TEXT + 3], image: &[] };

/// The state.
fn state() -> &'static mut State {
    // SAFETY: WebAssembly without threads calls one export at a time, and each takes the state once.
    unsafe { &mut *(&raw mut STATE) }
}

/// New memory of this many bytes, zero, or nothing.
fn grow(bytes: usize) -> Option<*mut u8> {
    let before = core::arch::wasm32::memory_grow(0, bytes.div_ceil(PAGE));
    (before != usize::MAX).then(|| core::ptr::without_provenance_mut(before * PAGE))
}

/// Memory for so many of `T`, all bits zero, for good.
fn slice<T: Copy>(len: usize) -> Option<&'static mut [T]> {
    let bytes = len.checked_mul(size_of::<T>())?;
    let start = grow(bytes)?;
    // SAFETY: the pages are new and nobody else's, and aligned to far more than a number; zeros are numbers. Memory of a
    // module is never given back.
    Some(unsafe { core::slice::from_raw_parts_mut(start.cast(), len) })
}

/// Where an image of `len` bytes is to be written, or 0.
#[unsafe(no_mangle)]
pub extern "C" fn reserve(len: usize) -> *const u8 {
    match slice::<u8>(len) {
        Some(place) => {
            let place: &'static [u8] = place;
            state().image = place;
            place.as_ptr()
        }
        None => core::ptr::null(),
    }
}

/// Where questions are written and answers are read: 4096 bytes.
#[unsafe(no_mangle)]
pub extern "C" fn text() -> *const u8 {
    state().text.as_ptr()
}

/// Checks the image, all of it. 0, or minus the length of the error in [`text`].
#[unsafe(no_mangle)]
pub extern "C" fn open() -> isize {
    let State { text, image, .. } = state();
    let checked = Image::parse(image).and_then(|image| image.verify().map(|()| image));
    match checked.map_err(Into::into).and_then(|image| {
        let mut blocks = [Block::default(); Sizes::MAX_LAYERS];
        Model::open(&image, &mut blocks).map(|_| ())
    }) {
        Ok(()) => 0,
        Err(error) => -put(text, error),
    }
}

/// Answers the question of `len` bytes in [`text`]; gives the length of the answer there, or minus that of the error.
#[unsafe(no_mangle)]
pub extern "C" fn ask(len: usize) -> isize {
    let State { text, prompt, image } = state();
    let (mut question, mut tokens) = ([0; TEXT], [0; ANSWER]);
    question.copy_from_slice(text);
    let question = question.get(..len).and_then(|bytes| core::str::from_utf8(bytes).ok());
    let Some(question) = question else { return -put(text, "the question is not UTF-8, or too long") };
    let answered = Image::parse(image).map_err(Into::into).and_then(|image| {
        let mut blocks = [Block::default(); Sizes::MAX_LAYERS];
        let model = Model::open(&image, &mut blocks)?;
        let device = Reference::<f32>::new();
        let prompt = model.prompt(question, prompt)?;
        let room = model.sizes().context.saturating_sub(prompt.len()).clamp(1, ANSWER);
        let req = model.scratch(&device, model.sizes().context.min(prompt.len() + ANSWER));
        let (reals, ids) = scratch(req.reals, req.ids);
        let answer = model.answer(&device, prompt, &mut tokens[..room], Scratch { reals, ids })?;
        // Its text begins with a space, which is left out: so it is made elsewhere, and put in front.
        Ok::<_, memlayer_infer::Error>(put(text, model.text(answer, &mut [0; TEXT])))
    });
    match answered {
        Ok(len) => len,
        Err(error) => -put(text, error),
    }
}

/// Scratch that grows to what was asked for and stays.
fn scratch(reals: usize, ids: usize) -> (&'static mut [f32], &'static mut [u32]) {
    static mut KEPT: (&mut [f32], &mut [u32]) = (&mut [], &mut []);
    // SAFETY: as in `state`; each call gives the memory out anew, after the last one's is no longer used.
    let kept = unsafe { &mut *(&raw mut KEPT) };
    if kept.0.len() < reals {
        kept.0 = slice(reals).unwrap_or(&mut []);
    }
    if kept.1.len() < ids {
        kept.1 = slice(ids).unwrap_or(&mut []);
    }
    (&mut *kept.0, &mut *kept.1)
}

/// Writes a message; gives its length.
fn put(text: &mut [u8], message: impl core::fmt::Display) -> isize {
    struct Cursor<'a>(&'a mut [u8], usize);
    impl Write for Cursor<'_> {
        fn write_str(&mut self, s: &str) -> core::fmt::Result {
            for (place, byte) in self.0.iter_mut().skip(self.1).zip(s.bytes()) {
                *place = byte;
                self.1 += 1;
            }
            Ok(())
        }
    }
    let mut cursor = Cursor(text, 0);
    let _ = write!(cursor, "{message}");
    isize::try_from(cursor.1).unwrap_or(0)
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    core::arch::wasm32::unreachable()
}
