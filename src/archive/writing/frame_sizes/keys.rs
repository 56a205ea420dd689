//! Keys of frames: what the size of a frame follows from.

use std::ops::Range;

use zstd::zstd_safe;

use crate::Result;
use crate::disk::{Chain, DataSource};

/// What the size of a frame follows from, as a hash: its bytes, or where they come from.
pub type FrameKey = [u8; 16];

/// Says what a frame's key is of; to be raised when the same bytes are made into another frame.
const KEY_CONTEXT: &str = "boxlitefs 2026-11-25 zstd frame of 2 MiB of guest data, layout 1";

/// How a frame's bytes can be recognised without compressing them.
pub enum Origin {
    /// They are of layers that are never written again: the key says where they lie.
    Frozen(FrameKey),
    /// Only the bytes themselves tell.
    Live,
}

/// Makes the keys of one archive's frames.
pub struct FrameKeys {
    /// Hash of all that a frame follows from besides its bytes.
    level: blake3::Hasher,
    /// The top layer may still be written: where its data lie says nothing about what they are.
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

/// What every key of a frame begins with.
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
