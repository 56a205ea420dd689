//! Layers above one another, top first, as the guest sees them.

use super::header::open_image;
use super::layer::Run;
use super::{FileId, FileState, Format, Header, Layer};
use crate::{Context, Error, Result};
use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Most layers of a chain. Far more than libkrun starts (9), far less than what could hurt us.
const MAX_LAYERS: usize = 64;

/// An open backing chain, top first. All layers stay open, so that neither a rename nor a removal
/// pulls one away from a reader.
pub struct Chain {
    layers: Vec<Layer>,
    /// Each layer's metadata when it was opened, and the state that says.
    opened: Vec<(Metadata, FileState)>,
    changed_at: SystemTime,
}

/// Where the layers of a chain may be.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Directories of the home, canonical.
    pub homes: Vec<PathBuf>,
    /// Whose files may lie elsewhere: with others' a header could make a mount that runs as root show files
    /// its user may not read.
    pub owner: u32,
    /// Directories to look in first for what headers name elsewhere, each with the name it has in a home: of a
    /// home that lies elsewhere than when it was written, such as a backup.
    pub moved: Vec<(&'static str, PathBuf)>,
}

impl Scope {
    /// The file of this home that a path names in the home this is a copy of.
    fn relocated(&self, path: &Path) -> Option<PathBuf> {
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

/// A run of guest bytes that come from one place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Guest offset in bytes.
    pub guest: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// Where the bytes come from.
    pub source: Source,
}

/// Where guest bytes come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Nowhere: they are zeros.
    Zero,
    /// From the file of a layer, from this host offset on; zeros past the end of that file.
    Data {
        /// Index into [`Chain::layers`].
        layer: usize,
        /// Byte offset in that layer's file.
        host: u64,
    },
    /// From compressed clusters of a layer.
    Compressed {
        /// Index into [`Chain::layers`].
        layer: usize,
    },
}

impl Source {
    /// The source of what follows after `len` bytes, if it goes on in the same way.
    fn after(self, len: u64) -> Source {
        match self {
            Source::Data { layer, host } => Source::Data {
                layer,
                host: host.saturating_add(len),
            },
            same => same,
        }
    }
}

impl Chain {
    /// Opens the image at `top` and every layer below it. A layer's format is what the header above
    /// it says; where nothing is said, and for `top`, the magic decides.
    ///
    /// Errors: those of opening, naming the layer; EINVAL for a layer that is no regular file;
    /// EPERM for a layer outside of `home` (symlinks resolved) that does not belong to the user
    /// `owner`; ELOOP for a cycle or more than 64 layers; EIO for a damaged layer.
    pub fn open(top: &Path, home: &Path, owner: u32) -> Result<Chain> {
        let home = std::fs::canonicalize(home)
            .context(|| format!("cannot look at the home {}", home.display()))?;
        let scope = Scope {
            homes: vec![home],
            owner,
            moved: Vec::new(),
        };
        Chain::open_in(top, &scope)
    }

