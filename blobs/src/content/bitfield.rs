//! A bitfield over the chunk groups of a blob: one bit a group, set if the group is present.

use std::ops::Range;

use crate::tree::{GROUP, Tree};

const WORD: u64 = u64::BITS as u64;

/// A set of group indices below a bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitfield {
    words: Vec<u64>,
    groups: u64,
    set: u64,
}

impl Bitfield {
    /// Returns a bitfield of `groups` groups, none of them set.
    pub fn empty(groups: u64) -> Self {
        Self {
            words: vec![0; groups.div_ceil(WORD) as usize],
            groups,
            set: 0,
        }
    }

    /// Returns a bitfield of `groups` groups, all of them set.
    pub fn full(groups: u64) -> Self {
        let mut bits = Self::empty(groups);
        bits.insert_range(0..groups);
        bits
    }

    /// Decodes a bitfield; `None` if the length is wrong, or if a bit beyond the last group is set.
    pub fn from_bytes(bytes: &[u8], groups: u64) -> Option<Self> {
        let tail = (groups % 8) as u32;
        let stray = tail != 0 && bytes.last().is_some_and(|last| last >> tail != 0);
        if bytes.len() as u64 != groups.div_ceil(8) || stray {
            return None;
        }
        let words: Vec<u64> = bytes
            .chunks(8)
            .map(|chunk| {
                let mut word = [0; 8];
                word[..chunk.len()].copy_from_slice(chunk);
                u64::from_le_bytes(word)
            })
            .collect();
        Some(Self {
            set: words.iter().map(|word| u64::from(word.count_ones())).sum(),
            words,
            groups,
        })
    }

    /// Encodes the bitfield: group `i` is bit `i % 8` of byte `i / 8`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self
            .words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.truncate(self.groups.div_ceil(8) as usize);
        bytes
    }

    /// Returns the bound: one more than the highest index that the bitfield can hold.
    pub fn groups(&self) -> u64 {
        self.groups
    }

    /// Returns the number of groups that are set.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// Returns true if group `index` is set.
    pub fn has(&self, index: u64) -> bool {
        self.words[(index / WORD) as usize] & (1 << (index % WORD)) != 0
    }

    /// Returns true if all groups in `range` are set.
    pub fn has_all(&self, range: Range<u64>) -> bool {
        masks(range).all(|(word, mask)| self.words[word] & mask == mask)
    }

    /// Sets group `index`. Returns true if it was not set before.
    pub fn insert(&mut self, index: u64) -> bool {
        let before = self.set;
        self.insert_range(index..index + 1);
        self.set > before
    }

    /// Sets all groups in `range`.
    pub fn insert_range(&mut self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            let word = &mut self.words[word];
            self.set += u64::from((mask & !*word).count_ones());
            *word |= mask;
        }
    }

    /// Clears all groups in `range`.
    pub fn remove_range(&mut self, range: Range<u64>) {
        for (word, mask) in masks(range) {
            let word = &mut self.words[word];
            self.set -= u64::from((mask & *word).count_ones());
            *word &= !mask;
        }
    }

    /// Clears the groups that are not set in `other`, which has the same bound.
    pub fn retain(&mut self, other: &Self) {
        debug_assert_eq!(self.groups, other.groups);
        let pairs = self.words.iter_mut().zip(&other.words);
        pairs.for_each(|(word, other)| *word &= other);
        self.set = self.words.iter().map(|w| u64::from(w.count_ones())).sum();
    }

    /// Returns true if all groups of `other`, which has the same bound, are set.
    pub fn contains(&self, other: &Self) -> bool {
        debug_assert_eq!(self.groups, other.groups);
        let mut pairs = self.words.iter().zip(&other.words);
        pairs.all(|(word, other)| other & !word == 0)
    }

    /// Sets the groups that are set in `other`, which has the same bound.
    pub fn extend(&mut self, other: &Self) {
        other.runs().for_each(|run| self.insert_range(run));
    }

    /// Returns true if all groups are set.
    pub fn is_full(&self) -> bool {
        self.set == self.groups
    }

    /// Returns the number of bytes in the groups that are set.
    pub fn bytes(&self, tree: &Tree) -> u64 {
        let last = self.groups - 1;
        let short =
            GROUP.min(tree.size()) - (tree.group_bytes(last).end - tree.group_bytes(last).start);
        let full = self.set * GROUP.min(tree.size());
        if self.has(last) { full - short } else { full }
    }

    /// Returns the first run of set groups at or after `from`, of any length.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.seek(from, true)?;
        let end = self.seek(start, false).unwrap_or(self.groups);
        Some(start..end)
    }

    /// Returns all runs of set groups.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end;
            Some(run)
        })
    }

    /// Returns the first run of missing groups at or after `from`, of at most `most` groups.
    pub fn next_missing(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let start = self.seek(from, false)?;
        let limit = self.groups.min(start.saturating_add(most));
        let end = self.seek(start, true).unwrap_or(limit).min(limit);
        Some(start..end)
    }

    /// Returns the first group at or after `from` that is set, or that is not set if `had` is false.
    fn seek(&self, from: u64, had: bool) -> Option<u64> {
        let mut index = from;
        while index < self.groups {
            let word = self.words[(index / WORD) as usize];
            let word = if had { word } else { !word } >> (index % WORD);
            if word != 0 {
                let found = index + u64::from(word.trailing_zeros());
                return (found < self.groups).then_some(found);
            }
            index = (index / WORD + 1) * WORD;
        }
        None
    }
}

