//! Keys of frames: hashes of what determines a frame's size.

use std::ops::Range;

use zstd::zstd_safe;

use crate::Result;
use crate::disk::{Chain, DataSource};

/// A hash of what determines the size of a frame: its bytes, or where they come from.
pub type FrameKey = [u8; 16];

/// The encoding that keys are of. Change it when the same bytes make another frame.
const KEY_CONTEXT: &str = "boxlitefs 2026-11-25 zstd frame of 2 MiB of guest data, layout 1";

/// How a frame is recognised without compressing it.
pub enum Origin {
    /// Its bytes are in layers that are never written again: the key says where.
    Frozen(FrameKey),
    /// Only by its bytes.
    Live,
}

/// Makes the keys of one archive's frames.
pub struct FrameKeys {
    /// A hash of what determines a frame besides its bytes.
    level: blake3::Hasher,
    /// The top layer may still be written, so where its data is says nothing about what it is.
    live: bool,
}

impl FrameKeys {
    /// Keys of frames compressed at `level`; `live` says that the top layer may still be written.
    pub fn new(level: i32, live: bool) -> FrameKeys {
        FrameKeys {
            level: keys_at(level),
            live,
        }
    }

    /// Returns how the frame of these guest bytes can be recognised.
    ///
    /// # Errors
    /// Those of reading the layers' tables.
    pub fn origin(&self, chain: &Chain, guest: Range<u64>) -> Result<Origin> {
        let states: Vec<_> = chain.states().collect();
        let mut hasher = self.level.clone();
        hasher.update(b"where");
        for extent in chain.extents(guest.clone())? {
            let (kind, layer, place) = match extent.source {
                DataSource::Zero => (0u8, None, 0),
                DataSource::Data { layer, host } => (1, Some(layer), host),
                DataSource::Compressed { layer } => (2, Some(layer), extent.guest),
            };
            if self.live && layer == Some(0) {
                return Ok(Origin::Live);
            }
            hasher.update(&[kind]);
            for number in [extent.guest - guest.start, extent.len, place] {
                hasher.update(&number.to_le_bytes());
            }
            if let Some(state) = layer.and_then(|layer| states.get(layer)) {
                hasher.update(&state.bytes());
            }
        }
        Ok(Origin::Frozen(short(&hasher)))
    }

    /// Returns the key of a frame by the bytes in it.
    pub fn of_content(&self, bytes: &[u8]) -> FrameKey {
        let mut hasher = self.level.clone();
        hasher.update(b"what");
        hasher.update(bytes);
        short(&hasher)
    }
}

/// Returns the beginning of every key.
fn keys_at(level: i32) -> blake3::Hasher {
    let mut keys = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    keys.update(&level.to_le_bytes());
    keys.update(&zstd_safe::version_number().to_le_bytes());
    keys
}

/// Returns the key of a compressed archive by that of the plain one
/// ([`Export::state_key`](crate::archive::Export::state_key)) and zstd's level.
pub fn compressed_key(level: i32, plain: &[u8; 32]) -> [u8; 32] {
    keys_at(level).update(plain).finalize().into()
}

fn short(hasher: &blake3::Hasher) -> FrameKey {
    let mut key = FrameKey::default();
    hasher.finalize_xof().fill(&mut key);
    key
}
