//! Executes what README.md and docs/operating.md tell people to type. (docs/semantics.md has its
//! own test.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::*;

/// Returns a document's code blocks of one kind.
fn blocks(document: &str, kind: &str) -> Vec<String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap();
    let mut blocks = Vec::new();
    let mut block: Option<(bool, String)> = None;
    for line in text.lines() {
        match &mut block {
            None => {
                let fence = line.strip_prefix("```");
                block = fence.map(|of| (of == kind, String::new()));
            }
            Some((is_ours, text)) if line == "```" => {
                if *is_ours {
                    blocks.push(std::mem::take(text));
                }
                block = None;
            }
            Some((_, text)) => *text += &format!("{line}\n"),
        }
    }
    blocks
}

/// A user with a home directory: boxes in ~/.boxlite, including `web`, and a directory ~/boxes.
struct User {
    home: TestHome,
    directory: PathBuf,
}

impl User {
    fn new() -> User {
        let home = TestHome::new();
        let directory = home.beside("user");
        fs::create_dir(&directory).unwrap();
        for name in ["boxes", "backup"] {
            fs::create_dir(directory.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(home.root(), directory.join(".boxlite")).unwrap();
        User { home, directory }
    }

    fn shell(&self) -> Command {
        let mut shell = Command::new("bash");
        let programs = Path::new(binary()).parent().unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        shell
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("HOME", &self.directory)
            .env("LC_ALL", "C")
            .env_remove("BOXLITE_HOME")
            .current_dir(&self.directory);
        shell
    }

    /// Runs commands in a shell and asserts that they succeed.
    fn types(&self, commands: &str) {
        let backup = self.directory.join("backup");
        // The only path in the recipes that lies outside the user's home.
        let commands = commands.replace("/backup", text(&backup));
        let output = self
            .shell()
            .args(["-euo", "pipefail", "-c", &commands])
            .env("RESTIC_PASSWORD", "test")
            .env("RESTIC_CACHE_DIR", self.directory.join("cache"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{commands}: {output:?}");
    }
}

/// Replaces each time with a fixed word, because times differ between runs.
fn without_times(text: &str) -> String {
    let is_time = |word: &str| word.len() == 20 && word.ends_with('Z') && word.starts_with("20");
    let lines = text.lines().map(|line| {
        let words = line
            .split(' ')
            .map(|word| if is_time(word) { "TIME" } else { word });
        words.collect::<Vec<_>>().join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_session_in_the_readme_is_what_a_terminal_shows() {
    let user = User::new();
    let session = blocks("README.md", "console").remove(0);
    let commands: Vec<&str> = session
        .lines()
        .filter_map(|line| line.strip_prefix("$ "))
        .collect();
    assert!(commands.len() >= 15, "{session}");
    let script: String = commands
        .iter()
        .map(|command| {
            format!(
                "printf '%s\\n' {}\n{command}\n",
                quoted(&format!("$ {command}"))
            )
        })
        .collect();
    let output = user
        .shell()
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .output()
        .unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        without_times(&shown),
        without_times(&session),
        "README.md and what is shown"
    );
    assert!(!is_mounted(&user.directory.join("boxes")));
    user.home.assert_whole();
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[test]
fn the_recipes_for_backups_back_up_and_bring_back() {
    let user = User::new();
    let boxes = user.directory.join("boxes");
    let mounted = user
        .shell()
        .args(["-c", "boxlitefs mount ~/boxes"])
        .status()
        .unwrap();
    assert!(mounted.success());
    fs::create_dir(boxes.join("web/snapshots/s")).unwrap();
    user.home.guest_write("web", FREE_AREA, b"changed");
    let live = digest(&user.home.live_disk("web"));
    let snapshot = archive_digest(&boxes.join("web/snapshots/s/export.boxlite"));
    assert_ne!(live, snapshot);
    let recipes = blocks("docs/operating.md", "sh");
    let of = |words: &str| {
        let mut found = recipes.iter().filter(|recipe| recipe.contains(words));
        found
            .next()
            .unwrap_or_else(|| panic!("no recipe with {words}"))
    };
    // rsync: data that did not change is not copied again.
    user.types(of("rsync -a"));
    let again = of("rsync -a").replace("rsync -a", "rsync -a --itemize-changes");
    user.types(&format!("test -z \"$({} | grep '^>f')\"", again.trim()));
    user.types(of("cp -r /backup/boxes/web"));
    assert_eq!(
        archive_digest(&boxes.join("web-restored/export.boxlite")),
        live
    );
    let restored = boxes.join("web-restored/snapshots/s/export.boxlite");
    assert_eq!(archive_digest(&restored), snapshot);
    // restic.
    user.types(of("restic -q -r /backup/restic init"));
    user.types(of("restic -q -r /backup/restic restore"));
    assert_eq!(
        archive_digest(&boxes.join("web-of-restic/export.boxlite")),
        live
    );
    // cron: five fields; the rest is a line of sh with % escaped.
    let line = blocks("docs/operating.md", "crontab").remove(0);
    let mut rest = line.trim();
    for _ in 0..5 {
        rest = rest.split_once(' ').expect("five fields").1.trim_start();
    }
    user.types(&format!("sh -c {}", quoted(&rest.replace(r"\%", "%"))));
    let backups = names_in(&user.directory.join("backup"));
    let archive = backups.iter().find(|name| name.starts_with("web-2"));
    let archive = user
        .directory
        .join("backup")
        .join(archive.expect("an archive of the day"));
    assert_eq!(archive_digest(&archive), live);
    // Snapshots every hour: those that people took stay.
    user.types(of("boxlitefs prune"));
    let snapshots = names_in(&boxes.join("web/snapshots"));
    let hourly = snapshots.iter().filter(|name| name.starts_with("hourly-"));
    assert_eq!((snapshots.len(), hourly.count()), (2, 1), "{snapshots:?}");
    // BoxLite judges whether it is an archive.
    let unmounted = user
        .shell()
        .args(["-c", "boxlitefs unmount ~/boxes"])
        .status()
        .unwrap();
    assert!(unmounted.success());
    user.home.wheel(&["import", text(&archive), "from-cron"]);
    assert_eq!(digest(&user.home.live_disk("from-cron")), live);
    user.home.assert_whole();
}
