//! Where log lines go: to standard error in the foreground, to the system's log in the background. What
//! the mount's own log says is among them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// What is logged unless RUST_LOG says otherwise. fuser calls it a failed unmount when somebody else
/// unmounted, which is how a mount normally ends, and an error when somebody was killed while he waited
/// for a reply.
const LOGGED: &str = "info,fuser=warn,fuser::mnt=error,fuser::reply=off";

/// Where the system takes log lines: systemd's journal, or a syslog.
const SYSTEM_LOG: &str = "/dev/log";

/// Facility of daemons, syslog(3).
const DAEMON: u8 = 3 << 3;

/// Has the lines written to standard error, as RUST_LOG says. Where that is systemd's journal, each begins
/// with its priority and has no time, which the journal has.
pub fn log_to_stderr() {
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(LOGGED));
    if is_journal() {
        builder.format(|out, record| {
            let text = record.args().to_string();
            writeln!(
                out,
                "<{}>{}",
                priority(record.level()),
                text.replace('\n', " ")
            )
        });
    }
    // Whoever asks twice has it.
    let _ = builder.try_init();
}

/// Has the lines sent to the system's log, where there is one.
pub(super) fn log_to_system() {
    let Ok(socket) = UnixDatagram::unbound() else {
        return;
    };
    // A full log must not keep a mount waiting.
    if socket.connect(SYSTEM_LOG).is_err() || socket.set_nonblocking(true).is_err() {
        return;
    }
    let pid = std::process::id();
    if log::set_boxed_logger(Box::new(SystemLog { socket, pid })).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Whether standard error is the stream to the journal that systemd made: device and inode are in
/// JOURNAL_STREAM.
fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map(File::from);
    let meta = stderr.and_then(|stderr| stderr.metadata());
    meta.is_ok_and(|meta| told == format!("{}:{}", meta.dev(), meta.ino()))
}

/// The priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The socket of the system's log.
struct SystemLog {
    socket: UnixDatagram,
    pid: u32,
}

impl Log for SystemLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // As LOGGED has it.
        let target = metadata.target();
        let most = match target {
            _ if target.starts_with("fuser::reply") => return false,
            _ if target.starts_with("fuser::mnt") => Level::Error,
            _ if target.starts_with("fuser") => Level::Warn,
            _ => Level::Info,
        };
        metadata.level() <= most
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // There is nobody else to tell.
            let _ = self.socket.send(line(record, self.pid).as_bytes());
        }
    }

    fn flush(&self) {}
}

/// `<30>boxlitefs[123]: sentence`.
fn line(record: &Record<'_>, pid: u32) -> String {
    let mut line = String::new();
    let priority = DAEMON | priority(record.level());
    let _ = write!(line, "<{priority}>boxlitefs[{pid}]: {}", record.args());
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_the_system_has_facility_and_priority_and_is_one_line() {
        let record = Record::builder()
            .level(Level::Warn)
            .args(format_args!("two\nlines"))
            .build();
        assert_eq!(line(&record, 7), "<28>boxlitefs[7]: two lines");
    }
}
