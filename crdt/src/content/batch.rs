//! Changes that were checked and wait to be applied together, and the operations in them and in the document.
//!
//! Automerge walks every list that a call to `apply_changes` touches, and the guard walks it again to see whether it
//! can still be read. Both cost as much for one change as for a thousand. Changes that arrive together are therefore
//! checked one by one, each against the document and the earlier changes of the batch, and then applied in one call.
//!
//! The checks of a change depend only on the change and its ancestors, wherever these are. The verdict is thus the same
//! however changes are grouped into batches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use automerge::{
    ActorId, Automerge, Change, ChangeHash, ReadDoc,
    legacy::{Op, OpId},
};

use crate::content::guard::{Checked, Touched, object};

/// Most changes in a batch, and their most bytes: two pieces of a log. A larger batch gains nothing, because the fixed
/// cost is a small part of the work by then. It would also lose more work if Automerge fails on one of the changes.
pub(crate) const MAX_CHANGES: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

/// Most operations that are kept decoded for a document, in addition to those of the latest change: two changes of the
/// largest size. They take about 32 MB, which count as memory of the document. Most references lead to changes that
/// other operations have just referred to.
const MAX_KEPT: usize = if cfg!(test) { 1000 } else { 131_072 };

#[cfg(test)]
thread_local! {
    /// Number of document changes that were decoded on this thread.
    pub(crate) static DECODED: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The operations of a change, the first of which has the number `start`.
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
        let position = id.counter().checked_sub(self.start)?;
        self.ops.get(usize::try_from(position).ok()?)
    }
}

/// A change that was checked but not applied.
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
    /// Changes of each actor, in the order of their operations.
    by_actor: HashMap<ActorId, Vec<usize>>,
    /// Heads of the document with these changes; `None` while the batch is empty.
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

/// The position of a change in the graph of changes.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) actor: ActorId,
    pub(crate) seq: u64,
    pub(crate) max_op: u64,
    pub(crate) deps: Vec<ChangeHash>,
}

/// A document together with changes that are not yet applied to it.
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

    /// Returns true if these are exactly the heads.
    pub(crate) fn are_heads(&self, changes: &BTreeSet<ChangeHash>) -> bool {
        match &self.batch.heads {
            Some(heads) => heads == changes,
            None => {
                let heads = self.doc.get_heads();
                heads.len() == changes.len() && heads.iter().all(|head| changes.contains(head))
            }
        }
    }

    /// Returns the change that contains an operation.
    pub(crate) fn change_of(&self, id: &OpId) -> Option<ChangeHash> {
        match self.batch.change_of(id) {
            Some(change) => Some(change.hash()),
            None => self.doc.hash_for_opid(&object(id)),
        }
    }

    /// Returns all operations of the change that contains an operation.
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

/// Operations of recently used changes. They are determined by hashes and thus never out of date.
#[derive(Debug, Clone, Default)]
pub(crate) struct Decoded {
    kept: HashMap<ChangeHash, (u64, Arc<Operations>)>,
    turns: BTreeMap<u64, ChangeHash>,
    turn: u64,
    count: usize,
}

impl Decoded {
    /// Returns an estimate of the memory used, in bytes.
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

    /// Keeps these operations, and drops those that were unused for the longest time. The latest change is kept
    /// whatever its size.
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
