//! The golden files, on every backend and instruction set of this machine.

use std::path::Path;

use memlayer_tests::golden::{check_file, files_in};

#[test]
fn all_golden_files_agree() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let files = files_in(&folder).expect("the folder of golden files");
    assert!(files.len() >= 15, "only {} golden files in {}", files.len(), folder.display());
    let cpus = vec![];
    let mut bad = vec![];
    for file in files {
        for outcome in check_file(&file, &cpus).expect("a golden file") {
            let worst = outcome.worst().expect("tensors");
            println!(
                "{} {} {:?} {} {:.2e}",
                file.file_name().unwrap().to_string_lossy(),
                outcome.backend,
                outcome.indices_agree,
                worst.tensor,
                worst.error
            );
            if !outcome.ok() {
                bad.push((outcome.file, outcome.backend));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
