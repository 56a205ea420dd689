//! mount.boxlite: what mount(8) runs for file systems of type `boxlite`, so that `mount -t
//! boxlite HOME DIRECTORY` and lines in /etc/fstab work. It starts `boxlitefs mount`, which
//! returns once the mount serves.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str =
    "usage: mount.boxlite HOME DIRECTORY [-sfnv] [-N NAMESPACE] [-t TYPE] [-o OPTION[,OPTION…]]

Mounts the BoxLite home HOME on DIRECTORY; meant to be called by mount(8):
  mount -t boxlite /srv/boxlite-home /mnt/boxlite
or by a line in /etc/fstab:
  /srv/boxlite-home  /mnt/boxlite  boxlite  nofail  0  0";

/// Exit statuses of mount(8) that its helpers share.
const INCORRECT_INVOCATION: u8 = 1;
const SYSTEM_ERROR: u8 = 2;
const MOUNT_FAILURE: u8 = 32;

/// What clap exits with, in `boxlitefs`, for a command line it can't make sense of.
const BOXLITEFS_USAGE: i32 = 2;

/// Where programs are when PATH is not set, as in a bare boot environment.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The command line, as mount(8) describes it under "external helpers".
#[derive(Debug, Default, PartialEq, Eq)]
struct Request {
    /// Home and directory.
    places: Vec<OsString>,
    options: Vec<OsString>,
    /// -s: ignore options that are not known.
    sloppy: bool,
    /// -f: do everything but the mount.
    fake: bool,
    /// -v: say what is run.
    verbose: bool,
    help: bool,
    version: bool,
}

fn main() -> ExitCode {
    let request = match parse(env::args_os().skip(1)) {
        Ok(request) => request,
        Err(sentence) => return failed(&format!("{sentence}\n{USAGE}"), INCORRECT_INVOCATION),
    };
    if request.help {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if request.version {
        println!("mount.boxlite {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let [home, directory] = request.places.as_slice() else {
        let sentence = format!("HOME and DIRECTORY are needed, nothing else\n{USAGE}");
        return failed(&sentence, INCORRECT_INVOCATION);
    };
    let Some(boxlitefs) = find_boxlitefs() else {
        let sentence = "boxlitefs is neither beside mount.boxlite nor in PATH: install it";
        return failed(sentence, SYSTEM_ERROR);
    };
    let mut command = command_for(&boxlitefs, &request, home, directory);
    if request.verbose {
        println!("mount.boxlite: {command:?}");
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
        Ok(_) => ExitCode::from(MOUNT_FAILURE),
        Err(error) => failed(
            &format!("cannot run {}: {error}", boxlitefs.display()),
            SYSTEM_ERROR,
        ),
    }
}

fn failed(sentence: &str, status: u8) -> ExitCode {
    eprintln!("mount.boxlite: {sentence}");
    ExitCode::from(status)
}

/// Options may come before, between and after the two places, clustered (`-sn`) and with their
/// value attached (`-oro`).
fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Request, String> {
    let mut request = Request::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_bytes() {
            b"--help" => request.help = true,
            b"--version" => request.version = true,
            b"--" => request.places.extend(arguments.by_ref()),
            [b'-', first, ..] if *first != b'-' => {
                parse_cluster(&argument, &mut arguments, &mut request)?;
            }
            [b'-', b'-', ..] => return Err(format!("the option {argument:?} is not known")),
            _ => request.places.push(argument),
        }
    }
    Ok(request)
}

fn parse_cluster(
    argument: &OsStr,
    rest: &mut impl Iterator<Item = OsString>,
    request: &mut Request,
) -> Result<(), String> {
    let letters = argument.as_bytes().get(1..).unwrap_or_default();
    for (position, letter) in letters.iter().enumerate() {
        match letter {
            b's' => request.sloppy = true,
            b'f' => request.fake = true,
            b'v' => request.verbose = true,
            // There is no mtab to keep out of.
            b'n' => {}
            b'h' => request.help = true,
            b'V' => request.version = true,
            b'o' | b't' | b'N' => {
                let attached = letters
                    .get(position.saturating_add(1)..)
                    .unwrap_or_default();
                let value = match attached {
                    [] => rest.next(),
                    attached => Some(OsStr::from_bytes(attached).to_owned()),
                };
                let value = value
                    .ok_or_else(|| format!("the option -{} needs a value", char::from(*letter)))?;
                // The type is known, and mount(8) has entered the namespace already.
                if *letter == b'o' {
                    request.options.push(value);
                }
                return Ok(());
            }
            _ => return Err(format!("the option {argument:?} is not known")),
        }
    }
    Ok(())
}

fn command_for(program: &Path, request: &Request, home: &OsStr, directory: &OsStr) -> Command {
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
    command.arg("--").arg(home).arg(directory);
    command
}

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

    fn parsed(line: &str) -> Result<Request, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_mount_passes_is_understood() {
        let request = parsed("/home/u/.boxlite /mnt/b -sfnv -N /proc/1/ns -o rw,user -t boxlite");
        let request = request.unwrap();
        assert_eq!(request.places, ["/home/u/.boxlite", "/mnt/b"]);
        assert_eq!(request.options, ["rw,user"]);
        assert!(request.sloppy && request.fake && request.verbose);
    }

    #[test]
    fn options_may_come_first_and_have_their_value_attached() {
        let request = parsed("-noro -o noexec -- -odd /mnt/b").unwrap();
        assert_eq!(request.options, ["ro", "noexec"]);
        assert_eq!(request.places, ["-odd", "/mnt/b"]);
    }

    #[test]
    fn an_unknown_option_and_a_missing_value_are_refused() {
        assert!(parsed("a b -x").is_err());
        assert!(parsed("a b --sloppy").is_err());
        assert!(parsed("a b -o").is_err());
    }

    #[test]
    fn the_command_keeps_places_and_options_apart() {
        let request = parsed("-s -o ro -- -h /mnt/b").unwrap();
        let [home, directory] = request.places.as_slice() else {
            panic!("two places expected");
        };
        let command = command_for(Path::new("/bin/boxlitefs"), &request, home, directory);
        let arguments: Vec<&OsStr> = command.get_args().collect();
        assert_eq!(
            arguments,
            ["mount", "--sloppy", "-o=ro", "--", "-h", "/mnt/b"]
        );
    }
}
