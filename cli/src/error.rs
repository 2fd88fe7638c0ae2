//! What the program reports and ends on.

use std::path::PathBuf;

/// An error that ends the program with exit code 2.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// Arguments that make no sense together, or no sense with the files they name.
    #[error("{0}")]
    Usage(String),
    /// The model, its data or its training.
    #[error(transparent)]
    Lm(#[from] memlayer_lm::LmError),
    /// The CPU backend.
    #[error(transparent)]
    Cpu(#[from] memlayer_cpu::CpuError),
    /// A golden file.
    #[error(transparent)]
    Golden(#[from] memlayer_tests::golden::GoldenError),
    /// A picture.
    #[error("{}: {problem}", path.display())]
    Plot { path: PathBuf, problem: String },
    /// The output.
    #[error("standard output: {0}")]
    Output(std::io::Error),
    /// Nobody listens any more: no error to speak of.
    #[error("")]
    Quiet,
}
