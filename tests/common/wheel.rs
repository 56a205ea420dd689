//! Runs BoxLite commands in a separate process.
//!
//! Loading BoxLite takes longer than most commands. So a server (`tests/wheel.py --serve`) loads it
//! once for all tests and forks for each conversation. Each fork has its own runtime and ends with
//! it, like a user's program. A client that finds no server starts one; an idle server ends.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::{Value, json};

use super::python;

/// Runs several commands in one BoxLite runtime. The answer to a refused command has an `error`.
///
/// # Panics
/// If a command has no answer. The exit status is ignored: BoxLite sometimes aborts at exit, after
/// its work is done.
pub fn ask(home: &Path, commands: &[&[&str]]) -> Vec<Value> {
    let mut boxlite = Conversation::begin(home);
    for command in commands {
        boxlite.say(command);
    }
    boxlite.finish();
    let answers: Vec<Value> = std::iter::from_fn(|| boxlite.answer()).collect();
    assert_eq!(
        answers.len(),
        commands.len(),
        "BoxLite: {commands:?}: it answered {answers:?}"
    );
    answers
}

/// A BoxLite process. Dropping it waits until the process has ended.
pub struct Conversation {
    connection: BufReader<UnixStream>,
    /// None if the process had already ended.
    process: Option<OwnedFd>,
}

impl Conversation {
    /// Starts a process. Its runtime starts with the first command that needs one.
    pub fn begin(home: &Path) -> Conversation {
        loop {
            // An idle server may end just after we connected, before it forked.
            if let Ok(conversation) = Conversation::begin_with(connect(), home) {
                return conversation;
            }
        }
    }

    fn begin_with(mut server: UnixStream, home: &Path) -> io::Result<Conversation> {
        writeln!(server, "{}", json!({"home": home}))?;
        let mut connection = BufReader::new(server);
        let mut line = String::new();
        connection.read_line(&mut line)?;
        let said: Value = serde_json::from_str(&line)?;
        let process = said["pid"]
            .as_i64()
            .and_then(|pid| Pid::from_raw(pid as i32));
        let process = process.expect("the pid of BoxLite's process");
        Ok(Conversation {
            connection,
            process: pidfd_open(process, PidfdFlags::empty()).ok(),
        })
    }

    /// Sends a command.
    pub fn say(&mut self, command: &[&str]) {
        let line = serde_json::to_string(command).expect("JSON");
        writeln!(self.connection.get_mut(), "{line}").expect("BoxLite listens");
    }

    /// Ends the commands. The process exits after its last answer.
    pub fn finish(&mut self) {
        let _ = self.connection.get_mut().shutdown(Shutdown::Write);
    }

    /// Waits for the next answer; None if the process ends.
    pub fn answer(&mut self) -> Option<Value> {
        let lines = self.connection.by_ref().lines();
        // Skip lines that BoxLite itself prints.
        lines
            .map_while(Result::ok)
            .find_map(|line| serde_json::from_str(&line).ok())
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.finish();
        while self.answer().is_some() {}
        // The process holds the home's lock until it has exited, which is after its last answer.
        if let Some(process) = &self.process {
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            while poll(&mut polled, None) == Err(rustix::io::Errno::INTR) {}
        }
    }
}

/// Connects to the server; starts it if there is none.
fn connect() -> UnixStream {
    let socket = socket();
    if let Ok(connection) = UnixStream::connect(&socket) {
        return connection;
    }
    // One client starts the server; others wait.
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boxlite-server.lock");
    let lock = File::create(lock).expect("the lock of BoxLite's server");
    lock.lock().expect("the lock of BoxLite's server");
    if let Ok(connection) = UnixStream::connect(&socket) {
        return connection;
    }
    let _ = std::fs::remove_file(&socket);
    let started = Command::new(python())
        .arg(program())
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

/// Returns the socket of the server for this checkout and wheel (`BOXLITE_SERVER` of
/// `tests/wheel.py`). It lies in /tmp because the path of a socket must be short.
pub fn socket() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    let program = std::fs::read(program()).expect("tests/wheel.py");
    let cli = std::env::var_os("BOXLITE_CLI");
    (program, python(), cli, env!("CARGO_TARGET_TMPDIR")).hash(&mut hasher);
    let name = format!("boxlitefs-tests-{:016x}.sock", hasher.finish());
    Path::new("/tmp").join(name)
}

/// Returns the path of `tests/wheel.py`.
pub fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wheel.py")
}
