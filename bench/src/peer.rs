//! The Python process that times PyTorch and FBGEMM.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use crate::error::BenchError;

/// Our script, which travels in this program.
const SCRIPT: &str = include_str!("../peers/cpu.py");

/// A running Python.
pub(crate) struct Peer {
    program: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts `python` if it has PyTorch; otherwise says why not.
    pub(crate) fn start(python: &Path) -> Result<(Self, String), String> {
        let program = python.display().to_string();
        let mut child = Command::new(python)
            .args(["-u", "-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("{program}: {e}"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{program}: no pipes"));
        };
        let mut peer = Self { program, child, input, output: BufReader::new(output) };
        let versions = peer
            .ask(&json!({"versions": true}))
            .map_err(|_| format!("{} has no PyTorch: pip install -r bench/peers/requirements.txt", peer.program))?;
        let name = |key: &str| versions[key].as_str().unwrap_or("not installed").to_owned();
        let text = format!("PyTorch {}, FBGEMM {}", name("torch"), name("fbgemm"));
        Ok((peer, text))
    }

    /// Gets ready for a case; gives why it cannot be run, if so.
    pub(crate) fn prepare(&mut self, case: &Value) -> Result<Option<String>, BenchError> {
        let answer = self.ask(&json!({ "prepare": case }))?;
        Ok(answer["unsupported"].as_str().map(str::to_owned))
    }

    /// Microseconds a call over so many.
    pub(crate) fn run(&mut self, calls: usize) -> Result<f64, BenchError> {
        let answer = self.ask(&json!({ "run": calls }))?;
        answer["us"].as_f64().ok_or_else(|| self.problem("no time in its answer"))
    }

    fn ask(&mut self, request: &Value) -> Result<Value, BenchError> {
        let mut line = String::new();
        let asked = writeln!(self.input, "{request}").and_then(|()| self.output.read_line(&mut line));
        match asked {
            Ok(0) => Err(self.problem("ended")),
            Ok(_) => serde_json::from_str(&line).map_err(|e| self.problem(&e.to_string())),
            Err(e) => Err(self.problem(&e.to_string())),
        }
    }

    fn problem(&self, problem: &str) -> BenchError {
        BenchError::Peer { program: self.program.clone(), problem: problem.to_owned() }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends by itself when its input does; nothing is lost if it has ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
