//! `boxlitefs status`: what `.boxlite/status` says, for people.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use boxlitefs::{Context, Error, Result, mount};
use indicatif::{BinaryBytes, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::StatusArguments;

/// How long each of several mounts may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often a live view looks.
const LOOKS: Duration = Duration::from_millis(500);

/// Of an operation whose end is known, and of one of which only what was done is.
const BAR: &str = "{msg}: {bar:30} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
const COUNTER: &str = "{spinner} {msg}: {bytes}, {bytes_per_sec}";

/// Prints it.
///
/// # Errors
/// EINVAL when nothing is mounted there, EIO when what is there does not answer as boxlitefs does.
pub fn run(arguments: &StatusArguments) -> Result<()> {
    let show = |place: &PathBuf| match arguments.json {
        true => out(&text(place)?),
        false => out(&described(&status(place)?)),
    };
    if let Some(place) = &arguments.mountpoint {
        return match arguments.watch {
            true => watch(place),
            false => show(place),
        };
    }
    let places = mount::mountpoints()?;
    match &*places {
        [] => {
            let message = "boxlitefs is mounted nowhere: `boxlitefs mount DIRECTORY` mounts it";
            Err(Error::new(libc::ENOENT, message))
        }
        [place] if arguments.watch => watch(place),
        _ if arguments.watch => Err(Error::new(
            libc::EINVAL,
            "there are several mounts: name the one to watch",
        )),
        _ => {
            // Some may be other users', stopped, or gone meanwhile; only if all are, that is the answer.
            let show = |place: &PathBuf| {
                let text = asked(place)?;
                out(&match arguments.json {
                    true => text,
                    false => described(&parsed(place, &text)?),
                })
            };
            let (shown, failed): (Vec<_>, Vec<_>) =
                places.iter().map(show).partition(Result::is_ok);
            let hidden = failed.into_iter().filter_map(Result::err);
            match shown.is_empty() {
                true => hidden.last().map_or(Ok(()), Err),
                false => {
                    hidden.for_each(|error| eprintln!("boxlitefs: {error}"));
                    Ok(())
                }
            }
        }
    }
}

fn out(text: &str) -> Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever read it has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context(|| "cannot write to standard output"),
    }
}

fn text(place: &Path) -> Result<String> {
    let shown = place.display();
    fs::read_to_string(file(place)).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(
            libc::EINVAL,
            format!(
                "boxlitefs is not mounted on {shown}: `findmnt -t fuse.boxlite` lists its mounts"
            ),
        ),
        ErrorKind::PermissionDenied => Error::io(
            format!("the mount on {shown} is another user's, who alone may look into it"),
            error,
        ),
        _ => Error::io(format!("the mount on {shown} does not answer"), error),
    })
}

/// The same, from a process of its own that is left behind when no answer comes: whoever waits for a mount
/// whose process is stopped can't be ended, nor can its process.
fn asked(place: &Path) -> Result<String> {
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
            match output.status.success() {
                true => Ok(text(&output.stdout)),
                false => Err(Error::new(
                    libc::EIO,
                    text(&output.stderr)
                        .trim()
                        .trim_start_matches("boxlitefs: "),
                )),
            }
        }
        Err(_) => Err(Error::new(
            libc::ETIMEDOUT,
            format!("the mount on {shown} does not answer: is the process that serves it stopped?"),
        )),
    }
}

fn file(place: &Path) -> PathBuf {
    place.join(".boxlite/status")
}

fn status(place: &Path) -> Result<Value> {
    parsed(place, &text(place)?)
}

fn parsed(place: &Path, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|error| {
        let shown = place.display();
        Error::damaged(format!("the status of {shown} is no JSON: {error}"))
    })
}

// ---- once ---------------------------------------------------------------------------------------

