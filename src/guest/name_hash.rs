//! The hashes of names that indexes of directories are sorted by.

/// How names are hashed, as the root of an index has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum HashKind {
    /// The one of early ext3.
    Legacy,
    /// Half of MD4's rounds.
    HalfMd4,
    /// The Tiny Encryption Algorithm.
    Tea,
}

/// A way to hash names: the kind, whether bytes of names count as signed, and the seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct NameHash {
    /// The function.
    pub kind: HashKind,
    /// Whether bytes above 127 are negative numbers, as `char` is on x86.
    pub signed: bool,
    /// The file system's own seed; zeros for none.
    pub seed: [u32; 4],
}

/// What hashing begins with where the file system has no seed: that of MD4.
const NO_SEED: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
/// The largest hash is kept for the end of a directory.
const END: u32 = 0xffff_fffe;

impl NameHash {
    /// The hash of a name; its lowest bit is 0.
    pub fn of(self, name: &[u8]) -> u32 {
        let mut state = match self.seed {
            [0, 0, 0, 0] => NO_SEED,
            seed => seed,
        };
        let hash = match self.kind {
            HashKind::Legacy => self.legacy(name),
            HashKind::HalfMd4 => {
                for at in (0..name.len()).step_by(32) {
                    half_md4(&mut state, &self.words::<8>(&name[at..]));
                }
                state[1]
            }
            HashKind::Tea => {
                for at in (0..name.len()).step_by(16) {
                    tea(&mut state, &self.words::<4>(&name[at..]));
                }
                state[0]
            }
        };
        match hash & !1 {
            END => END - 2,
            hash => hash,
        }
    }

    /// A byte of a name as a number.
    fn number(self, byte: u8) -> u32 {
        if self.signed {
            i32::from(byte as i8) as u32
        } else {
            u32::from(byte)
        }
    }

    fn legacy(self, name: &[u8]) -> u32 {
        let (mut hash, mut before) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
        for byte in name {
            let byte = self.number(*byte).wrapping_mul(7_152_373);
            let mut next = before.wrapping_add(hash ^ byte);
            if next & 0x8000_0000 != 0 {
                next = next.wrapping_sub(0x7fff_ffff);
            }
            (before, hash) = (hash, next);
        }
        hash << 1
    }

    /// The beginning of `name` as `N` words, filled up with its length.
    fn words<const N: usize>(self, name: &[u8]) -> [u32; N] {
        // A name has 255 bytes at most, so its length takes one.
        let filler = u32::from_ne_bytes([name.len() as u8; 4]);
        let mut words = [filler; N];
        for (word, bytes) in words.iter_mut().zip(name.chunks(4)) {
            for byte in bytes {
                *word = (*word << 8).wrapping_add(self.number(*byte));
            }
        }
        words
    }
}

fn tea(state: &mut [u32; 4], words: &[u32; 4]) {
    const DELTA: u32 = 0x9e37_79b9;
    let [mut left, mut right, ..] = *state;
    let [a, b, c, d] = *words;
    let mix = |of: u32, sum: u32, first: u32, second: u32| {
        (of << 4).wrapping_add(first) ^ of.wrapping_add(sum) ^ (of >> 5).wrapping_add(second)
    };
    let mut sum = 0u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(DELTA);
        left = left.wrapping_add(mix(right, sum, a, b));
        right = right.wrapping_add(mix(left, sum, c, d));
    }
    state[0] = state[0].wrapping_add(left);
    state[1] = state[1].wrapping_add(right);
}

fn half_md4(state: &mut [u32; 4], words: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (
            |x, y, z| z ^ (x & (y ^ z)),
            0,
            [0, 1, 2, 3, 4, 5, 6, 7],
            [3, 7, 11, 19],
        ),
        (
            |x, y, z| (x & y).wrapping_add((x ^ y) & z),
            0x5a82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            |x, y, z| x ^ y ^ z,
            0x6ed9_eba1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (word, shift) in order.into_iter().zip(shifts.into_iter().cycle()) {
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(words[word])
                .wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shift), b, c);
        }
    }
    for (value, more) in state.iter_mut().zip([a, b, c, d]) {
        *value = value.wrapping_add(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::judges::succeed;

    /// What debugfs says of a name.
    fn judged(kind: &str, seed: Option<&str>, name: &str) -> u32 {
        let seed = seed.map_or(String::new(), |seed| format!("-s {seed}"));
        let said = succeed(
            "debugfs",
            &["-R", &format!("dx_hash -h {kind} {seed} \"{name}\"")],
        );
        let hash = said.split("is 0x").nth(1).unwrap();
        let digits = hash.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap();
        u32::from_str_radix(digits, 16).unwrap()
    }

    #[test]
    #[ignore = "needs programs"]
    fn names_are_hashed_as_debugfs_does() {
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        let bytes: Vec<u8> = (0..16).map(|n| 0x01 + 0x22 * (n % 8) as u8).collect();
        let word = |n: usize| u32::from_le_bytes(bytes[n * 4..n * 4 + 4].try_into().unwrap());
        let seed = [word(0), word(1), word(2), word(3)];
        let long = "a name of more than thirty-two bytes, of which there are many";
        for (kind, word) in [
            (HashKind::Legacy, "legacy"),
            (HashKind::HalfMd4, "half_md4"),
            (HashKind::Tea, "tea"),
            // Numbers are for those to which debugfs has no word.
            (HashKind::Legacy, "3"),
            (HashKind::HalfMd4, "4"),
            (HashKind::Tea, "5"),
        ] {
            for name in ["a", "abc", "sixteen bytes ab", "grün ÿ über", long] {
                for (seed, text) in [([0; 4], None), (seed, Some(uuid))] {
                    let signed = word.parse::<u8>().is_err();
                    let hash = NameHash { kind, signed, seed };
                    let said = hash.of(name.as_bytes());
                    assert_eq!(said, judged(word, text, name), "{word} {name:?} {text:?}");
                }
            }
        }
    }
}
