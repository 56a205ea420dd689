//! BoxLite at work: one runtime, asked one thing after the other.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{TestHome, python, text};

/// A runtime that has the home until the value is dropped.
pub struct Session {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Starts BoxLite; it has the home's lock when this returns.
    pub fn start(home: &TestHome) -> Session {
        let mut child = Command::new(python())
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wheel.py"))
            .args([text(home.root()), "batch"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {}: {e}", python().display()));
        let output = child.stdout.take().expect("its output");
        let mut session = Session {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
        };
        session.begin();
        session
    }

    /// Has BoxLite's runtime begin. It fails at once while a mount that merges by itself has the lock, for
    /// some milliseconds; whoever starts a program then starts it again.
    fn begin(&mut self) {
        let deadline = Instant::now() + super::PATIENCE;
        while let Err(refusal) = self.ask(&["list"]) {
            let is_held = refusal.contains("Another BoxliteRuntime");
            assert!(is_held && Instant::now() < deadline, "BoxLite: {refusal}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has BoxLite do something; the error is its sentence.
    pub fn ask(&mut self, command: &[&str]) -> Result<Value, String> {
        let line = serde_json::to_string(command).expect("JSON") + "\n";
        let input = self.input.as_mut().expect("open until dropped");
        input.write_all(line.as_bytes()).expect("BoxLite listens");
        let mut line = String::new();
        // What BoxLite itself prints is not an answer.
        let answer: Value = loop {
            line.clear();
            let length = self.output.read_line(&mut line).expect("its output");
            assert!(length > 0, "BoxLite ended: {command:?}");
            if let Ok(answer) = serde_json::from_str(&line) {
                break answer;
            }
        };
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Likewise, what it may not refuse.
    pub fn must(&mut self, command: &[&str]) -> Value {
        self.ask(command)
            .unwrap_or_else(|refusal| panic!("BoxLite: {command:?}: {refusal}"))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The end of its input tells it to go; it may abort then, after its work is done.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}
