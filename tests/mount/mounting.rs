//! mount(8), umount(8), findmnt(8) and /etc/fstab with mount.boxlite installed where they look for
//! it. Each test gets a machine of its own, made from this one with namespaces that end with the
//! test. Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::*;

/// A user that exists on every system and owns nothing.
const USER: &str = "nobody";

/// Installs boxlitefs and uses $FSTAB as /etc/fstab. All processes and mounts end with the shell.
const INSTALLED: &str = r#"
set -eu
cp -a /usr/sbin "$PLACE/sbin"
cp "$BOXLITEFS" "$PLACE/sbin/boxlitefs"
cp "$MOUNT_BOXLITE" "$PLACE/sbin/mount.boxlite"
ln -sf mount.boxlite "$PLACE/sbin/mount.fuse.boxlite"
cp -a /etc "$PLACE/etc"
printf '%s\n' "$FSTAB" > "$PLACE/etc/fstab"
mkdir "$PLACE/dev"
mount -t tmpfs tmpfs "$PLACE/dev"
mknod -m 666 "$PLACE/dev/fuse" c 10 229
mount --bind "$PLACE/dev/fuse" /dev/fuse
mount --bind "$PLACE/sbin" /usr/sbin
mount --bind "$PLACE/etc" /etc
as_user() { setpriv --reuid="$USER" --regid="$(id -g "$USER")" --clear-groups -- "$@"; }
options_of() { findmnt -n -o OPTIONS "$1"; }
"#;

/// A home with the box `web`, a mountpoint, and the machine.
struct Machine {
    home: TestHome,
}

impl Machine {
    fn new() -> Machine {
        let home = TestHome::new();
        let place = home.beside("");
        // Another user has to be able to enter.
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        Machine { home }
    }

    /// Gives the home, the mountpoint or both to the user.
    fn give(&self, what: &[&str]) {
        for name in what {
            let path = self.home.beside(name);
            succeed(&["chown", "-R", USER, text(&path)]);
        }
    }

    /// Runs a script with the machine's /etc/fstab; $HOME_DIR is the home and $MNT the mountpoint.
    fn run(&self, fstab: &str, script: &str) -> Output {
        let place = tempfile::tempdir_in(self.home.beside("")).unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (home, mnt) = (self.home.root(), self.home.beside("mnt"));
        let fstab = fstab
            .replace("HOME_DIR", text(home))
            .replace("MNT", text(&mnt));
        Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
            .args([
                "bash",
                "-c",
                &format!("{LEAVE_OTHER_MOUNTS}{INSTALLED}{script}"),
            ])
            .env("PLACE", place.path())
            .env("BOXLITEFS", binary())
            .env(
                "MOUNT_BOXLITE",
                Path::new(binary()).with_file_name("mount-boxlite"),
            )
            .env("FSTAB", fstab)
            .env("USER", USER)
            .env("HOME_DIR", home)
            .env("MNT", &mnt)
            .env_remove("BOXLITE_HOME")
            .output()
            .expect("unshare")
    }

    /// Runs a script that must succeed and returns its output.
    fn succeed(&self, fstab: &str, script: &str) -> String {
        let output = self.run(fstab, script);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{script}: {}\n{said}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        said
    }
}

#[test]
fn both_types_mount_show_the_home_as_their_source_and_are_unmounted() {
    let machine = Machine::new();
    for kind in ["boxlite", "fuse.boxlite"] {
        let script = r#"
            mount -t KIND "$HOME_DIR" "$MNT" -o noatime,compress=5
            test "$(ls "$MNT")" = web
            test "$(findmnt -n -o SOURCE "$MNT")" = "$HOME_DIR"
            test "$(findmnt -n -o FSTYPE "$MNT")" = fuse.boxlite
            findmnt -n -t fuse.boxlite "$MNT" >/dev/null
            options_of "$MNT"
            mkdir "$MNT/web/snapshots/s" && rmdir "$MNT/web/snapshots/s"
            umount "$MNT"
            test -z "$(ls "$MNT")"
            mount -t KIND -r "$HOME_DIR" "$MNT"
            ! mkdir "$MNT/web/snapshots/s" 2>"$PLACE/said"
            grep -q 'Read-only file system' "$PLACE/said"
            umount "$MNT""#;
        let options = machine.succeed("", &script.replace("KIND", kind));
        for option in ["nosuid", "nodev", "noatime"] {
            assert!(options.contains(option), "{kind}: {options}");
        }
    }
}

