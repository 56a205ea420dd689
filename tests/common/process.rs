//! Client processes. What a box looks like and allows depends on the process that asks.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::{Mounted, eventually, text};

/// Evaluates one expression per line. Reports an error by its errno and its text.
const SERVE: &str = r#"
import concurrent.futures, json, os, shutil, subprocess, sys, threading
m = sys.argv[1] + "/"
for line in sys.stdin:
    try:
        print(json.dumps({"value": eval(line)}, default=str), flush=True)
    except Exception as error:
        number = getattr(error, "errno", None)
        print(json.dumps({"errno": number, "error": str(error)}), flush=True)
"#;

/// A long-lived process that works on files, like a file manager. It evaluates Python expressions
/// one by one; in them, `m` is the mountpoint with a trailing slash.
///
/// The process descends from the test's process. A test that uses several of them should not touch
/// files in the mount itself.
pub struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a process for a mount.
    pub fn start(mount: &Mounted) -> Process {
        let mut child = Command::new("python3")
            .args(["-c", SERVE, text(mount.root())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        Process {
            orders: child.stdin.take(),
            answers: BufReader::new(child.stdout.take().expect("its output")),
            child,
        }
    }

    fn answer(&mut self, expression: &str) -> Value {
        let orders = self.orders.as_mut().expect("its input");
        writeln!(orders, "{expression}").expect("an order");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{expression}: {line:?}: {e}"))
    }

    /// Returns the value of an expression that must succeed.
    pub fn does(&mut self, expression: &str) -> Value {
        let answer = self.answer(expression);
        assert!(answer.get("value").is_some(), "{expression}: {answer}");
        answer["value"].clone()
    }

    /// Returns the errno of an expression that must fail.
    pub fn fails(&mut self, expression: &str) -> i32 {
        let answer = self.answer(expression);
        let number = answer["errno"].as_i64();
        let number = number.unwrap_or_else(|| panic!("{expression}: {answer}"));
        i32::try_from(number).expect("an errno")
    }

    /// Lists the names that the process sees in a directory of the mount, sorted.
    pub fn names(&mut self, directory: &str) -> Vec<String> {
        let listing = self.does(&format!("sorted(os.listdir(m + {directory:?}))"));
        let names = listing.as_array().expect("names").iter();
        names
            .map(|name| name.as_str().expect("a name").to_owned())
            .collect()
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("cannot kill the process");
        self.child.wait().expect("its status");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process exits at the end of its input.
        drop(self.orders.take());
        let _ = self.child.wait();
    }
}

/// Runs a command that does not descend from this process; returns its output.
pub fn outsider(command: &str) -> String {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (out, done) = (place.path().join("out"), place.path().join("done"));
    // The first shell ends before the command starts, so the command becomes a child of init.
    let script = format!(
        "(while kill -0 $$ 2>/dev/null; do sleep 0.02; done; {command} > {0} 2>&1; touch {1}) &",
        text(&out),
        text(&done)
    );
    let status = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(status.expect("sh").success());
    eventually("the outsider has finished", || done.exists());
    std::fs::read_to_string(&out).expect("what it printed")
}

/// Seconds after which a script counts as hanging.
const HANGING: &str = "120";

/// Prepares a shell script with further environment variables. A hanging script fails.
pub fn script(text: &str, environment: &[(&str, &Path)]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args([HANGING, "bash", "-o", "pipefail", "-c", text])
        .envs(environment.iter().copied())
        .stdin(Stdio::null());
    command
}
