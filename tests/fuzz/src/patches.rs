//! Changes a few bytes of an image, as the fuzzer's bytes say.
//!
//! A file system image is large and mostly empty, so mutating it directly would rarely change
//! anything that matters. So the input is short: the number of an image, and changes to places
//! that are not empty.

use crate::repair;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes of a line, the unit in which changes address the image.
const LINE: usize = 16;
/// The byte that fills files in the images. Such contents do not matter to any parser.
const CONTENTS: u8 = 0xc7;
/// The largest number of changes to one image.
const MAX_CHANGES: usize = 64;

/// Boundary values.
const ODD: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0x7fff,
    0x8000,
    0x8001,
    0xffff,
    0x0001_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_fffe,
    0xffff_ffff_ffff_ffff,
];

/// An image that is changed and then restored.
pub struct Canvas {
    path: PathBuf,
    file: File,
    good: Vec<u8>,
    now: Vec<u8>,
    changed: Vec<Range<usize>>,
    /// Offsets of the lines that are not empty.
    lines: Vec<usize>,
}

impl Canvas {
    /// Copies `image` to `path`.
    pub fn of(image: &Path, path: PathBuf) -> Canvas {
        let good = fs::read(image).unwrap();
        fs::write(&path, &good).unwrap();
        let lines = (0..good.len())
            .step_by(LINE)
            .filter(|at| {
                let line = &good[*at..good.len().min(at + LINE)];
                line.iter().any(|byte| *byte != 0) && line.iter().any(|byte| *byte != CONTENTS)
            })
            .collect();
        Canvas {
            file: File::options().write(true).open(&path).unwrap(),
            path,
            now: good.clone(),
            good,
            changed: Vec::new(),
            lines,
        }
    }

    /// Returns the path of the copy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the image. The lowest bit of the first byte of `input` says whether to repair
    /// checksums, without which some changes would not get past the checksum test. The changes
    /// follow.
    pub fn change(&mut self, input: &[u8]) {
        let mut input = Input(input);
        let right = input.byte() & 1 == 1;
        for _ in 0..MAX_CHANGES {
            if input.0.is_empty() {
                break;
            }
            self.step(&mut input);
        }
        if right {
            repair::checksums(self);
        }
        for range in &self.changed {
            let bytes = &self.now[range.clone()];
            self.file.write_all_at(bytes, range.start as u64).unwrap();
        }
    }

    /// Undoes all changes.
    pub fn restore(&mut self) {
        for range in std::mem::take(&mut self.changed) {
            let good = &self.good[range.clone()];
            self.file.write_all_at(good, range.start as u64).unwrap();
            self.now[range.clone()].copy_from_slice(good);
        }
    }

    /// Makes one change.
    fn step(&mut self, input: &mut Input) {
        let what = input.byte();
        let at = self.place(input);
        let wide = 1 << (what >> 3 & 3);
        let big_endian = what >> 5 & 1 == 1;
        match what & 7 {
            // Bytes of the input.
            0 | 1 => {
                let bytes = input.bytes(1 + usize::from(what >> 3 & 15)).to_vec();
                self.put(at, &bytes);
            }
            // A boundary value.
            2 => self.put_number(at, ODD[usize::from(input.byte() & 15)], wide, big_endian),
            // The old value plus or minus a little.
            3 => {
                let more = i64::from(input.byte() as i8);
                let number = self.number(at, wide, big_endian).wrapping_add_signed(more);
                self.put_number(at, number, wide, big_endian);
            }
            // A value of two bytes.
            4 => {
                let number = u64::from(input.word());
                self.put_number(at, number, wide, big_endian);
            }
            // Bytes from elsewhere in the image, which duplicates a structure.
            5 => {
                let from = self.place(input);
                let len = LINE << (what >> 3 & 7);
                let bytes = self.get(from, len).to_vec();
                self.put(at, &bytes);
            }
            // The number of a block that is not empty.
            6 => {
                let block = self.place(input) as u64 >> 10;
                let block = [block, block / 4, block / 64, block * 2][usize::from(what >> 6)];
                self.put_number(at, block, 4, big_endian);
            }
            // Zeros.
            _ => self.put(at, &vec![0; LINE << (what >> 3 & 7)]),
        }
    }

    /// Picks an offset in or near a line that is not empty.
    fn place(&self, input: &mut Input) -> usize {
        let line = usize::from(input.word());
        let within = usize::from(input.byte() & 31);
        match self.lines.len() {
            0 => within,
            count => self.lines[line % count] + within,
        }
    }

    fn number(&self, at: usize, wide: usize, big_endian: bool) -> u64 {
        let bytes = self.get(at, wide).iter();
        let add = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        match big_endian {
            true => bytes.fold(0, add),
            false => bytes.rev().fold(0, add),
        }
    }

    fn put_number(&mut self, at: usize, number: u64, wide: usize, big_endian: bool) {
        match big_endian {
            true => self.put(at, &number.to_be_bytes()[8 - wide..]),
            false => self.put(at, &number.to_le_bytes()[..wide]),
        }
    }

    /// Returns the current bytes at `at`, up to the end of the image.
    pub fn get(&self, at: usize, len: usize) -> &[u8] {
        let end = at.saturating_add(len).min(self.now.len());
        self.now.get(at..end).unwrap_or_default()
    }

    /// Returns the whole current image.
    pub fn all(&self) -> &[u8] {
        &self.now
    }

    /// Puts bytes at `at`, up to the end of the image.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let end = at.saturating_add(bytes.len()).min(self.now.len());
        if let Some(there) = self.now.get_mut(at..end) {
            there.copy_from_slice(&bytes[..there.len()]);
            self.changed.push(at..end);
        }
    }
}

/// The rest of the fuzzer's bytes. Reads beyond their end return zeros.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        let low = self.byte();
        u16::from_le_bytes([low, self.byte()])
    }

    fn bytes(&mut self, len: usize) -> &[u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}
