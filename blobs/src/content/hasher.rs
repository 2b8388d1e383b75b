//! Computes all hashes of a file in one pass: its SHA-256, its hash tree, and the BLAKE3 hash of each tensor.
//!
//! A reader hands pieces of [`PIECE`] bytes to two consumers. SHA-256 is sequential and has one thread; the BLAKE3
//! values of chunk groups are computed by a pool of threads. A tensor has a hash tree of its own, which begins at the
//! tensor's first byte. Its groups therefore begin and end at arbitrary offsets in the file. A [`Layer`] is a row of
//! such trees, and a file has two layers: the file itself, and its tensors.
//!
//! A group belongs to the piece in which it ends; its first bytes may lie in the piece before, which is kept for that.
//! So a tensor of any length is hashed on all cores, and no byte is copied between reading and hashing.

use std::{
    fs::File,
    io::{self, Read},
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use sha2::{Digest, Sha256};

use crate::{
    Hash,
    tree::{GROUP, Tree},
};

/// Bytes handed from the reader to the hashers at a time: 16 groups, so that the handover costs little beside the
/// hashing. It is at least one group, because a group may reach back into one earlier piece only.
const PIECE: u64 = 16 * GROUP;

/// Pieces that may wait, for SHA-256 of each file and for the pool. It bounds memory to this many mebibytes a queue and
/// the pieces in use. These are one a core, the piece before each of those, and for each file one in SHA-256 and one
/// being read.
const QUEUE: usize = 8;

/// The hashes of a file.
#[derive(Debug)]
pub(crate) struct Hashed {
    pub(crate) sha256: [u8; 32],
    pub(crate) blake3: Hash,
    /// The parents of the file's tree, in pre-order.
    pub(crate) outboard: Vec<u8>,
    /// The BLAKE3 hash of each tensor, in the order given.
    pub(crate) tensors: Vec<Hash>,
}

/// The reason why a file was not hashed.
#[derive(Debug)]
pub(crate) enum HashError {
    Io(io::Error),
    /// The file ended before its expected size.
    Short,
    /// One of the stop flags was set.
    Cancelled,
}

/// Hash trees over ranges of a file, in order of their offsets.
#[derive(Debug)]
struct Layer(Vec<Span>);

/// A range of at least one byte that has a hash tree of its own.
#[derive(Debug)]
struct Span {
    start: u64,
    tree: Tree,
    /// The number of groups in all earlier spans.
    first: u64,
}

impl Layer {
    /// Makes a layer of `ranges`. An empty range gets no span: its hash is the hash of no bytes.
    fn new(ranges: &[Range<u64>]) -> Self {
        let mut spans = Vec::new();
        let mut first = 0;
        let mut end = 0;
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            debug_assert!(range.start >= end, "ranges are in order and apart");
            end = range.end;
            let tree = Tree::new(range.end - range.start);
            spans.push(Span {
                start: range.start,
                tree,
                first,
            });
            first += tree.groups();
        }
        Self(spans)
    }

    fn groups(&self) -> u64 {
        self.0
            .last()
            .map_or(0, |span| span.first + span.tree.groups())
    }

    /// Returns the number of groups that end at or before `offset` in the file.
    fn ended(&self, offset: u64) -> u64 {
        let began = self.0.partition_point(|span| span.start < offset);
        let Some(span) = began.checked_sub(1).and_then(|last| self.0.get(last)) else {
            return 0;
        };
        let within = offset - span.start;
        span.first
            + if within < span.tree.size() {
                within / GROUP
            } else {
                span.tree.groups()
            }
    }

    /// Returns the values of the groups that end in the window's piece, and the number of the first of them.
    fn values(&self, window: &Window) -> (u64, Vec<Hash>) {
        let end = window.start + window.piece.len() as u64;
        let groups = self.ended(window.start)..self.ended(end);
        let mut values = Vec::with_capacity((groups.end - groups.start) as usize);
        let mut span = self.0.partition_point(|span| span.first <= groups.start);
        for group in groups.clone() {
            if self.0.get(span).is_some_and(|next| next.first == group) {
                span += 1;
            }
            let Span { start, tree, first } = &self.0[span - 1];
            let index = group - first;
            let bytes = tree.group_bytes(index);
            let bytes = window.bytes(start + bytes.start..start + bytes.end);
            values.push(tree.value_of_parts(index, bytes));
        }
        (groups.start, values)
    }
}

/// A piece of the file, with the piece before it.
struct Window {
    /// The offset of the piece in the file.
    start: u64,
    piece: Arc<Vec<u8>>,
    before: Option<Arc<Vec<u8>>>,
}