/// Returns the words that `range` touches, each with a mask of the bits that lie in the range.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let word = at / WORD;
        let end = range.end.min((word + 1) * WORD);
        let ones = u64::MAX >> (WORD - (end - at));
        let mask = ones << (at % WORD);
        at = end;
        Some((word as usize, mask))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitfield_counts_and_finds_what_is_missing() {
        let tree = Tree::new(10 * GROUP + 7);
        let mut bits = Bitfield::empty(tree.groups());
        assert_eq!(bits.next_missing(0, 4), Some(0..4));
        for index in [0, 1, 5, 10] {
            assert!(bits.insert(index));
            assert!(!bits.insert(index));
        }
        assert_eq!(bits.bytes(&tree), 3 * GROUP + 7);
        assert_eq!(bits.next_missing(0, 256), Some(2..5));
        assert_eq!(bits.next_missing(5, 2), Some(6..8));
        assert_eq!(bits.next_missing(10, 2), None);
        assert_eq!(bits.runs().collect::<Vec<_>>(), [0..2, 5..6, 10..11]);
        assert_eq!(
            Bitfield::from_bytes(&bits.to_bytes(), 11),
            Some(bits.clone())
        );
        bits.insert_range(0..11);
        assert!(bits.is_full());
        assert_eq!(bits, Bitfield::full(11));
        assert_eq!(bits.bytes(&tree), tree.size());
    }

    #[test]
    fn ranges_do_what_single_groups_do() {
        let groups = 200;
        let mut state = 7_u64;
        let mut next = |below: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        };
        let mut bits = Bitfield::empty(groups);
        let mut model = vec![false; groups as usize];
        for _ in 0..2000 {
            let start = next(groups);
            let end = start + next(groups - start + 1);
            let insert = next(2) == 0;
            if insert {
                bits.insert_range(start..end);
            } else {
                bits.remove_range(start..end);
            }
            model[start as usize..end as usize].fill(insert);
            let count = model.iter().filter(|had| **had).count();
            assert_eq!(bits.count(), count as u64);
            let from = next(groups);
            let first = |had: bool| (from..groups).find(|i| model[*i as usize] == had);
            assert_eq!(bits.next_run(from).map(|run| run.start), first(true));
            assert_eq!(
                bits.next_missing(from, 9).map(|run| run.start),
                first(false)
            );
            let end = (from + next(70)).min(groups);
            let all = model[from as usize..end as usize].iter().all(|had| *had);
            assert_eq!(bits.has_all(from..end), all);
            assert_eq!(
                Bitfield::from_bytes(&bits.to_bytes(), groups),
                Some(bits.clone())
            );
        }
    }

    #[test]
    fn damaged_bitfields_are_refused() {
        assert!(Bitfield::from_bytes(&[0xff], 8).is_some());
        assert!(Bitfield::from_bytes(&[0xff], 7).is_none());
        assert!(Bitfield::from_bytes(&[0], 9).is_none());
        assert!(Bitfield::from_bytes(&[], 1).is_none());
    }

    #[test]
    fn the_bytes_of_small_blobs_are_counted_exactly() {
        for size in [0, 1, GROUP - 1, GROUP, GROUP + 1] {
            let tree = Tree::new(size);
            let mut bits = Bitfield::empty(tree.groups());
            assert_eq!(bits.bytes(&tree), 0);
            bits.insert_range(0..tree.groups());
            assert_eq!(bits.bytes(&tree), size, "size {size}");
        }
    }
}
