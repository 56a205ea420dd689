//! `boxlitefs status --watch`: keeps showing what a mount is doing.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::super::output::print;
use super::file;
use super::text::{describe, operation_line};
use crate::{Context, Result};

/// The time between two looks.
const LOOKS: Duration = Duration::from_millis(500);

/// The line of an operation whose total is known, and of one whose total is unknown.
const BAR: &str = "{msg}: {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
const COUNTER: &str = "{spinner} {msg}: {bytes}, {bytes_per_sec}";

/// Shows a mount until this process is interrupted or the mount is gone.
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
    shown: BTreeMap<(String, String), ProgressBar>,
}

impl View {
    fn show(&mut self, status: &Value) {
        let operations = status["operations"].as_array();
        let mut going_on = BTreeMap::new();
        for operation in operations.into_iter().flatten() {
            let field = |name: &str| operation[name].as_str().unwrap_or_default().to_owned();
            let key = (field("what"), field("since"));
            let bar = self
                .shown
                .remove(&key)
                .unwrap_or_else(|| self.begin(&key.0));
            let total = operation["total_bytes"].as_u64();
            if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                bar.set_length(total);
                style(&bar, BAR);
            }
            bar.set_position(operation["bytes"].as_u64().unwrap_or(0));
            bar.tick();
            going_on.insert(key, bar);
        }
        // Operations that are no longer listed have ended.
        for (_, bar) in std::mem::replace(&mut self.shown, going_on) {
            bar.finish_and_clear();
            self.bars.remove(&bar);
        }
    }

    fn begin(&self, what: &str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::no_length());
        style(&bar, COUNTER);
        bar.set_message(what.to_owned());
        bar
    }
}

fn style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
