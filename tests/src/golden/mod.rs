//! Golden files: safetensors computed in float64 by an independent implementation.
//!
//! A file of a layer holds input, parameters (by the names of the published implementation), the slots selected, the
//! output, a gradient of the output, and with it the gradients of the input and of every parameter. Other files hold
//! tables after steps of row rules, number formats, and the health of a list of reads. `tests/golden/README.md` has
//! the layouts.

mod file;
mod formats;
mod health;
mod layer;
mod optim;

use std::path::{Path, PathBuf};

pub use file::{GoldenError, GoldenFile};
use memlayer_core::Reference;
use memlayer_cpu::Cpu;

use crate::conformance::Subject;

/// The bound of the relative error (L2 norm of the difference over that of the golden tensor) in `f64`: the files
/// hold `f32`.
pub const BOUND_F64: f64 = 2e-6;
/// The bound of the relative error in `f32`.
pub const BOUND_F32: f64 = 1e-5;

/// What a backend made of a file.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The file.
    pub file: PathBuf,
    /// The backend and the instruction set.
    pub backend: String,
    /// Every tensor compared.
    pub tensors: Vec<Compared>,
    /// Whether every slot was selected in its place; `None` if the file selects none.
    pub indices_agree: Option<bool>,
}

/// A tensor compared.
#[derive(Clone, Debug)]
pub struct Compared {
    /// Its name.
    pub tensor: String,
    /// The error: relative L2 norm of the difference, or the number of elements that differ where they must not.
    pub error: f64,
    /// What the error may be.
    pub bound: f64,
}

impl Compared {
    /// Whether the error is in its bound; NaN is not.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.error <= self.bound
    }
}

impl Outcome {
    /// Whether every tensor is in its bound and every index agrees.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.tensors.iter().all(Compared::ok) && self.indices_agree != Some(false)
    }

    /// The tensor that comes nearest to its bound, or farthest beyond it.
    #[must_use]
    pub fn worst(&self) -> Option<&Compared> {
        let badness = |c: &Compared| if c.bound > 0.0 { c.error / c.bound } else { c.error * 1e9 };
        self.tensors.iter().max_by(|a, b| {
            // NaN compares as the worst there is.
            let (a, b) = (badness(a), badness(b));
            a.is_nan().cmp(&b.is_nan()).then(a.partial_cmp(&b).unwrap_or(core::cmp::Ordering::Equal))
        })
    }
}

/// Runs a golden file on the reference in `f64` and `f32` and on every one of `cpus`.
///
/// # Errors
/// [`GoldenError`] if the file cannot be read or is none of the golden formats; it names the file and the tensor.
pub fn check_file(path: &Path, cpus: &[Cpu]) -> Result<Vec<Outcome>, GoldenError> {
    check(&GoldenFile::open(path)?, cpus)
}

/// As [`check_file`], of a file that is open.
///
/// # Errors
/// [`GoldenError`] if it is none of the golden formats; it names the file and the tensor.
pub fn check(file: &GoldenFile, cpus: &[Cpu]) -> Result<Vec<Outcome>, GoldenError> {
    let outcome = |backend: &str, tensors, indices_agree| Outcome {
        file: file.path().to_owned(),
        backend: backend.to_owned(),
        tensors,
        indices_agree,
    };
    let mut outcomes = Vec::new();
    if file.has("grad_output") {
        let layer = layer::LayerFile::read(file)?;
        let mut push = |name: &str, (tensors, agree)| outcomes.push(outcome(name, tensors, Some(agree)));
        push("reference f64", layer.run(&Reference::<f64>::new(), BOUND_F64)?);
        push("reference f32", layer.run(&Reference::<f32>::new(), BOUND_F32)?);
        for cpu in cpus {
            push(memlayer_core::Host::name(cpu), layer.run(cpu, BOUND_F32)?);
        }
    } else if file.has("step0.rows") {
        let optim = optim::OptimFile::read(file)?;
        outcomes.push(outcome("reference f64", optim.run(&Reference::<f64>::new(), BOUND_F64)?, None));
        outcomes.push(outcome("reference f32", optim.run(&Reference::<f32>::new(), BOUND_F32)?, None));
        for cpu in cpus {
            outcomes.push(outcome(memlayer_core::Host::name(cpu), optim.run(cpu, BOUND_F32)?, None));
        }
    } else if file.has("fbgemm_byte_rowwise") {
        outcomes.push(outcome("quantize", formats::check(file)?, None));
    } else if file.has("counted") {
        outcomes.push(outcome("core", health::check(file)?, None));
    } else {
        return Err(file.error(file::Problem::NotGolden));
    }
    Ok(outcomes)
}

/// Runs a golden file on one device, if it is of a layer or of row rules.
///
/// # Errors
/// As [`check_file`].
pub fn check_on<D>(path: &Path, device: &D) -> Result<Option<Outcome>, GoldenError>
where
    D: Subject<Error: core::error::Error + Send + Sync + 'static>,
{
    let file = GoldenFile::open(path)?;
    let (tensors, indices_agree) = if file.has("grad_output") {
        let (tensors, agree) = layer::LayerFile::read(&file)?.run(device, BOUND_F32)?;
        (tensors, Some(agree))
    } else if file.has("step0.rows") {
        (optim::OptimFile::read(&file)?.run(device, BOUND_F32)?, None)
    } else {
        return Ok(None);
    };
    Ok(Some(Outcome { file: path.to_owned(), backend: device.label(), tensors, indices_agree }))
}

/// The golden files in `path`: itself, or those of a folder, by name.
///
/// # Errors
/// [`GoldenError`] if the folder cannot be read.
pub fn files_in(path: &Path) -> Result<Vec<PathBuf>, GoldenError> {
    let fail = |e| GoldenError::new(path, file::Problem::Read(e));
    if !std::fs::metadata(path).map_err(fail)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The relative error of `found`: the L2 norm of the difference over that of `expected`, or over 1 if that is zero.
/// NaN if the lengths differ.
#[must_use]
pub fn relative_error(expected: &[f64], found: &[f64]) -> f64 {
    if expected.len() != found.len() {
        return f64::NAN;
    }
    let difference: f64 = expected.iter().zip(found).map(|(e, f)| (e - f) * (e - f)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    difference.sqrt() / if norm > 0.0 { norm.sqrt() } else { 1.0 }
}
