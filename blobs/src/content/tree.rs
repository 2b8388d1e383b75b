//! The BLAKE3 hash tree over chunk groups.
//!
//! BLAKE3 hashes a tree whose leaves are 1 KiB chunks. Here, the leaves are subtrees of [`GROUP`] bytes. A group is
//! verified with one 64-byte parent a level; the proofs of a whole blob cost 64 bytes a group, 0.1 %. The shape follows
//! from the size alone. A subtree of `n` groups has on its left the largest power of two below `n` (BLAKE3 paper,
//! section 2.1).
//!
//! An *outboard* is all parents of a tree in pre-order, 64 bytes each: the left child's chaining value, then the
//! right's. A *slice* is what a provider sends: the part of the tree that covers a range of groups, in pre-order, with
//! parents and group contents. [`Walk`] gives the order of a slice, which both sides share; [`Verifier`] checks a slice
//! against the root. Neither does I/O.

use std::ops::Range;

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::Hash;

/// Bytes in a chunk group: 64 KiB. Proofs then cost 0.1 %, and the least that is fetched for a small tensor is one
/// group.
pub const GROUP: u64 = 64 * 1024;

/// Bytes in a parent: two chaining values.
pub const PARENT: usize = 64;

/// The shape of a blob's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree {
    size: u64,
}

impl Tree {
    /// Returns the tree of a blob of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { size }
    }

    /// Returns the blob's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of groups. An empty blob has one group, of no bytes.
    pub fn groups(&self) -> u64 {
        self.size.div_ceil(GROUP).max(1)
    }

    /// Returns the bytes of group `index`, as a range within the blob.
    pub fn group_bytes(&self, index: u64) -> Range<u64> {
        let start = index * GROUP;
        start..self.size.min(start.saturating_add(GROUP))
    }

    /// Returns the size of the outboard in bytes.
    pub fn outboard_size(&self) -> u64 {
        (self.groups() - 1) * PARENT as u64
    }

    /// Returns the value of group `index` with content `data`: the blob's hash if there is only one group, else a
    /// chaining value.
    pub fn group_value(&self, index: u64, data: &[u8]) -> Hash {
        self.value_of_parts(index, [data, &[]])
    }

    /// Returns the value of group `index`, whose content is given in two parts.
    pub(crate) fn value_of_parts(&self, index: u64, parts: [&[u8]; 2]) -> Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(index * GROUP);
        for part in parts {
            hasher.update(part);
        }
        if self.groups() == 1 {
            (*hasher.finalize().as_bytes()).into()
        } else {
            hasher.finalize_non_root().into()
        }
    }

    /// Returns the root, computed from the values of all groups in order.
    ///
    /// # Panics
    /// If the number of values is not the number of groups.
    pub fn root(&self, values: &[Hash]) -> Hash {
        assert_eq!(values.len() as u64, self.groups(), "one value a group");
        reduce(values, true)
    }

    /// Returns the outboard and the root, computed from the values of all groups in order.
    ///
    /// # Panics
    /// If the number of values is not the number of groups.
    pub fn outboard(&self, values: &[Hash]) -> (Vec<u8>, Hash) {
        assert_eq!(values.len() as u64, self.groups(), "one value a group");
        let mut outboard = Vec::with_capacity(self.outboard_size() as usize);
        let root = fill(values, true, &mut outboard);
        (outboard, root)
    }
}

/// Returns the value of the subtree over `values`.
fn reduce(values: &[Hash], root: bool) -> Hash {
    if let [value] = values {
        return *value;
    }
    let (left, right) = values.split_at(left_groups(values.len() as u64) as usize);
    merge(&reduce(left, false), &reduce(right, false), root)
}

/// Returns the number of groups in the left half of a subtree of `groups` groups, which are at least two.
fn left_groups(groups: u64) -> u64 {
    1 << (u64::BITS - 1 - (groups - 1).leading_zeros())
}

