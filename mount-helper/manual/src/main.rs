//! Writes manual pages and completions, made from the definitions of both command lines. The
//! argument is the directory that is installed as `share`.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use boxlitefs::cli::CommandLine;
use boxlitefs::mount::DOCUMENTED_OPTIONS;
use boxlitefs::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Arg, Command, CommandFactory};
use clap_complete::Shell;
use roff::{Inline, Roff, bold, italic, roman};

/// Where shells look for each completion, below `share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/boxlitefs"),
    (Shell::Zsh, "zsh/site-functions/_boxlitefs"),
    (Shell::Fish, "fish/vendor_completions.d/boxlitefs.fish"),
];

const DESCRIPTION: [&str; 4] = [
    "boxlitefs shows a BoxLite home, the directory where BoxLite keeps its boxes, as a directory of files. \
     Ordinary file operations then work on boxes: mkdir in the directory snapshots of a box takes a \
     snapshot, cp of its file export.boxlite makes a backup, cp -r of its directory a clone, rm -r deletes it.",
    "The mount has a directory for each box, in it box.json, export.boxlite, export.boxlite.zst, disk.img, \
     rootfs (the guest's files) and snapshots. The directory .boxlite is hidden: \
     .boxlite/log says what was done and what failed, .boxlite/status what the mount is doing.",
    "What is removed, or restored over, can be had back from .boxlite/undo for a day, unless the option undo \
     says otherwise. If the mount refuses something, boxlitefs why says why, and what to do instead.",
    "BoxLite itself may use the same home at the same time, and boxes may run. While one of its programs has \
     the home open, renaming a box, editing box.json, merging and repairing fail with EBUSY; everything else \
     works.",
];

const FILES: [(&str, &str); 6] = [
    (
        "~/.boxlite",
        "the default home, unless another is named or BOXLITE_HOME is set",
    ),
    (
        "HOME/.boxlitefs",
        "the log, what can be had back, and work in progress; may be deleted while nothing is mounted",
    ),
    (
        "HOME/db/boxlitefs.db",
        "a cache of sizes and checksums; may be deleted at any time",
    ),
    (
        "MOUNTPOINT/.boxlite/log",
        "what was done and what failed, a message each",
    ),
    (
        "MOUNTPOINT/.boxlite/undo",
        "what was removed or restored over and can be had back, a directory each",
    ),
    (
        "MOUNTPOINT/.boxlite/status",
        "what the mount is doing, as JSON",
    ),
];

const ENVIRONMENT: [(&str, &str); 3] = [
    ("BOXLITE_HOME", "the home, if none is named"),
    (
        "RUST_LOG",
        "how much is logged in the foreground: error, warn, info or debug",
    ),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC, JOURNAL_STREAM",
        "set by systemd; in the foreground, boxlitefs tells it when the mount serves and that it is alive",
    ),
];

const EXIT_STATUS: [(&str, &str); 4] = [
    ("0", "done; check: nothing was found"),
    ("1", "failed; check: something was found"),
    ("2", "the command line is wrong; check: the check failed"),
    (
        "3",
        "unmount: unmounted here, but still served, for the reason in the message",
    ),
];

const STATUS_OF_MOUNT: [(&str, &str); 4] = [
    ("0", "mounted, or remounted"),
    ("1", "the command line or an option is wrong"),
    ("2", "boxlitefs is missing or can't be run"),
    ("32", "the mount failed; boxlitefs has printed why"),
];

fn main() -> ExitCode {
    let Some(share) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: manual DIRECTORY");
        return ExitCode::from(2);
    };
    if let Err(error) = write(&share) {
        eprintln!("manual: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Writes all pages and completions to their places below `share`.
///
/// # Errors
/// Those of writing files.
fn write(share: &Path) -> Result<()> {
    put(
        share,
        "man/man1/boxlitefs.1",
        page_of_boxlitefs().as_bytes(),
    )?;
    put(
        share,
        "man/man8/mount.boxlite.8",
        page_of_mount().as_bytes(),
    )?;
    for (shell, place) in COMPLETIONS {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut completed(), "boxlitefs", &mut script);
        put(share, place, &script)?;
    }
    Ok(())
}

fn put(share: &Path, place: &str, bytes: &[u8]) -> Result<()> {
    let path = share.join(place);
    let message = || format!("cannot write {}", path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).context(message)?;
    }
    fs::write(&path, bytes).context(message)
}