impl Window {
    /// Returns the bytes of the file in `range`, which ends in the piece: first those in the earlier piece, then those
    /// in this one.
    fn bytes(&self, range: Range<u64>) -> [&[u8]; 2] {
        let end = (range.end - self.start) as usize;
        match (&self.before, self.start.checked_sub(range.start)) {
            (Some(before), Some(reach)) => {
                let from = before.len() - reach as usize;
                [&before[from..], &self.piece[..end]]
            }
            _ => [&[], &self.piece[(range.start - self.start) as usize..end]],
        }
    }
}

struct Job {
    layers: Arc<[Layer; 2]>,
    window: Window,
    done: mpsc::Sender<[(u64, Vec<Hash>); 2]>,
}

/// A pool of threads that compute group values, one thread a core. The threads end when the pool is dropped.
pub(crate) struct Hashers {
    jobs: Option<mpsc::SyncSender<Job>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Hashers {
    pub(crate) fn start() -> Self {
        let (jobs, queue) = mpsc::sync_channel::<Job>(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cores)
            .map(|_| {
                let queue = Arc::clone(&queue);
                thread::spawn(move || {
                    loop {
                        let next = queue.lock().expect("hashing does not panic").recv();
                        let Ok(job) = next else { return };
                        let values = job.layers.each_ref().map(|layer| layer.values(&job.window));
                        // The receiver is gone if the caller stopped at an error.
                        let _ = job.done.send(values);
                    }
                })
            })
            .collect();
        Self {
            jobs: Some(jobs),
            threads,
        }
    }

    /// Hashes `file`, which has `size` bytes and is positioned at its start, and each of `tensors`: ranges within the
    /// file, in order and without overlap. Hashing stops once any flag in `stop` is set. Several threads may call this
    /// at once; they share the pool.
    ///
    /// Memory is bounded by [`QUEUE`], plus 32 bytes for each group of the file and of the tensors.
    pub(crate) fn hash(
        &self,
        mut file: &File,
        size: u64,
        tensors: &[Range<u64>],
        (bytes_done, stop): (&AtomicU64, &[&AtomicBool]),
    ) -> Result<Hashed, HashError> {
        let layers = Arc::new([
            Layer::new(std::slice::from_ref(&(0..size))),
            Layer::new(tensors),
        ]);
        let (done, results) = mpsc::channel::<[(u64, Vec<Hash>); 2]>();
        let mut pieces = 0;
        let mut values = layers
            .each_ref()
            .map(|layer| vec![Hash::from([0; 32]); layer.groups() as usize]);
        let mut take = |parts: [(u64, Vec<Hash>); 2]| {
            for (values, (first, part)) in values.iter_mut().zip(parts) {
                let first = first as usize;
                values[first..first + part.len()].copy_from_slice(&part);
            }
        };
        let sha256 = thread::scope(|scope| {
            let (to_sha, pieces_for_sha) = mpsc::sync_channel::<Arc<Vec<u8>>>(QUEUE);
            let sha = scope.spawn(move || {
                let mut sha = Sha256::new();
                for piece in pieces_for_sha {
                    sha.update(piece.as_slice());
                }
                <[u8; 32]>::from(sha.finalize())
            });
            let mut start = 0;
            let mut before = None;
            loop {
                if stop.iter().any(|stop| stop.load(Ordering::Relaxed)) {
                    return Err(HashError::Cancelled);
                }
                let length = (size - start).min(PIECE);
                if length == 0 {
                    break;
                }
                let mut piece = Vec::with_capacity(length as usize);
                file.by_ref()
                    .take(length)
                    .read_to_end(&mut piece)
                    .map_err(HashError::Io)?;
                if piece.len() as u64 != length {
                    return Err(HashError::Short);
                }
                let piece = Arc::new(piece);
                // Both receivers outlive this loop.
                let _ = to_sha.send(Arc::clone(&piece));
                self.send(Job {
                    layers: Arc::clone(&layers),
                    window: Window {
                        start,
                        piece: Arc::clone(&piece),
                        before: before.replace(piece),
                    },
                    done: done.clone(),
                });
                pieces += 1;
                for parts in results.try_iter() {
                    take(parts);
                    pieces -= 1;
                }
                start += length;
                bytes_done.fetch_add(length, Ordering::Relaxed);
            }
            drop(to_sha);
            Ok(sha.join().expect("hashing does not panic"))
        })?;
        drop(done);
        for _ in 0..pieces {
            take(results.recv().expect("hashing does not panic"));
        }
        let [of_file, of_tensors] = values;
        let tensors = roots(tensors, &of_tensors);
        drop(of_tensors);
        let (outboard, blake3) = match size {
            0 => (Vec::new(), Hash::of(&[])),
            size => Tree::new(size).outboard(&of_file),
        };
        Ok(Hashed {
            sha256,
            blake3,
            outboard,
            tensors,
        })
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            jobs.send(job).expect("hashing threads run until dropped");
        }
    }
}