#[test]
fn the_examples_of_its_help_work() {
    let helper = Path::new(binary()).with_file_name("mount-boxlite");
    let help = succeed(&[text(&helper), "--help"]);
    let lines = help.lines().filter(|line| line.starts_with("  "));
    let is_ours = |line: &&str| line.contains("boxlite") && !line.contains("--");
    let (commands, fstab): (Vec<_>, Vec<_>) = lines
        .map(str::trim)
        .filter(is_ours)
        .filter(|line| line.starts_with(['/', 'm', 'u']) && !line.starts_with("mount."))
        .partition(|line| !line.starts_with('/'));
    assert_eq!((commands.len(), fstab.len()), (4, 2), "{help}");
    let machine = Machine::new();
    let mut script = String::new();
    for command in commands {
        let command = command
            .replace("/srv/boxlite-home", "\"$HOME_DIR\"")
            .replace("/mnt/boxlite", "\"$MNT\"");
        if command.contains(" -t ") {
            script += "umount \"$MNT\" 2>/dev/null || true\n";
        }
        script += &format!("{command}\n");
    }
    machine.succeed("", &script);
    for line in fstab {
        let places = line.split_whitespace().skip(2).collect::<Vec<_>>();
        let line = format!("HOME_DIR MNT {}", places.join(" "));
        machine.succeed(
            &line,
            "mount \"$MNT\"; test \"$(ls \"$MNT\")\" = web; umount \"$MNT\"",
        );
    }
}

#[test]
fn lines_in_fstab_are_mounted_by_mount_all_once_and_by_their_mountpoint() {
    let machine = Machine::new();
    let fstab = "HOME_DIR  MNT  boxlite  nofail,_netdev,allow_other,x-systemd.automount,x-systemd.idle-timeout=60,x-gvfs-name=Boxes,compact=off  0  0";
    let script = r#"
        mount -a
        mount -a
        test "$(findmnt -n -o TARGET "$MNT" | wc -l)" = 1
        as_user ls "$MNT"
        umount "$MNT"
        mount "$MNT"
        ls "$MNT"
        umount "$MNT"
        test -z "$(ls "$MNT")""#;
    assert_eq!(machine.succeed(fstab, script), "web\nweb\n");
}

#[test]
fn a_line_for_a_user_is_left_alone_by_mount_all_and_mounted_and_unmounted_by_him_only() {
    let machine = Machine::new();
    machine.give(&["home", "mnt"]);
    let fstab = "HOME_DIR  MNT  boxlite  user,noauto  0  0";
    let script = r#"
        mount -a
        test -z "$(ls "$MNT")"
        as_user mount "$MNT"
        as_user ls "$MNT"
        options_of "$MNT"
        ! setpriv --reuid=daemon --regid=1 --clear-groups -- umount "$MNT" 2>/dev/null
        findmnt -n "$MNT" >/dev/null
        as_user umount "$MNT"
        ! findmnt -n "$MNT""#;
    let said = machine.succeed(fstab, script);
    assert!(said.starts_with("web\n"), "{said}");
    for option in ["nosuid", "nodev", "noexec"] {
        assert!(said.contains(option), "{option} goes with user: {said}");
    }
}

