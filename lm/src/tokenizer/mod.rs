//! Byte-pair encoding of questions and answers.

mod table;

use std::path::Path;

pub use memlayer_infer::{BOS, EOS, PAD, SEP};

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::data::Example;
use crate::error::{LmError, Result};

const SPECIAL: [&str; 4] = ["<pad>", "<bos>", "<sep>", "<eos>"];

/// A byte-level BPE tokenizer with the special tokens of question and answer.
///
/// The tokenizers crate trains it; splitting and merging is `memlayer-infer`'s, as it is where an answer is given.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// As the tokenizers crate writes it; none came with a packed model.
    json: Option<String>,
    /// As [`memlayer_infer::Tokenizer`] reads it.
    table: Vec<u8>,
}

/// A question and its answer as tokens: `<bos> question <sep> answer <eos>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Tokens before the answer, `<sep>` among them.
    pub prompt: usize,
}

fn wrong(error: impl core::fmt::Display) -> LmError {
    LmError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// Trains a vocabulary of at most `vocab` tokens on questions and answers. The same texts give the same tokenizer.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`] if `vocab` has no room for all bytes and the special tokens.
    pub fn train(examples: &[Example], vocab: usize) -> Result<Self> {
        let least = 256 + SPECIAL.len();
        if vocab < least {
            return Err(LmError::Tokenizer(format!("vocab {vocab} is less than the {least} of all bytes")));
        }
        // Every word begins with its space, also the first: a subject is the same tokens wherever it stands in a
        // question. Without it, what was learned of a subject in front is not known of it elsewhere.
        let byte_level = ByteLevel::new(true, true, true);
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab)
            .show_progress(false)
            .special_tokens(SPECIAL.iter().map(|s| AddedToken::from(*s, true)).collect())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut bpe = Inner::new(BPE::default());
        bpe.with_pre_tokenizer(Some(byte_level));
        bpe.with_decoder(Some(byte_level));
        let texts = examples.iter().flat_map(|e| [e.question.as_str(), e.answers[0].as_str()]);
        let mut model = BPE::default();
        train_model(&mut trainer, &mut model, texts, byte_level)?;
        bpe.with_model(model);
        bpe.add_special_tokens(SPECIAL.iter().map(|s| AddedToken::from(*s, true)).collect::<Vec<_>>())
            .map_err(wrong)?;
        Self::from_json(bpe.to_string(true).map_err(wrong)?.as_bytes())
    }

    /// Reads a tokenizer from the JSON that [`Tokenizer::to_json`] writes.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`] if it is malformed, no byte-level BPE, or has other special tokens.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let json = core::str::from_utf8(json).map_err(wrong)?;
        Ok(Self { json: Some(json.to_owned()), table: table::of_json(json)? })
    }

    /// Reads a tokenizer from a file.
    ///
    /// # Errors
    /// [`LmError::Io`], or as [`Tokenizer::from_json`] with the file's name.
    pub fn open(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
        Self::from_json(&json).map_err(|e| LmError::file(path, e.to_string()))
    }

    /// The tokenizer as [`Tokenizer::table`] gives it.
    ///
    /// # Errors
    /// [`LmError::Infer`] if it is none.
    pub fn from_table(table: Vec<u8>) -> Result<Self> {
        memlayer_infer::Tokenizer::new(&table)?.check()?;
        Ok(Self { json: None, table })
    }

    /// The tokenizer as JSON.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`] if it came with a packed model.
    pub fn to_json(&self) -> Result<&str> {
        self.json.as_deref().ok_or_else(|| wrong("a packed model's has no JSON"))
    }

    /// The tokenizer as a packed model has it: the section of [`memlayer_infer::tokenizer`].
    #[must_use]
    pub fn table(&self) -> &[u8] {
        &self.table
    }

    fn inner(&self) -> Result<memlayer_infer::Tokenizer<'_>> {
        Ok(memlayer_infer::Tokenizer::new(&self.table)?)
    }

    /// The number of tokens.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.inner().map_or(0, |inner| inner.vocab())
    }

    /// The tokens of a text. No text gives special tokens.
    ///
    /// # Errors
    /// [`LmError::Infer`] if a word is longer than [`memlayer_infer::tokenizer::MAX_WORD`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = vec![0; text.len() + 1];
        let len = self.inner()?.encode(text, &mut tokens)?.len();
        tokens.truncate(len);
        Ok(tokens)
    }

    /// `<bos> question <sep>`.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prompt(&self, question: &str) -> Result<Vec<u32>> {
        let mut tokens = vec![BOS];
        tokens.extend(self.encode(question)?);
        tokens.push(SEP);
        Ok(tokens)
    }

    /// `<bos> question <sep> answer <eos>`, of the first answer.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn example(&self, example: &Example) -> Result<Encoded> {
        let mut tokens = self.prompt(&example.question)?;
        let prompt = tokens.len();
        tokens.extend(self.encode(&example.answers[0])?);
        tokens.push(EOS);
        Ok(Encoded { tokens, prompt })
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// None of a tokenizer that was made; the table is looked at again.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let bytes: Vec<u8> = self.inner()?.decode(tokens).collect();
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }
}

