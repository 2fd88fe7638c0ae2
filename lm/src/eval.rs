//! Recall: how many questions a model answers.

use memlayer_cpu::Cpu;
use serde::{Deserialize, Serialize};

use crate::data::Example;
use crate::error::Result;
use crate::infer::{Read, Reader};
use crate::metrics::{Normalization, best};
use crate::tokenizer::Tokenizer;

/// The share of questions answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Questions asked.
    pub questions: usize,
    /// Share answered exactly, after normalization, 0 to 1.
    pub em: f64,
    /// Mean F1 of the words, 0 to 1.
    pub f1: f64,
}

/// Questions answered at once; larger batches no longer pay.
const BATCH: usize = 256;
/// Tokens an answer may have; all of the world's facts have fewer.
pub const LONGEST_ANSWER: usize = 24;

/// Questions as tokens, made once.
#[derive(Debug)]
pub struct Questions<'a> {
    examples: &'a [Example],
    prompts: Vec<Vec<u32>>,
    /// Indices, by length of prompt.
    order: Vec<usize>,
}

impl<'a> Questions<'a> {
    /// Encodes the questions of `examples`.
    ///
    /// # Errors
    /// The tokenizer's.
    pub fn new(examples: &'a [Example], tokenizer: &Tokenizer) -> Result<Self> {
        let prompts = examples.iter().map(|e| tokenizer.prompt(&e.question)).collect::<Result<Vec<_>>>()?;
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        order.sort_by_key(|&i| prompts[i].len());
        Ok(Self { examples, prompts, order })
    }

    /// One of `step` questions, for a quick look: scattered ones, as facts come in an order of their own (a city's
    /// country, its time zone, ..) that every `step`-th question would keep one kind of.
    #[must_use]
    pub fn thinned(mut self, step: usize) -> Self {
        let step = step.max(1) as u64;
        self.order.retain(|&i| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).is_multiple_of(step));
        self
    }

    /// Asks them all, greedily. `seen` gets each question's index, the answer and whether it matched.
    ///
    /// # Errors
    /// The reader's or the tokenizer's.
    pub fn ask(
        &self,
        reader: &Reader<'_>,
        cpu: &Cpu,
        tokenizer: &Tokenizer,
        normalization: Normalization,
        mut seen: impl FnMut(usize, &str, bool),
    ) -> Result<Recall> {
        let mut recall = Recall { questions: self.order.len(), ..Recall::default() };
        for same_length in self.order.chunk_by(|&a, &b| self.prompts[a].len() == self.prompts[b].len()) {
            for batch in same_length.chunks(BATCH) {
                let prompts: Vec<&[u32]> = batch.iter().map(|&i| self.prompts[i].as_slice()).collect();
                let room = reader.config().context.saturating_sub(prompts[0].len());
                let answers = reader.answer(cpu, &prompts, LONGEST_ANSWER.min(room), false)?;
                for (&i, answer) in batch.iter().zip(answers) {
                    let text = tokenizer.decode(&answer.tokens)?;
                    let (matched, f1) = best(&text, &self.examples[i].answers, normalization);
                    recall.em += f64::from(u8::from(matched));
                    recall.f1 += f1;
                    seen(i, &text, matched);
                }
            }
        }
        if recall.questions > 0 {
            recall.em /= recall.questions as f64;
            recall.f1 /= recall.questions as f64;
        }
        Ok(recall)
    }

    /// Asks them all and hands over every read of a memory made for their answers; gives the number of reads.
    ///
    /// # Errors
    /// The reader's.
    pub fn reads(&self, reader: &Reader<'_>, cpu: &Cpu, mut seen: impl FnMut(&Read)) -> Result<usize> {
        let mut count = 0;
        for same_length in self.order.chunk_by(|&a, &b| self.prompts[a].len() == self.prompts[b].len()) {
            for batch in same_length.chunks(BATCH) {
                let prompts: Vec<&[u32]> = batch.iter().map(|&i| self.prompts[i].as_slice()).collect();
                let room = reader.config().context.saturating_sub(prompts[0].len());
                for answer in reader.answer(cpu, &prompts, LONGEST_ANSWER.min(room), true)? {
                    for read in answer.reads.iter().flatten() {
                        seen(read);
                        count += 1;
                    }
                }
            }
        }
        Ok(count)
    }
}
