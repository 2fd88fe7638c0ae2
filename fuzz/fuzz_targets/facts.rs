//! Any bytes as facts in lines of JSON, as tables of the world, as a tokenizer, and as a tokenizer's text.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use memlayer_lm::data::{Dataset, Example};
use memlayer_lm::tokenizer::Tokenizer;

/// A folder of this process.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

/// A tokenizer of a few words.
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let examples: Vec<Example> = (0..20)
        .map(|i| Example { question: format!("What is the number {i}?"), answers: vec![format!("No. {i}")], fact: i })
        .collect();
    Tokenizer::train(&examples, 300).expect("a tokenizer")
});

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.path().join(name);
    std::fs::write(&path, bytes).expect("a file");
    path
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&mode, bytes)) = bytes.split_first() else { return };
    match mode % 4 {
        0 => is_sound(Dataset::jsonl(&file("facts.jsonl", bytes))),
        1 => {
            let at = bytes.iter().position(|&b| b == 0xff).unwrap_or(bytes.len());
            file("countries.tsv", &bytes[..at]);
            file("cities.tsv", bytes.get(at + 1..).unwrap_or_default());
            is_sound(Dataset::world(FOLDER.path(), 50, u64::from(mode)));
        }
        2 => match Tokenizer::from_json(bytes) {
            Ok(tokenizer) => {
                let _ = tokenizer.encode("What is this?").map(|tokens| tokenizer.decode(&tokens));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        },
        _ => {
            let text = String::from_utf8_lossy(bytes);
            let tokens = TOKENIZER.encode(&text).expect("tokens of any text");
            assert!(tokens.iter().all(|&token| (token as usize) < TOKENIZER.vocab()));
            TOKENIZER.decode(&tokens).expect("the text of its tokens");
            let ids: Vec<u32> =
                bytes.chunks(2).map(|pair| pair.iter().fold(0, |id, &b| id << 8 | u32::from(b))).collect();
            let _ = TOKENIZER.decode(&ids);
        }
    }
});

fn is_sound(dataset: memlayer_lm::error::Result<Dataset>) {
    match dataset {
        Ok(dataset) => {
            let (judged, _) = dataset.judged();
            assert!(!judged.is_empty() && !dataset.facts.is_empty());
            for example in dataset.train.iter().chain(&dataset.held_out) {
                assert!(!example.question.is_empty() && !example.answers.is_empty());
                assert!(example.fact < dataset.facts.len());
            }
            let _ = dataset.fingerprint();
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
