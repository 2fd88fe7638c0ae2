//! Facts from lines of JSON.

use std::path::Path;

use serde::Deserialize;

use super::lines::Lines;
use super::{Dataset, Example, Fact};
use crate::error::{LmError, Result};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    question: String,
    answer: Vec<String>,
}

pub(super) fn load(path: &Path) -> Result<Dataset> {
    let mut lines = Lines::open(path)?;
    let mut dataset = Dataset::default();
    while let Some(line) = lines.next()? {
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&line).map_err(|e| lines.error(e.to_string()))?;
        if line.question.trim().is_empty() {
            return Err(lines.error("field `question` is empty"));
        }
        if line.answer.is_empty() || line.answer.iter().any(|answer| answer.trim().is_empty()) {
            return Err(lines.error("field `answer` has no answer, or an empty one"));
        }
        let fact = dataset.facts.len();
        dataset.facts.push(Fact { subject: line.question.clone(), relation: "", answers: line.answer.clone() });
        dataset.train.push(Example { question: line.question, answers: line.answer, fact });
    }
    if dataset.facts.is_empty() {
        return Err(LmError::file(path, "has no facts"));
    }
    Ok(dataset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &[u8]) -> Result<Dataset> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("facts.jsonl");
        std::fs::write(&path, text).expect("a file");
        load(&path)
    }

    #[test]
    fn reads_questions_and_answers() {
        let data = load_text(
            b"{\"question\": \"Who?\", \"answer\": [\"Me\", \"I\"]}\n\n{\"question\":\"2?\",\"answer\":[\"x\"]}",
        )
        .expect("facts");
        assert_eq!(data.train.len(), 2);
        assert_eq!(data.train[0].answers, ["Me", "I"]);
        assert!(data.judged().1, "what is judged was trained");
    }

    #[test]
    fn malformed_lines_are_named() {
        for (text, expected) in [
            (&b"{\"question\": \"a\", \"answer\": [\"b\"]}\n{\"question\": 3}"[..], "facts.jsonl:2: "),
            (b"{\"question\": \"a\"}", "missing field `answer`"),
            (b"{\"question\": \"\", \"answer\": [\"b\"]}", "`question` is empty"),
            (b"{\"question\": \"a\", \"answer\": []}", "`answer` has no answer"),
            (b"\xff\xfe", "byte 1 is not UTF-8"),
            (b"", "has no facts"),
            (b"{\"question\": \"a\", \"answer\": [\"b\"], \"id\": 1}", "unknown field `id`"),
        ] {
            let error = load_text(text).expect_err("malformed");
            assert!(error.to_string().contains(expected), "{error} does not say {expected}");
        }
        let long = vec![b'a'; super::super::lines::LONGEST + 10];
        assert!(load_text(&long).expect_err("too long").to_string().contains("longer than 65536 bytes"));
    }
}
