//! `boxlitefs undo`: lists what can be had back in a mount.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use indicatif::BinaryBytes;
use serde_json::Value;

use super::output::print;
use crate::{Context, Error, Result};

/// An entry, as a line of the table shows it.
struct Line {
    name: String,
    what: String,
    until: String,
    /// Bytes on disk that go with the entry.
    own: u64,
}

/// Prints what can be had back in the mount at `mountpoint`, oldest first.
///
/// # Errors
/// EINVAL when no boxlitefs is mounted there; those of reading the entries.
pub(super) fn run(mountpoint: &Path) -> Result<()> {
    let undo = mountpoint.join(".boxlite/undo");
    let names = fs::read_dir(&undo).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(
            libc::EINVAL,
            format!(
                "boxlitefs is not mounted on {}: `findmnt -t fuse.boxlite` lists its mounts",
                mountpoint.display()
            ),
        ),
        _ => Error::io(format!("cannot list {}", undo.display()), error),
    })?;
    let mut lines = Vec::new();
    for entry in names {
        let entry = entry.context(|| format!("cannot list {}", undo.display()))?;
        // It may be gone since it was listed.
        if let Ok(line) = line_of(&entry.path()) {
            lines.push(line);
        }
    }
    print(&table(&undo, &lines))
}

fn line_of(dir: &Path) -> Result<Line> {
    let read = |name: &str| -> Result<Value> {
        let path = dir.join(name);
        let text = fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::damaged(format!("{} is not JSON", path.display())).caused_by(e))
    };
    let (why, of) = (read("why.json")?, read("box.json")?);
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let name = dir.file_name().unwrap_or_default();
    Ok(Line {
        name: name.to_string_lossy().into_owned(),
        what: text(&why["what"]),
        until: text(&why["until"]),
        own: of["space"]["own_bytes"].as_u64().unwrap_or(0),
    })
}

fn table(undo: &Path, lines: &[Line]) -> String {
    if lines.is_empty() {
        return format!("{}: nothing can be had back\n", undo.display());
    }
    let width = |of: &dyn Fn(&Line) -> usize| lines.iter().map(of).max().unwrap_or(0);
    let name = width(&|line| line.name.chars().count());
    let mut text = format!(
        "{:<name$}  {:<20}  {:>10}  before the\n",
        "name", "until", "space"
    );
    for line in lines {
        let space = BinaryBytes(line.own).to_string();
        text += &format!(
            "{:<name$}  {:<20}  {space:>10}  {}\n",
            line.name, line.until, line.what
        );
    }
    text + "mv NAME back to where it was, or cp -r it; rm -r ends keeping it\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_what_is_in_them() {
        let line = |name: &str, own| Line {
            name: name.to_owned(),
            what: "removal of box web".to_owned(),
            until: "2026-11-30T15:04:05Z".to_owned(),
            own,
        };
        let lines = [
            line("20261129T150405Z-web", 3 << 20),
            line("20261129T150406Z-a-longer-name", 0),
        ];
        let text = table(Path::new("/mnt/.boxlite/undo"), &lines);
        let mut rows = text.lines();
        let head = rows.next().unwrap();
        let at = head.find("until").unwrap();
        for row in rows.take(2) {
            assert_eq!(row.find("2026-11-30"), Some(at), "{row}");
        }
        assert!(text.contains("3.00 MiB"));
        assert!(table(Path::new("/x"), &[]).contains("nothing can be had back"));
    }
}