/// Returns the root of each range, from the values of the groups of all ranges.
fn roots(ranges: &[Range<u64>], mut values: &[Hash]) -> Vec<Hash> {
    let roots = ranges.iter().map(|range| {
        if range.is_empty() {
            return Hash::of(&[]);
        }
        let tree = Tree::new(range.end - range.start);
        let (own, others) = values.split_at(tree.groups() as usize);
        values = others;
        tree.root(own)
    });
    roots.collect()
}

impl Drop for Hashers {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // If the thread panicked, the `hash` call that waited for it has failed already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn content(size: u64) -> Vec<u8> {
        (0..size)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8)
            .collect()
    }

    /// Hashes `data` with these ranges, and compares the results with the reference functions.
    fn check(hashers: &Hashers, data: &[u8], ranges: &[Range<u64>]) {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().write_all(data).unwrap();
        let file = path.reopen().unwrap();
        let done = AtomicU64::new(0);
        let size = data.len() as u64;
        let hashed = hashers.hash(&file, size, ranges, (&done, &[])).unwrap();
        assert_eq!(hashed.blake3, Hash::of(data), "size {size}");
        assert_eq!(hashed.sha256, <[u8; 32]>::from(Sha256::digest(data)));
        assert_eq!(
            hashed.outboard.len() as u64,
            Tree::new(size).outboard_size()
        );
        assert_eq!(done.load(Ordering::Relaxed), size);
        let expected: Vec<_> = ranges
            .iter()
            .map(|range| Hash::of(&data[range.start as usize..range.end as usize]))
            .collect();
        assert_eq!(hashed.tensors, expected, "size {size}, {ranges:?}");
    }

    #[test]
    fn hashes_are_those_of_the_reference_functions_at_every_size() {
        let hashers = Hashers::start();
        for size in [0, 1, GROUP - 1, GROUP, GROUP + 1, MIB, MIB + 1, 5 * MIB] {
            let data = content(size);
            check(&hashers, &data, &[]);
            check(&hashers, &data, &[0..size, size..size]);
            if size > 0 {
                check(&hashers, &data, &[1..size, size..size]);
                check(&hashers, &data, &[0..size - 1, size..size]);
            }
        }
    }

    #[test]
    fn tensors_are_hashed_wherever_they_begin_and_end() {
        let hashers = Hashers::start();
        let data = content(4 * MIB + 4321);
        let end = data.len() as u64;
        let near = |at: u64| [at - 1, at, at + 1];
        for first in near(MIB).into_iter().chain(near(GROUP)).chain([9, 1024]) {
            for last in near(2 * MIB)
                .into_iter()
                .chain(near(first + GROUP))
                .chain(near(first + 3 * GROUP))
                .chain([first + 1, first + MIB, end])
            {
                check(&hashers, &data, &[3..first, first..last, last..end]);
            }
        }
    }

    #[test]
    fn many_small_tensors_gaps_and_empty_ones_are_each_hashed() {
        let hashers = Hashers::start();
        let data = content(3 * MIB);
        let mut ranges = Vec::new();
        let mut at = 77;
        for i in 0_u64.. {
            let length = i * 7919 % 5000 * u64::from(i % 5 != 0);
            if at + length > data.len() as u64 {
                break;
            }
            ranges.push(at..at + length);
            // Every third tensor is followed by a gap.
            at += length + i % 3 / 2 * 32;
        }
        assert!(ranges.len() > 1000);
        assert!(ranges.iter().any(Range::is_empty));
        check(&hashers, &data, &ranges);
        // An empty tensor may begin at the first byte of another and be listed after it.
        check(&hashers, &data, &[5..MIB + 9, 5..5, MIB + 9..2 * MIB]);
        check(&hashers, &data, &[0..0, 3 * MIB..3 * MIB]);
    }

    #[test]
    fn a_file_that_ends_too_early_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * MIB).unwrap();
        let whole = 0..4 * MIB;
        let hashed = Hashers::start().hash(
            &file,
            whole.end,
            std::slice::from_ref(&whole),
            (&AtomicU64::new(0), &[]),
        );
        assert!(matches!(hashed, Err(HashError::Short)));
    }
}
