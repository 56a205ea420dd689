//! A computed image as a file.

use super::overlay::CLUSTER;
use super::{Aligned, Chain, Direct, Extent, Flattened, Source};
use crate::{Context, Error, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes written at once, and between two looks at whether to go on.
const PIECE: u64 = 4 << 20;
/// Runs of data from one place that are shorter are read together with what lies beside them.
const ALONE: u64 = CLUSTER;
/// Without direct I/O: bytes after which the kernel is asked to begin with what was written, so that the
/// flush at the end is short, and what others want to write does not wait behind all of it.
const BEGUN: u64 = 32 << 20;

/// Pieces between the thread that reads and the one that writes.
const QUEUE: usize = 2;

impl Flattened {
    /// Writes the image into an empty file, which is not synced. Zeros become holes, and blocks are
    /// shared with the layers where the file system can. `pace` is told after each piece how many
    /// bytes it had, and may end it with an error.
    ///
    /// # Errors
    /// Those of `pace`, of reading layers and of writing.
    pub fn write_to(&self, out: &File, pace: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        out.set_len(self.len()).context(|| FAILED)?;
        self.write_metadata(out, pace)?;
        let (full, to_write) = bounded(QUEUE);
        let (empty, to_fill) = bounded(QUEUE + 2);
        for _ in 0..QUEUE + 2 {
            let _ = empty.send(Aligned::zeros(PIECE as usize));
        }
        // One reads while the other writes.
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_pieces(out, &to_write, &empty));
            let reader = Reader {
                chain: self.chain(),
                out,
                full,
                to_fill,
                can_share: true,
            };
            let read = self.read_data_into(reader, pace);
            let written = writer.join();
            // Where writing failed, reading ended for that.
            written.unwrap_or_else(|_| Err(Error::damaged("the thread that writes has ended")))?;
            read
        })
    }

    fn write_metadata(&self, out: &File, pace: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; PIECE as usize];
        for piece in pieces(0..self.metadata_len()) {
            let len = piece.end - piece.start;
            let part = buffer.get_mut(..len as usize).unwrap_or_default();
            self.read_at(piece.start, part)?;
            out.write_all_at(part, piece.start).context(|| FAILED)?;
            pace(len)?;
        }
        Ok(())
    }

    fn read_data_into(
        &self,
        mut reader: Reader<'_>,
        pace: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut at = self.metadata_len();
        for window in 0..self.windows() {
            for run in self.data_in(window)? {
                for piece in pieces(run.clone()) {
                    let to = at + (piece.start - run.start);
                    reader.read(piece.clone(), to)?;
                    pace(piece.end - piece.start)?;
                }
                at += (run.end - run.start).next_multiple_of(CLUSTER);
            }
        }
        Ok(())
    }
}

const FAILED: &str = "cannot write the image";

/// Bytes that were read.
struct Piece {
    buffer: Aligned,
    len: usize,
    /// Where they go.
    to: u64,
}

/// Writes what was read, until there is no more.
fn write_pieces(out: &File, pieces: &Receiver<Piece>, empty: &Sender<Aligned>) -> Result<()> {
    let mut direct = Direct::of(out);
    let mut begun: Option<u64> = None;
    for piece in pieces {
        let bytes = piece.buffer.bytes().get(..piece.len).unwrap_or_default();
        for run in runs_of_data(bytes) {
            let part = bytes.get(run.clone()).unwrap_or_default();
            direct
                .write_all_at(out, part, piece.to + run.start as u64)
                .context(|| FAILED)?;
        }
        let from = *begun.get_or_insert(piece.to);
        if !direct.is_direct() && piece.to >= from + BEGUN {
            begin_write_back(out, from..piece.to);
            begun = Some(piece.to);
        }
        // Nobody waits for it once all is read.
        let _ = empty.send(piece.buffer);
    }
    Ok(())
}

struct Reader<'r> {
    chain: &'r Chain,
    out: &'r File,
    full: Sender<Piece>,
    to_fill: Receiver<Aligned>,
    /// Until the file system shows that it can't.
    can_share: bool,
}

