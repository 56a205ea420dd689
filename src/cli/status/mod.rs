//! `boxlitefs status`: shows `.boxlite/status` of mounts to people.

mod file;
mod text;
mod watch;

use std::path::Path;

use super::arguments::StatusArguments;
use super::output::print;
use super::place::mount_of;
use crate::mount;
use crate::{Error, Result};
use watch::watch;

/// Prints the status of one mount, or of all.
///
/// # Errors
/// EINVAL when nothing is mounted there, ENOENT when nothing is mounted anywhere, EIO when a mount
/// does not answer as boxlitefs does.
pub(super) fn run(arguments: &StatusArguments) -> Result<()> {
    if let Some(place) = &arguments.mountpoint {
        let place = &mount_of(place)?;
        return if arguments.watch {
            watch(place)
        } else {
            print(&shown(place, file::read_text(place)?, arguments.json)?)
        };
    }
    let places = mount::mountpoints()?;
    match &*places {
        [] => {
            let message =
                "boxlitefs is not mounted anywhere: `boxlitefs mount DIRECTORY` mounts it";
            Err(Error::new(libc::ENOENT, message))
        }
        [place] if arguments.watch => watch(place),
        _ if arguments.watch => Err(Error::new(
            libc::EINVAL,
            "there are several mounts: name the one to watch",
        )),
        _ => {
            // Some may be other users', stopped, or gone meanwhile. That is an error only if all
            // are.
            let show = |place| print(&shown(place, file::ask(place)?, arguments.json)?);
            let (shown, failed): (Vec<_>, Vec<_>) = places
                .iter()
                .map(|place| show(place))
                .partition(Result::is_ok);
            let hidden = failed.into_iter().filter_map(Result::err);
            if shown.is_empty() {
                return hidden.last().map_or(Ok(()), Err);
            }
            hidden.for_each(|error| eprintln!("boxlitefs: {error}"));
            Ok(())
        }
    }
}

/// Returns a status as it is printed: as it is in the file, or for people.
fn shown(place: &Path, status: String, as_json: bool) -> Result<String> {
    if as_json {
        return Ok(status);
    }
    Ok(text::describe(&file::parse(place, &status)?))
}
