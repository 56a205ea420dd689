//! An upper bound of what zstd data decodes to, from the headers of its frames and blocks alone
//! (RFC 8878).

use super::frames::{MAGIC, begins_frame};

/// The most bytes that come out of a block.
pub(super) const BLOCK_MAX: u64 = 128 << 10;
/// Bytes of a block's header.
const BLOCK_HEADER: usize = 3;
/// Bytes of a frame's checksum.
const CHECKSUM: u64 = 4;

/// A walk along the headers. It takes every byte of the archive, in order, but judges none. After
/// anything but zstd it returns that anything may come.
pub(super) struct OutputBound {
    next: NextHeader,
    /// Bytes before the next header.
    skip: u64,
    /// The part of that header that came.
    header: Vec<u8>,
}

#[derive(Clone, Copy)]
enum NextHeader {
    Frame,
    Block {
        checksum: bool,
    },
    /// Unknown.
    Lost,
}

impl OutputBound {
    pub(super) fn new() -> OutputBound {
        OutputBound {
            next: NextHeader::Frame,
            skip: 0,
            header: Vec::new(),
        }
    }

    /// Takes bytes; returns an upper bound of what comes out of the blocks that begin in them.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> u64 {
        let mut most = 0u64;
        while !bytes.is_empty() {
            if let NextHeader::Lost = self.next {
                return u64::MAX;
            }
            let skipped = usize::try_from(self.skip).map_or(bytes.len(), |n| n.min(bytes.len()));
            self.skip = self.skip.saturating_sub(skipped as u64);
            let Some((first, rest)) = bytes.get(skipped..).and_then(<[u8]>::split_first) else {
                break;
            };
            bytes = rest;
            self.header.push(*first);
            most = most.saturating_add(match self.next {
                NextHeader::Block { checksum } => self.block(checksum),
                NextHeader::Frame | NextHeader::Lost => self.frame(),
            });
        }
        most
    }

    /// Takes the header of a frame, if it is complete.
    fn frame(&mut self) -> u64 {
        match begins_frame(&self.header) {
            None => {}
            // Padding, or something else than zstd.
            Some(false) => self.next = NextHeader::Lost,
            Some(true) => match self.header.strip_prefix(&MAGIC) {
                Some([descriptor, rest @ ..]) if rest.len() >= frame_header(*descriptor) => {
                    let checksum = descriptor & 4 != 0;
                    self.go_on(NextHeader::Block { checksum }, 0);
                }
                Some(_) => {}
                None => {
                    if let [_, _, _, _, a, b, c, d] = *self.header.as_slice() {
                        let length = u32::from_le_bytes([a, b, c, d]);
                        self.go_on(NextHeader::Frame, length.into());
                    }
                }
            },
        }
        0
    }

    /// Takes the header of a block, if it is complete; returns an upper bound of what comes out of
    /// the block.
    fn block(&mut self, checksum: bool) -> u64 {
        let [a, b, c] = *self.header.as_slice() else {
            debug_assert!(self.header.len() < BLOCK_HEADER);
            return 0;
        };
        let header = u32::from_le_bytes([a, b, c, 0]);
        let size = u64::from(header >> 3);
        let (stored, most) = match (header >> 1) & 3 {
            // As it is.
            0 => (size, size),
            // One byte, so many times.
            1 => (1, size),
            // Compressed.
            2 => (size, BLOCK_MAX),
            _ => {
                self.next = NextHeader::Lost;
                return u64::MAX;
            }
        };
        let is_last = header & 1 != 0;
        match (is_last, checksum) {
            (false, _) => self.go_on(NextHeader::Block { checksum }, stored),
            (true, false) => self.go_on(NextHeader::Frame, stored),
            (true, true) => self.go_on(NextHeader::Frame, stored.saturating_add(CHECKSUM)),
        }
        most
    }

    fn go_on(&mut self, next: NextHeader, skip: u64) {
        self.header.clear();
        self.next = next;
        self.skip = skip;
    }
}

/// Returns the bytes of a frame's header after its descriptor.
fn frame_header(descriptor: u8) -> usize {
    let single_segment = descriptor & 0x20 != 0;
    let window = usize::from(!single_segment);
    let dictionary = match descriptor & 3 {
        3 => 4,
        n => usize::from(n),
    };
    let content_size = match descriptor >> 6 {
        0 => usize::from(single_segment),
        n => 1 << n,
    };
    window
        .saturating_add(dictionary)
        .saturating_add(content_size)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// What the program makes of `data`.
    fn zstd(args: &[&str], data: &[u8]) -> Vec<u8> {
        let mut child = Command::new("zstd")
            .args(["-c", "-q"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || stdin.write_all(data).unwrap());
            child.wait_with_output().unwrap().stdout
        })
    }

    /// Zeros, noise, and what lies between.
    fn data() -> Vec<u8> {
        let mut noise = 1u32;
        (0..1_500_000u32)
            .map(|at| {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                match at / 500_000 {
                    0 => 0,
                    1 => (noise >> 24) as u8,
                    _ => (noise >> 30) as u8,
                }
            })
            .collect()
    }

    #[test]
    #[ignore = "needs programs"]
    fn no_more_comes_out_than_the_headers_say() {
        let data = data();
        for args in [["-3", "--check"], ["-19", "--no-check"], ["--ultra", "-22"]] {
            let frame = zstd(&args, &data);
            let short = zstd(&args, b"x");
            let skippable = [0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3];
            let all = [&frame, &short, &skippable[..], &frame].concat();
            for piece in [1, 7, 1000, all.len()] {
                let mut bound = OutputBound::new();
                let (mut most, mut came) = (0, Vec::new());
                let mut decoder = zstd::stream::write::Decoder::new(&mut came).unwrap();
                for bytes in all.chunks(piece) {
                    most += bound.feed(bytes);
                    decoder.write_all(bytes).unwrap();
                    decoder.flush().unwrap();
                    assert!(decoder.get_ref().len() as u64 <= most);
                }
                assert_eq!(came.len(), 2 * data.len() + 1);
                assert!(most < came.len() as u64 * 2, "{most} is no use");
            }
        }
    }

    #[test]
    #[ignore = "needs programs"]
    fn anything_may_come_of_what_is_no_zstd() {
        let frame = zstd(&[], &data());
        for garbage in [&[0; 8], b"manifest"] {
            let mut bound = OutputBound::new();
            assert_ne!(bound.feed(&frame), u64::MAX);
            bound.feed(garbage);
            assert_eq!(bound.feed(b"more"), u64::MAX);
        }
        // A block of the reserved type.
        let mut bound = OutputBound::new();
        let header = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 1];
        assert_eq!(bound.feed(&header), 0);
        assert_eq!(bound.feed(&[0x0e, 0, 0]), u64::MAX);
    }
}
