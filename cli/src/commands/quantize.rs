//! `quantize`: a trained model in one packed file.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use memlayer_core::element::Format;
use memlayer_lm::packed::pack;
use memlayer_lm::{LmError, train};
use serde::Serialize;

use crate::Context;
use crate::error::CliError;
use crate::recipe::share;

/// Packs the last checkpoint of a training.
#[derive(Debug, Args)]
pub(crate) struct Quantize {
    /// The folder of the training.
    #[arg(value_name = "FOLDER")]
    run: PathBuf,
    /// The file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// The format of sub-keys and values.
    #[arg(long, value_enum, default_value_t = Packed::Int8)]
    format: Packed,
}

/// Formats that models are packed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Packed {
    /// As trained.
    F32,
    /// 8-bit integers, a scale a row.
    Int8,
    /// 8-bit floats with 4 exponent bits, a scale a row.
    #[value(alias = "fp8")]
    E4m3,
    /// 8-bit floats with 5 exponent bits, a scale a row.
    E5m2,
}

impl From<Packed> for Format {
    fn from(format: Packed) -> Self {
        match format {
            Packed::F32 => Self::F32,
            Packed::Int8 => Self::Int8,
            Packed::E4m3 => Self::E4m3,
            Packed::E5m2 => Self::E5m2,
        }
    }
}

#[derive(Serialize)]
struct Written {
    file: String,
    format: &'static str,
    bytes: u64,
    sections: Vec<Lost>,
}

#[derive(Serialize)]
struct Lost {
    section: String,
    relative_rms: f64,
    worst_row: u64,
    worst_row_error: f64,
}

impl Quantize {
    pub(crate) fn run(&self, context: &Context) -> Result<(), CliError> {
        let cpu = share(context.cpu()?);
        let saved = train::latest(&self.run)?.ok_or_else(|| LmError::file(&self.run, "has no checkpoint"))?;
        let (model, tokenizer) = (saved.model(&cpu)?, saved.tokenizer()?);
        let format = Format::from(self.format);
        let packing = pack(&model, &tokenizer, format, &self.out)?;
        context.say(format_args!(
            "{}: {} bytes, sub-keys and values in {format}",
            self.out.display(),
            packing.bytes
        ))?;
        let mut sections = Vec::new();
        for (section, report) in packing.reports {
            context.say(format_args!(
                "  {section}: relative RMS error {:.2e}; the worst row, {}, is off by {:.2e}",
                report.relative_rms, report.worst_row, report.worst_row_error,
            ))?;
            sections.push(Lost {
                section,
                relative_rms: report.relative_rms,
                worst_row: u64::from(report.worst_row),
                worst_row_error: report.worst_row_error,
            });
        }
        let file = self.out.display().to_string();
        context.finish(&Written { file, format: format.name(), bytes: packing.bytes, sections })
    }
}
