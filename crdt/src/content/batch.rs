//! Changes that were checked and wait to be applied together, and what they and the document tell of operations.
//!
//! Automerge walks every list that a call to `apply_changes` touches, and so does the guard when it looks whether the
//! list can still be read. Both cost as much for one change as for a thousand. So changes that come together are
//! checked one by one, each against the document and the changes of the batch before it, and then applied in one call.
//!
//! The checks look at nothing but a change and its ancestors, wherever these are, and so a verdict does not depend on
//! which changes share a batch.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use automerge::{
    ActorId, Automerge, Change, ChangeHash, ReadDoc,
    legacy::{Op, OpId},
};

use crate::content::guard::{Checked, Touched, object};

/// Changes of a batch, and their bytes: two pieces of a log. More gains nothing, for what is the same for all of them
/// is a small part of the work by then; and what is undone if Automerge fails on one of them stays small.
pub(crate) const MAX_CHANGES: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

/// Operations that are kept decoded for a document, beside those of the change that was looked at last: two changes of
/// the largest size, about 32 MB, which count as the document's memory. Most references lead to changes that others
/// have just referred to.
const MAX_KEPT: usize = if cfg!(test) { 1000 } else { 131_072 };

#[cfg(test)]
thread_local! {
    /// The number of changes of documents that were decoded on this thread.
    pub(crate) static DECODED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The operations of a change, the first with the number `start`.
#[derive(Debug)]
pub(crate) struct Operations {
    start: u64,
    ops: Vec<Op>,
}

impl Operations {
    pub(crate) fn new(start: u64, ops: Vec<Op>) -> Self {
        Self { start, ops }
    }

    pub(crate) fn all(&self) -> &[Op] {
        &self.ops
    }

    pub(crate) fn get(&self, id: &OpId) -> Option<&Op> {
        let place = id.counter().checked_sub(self.start)?;
        self.ops.get(usize::try_from(place).ok()?)
    }
}

/// A change that was checked, and has not been applied.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) checked: Checked,
    pub(crate) touched: Touched,
    pub(crate) operations: Arc<Operations>,
}

impl Pending {
    fn change(&self) -> &Change {
        &self.checked.change
    }
}

/// Changes that are applied together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    changes: Vec<Pending>,
    by_hash: HashMap<ChangeHash, usize>,
    /// Each actor's, in the order of their operations.
    by_actor: HashMap<ActorId, Vec<usize>>,
    /// Of the document with these changes; `None` as long as there is none.
    heads: Option<BTreeSet<ChangeHash>>,
    bytes: usize,
}

impl Batch {
    pub(crate) fn changes(&self) -> &[Pending] {
        &self.changes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.changes.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.changes.len() >= MAX_CHANGES || self.bytes >= MAX_BYTES
    }

    /// Adds a change that was checked against `doc` and this batch.
    pub(crate) fn add(&mut self, doc: &Automerge, pending: Pending) {
        let (at, change) = (self.changes.len(), pending.change());
        let heads = self
            .heads
            .get_or_insert_with(|| doc.get_heads().into_iter().collect());
        for dep in change.deps() {
            heads.remove(dep);
        }
        heads.insert(change.hash());
        self.by_hash.insert(change.hash(), at);
        let of_actor = self.by_actor.entry(change.actor_id().clone());
        of_actor.or_default().push(at);
        self.bytes += change.raw_bytes().len();
        self.changes.push(pending);
    }

    fn change_of(&self, id: &OpId) -> Option<&Change> {
        let of_actor = self.by_actor.get(id.actor())?;
        let change = |at: &usize| self.changes[*at].change();
        let after = of_actor.partition_point(|at| change(at).start_op().get() <= id.counter());
        let last = change(of_actor.get(after.checked_sub(1)?)?);
        (id.counter() <= last.max_op()).then_some(last)
    }
}

