//! Reads `.boxlite/status` of a mount.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;

use crate::{Context, Error, Result};

/// How long to wait for the answer of each of several mounts.
const PATIENCE: Duration = Duration::from_secs(3);

/// Reads the status as text. Waits as long as the mount takes to answer.
///
/// # Errors
/// EINVAL when nothing is mounted there, EACCES when it is another user's mount.
pub(super) fn read_text(place: &Path) -> Result<String> {
    let shown = place.display();
    fs::read_to_string(place.join(".boxlite/status")).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(
            libc::EINVAL,
            format!(
                "boxlitefs is not mounted on {shown}: `findmnt -t fuse.boxlite` lists its mounts"
            ),
        ),
        ErrorKind::PermissionDenied => Error::io(
            format!("the mount on {shown} belongs to another user, and only that user may read it"),
            error,
        ),
        _ => Error::io(format!("the mount on {shown} does not answer"), error),
    })
}

/// Reads the status in a process of its own, which is left behind if no answer comes: a thread that
/// waits for a mount whose process is stopped can't be ended, nor can its process.
///
/// # Errors
/// ETIMEDOUT when no answer comes, else EIO with the message of that process.
pub(super) fn ask(place: &Path) -> Result<String> {
    let shown = place.display();
    let message = || format!("cannot ask the mount on {shown}");
    let asking = Command::new(std::env::current_exe().context(message)?)
        .args(["status", "--json", "--"])
        .arg(place)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(message)?;
    let (sender, answer) = mpsc::channel();
    std::thread::spawn(move || sender.send(asking.wait_with_output()));
    match answer.recv_timeout(PATIENCE) {
        Ok(output) => {
            let output = output.context(message)?;
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            if output.status.success() {
                Ok(text(&output.stdout))
            } else {
                let message = text(&output.stderr);
                let message = message.trim().trim_start_matches("boxlitefs: ");
                Err(Error::new(libc::EIO, message))
            }
        }
        Err(_) => Err(Error::new(
            libc::ETIMEDOUT,
            format!("the mount on {shown} does not answer: is the process that serves it stopped?"),
        )),
    }
}

/// Reads the status.
///
/// # Errors
/// Those of [`read_text`] and [`parse`].
pub(super) fn read(place: &Path) -> Result<Value> {
    parse(place, &read_text(place)?)
}

/// Parses a status.
///
/// # Errors
/// EIO when it is not JSON.
pub(super) fn parse(place: &Path, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| {
        let shown = place.display();
        Error::damaged(format!("the status of {shown} is not JSON: {error}"))
    })
}
