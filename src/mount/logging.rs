//! Sends log lines to standard error in the foreground, to the system's log in the background. The
//! messages of the mount's own log are among them.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use env_logger::{Target, WriteStyle};
use log::{Level, LevelFilter, Log, Metadata, Record};
use parking_lot::Mutex;

/// What is logged unless RUST_LOG says otherwise. fuser reports an error when a process was killed
/// while it waited for a reply.
const LOGGED: &str = "info,fuser=warn,fuser::reply=off";

/// The socket of the system's log: systemd's journal, or a syslog.
const SYSTEM_LOG: &str = "/dev/log";

/// The facility of daemons, syslog(3).
const DAEMON: u8 = 3 << 3;

/// How many lines may wait for standard error.
const WAITING: usize = 1024;

/// How long writing the last lines may take.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Logs to standard error, as RUST_LOG says. No thread of the mount waits for the output: a stopped
/// terminal, or a pipe that nobody reads, would block the whole mount. In systemd's journal each
/// line begins with its priority and has no time, since the journal adds that.
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
    if io::stderr().is_terminal() {
        builder.write_style(WriteStyle::Always);
    }
    let (lines, waiting) = bounded(WAITING);
    let queue = LINES.get_or_init(|| LineQueue {
        lines,
        waiting: Mutex::new(Some(waiting)),
    });
    let lines = queue.lines.clone();
    builder.target(Target::Pipe(Box::new(QueueWriter { lines, lost: 0 })));
    // A second call changes nothing.
    let _ = builder.try_init();
}

/// An item of the queue, in order.
enum Line {
    Text(Vec<u8>),
    /// Reports that all lines before it were written.
    Told(Sender<()>),
}

/// Lines on their way to standard error.
struct LineQueue {
    lines: Sender<Line>,
    /// The other end of the queue, until the thread that writes takes it.
    waiting: Mutex<Option<Receiver<Line>>>,
}

/// The queue of this process, once it has a logger.
static LINES: OnceLock<LineQueue> = OnceLock::new();

/// Starts the thread that writes log lines, those already queued included. Call it after signals
/// are blocked: otherwise this thread would receive them.
pub(super) fn begin_to_write() {
    let Some(waiting) = LINES.get().and_then(|queue| queue.waiting.lock().take()) else {
        return;
    };
    // Without that thread, lines are lost.
    let _ = std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write_lines(&waiting, io::stderr()));
}

fn write_lines(waiting: &Receiver<Line>, mut out: impl Write) {
    for line in waiting {
        // There is no other place to report a failure.
        let _ = match line {
            Line::Text(text) => out.write_all(&text),
            Line::Told(told) => {
                let _ = told.send(());
                out.flush()
            }
        };
    }
}

/// Waits until the lines so far are written, for [`LAST_LINES`] at most.
pub(super) fn write_last_lines() {
    begin_to_write();
    if let Some(queue) = LINES.get() {
        let (told, written) = bounded(1);
        if queue
            .lines
            .send_timeout(Line::Told(told), LAST_LINES)
            .is_ok()
        {
            let _ = written.recv_timeout(LAST_LINES);
        }
    }
}

/// Queues lines for the thread that writes them. Lines that find the queue full are counted and
/// lost.
struct QueueWriter {
    lines: Sender<Line>,
    lost: u64,
}

impl Write for QueueWriter {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.lost > 0 {
            let lost = format!("{} lines of the log were lost here\n", self.lost);
            if self.lines.try_send(Line::Text(lost.into_bytes())).is_ok() {
                self.lost = 0;
            }
        }
        if self.lines.try_send(Line::Text(text.to_vec())).is_err() {
            self.lost += 1;
        }
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Logs to the system's log, where there is one.
pub(super) fn log_to_system() {
    let Ok(socket) = UnixDatagram::unbound() else {
        return;
    };
    // A full log must not block a mount.
    if socket.connect(SYSTEM_LOG).is_err() || socket.set_nonblocking(true).is_err() {
        return;
    }
    let pid = std::process::id();
    if log::set_boxed_logger(Box::new(SystemLog { socket, pid })).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Whether standard error is the stream to the journal that systemd made: JOURNAL_STREAM has its
/// device and inode.
fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = std::io::stderr()
        .as_fd()
        .try_clone_to_owned()
        .map(File::from);
    let meta = stderr.and_then(|stderr| stderr.metadata());
    meta.is_ok_and(|meta| told == format!("{}:{}", meta.dev(), meta.ino()))
}

/// Returns the priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A logger that sends to the system's log.
struct SystemLog {
    socket: UnixDatagram,
    pid: u32,
}

impl Log for SystemLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The same filter as LOGGED.
        let target = metadata.target();
        let most = match target {
            _ if target.starts_with("fuser::reply") => return false,
            _ if target.starts_with("fuser") => Level::Warn,
            _ => Level::Info,
        };
        metadata.level() <= most
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // There is no other place to report a failure.
            let _ = self.socket.send(line(record, self.pid).as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Formats a line, as `<30>boxlitefs[123]: message`.
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
    fn lines_that_nobody_takes_are_counted_and_nobody_waits() {
        let (lines, waiting) = bounded(3);
        let mut writer = QueueWriter { lines, lost: 0 };
        for n in 0..10 {
            writer.write_all(format!("{n}\n").as_bytes()).unwrap();
        }
        let mut written = Vec::new();
        let texts: Vec<Line> = waiting.try_iter().collect();
        writer.write_all(b"later\n").unwrap();
        drop(writer);
        let (all, again) = bounded(10);
        texts
            .into_iter()
            .chain(waiting)
            .for_each(|line| all.send(line).unwrap());
        drop(all);
        write_lines(&again, &mut written);
        let written = String::from_utf8(written).unwrap();
        assert_eq!(
            written,
            "0\n1\n2\n7 lines of the log were lost here\nlater\n"
        );
    }

    #[test]
    fn a_line_for_the_system_has_facility_and_priority_and_is_one_line() {
        let record = Record::builder()
            .level(Level::Warn)
            .args(format_args!("two\nlines"))
            .build();
        assert_eq!(line(&record, 7), "<28>boxlitefs[7]: two lines");
    }
}
