//! Progress of long work: a bar on a terminal, plain lines elsewhere. It goes to standard error.

use core::time::Duration;
use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

/// How often the bar moves.
const BAR_EVERY: Duration = Duration::from_millis(100);

/// How often a line is printed where there is no terminal.
const LINES_EVERY: Duration = Duration::from_secs(10);

/// The progress of one piece of work.
pub(crate) struct Progress {
    name: String,
    bar: Option<ProgressBar>,
    last: Instant,
    start: Instant,
    length: u64,
}

impl Progress {
    /// Begins work of `length` steps.
    pub(crate) fn new(name: &str, length: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(length);
            // The template is a constant: if it were wrong, the plain bar would do.
            if let Ok(style) = ProgressStyle::with_template("{prefix:>12} {bar:32} {pos}/{len} {elapsed}<{eta} {msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(name.to_owned());
            bar
        });
        let now = Instant::now();
        Self { name: name.to_owned(), bar, last: now, start: now, length }
    }

    /// Says that `done` steps are done.
    pub(crate) fn at(&mut self, done: u64, message: impl FnOnce() -> String) {
        let due = |every: Duration| done == self.length || self.last.elapsed() > every;
        match &self.bar {
            Some(bar) if due(BAR_EVERY) => {
                bar.set_position(done);
                bar.set_message(message());
            }
            None if due(LINES_EVERY) => {
                let seconds = self.start.elapsed().as_secs();
                eprintln!("{}: {done}/{} after {seconds} s, {}", self.name, self.length, message());
            }
            _ => return,
        }
        self.last = Instant::now();
    }

    /// Ends the bar.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
