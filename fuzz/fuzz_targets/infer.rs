//! Any bytes as a packed language model, or as the tokenizer of one: what opens answers any text, within the memory it asked
//! for and the tokens there are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memlayer_core::{Reference, Scratch};
use memlayer_fuzz::file::{File, mend};
use memlayer_infer::{Block, Model, Sizes, Tokenizer};
use memlayer_quantize::Image;

/// Scalars of the largest scratch that is tried.
const MOST: usize = 1 << 20;

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    // A text in front, so many bytes of it.
    let (text, bytes) = bytes.split_at(usize::from(mode >> 2).min(bytes.len()));
    let text = String::from_utf8_lossy(text);
    if mode % 4 == 0 {
        return tokenize(bytes, &text);
    }
    let mut bytes = bytes.to_vec();
    mend(&mut bytes);
    let file = File::new(&bytes);
    let Ok(image) = Image::parse(file.bytes()) else { return };
    if let Ok(sizes) = image.bytes("model").map_or(Ok(None), |bytes| Sizes::decode(bytes).map(Some)) {
        assert!(sizes.is_none_or(|sizes| sizes.encode().is_ok_and(|again| Sizes::decode(&again) == Ok(sizes))));
    }
    let mut blocks = [Block::default(); 4];
    match Model::open(&image, &mut blocks) {
        Ok(model) => answer(&model, &text),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

fn tokenize(section: &[u8], text: &str) {
    let Ok(tokenizer) = Tokenizer::new(section) else { return };
    let sound = tokenizer.check().is_ok();
    let mut tokens = vec![0; text.len() + 1];
    let tokens = tokenizer.encode(text, &mut tokens).expect("room for every byte");
    let back: Vec<u8> = tokenizer.decode(tokens).collect();
    if sound {
        let back = String::from_utf8(back).expect("a text comes back");
        let lead = if text.is_empty() || text.starts_with(' ') { "" } else { " " };
        assert_eq!(back.strip_prefix(lead), Some(text));
    }
}

fn answer(model: &Model<'_, '_>, text: &str) {
    let device = Reference::<f32>::new();
    let (mut prompt, mut out) = ([0; 80], [0; 4]);
    let prompt = match model.prompt(text, &mut prompt) {
        Ok(prompt) => prompt,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let req = model.scratch(&device, prompt.len() + out.len());
    if req.reals > MOST || req.ids > MOST {
        return;
    }
    let (mut reals, mut ids) = (vec![f32::NAN; req.reals], vec![u32::MAX; req.ids]);
    let scratch = Scratch { reals: &mut reals[..], ids: &mut ids[..] };
    match model.answer(&device, prompt, &mut out, scratch) {
        Ok(tokens) => {
            assert!(tokens.iter().all(|&token| (token as usize) < model.sizes().vocab));
            let _ = model.text(tokens, &mut [0; 20]);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
