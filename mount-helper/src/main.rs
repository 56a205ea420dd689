//! mount.boxlite: what mount(8) runs for file systems of type `boxlite`, so that `mount -t
//! boxlite HOME DIRECTORY` and lines in /etc/fstab work. It starts `boxlitefs mount`, which
//! returns once the mount serves.

#![forbid(unsafe_code)]

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use mount_helper::Request;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount_remount};

/// Exit statuses of mount(8) that its helpers share.
const INCORRECT_INVOCATION: u8 = 1;
const SYSTEM_ERROR: u8 = 2;
const MOUNT_FAILURE: u8 = 32;

/// What clap exits with, in `boxlitefs`, for a command line it can't make sense of.
const BOXLITEFS_USAGE: i32 = 2;

/// Where programs are when PATH is not set, as mount(8) leaves it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn main() -> ExitCode {
    let request = match Request::try_parse() {
        Ok(request) => request,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(INCORRECT_INVOCATION)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    if let Some(read_only) = remount(&request) {
        return run_remount(&request, read_only);
    }
    let Some(boxlitefs) = find_boxlitefs() else {
        let message = "boxlitefs is neither beside mount.boxlite nor in PATH: install it";
        return failed(message, SYSTEM_ERROR);
    };
    let mut command = command_for(&boxlitefs, &request);
    let owner = other_owner(&request);
    if let Some(owner) = &owner {
        owner.becomes(&mut command);
    }
    if request.verbose {
        let who = owner.as_ref().map(|owner| format!(" (as {})", owner.name));
        println!("mount.boxlite: {command:?}{}", who.unwrap_or_default());
    }
    if request.fake {
        return ExitCode::SUCCESS;
    }
    match command.status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        // boxlitefs has said why.
        Ok(status) if status.code() == Some(BOXLITEFS_USAGE) => {
            ExitCode::from(INCORRECT_INVOCATION)
        }
        Ok(_) => {
            if let Some(owner) = owner.filter(|owner| !owner.has(&request.directory)) {
                let directory = Path::new(&request.directory).display();
                let name = owner.name;
                return failed(
                    &format!(
                        "the home belongs to {name}, so it is mounted as {name}, to whom {directory} has to belong: `chown {name} {directory}`, or mount with allow_other"
                    ),
                    MOUNT_FAILURE,
                );
            }
            ExitCode::from(MOUNT_FAILURE)
        }
        Err(error) => failed(
            &format!("cannot run {}: {error}", boxlitefs.display()),
            SYSTEM_ERROR,
        ),
    }
}

fn failed(message: &str, status: u8) -> ExitCode {
    eprintln!("mount.boxlite: {message}");
    ExitCode::from(status)
}

fn command_for(program: &Path, request: &Request) -> Command {
    let mut command = Command::new(program);
    command.arg("mount");
    if request.sloppy {
        command.arg("--sloppy");
    }
    for options in &request.options {
        // Attached with "=", options that begin with a dash stay options.
        let mut argument = OsString::from("-o=");
        argument.push(options);
        command.arg(argument);
    }
    command.arg("--").arg(&request.home).arg(&request.directory);
    command
}

// ---- whose mount it is --------------------------------------------------------------------------

/// The user to whom a home belongs.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    name: String,
    uid: u32,
    gid: u32,
    /// His own home directory.
    home: Option<OsString>,
}

/// The owner of the home, if root mounts it and it is another's: then the mount is to be his, for only
/// who mounts gets in. Who lets others in may do so as root.
fn other_owner(request: &Request) -> Option<Owner> {
    let lets_in = |option: &str| matches!(option, "allow_other" | "allow_root");
    if !rustix::process::geteuid().is_root() || request.each_option().any(lets_in) {
        return None;
    }
    let meta = fs::metadata(&request.home).ok()?;
    if meta.uid() == 0 {
        return None;
    }
    Some(Owner::of(meta.uid()).unwrap_or_else(|| Owner {
        name: format!("user {}", meta.uid()),
        uid: meta.uid(),
        gid: meta.gid(),
        home: None,
    }))
}

