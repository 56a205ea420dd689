//! Executes `docs/semantics.md`, which specifies what the mount does. Every row of every table is a
//! command. It runs against a real mount of a home that BoxLite made, and its exit status, output
//! and condition are checked against the row.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::common::{Mounted, TestHome, archive, binary, python, wheel};
use tempfile::TempDir;

const DOCUMENT: &str = include_str!("../../docs/semantics.md");

/// The header of the tables that are executed.
const EXECUTED: [&str; 4] = ["command", "exit", "prints", "afterwards"];

/// The header of the table of errors.
const ERRORS: [&str; 3] = ["errno", "message", "when"];

/// The beginning of the line that says which home the next table uses.
const HOME: &str = "**Home:** ";

/// Timeout in seconds for a row on a busy machine.
const PATIENCE: &str = "120";

/// The errors the document may name.
const ERRNOS: &[(&str, i32)] = &[
    ("EBADMSG", libc::EBADMSG),
    ("EBUSY", libc::EBUSY),
    ("EEXIST", libc::EEXIST),
    ("EFBIG", libc::EFBIG),
    ("EINVAL", libc::EINVAL),
    ("EIO", libc::EIO),
    ("ENODATA", libc::ENODATA),
    ("ENOENT", libc::ENOENT),
    ("ENOTDIR", libc::ENOTDIR),
    ("ENOTEMPTY", libc::ENOTEMPTY),
    ("EPERM", libc::EPERM),
    ("EROFS", libc::EROFS),
    ("ESPIPE", libc::ESPIPE),
    ("ESTALE", libc::ESTALE),
];

/// The output that a row expects, from standard output and standard error together.
#[derive(Debug, PartialEq, Eq)]
enum Prints {
    Nothing,
    /// The message of an errno.
    Errno(String),
    /// This text, anywhere in the output.
    Text(String),
}

#[derive(Debug, PartialEq, Eq)]
struct Row {
    /// Its line in the document.
    line: usize,
    command: String,
    exit: i32,
    prints: Prints,
    /// A shell condition.
    afterwards: String,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Table {
    line: usize,
    /// Starts with a new home rather than the one that the table before it left.
    fresh: bool,
    /// What is removed or restored over is kept, as by default.
    keeps: bool,
    rows: Vec<Row>,
}

#[derive(Debug, Default)]
struct Document {
    /// The shell functions it defines.
    functions: String,
    tables: Vec<Table>,
    /// Each errno with its message and line.
    errors: Vec<(usize, String, String)>,
}

// ---- parsing ------------------------------------------------------------------------------------

/// Parses the document. A table that cannot be verified is an error, so that no table makes
/// untested promises.
fn parse(document: &str) -> Result<Document, String> {
    let mut parsed = Document::default();
    let mut home = None;
    let mut lines = document.lines().enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        let number = index + 1;
        if line == "```sh" {
            for (_, line) in lines.by_ref().take_while(|(_, line)| *line != "```") {
                parsed.functions += line;
                parsed.functions.push('\n');
            }
        } else if line.starts_with("```") {
            lines.by_ref().find(|(_, line)| *line == "```");
        } else if let Some(which) = line.strip_prefix(HOME) {
            home = Some(match which {
                "fresh." => (true, true),
                "fresh, mounted with `undo=off`." => (true, false),
                "as the table above left it." if !parsed.tables.is_empty() => (false, true),
                _ => return Err(format!("line {number}: no such home: {which}")),
            });
        } else if line.starts_with('|') {
            let mut rows = Vec::new();
            while let Some(row) = lines.next_if(|(_, line)| line.starts_with('|')) {
                rows.push((row.0 + 1, cells(row.1)));
            }
            let header = cells(line);
            let rows = rows.split_first().map_or(&[][..], |(_, rows)| rows);
            if header == EXECUTED {
                let (fresh, keeps) = home
                    .take()
                    .ok_or(format!("line {number}: the table has no home"))?;
                let rows = rows.iter().map(row).collect::<Result<_, _>>()?;
                let line = number;
                parsed.tables.push(Table {
                    line,
                    fresh,
                    keeps,
                    rows,
                });
            } else if header == ERRORS {
                for (line, cells) in rows {
                    let [errno, message, when] = cells.as_slice() else {
                        return Err(format!("line {line}: three cells are needed"));
                    };
                    if when.is_empty() {
                        return Err(format!("line {line}: when?"));
                    }
                    parsed.errors.push((*line, errno.clone(), message.clone()));
                }
            } else {
                return Err(format!("line {number}: a table that can't be executed"));
            }
        }
    }
    Ok(parsed)
}

