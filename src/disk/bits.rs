//! Sets of clusters: a bit for each, lowest bit first.

/// Adds a cluster, if there is a bit for it.
pub(super) fn set(bits: &mut [u64], cluster: u64) {
    if let Some(word) = bits.get_mut((cluster / 64) as usize) {
        *word |= 1 << (cluster % 64);
    }
}

/// Removes a cluster.
pub(super) fn clear(bits: &mut [u64], cluster: u64) {
    if let Some(word) = bits.get_mut((cluster / 64) as usize) {
        *word &= !(1 << (cluster % 64));
    }
}

/// Returns whether a cluster is in the set.
pub(super) fn is_set(bits: &[u64], cluster: u64) -> bool {
    let word = bits.get((cluster / 64) as usize);
    word.is_some_and(|word| word >> (cluster % 64) & 1 == 1)
}
