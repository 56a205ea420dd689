//! The examples of each command's help work as they are written.

use std::path::Path;
use std::process::Command;

use crate::common::*;

/// Sets up a machine with `~/boxes` as the mountpoint of the examples, and runs each argument as a
/// command.
const MACHINE: &str = r#"
set -eu
mkdir "$PLACE/bin" "$PLACE/user" "$PLACE/backup"
cp "$BOXLITEFS" "$PLACE/bin/boxlitefs"
export PATH="$PLACE/bin:$PATH" HOME="$PLACE/user" BOXLITEFS_UNDO_ANY_ROOM=1
mount -t tmpfs tmpfs /mnt
mount -t tmpfs tmpfs /srv
mkdir /mnt/boxlite
ln -s "$BOXLITE_HOME" /srv/boxlite-home
ln -s /mnt/boxlite "$HOME/boxes"
boxlitefs mount /mnt/boxlite
cp /mnt/boxlite/web/export.boxlite "$PLACE/web.boxlite"
mkdir /mnt/boxlite/web/snapshots/{first,hourly-1}
cd "$PLACE"
for example in "$@"; do
    case "$example" in
        *'boxlitefs mount'*) ! mountpoint -q /mnt/boxlite || boxlitefs unmount /mnt/boxlite ;;
        *) mountpoint -q /mnt/boxlite || boxlitefs mount /mnt/boxlite ;;
    esac
    case "$example" in
        mv*undo*) rm -r /mnt/boxlite/web ;;
        cp*undo*)
            qemu-io -f qcow2 -c "write -q -P 7 $FREE_AREA 64k" "$BOXLITE_HOME"/boxes/*/disks/disk.qcow2
            cp /mnt/boxlite/web/{snapshots/first/,}export.boxlite ;;
    esac
    entry=$(ls /mnt/boxlite/.boxlite/undo 2>/dev/null | tail -n 1 || true)
    example=$(echo "$example" | sed -E "s,[0-9]+T[0-9]+Z-web,$entry,; s,/backup/,$PLACE/backup/,; s,/tmp/look,$PLACE/look,g")
    case "$example" in
        *--watch*) example="$example | head -n 1" ;;
        'boxlitefs why') example="(cd /mnt/boxlite/web && $example)" ;;
        *' -f '*) example="$example & until mountpoint -q /mnt/boxlite; do sleep 0.02; done
            boxlitefs unmount /mnt/boxlite; wait \$!" ;;
    esac
    bash -ec "$example" > "$PLACE/said" 2>&1 || { echo "$example"; cat "$PLACE/said"; exit 1; }
    mountpoint -q /mnt/boxlite && test -d /mnt/boxlite/web ||
        { ! mountpoint -q /mnt/boxlite || ls /mnt/boxlite; }
done
boxlitefs unmount /mnt/boxlite 2>/dev/null || true
"#;

/// Returns the examples in a help text, without what is said of each.
fn examples_in(help: &str) -> Vec<String> {
    let listed = help.split("Examples:\n").nth(1).expect("examples");
    let lines = listed.lines().take_while(|line| !line.is_empty());
    // A line that is indented further goes on with what is said of the one before.
    let lines = lines.filter(|line| line.starts_with("  ") && !line.starts_with("    "));
    let first = |line: &str| line.trim().split("   ").next().unwrap().to_owned();
    lines.map(first).collect()
}

/// Returns the commands that the help lists; an empty one for the program itself.
fn commands() -> Vec<String> {
    let help = succeed(&[binary(), "--help"]);
    let listed = help.split("Commands:\n").nth(1).expect("commands");
    let listed = listed.lines().take_while(|line| !line.is_empty());
    let names = listed.filter(|line| !line.starts_with("   "));
    let names = names.map(|line| line.split_whitespace().next().unwrap().to_owned());
    names.chain([String::new()]).collect()
}

#[test]
fn each_command_has_two_examples_and_each_works() {
    let commands = commands();
    assert!(commands.len() > 10, "{commands:?}");
    let mut all = Vec::new();
    for command in commands {
        let mut asked = vec![binary(), &command, "--help"];
        asked.retain(|word| !word.is_empty());
        let examples = examples_in(&succeed(&asked));
        assert!(examples.len() >= 2, "{command}: {examples:?}");
        all.extend(examples);
    }
    let home = TestHome::new();
    let place = tempfile::tempdir_in(home.beside("")).unwrap();
    // One machine for all: a new mount namespace keeps the mounts of other tests for a moment.
    let output = Command::new("unshare")
        .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args([
            "bash",
            "-c",
            &format!("{LEAVE_OTHER_MOUNTS}{MACHINE}"),
            "bash",
        ])
        .args(&all)
        .env("PLACE", place.path())
        .env("BOXLITEFS", Path::new(binary()))
        .env("BOXLITE_HOME", home.root())
        .env("FREE_AREA", FREE_AREA.to_string())
        .output()
        .expect("unshare");
    assert!(output.status.success(), "{output:?}");
}
