//! How a mount ends. Whatever ends it, every other mount stays, even a newer one of the same home
//! or a foreign one on the same directory. Also: what `boxlitefs unmount` reports if it cannot
//! unmount. Each script has its own mount namespace and processes, which end with the test. Needs
//! root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::*;

/// A user that exists on every system and owns nothing.
const USER: &str = "nobody";

/// Definitions for all scripts: $B is boxlitefs, $H the home, $M the mountpoint, $P a scratch
/// directory.
const PRELUDE: &str = r#"
set -eu
mkdir "$P/dev"
mount -t tmpfs tmpfs "$P/dev"
mknod -m 666 "$P/dev/fuse" c 10 229
mount --bind "$P/dev/fuse" /dev/fuse
mkdir -p "$P/other" "$P/bound"
# Prints the process that serves the mount at a path.
server() { grep -o '"pid": [0-9]*' "$1/.boxlite/status" | grep -o '[0-9]*$'; }
is_gone() { [ ! -e "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status"; }
gone() { until is_gone "$1"; do sleep 0.02; done; }
lives() { if is_gone "$1"; then echo "$1 is gone"; exit 1; fi; }
# Prints the types of the file systems mounted on a path, the lowest first.
on() { awk -v place="$1" '$5 == place { for (i = 7; $i != "-"; i++); print $(i + 1) }' /proc/self/mountinfo | xargs; }
is() { if [ "$1" != "$2" ]; then echo "'$1' instead of '$2'"; exit 1; fi; }
# Waits until a process has executed sleep.
is_sleep() { until [ "$(cat "/proc/$1/comm")" = sleep ]; do sleep 0.02; done; }
# Asserts that a mount can be read and accepts an import.
serves() {
    is "$(ls "$1")" "$(printf 'web')"
    cp "$1/web/export.boxlite" "$1/new.boxlite"
    test -e "$1/new/box.json"
    rm -r "$1/new"
}
abort() {
    [ -e /sys/fs/fuse/connections/"$1" ] || mount -t fusectl none /sys/fs/fuse/connections
    echo 1 > /sys/fs/fuse/connections/"$1"/abort
}
connection() { stat -c %Hd:%Ld "$1" | cut -d: -f2; }
fails() { # STATUS WORDS COMMAND…
    local wanted=$1 words=$2 status=0
    shift 2
    "$@" >"$P/said" 2>&1 || status=$?
    if [ "$status" != "$wanted" ] || ! grep -q -- "$words" "$P/said"; then
        echo "$*: $status instead of $wanted, without '$words':"
        cat "$P/said"
        exit 1
    fi
}
as_user() { setpriv --reuid="$USER" --regid="$(id -g "$USER")" --clear-groups -- "$@"; }
"#;

/// A home with the box `web`, and a mountpoint.
struct Place {
    home: TestHome,
}

impl Place {
    fn new() -> Place {
        let home = TestHome::new();
        // Another user has to be able to enter.
        fs::set_permissions(home.beside(""), fs::Permissions::from_mode(0o755)).unwrap();
        Place { home }
    }

    /// Runs a script that must succeed.
    fn run(&self, script: &str) {
        self.run_with(script, &[]);
    }

    fn run_with(&self, script: &str, environment: &[(&str, &str)]) {
        let place = tempfile::tempdir_in(self.home.beside("")).unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new("timeout")
            .args(["--kill-after=5", "120"])
            .args([
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args([
                "bash",
                "-c",
                &format!("{LEAVE_OTHER_MOUNTS}{PRELUDE}{script}"),
            ])
            .env("P", place.path())
            .env("B", binary())
            .env(
                "HELPER",
                Path::new(binary()).with_file_name("mount-boxlite"),
            )
            .env("H", self.home.root())
            .env("M", self.home.beside("mnt"))
            .env("USER", USER)
            .env_remove("BOXLITE_HOME")
            .envs(environment.iter().copied())
            .output()
            .expect("unshare");
        assert!(
            output.status.success(),
            "{environment:?} {script}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

// ---- a mount that was detached while in use -----------------------------------------------------

/// Detaches a mount while one of its files is open as descriptor 5. $OLD is its process. Tests then
/// mount something else on the mountpoint.
const REPLACED: &str = r#"
$B mount "$H" "$M"
OLD=$(server "$M")
OLD_CONNECTION=$(connection "$M")
exec 5<"$M/web/export.boxlite"
umount -l "$M"
"#;

/// Ways to end a detached mount that a reader keeps alive. No path leads to such a mount.
const ENDS: [&str; 8] = [
    "exec 5<&-",
    "kill -TERM $OLD",
    "kill -INT $OLD",
    "kill -HUP $OLD",
    "kill -KILL $OLD",
    "abort $OLD_CONNECTION",
    "mv $H $H.moved; exec 5<&-; gone $OLD; mv $H.moved $H",
    "kill -ABRT $OLD",
];

#[test]
fn a_mount_that_was_detached_in_use_ends_without_the_one_that_came_after_it() {
    let place = Place::new();
    for end in ENDS {
        let script = format!(
            r#"{REPLACED}
            $B mount "$H" "$M"
            NEW=$(server "$M")
            exec 6<"$M/web/export.boxlite"
            {end}
            gone $OLD
            is "$(on "$M")" fuse.boxlite
            is "$(server "$M")" $NEW
            cat <&6 | cmp - "$M/web/export.boxlite"
            exec 6<&-
            serves "$M"
            $B unmount "$M"
            gone $NEW"#
        );
        place.run(&script);
    }
}

#[test]
fn a_mount_that_was_detached_in_use_ends_without_a_strangers_on_its_directory() {
    let place = Place::new();
    for end in ENDS {
        let script = format!(
            r#"{REPLACED}
            mount -t tmpfs tmpfs "$M"
            echo kept > "$M/file"
            {end}
            gone $OLD
            is "$(on "$M")" tmpfs
            is "$(cat "$M/file")" kept"#
        );
        place.run(&script);
    }
}

#[test]
fn a_users_mount_that_was_detached_in_use_ends_without_the_one_that_came_after_it() {
    let place = Place::new();
    for name in ["home", "mnt"] {
        succeed(&["chown", "-R", USER, text(&place.home.beside(name))]);
    }
    for end in ["kill $READER", "kill -TERM $OLD", "kill -KILL $OLD"] {
        let script = format!(
            r#"
            as_user $B mount "$H" "$M"
            OLD=$(as_user grep -o '"pid": [0-9]*' "$M/.boxlite/status" | grep -o '[0-9]*$')
            as_user tail -f "$M/web/export.boxlite" >/dev/null &
            until READER=$(pgrep -f "^tail -f $M"); do sleep 0.02; done
            until [ "$(readlink /proc/$READER/fd/3)" = "$M/web/export.boxlite" ]; do sleep 0.02; done
            fails 1 "in use by pid $READER" as_user $B unmount "$M"
            as_user fusermount3 -u -z "$M"
            as_user $B mount "$H" "$M"
            {end}
            gone $OLD
            is "$(on "$M")" fuse.boxlite
            is "$(as_user ls "$M")" web
            as_user mkdir "$M/web/snapshots/s"
            as_user rmdir "$M/web/snapshots/s"
            as_user $B unmount "$M"
            is "$(on "$M")" ''"#
        );
        place.run(&script);
    }
}

// ---- stacked mounts -----------------------------------------------------------------------------

#[test]
fn of_two_mounts_on_one_another_every_way_of_unmounting_ends_the_upper_alone() {
    let place = Place::new();
    for end in [
        "$B unmount $M",
        "umount $M",
        "umount -l $M",
        "umount -f $M",
        "fusermount3 -u $M",
        "fusermount3 -u -z $M",
        "kill -TERM $UPPER",
        "kill -INT $UPPER",
        "abort $(connection $M)",
        "exec 5<$M/web/box.json; umount -f $M || :; gone $UPPER; exec 5<&-",
    ] {
        let script = format!(
            r#"
            $B mount "$H" "$M"
            LOWER=$(server "$M")
            $B mount "$H" "$P/other"
            UPPER=$(server "$P/other")
            mount --move "$P/other" "$M"
            is "$(server "$M")" $UPPER
            {end}
            gone $UPPER
            lives $LOWER
            is "$(on "$M")" fuse.boxlite
            is "$(server "$M")" $LOWER
            serves "$M"
            $B unmount "$M"
            gone $LOWER
            is "$(on "$M")" ''"#
        );
        place.run(&script);
    }
}

#[test]
fn a_signal_to_a_mount_that_another_covers_waits_until_that_is_gone() {
    let place = Place::new();
    // A foreign mount on the same directory, on its parent, and inside the mount.
    for (mountpoint, covered) in [
        ("$M", "$M"),
        ("$P/above/mnt", "$P/above"),
        ("$M", "$M/web/snapshots"),
    ] {
        let script = format!(
            r#"
            mkdir -p "$P/above/mnt"
            $B mount -f "$H" "{mountpoint}" 2>"$P/log" &
            OLD=$!
            until grep -q 'is mounted on' "$P/log"; do sleep 0.02; done
            mount -t tmpfs tmpfs "{covered}"
            echo kept > "{covered}/file"
            kill -TERM $OLD
            until grep -q "tmpfs is mounted on {covered}" "$P/log"; do sleep 0.02; done
            lives $OLD
            is "$(cat "{covered}/file")" kept
            umount "{covered}"
            wait $OLD
            is "$(on "{mountpoint}")" ''"#
        );
        place.run(&script);
    }
}

#[test]
fn what_covers_a_mount_stays_when_that_is_killed_or_aborted() {
    let place = Place::new();
    for end in ["kill -KILL $OLD", "abort $CONNECTION"] {
        let script = format!(
            r#"
            $B mount "$H" "$M"
            OLD=$(server "$M")
            CONNECTION=$(connection "$M")
            mount -t tmpfs tmpfs "$M"
            {end}
            gone $OLD
            is "$(on "$M")" 'fuse.boxlite tmpfs'
            # As the units of systemd do after a crash.
            $B unmount --dead "$M"
            is "$(on "$M")" 'fuse.boxlite tmpfs'
            umount "$M"
            fails 1 'boxlitefs unmount --dead' $B mount "$H" "$M"
            $B unmount --dead "$M"
            is "$(on "$M")" ''"#
        );
        place.run(&script);
    }
}

#[test]
fn a_mount_that_was_moved_is_unmounted_where_it_is_by_a_signal() {
    let place = Place::new();
    place.run(
        r#"
        mkdir -p "$P/a/mnt"
        $B mount "$H" "$P/a/mnt"
        OLD=$(server "$P/a/mnt")
        mv "$P/a" "$P/b"
        kill -TERM $OLD
        gone $OLD
        is "$(on "$P/b/mnt")" ''
        # And one that was mounted in a second place, too.
        $B mount "$H" "$M"
        OLD=$(server "$M")
        mount --bind "$M" "$P/bound"
        kill -TERM $OLD
        gone $OLD
        is "$(on "$M")$(on "$P/bound")" ''"#,
    );
}

// ---- mounts that fail ---------------------------------------------------------------------------

#[test]
fn concurrent_mounts_on_one_directory_leave_exactly_one() {
    let place = Place::new();
    place.run(
        r#"
        for n in 1 2 3 4 5 6; do
            { $B mount "$H" "$M" 2>"$P/said.$n" && echo mounted >"$P/done.$n"; } &
        done
        wait
        is "$(cat "$P"/done.* | xargs)" mounted
        is "$(cat "$P"/said.* | grep -c 'already mounted on')" 5
        is "$(on "$M")" fuse.boxlite
        serves "$M"
        $B unmount "$M"
        is "$(on "$M")" ''"#,
    );
}

#[test]
fn a_session_that_fails_takes_its_own_mount_away_and_no_other() {
    let place = Place::new();
    for (covered, left) in [(false, ""), (true, "tmpfs")] {
        let cover = if covered {
            r#"exec 5<"$M/web/box.json"; umount -l "$M"; mount -t tmpfs tmpfs "$M""#
        } else {
            ""
        };
        // Each thread that reads requests from the kernel fails at some point; requests keep coming
        // until then.
        let script = format!(
            r#"
            strace -f -o /dev/null -P /dev/fuse -e trace=read -e inject=read:error=EIO:when=40+ \
                $B mount -f "$H" "$M" 2>"$P/log" &
            TRACED=$!
            until grep -q 'is mounted on' "$P/log"; do sleep 0.02; done
            exec 7<"$M"
            {cover}
            until is_gone $TRACED; do timeout 0.2 ls /proc/self/fd/7/web >/dev/null 2>&1 || :; done
            status=0
            wait $TRACED || status=$?
            is $status 1
            grep -q 'serving the mount failed' "$P/log"
            is "$(on "$M")" '{left}'"#
        );
        place.run(&script);
    }
}

#[test]
fn a_mount_in_the_background_whose_caller_is_killed_before_it_serves_takes_itself_away() {
    let place = Place::new();
    for (end, left) in [("", ""), ("mount -t tmpfs tmpfs $M", "tmpfs")] {
        let script = format!(
            r#"
            {end}
            strace -f -o "$P/trace" -e trace=setsid -e inject=setsid:signal=SIGSTOP \
                $B mount "$H" "$M" &
            TRACER=$!
            until CHILD=$(grep -o '^[0-9]* *--- stopped by SIGSTOP' "$P/trace" 2>/dev/null); do sleep 0.02; done
            CHILD=${{CHILD%% *}}
            kill -KILL "$(awk '/^PPid:/ {{ print $2 }}' "/proc/$CHILD/status")"
            kill -CONT $CHILD
            gone $CHILD
            is "$(on "$M")" '{left}'"#
        );
        place.run(&script);
    }
}

#[test]
fn a_mount_in_the_background_that_is_killed_before_it_serves_leaves_no_dead_mount() {
    let place = Place::new();
    // Killed at the first request it reads: the mount exists, but readiness has not been reported
    // yet.
    place.run(
        r#"
        fails 1 'ended without a report' strace -f -o /dev/null -P /dev/fuse -e trace=read \
            -e inject=read:signal=SIGKILL $B mount "$H" "$M"
        is "$(on "$M")" ''
        $B mount "$H" "$M"
        serves "$M"
        $B unmount "$M""#,
    );
}

#[test]
fn what_a_unit_runs_after_a_crash_unmounts_what_is_dead_and_nothing_else() {
    let place = Place::new();
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("mount-helper/systemd");
    for unit in ["boxlitefs.service", "boxlitefs@.service"] {
        let unit = fs::read_to_string(units.join(unit)).unwrap();
        let line = unit
            .lines()
            .find_map(|line| line.strip_prefix("ExecStopPost=-/usr/bin/boxlitefs "));
        let arguments = line.unwrap().replace("${MOUNTPOINT}", "\"$M\"");
        let script = format!(
            r#"
            after() {{ $B {arguments}; }}
            after
            $B mount "$H" "$M"
            exec 5<"$M/web/box.json"
            kill -KILL "$(server "$M")"
            after
            is "$(on "$M")" ''
            $B mount "$H" "$M"
            after
            serves "$M"
            mount -t tmpfs tmpfs "$M"
            after
            is "$(on "$M")" 'fuse.boxlite tmpfs'"#
        );
        place.run(&script);
    }
}

#[test]
fn a_dead_mount_is_told_from_an_earlier_one_that_had_its_number() {
    let place = Place::new();
    // The kernel reuses the number of a removed file system for the next one, even while the
    // process that served it still exists.
    place.run(
        r#"
        for try in $(seq 100); do
            $B mount "$H" "$M"
            OLD=$(server "$M")
            NUMBER=$(connection "$M")
            # Unlike closing a file, closing a directory does not wait for the server.
            exec 5<"$M/web"
            umount -l "$M"
            kill -STOP $OLD
            exec 5<&-
            $B mount "$H" "$M"
            [ "$(connection "$M")" != "$NUMBER" ] || break
            # Another test took the number first.
            $B unmount "$M"
            kill -CONT $OLD
            gone $OLD
        done
        is "$(connection "$M")" "$NUMBER"
        NEW=$(server "$M")
        kill -KILL $NEW
        gone $NEW
        $B unmount --dead "$M"
        is "$(on "$M")" ''
        $B mount "$H" "$M"
        serves "$M"
        $B unmount "$M"
        lives $OLD
        kill -CONT $OLD
        gone $OLD"#,
    );
}

// ---- boxlitefs unmount --------------------------------------------------------------------------

#[test]
fn an_unmount_says_which_process_has_the_mount_in_another_namespace() {
    let place = Place::new();
    place.run(
        r#"
        $B mount "$H" "$M"
        SERVER=$(server "$M")
        unshare --mount sleep 1000 &
        HOLDER=$!
        is_sleep $HOLDER
        fails 3 "unmounted here, but boxlitefs (pid $SERVER) still serves it: pid $HOLDER (sleep 1000) has it on $M" \
            $B unmount "$M"
        is "$(on "$M")" ''
        lives $SERVER
        fails 1 'nothing is mounted on' $B unmount "$M"
        # As the message says.
        nsenter --mount --target $HOLDER umount "$M"
        gone $SERVER"#,
    );
}

#[test]
fn an_unmount_says_where_else_it_is_mounted() {
    let place = Place::new();
    place.run(
        r#"
        $B mount "$H" "$M"
        SERVER=$(server "$M")
        mount --bind "$M" "$P/bound"
        fails 3 "boxlitefs (pid $SERVER) still serves it: it is also mounted on $P/bound" $B unmount "$M"
        is "$(on "$M")" ''
        serves "$P/bound"
        $B unmount "$P/bound"
        gone $SERVER
        # A file open in a lazily detached bind mount also keeps the server alive.
        $B mount "$H" "$M"
        SERVER=$(server "$M")
        mount --bind "$M" "$P/bound"
        sleep 1000 <"$P/bound/web/box.json" &
        HOLDER=$!
        is_sleep $HOLDER
        umount -l "$P/bound"
        fails 3 "open files, which are in use by pid $HOLDER (sleep 1000)" $B unmount "$M"
        kill $HOLDER
        gone $SERVER"#,
    );
}

#[test]
fn an_unmount_of_what_is_in_use_names_what_uses_it_and_changes_nothing() {
    let place = Place::new();
    for use_it in [
        r#"sleep 1000 <"$M/web/box.json" & is_sleep $!; NAMED="pid $! (sleep 1000)""#,
        r#"{ cd "$M/web"; exec sleep 1000; } & is_sleep $!; NAMED="pid $! (sleep 1000)""#,
        r#"NAMED=$(losetup --find --show -r "$M/web/disk.img"); trap 'losetup -d $NAMED' EXIT"#,
    ] {
        let script = format!(
            r#"
            $B mount "$H" "$M"
            SERVER=$(server "$M")
            {use_it}
            fails 1 "$M is in use by $NAMED: close" $B unmount "$M"
            serves "$M"
            is "$(server "$M")" $SERVER"#
        );
        place.run(&script);
    }
}

#[test]
fn an_unmount_by_another_name_says_which_mount_is_meant() {
    let place = Place::new();
    place.run(
        r#"
        $B mount "$H" "$M"
        fails 1 "is inside the mount on $M, and not a mount itself: unmount that with .boxlitefs unmount $M" $B unmount "$M/web"
        fails 1 "is a BoxLite home; it is mounted on $M: unmount it with .boxlitefs unmount $M" $B unmount "$H"
        fails 1 'is a mount of tmpfs, not of boxlitefs' $B unmount "$P/dev"
        fails 1 'nothing is mounted on' $B unmount "$P"
        # A mount inside it prevents the unmount, and a mount that covers it is not unmounted instead.
        mount -t tmpfs tmpfs "$M/web/snapshots"
        fails 1 "tmpfs is mounted on $M/web/snapshots, and would be unmounted" $B unmount "$M"
        umount "$M/web/snapshots"
        mount -t tmpfs tmpfs "$M"
        fails 1 'is a mount of tmpfs, not of boxlitefs' $B unmount "$M"
        umount "$M"
        serves "$M"
        ln -s "$M" "$P/link"
        $B unmount "$P/link"
        is "$(on "$M")" ''"#,
    );
}

#[test]
fn a_remount_is_of_boxlitefs_or_refused() {
    let place = Place::new();
    place.run(
        r#"
        $B mount "$H" "$M"
        mount -t tmpfs tmpfs "$M"
        fails 32 'is not a mount of boxlitefs' "$HELPER" "$H" "$M" -o remount,ro
        echo kept > "$M/file"
        umount "$M"
        fails 32 'is not a mount of boxlitefs' "$HELPER" "$H" "$M/web" -o remount,ro
        "$HELPER" "$H" "$M" -o remount,ro
        fails 1 'Read-only file system' mkdir "$M/web/snapshots/s"
        "$HELPER" "$H" "$M" -o remount,rw
        fails 32 "can't set exclusive" "$HELPER" "$H" "$M" -o remount,exclusive
        fails 32 "can't set bogus=1" "$HELPER" "$H" "$M" -o remount,bogus=1
        fails 32 "can't set compress=9" "$HELPER" "$H" "$M" -o remount,rw,compress=9
        "$HELPER" "$H" "$M" -o rw,nosuid,nodev,user_id=0,group_id=0,shared,compress=3,remount
        "$HELPER" "$H" "$M" -s -o remount,rw,bogus=1
        serves "$M"
        $B unmount "$M""#,
    );
}
