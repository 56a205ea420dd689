//! Processes of their own: what a box looks like, and what may be done to it, depends on who asks.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::Value;

use super::{Mounted, eventually, text};

/// Answers one expression after another; an error is its errno, or its text where it has none.
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

/// A process that does to files what it is told, expression by expression in Python, and lives on in
/// between, as a file manager does. `m` is the mountpoint with a slash.
///
/// Started by the test's process, it is that one's descendant: a test that uses several should leave
/// files alone itself.
pub struct Process {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Process {
    /// A process that knows where the mount is.
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

    /// The value of an expression that must not fail.
    pub fn does(&mut self, expression: &str) -> Value {
        let answer = self.answer(expression);
        assert!(answer.get("value").is_some(), "{expression}: {answer}");
        answer["value"].clone()
    }

    /// The errno of an expression that must fail.
    pub fn fails(&mut self, expression: &str) -> i32 {
        let answer = self.answer(expression);
        let number = answer["errno"].as_i64();
        let number = number.unwrap_or_else(|| panic!("{expression}: {answer}"));
        i32::try_from(number).expect("an errno")
    }

    /// The names it sees in a directory of the mount, sorted.
    pub fn names(&mut self, directory: &str) -> Vec<String> {
        let listing = self.does(&format!("sorted(os.listdir(m + {directory:?}))"));
        let names = listing.as_array().expect("names").iter();
        names
            .map(|name| name.as_str().expect("a name").to_owned())
            .collect()
    }

    /// Kills it, without a last word.
    pub fn kill(mut self) {
        self.child.kill().expect("its end");
        self.child.wait().expect("its status");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.orders.take());
        let _ = self.child.wait();
    }
}

/// What a command prints that does not descend from this process.
pub fn outsider(command: &str) -> String {
    let place = tempfile::tempdir().expect("a temporary directory");
    let (out, done) = (place.path().join("out"), place.path().join("done"));
    // The first shell ends before the command begins, which so becomes a child of init.
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
    eventually("the outsider is done", || done.exists());
    std::fs::read_to_string(&out).expect("what it printed")
}

/// How long a script may take before it counts as hanging.
const HANGING: &str = "120";

/// A shell script with some environment, not run yet; one that hangs fails.
pub fn script(text: &str, environment: &[(&str, &Path)]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args([HANGING, "bash", "-o", "pipefail", "-c", text])
        .envs(environment.iter().copied())
        .stdin(Stdio::null());
    command
}
