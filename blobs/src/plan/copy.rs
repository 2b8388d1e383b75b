//! Copies content that this machine has in other files, and verifies it.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{Progress, Want, make_folder, open};
use crate::{
    Store, StoreError,
    bitfield::Bitfield,
    serve::MAX_GROUPS,
    source::{ReadError, Source},
    store::{
        Copied, part_path,
        partial::{Partial, Segment},
    },
    tree::GROUP,
};

/// The interval at which copied content is made durable: at most what a crash costs.
const SETTLE: Duration = Duration::from_secs(1);

/// The most files found in place that are recorded with one commit. Each holds its tree in memory, a thousandth of its
/// size, and a crash costs reading them again.
pub(super) const ADOPTED: usize = 64;

/// The largest file whose copies are recorded together, in bytes: 16 MiB. Such a copy takes less than a second, so a
/// crash costs no more than for a larger file, which is settled once a second.
const TOGETHER: u64 = MAX_GROUPS * GROUP;

/// Copies wanted content from other copies of the blob on this machine, complete or partial, and verifies it. Sets
/// `want.had` to the bytes that are present then. Returns true if that is all that is wanted. If it is a whole blob,
/// the file is in place. Blocks.
pub(super) fn fill(
    store: &Store,
    want: &mut Want,
    progress: &Progress,
) -> Result<bool, StoreError> {
    let mut sources = match want.tree.size() {
        0 => Vec::new(),
        size => store.sources_of(&want.hash, size)?,
    };
    // Content that an earlier run left is continued, and not copied onto itself.
    let own = part_path(&want.target, &want.hash);
    sources.retain(|source| source.part() != Some(&own) && want.wanted(source.have()).count() > 0);
    if sources.is_empty() && want.tree.size() > 0 {
        let claim = store.committed_part(&want.target, &want.hash, &want.tree)?;
        // Groups whose database row is trusted are read when the whole blob is here. If only a part of the blob is
        // wanted, files are made as soon as that part is here, so the groups are read now.
        let now = claim.as_ref().is_some_and(|claim| {
            claim.groups.count() > 0 && (!claim.trusted || want.groups.is_some())
        });
        if !now || store.is_arriving(&own) {
            let have = claim.map(|claim| claim.groups);
            let have = have.unwrap_or_else(|| Bitfield::empty(want.tree.groups()));
            let satisfied = want.is_satisfied(&have);
            want.had = want.wanted(have).bytes(&want.tree);
            return Ok(satisfied);
        }
    }
    let partial = open(store, want, &progress.check.cancelled)?;
    if !partial.is_trusted() || want.groups.is_some() {
        // These bytes count only while the groups are read; the caller counts what is here afterwards.
        let read = AtomicU64::new(0);
        let done = |bytes| {
            read.fetch_add(bytes, Ordering::Relaxed);
            progress.done.fetch_add(bytes, Ordering::Relaxed);
        };
        let groups = want.groups.as_ref();
        let lost = store.reread(&partial, groups, &progress.check.cancelled, &done);
        progress
            .done
            .fetch_sub(read.into_inner(), Ordering::Relaxed);
        lost?;
    }
    if want.tree.size() == 0 {
        let segment = Segment {
            groups: 1,
            ..Segment::default()
        };
        partial.write(&segment)?;
    }
    for source in &sources {
        match copy(store, source, want, &partial, progress) {
            Ok(()) => {}
            Err(CopyError::Store(error)) => return Err(error),
            Err(CopyError::Source(error)) => {
                tracing::warn!(hash = %want.hash, %error, "a local copy is damaged or unreadable");
                if let ReadError::Damaged(mismatch) = &error {
                    store.mark_damaged(source, mismatch.group..mismatch.group + 1)?;
                }
            }
        }
    }
    if partial.take_dirty() {
        if partial.is_to_be_read() {
            store.reread(&partial, None, &progress.check.cancelled, &|_| ())?;
        }
        store.settle(std::slice::from_ref(&partial))?;
    }
    let have = partial.have();
    let satisfied = want.is_satisfied(&have);
    want.had = want.wanted(have).bytes(&want.tree);
    Ok(satisfied)
}

