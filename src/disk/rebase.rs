//! Rebases images in place: the one way a header is changed.

use super::file::{FileTimes, open_image};
use super::header::{MAX_BACKING_NAME, NameSpan};
use super::{FileId, Format, Header};
use crate::{Context, Error, Result};
use parking_lot::Mutex;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Makes the qcow2 image at `image` name `new_backing` as the layer below it, in place. The stored
/// format of the layer below stays. Access and modification times are restored, since the contents
/// stay. Does nothing if the image names that path already.
///
/// Crash-safe and repeatable: writes the new name to a place that nothing refers to and flushes it,
/// then writes offset and length (bytes 8 to 19, within one sector) in one write and flushes them.
///
/// EOPNOTSUPP, with the file untouched (copy the layer instead): the image is raw or has no backing
/// file; its header extensions have no end marker; the path is empty, not UTF-8 or over 1023 bytes;
/// the first cluster has no room for it; or the file at `new_backing` has another format than the
/// header says. EIO as [`Header::read`]; other errors are those of the system calls.
pub fn rebase(image: &Path, new_backing: &Path) -> Result<()> {
    rebase_opened(&open_image(image, true)?, image, new_backing)
}

/// Rebases as [`rebase`] does, if the image still is the file `id`.
///
/// # Errors
/// As [`rebase`]; EBUSY when another file has its name.
pub fn rebase_this(image: &Path, id: FileId, new_backing: &Path) -> Result<()> {
    let file = open_image(image, true)?;
    if FileId::of_open(&file, image)? != id {
        return Err(Error::busy(format!(
            "{} was replaced at this moment; try again",
            image.display()
        )));
    }
    rebase_opened(&file, image, new_backing)
}

fn rebase_opened(file: &File, image: &Path, new_backing: &Path) -> Result<()> {
    let refused = |why: &str| {
        Error::new(
            libc::EOPNOTSUPP,
            format!("cannot rebase {} in place: {why}", image.display()),
        )
    };
    let header = Header::read(file, image)?.ok_or_else(|| refused("it is a raw image"))?;
    let backing = header
        .backing
        .as_ref()
        .ok_or_else(|| refused("it has no backing file"))?;
    if backing.path.as_os_str() == new_backing.as_os_str() {
        return Ok(());
    }
    let name = new_backing.as_os_str().as_bytes();
    if name.is_empty() || name.len() > MAX_BACKING_NAME || name.contains(&0) {
        return Err(refused("the new path is not 1 to 1023 bytes"));
    }
    if std::str::from_utf8(name).is_err() {
        return Err(refused("the new path is not UTF-8"));
    }
    if let Some(format) = backing.format {
        let target = image.parent().unwrap_or(Path::new("")).join(new_backing);
        check_same_format(&target, format).map_err(|why| refused(&why))?;
    }
    let place = unused_span(&header, name.len() as u64).map_err(|why| refused(&why))?;
    write_backing(file, image, place, name)
}

/// Verifies that the layer at `target` has the stored format: with a "raw" extension, a qcow2
/// silently reads as zeros. A target that does not exist (yet) is not compared.
fn check_same_format(target: &Path, stored: Format) -> Result<(), String> {
    let found = match Header::open(target) {
        Ok(Some(_)) => Format::Qcow2,
        Ok(None) => Format::Raw,
        Err(e) if e.errno() == libc::ENOENT => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };
    if found == stored {
        return Ok(());
    }
    Err(format!(
        "its header says the layer below is {}, but {} is {}",
        stored.name(),
        target.display(),
        found.name()
    ))
}