impl Owner {
    /// As the user database has him, which getent reads wherever it is kept.
    fn of(uid: u32) -> Option<Owner> {
        let output = Command::new("getent")
            .args(["passwd", &uid.to_string()])
            .output()
            .ok()?;
        Owner::from_line(&String::from_utf8(output.stdout).ok()?, uid)
    }

    /// `name:password:uid:gid:comment:home:shell`.
    fn from_line(line: &str, uid: u32) -> Option<Owner> {
        let mut fields = line.lines().next()?.split(':');
        let name = fields.next()?.to_owned();
        if fields.nth(1)?.parse() != Ok(uid) {
            return None;
        }
        let gid = fields.next()?.parse().ok()?;
        Some(Owner {
            name,
            uid,
            gid,
            home: fields.nth(1).map(OsString::from),
        })
    }

    /// Whether he may mount on a directory.
    fn has(&self, directory: &OsStr) -> bool {
        fs::metadata(directory).is_ok_and(|meta| meta.uid() == self.uid)
    }

    /// Has a command run as him, without the groups of root.
    fn becomes(&self, command: &mut Command) {
        command.uid(self.uid).gid(self.gid);
        command.env("USER", &self.name).env("LOGNAME", &self.name);
        match &self.home {
            Some(home) => command.env("HOME", home),
            None => command.env_remove("HOME"),
        };
    }
}

// ---- remount ------------------------------------------------------------------------------------

/// Whether a remount is asked for, and if so, whether read-only.
fn remount(request: &Request) -> Option<bool> {
    let mut is_asked = false;
    let mut read_only = false;
    for option in request.each_option() {
        match option {
            "remount" => is_asked = true,
            "ro" => read_only = true,
            "rw" => read_only = false,
            _ => {}
        }
    }
    is_asked.then_some(read_only)
}

/// Has the kernel refuse changes from now on, or let them through again. The process that serves goes by
/// what the kernel has.
fn run_remount(request: &Request, read_only: bool) -> ExitCode {
    let shown = Path::new(&request.directory).display();
    let mount = match mount_on(&request.directory) {
        Ok(Some(mount)) => mount,
        Ok(None) => {
            let message = format!("{shown} is not a mount of boxlitefs: nothing was remounted");
            return failed(&message, MOUNT_FAILURE);
        }
        Err(error) => return failed(&format!("cannot reach {shown}: {error}"), MOUNT_FAILURE),
    };
    // Leads to this mount, also if another comes over it now.
    let place = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    let mounted_read_only = || {
        let status = fs::read_to_string(place.join(".boxlite/status")).unwrap_or_default();
        status.contains("\"ro\": true")
    };
    if !read_only && mounted_read_only() {
        let message = format!(
            "{shown} was mounted with ro, and what serves it opened the home only for reading: unmount it, and mount it without ro"
        );
        return failed(&message, MOUNT_FAILURE);
    }
    let flags = remount_flags(request, read_only);
    if request.verbose {
        println!("mount.boxlite: remount {shown} with {flags:?}");
    }
    if request.fake {
        return ExitCode::SUCCESS;
    }
    match mount_remount(&place, flags, "") {
        Ok(()) => ExitCode::SUCCESS,
        Err(Errno::PERM) => failed(
            &format!("only root can remount {shown}: unmount it, and mount it with other options"),
            MOUNT_FAILURE,
        ),
        Err(Errno::BUSY) => failed(
            &format!("{shown} is being written to: try again when that is done"),
            MOUNT_FAILURE,
        ),
        Err(error) => failed(&format!("cannot remount {shown}: {error}"), MOUNT_FAILURE),
    }
}

/// The mount of boxlitefs on a directory. None when what is mounted there is something else, or nothing: it
/// would get the flags that are meant for ours.
fn mount_on(directory: &OsStr) -> io::Result<Option<OwnedFd>> {
    let mount = open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", mount.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    let table = fs::read("/proc/self/mountinfo")?;
    let path = fs::canonicalize(directory)?;
    let is_ours = number.is_some_and(|number| is_ours(&table, number.trim(), &path));
    Ok(is_ours.then_some(mount))
}