/// Puts files with the same content in place, as far as the content is here. Returns the wants that are not in place;
/// the first of them may have a part of the content. Blocks.
pub(super) fn put_same(
    store: &Store,
    wants: Vec<Want>,
    progress: &Progress,
) -> Result<Vec<Want>, StoreError> {
    let mut wants = VecDeque::from(wants);
    // The first file gets all available content. Once it is complete, the others are copied from it.
    while let Some(mut want) = wants.pop_front() {
        make_folder(&want.target)?;
        let satisfied = fill(store, &mut want, progress)?;
        progress.done.fetch_add(want.had, Ordering::Relaxed);
        // The content is complete in the part file, and the file is still to be made of it.
        if !(satisfied && store.holds(&want.hash, &want.target)?) {
            wants.push_front(want);
            break;
        }
        copy_together(store, &mut wants, progress)?;
    }
    Ok(wants.into())
}

/// Copies a small blob that is whole here to all of `wants`, and removes from `wants` those that are in place. The
/// blob's database row lists all its files, so it is written each time that their number has doubled, and not for each
/// file.
fn copy_together(
    store: &Store,
    wants: &mut VecDeque<Want>,
    progress: &Progress,
) -> Result<(), StoreError> {
    let Some(Want { hash, tree, .. }) = wants.front() else {
        return Ok(());
    };
    let (hash, size) = (*hash, tree.size());
    let source = store
        .whole(&hash)?
        .filter(|source| source.tree().size() == size);
    let Some(source) = source.filter(|_| size <= TOGETHER) else {
        return Ok(());
    };
    let mut copied = Vec::new();
    let mut recorded = 0;
    let mut copy_all = || {
        while let Some(want) = wants.front() {
            if progress.check.cancelled.load(Ordering::Relaxed) {
                return Err(StoreError::Cancelled);
            }
            match copy_new(store, &source, want)? {
                Some(copy) => copied.push(copy),
                None => break,
            }
            wants.pop_front();
            if copied.len() >= ADOPTED.max(recorded) {
                store.record(&copied)?;
                recorded += copied.len();
                copied.clear();
            }
            progress.done.fetch_add(size, Ordering::Relaxed);
        }
        Ok(())
    };
    let result = copy_all();
    // Copies made before an error are kept.
    store.record(&copied)?;
    result
}

/// Makes one copy; `None` if the part file is in use, or the source is damaged or unreadable.
fn copy_new(store: &Store, source: &Source, want: &Want) -> Result<Option<Copied>, StoreError> {
    make_folder(&want.target)?;
    let partial = match store.copy_part(want.hash, want.tree, &want.target) {
        Ok(partial) => partial,
        Err(StoreError::Busy(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Ok(segment) = copy_range(source, 0..want.tree.groups()) else {
        return Ok(None);
    };
    want.occupancy.iter().for_each(|one| partial.occupy(one));
    partial.replace(&want.replaces);
    // The outboard is on disk already.
    partial.write(&Segment {
        parents: Vec::new(),
        ..segment
    })?;
    Copied::finish(store, &partial).map(Some)
}

enum CopyError {
    /// The source cannot be read, or does not have the right content.
    Source(ReadError),
    Store(StoreError),
}

/// Copies the groups that are wanted, missing, and present at the source. Verifies each group.
fn copy(
    store: &Store,
    source: &Source,
    want: &Want,
    partial: &Arc<Partial>,
    progress: &Progress,
) -> Result<(), CopyError> {
    let mut settled = Instant::now();
    let there = want.wanted(source.have());
    let mut from = 0;
    while let Some(run) = there.next_run(from) {
        let have = partial.have();
        let missing = have.next_missing(run.start, (run.end - run.start).min(MAX_GROUPS));
        let Some(missing) = missing.filter(|missing| missing.start < run.end) else {
            from = run.end;
            continue;
        };
        let groups = missing.start..missing.end.min(run.end);
        from = groups.end;
        if progress.check.cancelled.load(Ordering::Relaxed) {
            return Err(CopyError::Store(StoreError::Cancelled));
        }
        let segment = copy_range(source, groups).map_err(CopyError::Source)?;
        partial.write(&segment).map_err(CopyError::Store)?;
        // The caller settles the write that completes the file.
        if settled.elapsed() >= SETTLE && !partial.have().is_full() && partial.take_dirty() {
            store
                .settle(std::slice::from_ref(partial))
                .map_err(CopyError::Store)?;
            settled = Instant::now();
        }
    }
    Ok(())
}

/// Reads a range of groups with its proofs, verified against the blob's hash.
pub(super) fn copy_range(source: &Source, groups: Range<u64>) -> Result<Segment, ReadError> {
    let mut segment = Segment {
        first: groups.start,
        groups: groups.end - groups.start,
        ..Segment::default()
    };
    let mut data = Vec::new();
    source.read_with_parents(groups, &mut data, &mut segment.parents)?;
    segment.data = data.into();
    Ok(segment)
}
