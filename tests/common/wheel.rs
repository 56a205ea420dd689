//! BoxLite asked for one thing after another, each in a process of its own.
//!
//! Loading BoxLite takes longer than most of what it is asked for. So it is loaded once for all tests, by a
//! server (`tests/wheel.py --serve`) that forks for each request; the fork has a runtime of its own and
//! ends with it, as a program of a user does. Who finds no server starts it; it ends by itself.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::python;

/// Has BoxLite do several things in one runtime; what it refused has an `error`.
///
/// # Panics
/// If it does not answer each of them: judged by its answers, not by its exit status, for it aborts
/// now and then at exit, after its work is done.
pub fn ask(home: &Path, commands: &[&[&str]]) -> Vec<Value> {
    let request = json!({"home": home, "commands": commands});
    let answers = loop {
        // A server may end just after it was found: then nothing was begun.
        if let Some(answers) = ask_server(connect(), &request).expect("BoxLite's answers") {
            break answers;
        }
    };
    assert_eq!(
        answers.len(),
        commands.len(),
        "BoxLite: {commands:?}: it answered {answers:?}"
    );
    answers
}

/// None if the server had ended before it took the request.
fn ask_server(mut server: UnixStream, request: &Value) -> io::Result<Option<Vec<Value>>> {
    if writeln!(server, "{request}").is_err() {
        return Ok(None);
    }
    let mut answers = Vec::new();
    for line in BufReader::new(server).lines() {
        match line {
            // What BoxLite itself prints is not an answer.
            Ok(line) => answers.extend(serde_json::from_str::<Value>(&line)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && answers.is_empty() => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(answers))
}

/// A connection to the server, which is started if it isn't there.
fn connect() -> UnixStream {
    let socket = socket();
    if let Ok(connection) = UnixStream::connect(&socket) {
        return connection;
    }
    // One starts it, others wait.
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boxlite-server.lock");
    let lock = File::create(lock).expect("the lock of BoxLite's server");
    lock.lock().expect("the lock of BoxLite's server");
    if let Ok(connection) = UnixStream::connect(&socket) {
        return connection;
    }
    let _ = std::fs::remove_file(&socket);
    let started = Command::new(python())
        .arg(server_program())
        .arg("--serve")
        .arg(&socket)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(
        started.is_ok_and(|status| status.success()),
        "BoxLite did not start; is the wheel in {}? `make setup` installs it",
        python().display()
    );
    UnixStream::connect(&socket).expect("BoxLite's server, which just started")
}

/// Where the server of this checkout, with this wheel, listens: `BOXLITE_SERVER` of `tests/wheel.py`. The path
/// of a socket is short, that of a checkout may be long.
pub fn socket() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    let program = std::fs::read(server_program()).expect("tests/wheel.py");
    (program, python(), env!("CARGO_TARGET_TMPDIR")).hash(&mut hasher);
    let name = format!("boxlitefs-tests-{:016x}.sock", hasher.finish());
    Path::new("/tmp").join(name)
}

fn server_program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wheel.py")
}
