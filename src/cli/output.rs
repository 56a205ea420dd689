//! Prints results and progress, and reports the end to the shell.

use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::store::compact;
use crate::{Context, Result};

/// Prints a text to standard output.
///
/// # Errors
/// Those of writing, except that a closed pipe is no error.
pub(super) fn print(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // The reader has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context(|| "cannot write to standard output"),
    }
}

/// Returns rows as lines, with columns as wide as their widest text.
pub(super) fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| {
        let lengths = rows.iter().map(|row| row[column].chars().count());
        lengths.max().unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let lines = rows.iter().map(|row| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(text, width)| format!("{text:width$}  "))
            .collect();
        line.trim_end().to_owned() + "\n"
    });
    lines.collect()
}

/// Standard output, with a spinner on a terminal while nothing is found.
pub(super) struct Findings {
    bar: ProgressBar,
}

impl Findings {
    /// Shows the spinner, if standard error is a terminal.
    pub fn begin(home: &Path) -> Findings {
        if !io::stderr().is_terminal() {
            return Findings {
                bar: ProgressBar::hidden(),
            };
        }
        let bar = ProgressBar::new_spinner();
        bar.set_message(format!("checking {}", home.display()));
        bar.enable_steady_tick(Duration::from_millis(100));
        Findings { bar }
    }

    /// Removes the spinner.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

impl Write for Findings {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bar.suspend(|| io::stdout().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// A progress bar, on a terminal.
pub(super) struct Bar(ProgressBar);

impl Bar {
    /// Makes a bar that is hidden until it begins.
    pub fn new() -> Bar {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        let style = "{msg}: {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Bar(bar)
    }
}

impl compact::Meter for Bar {
    fn begin(&self, what: &str, bytes: u64) {
        if io::stderr().is_terminal() {
            self.0.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.0.reset();
        self.0.set_length(bytes);
        self.0.set_message(what.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// Turns the result of a command into its exit status; prints an error.
pub(super) fn done(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(error, 1),
    }
}

/// Prints an error as one line, whatever line breaks its cause has; returns the exit status.
pub(super) fn failed(error: impl Display, status: u8) -> ExitCode {
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    eprintln!("boxlitefs: {}", lines.join("; "));
    ExitCode::from(status)
}
