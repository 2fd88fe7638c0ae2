//! `ask`: one question, or many at a prompt.

use std::collections::HashMap;
use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use memlayer_cpu::Cpu;
use memlayer_lm::LmError;
use memlayer_lm::data::Dataset;
use memlayer_lm::eval::LONGEST_ANSWER;
use memlayer_lm::infer::{Read, Reader};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::loaded::Loaded;
use crate::recipe::{DataOptions, share};

/// Asks a model.
#[derive(Debug, Args)]
pub(crate) struct Ask {
    /// A packed file or the folder of a training.
    model: PathBuf,
    /// The question; without one, questions are read from standard input, a line each.
    question: Option<String>,
    /// Show the slots read for the first token of the answer, and which facts share them.
    #[arg(long)]
    explain: bool,
    #[command(flatten)]
    data: DataOptions,
}

#[derive(Serialize)]
struct Answered {
    question: String,
    answer: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    slots: Vec<Slot>,
}

#[derive(Serialize)]
struct Slot {
    slot: u32,
    weight: f32,
    /// Facts whose own first answer token reads this slot with the greatest weights.
    facts: Vec<String>,
}

/// Slots and facts that are shown.
const SHOWN: usize = 8;

impl Ask {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let cpu = share(context.cpu()?);
        let model = Loaded::open(&self.model, &cpu)?;
        if self.explain && model.config().memory.is_none() {
            return Err(CliError::Usage("--explain shows a memory's slots, and this model has none".to_owned()));
        }
        let users = if self.explain { Some(self.slot_users(&model, &cpu)?) } else { None };
        if let Some(question) = &self.question {
            let answered = self.answer(question, &model, &cpu, users.as_ref())?;
            show(context, &answered, true)?;
            return context.finish(&answered);
        }
        self.converse(context, &model, &cpu, users.as_ref())
    }

    /// Answers lines of standard input until it ends.
    fn converse(
        &self,
        context: &Context,
        model: &Loaded,
        cpu: &Cpu,
        users: Option<&HashMap<u32, Vec<(f32, String)>>>,
    ) -> Result<(), CliError> {
        let (stdin, terminal) = (std::io::stdin(), std::io::stdin().is_terminal());
        let mut line = String::new();
        loop {
            if terminal {
                eprint!("? ");
                std::io::stderr().flush().map_err(CliError::Output)?;
            }
            line.clear();
            let read = stdin.lock().read_line(&mut line);
            if read.map_err(|e| CliError::Usage(format!("standard input: {e}")))? == 0 {
                return Ok(());
            }
            let question = line.trim();
            if question.is_empty() {
                continue;
            }
            match self.answer(question, model, cpu, users) {
                Ok(answered) => {
                    show(context, &answered, false)?;
                    context.finish(&answered)?;
                }
                // A question too long is no reason to leave.
                Err(CliError::Lm(error @ LmError::TooLong { .. })) => eprintln!("{error}"),
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(
        &self,
        question: &str,
        model: &Loaded,
        cpu: &Cpu,
        users: Option<&HashMap<u32, Vec<(f32, String)>>>,
    ) -> Result<Answered, CliError> {
        let prompt = model.tokenizer().prompt(question)?;
        let longest = LONGEST_ANSWER.min(model.config().context.saturating_sub(prompt.len()).max(1));
        let answers = model.with_reader(|reader| reader.answer(cpu, &[&prompt], longest, users.is_some()))?;
        let Some(answer) = answers.into_iter().next() else {
            return Err(CliError::Usage("no answer".to_owned()));
        };
        let mut slots = Vec::new();
        if let (Some(users), Some(reads)) = (users, answer.reads.first()) {
            for Read { slot, weight } in heaviest(reads).into_iter().take(SHOWN) {
                let facts = users.get(&slot).map_or(&[][..], Vec::as_slice);
                let facts = facts.iter().take(3).map(|(_, fact)| fact.clone()).collect();
                slots.push(Slot { slot, weight, facts });
            }
        }
        let answer = model.tokenizer().decode(&answer.tokens)?;
        Ok(Answered { question: question.to_owned(), answer, slots })
    }

    /// For every slot the facts that read it most, found by asking for each fact once.
    fn slot_users(&self, model: &Loaded, cpu: &Cpu) -> Result<HashMap<u32, Vec<(f32, String)>>, CliError> {
        let data = self.data.load()?;
        let mut users: HashMap<u32, Vec<(f32, String)>> = HashMap::new();
        model.with_reader(|reader| {
            for (fact, reads) in first_reads(reader, cpu, &data, model)? {
                let fact = &data.facts[fact];
                let name = if fact.relation.is_empty() {
                    fact.subject.clone()
                } else {
                    format!("{} of {}: {}", fact.relation, fact.subject, fact.answers.join(" / "))
                };
                for Read { slot, weight } in heaviest(&reads) {
                    users.entry(slot).or_default().push((weight, name.clone()));
                }
            }
            Ok(())
        })?;
        for readers in users.values_mut() {
            readers.sort_by(|a, b| b.0.total_cmp(&a.0));
        }
        Ok(users)
    }
}

/// The reads of each fact's first answer token, one phrasing each.
fn first_reads(
    reader: &Reader<'_>,
    cpu: &Cpu,
    data: &Dataset,
    model: &Loaded,
) -> Result<Vec<(usize, Vec<Read>)>, LmError> {
    let mut seen = vec![false; data.facts.len()];
    let mut prompts = Vec::new();
    for example in &data.train {
        if !core::mem::replace(&mut seen[example.fact], true) {
            prompts.push((example.fact, model.tokenizer().prompt(&example.question)?));
        }
    }
    prompts.sort_by_key(|(_, prompt)| prompt.len());
    let mut all = Vec::new();
    for same_length in prompts.chunk_by(|a, b| a.1.len() == b.1.len()) {
        for batch in same_length.chunks(256) {
            let tokens: Vec<&[u32]> = batch.iter().map(|(_, prompt)| prompt.as_slice()).collect();
            for ((fact, _), mut answer) in batch.iter().zip(reader.answer(cpu, &tokens, 1, true)?) {
                all.push((*fact, answer.reads.swap_remove(0)));
            }
        }
    }
    Ok(all)
}

/// Each slot once, with the sum of its weights over heads and layers, the heaviest first.
fn heaviest(reads: &[Read]) -> Vec<Read> {
    let mut sums: HashMap<u32, f32> = HashMap::new();
    for read in reads {
        *sums.entry(read.slot).or_default() += read.weight;
    }
    let mut sums: Vec<Read> = sums.into_iter().map(|(slot, weight)| Read { slot, weight }).collect();
    sums.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.slot.cmp(&b.slot)));
    sums
}

fn show(context: &Context, answered: &Answered, alone: bool) -> Result<(), CliError> {
    context.say(format_args!("{}{}", if alone { "" } else { "  " }, answered.answer))?;
    for Slot { slot, weight, facts } in &answered.slots {
        context.say(format_args!("  slot {slot:>6}  weight {weight:.3}  {}", facts.join("; ")))?;
    }
    Ok(())
}
