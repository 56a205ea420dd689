//! Decodes zstd frames, one after another, as they arrive (RFC 8878).

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::unpacker::Unpacker;
use crate::{Context, Error, Result};

/// First bytes of a zstd frame.
pub(super) const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Bytes 1–3 of a skippable frame; byte 0 is 0x50 to 0x5f.
const SKIPPABLE: [u8; 3] = [0x2a, 0x4d, 0x18];
/// The largest window that is accepted: 128 MiB, what `zstd` itself decodes without `--long` or
/// `--memory`.
const WINDOW_LOG_MAX: u32 = 27;
/// Bytes decoded at once; at least a block (128 KiB).
const OUTPUT: usize = 256 << 10;

/// Returns whether `start` begins a zstd or skippable frame; `None` while it is too short to tell.
pub(super) fn begins_frame(start: &[u8]) -> Option<bool> {
    let begins = |magic: &[u8]| start.iter().zip(magic).all(|(a, b)| a == b);
    let skippable = match start.split_first() {
        Some((first, rest)) => {
            first & 0xf0 == 0x50 && rest.iter().zip(&SKIPPABLE).all(|(a, b)| a == b)
        }
        None => true,
    };
    match begins(&MAGIC) || skippable {
        true if start.len() < MAGIC.len() => None,
        yes => Some(yes),
    }
}

/// The decoder of a sequence of frames.
pub(super) struct Frames {
    decoder: Decoder<'static>,
    output: Vec<u8>,
    /// Between frames: the beginning of the next magic. zstd's own check would accept formats of
    /// old versions.
    magic: Vec<u8>,
    in_frame: bool,
}

impl Frames {
    pub(super) fn new() -> Result<Frames> {
        let mut decoder = Decoder::new().context(|| "cannot decode zstd")?;
        decoder
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .context(|| "cannot limit zstd's memory")?;
        Ok(Frames {
            decoder,
            output: vec![0; OUTPUT],
            magic: Vec::with_capacity(MAGIC.len()),
            in_frame: false,
        })
    }

    /// Decodes `bytes` into `to`, as far as they go, and reports the ends of frames to it.
    pub(super) fn push(&mut self, mut bytes: &[u8], to: &mut Unpacker) -> Result<()> {
        while !bytes.is_empty() {
            bytes = if self.in_frame {
                self.decode(bytes, to)?
            } else {
                self.between(bytes, to)?
            };
        }
        Ok(())
    }

    /// Takes bytes between two frames, until the next magic is complete.
    fn between<'b>(&mut self, bytes: &'b [u8], to: &mut Unpacker) -> Result<&'b [u8]> {
        let Some((first, rest)) = bytes.split_first() else {
            return Ok(bytes);
        };
        if self.magic.is_empty() && *first == 0 {
            to.padding()?;
            let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
            return Ok(bytes.get(zeros..).unwrap_or_default());
        }
        self.magic.push(*first);
        match begins_frame(&self.magic) {
            None => {}
            Some(true) => {
                let magic = std::mem::take(&mut self.magic);
                self.in_frame = true;
                self.decode(&magic, to)?;
            }
            Some(false) => {
                return Err(Error::bad_archive(match to.arrived {
                    Some(_) => "the archive is refused: after its end come bytes that are neither zeros nor a zstd frame".into(),
                    None => format!(
                        "the archive is damaged in {}: a zstd frame is followed by something else",
                        to.members.place()
                    ),
                }));
            }
        }
        Ok(rest)
    }

    /// Decodes until the frame or `bytes` end; returns the rest of `bytes`.
    fn decode<'b>(&mut self, mut bytes: &'b [u8], to: &mut Unpacker) -> Result<&'b [u8]> {
        loop {
            let mut input = InBuffer::around(bytes);
            let mut output = OutBuffer::around(self.output.as_mut_slice());
            let missing = self
                .decoder
                .run(&mut input, &mut output)
                .map_err(|e| damaged(e, to))?;
            let (used, made) = (input.pos(), output.pos());
            bytes = bytes.get(used..).unwrap_or_default();
            to.tar(self.output.get(..made).unwrap_or_default())?;
            if missing == 0 {
                self.in_frame = false;
                to.boundary()?;
                return Ok(bytes);
            }
            // A full output buffer may mean that more is waiting inside the decoder.
            if bytes.is_empty() && made < self.output.len() {
                return Ok(bytes);
            }
        }
    }
}

fn damaged(cause: std::io::Error, to: &Unpacker) -> Error {
    Error::bad_archive(format!(
        "the archive's zstd data is damaged or needs a window over 128 MiB, in {}",
        to.members.place()
    ))
    .caused_by(cause)
}
