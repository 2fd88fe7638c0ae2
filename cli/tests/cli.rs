//! The program from outside: exit codes, messages, and what is left behind.

use std::path::Path;
use std::process::{Command, Output, Stdio};

fn memlayer(arguments: &[&str]) -> Output {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    Command::new(env!("CARGO_BIN_EXE_memlayer")).args(arguments).current_dir(folder).output().expect("the program")
}

/// Runs it, expects exit code 2 and `message` on standard error.
fn refused(arguments: &[&str], message: &str) {
    let output = memlayer(arguments);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
    assert!(error.contains(message), "{arguments:?} says {error}, not {message}");
}

/// A model of a few facts that trains in a moment.
const TINY: [&str; 10] =
    ["--steps", "60", "--batch", "16", "--dim", "16", "--sub-keys", "16", "--checkpoint-every", "10"];

fn facts(folder: &Path) -> String {
    let path = folder.join("facts.jsonl");
    let line =
        |i: usize| format!("{{\"question\": \"Where is thing {i}?\", \"answer\": [\"place {}\"]}}\n", i * 37 % 101);
    std::fs::write(&path, (0..40).map(line).collect::<String>()).expect("a file");
    path.display().to_string()
}

fn last_line(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.lines().last().expect("a line")).expect("JSON")
}

#[test]
fn what_makes_no_sense_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let out = folder.path().join("run").display().to_string();
    let train = ["train", "--out", &out];
    let with = |more: &[&'static str]| [&train[..], more].concat();
    refused(&["ask", "no/such/model", "why?"], "no/such/model: ");
    refused(
        &["ask", &path("text", "no image, but long enough to have a header of sixty-four bytes and more"), "?"],
        "text: ",
    );
    refused(&["check", "no/such/file"], "no/such/file: ");
    refused(&["check", &path("a.safetensors", "junk")], "a.safetensors: is no safetensors file");
    refused(&["eval", &folder.path().display().to_string()], "has no checkpoint");
    refused(&["tour", "--data", "no/such/folder"], "countries.tsv: ");
    refused(&[&train[..], &["--jsonl", &path("bad.jsonl", "{\"question\": 1}")]].concat(), "bad.jsonl:1: ");
    refused(&[&train[..], &["--jsonl", &path("empty.jsonl", "")]].concat(), "has no facts");
    refused(&with(&["--sub-keys", "70000"]), "sub_keys 70000");
    refused(&with(&["--top-k", "500"]), "top_k 500 exceeds sub_keys 128");
    refused(&with(&["--dim", "0"]), "dim 0");
    refused(&with(&["--heads", "5"]), "heads 5");
    refused(&with(&["--steps", "0"]), "0 steps");
    refused(&with(&["--cache-rows", "10"]), "cache_rows 10 on a CPU");
    refused(&with(&["--facts", "0"]), "0 facts");
    refused(&with(&["--vocab", "3"]), "vocab 3");
    refused(&with(&["--lr", "-1"]), "-1");
    refused(&with(&["--threads", "0"]), "threads");
    refused(&["dance"], "dance");
}

#[test]
fn check_finds_a_changed_number() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/layer_plus.safetensors");
    let good = memlayer(&["check", "--json", &golden.display().to_string()]);
    let report = last_line(&good);
    assert!(report["files"].as_array().expect("files").iter().all(|row| row["ok"] == true));

    let folder = tempfile::tempdir().expect("a folder");
    let changed = folder.path().join("changed.safetensors");
    let mut bytes = std::fs::read(golden).expect("the file");
    // The last tensor's last number: its sign.
    *bytes.last_mut().expect("bytes") ^= 0x80;
    std::fs::write(&changed, &bytes).expect("a file");
    assert_eq!(memlayer(&["check", &changed.display().to_string()]).status.code(), Some(1));
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&changed, &bytes).expect("a file");
    refused(&["check", &changed.display().to_string()], "changed.safetensors: ");
}

#[test]
fn a_killed_training_ends_with_the_same_losses() {
    let folder = tempfile::tempdir().expect("a folder");
    let facts = facts(folder.path());
    let name = |name: &str| folder.path().join(name).display().to_string();
    let arguments = |run: &str| {
        let mut all: Vec<String> = ["train", "--out", &name(run), "--jsonl", &facts].map(str::to_owned).to_vec();
        all.extend(TINY.map(str::to_owned));
        all.extend(["--losses".to_owned(), name(&format!("{run}.losses"))]);
        all
    };
    let run = |arguments: &[String]| memlayer(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(run(&arguments("whole")).status.success());
    for _ in 0..3 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_memlayer"))
            .args(arguments("broken"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program");
        // Killed once it has made a checkpoint more, or when it is done.
        let before = std::fs::read_dir(name("broken")).map_or(0, Iterator::count);
        for _ in 0..400 {
            std::thread::sleep(core::time::Duration::from_millis(5));
            let now = std::fs::read_dir(name("broken")).map_or(0, Iterator::count);
            if now > before + 1 || child.try_wait().expect("the program").is_some() {
                break;
            }
        }
        child.kill().expect("a kill");
        child.wait().expect("the program");
    }
    assert!(run(&arguments("broken")).status.success());
    // A step made twice has given the same loss twice.
    let losses = |run: &str| {
        let text = std::fs::read_to_string(name(&format!("{run}.losses"))).expect("losses");
        text.lines().map(str::to_owned).collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(losses("whole").len(), 60);
    assert_eq!(losses("broken"), losses("whole"));
}

#[test]
fn the_way_from_facts_to_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let facts = facts(folder.path());
    let name = |name: &str| folder.path().join(name).display().to_string();
    let (run, packed) = (name("run"), name("packed.mem"));
    let train = [&["train", "--json", "--out", &run, "--jsonl", &facts], &TINY[..]].concat();
    assert_eq!(last_line(&memlayer(&train))["steps"], 60);
    assert_eq!(last_line(&memlayer(&train))["resumed_at"], 60);
    let written = last_line(&memlayer(&["quantize", "--json", &run, "--out", &packed, "--format", "fp8"]));
    assert_eq!(written["format"], "e4m3");
    let eval = last_line(&memlayer(&["eval", "--json", &packed, "--jsonl", &facts]));
    assert_eq!((&eval["same_data"], &eval["held_out"]), (&true.into(), &false.into()));
    let question = ["ask", "--json", "--explain", &packed, "Where is thing 3?", "--jsonl", &facts];
    assert!(!last_line(&memlayer(&question))["slots"].as_array().expect("slots").is_empty());
    let picture = name("slots.svg");
    let inspect = last_line(&memlayer(&["inspect", "--json", &packed, "--jsonl", &facts, "--plot", &picture]));
    assert!(inspect["health"]["counted"]["used_percent"].as_f64().expect("a number") > 0.0);
    assert!(std::fs::read_to_string(&picture).expect("a picture").contains("<svg"));
    // What is no file is not replaced.
    refused(&["quantize", &run, "--out", &folder.path().display().to_string()], "no regular file");
    let report = last_line(&memlayer(&["eval", "--json", &run, "--jsonl", &facts, "--normalization", "trivia"]));
    assert_eq!(report["format"], "f32");
}
