//! BoxLite asked for one thing after another, each in a process of its own.
//!
//! Loading BoxLite takes longer than most of what it is asked for. So it is loaded once, by a server
//! (`tests/wheel.py --serve`) that forks for each request; the fork has a runtime of its own and ends
//! with it, as a program of a user does.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Mutex;

use serde_json::{Value, json};

use super::python;

/// Servers that nobody asks at the moment. Each ends with its input, when this process does.
static IDLE: Mutex<Vec<Server>> = Mutex::new(Vec::new());

/// Has BoxLite do several things in one runtime; what it refused has an `error`.
///
/// # Panics
/// If it does not answer each of them: judged by its answers, not by its exit status, for it aborts
/// now and then at exit, after its work is done.
pub fn ask(home: &Path, commands: &[&[&str]]) -> Vec<Value> {
    let idle = IDLE.lock().expect("the idle servers").pop();
    let mut server = idle.unwrap_or_else(Server::start);
    let answers = server.ask(home, commands);
    IDLE.lock().expect("the idle servers").push(server);
    assert_eq!(
        answers.len(),
        commands.len(),
        "BoxLite: {commands:?}: it answered {answers:?}"
    );
    answers
}

struct Server {
    _child: Child,
    requests: ChildStdin,
    done: BufReader<ChildStdout>,
}

impl Server {
    fn start() -> Server {
        let mut child = Command::new(python())
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wheel.py"))
            .arg("--serve")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It would keep the test's open for a moment longer than the test.
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| {
                let python = python();
                panic!("cannot run {}: {e}; run `make setup`", python.display())
            });
        Server {
            requests: child.stdin.take().expect("its input"),
            done: BufReader::new(child.stdout.take().expect("its output")),
            _child: child,
        }
    }

    fn ask(&mut self, home: &Path, commands: &[&[&str]]) -> Vec<Value> {
        let answers = tempfile::NamedTempFile::new().expect("a temporary file");
        let request = json!({"home": home, "commands": commands, "answers": answers.path()});
        writeln!(self.requests, "{request}").expect("BoxLite listens");
        let mut line = String::new();
        self.done
            .read_line(&mut line)
            .expect("a line when it is done");
        assert!(
            !line.is_empty(),
            "BoxLite did not start; is the wheel in {}? `make setup` installs it",
            python().display()
        );
        let said = std::fs::read_to_string(answers.path()).expect("its answers");
        // What BoxLite itself prints is not an answer.
        let lines = said.lines().map(serde_json::from_str);
        lines.filter_map(Result::ok).collect()
    }
}