/// Finds a span of `len` bytes in the first cluster that nothing uses: after the extensions,
/// outside of the current name, ending before the end of the cluster (where imago would refuse it).
fn unused_span(header: &Header, len: u64) -> Result<NameSpan, String> {
    let start = header
        .extensions_end
        .ok_or("its header extensions have no end marker")?;
    let free_after = |offset: u64| NameSpan { offset, len };
    let before = free_after(start);
    let span = match header.name {
        Some(name) if before.end() > name.offset => free_after(start.max(name.end())),
        _ => before,
    };
    if span.end() >= header.cluster_size() {
        return Err(format!(
            "its first cluster has no room for a path of {len} bytes"
        ));
    }
    Ok(span)
}

/// Does the two flushed writes of a rebase.
fn write_backing(file: &File, image: &Path, place: NameSpan, name: &[u8]) -> Result<()> {
    let failed = || format!("cannot write the header of {}", image.display());
    let meta = file.metadata().context(failed)?;
    let times = FileTimes::of(&meta);
    // A crash after this leaves bytes that nothing refers to.
    write_untimed(file, name, place.offset, &times).context(failed)?;
    sync(file, image)?;
    let mut pointer = [0u8; 12];
    pointer[..8].copy_from_slice(&place.offset.to_be_bytes());
    pointer[8..].copy_from_slice(&(name.len() as u32).to_be_bytes());
    let mut old = [0u8; 12];
    file.read_exact_at(&mut old, 8).context(failed)?;
    // A crash after this leaves the old or the new path, and both are complete.
    let written = write_untimed(file, &pointer, 8, &times)
        .context(failed)
        .and_then(|()| sync(file, image));
    if written.is_err() {
        // The kernel considers pages written whose flush failed. With the old path restored,
        // another attempt writes the new path again instead of finding it there.
        let taken_back = write_untimed(file, &old, 8, &times).and_then(|()| file.sync_all());
        if taken_back.is_err() {
            let unflushed = (image.to_owned(), FileId::of(&meta));
            UNFLUSHED.lock().push(unflushed);
        }
    }
    written
}

/// Images that may name either path after a power loss: neither the new path nor the restored old
/// one could be flushed.
static UNFLUSHED: Mutex<Vec<(PathBuf, FileId)>> = Mutex::new(Vec::new());

/// Flushes the headers of images for which [`rebase`] failed and could not restore the old path, so
/// that they name on disk what they are read to name. Call it before a layer loses a name, or is
/// removed, that one of them may name. An image that is no longer at its path is left alone.
///
/// # Errors
/// EIO and others of the system calls: call it again later.
pub fn flush_headers() -> Result<()> {
    let unflushed = UNFLUSHED.lock().clone();
    for (image, id) in unflushed {
        if FileId::at(&image).is_ok_and(|found| found == id) {
            write_again(&open_image(&image, true)?, &image)?;
        }
        UNFLUSHED.lock().retain(|(_, flushed)| *flushed != id);
    }
    Ok(())
}

/// Writes the backing path as it is read. Pages whose flush failed count as written; newly written
/// ones do not.
fn write_again(file: &File, image: &Path) -> Result<()> {
    let failed = || format!("cannot write the header of {}", image.display());
    let times = FileTimes::of(&file.metadata().context(failed)?);
    if let Some(name) = Header::read(file, image)?.and_then(|header| header.name) {
        for place in [name, NameSpan { offset: 8, len: 12 }] {
            // A path has at most 1023 bytes.
            let mut bytes = vec![0; place.len as usize];
            file.read_exact_at(&mut bytes, place.offset)
                .and_then(|()| write_untimed(file, &bytes, place.offset, &times))
                .context(failed)?;
        }
    }
    sync(file, image)
}

/// Flushes a file.
fn sync(file: &File, image: &Path) -> Result<()> {
    file.sync_all()
        .context(|| format!("cannot sync {}", image.display()))
}

/// Writes and restores the times, since readers watch the mtime.
fn write_untimed(file: &File, bytes: &[u8], offset: u64, times: &FileTimes) -> std::io::Result<()> {
    file.write_all_at(bytes, offset)?;
    times.set(file)
}

#[cfg(test)]
mod tests;