/// Splits a table row into cells; a bar inside a cell is written `\|`.
fn cells(line: &str) -> Vec<String> {
    let inner = line.trim().trim_start_matches('|');
    let inner = inner.strip_suffix('|').unwrap_or(inner);
    let mut cells = vec![String::new()];
    let mut escaped = false;
    for character in inner.chars() {
        match character {
            '|' if !escaped => cells.push(String::new()),
            '|' => {
                let cell = cells.last_mut().expect("a cell");
                cell.pop();
                cell.push('|');
            }
            other => cells.last_mut().expect("a cell").push(other),
        }
        escaped = character == '\\';
    }
    cells.iter().map(|cell| cell.trim().to_owned()).collect()
}

fn row((line, cells): &(usize, Vec<String>)) -> Result<Row, String> {
    let [command, exit, prints, afterwards] = cells.as_slice() else {
        return Err(format!("line {line}: four cells are needed: {cells:?}"));
    };
    let code = |cell: &str| {
        code(cell).ok_or_else(|| format!("line {line}: {cell:?} is not one piece of code"))
    };
    Ok(Row {
        line: *line,
        command: code(command)?,
        exit: exit
            .parse()
            .map_err(|_| format!("line {line}: {exit:?} is no exit status"))?,
        prints: match prints.as_str() {
            "nothing" => Prints::Nothing,
            errno if errno_of(errno).is_some() => Prints::Errno(errno.to_owned()),
            _ => Prints::Text(code(prints)?),
        },
        afterwards: code(afterwards)?,
    })
}

/// Returns the text between the backticks of a cell that contains nothing else.
fn code(cell: &str) -> Option<String> {
    let inner = cell.strip_prefix('`')?.strip_suffix('`')?;
    (!inner.is_empty() && !inner.contains('`')).then(|| inner.to_owned())
}

fn errno_of(name: &str) -> Option<i32> {
    let found = ERRNOS.iter().find(|(known, _)| *known == name);
    found.map(|(_, errno)| *errno)
}

/// Returns the message that programs print for an errno.
fn message_of(errno: &str) -> Option<String> {
    let text = io::Error::from_raw_os_error(errno_of(errno)?).to_string();
    text.split_once(" (os error")
        .map(|(message, _)| message.to_owned())
}

// ---- execution ----------------------------------------------------------------------------------

/// A mounted home and what the rows of a table find around it.
struct Place {
    // Unmounted before the home is deleted.
    _mount: Mounted,
    home: TestHome,
    mountpoint: PathBuf,
    backup: TempDir,
    functions: String,
}

/// Makes a directory where later files get higher inode numbers. cp goes by them, and a disk's file
/// system reuses numbers that were just freed, for example by other tests.
fn in_order() -> TempDir {
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    place.expect("a temporary directory")
}

impl Place {
    fn new(functions: &str, keeps: bool) -> Place {
        let home = TestHome::new();
        home.set_keeps(keeps);
        for directory in ["bin", "work"] {
            fs::create_dir(home.beside(directory)).expect("a directory");
        }
        let backup = in_order();
        fs::copy(archive(), backup.path().join("web.boxlite")).expect("the archive");
        let boxlite = home.beside("bin/boxlite");
        let script = format!(
            "#!/bin/sh\nBOXLITE_SERVER='{}' exec '{}' '{}' \"$BOXLITE_HOME\" \"$@\"\n",
            wheel::socket().display(),
            python().display(),
            wheel::program().display()
        );
        fs::write(&boxlite, script).expect("a script");
        fs::set_permissions(&boxlite, fs::Permissions::from_mode(0o755)).expect("a program");
        let mount = home.mount();
        Place {
            mountpoint: mount.root().to_owned(),
            _mount: mount,
            home,
            backup,
            functions: functions.to_owned(),
        }
    }

