//! Where the program and its memory lie, and the images it is linked with: the model, and what the host made of it.

#[allow(dead_code, reason = "the bound is for the firmware")]
#[path = "../src/model.rs"]
mod model;
mod record;

use std::path::{Path, PathBuf};

type Done<T> = Result<T, Box<dyn core::error::Error>>;

/// The boards are QEMU's MPS2 with the FPGA images AN386 (Cortex-M4F) and AN505 (Cortex-M33). They have 4 MiB each; a
/// part of 2 MiB of flash and 128 KiB of memory is enough.
fn memory(target: &str) -> (&'static str, &'static str) {
    if target.starts_with("thumbv8m") { ("0x10000000", "0x38000000") } else { ("0x00000000", "0x20000000") }
}

fn main() -> Done<()> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let (flash, ram) = memory(&std::env::var("TARGET")?);
    std::fs::write(
        Path::join(&out, "memory.x"),
        format!("MEMORY {{\n  FLASH : ORIGIN = {flash}, LENGTH = 2M\n  RAM : ORIGIN = {ram}, LENGTH = 128K\n}}\n"),
    )?;
    println!("cargo:rustc-link-search={}", out.display());
    println!("cargo:rustc-link-arg-bins=-Tlink.x");
    println!("cargo:rustc-link-arg-bins=--nmagic");
    if std::env::var_os("CARGO_FEATURE_DEFMT").is_some() {
        println!("cargo:rustc-link-arg-bins=-Tdefmt.x");
    }
    println!("cargo:rerun-if-changed=build");
    println!("cargo:rerun-if-changed=src/model.rs");

    let model = record::model()?;
    let recorded = record::recorded(&model)?;
    std::fs::write(Path::join(&out, "model.image"), &model)?;
    std::fs::write(Path::join(&out, "recorded.image"), recorded)?;
    world(&out)
}

/// The packed language model of `MEMLAYER_MODEL`, or that of the tour, and its sizes as a constant.
fn world(out: &Path) -> Done<()> {
    println!("cargo:rerun-if-env-changed=MEMLAYER_MODEL");
    let path = std::env::var_os("MEMLAYER_MODEL").map_or_else(|| "../../data/world-int8.mem".into(), PathBuf::from);
    println!("cargo:rerun-if-changed={}", path.display());
    let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut aligned = vec![0u64; bytes.len().div_ceil(8)];
    let whole = bytes_of(&mut aligned, &bytes);
    let image = memlayer_quantize::Image::parse(whole).map_err(|e| format!("{}: {e}", path.display()))?;
    let sizes = memlayer_infer::Sizes::decode(image.bytes("model")?)?;
    std::fs::write(Path::join(out, "sizes.rs"), format!("{sizes:?}"))?;
    std::fs::write(Path::join(out, "world.image"), &bytes)?;
    Ok(())
}

/// `bytes`, laid where an image is read in place.
fn bytes_of<'a>(place: &'a mut [u64], bytes: &[u8]) -> &'a [u8] {
    let place: &mut [u8] = bytemuck::cast_slice_mut(place);
    place[..bytes.len()].copy_from_slice(bytes);
    &place[..bytes.len()]
}
