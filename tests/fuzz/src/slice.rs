//! Fuzzes slices. For any range, a verifier accepts only the parents and groups of its tree. The first 24 bytes of the
//! input select the tree and the range.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use weft_blobs::{
    Hash,
    tree::{GROUP, PARENT, Step, Tree, Verifier, Walk},
};
use weft_fuzz::seed;

/// A blob of a given size, all zeros except the first byte of each group: its tree, hash and outboard.
struct Blob {
    tree: Tree,
    data: Vec<u8>,
    outboard: Vec<u8>,
    root: Hash,
}

static BLOB: LazyLock<Blob> = LazyLock::new(|| {
    let mut data = vec![0; 5 * GROUP as usize + 7];
    for (number, group) in data.chunks_mut(GROUP as usize).enumerate() {
        group[0] = number as u8;
    }
    let tree = Tree::new(data.len() as u64);
    let groups = data.chunks(GROUP as usize).zip(0..);
    let values: Vec<_> = groups
        .map(|(group, index)| tree.group_value(index, group))
        .collect();
    let (outboard, root) = tree.outboard(&values);
    Blob {
        tree,
        data,
        outboard,
        root,
    }
});

fn number(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

fn split_first(bytes: &mut &[u8]) -> Option<u8> {
    let (first, rest) = bytes.split_first()?;
    *bytes = rest;
    Some(*first)
}

fn begin() {
    seed(&[&[6_u64, 1, 4].map(u64::to_le_bytes).concat()]);
}

fn check(bytes: &[u8]) {
    let mut bytes = bytes;
    let (Some(size), Some(start), Some(end)) =
        (number(&mut bytes), number(&mut bytes), number(&mut bytes))
    else {
        return;
    };
    // Any tree can be walked, but only a small part of it is.
    let tree = Tree::new(size);
    let range = start.min(tree.groups())..end.min(tree.groups());
    if range.start < range.end {
        for step in Walk::new(tree, range.clone()).take(1000) {
            match step {
                Step::Parent { index } => assert!(index < tree.outboard_size() / PARENT as u64),
                Step::Group { index, size } => {
                    assert!(range.contains(&index) && size as u64 <= GROUP);
                }
            }
        }
    }
    // The right elements of a slice, some of which are replaced by bytes of the input.
    let Blob {
        tree,
        data,
        outboard,
        root,
    } = &*BLOB;
    let range = start % tree.groups()
        ..start % tree.groups() + 1 + end % (tree.groups() - start % tree.groups());
    let mut verifier = Verifier::new(*tree, *root, range);
    while let Some(step) = verifier.step() {
        let wrong = split_first(&mut bytes).is_some_and(|byte| byte % 2 == 1);
        let taken = match step {
            Step::Parent { index } => {
                let at = index as usize * PARENT;
                let mut parent: [u8; PARENT] =
                    outboard[at..at + PARENT].try_into().expect("its length");
                if wrong {
                    let Some((given, rest)) = bytes.split_first_chunk() else {
                        return;
                    };
                    (parent, bytes) = (*given, rest);
                }
                let right = parent == outboard[at..at + PARENT];
                assert_eq!(verifier.parent(&parent).is_ok(), right);
                right
            }
            Step::Group { index, size } => {
                let at = (index * GROUP) as usize;
                let right = &data[at..at + size];
                let given = if wrong {
                    &bytes[..bytes.len().min(size)]
                } else {
                    right
                };
                assert_eq!(verifier.group(given).is_ok(), given == right);
                given == right
            }
        };
        if !taken {
            return;
        }
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));
