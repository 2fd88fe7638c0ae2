//! `eval`: recall of a model.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use memlayer_lm::eval::{Questions, Recall};
use memlayer_lm::metrics::Normalization;
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::loaded::Loaded;
use crate::recipe::{DataOptions, share};

/// Asks a model every held-out question.
#[derive(Debug, Args)]
pub(crate) struct Eval {
    /// A packed file or the folder of a training.
    model: PathBuf,
    /// Ask what was trained instead of what was held out.
    #[arg(long)]
    trained: bool,
    /// How answers are normalized before they are compared.
    #[arg(long, value_enum, default_value_t = Rules::Squad)]
    normalization: Rules,
    /// Print every wrong answer.
    #[arg(long)]
    wrong: bool,
    #[command(flatten)]
    data: DataOptions,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Rules {
    /// SQuAD's: punctuation is deleted.
    Squad,
    /// TriviaQA's: punctuation becomes spaces.
    Trivia,
}

#[derive(Serialize)]
struct Report {
    model: String,
    format: &'static str,
    facts: usize,
    held_out: bool,
    /// Whether these are the data the model was trained on: what is held out of others may have been trained.
    same_data: bool,
    recall: Recall,
    by_relation: Vec<Relation>,
}

#[derive(Serialize)]
struct Relation {
    relation: String,
    questions: usize,
    em: f64,
}

impl Eval {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let cpu = share(context.cpu()?);
        let data = self.data.load()?;
        let model = Loaded::open(&self.model, &cpu)?;
        let same_data = model.data()? == data.fingerprint();
        if !same_data {
            eprintln!("warning: the model was trained on other facts or another seed: nothing here counts as held out");
        }
        let (judged, was_trained) = data.judged();
        let (examples, held_out) = if self.trained { (&data.train[..], false) } else { (judged, !was_trained) };
        let questions = Questions::new(examples, model.tokenizer())?;
        let normalization = match self.normalization {
            Rules::Squad => Normalization::Squad,
            Rules::Trivia => Normalization::Trivia,
        };
        let mut by_relation: Vec<(&str, usize, usize)> = Vec::new();
        let mut wrong = Vec::new();
        let recall = model.with_reader(|reader| {
            questions.ask(reader, &cpu, model.tokenizer(), normalization, |i, answer, matched| {
                let relation = data.facts[examples[i].fact].relation;
                let at = by_relation.iter().position(|(name, ..)| *name == relation).unwrap_or_else(|| {
                    by_relation.push((relation, 0, 0));
                    by_relation.len() - 1
                });
                by_relation[at].1 += 1;
                by_relation[at].2 += usize::from(matched);
                if !matched && self.wrong {
                    wrong.push((i, answer.to_owned()));
                }
            })
        })?;
        for (i, answer) in wrong {
            context.say(format_args!("{} {answer} (not {})", examples[i].question, examples[i].answers.join(" / ")))?;
        }
        let what = match (same_data, held_out) {
            (false, _) => "other",
            (true, true) => "held-out",
            (true, false) => "trained",
        };
        context.say(format_args!(
            "{} {what} questions: exact match {:.2} %, F1 {:.2} %",
            recall.questions,
            100.0 * recall.em,
            100.0 * recall.f1
        ))?;
        let mut relations = Vec::new();
        for (relation, questions, matched) in by_relation {
            let em = matched as f64 / questions as f64;
            if !relation.is_empty() {
                context.say(format_args!("  {relation:<16} {questions:>6} questions {:>6.2} %", 100.0 * em))?;
            }
            relations.push(Relation { relation: relation.to_owned(), questions, em });
        }
        context.finish(&Report {
            model: self.model.display().to_string(),
            format: model.format()?.name(),
            facts: data.facts.len(),
            held_out: held_out && same_data,
            same_data,
            recall,
            by_relation: relations,
        })
    }
}
