//! The golden files, on every backend and instruction set of this machine.

use std::path::Path;

use memlayer_cpu::{Cpu, Isa};
use memlayer_tests::golden::{check_file, files_in};

#[test]
fn all_golden_files_agree() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let files = files_in(&folder).expect("the folder of golden files");
    assert!(files.len() >= 15, "only {} golden files in {}", files.len(), folder.display());
    let cpus: Vec<Cpu> = Isa::available().map(|isa| Cpu::builder().isa(isa).build().expect("a backend")).collect();
    let mut bad = vec![];
    for file in files {
        for outcome in check_file(&file, &cpus).expect("a golden file") {
            assert!(!outcome.tensors.is_empty(), "{} compares nothing", file.display());
            if !outcome.ok() {
                bad.push(outcome);
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
