//! The order of training: a permutation for each epoch, and batches of sequences of about the same length.

use memlayer_core::Random;

use crate::model::Batch;
use crate::tokenizer::{Encoded, PAD};

/// Batches that are sorted by length together: few enough that their order stays random, enough that sequences of one
/// batch are about as long.
const SORTED_TOGETHER: usize = 16;

/// Where each batch's sequences come from. The batch of a step follows from the seed and the step alone.
#[derive(Debug)]
pub(super) struct Batches {
    examples: Vec<Encoded>,
    batch: usize,
    seed: u64,
    /// The epoch that `order` is of, and its batches.
    epoch: Option<u64>,
    order: Vec<Vec<usize>>,
}

impl Batches {
    pub(super) fn new(examples: Vec<Encoded>, batch: usize, seed: u64) -> Self {
        let batch = batch.min(examples.len()).max(1);
        Self { examples, batch, seed, epoch: None, order: Vec::new() }
    }

    /// Batches in an epoch; what does not fill a batch waits for the next.
    pub(super) fn per_epoch(&self) -> u64 {
        let whole = self.batch * SORTED_TOGETHER;
        let (groups, rest) = (self.examples.len() / whole, self.examples.len() % whole);
        (groups * SORTED_TOGETHER + rest / self.batch) as u64
    }

    /// The batch of step `step`, counted from 0.
    pub(super) fn get(&mut self, step: u64) -> Batch {
        let (epoch, index) = (step / self.per_epoch(), step % self.per_epoch());
        if self.epoch != Some(epoch) {
            self.order = self.order_of(epoch);
            self.epoch = Some(epoch);
        }
        #[allow(clippy::cast_possible_truncation, reason = "less than the batches of an epoch")]
        self.pad(&self.order[index as usize])
    }

    fn order_of(&self, epoch: u64) -> Vec<Vec<usize>> {
        let mut random = Random::new(memlayer_core::random::mix(self.seed ^ memlayer_core::random::mix(epoch)));
        let mut order: Vec<usize> = (0..self.examples.len()).collect();
        random.shuffle(&mut order);
        let mut batches = Vec::new();
        for group in order.chunks_mut(self.batch * SORTED_TOGETHER) {
            group.sort_by_key(|&i| self.examples[i].tokens.len());
            batches.extend(group.chunks_exact(self.batch).map(<[usize]>::to_vec));
        }
        random.shuffle(&mut batches);
        batches
    }

    /// Sequences padded to the longest, without their last token, which is only a target.
    fn pad(&self, of: &[usize]) -> Batch {
        let length = of.iter().map(|&i| self.examples[i].tokens.len() - 1).max().unwrap_or(0);
        let mut batch = Batch { sequences: of.len(), ..Batch::default() };
        for (row, &i) in of.iter().enumerate() {
            let Encoded { tokens, prompt } = &self.examples[i];
            for t in prompt - 1..tokens.len() - 1 {
                #[allow(clippy::cast_possible_truncation, reason = "a position in a batch")]
                batch.positions.push((row * length + t) as u32);
                batch.targets.push(tokens[t + 1]);
            }
            batch.tokens.extend_from_slice(&tokens[..tokens.len() - 1]);
            batch.tokens.resize((row + 1) * length, PAD);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(n: usize, batch: usize) -> Batches {
        let example = |i: usize| {
            let mut tokens = vec![1, 2];
            tokens.extend((0..1 + i % 5).map(|t| u32::try_from(10 + t).expect("a token")));
            tokens.push(3);
            Encoded { tokens, prompt: 2 }
        };
        Batches::new((0..n).map(example).collect(), batch, 7)
    }

    #[test]
    fn an_epoch_sees_everything_once_that_fills_its_batches() {
        let b = batches(103, 4);
        let mut seen: Vec<usize> = b.order_of(0).concat();
        assert_eq!(seen.len() as u64, b.per_epoch() * 4);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 100);
        assert_ne!(b.order_of(0), b.order_of(1));
    }

    #[test]
    fn any_step_can_be_had_at_once() {
        let (mut all, mut one) = (batches(50, 4), batches(50, 4));
        let steps: Vec<_> = (0..40).map(|s| all.get(s).tokens).collect();
        assert_eq!(one.get(33).tokens, steps[33]);
        assert_eq!(one.get(2).tokens, steps[2]);
    }

    #[test]
    fn losses_are_where_answers_are() {
        let batch = batches(3, 3).get(0);
        assert_eq!(batch.tokens.len() % 3, 0);
        let length = batch.tokens.len() / 3;
        for (&position, &target) in batch.positions.iter().zip(&batch.targets) {
            let (row, t) = (position as usize / length, position as usize % length);
            let next = batch.tokens[row * length..(row + 1) * length].get(t + 1).copied();
            assert!(target == 3 || next == Some(target));
        }
        assert_eq!(batch.targets.iter().filter(|&&t| t == 3).count(), 3);
    }

    #[test]
    fn few_examples_make_one_batch() {
        let mut b = batches(3, 256);
        assert_eq!(b.per_epoch(), 1);
        assert_eq!(b.get(5).sequences, 3);
    }
}
