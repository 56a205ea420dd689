//! BoxLite asked for one thing after another, in a process of its own.
//!
//! Loading BoxLite takes longer than most of what it is asked for. So it is loaded once for all tests, by a
//! server (`tests/wheel.py --serve`) that forks for each conversation; the fork has a runtime of its own and
//! ends with it, as a program of a user does. Who finds no server starts it; it ends by itself.

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

/// Has BoxLite do several things in one runtime; what it refused has an `error`.
///
/// # Panics
/// If it does not answer each of them: judged by its answers, not by its exit status, for it aborts
/// now and then at exit, after its work is done.
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

/// BoxLite in a process of its own. Dropped, that has ended.
pub struct Conversation {
    connection: BufReader<UnixStream>,
    /// None if it has ended already.
    process: Option<OwnedFd>,
}

impl Conversation {
    /// Its runtime starts with the first command that needs one.
    pub fn begin(home: &Path) -> Conversation {
        loop {
            // A server may end just after it was found: then nothing was begun.
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

    /// Has it do something.
    pub fn say(&mut self, command: &[&str]) {
        let line = serde_json::to_string(command).expect("JSON");
        writeln!(self.connection.get_mut(), "{line}").expect("BoxLite listens");
    }

    /// There is no more to do: it ends when it has answered.
    pub fn finish(&mut self) {
        let _ = self.connection.get_mut().shutdown(Shutdown::Write);
    }

    /// What it answers next; None if it ends.
    pub fn answer(&mut self) -> Option<Value> {
        let lines = self.connection.by_ref().lines();
        // What BoxLite itself prints is not an answer.
        lines
            .map_while(Result::ok)
            .find_map(|line| serde_json::from_str(&line).ok())
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.finish();
        while self.answer().is_some() {}
        // It has the home's lock until it is gone, which is after the last that it says.
        if let Some(process) = &self.process {
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            while poll(&mut polled, None) == Err(rustix::io::Errno::INTR) {}
        }
    }
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

/// Where the server of this checkout, with this wheel, listens: `BOXLITE_SERVER` of `tests/wheel.py`. The path
/// of a socket is short, that of a checkout may be long.
pub fn socket() -> PathBuf {
    let mut hasher = DefaultHasher::new();
    let program = std::fs::read(program()).expect("tests/wheel.py");
    (program, python(), env!("CARGO_TARGET_TMPDIR")).hash(&mut hasher);
    let name = format!("boxlitefs-tests-{:016x}.sock", hasher.finish());
    Path::new("/tmp").join(name)
}

/// `tests/wheel.py`.
pub fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wheel.py")
}