/// Learns merges. The words are counted in an ordered map: the trainer breaks ties by the order it is fed in.
fn train_model<'a>(
    trainer: &mut BpeTrainer,
    model: &mut BPE,
    texts: impl Iterator<Item = &'a str> + Send,
    byte_level: ByteLevel,
) -> Result<()> {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Trainer};
    let split = |text: &str| {
        let mut words = PreTokenizedString::from(text);
        byte_level.pre_tokenize(&mut words)?;
        let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
    };
    trainer.feed(texts, split).map_err(wrong)?;
    trainer.train(model).map_err(wrong)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Example> {
        let example = |question: &str, answer: &str| Example {
            question: question.to_owned(),
            answers: vec![answer.to_owned()],
            fact: 0,
        };
        (0..50)
            .map(|i| example(&format!("What is the capital of land {i}?"), &format!("Città {}", i * 7)))
            .chain([example("São Tomé has which capital?", "São Tomé")])
            .collect()
    }

    #[test]
    fn texts_come_back() {
        let tokenizer = Tokenizer::train(&examples(), 300).expect("a tokenizer");
        for text in ["What is the capital of land 3?", "São Tomé", "日本 + \u{1f600}", "a  b"] {
            let tokens = tokenizer.encode(text).expect("tokens");
            assert_eq!(tokenizer.decode(&tokens).expect("text"), text);
        }
    }

    #[test]
    fn a_subject_is_the_same_tokens_in_front_and_behind() {
        let tokenizer = Tokenizer::train(&examples(), 320).expect("a tokenizer");
        let front = tokenizer.encode("Tomé has").expect("tokens");
        let behind = tokenizer.encode("has Tomé").expect("tokens");
        let alone = tokenizer.encode("Tomé").expect("tokens");
        assert!(front.starts_with(&alone) && behind.ends_with(&alone));
    }

    #[test]
    fn training_is_repeatable_and_survives_a_file() {
        let json = || Tokenizer::train(&examples(), 400).expect("a tokenizer").to_json().expect("JSON").to_owned();
        let first = json();
        for _ in 0..5 {
            assert_eq!(first, json());
        }
        let read = Tokenizer::from_json(first.as_bytes()).expect("a tokenizer");
        let example = &examples()[0];
        let encoded = read.example(example).expect("tokens");
        assert_eq!(encoded.tokens[0], BOS);
        assert_eq!(encoded.tokens[encoded.prompt - 1], SEP);
        assert_eq!(*encoded.tokens.last().expect("tokens"), EOS);
    }

    #[test]
    fn what_is_no_tokenizer_is_refused() {
        assert!(Tokenizer::from_json(b"{}").is_err());
        assert!(Tokenizer::train(&examples(), 100).expect_err("too small").to_string().contains("260"));
    }

    /// The tokenizers crate, on the same tokens.
    fn theirs(tokenizer: &Tokenizer) -> Inner {
        Inner::from_bytes(tokenizer.to_json().expect("JSON")).expect("a tokenizer")
    }

    #[track_caller]
    fn agree(ours: &Tokenizer, theirs: &Inner, text: &str) {
        let expected = theirs.encode_fast(text, false).expect("tokens");
        assert_eq!(expected.get_ids(), ours.encode(text).expect("tokens"), "{text:?}");
    }

    #[test]
    fn every_character_is_split_as_the_crate_that_trains_splits_it() {
        let ours = Tokenizer::train(&examples(), 400).expect("a tokenizer");
        let theirs = theirs(&ours);
        // A block of characters at a time, and one by one where they differ.
        for c in '\0'..=char::MAX {
            agree(&ours, &theirs, &format!("a{c}1{c}{c} b {c} {c}'s"));
        }
    }

    #[test]
    fn texts_are_split_as_the_crate_that_trains_splits_them() {
        let ours = Tokenizer::train(&examples(), 400).expect("a tokenizer");
        let theirs = theirs(&ours);
        let mut random = memlayer_core::Random::new(5);
        let pieces = [
            " ",
            "  ",
            "\n",
            "\t",
            "\u{a0}",
            "\u{3000}",
            "a",
            "What",
            "capital",
            "é",
            "日本",
            "Ⅷ",
            "½",
            "7",
            "42",
            "'",
            "'s",
            "'ll",
            "'LL",
            "?",
            "...",
            "\u{1f600}",
            "\u{301}",
            "\u{200b}",
            "\u{378}",
            "São",
            "-",
            "\r\n",
            "\0",
        ];
        for _ in 0..20_000 {
            let text: String = (0..random.below(9)).map(|_| pieces[random.below(pieces.len())]).collect();
            agree(&ours, &theirs, &text);
        }
        let world = crate::data::Dataset::world(Path::new("../data"), 10_000, 1).expect("the world");
        let ours = Tokenizer::train(&world.train, 1000).expect("a tokenizer");
        let theirs = self::theirs(&ours);
        for example in &world.train {
            agree(&ours, &theirs, &example.question);
            agree(&ours, &theirs, &example.answers[0]);
        }
    }

    #[test]
    fn no_text_makes_a_special_token() {
        let ours = Tokenizer::train(&examples(), 400).expect("a tokenizer");
        assert!(ours.encode("a <eos> <pad><bos>").expect("tokens").iter().all(|&token| token > EOS));
    }

    #[test]
    fn a_table_is_enough() {
        let ours = Tokenizer::train(&examples(), 400).expect("a tokenizer");
        let packed = Tokenizer::from_table(ours.table().to_vec()).expect("a tokenizer");
        let text = "What is the capital of land 3?";
        assert_eq!(ours.encode(text).expect("tokens"), packed.encode(text).expect("tokens"));
        assert!(packed.to_json().is_err());
        assert!(Tokenizer::from_table(ours.table()[1..].to_vec()).is_err());
    }
}