/// Whether the mount with this number in a table, as /proc/PID/mountinfo has it, is one of boxlitefs that is
/// mounted on this path, and not around it.
fn is_ours(table: &[u8], number: &str, path: &Path) -> bool {
    let table = String::from_utf8_lossy(table);
    let line = table
        .lines()
        .find(|line| line.split(' ').next() == Some(number));
    line.is_some_and(|line| {
        let mountpoint = line.split(' ').nth(4).unwrap_or_default();
        let escaped = path.to_string_lossy().replace('\\', "\\134");
        let escaped = escaped.replace(' ', "\\040").replace('\t', "\\011");
        let escaped = escaped.replace('\n', "\\012").replace('#', "\\043");
        line.contains(" - fuse.boxlite ") && mountpoint == escaped
    })
}

/// A remount sets all flags anew: those that are always on, and those that are asked for. mount(8) brings
/// along what the mount had.
fn remount_flags(request: &Request, read_only: bool) -> MountFlags {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, read_only);
    for option in request.each_option() {
        match option {
            "noexec" => flags.insert(MountFlags::NOEXEC),
            "exec" => flags.remove(MountFlags::NOEXEC),
            "noatime" => flags.insert(MountFlags::NOATIME),
            "atime" => flags.remove(MountFlags::NOATIME),
            "relatime" => flags.insert(MountFlags::RELATIME),
            _ => {}
        }
    }
    flags
}

// ---- boxlitefs ----------------------------------------------------------------------------------

/// `boxlitefs`, beside this program or in PATH.
fn find_boxlitefs() -> Option<PathBuf> {
    let here = fs::read_link("/proc/self/exe").ok();
    let beside = here.as_deref().and_then(Path::parent).map(Path::to_owned);
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    beside
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|directory| directory.join("boxlitefs"))
        .find(|program| is_executable(program))
}

fn is_executable(program: &Path) -> bool {
    const ANY_EXECUTE: u32 = 0o111;
    fs::metadata(program)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & ANY_EXECUTE != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Request {
        let words = std::iter::once("mount.boxlite").chain(line.split_whitespace());
        Request::try_parse_from(words).unwrap()
    }

    #[test]
    fn the_command_keeps_places_and_options_apart() {
        let request = parsed("-s -o ro -- -h /mnt/b");
        let command = command_for(Path::new("/bin/boxlitefs"), &request);
        let arguments: Vec<&OsStr> = command.get_args().collect();
        assert_eq!(
            arguments,
            ["mount", "--sloppy", "-o=ro", "--", "-h", "/mnt/b"]
        );
    }

    #[test]
    fn a_remount_is_told_from_a_mount_and_keeps_what_is_always_on() {
        assert_eq!(remount(&parsed("a b -o ro")), None);
        assert_eq!(remount(&parsed("a b -o remount,ro")), Some(true));
        assert_eq!(remount(&parsed("a b -o rw,ro,remount,rw")), Some(false));
        let flags = remount_flags(&parsed("a b -o remount,noexec,noatime,exec"), true);
        let wanted = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY;
        assert_eq!(flags, wanted | MountFlags::NOATIME);
    }

    #[test]
    fn what_is_remounted_is_a_mount_of_boxlitefs_on_that_very_directory() {
        let table = b"40 28 0:51 / /mnt/my\\040boxes rw - fuse.boxlite /h rw\n\
            41 40 0:52 / /mnt/my\\040boxes rw - tmpfs tmpfs rw\n";
        let is_ours = |number, path| is_ours(table, number, Path::new(path));
        assert!(is_ours("40", "/mnt/my boxes"));
        assert!(!is_ours("41", "/mnt/my boxes"));
        assert!(!is_ours("40", "/mnt/my boxes/web"));
        assert!(!is_ours("4", "/mnt/my boxes"));
    }

    #[test]
    fn an_owner_is_read_from_the_user_database_and_only_the_right_one() {
        let line = "alice:x:1000:1001:Alice,,,:/home/alice:/bin/bash\n";
        let owner = Owner::from_line(line, 1000).unwrap();
        assert_eq!(
            (owner.name.as_str(), owner.uid, owner.gid),
            ("alice", 1000, 1001)
        );
        assert_eq!(owner.home, Some("/home/alice".into()));
        assert_eq!(Owner::from_line(line, 1001), None);
        assert_eq!(Owner::from_line("", 1000), None);
    }
}