impl Reader<'_> {
    /// Reads guest bytes, at most a piece of them, for byte `to` of the file.
    fn read(&mut self, guest: Range<u64>, to: u64) -> Result<()> {
        let start = guest.start;
        // Guest bytes that are read together.
        let mut together = start..start;
        for extent in self.chain.extents(guest)? {
            let end = extent.guest + extent.len;
            let shared = extent.len >= ALONE && self.share(&extent, to + (extent.guest - start))?;
            if !shared {
                together.end = end;
                continue;
            }
            self.copy(together, to, start)?;
            together = end..end;
        }
        self.copy(together, to, start)
    }

    /// Leaves zeros a hole, or has the file system share the extent's blocks; false if it can't.
    fn share(&mut self, extent: &Extent, to: u64) -> Result<bool> {
        let Source::Data { layer, host } = extent.source else {
            return Ok(extent.source == Source::Zero);
        };
        let Some(layer) = self.chain.layers().get(layer).filter(|_| self.can_share) else {
            return Ok(false);
        };
        match clone_range(layer.file(), host, extent.len, self.out, to) {
            Ok(()) => Ok(true),
            Err(error) => {
                // Of a range that is not whole blocks it says EINVAL.
                self.can_share = error.raw_os_error() == Some(libc::EINVAL);
                Ok(false)
            }
        }
    }

    /// Reads guest bytes to be written; byte `start` of the guest goes to `to`.
    fn copy(&mut self, guest: Range<u64>, to: u64, start: u64) -> Result<()> {
        let len = (guest.end - guest.start) as usize;
        if len == 0 {
            return Ok(());
        }
        let ended = || Error::new(libc::ECANCELED, FAILED);
        let mut buffer = self.to_fill.recv().map_err(|_| ended())?;
        let part = buffer.bytes_mut().get_mut(..len).unwrap_or_default();
        self.chain.read_at(guest.start, part)?;
        let to = to + (guest.start - start);
        let piece = Piece { buffer, len, to };
        self.full.send(piece).map_err(|_| ended())
    }
}

/// Where there is anything but zeros, in blocks: those stay holes in a file that has nothing yet.
fn runs_of_data(bytes: &[u8]) -> Vec<Range<usize>> {
    const BLOCK: usize = 16 << 10;
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, block) in bytes.chunks(BLOCK).enumerate() {
        if ZEROS.starts_with(block) {
            continue;
        }
        let block = index * BLOCK..index * BLOCK + block.len();
        match runs.last_mut() {
            Some(last) if last.end == block.start => last.end = block.end,
            _ => runs.push(block),
        }
    }
    runs
}

/// Cut into pieces; where it begins does not matter, for a run begins at a cluster.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    (range.start..end)
        .step_by(PIECE as usize)
        .map(move |at| at..(at + PIECE).min(end))
}

/// `struct file_clone_range` (linux/fs.h).
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    from_length: u64,
    to_offset: u64,
}

/// `_IOW(0x94, 13, struct file_clone_range)` (linux/fs.h), as most machines encode it; elsewhere it
/// fails, and is done without.
const FICLONERANGE: libc::Ioctl = 0x4020_940d_u32 as libc::Ioctl;