/// The command line without its hidden parts.
fn visible() -> Command {
    let all = CommandLine::command();
    let shown: Vec<Command> = all
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .cloned()
        .collect();
    let mut command = Command::new("boxlitefs")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .subcommands(shown);
    if let Some(about) = all.get_about() {
        command = command.about(about.clone());
    }
    if let Some(examples) = all.get_after_help() {
        command = command.after_help(examples.clone());
    }
    command.build();
    command
}

/// Returns the command line as completions know it: with the mount options as values of `-o`.
fn completed() -> Command {
    let forms = DOCUMENTED_OPTIONS.iter().map(|option| {
        let (name, value) = option.form.split_once('=').unwrap_or((option.form, ""));
        // A value in capitals is to be written by the user.
        let is_open = !value.is_empty() && value.chars().all(|c| c.is_ascii_uppercase());
        if is_open {
            &option.form[..=name.len()]
        } else {
            option.form
        }
    });
    let values = PossibleValuesParser::new(forms.collect::<Vec<&str>>());
    visible().mut_subcommand("mount", |mount| {
        mount.mut_arg("options", |argument| argument.value_parser(values))
    })
}

fn page_of_boxlitefs() -> String {
    let command = visible();
    let mut page = head(&command, "1");
    page.control("SH", ["SYNOPSIS"]);
    for (index, each) in command.get_subcommands().enumerate() {
        if index > 0 {
            page.control("br", []);
        }
        page.text(usage(each));
    }
    page.control("SH", ["DESCRIPTION"]);
    paragraphs(&mut page, DESCRIPTION);
    page.control("SH", ["COMMANDS"]);
    for each in command.get_subcommands() {
        page.control("SS", [&*format!("boxlitefs {}", each.get_name())]);
        if let Some(about) = each.get_about() {
            page.text([roman(format!("{about}."))]);
        }
        arguments(&mut page, each);
        examples(&mut page, each, "PP");
    }
    mount_options(&mut page);
    list(&mut page, "EXIT STATUS", EXIT_STATUS);
    list(&mut page, "ENVIRONMENT", ENVIRONMENT);
    list(&mut page, "FILES", FILES);
    examples(&mut page, &command, "SH");
    see_also(
        &mut page,
        &[("mount.boxlite", "8"), ("fusermount3", "1"), ("fuse", "8")],
    );
    page.render()
}

fn page_of_mount() -> String {
    let mut command = mount_helper::Request::command();
    command.build();
    let mut page = head(&command, "8");
    page.control("SH", ["SYNOPSIS"]);
    page.text(usage(&command));
    page.control("SH", ["DESCRIPTION"]);
    if let Some(about) = command.get_long_about() {
        paragraphs(&mut page, about.to_string().split("\n\n").skip(1));
    }
    page.control("SH", ["ARGUMENTS"]);
    arguments(&mut page, &command);
    mount_options(&mut page);
    list(&mut page, "EXIT STATUS", STATUS_OF_MOUNT);
    examples(&mut page, &command, "SH");
    see_also(
        &mut page,
        &[("boxlitefs", "1"), ("mount", "8"), ("fstab", "5")],
    );
    page.render()
}

fn head(command: &Command, section: &str) -> Roff {
    let mut page = Roff::new();
    let name = command.get_name();
    let version = format!("boxlitefs {}", env!("CARGO_PKG_VERSION"));
    // Without a date: the version says enough.
    page.control(
        "TH",
        [
            &*name.to_uppercase(),
            section,
            "",
            &*version,
            "BoxLite boxes as files",
        ],
    );
    page.control("SH", ["NAME"]);
    let about = command.get_about().map(ToString::to_string);
    let about = about.unwrap_or_default();
    page.text([roman(format!("{name} - {}", about.trim_end_matches('.')))]);
    page
}

