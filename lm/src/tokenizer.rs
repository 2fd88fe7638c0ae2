//! Byte-pair encoding of questions and answers.

use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::data::Example;
use crate::error::{LmError, Result};

/// Fills the end of a sequence.
pub const PAD: u32 = 0;
/// Begins a sequence.
pub const BOS: u32 = 1;
/// Stands between question and answer.
pub const SEP: u32 = 2;
/// Ends a sequence.
pub const EOS: u32 = 3;

const SPECIAL: [&str; 4] = ["<pad>", "<bos>", "<sep>", "<eos>"];

/// A byte-level BPE tokenizer with the special tokens of question and answer.
#[derive(Clone, Debug)]
pub struct Tokenizer(Inner);

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
        Ok(Self(bpe))
    }

    /// Reads a tokenizer from the JSON that [`Tokenizer::to_json`] writes.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`] if it is malformed or has other special tokens.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let inner = Inner::from_bytes(json).map_err(wrong)?;
        for (id, token) in (0u32..).zip(SPECIAL) {
            if inner.token_to_id(token) != Some(id) {
                return Err(LmError::Tokenizer(format!("`{token}` is not token {id}")));
            }
        }
        Ok(Self(inner))
    }

    /// Reads a tokenizer from a file.
    ///
    /// # Errors
    /// [`LmError::Io`], or as [`Tokenizer::from_json`] with the file's name.
    pub fn open(path: &Path) -> Result<Self> {
        let json = std::fs::read(path).map_err(|e| LmError::io(path, e))?;
        Self::from_json(&json).map_err(|e| LmError::file(path, e.to_string()))
    }

    /// The tokenizer as JSON.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`].
    pub fn to_json(&self) -> Result<String> {
        self.0.to_string(true).map_err(wrong)
    }

    /// The number of tokens.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.0.get_vocab_size(true)
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.0.encode_fast(text, false).map_err(wrong)?.get_ids().to_vec())
    }

    /// `<bos> question <sep>`.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`].
    pub fn prompt(&self, question: &str) -> Result<Vec<u32>> {
        let mut tokens = vec![BOS];
        tokens.extend(self.encode(question)?);
        tokens.push(SEP);
        Ok(tokens)
    }

    /// `<bos> question <sep> answer <eos>`, of the first answer.
    ///
    /// # Errors
    /// [`LmError::Tokenizer`].
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
    /// [`LmError::Tokenizer`] if a token is none of the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(self.0.decode(tokens, true).map_err(wrong)?.trim().to_owned())
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
        let json = || Tokenizer::train(&examples(), 400).expect("a tokenizer").to_json().expect("JSON");
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
}
