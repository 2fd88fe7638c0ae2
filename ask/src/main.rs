//! `memlayer-ask FILE [QUESTION]`: answers of a packed model, and nothing else.
//!
//! The same answers as `memlayer ask`, by a program without candle that maps the file instead of reading it. Without a
//! question it answers those of standard input, a line each. The exit code is 2 if something could not be done.

use core::fmt::Display;
use std::io::{BufRead, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use memlayer_core::Scratch;
use memlayer_cpu::{Cpu, MappedFile};
use memlayer_infer::{Block, Error, Model, Sizes};
use memlayer_quantize::Image;

/// Tokens of the longest answer, as in `memlayer ask`.
const LONGEST_ANSWER: usize = 24;
/// Bytes of the longest answer's text.
const LONGEST_TEXT: usize = 1024;

const HELP: &str = "Answers of a packed model.

Usage: memlayer-ask [--threads N] FILE [QUESTION]

Without a question, those of standard input are answered, a line each. Files are written by `memlayer quantize`.
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            let _ = writeln!(std::io::stderr(), "error: {problem}");
            ExitCode::from(2)
        }
    }
}

/// What was asked for on the command line.
struct Arguments {
    file: PathBuf,
    question: Option<String>,
    threads: usize,
}

impl Arguments {
    /// Nothing if help was asked for.
    fn parse(mut given: impl Iterator<Item = std::ffi::OsString>) -> Result<Option<Self>, String> {
        let (mut file, mut question, mut threads, mut options) = (None, None, 1, true);
        while let Some(argument) = given.next() {
            let text = argument.to_str();
            if options && (text == Some("--help") || text == Some("-h")) {
                return Ok(None);
            } else if options && text == Some("--") {
                options = false;
            } else if options && text == Some("--threads") {
                let number = given.next().and_then(|n| n.to_str()?.parse().ok()).filter(|n| (1..=1024).contains(n));
                threads = number.ok_or("--threads needs a number in 1..=1024")?;
            } else if options && text.is_some_and(|t| t.starts_with('-') && t.len() > 1) {
                return Err(format!("unknown option {}; try --help", argument.display()));
            } else if file.is_none() {
                file = Some(PathBuf::from(argument));
            } else if question.is_none() {
                let text = argument.into_string();
                question = Some(text.map_err(|text| format!("the question {} is not UTF-8", text.display()))?);
            } else {
                return Err(format!(
                    "unexpected argument {}; a question of several words is quoted",
                    argument.display()
                ));
            }
        }
        let file = file.ok_or("no file given; try --help")?;
        Ok(Some(Self { file, question, threads }))
    }
}

fn run() -> Result<(), String> {
    let Some(arguments) = Arguments::parse(std::env::args_os().skip(1))? else {
        return say(&mut std::io::stdout(), HELP.trim_end());
    };
    let file = &arguments.file;
    let map = MappedFile::open(file).map_err(about(file))?;
    let image = Image::parse(&map).map_err(about(file))?;
    image.verify().map_err(about(file))?;
    let mut blocks = [Block::default(); Sizes::MAX_LAYERS];
    let model = Model::open(&image, &mut blocks).map_err(about(file))?;
    let cpu = Cpu::builder().threads(arguments.threads).build().map_err(|e| e.to_string())?;
    let mut asked = Asked { model: &model, cpu: &cpu, tokens: Vec::new(), reals: Vec::new(), ids: Vec::new() };
    let mut out = BufWriter::new(std::io::stdout().lock());
    match &arguments.question {
        Some(question) => say(&mut out, &asked.answer(question).map_err(|e| e.to_string())?),
        None => converse(&mut asked, &mut out),
    }
}

/// Puts the file in front of what is wrong with it.
fn about<E: Display>(file: &Path) -> impl Fn(E) -> String {
    move |problem| format!("{}: {problem}", file.display())
}

fn say(out: &mut impl Write, line: &str) -> Result<(), String> {
    match writeln!(out, "{line}").and_then(|()| out.flush()) {
        // Whoever reads us has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.map_err(|e| format!("standard output: {e}")),
    }
}

/// Answers lines of standard input until it ends.
fn converse(asked: &mut Asked<'_, '_, '_>, out: &mut impl Write) -> Result<(), String> {
    let terminal = std::io::stdin().is_terminal();
    let mut line = String::new();
    loop {
        if terminal {
            let _ = write!(std::io::stderr(), "? ");
        }
        line.clear();
        if std::io::stdin().lock().read_line(&mut line).map_err(|e| format!("standard input: {e}"))? == 0 {
            return Ok(());
        }
        let question = line.trim();
        if question.is_empty() {
            continue;
        }
        match asked.answer(question) {
            Ok(answer) => say(out, &answer)?,
            // A question too long is no reason to leave.
            Err(error @ (Error::TooLong { .. } | Error::Word { .. })) => {
                let _ = writeln!(std::io::stderr(), "{error}");
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// A model, and the memory that its answers take.
struct Asked<'m, 'b, 'a> {
    model: &'m Model<'b, 'a>,
    cpu: &'m Cpu,
    tokens: Vec<u32>,
    reals: Vec<f32>,
    ids: Vec<u32>,
}

impl Asked<'_, '_, '_> {
    fn answer(&mut self, question: &str) -> Result<String, Error> {
        let context = self.model.sizes().context;
        // A token has at most so many bytes; a longer text is too long however it is split.
        let longest = (0..).take(self.model.sizes().vocab).map(|t| self.model.tokenizer().token_text(t).len()).max();
        let most = context.saturating_mul(longest.unwrap_or(0));
        if question.len() > most {
            return Err(Error::TooLong { found: question.len() / longest.unwrap_or(1).max(1), limit: context });
        }
        self.tokens.resize(question.len() + 3, 0);
        let prompt = self.model.prompt(question, &mut self.tokens)?;
        let mut out = [0; LONGEST_ANSWER];
        let room = context.saturating_sub(prompt.len()).clamp(1, LONGEST_ANSWER);
        let req = self.model.scratch(self.cpu, prompt.len() + room);
        self.reals.resize(req.reals, 0.0);
        self.ids.resize(req.ids, 0);
        let scratch = Scratch { reals: &mut self.reals[..], ids: &mut self.ids[..] };
        let answer = self.model.answer(self.cpu, prompt, &mut out[..room], scratch)?;
        Ok(self.model.text(answer, &mut [0; LONGEST_TEXT]).to_owned())
    }
}