/// The usage, with the program's name in bold.
fn usage(command: &Command) -> Vec<Inline> {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim().to_owned();
    let named = command.get_bin_name().unwrap_or(command.get_name());
    match usage.strip_prefix(named) {
        Some(rest) => vec![bold(named), roman(rest)],
        None => vec![roman(usage)],
    }
}

fn paragraphs<T: AsRef<str>>(page: &mut Roff, texts: impl IntoIterator<Item = T>) {
    for (index, text) in texts.into_iter().enumerate() {
        if index > 0 {
            page.control("PP", []);
        }
        page.text([roman(text.as_ref().replace('\n', " "))]);
    }
}

fn arguments(page: &mut Roff, command: &Command) {
    for argument in command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set())
    {
        page.control("TP", []);
        page.text(term(argument));
        let help = argument.get_help().map(ToString::to_string);
        page.text([roman(help.unwrap_or_default().replace('\n', " "))]);
    }
}

/// `-f, --foreground`, `-o OPT[,OPT…]`, `MOUNTPOINT`.
fn term(argument: &Arg) -> Vec<Inline> {
    let mut term = Vec::new();
    if let Some(short) = argument.get_short() {
        term.push(bold(format!("-{short}")));
    }
    if let Some(long) = argument.get_long() {
        if !term.is_empty() {
            term.push(roman(", "));
        }
        term.push(bold(format!("--{long}")));
    }
    if argument.is_positional() || argument.get_action().takes_values() {
        let names = argument.get_value_names().unwrap_or_default();
        if !term.is_empty() {
            term.push(roman(" "));
        }
        term.push(italic(names.join(" ")));
    }
    term
}

fn mount_options(page: &mut Roff) {
    page.control("SH", ["MOUNT OPTIONS"]);
    for option in DOCUMENTED_OPTIONS {
        page.control("TP", []);
        match option.form.split_once('=') {
            Some((name, value)) => page.text([bold(format!("{name}=")), italic(value)]),
            None => page.text([bold(option.form)]),
        };
        page.text([roman(format!("{}.", option.effect))]);
    }
    page.control("PP", []);
    page.text([roman(
        "nosuid and nodev are always on. Options of every mount (defaults, nofail, noauto, user, _netdev, x-systemd options and so on) are accepted.",
    )]);
}

fn list<const N: usize>(page: &mut Roff, title: &str, items: [(&str, &str); N]) {
    page.control("SH", [title]);
    for (term, text) in items {
        page.control("TP", []);
        page.text([bold(term)]);
        page.text([roman(format!("{text}."))]);
    }
}

/// Adds the examples of a command, line by line; `heading` begins them.
fn examples(page: &mut Roff, command: &Command, heading: &str) {
    let Some(text) = command.get_after_help().map(ToString::to_string) else {
        return;
    };
    match heading {
        "SH" => page.control("SH", ["EXAMPLES"]),
        _ => page.control(heading, []),
    };
    let text = text.trim_start_matches("Examples:\n");
    let mut is_verbatim = false;
    for line in text.lines() {
        let wanted = line.starts_with(' ');
        if wanted != is_verbatim {
            page.control(if wanted { "EX" } else { "EE" }, []);
            is_verbatim = wanted;
        }
        if line.is_empty() {
            page.control("PP", []);
        } else {
            page.text([roman(line)]);
        }
    }
    if is_verbatim {
        page.control("EE", []);
    }
}

fn see_also(page: &mut Roff, pages: &[(&str, &str)]) {
    page.control("SH", ["SEE ALSO"]);
    let mut line = Vec::new();
    for (index, (name, section)) in pages.iter().enumerate() {
        if index > 0 {
            line.push(roman(", "));
        }
        line.push(bold(*name));
        line.push(roman(format!("({section})")));
    }
    page.text(line);
}
