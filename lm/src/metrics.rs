//! Exact match and F1, with the normalizations of SQuAD and of TriviaQA.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// How answers are normalized before they are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// SQuAD's evaluation script: lower case, punctuation deleted, articles removed, white space squeezed.
    #[default]
    Squad,
    /// TriviaQA's: underscores and punctuation, also curly quotes, become spaces.
    Trivia,
}

/// `string.punctuation` of Python.
const PUNCTUATION: &str = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
/// What TriviaQA's script adds to it.
const QUOTES: &str = "\u{2018}\u{2019}\u{b4}`";

impl Normalization {
    /// A text as it is compared.
    #[must_use]
    pub fn apply(self, text: &str) -> String {
        let text = text.to_lowercase();
        let text: String = match self {
            Self::Squad => text.chars().filter(|c| !PUNCTUATION.contains(*c)).collect(),
            Self::Trivia => {
                let space = |c| if PUNCTUATION.contains(c) || QUOTES.contains(c) { ' ' } else { c };
                text.chars().map(space).collect()
            }
        };
        // Articles are whole words; where a word is cut by what was left in, Python's \b cuts it too.
        let mut out: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            let word = without_articles(word);
            out.extend(word.split_whitespace().map(str::to_owned));
        }
        out.join(" ")
    }
}

/// Replaces the articles in a text without spaces by spaces: `\b(a|an|the)\b`.
fn without_articles(word: &str) -> String {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = word;
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (piece, tail) = rest.split_at(end);
        out.push_str(if ["a", "an", "the"].contains(&piece) { " " } else { piece });
        rest = tail;
    }
    out
}

/// Whether `answer` is `gold`, both normalized.
#[must_use]
pub fn exact_match(answer: &str, gold: &str, normalization: Normalization) -> bool {
    normalization.apply(answer) == normalization.apply(gold)
}

/// The harmonic mean of precision and recall of the words of `answer`, as SQuAD's script counts them.
#[must_use]
pub fn f1(answer: &str, gold: &str, normalization: Normalization) -> f64 {
    let (answer, gold) = (normalization.apply(answer), normalization.apply(gold));
    let (answer, gold): (Vec<_>, Vec<_>) = (answer.split_whitespace().collect(), gold.split_whitespace().collect());
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for word in &gold {
        *counts.entry(word).or_default() += 1;
    }
    let mut same = 0;
    for word in &answer {
        if let Some(count) = counts.get_mut(word)
            && *count > 0
        {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let (precision, recall) = (f64::from(same) / answer.len() as f64, f64::from(same) / gold.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Exact match and F1 against the best of the accepted answers.
#[must_use]
pub fn best(answer: &str, accepted: &[String], normalization: Normalization) -> (bool, f64) {
    let matched = accepted.iter().any(|gold| exact_match(answer, gold, normalization));
    let f1 = accepted.iter().map(|gold| f1(answer, gold, normalization)).fold(0.0, f64::max);
    // An answer of articles alone normalizes to nothing: it is matched, and F1 has no words to count.
    (matched, if matched { 1.0 } else { f1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squad_deletes_and_trivia_spaces() {
        for (text, squad, trivia) in [
            ("The U.S. dollar", "us dollar", "u s dollar"),
            ("Port-au-Prince!", "portauprince", "port au prince"),
            ("  An  apple a\tday ", "apple day", "apple day"),
            ("theatre", "theatre", "theatre"),
            ("America/New_York", "americanewyork", "america new york"),
            ("N\u{2019}Djamena", "n\u{2019}djamena", "n djamena"),
            ("\u{201c}the\u{201d} end", "\u{201c} \u{201d} end", "\u{201c} \u{201d} end"),
            ("", "", ""),
        ] {
            assert_eq!(Normalization::Squad.apply(text), squad, "{text}");
            assert_eq!(Normalization::Trivia.apply(text), trivia, "{text}");
        }
    }

    #[test]
    fn f1_worked_out_by_hand() {
        let squad = Normalization::Squad;
        // Two of three words said are right, two of four right ones said.
        assert!((f1("Rio de Janeiro", "Rio de la Plata", squad) - 4.0 / 7.0).abs() < 1e-12);
        assert!((f1("la la land", "la land", squad) - 0.8).abs() < 1e-12);
        assert!(f1("Paris", "Lyon", squad).abs() < 1e-12);
        assert!(f1("", "", squad).abs() < 1e-12);
    }

    #[test]
    fn the_best_of_several_counts() {
        let accepted = ["Euro".to_owned(), "the euro coin".to_owned()];
        assert_eq!(best("EURO.", &accepted, Normalization::Squad), (true, 1.0));
        assert_eq!(best("coin", &accepted, Normalization::Squad), (false, 2.0 / 3.0));
    }
}