/// Appends the parents of the subtree over `values` in pre-order. Returns the subtree's value.
fn fill(values: &[Hash], root: bool, outboard: &mut Vec<u8>) -> Hash {
    if let [value] = values {
        return *value;
    }
    let at = outboard.len();
    outboard.resize(at + PARENT, 0);
    let (left, right) = values.split_at(left_groups(values.len() as u64) as usize);
    let left = fill(left, false, outboard);
    let right = fill(right, false, outboard);
    outboard[at..at + 32].copy_from_slice(left.as_bytes());
    outboard[at + 32..at + PARENT].copy_from_slice(right.as_bytes());
    merge(&left, &right, root)
}

fn merge(left: &Hash, right: &Hash, root: bool) -> Hash {
    if root {
        let hash = merge_subtrees_root(left.as_bytes(), right.as_bytes(), Mode::Hash);
        (*hash.as_bytes()).into()
    } else {
        merge_subtrees_non_root(left.as_bytes(), right.as_bytes(), Mode::Hash).into()
    }
}

/// The next element of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A parent: [`PARENT`] bytes, at this index of the outboard.
    Parent {
        /// Position among the outboard's parents.
        index: u64,
    },
    /// The content of a group.
    Group {
        /// The group's index.
        index: u64,
        /// The size of the content in bytes.
        size: usize,
    },
}

#[derive(Debug, Clone, Copy)]
struct Subtree<T> {
    first: u64,
    groups: u64,
    /// Index in the outboard of the parent at the top of this subtree. A subtree of one group has no parent: there, it
    /// is the index that comes next.
    parent: u64,
    /// The data that a walker keeps for each subtree: in a verifier, its expected value.
    value: T,
}

impl<T> Subtree<T> {
    /// Splits the subtree in two halves with these values.
    fn split(&self, left: T, right: T) -> (Self, Self) {
        let n = left_groups(self.groups);
        (
            Self {
                first: self.first,
                groups: n,
                parent: self.parent + 1,
                value: left,
            },
            Self {
                first: self.first + n,
                groups: self.groups - n,
                // The left half of n groups has n - 1 parents.
                parent: self.parent + n,
                value: right,
            },
        )
    }
}

/// The stack of a pre-order walk over the part of a tree that covers a range of groups.
#[derive(Debug)]
struct Cover<T> {
    tree: Tree,
    range: Range<u64>,
    stack: Vec<Subtree<T>>,
}

impl<T> Cover<T> {
    fn new(tree: Tree, range: Range<u64>, root: T) -> Self {
        let stack = vec![Subtree {
            first: 0,
            groups: tree.groups(),
            parent: 0,
            value: root,
        }];
        Self { tree, range, stack }
    }

    /// Drops subtrees outside the range. Returns the step at the top of the stack; `None` if the stack is empty.
    fn peek(&mut self) -> Option<Step> {
        while let Some(top) = self.stack.last() {
            if top.first >= self.range.end || top.first + top.groups <= self.range.start {
                self.stack.pop();
                continue;
            }
            return Some(if top.groups == 1 {
                let bytes = self.tree.group_bytes(top.first);
                Step::Group {
                    index: top.first,
                    size: (bytes.end - bytes.start) as usize,
                }
            } else {
                Step::Parent { index: top.parent }
            });
        }
        None
    }
}

/// Iterates over the steps of a slice, for the side that sends it.
#[derive(Debug)]
pub struct Walk(Cover<()>);

impl Walk {
    /// Walks over the slice of `tree` that covers the groups in `range`.
    pub fn new(tree: Tree, range: Range<u64>) -> Self {
        Self(Cover::new(tree, range, ()))
    }
}

impl Iterator for Walk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let step = self.0.peek()?;
        let top = self.0.stack.pop()?;
        if top.groups > 1 {
            let (left, right) = top.split((), ());
            self.0.stack.push(right);
            self.0.stack.push(left);
        }
        Some(step)
    }
}

/// The error for bytes that do not match the hash in the tree: the sender is wrong or hostile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the content does not match its hash (at group {group})")]
pub struct Mismatch {
    /// The first group of the subtree that did not match.
    pub group: u64,
}

