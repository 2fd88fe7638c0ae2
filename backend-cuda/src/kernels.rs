//! The kernel files: compiled for the device found, and kept on disk.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use memlayer_core::element::{Element, Format};
use memlayer_core::random::mix;

use crate::error::CudaError;
use crate::launch::{Kernel, Module, Stream, compile, compiler_version};

const COMMON: &str = include_str!("../kernels/common.cuh");
const SUMS: &str = include_str!("../kernels/sums.cuh");
const CHOOSE: &str = include_str!("../kernels/choose.cuh");

/// A kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum File {
    Bag,
    Plan,
    Optim,
    Select,
    Tiles,
    Dense,
    Cache,
}

impl File {
    const fn name(self) -> &'static str {
        match self {
            Self::Bag => "bag.cu",
            Self::Plan => "plan.cu",
            Self::Optim => "optim.cu",
            Self::Select => "select.cu",
            Self::Tiles => "tiles.cu",
            Self::Dense => "dense.cu",
            Self::Cache => "cache.cu",
        }
    }
    /// What is compiled, piece by piece.
    const fn pieces(self) -> [&'static str; 3] {
        match self {
            Self::Bag => [COMMON, "", include_str!("../kernels/bag.cu")],
            Self::Plan => [COMMON, SUMS, include_str!("../kernels/plan.cu")],
            Self::Optim => [COMMON, SUMS, include_str!("../kernels/optim.cu")],
            Self::Select => [COMMON, CHOOSE, include_str!("../kernels/select.cu")],
            Self::Tiles => [COMMON, CHOOSE, include_str!("../kernels/tiles.cu")],
            Self::Dense => [COMMON, "", include_str!("../kernels/dense.cu")],
            Self::Cache => [COMMON, "", include_str!("../kernels/cache.cu")],
        }
    }
}

/// A kernel file as it is compiled for a format of rows, a row rule and a format of gradients' sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) file: File,
    pub(crate) format: u32,
    pub(crate) rule: u32,
    pub(crate) source: u32,
}

impl Variant {
    pub(crate) const fn of(file: File) -> Self {
        Self { file, format: 0, rule: 0, source: 0 }
    }
    pub(crate) const fn format(self, format: u32) -> Self {
        Self { format, ..self }
    }
    pub(crate) const fn rule(self, rule: u32) -> Self {
        Self { rule, ..self }
    }
    pub(crate) const fn source(self, source: u32) -> Self {
        Self { source, ..self }
    }
    /// Bytes of a code of its format.
    pub(crate) const fn code_bytes(self) -> usize {
        match self.format {
            0 => 4,
            1 | 2 => 2,
            _ => 1,
        }
    }
}

/// The number of a format in `common.cuh`, if rows of it can be read: its codes must be what the kernels take them for.
pub(crate) fn format<E: Element>(op: &'static str) -> Result<u32, CudaError> {
    // Bytes of a code, and codes of 64 values.
    let (number, size, codes) = match E::FORMAT {
        Format::F32 => (0, 4, 64),
        Format::F16 => (1, 2, 64),
        Format::Bf16 => (2, 2, 64),
        Format::Int8 => (3, 1, 64),
        Format::E4m3 => (4, 1, 64),
        Format::E5m2 => (5, 1, 64),
        Format::Int4 => (6, 1, 36),
        Format::Int4x64 => (7, 1, 34),
        _ => return Err(CudaError::Unsupported { op, what: "the format of the rows" }),
    };
    if size_of::<E>() != size || E::codes(64) != codes {
        return Err(CudaError::Unsupported { op, what: "the layout of the rows" });
    }
    Ok(number)
}

/// The number of a format that rows are trained in.
pub(crate) fn trained_format<E: Element>(op: &'static str) -> Result<u32, CudaError> {
    match E::FORMAT {
        Format::F32 | Format::Bf16 => format::<E>(op),
        _ => Err(CudaError::Unsupported { op, what: "training in rows other than f32 and bf16" }),
    }
}

/// The values of a group of a format that keeps a scale among its codes.
pub(crate) const fn packed_group(format: Format) -> Option<usize> {
    match format {
        Format::Int4 => Some(32),
        Format::Int4x64 => Some(64),
        _ => None,
    }
}