/// A change's place among others.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) actor: ActorId,
    pub(crate) seq: u64,
    pub(crate) max_op: u64,
    pub(crate) deps: Vec<ChangeHash>,
}

/// A document, with changes that are still to be applied to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) doc: &'a Automerge,
    pub(crate) batch: &'a Batch,
}

impl View<'_> {
    pub(crate) fn has(&self, change: &ChangeHash) -> bool {
        self.batch.by_hash.contains_key(change)
            || self.doc.get_change_meta_by_hash(change).is_some()
    }

    pub(crate) fn node(&self, change: &ChangeHash) -> Option<Node> {
        if let Some(at) = self.batch.by_hash.get(change) {
            let change = self.batch.changes[*at].change();
            return Some(Node {
                actor: change.actor_id().clone(),
                seq: change.seq(),
                max_op: change.max_op(),
                deps: change.deps().to_vec(),
            });
        }
        self.doc.get_change_meta_by_hash(change).map(|meta| Node {
            actor: meta.actor.into_owned(),
            seq: meta.seq,
            max_op: meta.max_op,
            deps: meta.deps,
        })
    }

    /// Returns true if these are all heads.
    pub(crate) fn are_heads(&self, changes: &BTreeSet<ChangeHash>) -> bool {
        match &self.batch.heads {
            Some(heads) => heads == changes,
            None => {
                let heads = self.doc.get_heads();
                heads.len() == changes.len() && heads.iter().all(|head| changes.contains(head))
            }
        }
    }

    /// Returns the change that an operation is of.
    pub(crate) fn change_of(&self, id: &OpId) -> Option<ChangeHash> {
        match self.batch.change_of(id) {
            Some(change) => Some(change.hash()),
            None => self.doc.hash_for_opid(&object(id)),
        }
    }

    /// Returns the operations of the change that an operation is of.
    pub(crate) fn operations_with(&self, id: &OpId, kept: &mut Decoded) -> Option<Arc<Operations>> {
        let hash = self.change_of(id)?;
        if let Some(at) = self.batch.by_hash.get(&hash) {
            return Some(Arc::clone(&self.batch.changes[*at].operations));
        }
        if let Some(operations) = kept.get(&hash) {
            return Some(operations);
        }
        #[cfg(test)]
        DECODED.set(DECODED.get() + 1);
        let change = self.doc.get_change_by_hash(&hash)?.decode();
        let operations = Operations::new(change.start_op.get(), change.operations);
        let operations = Arc::new(operations);
        kept.keep(hash, Arc::clone(&operations));
        Some(operations)
    }
}

/// Operations of changes that were referred to last. They follow from hashes, and are never out of date.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decoded {
    kept: HashMap<ChangeHash, (u64, Arc<Operations>)>,
    turns: BTreeMap<u64, ChangeHash>,
    turn: u64,
    count: usize,
}

impl Decoded {
    /// An estimate of the memory that is taken, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.count.saturating_mul(256)
    }

    fn get(&mut self, change: &ChangeHash) -> Option<Arc<Operations>> {
        let (turn, operations) = self.kept.get_mut(change)?;
        self.turns.remove(turn);
        self.turn += 1;
        *turn = self.turn;
        self.turns.insert(self.turn, *change);
        Some(Arc::clone(operations))
    }

    /// Keeps these, and drops what was not used for the longest time; the change that came last is kept whatever its
    /// size.
    pub(crate) fn keep(&mut self, change: ChangeHash, operations: Arc<Operations>) {
        if self.get(&change).is_some() {
            return;
        }
        while self.count > 0
            && self.count + operations.ops.len() > MAX_KEPT
            && let Some((_, oldest)) = self.turns.pop_first()
        {
            let gone = self.kept.remove(&oldest);
            self.count -= gone.map_or(0, |(_, gone)| gone.ops.len());
        }
        self.turn += 1;
        self.count += operations.ops.len();
        self.turns.insert(self.turn, change);
        self.kept.insert(change, (self.turn, operations));
    }
}
