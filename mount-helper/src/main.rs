//! mount.boxlite, which mount(8) runs for file systems of type `boxlite`: `mount -t boxlite HOME
//! DIRECTORY` and lines in /etc/fstab work with it. It starts `boxlitefs mount`, which returns once
//! the mount serves.

#![forbid(unsafe_code)]

mod fixed_options;
mod owner;
mod remount;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use mount_helper::Request;

/// The exit statuses of mount(8), which its helpers share.
const INCORRECT_INVOCATION: u8 = 1;
const SYSTEM_ERROR: u8 = 2;
const MOUNT_FAILURE: u8 = 32;

/// The exit status of `boxlitefs` for a wrong command line.
const BOXLITEFS_USAGE: i32 = 2;

/// Where to search for programs when PATH is not set, as mount(8) leaves it.
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
    if let Some(read_only) = remount::requested(&request) {
        return remount::run(&request, read_only);
    }
    let Some(boxlitefs) = find_boxlitefs() else {
        let message = "boxlitefs is neither beside mount.boxlite nor in PATH: install it";
        return failed(message, SYSTEM_ERROR);
    };
    let mut command = command_for(&boxlitefs, &request);
    let owner = owner::other_owner(&request);
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
        // boxlitefs has printed why.
        Ok(status) if status.code() == Some(BOXLITEFS_USAGE) => {
            ExitCode::from(INCORRECT_INVOCATION)
        }
        Ok(_) => {
            if let Some(owner) = owner.filter(|owner| !owner.has(&request.directory)) {
                let directory = Path::new(&request.directory).display();
                let name = owner.name;
                return failed(
                    &format!(
                        "the home belongs to {name}, so it is mounted as {name}, who must own {directory}: `chown {name} {directory}`, or mount with allow_other"
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

/// Finds `boxlitefs`, beside this program or in PATH.
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
    use std::ffi::OsStr;

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
}
