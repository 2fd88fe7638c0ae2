//! Facts, the questions that ask for them, and which of those are held out.

mod jsonl;
mod lines;
mod world;

use std::path::Path;

pub use world::{RELATIONS, Relation};

use crate::error::Result;

/// A question and what counts as its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The question, as it is put to the model.
    pub question: String,
    /// Accepted answers; the first is trained. Never empty.
    pub answers: Vec<String>,
    /// The fact it asks for, an index into [`Dataset::facts`].
    pub fact: usize,
}

/// What a fact is about, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is about: a country, a city, or the whole question where nothing else is known.
    pub subject: String,
    /// Which of its properties; empty where nothing is known.
    pub relation: &'static str,
    /// The answers.
    pub answers: Vec<String>,
}

/// Questions to train and questions to be judged by.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The facts.
    pub facts: Vec<Fact>,
    /// Questions that are trained.
    pub train: Vec<Example>,
    /// Questions that are not: each fact in one of its phrasings, which is trained with other facts.
    pub held_out: Vec<Example>,
}

impl Dataset {
    /// World facts from the folder that holds `countries.tsv` and `cities.tsv`: all facts of countries, then those of
    /// cities by population, until there are `limit`. `seed` picks the phrasing each fact is held out in.
    ///
    /// # Errors
    /// [`crate::LmError`] if a file is not what it must be.
    pub fn world(folder: &Path, limit: usize, seed: u64) -> Result<Self> {
        world::load(folder, limit, seed)
    }

    /// Facts from lines of JSON, `{"question": "...", "answer": ["...", ...]}`. Each has one phrasing only, so nothing
    /// is held out: recall on such facts is recall of what was trained.
    ///
    /// # Errors
    /// [`crate::LmError`] if the file is not what it must be.
    pub fn jsonl(path: &Path) -> Result<Self> {
        jsonl::load(path)
    }

    /// What recall is measured on, and whether it was trained.
    #[must_use]
    pub fn judged(&self) -> (&[Example], bool) {
        if self.held_out.is_empty() { (&self.train, true) } else { (&self.held_out, false) }
    }

    /// A number that differs where the questions or answers differ: a checkpoint belongs to one set of them.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Hash::new(0);
        for (kind, examples) in [("train", &self.train), ("held out", &self.held_out)] {
            hash.text(kind);
            for example in examples {
                hash.text(&example.question);
                example.answers.iter().for_each(|answer| hash.text(answer));
            }
        }
        hash.finish()
    }
}

/// A hash that is the same in every version and on every machine (FNV-1a, 64 bits, finished by `SplitMix64`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hash(u64);

impl Hash {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(0xcbf2_9ce4_8422_2325 ^ seed)
    }

    pub(crate) fn text(&mut self, text: &str) {
        // A byte that no text has ends each: ("ab", "c") is not ("a", "bc").
        for byte in text.bytes().chain([0xff]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) const fn finish(self) -> u64 {
        memlayer_core::random::mix(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn data() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../data")
    }

    #[test]
    fn the_world_has_facts_in_every_relation() {
        let world = Dataset::world(&data(), 10_000, 1).expect("world facts");
        assert!((10_000..10_002).contains(&world.facts.len()), "{} facts", world.facts.len());
        for relation in RELATIONS {
            let of = |examples: &[Example]| {
                examples.iter().filter(|e| world.facts[e.fact].relation == relation.name).count()
            };
            assert_eq!(of(&world.train), 3 * of(&world.held_out), "{}", relation.name);
            assert!(of(&world.held_out) > 200, "{}", relation.name);
        }
        let paris = world.train.iter().chain(&world.held_out).find(|e| e.question == "What is the capital of France?");
        assert_eq!(paris.expect("the capital of France").answers, ["Paris"]);
    }

    #[test]
    fn nothing_held_out_is_trained_and_every_phrasing_is() {
        let world = Dataset::world(&data(), 3000, 1).expect("world facts");
        let trained: std::collections::HashSet<_> = world.train.iter().map(|e| &e.question).collect();
        assert_eq!(world.held_out.len(), world.facts.len());
        assert!(world.held_out.iter().all(|e| !trained.contains(&e.question)));
        for relation in RELATIONS {
            for phrasing in relation.phrasings {
                let (head, tail) = phrasing.split_once("{}").expect("a place for the subject");
                assert!(trained.iter().any(|q| q.starts_with(head) && q.ends_with(tail)), "{phrasing}");
            }
        }
    }

    #[test]
    fn a_seed_picks_what_is_held_out_and_the_fingerprint_tells() {
        let load = |limit, seed| Dataset::world(&data(), limit, seed).expect("world facts");
        let (a, again, b) = (load(2000, 1), load(2000, 1), load(2000, 2));
        assert_eq!(a.held_out, again.held_out);
        assert_ne!(a.held_out, b.held_out);
        assert_eq!(a.fingerprint(), again.fingerprint());
        assert_ne!(a.fingerprint(), b.fingerprint());
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = Dataset::world(Path::new("nowhere"), 10, 1).expect_err("no folder");
        assert!(error.to_string().contains("countries.tsv"), "{error}");
    }

    #[test]
    fn errors_are_about_a_line() {
        let error = crate::LmError::line(Path::new("cities.tsv"), 17, "expected 6 fields, found 4");
        assert_eq!(error.to_string(), "cities.tsv:17: expected 6 fields, found 4");
    }
}