    /// Likewise, of a home whose directories may be links, or lie elsewhere than headers say.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_in(top: &Path, scope: &Scope) -> Result<Chain> {
        Chain::descend(Descent::from(top), top, scope)
    }

    /// Likewise, with `copy` in the place of the file at `top`: what it names is looked for as if it were
    /// that.
    ///
    /// # Errors
    /// As [`Chain::open`].
    pub fn open_over(copy: File, top: &Path, scope: &Scope) -> Result<Chain> {
        let mut walk = Descent::from(top);
        walk.top = Some(copy);
        Chain::descend(walk, top, scope)
    }

    fn descend(mut walk: Descent, top: &Path, scope: &Scope) -> Result<Chain> {
        let mut chain = Vec::new();
        let mut opened = Vec::new();
        while let Some((path, file, format)) = walk.next_layer()? {
            let meta = file
                .metadata()
                .context(|| format!("cannot look at the image {}", path.display()))?;
            check_owner(&path, &file, &meta, scope)?;
            let state = FileState::of_open(&file, &meta);
            let layer = Layer::of(&path, file, format)?;
            walk.below(&path, layer.header());
            if let Some((below, _)) = &mut walk.next
                && let Some(here) = scope.relocated(below)
            {
                *below = here;
            }
            chain.push(layer);
            opened.push((meta, state));
        }
        let changed_at = opened
            .first()
            .map_or(Ok(SystemTime::UNIX_EPOCH), |(meta, _)| meta.modified())
            .context(|| format!("cannot tell when {} changed", top.display()))?;
        Ok(Chain {
            layers: chain,
            opened,
            changed_at,
        })
    }

    /// The layers, top first; at least one.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The state each layer's file was in when it was opened, top first.
    pub fn states(&self) -> impl Iterator<Item = FileState> + '_ {
        self.opened.iter().map(|(_, state)| *state)
    }

    /// Size of the disk in bytes: that of the top layer.
    pub fn virtual_size(&self) -> u64 {
        self.layers.first().map_or(0, Layer::virtual_size)
    }

    /// The mtime of the top layer when the chain was opened.
    pub fn changed_at(&self) -> SystemTime {
        self.changed_at
    }

    /// The guest bytes of `range` cut into runs, in order and covering it completely; adjacent runs
    /// that go on in the same way are one. Past the virtual size there are zeros. EIO when a
    /// layer's tables are damaged.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut walk = self.walk(range);
        while let Some(next) = walk.next_extent()? {
            match extents.last_mut() {
                Some(last) if last.source.after(last.len) == next.source => last.len += next.len,
                _ => extents.push(next),
            }
        }
        Ok(extents)
    }

    /// Walks the guest bytes of `range`, without keeping what was passed.
    pub(super) fn walk(&self, range: Range<u64>) -> Walk<'_> {
        self.walk_upper(range, self.layers.len())
    }

    /// Likewise, and asks only the `upper` layers on top.
    pub(super) fn walk_upper(&self, range: Range<u64>, upper: usize) -> Walk<'_> {
        Walk {
            chain: self,
            at: range.start,
            end: range.end,
            runs: vec![None; upper.min(self.layers.len())],
        }
    }

    /// Fills `buf` with the guest bytes from `guest_offset` on; zeros past the virtual size. EIO when
    /// a layer is damaged; other errors are those of reading.
    pub fn read_at(&self, guest_offset: u64, buf: &mut [u8]) -> Result<()> {
        // No disk reaches so far: the bytes that have no offset are past the virtual size.
        let end = guest_offset.saturating_add(buf.len() as u64);
        let (mut rest, past) = buf.split_at_mut((end - guest_offset) as usize);
        past.fill(0);
        let mut walk = self.walk(guest_offset..end);
        while let Some(extent) = walk.next_extent()? {
            let (now, later) = rest.split_at_mut(extent.len as usize);
            self.read_extent(&extent, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Fills `buf`, as long as the extent, with its bytes.
    fn read_extent(&self, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        let image = |layer: usize| {
            self.layers
                .get(layer)
                .ok_or_else(|| Error::damaged(format!("the chain has no layer {layer}")))
        };
        match extent.source {
            Source::Zero => {
                buf.fill(0);
                Ok(())
            }
            Source::Data { layer, host } => image(layer)?.read_data(host, buf),
            Source::Compressed { layer } => image(layer)?.read_compressed(extent.guest, buf),
        }
    }

    /// Bytes of the disk that come from a layer; the rest is zeros. EIO when a layer's tables are damaged.
    pub fn allocated(&self) -> Result<u64> {
        let mut walk = self.walk(0..self.virtual_size());
        let mut allocated = 0;
        while let Some(extent) = walk.next_extent()? {
            if !matches!(extent.source, Source::Zero) {
                allocated += extent.len;
            }
        }
        Ok(allocated)
    }

    /// Where from `at` on the disk's bytes come from a layer (`data`), or are zeros that no layer has;
    /// None if there is no such place before its end. EIO when a layer's tables are damaged.
    pub fn next(&self, at: u64, data: bool) -> Result<Option<u64>> {
        let mut walk = self.walk(at..self.virtual_size());
        while let Some(extent) = walk.next_extent()? {
            if matches!(extent.source, Source::Zero) != data {
                return Ok(Some(extent.guest));
            }
        }
        Ok(None)
    }

    /// EIO if the size or mtime of any layer's open file differ from when it was opened: what was
    /// read may be a mixture. (A rebase changes neither for longer than an instant.)
    pub fn unchanged(&self) -> Result<()> {
        for (layer, (opened, _)) in self.layers.iter().zip(&self.opened) {
            if !layer.differs_from(opened)? {
                continue;
            }
            // A rebase puts the mtime back in the next system call: give it that moment.
            std::thread::sleep(Duration::from_millis(20));
            if layer.differs_from(opened)? {
                return Err(Error::damaged(format!(
                    "{} changed while it was read (was the box started?); read it again",
                    layer.path().display()
                )));
            }
        }
        Ok(())
    }
}

/// A walk along the guest's bytes. What a layer said about a run is kept until the walk has passed
/// it: asked anew at every fragment of the layers below, it would go through the same table entries
/// again and again.
pub(super) struct Walk<'a> {
    chain: &'a Chain,
    at: u64,
    end: u64,
    /// The run that was looked at last, with the guest bytes it covers, of each layer that is asked.
    runs: Vec<Option<(Range<u64>, Run)>>,
}

impl Walk<'_> {
    /// The next run of bytes from one place (maybe continued by the one after); None at the end of
    /// the range. EIO when a layer's tables are damaged.
    pub(super) fn next_extent(&mut self) -> Result<Option<Extent>> {
        let run = self.next_run()?;
        // What no layer speaks of is zeros.
        Ok(run.map(|(guest, source)| Extent {
            guest: guest.start,
            len: guest.end - guest.start,
            source: source.unwrap_or(Source::Zero),
        }))
    }

    /// As [`Walk::next_extent`], where it comes from being None if no layer that is asked says so.
    pub(super) fn next_run(&mut self) -> Result<Option<(Range<u64>, Option<Source>)>> {
        let guest = self.at;
        if guest >= self.end {
            return Ok(None);
        }
        let mut end = self.end;
        let mut source = None;
        for layer in 0..self.runs.len() {
            let (run, run_end) = self.run_of(layer)?;
            end = end.min(run_end);
            source = match run {
                Run::Unallocated => continue,
                Run::Zero => Some(Source::Zero),
                Run::Data { host } => Some(Source::Data { layer, host }),
                Run::Compressed => Some(Source::Compressed { layer }),
            };
            break;
        }
        self.at = end;
        Ok(Some((guest..end, source)))
    }

    /// Goes on at guest offset `at`, if that is further on.
    pub(super) fn skip_to(&mut self, at: u64) {
        self.at = self.at.max(at);
    }

    /// What a layer says about the byte the walk is at, and where that ends.
    fn run_of(&mut self, layer: usize) -> Result<(Run, u64)> {
        let at = self.at;
        let (Some(image), Some(known)) = (self.chain.layers.get(layer), self.runs.get_mut(layer))
        else {
            return Ok((Run::Unallocated, self.end));
        };
        let (range, run) = match known {
            Some(known) if known.0.contains(&at) => known,
            known => {
                let (run, len) = image.run_at(at, self.end - at)?;
                known.insert((at..at + len, run))
            }
        };
        let run = match *run {
            Run::Data { host } => Run::Data {
                host: host.saturating_add(at - range.start),
            },
            same => same,
        };
        Ok((run, range.end))
    }
}

