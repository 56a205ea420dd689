//! How a home is shown.

use std::str::FromStr;
use std::time::Duration;

use crate::exports::Compression;
use crate::store::{Compacting, ImportLimits};

/// How a home is shown.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Refuse changes, and write nothing into the home at all.
    pub read_only: bool,
    /// Make no change while a BoxLite runtime has the home, not even one that is safe then.
    pub is_exclusive: bool,
    /// How compressed archives are made and kept.
    pub compression: Compression,
    /// When layers are merged.
    pub compacting: Compacting,
    /// What archives may bring.
    pub imports: ImportLimits,
    /// What links of guests say.
    pub links: Links,
    /// How long what is removed or restored over can be had back.
    pub undo: Undo,
}

/// How long what is removed or restored over can be had back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undo {
    /// None for not at all.
    pub keep_for: Option<Duration>,
}

impl Default for Undo {
    /// Returns a day.
    fn default() -> Self {
        Undo {
            keep_for: Some(Duration::from_secs(24 * 60 * 60)),
        }
    }
}

impl FromStr for Undo {
    type Err = &'static str;

    /// Parses a time or `off`. The error says what is wanted.
    fn from_str(text: &str) -> Result<Undo, &'static str> {
        let keep_for = match text {
            "off" => None,
            time => Some(long(time).ok_or("a time such as 30m, 24h or 7d, or off")?),
        };
        Ok(Undo { keep_for })
    }
}

/// Parses a time: a number of seconds, or with s, m, h or d, more than 0.
fn long(time: &str) -> Option<Duration> {
    let digits = time.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match time.get(digits.len()..)? {
        "" | "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return None,
    };
    let seconds = digits.parse::<u64>().ok()?.checked_mul(unit)?;
    // Times are stored in nanoseconds.
    (1..u64::MAX / 4_000_000_000)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
}

/// What the symbolic links in a guest are shown to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// What leads to the guest's own files, and never out of `rootfs`.
    #[default]
    Inside,
    /// What the guest said, wherever that leads on the machine of the mount.
    Guest,
}
