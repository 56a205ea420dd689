//! Keys in the order of their last use.

/// A list of keys by last use, with a limit.
///
/// The list never removes a key by itself. Each cache decides what it drops for a key beyond the
/// limit, and whether that key stays in the list.
pub(crate) struct Recent<K, const LIMIT: usize> {
    /// Each key once, the least recently used first.
    keys: Vec<K>,
}

impl<K, const LIMIT: usize> Default for Recent<K, LIMIT> {
    fn default() -> Self {
        Recent { keys: Vec::new() }
    }
}

impl<K: Clone + PartialEq, const LIMIT: usize> Recent<K, LIMIT> {
    /// Makes a key the most recently used one.
    pub fn touch(&mut self, key: &K) {
        self.keys.retain(|other| other != key);
        self.keys.push(key.clone());
    }

    /// Returns the keys beyond the limit, the least recently used first.
    pub fn excess(&self) -> &[K] {
        &self.keys[..self.keys.len().saturating_sub(LIMIT)]
    }

    /// Removes the least recently used key if there are more keys than the limit. Returns it.
    pub fn evict(&mut self) -> Option<K> {
        (self.keys.len() > LIMIT).then(|| self.keys.remove(0))
    }

    /// Removes the keys for which `keep` returns false.
    pub fn retain(&mut self, keep: impl FnMut(&K) -> bool) {
        self.keys.retain(keep);
    }

    /// Returns all keys, the least recently used first.
    pub fn oldest_first(&self) -> &[K] {
        &self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_beyond_the_limit_are_those_used_least_recently() {
        let mut recent = Recent::<_, 2>::default();
        for key in ["a", "b"] {
            recent.touch(&key);
        }
        assert_eq!(recent.evict(), None);
        recent.touch(&"a");
        recent.touch(&"c");
        recent.touch(&"d");
        assert_eq!(recent.oldest_first(), ["b", "a", "c", "d"]);
        assert_eq!(recent.excess(), ["b", "a"]);
        assert_eq!(recent.evict(), Some("b"));
        recent.retain(|key| *key != "c");
        assert_eq!(recent.oldest_first(), ["a", "d"]);
        assert_eq!((recent.evict(), recent.excess().len()), (None, 0));
    }
}