/// The way down a chain, one image after another, within the limits.
struct Descent {
    /// The first file, where it is open already.
    top: Option<File>,
    next: Option<(PathBuf, Option<Format>)>,
    seen: HashSet<FileId>,
}

impl Descent {
    fn from(top: &Path) -> Descent {
        Descent {
            top: None,
            next: Some((top.to_path_buf(), None)),
            seen: HashSet::new(),
        }
    }

    /// Opens the next image: its path, the file and its format. ELOOP as [`Chain::open`].
    fn next_layer(&mut self) -> Result<Option<(PathBuf, File, Format)>> {
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
            return endless("comes back to itself");
        }
        let format = match format {
            Some(format) => format,
            None if Header::read(&file, &path)?.is_some() => Format::Qcow2,
            None => Format::Raw,
        };
        Ok(Some((path, file, format)))
    }

    /// Goes on with what the header of the image at `path` names.
    fn below(&mut self, path: &Path, header: Option<&Header>) {
        self.next = header.and_then(|header| {
            let format = header.backing.as_ref().and_then(|backing| backing.format);
            Some((header.backing_path(path)?, format))
        });
    }
}

/// A layer outside of the home must belong to the home's owner: otherwise a header could make a
/// mount that runs as root show files its user may not read. /proc tells where the file that is open
/// really is, so nothing can be swapped between the check and the use.
fn check_owner(path: &Path, file: &File, meta: &Metadata, scope: &Scope) -> Result<()> {
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

/// The path of every image of the chain, top first, from the headers alone: absolute and normalised
/// by their text (`.` and `..` removed, symlinks not resolved). Errors as [`Chain::open`], but
/// nobody need own the files.
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

/// `path` made absolute, with `.` and `..` removed by text alone.
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::disk::judges::{Numbers, create, guest_bytes, qemu_io, succeed, text};
    use crate::disk::{create_overlay, rebase};
    use std::os::unix::fs::FileExt;

    /// Opens a chain in its own directory, as its owner.
    pub fn open(top: &Path) -> Result<Chain> {
        let home = top.parent().unwrap();
        Chain::open(top, home, std::fs::metadata(home).unwrap().uid())
    }

    /// A raw image of `size` bytes: random bytes here and there, holes between.
    fn sparse_raw(path: &Path, size: u64, numbers: &mut Numbers) {
        let file = File::create(path).unwrap();
        file.set_len(size).unwrap();
        for _ in 0..6 {
            let at = numbers.below(size / 4096) * 4096;
            let len = (1 + numbers.below(40)) * 4096;
            let bytes: Vec<u8> = (0..len.min(size - at))
                .map(|_| numbers.below(256) as u8)
                .collect();
            file.write_all_at(&bytes, at).unwrap();
        }
    }

    /// Writes data and explicit zeros somewhere into a qcow2.
    fn scribble(image: &Path, size: u64, zeros: bool, numbers: &mut Numbers) {
        let mut commands = Vec::new();
        for _ in 0..8 {
            let at = numbers.below(size / 512) * 512;
            let len = ((1 + numbers.below(300)) * 512).min(size - at);
            commands.push(match numbers.below(3) {
                0 if zeros => format!("write -z {at} {len}"),
                n => format!("write -P {} {at} {len}", 1 + n + numbers.below(200)),
            });
        }
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io(image, &commands);
    }

    /// Chains of every kind, each with what it is: differing cluster sizes, versions, explicit zeros,
    /// compressed clusters, sizes that differ, relative paths, sparse raw bases.
    pub fn chains(dir: &Path) -> Vec<(String, PathBuf)> {
        let mut numbers = Numbers(0x1234_5678_9abc_def1);
        let mut made = Vec::new();
        let options = [
            ["cluster_size=512", "cluster_size=4k", "cluster_size=64k"],
            ["cluster_size=64k", "cluster_size=2M", "cluster_size=512"],
            [
                "cluster_size=2M",
                "compat=0.10,cluster_size=4k",
                "compat=0.10",
            ],
            [
                "compat=0.10,cluster_size=512",
                "cluster_size=2M",
                "cluster_size=4k",
            ],
        ];
        for (row, options) in options.iter().enumerate() {
            for raw_base in [true, false] {
                let name = |what: &str| dir.join(format!("{row}-{raw_base}-{what}"));
                let base = name("base");
                // No multiple of 64 KiB, and shorter than what lies on it.
                let base_size = (3 << 20) + 512 * (1 + numbers.below(127));
                if raw_base {
                    sparse_raw(&base, base_size, &mut numbers);
                } else {
                    compressed_base(&base, base_size, options[0], &mut numbers);
                }
                let mut below = (base, if raw_base { "raw" } else { "qcow2" });
                for (level, options) in options.iter().enumerate() {
                    let image = name(&format!("level{level}.qcow2"));
                    let size = (4 << 20) + 512 * numbers.below(3000);
                    overlay_with(&image, options, &below, size, level % 2 == 1);
                    scribble(&image, size, !options.contains("0.10"), &mut numbers);
                    made.push((
                        format!("{options} at level {level} of {row}, raw {raw_base}"),
                        image.clone(),
                    ));
                    below = (image, "qcow2");
                }
            }
        }
        made
    }

    /// A compressed qcow2 of random data, made from a raw image.
    fn compressed_base(path: &Path, size: u64, options: &str, numbers: &mut Numbers) {
        let raw = path.with_extension("raw");
        sparse_raw(&raw, size, numbers);
        // Text compresses; qemu stores what does not compress as it is, so both kinds occur.
        let file = File::options().write(true).open(&raw).unwrap();
        file.write_all_at("layers upon layers ".repeat(40_000).as_bytes(), 70_000)
            .unwrap();
        let all = [
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            options,
            text(&raw),
            text(path),
        ];
        succeed("qemu-img", &all);
    }

    /// An overlay by qemu, with the path below stored relative to it or absolute.
    fn overlay_with(
        image: &Path,
        options: &str,
        below: &(PathBuf, &str),
        size: u64,
        relative: bool,
    ) {
        let stored = if relative {
            PathBuf::from(below.0.file_name().unwrap())
        } else {
            below.0.clone()
        };
        create(image, options, Some((&stored, below.1)), &size.to_string());
    }

    #[test]
    #[ignore = "needs programs"]
    fn every_chain_reads_as_qemu_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            let expected = guest_bytes(&top);
            let chain = open(&top).unwrap();
            assert_eq!(chain.virtual_size(), expected.len() as u64, "{what}");
            let mut bytes = vec![1u8; expected.len() + 1000];
            chain.read_at(0, &mut bytes).unwrap();
            assert!(bytes[..expected.len()] == expected, "{what}");
            assert!(
                bytes[expected.len()..].iter().all(|&byte| byte == 0),
                "{what}"
            );
            chain.unchanged().unwrap();
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn reads_at_any_offset_are_the_sequential_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let mut numbers = Numbers(77);
        for (what, top) in chains(dir.path()) {
            let expected = guest_bytes(&top);
            let chain = open(&top).unwrap();
            for _ in 0..100 {
                let at = numbers.below(expected.len() as u64) as usize;
                let len = 1 + numbers.below((expected.len() - at).min(200_000) as u64) as usize;
                let mut bytes = vec![1u8; len];
                chain.read_at(at as u64, &mut bytes).unwrap();
                assert!(bytes == expected[at..at + len], "{what} at {at}+{len}");
            }
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn extents_cover_the_range_in_order_and_zeros_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            let expected = guest_bytes(&top);
            let chain = open(&top).unwrap();
            let range = 1000..expected.len() as u64 + 70_000;
            let extents = chain.extents(range.clone()).unwrap();
            let mut at = range.start;
            for pair in extents.windows(2) {
                let continued = pair[0].source.after(pair[0].len) == pair[1].source;
                assert!(!continued, "{what}: adjacent runs are merged");
            }
            for extent in &extents {
                assert!(extent.guest == at && extent.len > 0, "{what}");
                at += extent.len;
                let end = (at as usize).min(expected.len());
                let bytes = expected.get(extent.guest as usize..end).unwrap_or_default();
                match extent.source {
                    Source::Zero => assert!(bytes.iter().all(|&byte| byte == 0), "{what}"),
                    Source::Data { layer, .. } | Source::Compressed { layer } => {
                        assert!(layer < chain.layers().len(), "{what}");
                    }
                }
            }
            assert_eq!(at, range.end, "{what}");
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn compressed_clusters_holes_and_zeros_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        std::fs::write(&raw, "the same over and over ".repeat(10_000)).unwrap();
        let base = dir.path().join("base.qcow2");
        succeed(
            "qemu-img",
            &["convert", "-c", "-O", "qcow2", text(&raw), text(&base)],
        );
        let top = dir.path().join("top.qcow2");
        create_overlay(&top, &base, Format::Qcow2, 1 << 20).unwrap();
        qemu_io(&top, &["write -z 64k 64k", "write -P 9 512k 64k"]);
        let sources: Vec<(u64, Source)> = open(&top)
            .unwrap()
            .extents(0..1 << 20)
            .unwrap()
            .iter()
            .map(|extent| (extent.len >> 10, extent.source))
            .collect();
        assert_eq!(sources[0], (64, Source::Compressed { layer: 1 }));
        assert_eq!(sources[1], (64, Source::Zero));
        assert!(matches!(sources[2].1, Source::Compressed { layer: 1 }));
        assert_eq!(sources[3].1, Source::Zero);
        assert!(matches!(sources[4], (64, Source::Data { layer: 0, .. })));
        assert_eq!(sources[5], (448, Source::Zero));
    }

    #[test]
    #[ignore = "needs programs"]
    fn a_rebase_is_no_change_and_a_write_is() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![5u8; 1 << 20]).unwrap();
        let other = dir.path().join("other.raw");
        std::fs::hard_link(&base, &other).unwrap();
        let top = dir.path().join("top.qcow2");
        create_overlay(&top, &base, Format::Raw, 1 << 20).unwrap();
        let chain = open(&top).unwrap();
        let mtime = std::fs::metadata(&top).unwrap().modified().unwrap();
        assert_eq!(chain.changed_at(), mtime);
        rebase(&top, &other).unwrap();
        chain.unchanged().unwrap();
        qemu_io(&top, &["write -P 1 0 64k"]);
        let error = chain.unchanged().unwrap_err();
        assert_eq!(error.errno(), libc::EIO);
        let chain = open(&top).unwrap();
        File::options()
            .append(true)
            .open(&base)
            .unwrap()
            .set_len(2 << 20)
            .unwrap();
        assert!(
            chain
                .unchanged()
                .unwrap_err()
                .to_string()
                .contains("other.raw")
        );
    }

    #[test]
    fn an_open_chain_outlives_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![5u8; 1 << 20]).unwrap();
        let top = dir.path().join("top.qcow2");
        create_overlay(&top, &base, Format::Raw, 1 << 20).unwrap();
        let chain = open(&top).unwrap();
        std::fs::remove_file(&base).unwrap();
        std::fs::remove_file(&top).unwrap();
        let mut byte = [0u8];
        chain.read_at(12345, &mut byte).unwrap();
        assert_eq!(byte, [5]);
    }

    #[test]
    fn cycles_and_endless_chains_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |i: usize| dir.path().join(format!("{i}.qcow2"));
        create_overlay(&path(0), &path(1), Format::Qcow2, 1 << 20).unwrap();
        create_overlay(&path(1), &path(0), Format::Qcow2, 1 << 20).unwrap();
        assert_eq!(open(&path(0)).err().unwrap().errno(), libc::ELOOP);
        assert_eq!(chain_paths(&path(0)).unwrap_err().errno(), libc::ELOOP);
        std::fs::write(path(100), [0u8; 512]).unwrap();
        create_overlay(&path(101), &path(100), Format::Raw, 1 << 20).unwrap();
        for i in 102..=164 {
            create_overlay(&path(i), &path(i - 1), Format::Qcow2, 1 << 20).unwrap();
        }
        assert_eq!(open(&path(163)).unwrap().layers().len(), 64);
        assert_eq!(open(&path(164)).err().unwrap().errno(), libc::ELOOP);
        assert_eq!(chain_paths(&path(164)).unwrap_err().errno(), libc::ELOOP);
    }

    #[test]
    fn a_layer_outside_of_the_home_must_belong_to_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        std::fs::create_dir(&home).unwrap();
        let uid = std::fs::metadata(&home).unwrap().uid();
        let outside = dir.path().join("secret.raw");
        std::fs::write(&outside, [1u8; 4096]).unwrap();
        // A symlink inside does not make it a file of the home.
        let link = home.join("link.raw");
        std::os::unix::fs::symlink(&outside, &link).unwrap();
        for (i, below) in [&outside, &link].into_iter().enumerate() {
            let top = home.join(format!("{i}.qcow2"));
            create_overlay(&top, below, Format::Raw, 1 << 20).unwrap();
            assert!(Chain::open(&top, &home, uid).is_ok());
            let error = Chain::open(&top, &home, uid + 1).err().unwrap();
            assert_eq!(error.errno(), libc::EPERM);
            assert!(chain_paths(&top).is_ok());
        }
        let inside = home.join("inside.raw");
        std::fs::write(&inside, [1u8; 4096]).unwrap();
        assert!(Chain::open(&inside, &home, uid + 1).is_ok());
    }

    #[test]
    #[ignore = "needs programs"]
    fn the_format_that_a_header_says_is_trusted_and_else_the_magic_decides() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.qcow2");
        create(&base, "compat=1.1", None, "1M");
        let as_raw = dir.path().join("raw.qcow2");
        create_overlay(&as_raw, &base, Format::Raw, 1 << 20).unwrap();
        assert_eq!(open(&as_raw).unwrap().layers()[1].format(), Format::Raw);
        let unsaid = dir.path().join("unsaid.qcow2");
        create(&unsaid, "compat=0.10", Some((&base, "qcow2")), "1M");
        let file = File::options().write(true).open(&unsaid).unwrap();
        // The name of another extension, which is skipped.
        file.write_all_at(&0x1111_1111u32.to_be_bytes(), 72)
            .unwrap();
        let chain = open(&unsaid).unwrap();
        assert_eq!(
            chain.layers()[0]
                .header()
                .unwrap()
                .backing
                .as_ref()
                .unwrap()
                .format,
            None
        );
        assert_eq!(chain.layers()[1].format(), Format::Qcow2);
        let text = dir.path().join("text");
        std::fs::write(&text, "no qcow2").unwrap();
        let wrong = dir.path().join("wrong.qcow2");
        create_overlay(&wrong, &text, Format::Qcow2, 1 << 20).unwrap();
        assert_eq!(open(&wrong).err().unwrap().errno(), libc::EIO);
        assert_eq!(chain_paths(&wrong).unwrap_err().errno(), libc::EIO);
    }

    #[test]
    #[ignore = "needs programs"]
    fn the_paths_of_a_chain_are_absolute_and_normal() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, [0u8; 4096]).unwrap();
        let top = sub.join("top.qcow2");
        create(
            &top,
            "compat=1.1",
            Some((Path::new(".././base.raw"), "raw")),
            "1M",
        );
        let crooked = sub.join("../sub/./top.qcow2");
        assert_eq!(chain_paths(&crooked).unwrap(), [top.clone(), base.clone()]);
        std::fs::remove_file(&base).unwrap();
        let error = chain_paths(&top).unwrap_err();
        assert_eq!(error.errno(), libc::ENOENT);
        assert!(error.to_string().contains("base.raw"));
    }
}