/// Checks a slice against a root, element by element, for the side that receives it.
///
/// Call [`step`](Self::step) to learn which element comes next, then [`parent`](Self::parent) or [`group`](Self::group)
/// with its bytes.
#[derive(Debug)]
pub struct Verifier(Cover<Hash>);

impl Verifier {
    /// Makes a verifier of the slice that covers the groups in `range` of the blob whose hash is `root`.
    pub fn new(tree: Tree, root: Hash, range: Range<u64>) -> Self {
        Self(Cover::new(tree, range, root))
    }

    /// Returns the element that comes next; `None` at the end of the slice.
    pub fn step(&mut self) -> Option<Step> {
        self.0.peek()
    }

    /// Checks the parent that [`step`](Self::step) announced.
    ///
    /// # Errors
    /// [`Mismatch`]; the verifier must not be used further.
    ///
    /// # Panics
    /// If the last step was not a parent.
    pub fn parent(&mut self, bytes: &[u8; PARENT]) -> Result<(), Mismatch> {
        let top = self.0.stack.pop().expect("step announced a parent");
        assert!(top.groups > 1, "step announced a parent");
        let (left, right) = bytes.split_at(32);
        let left = Hash::from_slice(left).expect("half a parent is a hash");
        let right = Hash::from_slice(right).expect("half a parent is a hash");
        let root = top.groups == self.0.tree.groups();
        if merge(&left, &right, root) != top.value {
            return Err(Mismatch { group: top.first });
        }
        let (left, right) = top.split(left, right);
        self.0.stack.push(right);
        self.0.stack.push(left);
        Ok(())
    }

    /// Skips the content of the group that [`step`](Self::step) announced: it is absent, or has the wrong content.
    ///
    /// # Panics
    /// If the last step was not a group.
    pub(crate) fn skip_group(&mut self) {
        let top = self.0.stack.pop().expect("step announced a group");
        assert_eq!(top.groups, 1, "step announced a group");
    }

    /// Returns true if `data` is the content of the group that [`step`](Self::step) announced. The group is still to be
    /// passed to the verifier.
    ///
    /// # Panics
    /// If the last step was not a group.
    pub(crate) fn is_group(&self, data: &[u8]) -> bool {
        let top = self.0.stack.last().expect("step announced a group");
        assert_eq!(top.groups, 1, "step announced a group");
        let bytes = self.0.tree.group_bytes(top.first);
        // Content of another length has no value in this tree.
        data.len() as u64 == bytes.end - bytes.start
            && self.0.tree.group_value(top.first, data) == top.value
    }

