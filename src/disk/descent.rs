//! The way down a backing chain, from header to header, within limits.

use super::file::open_image;
use super::{FileId, Format, Header};
use crate::{Context, Error, Result};
use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// The most layers of a chain: far more than libkrun starts (9), and few enough to be harmless.
const MAX_LAYERS: usize = 64;

/// Where the layers of a chain may be.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Directories of the home, canonical.
    pub homes: Vec<PathBuf>,
    /// The user whose files may lie elsewhere. If a header could name other users' files, a mount
    /// that runs as root would show files that its user may not read.
    pub owner: u32,
    /// Directories to search first for files that headers name elsewhere, each with its name in a
    /// home. For a home that was moved since it was written, such as a backup.
    pub moved: Vec<(&'static str, PathBuf)>,
}

impl Scope {
    /// Returns the file of this home for a path in the home that this is a copy of.
    pub(super) fn relocated(&self, path: &Path) -> Option<PathBuf> {
        if self.homes.iter().any(|home| path.starts_with(home)) {
            return None;
        }
        path.ancestors().find_map(|above| {
            let name = above.file_name()?;
            let (_, dir) = self.moved.iter().find(|(known, _)| name == *known)?;
            let here = dir.join(path.strip_prefix(above).ok()?);
            here.is_file().then_some(here)
        })
    }
}

/// A walk down a chain, one image after another, within the limits.
pub(super) struct Descent {
    /// The first file, if it is open already.
    pub top: Option<File>,
    pub next: Option<(PathBuf, Option<Format>)>,
    seen: HashSet<FileId>,
}

impl Descent {
    /// Begins at the image at `top`.
    pub fn from(top: &Path) -> Descent {
        Descent {
            top: None,
            next: Some((top.to_path_buf(), None)),
            seen: HashSet::new(),
        }
    }

    /// Opens the next image; returns its path, the file and its format. ELOOP as
    /// [`Chain::open`](super::Chain::open).
    pub fn next_layer(&mut self) -> Result<Option<(PathBuf, File, Format)>> {
        let Some((path, format)) = self.next.take() else {
            return Ok(None);
        };
        let endless = |what: &str| {
            Err(Error::new(
                libc::ELOOP,
                format!("the backing chain {what} at {}", path.display()),
            ))
        };
        let file = match self.top.take() {
            Some(file) => file,
            None => open_image(&path, false)?,
        };
        let meta = file
            .metadata()
            .context(|| format!("cannot look at the image {}", path.display()))?;
        if self.seen.len() >= MAX_LAYERS {
            return endless("has more than 64 layers");
        }
        if !self.seen.insert(FileId::of(&meta)) {
            return endless("has a cycle");
        }
        let format = match format {
            Some(format) => format,
            None if Header::read(&file, &path)?.is_some() => Format::Qcow2,
            None => Format::Raw,
        };
        Ok(Some((path, file, format)))
    }

    /// Continues with the layer that the header of the image at `path` names.
    pub fn below(&mut self, path: &Path, header: Option<&Header>) {
        self.next = header.and_then(|header| {
            let format = header.backing.as_ref().and_then(|backing| backing.format);
            Some((header.backing_path(path)?, format))
        });
    }
}

/// Verifies that a layer outside of the home belongs to the home's owner. Otherwise a header could
/// make a mount that runs as root show files that its user may not read. /proc tells where the open
/// file is, so it can't be swapped between check and use.
pub(super) fn check_owner(path: &Path, file: &File, meta: &Metadata, scope: &Scope) -> Result<()> {
    if meta.uid() == scope.owner {
        return Ok(());
    }
    let real = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .context(|| format!("cannot find out where {} is", path.display()))?;
    if scope.homes.iter().any(|home| real.starts_with(home)) {
        return Ok(());
    }
    let home = scope.homes.first().map_or(Path::new(""), PathBuf::as_path);
    Err(Error::new(
        libc::EPERM,
        format!(
            "the layer {} is outside of the home {} and does not belong to its owner",
            path.display(),
            home.display()
        ),
    ))
}

/// Returns the path of every image of the chain, top first, from the headers alone. Paths are
/// absolute, without `.` and `..`; symlinks are not resolved. Errors as
/// [`Chain::open`](super::Chain::open), except that the owner of a file does not matter.
pub fn chain_paths(top: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    let mut walk = Descent::from(top);
    while let Some((path, file, format)) = walk.next_layer()? {
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => Some(Header::read(&file, &path)?.ok_or_else(|| {
                Error::damaged(format!(
                    "{} should be a qcow2 image, but does not begin like one",
                    path.display()
                ))
            })?),
        };
        walk.below(&path, header.as_ref());
        paths.push(normalised(&path)?);
    }
    Ok(paths)
}

/// Returns `path` as an absolute path, with `.` and `..` removed by text alone.
fn normalised(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path)
        .context(|| format!("cannot make {} an absolute path", path.display()))?;
    let mut plain = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    Ok(plain)
}