fn described(status: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let mut text = format!("{}\n", word(&status["mountpoint"]));
    let mut line = |name: &str, value: String| text += &format!("  {name:<10} {value}\n");
    let boxes = match status["boxes"].as_u64() {
        Some(1) => "1 box".to_owned(),
        Some(count) => format!("{count} boxes"),
        None => "its rows can't be read".to_owned(),
    };
    line("home", format!("{}, {boxes}", word(&status["home"])));
    if let Some(why) = status["changes"].as_str() {
        line("read only", why.to_owned());
    }
    line("options", options(&status["options"]));
    let (version, pid) = (word(&status["version"]), &status["pid"]);
    line(
        "serves",
        format!(
            "boxlitefs {version}, process {pid}, since {}",
            word(&status["since"])
        ),
    );
    let operations = status["operations"].as_array();
    for operation in operations.into_iter().flatten() {
        line("running", running(operation));
    }
    if operations.is_none_or(Vec::is_empty) {
        line("running", "nothing".to_owned());
    }
    let cache = &status["cache"];
    line(
        "cache",
        format!(
            "{} of {} in {} compressed archives, {} of sizes and checksums",
            bytes(&cache["bytes"]),
            bytes(&cache["limit_bytes"]),
            cache["archives"],
            bytes(&cache["remembered_bytes"])
        ),
    );
    let memory = &status["memory"];
    let (resident, peak) = (
        bytes(&memory["resident_bytes"]),
        bytes(&memory["peak_bytes"]),
    );
    line("memory", format!("{resident}, at most {peak}"));
    text
}

/// As `-o` takes them.
fn options(options: &Value) -> String {
    let mut all = Vec::new();
    for (name, value) in options.as_object().into_iter().flatten() {
        match value {
            Value::Bool(true) => all.push(name.clone()),
            Value::Bool(false) => {}
            Value::Null if name == "max_import" => {}
            Value::Null => all.push(format!("{name}=off")),
            Value::Number(size) if matches!(name.as_str(), "cache" | "max_import") => {
                let size = BinaryBytes(size.as_u64().unwrap_or(0)).to_string();
                all.push(format!("{name}={}", size.replace(' ', "")));
            }
            Value::String(text) => all.push(format!("{name}={text}")),
            other => all.push(format!("{name}={other}")),
        }
    }
    all.join(",")
}

/// `export of box web: 512.00 MiB of 2.00 GiB, 25 %`.
fn running(operation: &Value) -> String {
    let what = operation["what"].as_str().unwrap_or("something");
    let done = bytes(&operation["bytes"]);
    match operation["percent"].as_f64() {
        Some(percent) => {
            let total = bytes(&operation["total_bytes"]);
            format!("{what}: {done} of {total}, {percent} %")
        }
        None => format!("{what}: {done}"),
    }
}

fn bytes(value: &Value) -> String {
    match value.as_u64() {
        Some(bytes) => BinaryBytes(bytes).to_string(),
        None => "?".to_owned(),
    }
}

// ---- live ---------------------------------------------------------------------------------------

/// Goes on until it is interrupted or the mount is gone.
fn watch(place: &Path) -> Result<()> {
    let is_terminal = io::stderr().is_terminal();
    let first = status(place)?;
    out(&described(&first))?;
    let mut view = View {
        bars: MultiProgress::new(),
        shown: BTreeMap::new(),
    };
    let mut last = String::new();
    loop {
        std::thread::sleep(LOOKS);
        let Ok(status) = status(place) else {
            view.bars
                .clear()
                .context(|| "cannot write to the terminal")?;
            return out(&format!("{} is not mounted any more\n", place.display()));
        };
        if is_terminal {
            view.show(&status);
        } else {
            let operations = status["operations"].as_array();
            let lines: String = operations
                .into_iter()
                .flatten()
                .map(|operation| running(operation) + "\n")
                .collect();
            if lines != last {
                out(&lines)?;
                last = lines;
            }
        }
    }
}

/// A bar for each operation.
struct View {
    bars: MultiProgress,
    /// By what it is and when it began.
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
        // What is left is over.
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options_are_shown_as_they_are_given() {
        let shown = options(&json!({
            "ro": true, "allow_other": false, "compress": 3, "cache": 4_294_967_296_u64,
            "compact": null, "max_import": null, "import": "untrusted"
        }));
        assert_eq!(
            shown,
            "ro,compress=3,cache=4.00GiB,compact=off,import=untrusted"
        );
        let bounded = options(&json!({"max_import": 2_147_483_648_u64}));
        assert_eq!(bounded, "max_import=2.00GiB");
    }

    #[test]
    fn an_operation_is_told_of_with_its_end_where_that_is_known() {
        let half = json!({"what": "export of box web", "bytes": 1024, "total_bytes": 2048, "percent": 50.0});
        assert_eq!(
            running(&half),
            "export of box web: 1.00 KiB of 2.00 KiB, 50 %"
        );
        let open =
            json!({"what": "import of a", "bytes": 1024, "total_bytes": null, "percent": null});
        assert_eq!(running(&open), "import of a: 1.00 KiB");
    }
}