    /// Checks the content of the group that [`step`](Self::step) announced.
    ///
    /// # Errors
    /// [`Mismatch`]; the verifier must not be used further.
    ///
    /// # Panics
    /// If the last step was not a group.
    pub fn group(&mut self, data: &[u8]) -> Result<(), Mismatch> {
        let matches = self.is_group(data);
        let top = self.0.stack.pop().expect("step announced a group");
        match matches {
            true => Ok(()),
            false => Err(Mismatch { group: top.first }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(size: u64) -> Vec<u8> {
        (0..size)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8)
            .collect()
    }

    fn build(data: &[u8]) -> (Tree, Vec<u8>, Hash) {
        let tree = Tree::new(data.len() as u64);
        let values: Vec<Hash> = (0..tree.groups())
            .map(|i| {
                let range = tree.group_bytes(i);
                tree.group_value(i, &data[range.start as usize..range.end as usize])
            })
            .collect();
        let (outboard, root) = tree.outboard(&values);
        (tree, outboard, root)
    }

    fn slice(tree: Tree, outboard: &[u8], data: &[u8], range: Range<u64>) -> Vec<u8> {
        let mut out = Vec::new();
        for step in Walk::new(tree, range) {
            match step {
                Step::Parent { index } => {
                    let at = index as usize * PARENT;
                    out.extend_from_slice(&outboard[at..at + PARENT]);
                }
                Step::Group { index, .. } => {
                    let range = tree.group_bytes(index);
                    out.extend_from_slice(&data[range.start as usize..range.end as usize]);
                }
            }
        }
        out
    }

    fn verify(
        tree: Tree,
        root: Hash,
        range: Range<u64>,
        mut bytes: &[u8],
    ) -> Result<Vec<(u64, Vec<u8>)>, Mismatch> {
        let mut groups = Vec::new();
        let mut verifier = Verifier::new(tree, root, range);
        while let Some(step) = verifier.step() {
            match step {
                Step::Parent { .. } => {
                    let (parent, rest) = bytes.split_at(PARENT);
                    verifier.parent(parent.try_into().unwrap())?;
                    bytes = rest;
                }
                Step::Group { index, size } => {
                    let (data, rest) = bytes.split_at(size);
                    verifier.group(data)?;
                    groups.push((index, data.to_vec()));
                    bytes = rest;
                }
            }
        }
        assert!(bytes.is_empty());
        Ok(groups)
    }

    #[test]
    fn the_root_is_the_blake3_hash_at_every_shape() {
        for size in [0, 1, 1023, 1025, GROUP - 1, GROUP, GROUP + 1]
            .into_iter()
            .chain((2..12).flat_map(|n| [n * GROUP - 1, n * GROUP, n * GROUP + 5]))
        {
            let data = content(size);
            let (tree, outboard, root) = build(&data);
            assert_eq!(root, Hash::of(&data), "size {size}");
            assert_eq!(outboard.len() as u64, tree.outboard_size());
            let values: Vec<_> = (0..tree.groups())
                .map(|i| {
                    let range = tree.group_bytes(i);
                    tree.group_value(i, &data[range.start as usize..range.end as usize])
                })
                .collect();
            assert_eq!(tree.root(&values), root, "size {size}");
        }
    }

    #[test]
    fn every_range_of_every_shape_verifies_alone() {
        for groups in 1..9 {
            let data = content(groups * GROUP - 17);
            let (tree, outboard, root) = build(&data);
            for start in 0..groups {
                for end in start + 1..=groups {
                    let bytes = slice(tree, &outboard, &data, start..end);
                    let got = verify(tree, root, start..end, &bytes).unwrap();
                    assert_eq!(
                        got.iter().map(|(i, _)| *i).collect::<Vec<_>>(),
                        (start..end).collect::<Vec<_>>()
                    );
                    for (index, group) in got {
                        let range = tree.group_bytes(index);
                        assert_eq!(group, data[range.start as usize..range.end as usize]);
                    }
                }
            }
        }
    }

    #[test]
    fn one_wrong_bit_anywhere_is_found_before_the_group_is_released() {
        let data = content(5 * GROUP + 100);
        let (tree, outboard, root) = build(&data);
        let bytes = slice(tree, &outboard, &data, 1..4);
        for at in (0..bytes.len()).step_by(997).chain([bytes.len() - 1]) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(verify(tree, root, 1..4, &bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_wrong_size_does_not_verify() {
        let data = content(3 * GROUP);
        let (tree, outboard, root) = build(&data);
        let mut bytes = slice(tree, &outboard, &data, 0..3);
        bytes.resize(bytes.len() + 4 * GROUP as usize, 0);
        for size in [2 * GROUP, 3 * GROUP - 1, 3 * GROUP + 1, 4 * GROUP] {
            let tree = Tree::new(size);
            let mut verifier = Verifier::new(tree, root, 0..tree.groups());
            let mut rest = bytes.as_slice();
            let mut failed = false;
            while let Some(step) = verifier.step() {
                let size = match step {
                    Step::Parent { .. } => PARENT,
                    Step::Group { size, .. } => size,
                };
                let (part, after) = rest.split_at(size);
                rest = after;
                let result = match step {
                    Step::Parent { .. } => verifier.parent(part.try_into().unwrap()),
                    Step::Group { .. } => verifier.group(part),
                };
                if result.is_err() {
                    failed = true;
                    break;
                }
            }
            assert!(failed, "size {size}");
        }
    }
}