#[test]
fn a_remount_makes_a_mount_read_only_and_writable_again_while_it_is_read() {
    let machine = Machine::new();
    let script = r#"
        mount -t boxlite -o noexec "$HOME_DIR" "$MNT"
        exec 5<"$MNT/web/export.boxlite"
        mount -o remount,ro "$MNT"
        ! mkdir "$MNT/web/snapshots/s" 2>"$PLACE/said"
        grep -q 'Read-only file system' "$PLACE/said"
        options_of "$MNT"
        cat <&5 | tar -t
        exec 5<&-
        mount -o remount,rw "$MNT"
        mkdir "$MNT/web/snapshots/s"
        options_of "$MNT"
        umount "$MNT"
        # A home mounted with ro cannot be remounted writable.
        mount -t boxlite -o ro "$HOME_DIR" "$MNT"
        status=0
        mount -o remount,rw "$MNT" 2>"$PLACE/said" || status=$?
        cat "$PLACE/said" >&2
        test "$status" = 32
        grep -q 'unmount it, and mount it without ro' "$PLACE/said"
        ! mkdir "$MNT/web/snapshots/t" 2>/dev/null"#;
    let said = machine.succeed("", script);
    let lines: Vec<&str> = said.lines().collect();
    let [read_only, disk, manifest, writable] = lines.as_slice() else {
        panic!("{said}");
    };
    assert_eq!((*disk, *manifest), ("disk.qcow2", "manifest.json"));
    assert!(read_only.starts_with("ro,"), "{read_only}");
    assert!(writable.starts_with("rw,"), "{writable}");
    for option in ["nosuid", "nodev", "noexec"] {
        assert!(
            read_only.contains(option) && writable.contains(option),
            "{said}"
        );
    }
}

#[test]
fn exit_statuses_and_messages_are_those_of_mount() {
    let machine = Machine::new();
    let script = r#"
        fails() { # STATUS WORDS COMMAND…
            local wanted=$1 words=$2 status=0
            shift 2
            "$@" >"$PLACE/said" 2>&1 || status=$?
            if [ "$status" != "$wanted" ] || ! printf "%s\n" "$(cat "$PLACE/said")" | grep -q -- "$words"; then
                echo "$*: $status instead of $wanted, without '$words':"
                cat "$PLACE/said"
                exit 1
            fi
        }
        fails 1 Usage mount.boxlite
        fails 1 Usage mount.boxlite "$HOME_DIR" "$MNT" --nonsense
        fails 0 'Exit status' mount.boxlite --help
        fails 0 mount.boxlite mount.boxlite --version
        fails 32 'colour=blue' mount -t boxlite -o colour=blue "$HOME_DIR" "$MNT"
        fails 32 'there is no BoxLite home' mount -t boxlite "$PLACE/none" "$MNT"
        fails 32 'does not exist' mount -t boxlite "$HOME_DIR" "$PLACE/none"
        fails 0 '' mount -f -t boxlite "$HOME_DIR" "$MNT"
        ! findmnt -n "$MNT"
        fails 0 '' mount -s -t boxlite -o colour=blue "$HOME_DIR" "$MNT"
        fails 32 'already mounted' mount.boxlite "$HOME_DIR" "$MNT"
        fails 0 '' mount.boxlite "$HOME_DIR" "$MNT" -o remount,ro
        umount "$MNT"
        mv "$PLACE/sbin/boxlitefs" "$PLACE/boxlitefs"
        fails 2 'install it' mount.boxlite "$HOME_DIR" "$MNT""#;
    machine.succeed("", script);
}

#[test]
fn root_mounts_another_users_home_as_that_user_unless_others_are_let_in() {
    let machine = Machine::new();
    machine.give(&["home", "mnt"]);
    let script = r#"
        id=$(id -u "$USER")
        mount -t boxlite "$HOME_DIR" "$MNT"
        case $(options_of "$MNT") in *user_id=$id,*) ;; *) exit 1;; esac
        as_user ls "$MNT"
        ! ls "$MNT" 2>/dev/null
        as_user mkdir "$MNT/web/snapshots/s"
        test "$(stat -c %U "$HOME_DIR"/boxes/*/snapshots/.[!.]* | sort -u)" = "$USER"
        umount "$MNT"
        mount -t boxlite -o allow_other "$HOME_DIR" "$MNT"
        case $(options_of "$MNT") in *user_id=0,*) ;; *) exit 1;; esac
        as_user mkdir "$MNT/web/snapshots/t"
        ls "$MNT/web/snapshots"
        test "$(stat -c %U "$HOME_DIR"/boxes/*/snapshots/.[!.]* | sort -u)" = "$USER"
        umount "$MNT"
        # The user who serves the mount must own the mountpoint.
        chown root "$MNT"
        status=0
        mount -t boxlite "$HOME_DIR" "$MNT" 2>"$PLACE/said" || status=$?
        test "$status" = 32
        grep -q "chown $USER" "$PLACE/said""#;
    assert_eq!(machine.succeed("", script), "web\ns\nt\n");
}