    fn shell(&self, script: &str) -> Output {
        let mut path = vec![
            self.home.beside("bin"),
            Path::new(binary()).parent().expect("its directory").into(),
        ];
        path.extend(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        ));
        // Users' PATH often lacks the directory of mke2fs.
        path.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
        Command::new("timeout")
            .args(["-k", "5", PATIENCE, "bash", "-c"])
            .arg(format!("{}\n{script}", self.functions))
            .env("PATH", std::env::join_paths(path).expect("a PATH"))
            .env("LC_ALL", "C")
            .env("BOXLITEFS_UNDO_ANY_ROOM", "1")
            .env("MNT", &self.mountpoint)
            .env("BACKUP", self.backup.path())
            .env("BOXLITE_HOME", self.home.root())
            .current_dir(self.home.beside("work"))
            .stdin(Stdio::null())
            .output()
            .expect("timeout and bash")
    }

    /// Runs a row; the error says how the result differs from the row.
    fn run(&self, row: &Row) -> Result<(), String> {
        let output = self.shell(&row.command);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        let refuse = |why: String| {
            let log = self.shell("tail -n 5 \"$MNT/.boxlite/log\"").stdout;
            Err(format!(
                "docs/semantics.md, line {}: `{}`\n  {why}\n  it printed: {}\n  the log ends with:\n{}",
                row.line,
                row.command,
                said.trim_end(),
                String::from_utf8_lossy(&log)
            ))
        };
        let exit = output.status.code();
        if exit != Some(row.exit) {
            return refuse(format!("should exit with {}, not {exit:?}", row.exit));
        }
        let wanted = match &row.prints {
            Prints::Nothing if said.is_empty() => String::new(),
            Prints::Nothing => return refuse("should print nothing".into()),
            Prints::Errno(errno) => message_of(errno).expect("a known errno"),
            Prints::Text(text) => text.clone(),
        };
        if !said.contains(&wanted) {
            return refuse(format!("should print {wanted:?}"));
        }
        let condition = self.shell(&row.afterwards);
        if !condition.status.success() {
            let why = [condition.stdout, condition.stderr].concat();
            return refuse(format!(
                "afterwards this should hold: {}\n  {}",
                row.afterwards,
                String::from_utf8_lossy(&why).trim_end()
            ));
        }
        Ok(())
    }
}

#[test]
fn every_row_of_the_document_holds() {
    let document = parse(DOCUMENT).unwrap_or_else(|why| panic!("docs/semantics.md, {why}"));
    let mut failures = Vec::new();
    let mut place = None;
    let mut usable = true;
    for table in &document.tables {
        if table.fresh {
            // Keep only one home at a time.
            drop(place.take());
            usable = true;
        }
        if !usable {
            continue;
        }
        let place = place.get_or_insert_with(|| Place::new(&document.functions, table.keeps));
        // Rows build on the rows before them, so the first failure ends the table.
        if let Some(failure) = table.rows.iter().find_map(|row| place.run(row).err()) {
            failures.push(failure);
            usable = false;
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

#[test]
fn the_errors_it_explains_are_those_its_rows_show() {
    let document = parse(DOCUMENT).unwrap_or_else(|why| panic!("docs/semantics.md, {why}"));
    let shown: BTreeSet<&str> = document
        .tables
        .iter()
        .flat_map(|table| &table.rows)
        .filter_map(|row| match &row.prints {
            Prints::Errno(errno) => Some(errno.as_str()),
            _ => None,
        })
        .collect();
    let explained: BTreeSet<&str> = document
        .errors
        .iter()
        .map(|(_, errno, _)| errno.as_str())
        .collect();
    assert_eq!(shown, explained);
    for (line, errno, message) in &document.errors {
        assert_eq!(message_of(errno).as_ref(), Some(message), "line {line}");
    }
}

#[test]
fn the_document_has_no_row_that_can_not_be_verified() {
    let table = |row: &str| {
        format!(
            "**Home:** fresh.\n\n| command | exit | prints | afterwards |\n|---|---|---|---|\n{row}\n"
        )
    };
    assert!(parse(&table("| `a \\| b` | 1 | EBUSY | `c` |")).is_ok());
    for row in [
        "| `a` | 0 | nothing | |",
        "| `a` | 0 | | `c` |",
        "| `a` | fails | nothing | `c` |",
        "| a | 0 | nothing | `c` |",
        "| `a` | 0 | ENONSENSE | `c` |",
        "| `a` | 0 | nothing |",
        "| `a | b` | 0 | nothing | `c` |",
    ] {
        assert!(parse(&table(row)).is_err(), "{row}");
    }
    assert!(parse("| do | what happens |\n|---|---|\n| `a` | wonders |\n").is_err());
    assert!(parse(&table("").replace("fresh", "tidy")).is_err());
    assert!(parse(&table("").replace("**Home:**", "Home:")).is_err());
}

#[test]
fn a_row_is_read_as_it_is_rendered() {
    let document = parse(
        "```sh\nf() { true; }\n```\n**Home:** fresh.\n\n| command | exit | prints | afterwards |\n\
         |---|---|---|---|\n| `a \\| b` | 1 | EBUSY | `! test -e c` |\n",
    )
    .unwrap();
    assert_eq!(document.functions, "f() { true; }\n");
    let row = Row {
        line: 8,
        command: "a | b".into(),
        exit: 1,
        prints: Prints::Errno("EBUSY".into()),
        afterwards: "! test -e c".into(),
    };
    let table = Table {
        line: 6,
        fresh: true,
        keeps: true,
        rows: vec![row],
    };
    assert_eq!(document.tables, [table]);
    assert_eq!(
        message_of("EBUSY").as_deref(),
        Some("Device or resource busy")
    );
}
