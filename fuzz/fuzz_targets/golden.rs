//! Any bytes as a safetensors file of a layer, of row rules, of number formats or of reads: checked or refused,
//! never believed.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use memlayer_fuzz::cpus;
use memlayer_tests::golden::{GoldenFile, check};

fuzz_target!(|bytes: &[u8]| {
    let file = match GoldenFile::new(Path::new("fuzzed"), bytes.to_vec()) {
        Ok(file) => file,
        Err(error) => return assert!(error.to_string().starts_with("fuzzed: ")),
    };
    match check(&file, &cpus()[..1]) {
        Ok(outcomes) => {
            for outcome in outcomes {
                let _ = (outcome.ok(), outcome.worst());
            }
        }
        Err(error) => assert!(error.to_string().starts_with("fuzzed: ")),
    }
});
