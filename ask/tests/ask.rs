//! The program from outside: answers, and what it says of bad input.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const WORLD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../data/world-int8.mem");

fn ask(arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_memlayer-ask"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program");
    // A program that ends without reading closes its end.
    let _ = child.stdin.take().expect("a pipe").write_all(input);
    child.wait_with_output().expect("an end")
}

#[track_caller]
fn refused(arguments: &[&str], named: &str) {
    let output = ask(arguments, b"");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert!(error.starts_with("error: ") && error.contains(named), "{arguments:?}: {error}");
    assert!(output.stdout.is_empty());
}

#[test]
fn questions_are_answered() {
    let output = ask(&[WORLD, "What is the capital of France?"], b"");
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"Paris\n"[..]));
    let lines = b"What is the capital of France?\n\n  What is the capital of Japan?  \n";
    let output = ask(&["--threads", "2", WORLD], lines);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"Paris\nTokyo\n"[..]));
}

#[test]
fn a_question_too_long_is_no_reason_to_leave() {
    let input = format!("{}\n{}\nWhat is the capital of France?\n", "a ".repeat(5000), "a".repeat(1 << 20));
    let output = ask(&[WORLD], input.as_bytes());
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"Paris\n"[..]));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 2);
    refused(&[WORLD, &"a ".repeat(5000)], "exceeds the 128 this model reads");
}

#[test]
fn bad_input_is_named() {
    refused(&[], "no file");
    refused(&["--what"], "--what");
    refused(&["--threads", "0", WORLD, "a"], "1..=1024");
    refused(&[WORLD, "What", "is"], "is");
    refused(&["/nowhere/model.mem", "a"], "/nowhere/model.mem");
    refused(&[concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), "a"], "Cargo.toml");
    assert_eq!(ask(&["--help"], b"").status.code(), Some(0));
}

#[test]
fn damaged_files_are_named() {
    let good = std::fs::read(WORLD).expect("a model");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.mem");
    let place = path.to_str().expect("a path");
    for (at, flip) in [(0, 1), (9, 1), (good.len() / 2, 4), (good.len() - 9, 16), (70, 1)] {
        let mut bad = good.clone();
        bad[at] ^= flip;
        std::fs::write(&path, bad).expect("a file");
        refused(&[place, "a"], "bad.mem");
    }
    for len in [0, 63, 100, good.len() - 1] {
        std::fs::write(&path, &good[..len]).expect("a file");
        refused(&[place, "a"], "bad.mem");
    }
    // Cargo's files lie here too: what is no file at all.
    refused(&[Path::new(place).parent().and_then(Path::to_str).expect("a folder"), "a"], "error");
}
