//! `boxlitefs why`: says why a mount refused something lately.

use std::path::{Path, PathBuf};

use rustix::fs::{StatVfsMountFlags, getxattr, statvfs};
use rustix::io::Errno;
use serde_json::Value;

use super::output::print;
use super::place::mount_of;
use crate::tree::{REFUSALS, REFUSALS_OF_ALL};
use crate::{Error, Result, mount};

/// The most bytes that an extended attribute has.
const LONGEST: usize = 64 << 10;

/// Prints the last refusals of the caller, or of everybody, the newest last.
///
/// # Errors
/// EINVAL when no mount is named and there are several, or the place is in none; ENOENT when there
/// is none; EACCES when the mount is another user's.
pub(super) fn run(place: Option<&Path>, all: bool, as_json: bool) -> Result<()> {
    if all && !rustix::process::geteuid().is_root() {
        return Err(Error::new(
            libc::EPERM,
            "only root sees the refusals of all users: leave out --all, or use sudo",
        ));
    }
    let mountpoint = mount_to_ask(place)?;
    let refusals = refusals_in(&mountpoint, all)?;
    if as_json {
        return print(&format!("{:#}\n", Value::from(refusals)));
    }
    if refusals.is_empty() {
        let shown = mountpoint.display();
        let is_read_only = statvfs(&mountpoint)
            .is_ok_and(|found| found.f_flag.contains(StatVfsMountFlags::RDONLY));
        let why = if is_read_only {
            "; it is mounted read-only, so the kernel refuses every change by itself"
        } else {
            ""
        };
        return print(&format!(
            "{shown}: nothing was refused since it was mounted{why}\n"
        ));
    }
    print(
        &refusals
            .iter()
            .map(|it| line_of(it, all))
            .collect::<String>(),
    )
}

/// Returns the mount that a place is in, or that of a home. Without a place, the mount that the
/// working directory is in, else the only one.
fn mount_to_ask(place: Option<&Path>) -> Result<PathBuf> {
    if let Some(place) = place {
        return mount_of(place);
    }
    let here = std::env::current_dir().ok();
    if let Some(mountpoint) = here.and_then(|here| mount_of(&here).ok()) {
        return Ok(mountpoint);
    }
    match &*mount::mountpoints()? {
        [only] => Ok(only.clone()),
        [] => Err(Error::new(
            libc::ENOENT,
            "boxlitefs is not mounted anywhere: `boxlitefs mount DIRECTORY` mounts it",
        )),
        several => {
            let shown = several.iter().map(|place| place.display().to_string());
            let shown: Vec<String> = shown.collect();
            Err(Error::new(
                libc::EINVAL,
                format!("there are several mounts: name one of {}", shown.join(", ")),
            ))
        }
    }
}

fn refusals_in(mountpoint: &Path, all: bool) -> Result<Vec<Value>> {
    let shown = mountpoint.display();
    let name = if all { REFUSALS_OF_ALL } else { REFUSALS };
    let mut buffer = vec![0; LONGEST];
    let length = getxattr(mountpoint, name, &mut buffer[..]).map_err(|error| match error {
        Errno::NODATA | Errno::OPNOTSUPP => Error::new(
            libc::ENODATA,
            format!(
                "the mount on {shown} is served by an older boxlitefs, which remembers no refusals; unmount it and mount it again"
            ),
        ),
        Errno::ACCESS => Error::io(
            format!("the mount on {shown} belongs to another user, and only that user may use it"),
            error.into(),
        ),
        _ => Error::io(format!("the mount on {shown} does not answer"), error.into()),
    })?;
    let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
    let parse = |line: &str| {
        serde_json::from_str(line).map_err(|error| {
            Error::damaged(format!(
                "the answer of the mount on {shown} is not JSON: {error}"
            ))
        })
    };
    text.lines().map(parse).collect()
}

fn line_of(refusal: &Value, all: bool) -> String {
    let text = |name: &str| {
        let text = refusal[name].as_str();
        // A name can't begin another line.
        text.map(|text| text.escape_debug().to_string().replace("\\'", "'"))
    };
    let part = |name: &str| text(name).unwrap_or_default();
    let mut what = format!("{} {}", part("operation"), part("path"));
    if let Some(target) = text("target") {
        what += &format!(" to {target}");
    }
    if let Some(program) = text("program") {
        what += &format!(" by {program}");
    }
    if all {
        what += &format!(" of uid {}", refusal["uid"]);
    }
    if let Some(times @ 2..) = refusal["times"].as_u64() {
        what += &format!(", {times} times");
    }
    let (time, errno) = (part("time"), part("errno"));
    format!("{time} {what}: {errno}\n    {}\n", part("message"))
}
