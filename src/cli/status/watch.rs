//! `boxlitefs status --watch`: keeps showing what a mount is doing.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use super::super::output::print;
use super::file;
use super::text::{describe, operation_line};
use crate::{Context, Result};

/// The time between two looks.
const LOOKS: Duration = Duration::from_millis(500);

/// The line of an operation whose total is known, and of one whose total is unknown.
const BAR: &str = "{msg}: {bar:30} {bytes}/{total_bytes}{prefix}";
const COUNTER: &str = "{spinner} {msg}: {bytes}{prefix}";

/// Shows a mount until this process is interrupted, the mount is gone, or nobody reads what is shown.
///
/// # Errors
/// Those of reading the status for the first time, and of writing.
pub(super) fn watch(place: &Path) -> Result<()> {
    let is_terminal = io::stderr().is_terminal();
    let first = file::read(place)?;
    print(&describe(&first))?;
    let mut view = View {
        bars: MultiProgress::new(),
        shown: BTreeMap::new(),
    };
    let mut last = String::new();
    loop {
        std::thread::sleep(LOOKS);
        if output_is_closed() {
            return Ok(());
        }
        let Ok(status) = file::read(place) else {
            view.bars
                .clear()
                .context(|| "cannot write to the terminal")?;
            return print(&format!("{} is no longer mounted\n", place.display()));
        };
        if is_terminal {
            view.show(&status);
        } else {
            let operations = status["operations"].as_array();
            let lines: String = operations
                .into_iter()
                .flatten()
                .map(|operation| operation_line(operation) + "\n")
                .collect();
            if lines != last {
                print(&lines)?;
                last = lines;
            }
        }
    }
}

/// A bar for each operation.
struct View {
    bars: MultiProgress,
    /// By the name of the operation and when it began.
    shown: BTreeMap<(String, String), Shown>,
}

/// The bar of an operation, and how far that was when it was seen first: its rate counts from then.
struct Shown {
    bar: ProgressBar,
    first: (Instant, u64),
}

impl View {
    fn show(&mut self, status: &Value) {
        let operations = status["operations"].as_array();
        let mut going_on = BTreeMap::new();
        for operation in operations.into_iter().flatten() {
            let field = |name: &str| operation[name].as_str().unwrap_or_default().to_owned();
            let key = (field("what"), field("since"));
            let bytes = operation["bytes"].as_u64().unwrap_or(0);
            let shown = self.shown.remove(&key).unwrap_or_else(|| Shown {
                bar: self.begin(&key.0),
                first: (Instant::now(), bytes),
            });
            let bar = &shown.bar;
            let total = operation["total_bytes"].as_u64();
            if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                bar.set_length(total);
                style(bar, BAR);
            }
            let (since, before) = shown.first;
            let copied = bytes.saturating_sub(before);
            let left = total.map(|total| total.saturating_sub(bytes));
            bar.set_prefix(rate(copied, since.elapsed(), left));
            bar.set_position(bytes);
            bar.tick();
            going_on.insert(key, shown);
        }
        // Operations that are no longer listed have ended.
        for (_, shown) in std::mem::replace(&mut self.shown, going_on) {
            shown.bar.finish_and_clear();
            self.bars.remove(&shown.bar);
        }
    }

    fn begin(&self, what: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::no_length());
        style(&bar, COUNTER);
        bar.set_message(what.to_owned());
        bar
    }
}

/// Says how fast bytes are copied, and how long the rest will take; nothing before any were.
fn rate(copied: u64, within: Duration, left: Option<u64>) -> String {
    let per_second = copied as f64 / within.as_secs_f64();
    if copied == 0 || !per_second.is_finite() {
        return String::new();
    }
    let rate = format!(", {}/s", BinaryBytes(per_second as u64));
    match left {
        Some(left) => {
            let seconds = Duration::from_secs_f64(left as f64 / per_second);
            format!("{rate}, {} left", HumanDuration(seconds))
        }
        None => rate,
    }
}

/// Returns whether standard output is a pipe that nobody reads any more.
fn output_is_closed() -> bool {
    let output = io::stdout();
    let mut polled = [PollFd::new(&output, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
}

fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_counts_what_was_copied_since_the_first_look() {
        let second = Duration::from_secs(1);
        assert_eq!(rate(0, second, Some(5)), "");
        assert_eq!(rate(5, Duration::ZERO, None), "");
        assert_eq!(rate(2 << 20, 2 * second, None), ", 1.00 MiB/s");
        assert_eq!(
            rate(2 << 20, 2 * second, Some(3 << 20)),
            ", 1.00 MiB/s, 3 seconds left"
        );
    }
}
