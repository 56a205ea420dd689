//! The log that a user sees in the mount: a message for each change that was made or failed.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::Result;
use crate::home::{Home, rfc3339_at};

/// Bytes of the log that are kept in memory and shown.
const SHOWN: usize = 256 * 1024;

/// Size in bytes at which the log file is renamed to `log.1` and a new one begun.
const ROTATE: u64 = 1024 * 1024;

/// The log: in memory for the mount, and in `.boxlitefs/log` to survive a crash.
pub struct EventLog {
    inner: Mutex<Inner>,
}

struct Inner {
    /// The end of the log, in whole lines.
    shown: VecDeque<u8>,
    /// The last message.
    last: String,
    /// When it was added.
    changed: SystemTime,
    /// The path of `file`.
    path: Option<PathBuf>,
    /// The log file, if it can be written.
    file: Option<File>,
}

impl EventLog {
    /// Opens the home's log and continues it. Keeps it in memory only if the file can't be written,
    /// as in a read-only mount.
    pub fn open(home: &Home, read_only: bool) -> EventLog {
        let path = home.staging_dir().join("log");
        let mut inner = Inner {
            shown: VecDeque::new(),
            last: String::new(),
            changed: SystemTime::now(),
            path: None,
            file: None,
        };
        inner.load(&path);
        if !read_only
            && home.make_staging_dir().is_ok()
            && let Ok(file) = open_to_append(&path)
            && home.give_to_owner(&path).is_ok()
        {
            inner.path = Some(path);
            inner.file = Some(file);
        }
        EventLog {
            inner: Mutex::new(inner),
        }
    }

    /// Adds a message with the time. Text from an archive or a name can neither begin another line
    /// nor control a terminal.
    pub fn info(&self, message: &str) {
        self.add(log::Level::Info, message);
    }

    /// Adds a message about a failure. The system log gets it as a warning.
    pub fn warn(&self, message: &str) {
        self.add(log::Level::Warn, message);
    }

    fn add(&self, level: log::Level, message: &str) {
        let message = printable(message);
        log::log!(level, "{message}");
        let now = SystemTime::now();
        let line = format!("{} {message}\n", rfc3339_at(now));
        let mut inner = self.inner.lock();
        inner.changed = now;
        inner.last = message;
        inner.append(line.as_bytes());
        inner.write_file(line.as_bytes());
    }

    /// Adds a message unless it is the last one: a program that walks through damaged files causes
    /// the same one many times.
    pub fn info_once(&self, message: &str) {
        if self.inner.lock().last != printable(message) {
            self.info(message);
        }
    }

    /// Logs the outcome of an operation, as a warning if it failed. Returns its result.
    pub fn log_outcome<T>(&self, operation: &str, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) => self.info(operation),
            Err(error) => self.warn(&format!("{operation} failed: {error}")),
        }
        result
    }

    /// Returns the bytes shown.
    pub fn len(&self) -> u64 {
        self.inner.lock().shown.len() as u64
    }

    /// Returns whether nothing is shown.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns when the last message was added.
    pub fn changed_at(&self) -> SystemTime {
        self.inner.lock().changed
    }

    /// Returns up to `length` of the bytes shown from `offset` on.
    pub fn read_at(&self, offset: u64, length: usize) -> Vec<u8> {
        let inner = self.inner.lock();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        inner
            .shown
            .iter()
            .skip(start)
            .take(length)
            .copied()
            .collect()
    }
}

/// Opens the log file. Only its owner may read it: a message may contain the name of an archive.
fn open_to_append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// Returns the message with line ends as blanks, and with other control characters and those that
/// change the direction of text escaped.
fn printable(message: &str) -> String {
    let mut text = String::with_capacity(message.len());
    for c in message.chars() {
        match c {
            '\n' | '\r' => text.push(' '),
            '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => text.extend(c.escape_unicode()),
            _ if c.is_control() => text.extend(c.escape_unicode()),
            _ => text.push(c),
        }
    }
    text
}

impl Inner {
    /// Reads the end of an existing log file.
    fn load(&mut self, path: &Path) {
        let Ok(mut file) = File::open(path) else {
            return;
        };
        let length = file.metadata().map_or(0, |meta| meta.len());
        let skip = length.saturating_sub(SHOWN as u64);
        let mut tail = Vec::new();
        if file.seek(SeekFrom::Start(skip)).is_ok()
            && file.take(SHOWN as u64).read_to_end(&mut tail).is_ok()
        {
            self.append(&tail);
        }
    }

    /// Adds bytes, and removes the oldest lines beyond [`SHOWN`].
    fn append(&mut self, bytes: &[u8]) {
        self.shown.extend(bytes);
        while self.shown.len() > SHOWN {
            // Removes whole lines, so that the first line shown is complete.
            while let Some(byte) = self.shown.pop_front() {
                if byte == b'\n' {
                    break;
                }
            }
        }
    }

    /// Writes a line to the log file, and starts a new file when that has grown to [`ROTATE`].
    fn write_file(&mut self, line: &[u8]) {
        let (Some(path), Some(file)) = (&self.path, &mut self.file) else {
            return;
        };
        // A log that can't be written must not fail the operation that it reports.
        if let Err(e) = file.write_all(line) {
            log::warn!("cannot write {}: {e}", path.display());
        }
        if file.metadata().is_ok_and(|meta| meta.len() > ROTATE)
            && fs::rename(path, path.with_extension("1")).is_ok()
            && let Ok(fresh) = open_to_append(path)
        {
            self.file = Some(fresh);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_can_neither_end_its_line_nor_control_a_terminal() {
        let hostile = "a\nb\r\u{1b}[2J\u{9b}1m\u{7}\u{7f}\u{202e}gpj.é 'x\\'";
        assert_eq!(
            printable(hostile),
            r"a b \u{1b}[2J\u{9b}1m\u{7}\u{7f}\u{202e}gpj.é 'x\'"
        );
    }
}