/// The kernels of a device, compiled when they are first asked for.
pub(crate) struct Kernels {
    stream: Stream,
    arch: String,
    compiler: (i32, i32),
    cache: Option<PathBuf>,
    modules: Mutex<HashMap<Variant, Arc<Module>>>,
    found: Mutex<HashMap<(Variant, &'static str), Kernel>>,
}

impl Kernels {
    pub(crate) fn new(stream: &Stream, capability: (i32, i32), cache: Option<PathBuf>) -> Result<Self, CudaError> {
        // Hopper's own instructions are in no other's set.
        let (major, minor) = capability;
        let own = if capability == (9, 0) { "a" } else { "" };
        Ok(Self {
            stream: stream.clone(),
            arch: format!("sm_{major}{minor}{own}"),
            compiler: compiler_version()?,
            cache,
            modules: Mutex::default(),
            found: Mutex::default(),
        })
    }

    /// A kernel by its file and name.
    pub(crate) fn get(&self, variant: Variant, name: &'static str) -> Result<Kernel, CudaError> {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = found.get(&(variant, name)) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel::find(&self.module(variant)?, name)?;
        found.insert((variant, name), kernel.clone());
        Ok(kernel)
    }

    fn module(&self, variant: Variant) -> Result<Arc<Module>, CudaError> {
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(&variant) {
            return Ok(module.clone());
        }
        let source = variant.file.pieces().concat();
        let options = [
            format!("--gpu-architecture={}", self.arch),
            "--std=c++17".to_owned(),
            // Bodies of generic lambdas are the device's too.
            "--device-as-default-execution-space".to_owned(),
            // The law of vertical sums: products and sums that are written apart stay apart.
            "--fmad=false".to_owned(),
            "--prec-div=true".to_owned(),
            "--prec-sqrt=true".to_owned(),
            "--ftz=false".to_owned(),
            format!("-DELEM={}", variant.format),
            format!("-DRULE={}", variant.rule),
            format!("-DSOURCE={}", variant.source),
        ];
        let place = self.cache.as_deref().map(|folder| self.place(folder, variant.file, &source, &options));
        // A file that cannot be read, was cut off, or that the driver refuses is made again.
        let kept = place.as_deref().and_then(read_kept).and_then(|image| Module::load(&self.stream, &image).ok());
        let module = match kept {
            Some(module) => module,
            None => {
                let image = compile(variant.file.name(), &source, &options)?;
                let module = Module::load(&self.stream, &image)?;
                if let Some(place) = &place {
                    // A cache that cannot be written costs time, not correctness.
                    let _ = keep(place, &image);
                }
                module
            }
        };
        let module = Arc::new(module);
        modules.insert(variant, module.clone());
        Ok(module)
    }

    /// Where a compiled file is kept: by a hash of everything it was made from.
    fn place(&self, folder: &Path, file: File, source: &str, options: &[String]) -> PathBuf {
        let (major, minor) = self.compiler;
        let all = format!("{major}.{minor}\n{}\n{source}", options.join("\n"));
        folder.join(format!("{}-{:016x}{:016x}.cubin", file.name(), hash(1, all.as_bytes()), hash(2, all.as_bytes())))
    }
}

fn hash(seed: u64, bytes: &[u8]) -> u64 {
    let fold = |hash, chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix(hash ^ u64::from_le_bytes(word))
    };
    bytes.chunks(8).fold(mix(seed ^ bytes.len() as u64), fold)
}

/// A kept image, if the checksum at its end is right.
fn read_kept(place: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(place).ok()?;
    let at = bytes.len().checked_sub(8)?;
    let sum: [u8; 8] = bytes[at..].try_into().ok()?;
    bytes.truncate(at);
    (hash(0, &bytes) == u64::from_le_bytes(sum)).then_some(bytes)
}

/// Writes under another name and renames, so that no process sees half a file.
fn keep(place: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = place.with_extension(format!("{}.tmp", std::process::id()));
    let bytes = [image, &hash(0, image).to_le_bytes()].concat();
    fs::write(&temporary, bytes)?;
    fs::rename(&temporary, place).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_file_is_read_back_and_a_damaged_one_is_not() {
        let folder = std::env::temp_dir().join(format!("memlayer-cuda-{}", std::process::id()));
        let place = folder.join("a.cubin");
        keep(&place, b"some image").expect("a file");
        assert_eq!(read_kept(&place).as_deref(), Some(&b"some image"[..]));
        let mut bytes = fs::read(&place).expect("a file");
        bytes[3] ^= 1;
        fs::write(&place, &bytes).expect("a file");
        assert_eq!(read_kept(&place), None, "a flipped bit");
        fs::write(&place, &bytes[..5]).expect("a file");
        assert_eq!(read_kept(&place), None, "a cut file");
        fs::remove_dir_all(folder).expect("the folder");
    }
}
