//! The log a user sees in the mount: one message for each thing that was done or failed.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::Result;
use crate::home::{Home, rfc3339_at};

/// Bytes of the log kept in memory and shown.
const SHOWN: usize = 256 * 1024;

/// The file is started anew, the old one kept as `log.1`, when it has grown to this many bytes.
const ROTATE: u64 = 1024 * 1024;

/// The log, in memory for the mount and in `.boxlitefs/log` for after a crash.
pub struct EventLog {
    inner: Mutex<Inner>,
}

struct Inner {
    shown: VecDeque<u8>,
    last: String,
    changed: SystemTime,
    path: Option<PathBuf>,
    file: Option<File>,
}

impl EventLog {
    /// Continues the home's log. Where it can't be written (read-only), it is kept in memory.
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

    /// Adds a message with the time. What an archive or a name put into it can't pass for another line,
    /// or give orders to a terminal.
    pub fn info(&self, message: &str) {
        self.add(log::Level::Info, message);
    }

    /// Adds one that says that something failed; the system's log has it as a warning.
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

    /// Adds a message, unless it is the last one already: whoever walks through what is damaged asks
    /// for it many times.
    pub fn info_once(&self, message: &str) {
        if self.inner.lock().last != printable(message) {
            self.info(message);
        }
    }

    /// Logs how an operation ended, as a warning if it failed. Returns its result.
    pub fn log_outcome<T>(&self, operation: &str, result: Result<T>) -> Result<T> {
        match &result {
            Ok(_) => self.info(operation),
            Err(error) => self.warn(&format!("{operation} failed: {error}")),
        }
        result
    }

    /// Bytes shown.
    pub fn len(&self) -> u64 {
        self.inner.lock().shown.len() as u64
    }

    /// Whether nothing was ever noted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the last message was added.
    pub fn changed_at(&self) -> SystemTime {
        self.inner.lock().changed
    }

    /// Up to `length` bytes from `offset`.
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

/// The log's file, for its owner alone: a message may tell what an archive is called.
fn open_to_append(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// The message with everything escaped that does not stand for itself: control characters (of which
/// line ends become blanks), and those that change the direction of what follows.
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

    fn append(&mut self, bytes: &[u8]) {
        self.shown.extend(bytes);
        while self.shown.len() > SHOWN {
            // Whole lines go, so that the first one shown can be read.
            while let Some(byte) = self.shown.pop_front() {
                if byte == b'\n' {
                    break;
                }
            }
        }
    }

    fn write_file(&mut self, line: &[u8]) {
        let (Some(path), Some(file)) = (&self.path, &mut self.file) else {
            return;
        };
        // A log that can't be written must not fail the operation it tells of.
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
