//! Receives a hostile archive in pieces.
//!
//! The first byte of an input contains options, the rest is meant to be a tar archive. The options
//! say whether to repair the checksums of headers, whether to compress, and the size of the pieces.

#![no_main]

use boxlitefs::archive::{Incoming, Progress};
use boxlitefs::disk::inspect_standalone;
use boxlitefs_fuzz::scratch;
use libfuzzer_sys::{Corpus, fuzz_target};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

const BLOCK: usize = 512;
const PIECES: [usize; 4] = [1 << 20, 512, 1000, 77];
/// The largest sparse member that is tried: one may expand to a terabyte, which is slow to hash.
const EXPANDED: u64 = 16 << 20;

static DISK: LazyLock<PathBuf> = LazyLock::new(|| scratch::directory().join("disk.qcow2"));

fuzz_target!(|input: &[u8]| -> Corpus {
    let Some((how, tar)) = input.split_first() else {
        return Corpus::Reject;
    };
    let mut tar = tar.to_vec();
    if how & 1 != 0 {
        put_right(&mut tar);
    }
    // The receiver may read any block as a header, so check all of them.
    if tar
        .chunks_exact(BLOCK)
        .any(|block| expanded(block) > EXPANDED)
    {
        return Corpus::Reject;
    }
    let archive = match how >> 1 & 3 {
        0 | 1 => tar,
        2 => zstd::encode_all(&tar[..], 1).unwrap(),
        _ => in_frames(&tar),
    };
    let at_once = receive(&archive, archive.len().max(1));
    let in_pieces = receive(&archive, PIECES[usize::from(how >> 3 & 3)]);
    assert_eq!(at_once, in_pieces, "the result depends on the pieces");
    Corpus::Keep
});

/// Receives an archive; returns whether it was complete, or the errno.
fn receive(archive: &[u8], piece: usize) -> Result<bool, i32> {
    let mut incoming = Incoming::begin(&DISK, None, None).unwrap();
    let received = write(&mut incoming, archive, piece);
    let finished = incoming.finish().map(|arrived| arrived.manifest.version);
    match (&received, &finished) {
        (Ok(true), Ok(version)) => assert!((1..=5).contains(version)),
        (Ok(false), Err(_)) => {}
        // A refused archive stays refused, with the same errno.
        (Err(errno), Err(error)) => assert_eq!(*errno, error.errno()),
        other => panic!("{other:?}"),
    }
    drop(incoming);
    assert_eq!(DISK.exists(), received == Ok(true));
    if received == Ok(true) {
        inspect_standalone(&DISK).unwrap();
        std::fs::remove_file(Path::new(&*DISK)).unwrap();
    }
    received
}

fn write(incoming: &mut Incoming, archive: &[u8], piece: usize) -> Result<bool, i32> {
    let mut complete = false;
    for bytes in archive.chunks(piece) {
        let progress = incoming.write(bytes).map_err(|error| error.errno())?;
        assert!(!complete || progress == Progress::Complete);
        complete = progress == Progress::Complete;
        assert_eq!(incoming.arrived().is_some(), complete);
    }
    Ok(complete)
}

fn in_frames(tar: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for some in tar.chunks(3 * BLOCK) {
        let mut frame = zstd::stream::write::Encoder::new(&mut all, 1).unwrap();
        frame.write_all(some).unwrap();
        frame.finish().unwrap();
    }
    all
}

/// Returns the offsets of a tar archive's headers.
fn headers(tar: &[u8]) -> impl Iterator<Item = usize> {
    let mut next = Some(0);
    std::iter::from_fn(move || {
        let at = next.filter(|at| at + BLOCK <= tar.len())?;
        let size = octal(&tar[at + 124..at + 136]).min(1 << 40) as usize;
        next = Some(at + BLOCK + size.next_multiple_of(BLOCK));
        Some(at)
    })
}

/// Repairs the checksums of headers.
fn put_right(tar: &mut [u8]) {
    for at in headers(tar).collect::<Vec<_>>() {
        let header = &mut tar[at..at + BLOCK];
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
}

/// Returns the expanded size in a sparse member's header.
fn expanded(header: &[u8]) -> u64 {
    match header[156] {
        b'S' if header[483] & 0x80 != 0 => u64::MAX,
        b'S' => octal(&header[483..495]),
        _ => 0,
    }
}

fn octal(digits: &[u8]) -> u64 {
    let digits = digits.iter().skip_while(|digit| **digit == b' ');
    digits
        .take_while(|digit| matches!(digit, b'0'..=b'7'))
        .fold(0, |number: u64, digit| {
            number.wrapping_mul(8) + u64::from(digit - b'0')
        })
}