/// Has two files share blocks, as btrfs and xfs can.
fn clone_range(
    from: &File,
    from_offset: u64,
    from_length: u64,
    to: &File,
    to_offset: u64,
) -> std::io::Result<()> {
    let request = CloneRange {
        from: i64::from(from.as_raw_fd()),
        from_offset,
        from_length,
        to_offset,
    };
    // SAFETY: both descriptors are open, and `request` is a struct file_clone_range, which is only read.
    match unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Has an empty file share all blocks of another, as btrfs and xfs can; false if the file system can't.
pub fn share_contents(from: &File, to: &File) -> bool {
    // A length of 0 reaches to the end.
    clone_range(from, 0, 0, to, 0).is_ok()
}

/// Asks the kernel to begin writing these bytes of a file to the disk; it is not waited for. Only speed
/// depends on it: what fails here is found by the flush at the end.
pub fn begin_write_back(file: &File, range: Range<u64>) {
    let offset = i64::try_from(range.start).unwrap_or(i64::MAX);
    let length = i64::try_from(range.end - range.start).unwrap_or(0);
    // SAFETY: the descriptor is open; no memory is passed.
    unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset,
            length,
            libc::SYNC_FILE_RANGE_WRITE,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::chain::tests::{chains, open};
    use crate::disk::judges::{Numbers, check_clean, create, info, qemu_io, succeed, text};
    use crate::disk::{Format, Layer, chain_paths};
    use std::path::Path;
    use std::sync::Arc;

    /// Writes the upper layers of a chain as one.
    fn merge(top: &Path, upper: usize, to: &Path) {
        let chain = Arc::new(open(top).unwrap());
        let image = match chain_paths(top).unwrap().get(upper) {
            Some(below) => Flattened::plan_upper(chain, upper, below).unwrap(),
            None => Flattened::plan(chain).unwrap(),
        };
        let mut done = 0;
        let mut pace = |bytes| {
            done += bytes;
            Ok(())
        };
        let out = File::create(to).unwrap();
        image.write_to(&out, &mut pace).unwrap();
        assert_eq!(out.metadata().unwrap().len(), image.len());
        assert!(done <= image.len() && done + CLUSTER > image.metadata_len());
    }

    fn flattened(top: &Path) -> Vec<u8> {
        let image = Flattened::plan(Arc::new(open(top).unwrap())).unwrap();
        let mut bytes = vec![1u8; image.len() as usize];
        image.read_at(0, &mut bytes).unwrap();
        bytes
    }

    /// Fails unless any number of upper layers, written as one, reads as before, for qemu and for
    /// us, and flattens to the very same image.
    fn assert_merges(what: &str, top: &Path) {
        let merged = top.with_extension("merged");
        let paths = chain_paths(top).unwrap();
        let before = flattened(top);
        for upper in 1..=paths.len() {
            let what = format!("{what}, the upper {upper}");
            merge(top, upper, &merged);
            check_clean(&merged);
            let said = succeed("qemu-img", &["compare", text(top), text(&merged)]);
            assert!(said.contains("identical"), "{what}: {said}");
            let info = info(&merged);
            match paths.get(upper) {
                Some(below) => assert_eq!(info["full-backing-filename"], text(below), "{what}"),
                None => assert!(info.get("backing-filename").is_none(), "{what}"),
            }
            assert!(flattened(&merged) == before, "{what} exports otherwise");
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn upper_layers_as_one_read_as_before_in_chains_of_every_kind() {
        let dir = tempfile::tempdir().unwrap();
        for (what, top) in chains(dir.path()) {
            assert_merges(&what, &top);
        }
    }

    /// What two layers say of one place each: data, zeros, nothing, something thrown away, in whole
    /// clusters and in part of one, and beyond the end of either.
    #[test]
    #[ignore = "needs programs"]
    fn whatever_two_layers_say_of_a_cluster_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let bottom = dir.path().join("bottom.qcow2");
        create(&bottom, "cluster_size=64k", None, "6M");
        qemu_io(&bottom, &["write -P 1 0 6M"]);
        let says = |layer: u8, at: u64, kind: usize| match kind {
            0 => None,
            1 => Some(format!("write -P {layer} {at} 64k")),
            2 => Some(format!("write -z {at} 64k")),
            3 => Some(format!("write -z -u {at} 64k")),
            4 => Some(format!("discard {at} 64k")),
            5 => Some(format!("write -P {layer} {} 4k", at + 8192)),
            _ => Some(format!("write -z {} 8k", at + 16384)),
        };
        for (row, (below, above)) in [
            ("64k", "64k"),
            ("4k", "64k"),
            ("64k", "4k"),
            ("4k", "512"),
            ("2M", "64k"),
            ("512", "2M"),
        ]
        .into_iter()
        .enumerate()
        {
            for (sizes, (size_below, size_above)) in [
                ("6M", "6M"),
                ("3170304", "6M"),
                ("6M", "3170304"),
                ("5M", "7M"),
            ]
            .into_iter()
            .enumerate()
            {
                let name = |what: &str| dir.path().join(format!("{row}-{sizes}-{what}"));
                let (p, c) = (name("p.qcow2"), name("c.qcow2"));
                let options = |cluster: &str| format!("cluster_size={cluster}");
                create(&p, &options(below), Some((&bottom, "qcow2")), size_below);
                create(&c, &options(above), Some((&p, "qcow2")), size_above);
                let (mut of_p, mut of_c) = (Vec::new(), Vec::new());
                for pair in 0..49u64 {
                    let at = pair * 65536;
                    let inside = |image: &Path| at + 65536 <= open(image).unwrap().virtual_size();
                    if inside(&p) {
                        of_p.extend(says(2, at, (pair / 7) as usize));
                    }
                    if inside(&c) {
                        of_c.extend(says(3, at, (pair % 7) as usize));
                    }
                }
                for (image, commands) in [(&p, of_p), (&c, of_c)] {
                    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
                    qemu_io(image, &commands);
                }
                assert_merges(&format!("{below} under {above}, {sizes}"), &c);
            }
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn zeros_over_data_stay_zeros_and_what_nobody_speaks_of_stays_unallocated() {
        let dir = tempfile::tempdir().unwrap();
        let name = |what: &str| dir.path().join(what);
        let (bottom, p, c, merged) = (name("b"), name("p"), name("c"), name("m"));
        create(&bottom, "cluster_size=64k", None, "1M");
        qemu_io(&bottom, &["write -P 1 0 1M"]);
        create(&p, "cluster_size=64k", Some((&bottom, "qcow2")), "1M");
        qemu_io(&p, &["write -P 2 0 64k"]);
        create(&c, "cluster_size=64k", Some((&p, "qcow2")), "1M");
        qemu_io(&c, &["write -z -u 0 128k"]);
        merge(&c, 2, &merged);
        let layer = Layer::open(&merged, Format::Qcow2).unwrap();
        use crate::disk::layer::Run;
        assert_eq!(layer.run_at(0, 1 << 20).unwrap(), (Run::Zero, 128 << 10));
        let rest = layer.run_at(128 << 10, 1 << 20).unwrap();
        assert_eq!(rest, (Run::Unallocated, (1 << 20) - (128 << 10)));
        // Header, refcount table and block, L1 and one L2 table.
        assert_eq!(std::fs::metadata(&merged).unwrap().len(), 5 * CLUSTER);
    }

    #[test]
    #[ignore = "needs programs"]
    fn random_layers_merge_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut numbers = Numbers(0x5eed_0007);
        for round in 0..12 {
            let mut below: Option<std::path::PathBuf> = None;
            for level in 0..4 {
                let image = dir.path().join(format!("{round}-{level}.qcow2"));
                let cluster = ["512", "4k", "64k", "64k", "256k"][numbers.below(5) as usize];
                let size = (1 << 20) + 512 * numbers.below(4096);
                let backing = below.as_deref().map(|below| (below, "qcow2"));
                let options = format!("cluster_size={cluster}");
                create(&image, &options, backing, &size.to_string());
                let mut commands = Vec::new();
                for _ in 0..10 {
                    let at = numbers.below(size / 512) * 512;
                    let len = ((1 + numbers.below(400)) * 512).min(size - at);
                    commands.push(match numbers.below(5) {
                        0 => format!("write -z {at} {len}"),
                        1 => format!("write -z -u {at} {len}"),
                        2 => format!("discard {at} {len}"),
                        n => format!("write -P {} {at} {len}", n + numbers.below(200)),
                    });
                }
                let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
                qemu_io(&image, &commands);
                below = Some(image);
            }
            assert_merges(&format!("round {round}"), &below.unwrap());
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn zeros_that_are_data_take_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let (image, out) = (dir.path().join("image.qcow2"), dir.path().join("out"));
        create(&image, "cluster_size=64k", None, "64M");
        qemu_io(&image, &["write -P 0 0 32M", "write -P 1 32M 64k"]);
        merge(&image, 1, &out);
        use std::os::unix::fs::MetadataExt;
        let meta = std::fs::metadata(&out).unwrap();
        assert!(meta.len() > 32 << 20 && meta.blocks() * 512 < 1 << 20);
        check_clean(&out);
    }

    #[test]
    #[ignore = "needs programs"]
    fn who_paces_the_writing_may_end_it() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image.qcow2");
        create(&image, "cluster_size=64k", None, "64M");
        qemu_io(&image, &["write -P 1 0 64M"]);
        let flat = Flattened::plan(Arc::new(open(&image).unwrap())).unwrap();
        let out = File::create(dir.path().join("out")).unwrap();
        let mut left = 3;
        let mut pace = |_| {
            left -= 1;
            match left {
                0 => Err(crate::Error::new(libc::ECANCELED, "enough")),
                _ => Ok(()),
            }
        };
        let error = flat.write_to(&out, &mut pace).unwrap_err();
        assert_eq!(error.errno(), libc::ECANCELED);
    }
}
