//! Lets Automerge process a change only if everything that the change refers to is among its ancestors, and catches
//! every panic.
//!
//! The verdict depends only on the change and its ancestors, so that every replica reaches the same one. If one replica
//! refused a change that another accepted, the two would never converge. An operation may therefore refer only to
//! operations of ancestors, even if others are present. The objects, keys and elements that it refers to are checked
//! against these ancestors, and not against the document, which also has concurrent changes.
//!
//! Changes that passed [`check`] are applied together ([`Batch`]). Automerge has no reason to fail on them. If it does,
//! the caller discards the document and applies the changes one by one.

use std::{
    cell::Cell,
    collections::{BTreeSet, HashMap, HashSet},
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Once},
};

use automerge::{
    ActorId, Automerge, Change, ChangeHash, ObjId, ObjType, ReadDoc,
    legacy::{ElementId, Key as OpKey, ObjectId, Op, OpId, OpType},
};

use crate::{
    content::{
        batch::{Batch, Decoded, Operations, Pending, View},
        clocks::{Clock, Clocks},
    },
    id::ChangeId,
    log::chunk::{self, MAX_MAP_KEY},
    refusal::Refusal,
};

/// Most levels of nested maps and lists. Readers recurse, so the depth is limited.
pub const MAX_DEPTH: usize = 32;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
thread_local! {
    static FAILS: std::cell::RefCell<BTreeSet<ChangeId>> = const { std::cell::RefCell::new(BTreeSet::new()) };
}

/// Makes Automerge panic on these changes, on this thread.
#[cfg(test)]
pub(crate) fn fail_on(changes: BTreeSet<ChangeId>) {
    FAILS.set(changes);
}

static HOOK: Once = Once::new();

/// Runs work that a hostile change may make panic. The panic is not reported as a fault of this program; the peer that
/// caused it is reported instead.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, Refusal> {
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                before(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    result.map_err(|_| Refusal::Poisoned("Automerge panics on the change"))
}

/// A change that is well-formed on its own.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    pub(crate) change: Change,
    pub(crate) id: ChangeId,
}

/// Decodes a change, and makes the checks that need no document.
pub(crate) fn decode(bytes: &[u8], actor: [u8; 16], seq: u64) -> Result<Checked, Refusal> {
    chunk::check(bytes)?;
    let change = catch_panic(|| Change::from_bytes(bytes.to_vec()))?
        .map_err(|_| Refusal::Malformed("a change cannot be decoded"))?;
    if change.hash().0[..4] != bytes[4..8] {
        return Err(Refusal::Malformed("a change's checksum is wrong"));
    }
    if change.raw_bytes() != bytes {
        return Err(Refusal::Malformed(
            "a change is not encoded as Automerge encodes it",
        ));
    }
    if change.actor_id().to_bytes() != actor {
        return Err(Refusal::Malformed(
            "a change has another actor than its session",
        ));
    }
    if change.seq() != seq {
        return Err(Refusal::Malformed("a change is out of sequence"));
    }
    if change.is_empty() {
        return Err(Refusal::Malformed("a change changes nothing"));
    }
    let id = ChangeId(change.hash().0);
    Ok(Checked { change, id })
}

/// Returns the hash of a change, or `None` if it cannot be decoded.
pub(crate) fn hash_of(bytes: &[u8]) -> Option<ChangeId> {
    chunk::check(bytes).ok()?;
    let change = catch_panic(|| Change::from_bytes(bytes.to_vec()))
        .ok()?
        .ok()?;
    Some(ChangeId(change.hash().0))
}

pub(crate) fn object(id: &OpId) -> ObjId {
    // The last number is only a hint.
    ObjId::Id(id.counter(), id.actor().clone(), 0)
}

/// The operations that a change may refer to.
struct Ancestry<'a> {
    view: View<'a>,
    /// Clock of the change; `None` if all changes of the view are ancestors.
    clock: Option<Arc<Clock>>,
    actor: &'a ActorId,
    own: &'a Operations,
    start: u64,
}

impl<'a> Ancestry<'a> {
    fn of(view: View<'a>, change: &'a Change, own: &'a Operations, clocks: &mut Clocks) -> Self {
        let deps: BTreeSet<_> = change.deps().iter().copied().collect();
        let clock = (!view.are_heads(&deps)).then(|| clocks.of(&view, change.deps()));
        Self {
            view,
            clock,
            actor: change.actor_id(),
            own,
            start: change.start_op().get(),
        }
    }

    /// Returns true if an operation is part of this change.
    fn is_own(&self, id: &OpId) -> bool {
        id.actor() == self.actor && id.counter() >= self.start
    }

    /// Returns true if an operation is in an ancestor, or in this change before the operation at `position`.
    fn has(&self, id: &OpId, position: usize) -> bool {
        if self.is_own(id) {
            return id.counter() < self.start + position as u64;
        }
        self.view
            .change_of(id)
            .is_some_and(|hash| self.has_change(&hash))
    }

    /// Returns true if a change of the view is an ancestor.
    fn has_change(&self, change: &ChangeHash) -> bool {
        let clock = self.clock.as_ref();
        clock.is_none_or(|clock| clock.has(&self.view, change))
    }

    /// Checks each operation against the kind of its object. Also checks that the element it names and the operations
    /// it replaces are at its own position. Automerge looks for them only there. A document in which it found them at
    /// another position would depend on which changes are applied together.
    ///
    /// The references are sorted by the change that they lead to. Each of these changes is thus decoded at most once,
    /// for any number and order of references.
    fn check_places(&self, decoded: &mut Decoded) -> Result<(), Refusal> {
        let mut elsewhere: Vec<(ChangeHash, &Op, Role, &OpId)> = Vec::new();
        for op in self.own.all() {
            if matches!(op.obj, ObjectId::Root) && matches!(op.key, OpKey::Seq(_)) {
                return Err(Refusal::Poisoned(WRONG_CONTAINER));
            }
            for (role, id) in Role::all_of(op) {
                if self.is_own(id) {
                    role.check(op, id, self.own.get(id))?;
                    continue;
                }
                match self.view.change_of(id) {
                    Some(change) => elsewhere.push((change, op, role, id)),
                    None => role.check(op, id, None)?,
                }
            }
        }
        elsewhere.sort_by_key(|(change, ..)| *change);
        for of_change in elsewhere.chunk_by(|(one, ..), (other, ..)| one == other) {
            let (_, _, _, any) = of_change[0];
            let operations = self.view.operations_with(any, decoded);
            for (_, op, role, id) in of_change {
                let other = operations.as_ref().and_then(|all| all.get(id));
                role.check(op, id, other)?;
            }
        }
        Ok(())
    }
}

const WRONG_CONTAINER: &str = "an operation uses a map as a list, or a list as a map";

/// The purpose for which an operation refers to another.
#[derive(Debug, Clone, Copy)]
enum Role {
    /// The operation that created the object.
    Object,
    /// The operation that inserted the element that this operation changes, or inserts after.
    Element,
    /// An operation that is replaced.
    Before,
}

impl Role {
    /// Returns all references of an operation.
    fn all_of(op: &Op) -> impl Iterator<Item = (Self, &OpId)> {
        let object = match &op.obj {
            ObjectId::Root => None,
            ObjectId::Id(id) => Some((Self::Object, id)),
        };
        let element = match &op.key {
            OpKey::Seq(ElementId::Id(id)) => Some((Self::Element, id)),
            _ => None,
        };
        let before = op.pred.iter().map(|id| (Self::Before, id));
        object.into_iter().chain(element).chain(before)
    }

    /// Checks the operation `other`, whose id is `id`, as the target of this reference of `op`.
    fn check(self, op: &Op, id: &OpId, other: Option<&Op>) -> Result<(), Refusal> {
        match self {
            Self::Object => {
                let is_list = match other.map(|made| &made.action) {
                    Some(OpType::Make(ObjType::List)) => true,
                    Some(OpType::Make(ObjType::Map)) => false,
                    _ => {
                        return Err(Refusal::Poisoned(
                            "the object of an operation is neither a map nor a list",
                        ));
                    }
                };
                match is_list == matches!(op.key, OpKey::Seq(_)) {
                    true => Ok(()),
                    false => Err(Refusal::Poisoned(WRONG_CONTAINER)),
                }
            }
            Self::Element => match other.is_some_and(|made| made.insert && made.obj == op.obj) {
                true => Ok(()),
                false => Err(Refusal::Poisoned(
                    "an operation changes an element that is not in its list",
                )),
            },
            Self::Before => {
                let is_here = |before: &Op| {
                    let at_key = match (&op.key, before.insert) {
                        (OpKey::Seq(ElementId::Id(element)), true) => element == id,
                        (key, false) => before.key == *key,
                        _ => false,
                    };
                    at_key && before.obj == op.obj && !matches!(before.action, OpType::Delete)
                };
                match other.is_some_and(is_here) {
                    true => Ok(()),
                    false => Err(Refusal::Poisoned(
                        "an operation replaces a value at another position",
                    )),
                }
            }
        }
    }
}

/// Checks the references of a change. Returns the objects that it touches and its operations.
fn references(
    view: View<'_>,
    checked: &Checked,
    previous: Option<ChangeHash>,
    clocks: &mut Clocks,
    decoded: &mut Decoded,
) -> Result<(Touched, Operations), Refusal> {
    let change = &checked.change;
    let mut max_op = 0;
    for dep in change.deps() {
        let node = view.node(dep).ok_or(Refusal::Early)?;
        max_op = max_op.max(node.max_op);
    }
    if change.start_op().get() != max_op + 1 {
        return Err(Refusal::Poisoned("the operations have wrong numbers"));
    }
    let expanded = change.decode();
    // A second encoding of the same operations would have another hash in a save. Envelopes of version 1 therefore have
    // one encoding, that of Automerge 0.12. An Automerge with another encoding needs another version, on which replicas
    // have to agree before they write with it.
    if Change::from(expanded.clone()).raw_bytes() != change.raw_bytes() {
        return Err(Refusal::Foreign);
    }
    let own = Operations::new(change.start_op().get(), expanded.operations);
    let ancestry = Ancestry::of(view, change, &own, clocks);
    // Automerge's clocks are correct only if an actor's changes build on each other.
    if previous.is_some_and(|previous| !ancestry.has_change(&previous)) {
        return Err(Refusal::Poisoned(
            "the change does not build on the previous change of its author",
        ));
    }
    let mut touched = Touched::default();
    for (position, op) in own.all().iter().enumerate() {
        let known = |id: &OpId| ancestry.has(id, position);
        match &op.obj {
            ObjectId::Root => {}
            ObjectId::Id(id) if known(id) => {}
            ObjectId::Id(_) => {
                return Err(Refusal::Poisoned(
                    "an operation changes an object that is not among its ancestors",
                ));
            }
        }
        let keys = touched.entry(op.obj.clone()).or_default();
        match &op.key {
            OpKey::Map(key) if key.len() > MAX_MAP_KEY || key.is_empty() => {
                return Err(Refusal::Poisoned("a key is empty or too long"));
            }
            OpKey::Map(_) if op.insert => {
                return Err(Refusal::Poisoned("an operation inserts into a map"));
            }
            OpKey::Map(key) => _ = keys.insert(key.to_string()),
            OpKey::Seq(ElementId::Head) if op.insert => {}
            OpKey::Seq(ElementId::Id(id)) if known(id) => {}
            OpKey::Seq(_) => {
                return Err(Refusal::Poisoned(
                    "an operation changes an element that is not among its ancestors",
                ));
            }
        }
        if !op.pred.iter().all(known) {
            return Err(Refusal::Poisoned(
                "an operation replaces a value that is not among its ancestors",
            ));
        }
        if op.insert && !op.pred.is_empty() {
            return Err(Refusal::Poisoned("an insertion replaces a value"));
        }
        match &op.action {
            OpType::Make(ObjType::Map | ObjType::List) | OpType::Put(_) => {}
            OpType::Delete | OpType::Increment(_) if !op.insert && !op.pred.is_empty() => {}
            _ => {
                return Err(Refusal::Poisoned(
                    "the change holds an operation that is not allowed",
                ));
            }
        }
    }
    ancestry.check_places(decoded)?;
    Ok((touched, own))
}

/// The objects that a change touches, with the touched keys of maps.
pub(crate) type Touched = HashMap<ObjectId, HashSet<String>>;

/// Checks that the touched objects can still be read.
fn readable(doc: &Automerge, touched: &Touched) -> Result<(), Refusal> {
    for (id, keys) in touched {
        let id = &match id {
            ObjectId::Root => ObjId::Root,
            ObjectId::Id(id) => object(id),
        };
        let kind = doc
            .object_type(id)
            .map_err(|_| Refusal::Poisoned("an operation changes a value that is not an object"))?;
        if !matches!(kind, ObjType::Map | ObjType::List) {
            return Err(Refusal::Poisoned(
                "the object of an operation is neither a map nor a list",
            ));
        }
        let as_list = matches!(kind, ObjType::List);
        if as_list == keys.is_empty() {
            doc.values(id)
                .take(if as_list { usize::MAX } else { 0 })
                .for_each(drop);
        } else {
            return Err(Refusal::Poisoned(WRONG_CONTAINER));
        }
        for key in keys {
            doc.get_all(id, key.as_str()).map_err(|_| {
                Refusal::Poisoned("the value that an operation sets cannot be read")
            })?;
        }
    }
    Ok(())
}

/// The guard's cached knowledge of a document.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    depths: Depths,
    clocks: Clocks,
    decoded: Decoded,
}

impl Memory {
    /// Returns an estimate of the memory that decoded operations take, in bytes. Clocks are few and not included.
    pub(crate) fn bytes(&self) -> usize {
        self.decoded.bytes()
    }
}

/// Depths of objects, as far as they were needed. Automerge's own walk to the root panics below a deleted element.
#[derive(Debug, Clone, Default)]
struct Depths(HashMap<OpId, usize>);

impl Depths {
    /// Checks that no touched object is nested too deeply. `ops` are the operations of the change itself.
    fn check(
        &mut self,
        view: View<'_>,
        change: &Change,
        ops: &Operations,
        touched: &Touched,
        decoded: &mut Decoded,
    ) -> Result<(), Refusal> {
        let missing = || Refusal::Poisoned("an operation changes an object that does not exist");
        let (start, actor) = (change.start_op().get(), change.actor_id());
        let mut own: HashMap<OpId, usize> = HashMap::new();
        // Sort by the change that created the object, so that none is decoded repeatedly.
        let mut objects: Vec<_> = touched.keys().collect();
        objects.sort_by_cached_key(|object| match object {
            ObjectId::Root => None,
            ObjectId::Id(id) => view.change_of(id),
        });
        for object in objects {
            let mut above = Vec::new();
            let mut at = object.clone();
            let mut depth = loop {
                let ObjectId::Id(id) = &at else {
                    break 0;
                };
                if let Some(depth) = self.0.get(id).or_else(|| own.get(id)) {
                    break *depth;
                }
                if above.len() > MAX_DEPTH {
                    return Err(Refusal::Poisoned("the content is nested too deeply"));
                }
                let made_here = id.actor() == actor && id.counter() >= start;
                let parent = |op: &Op| op.obj.clone();
                let parent = match made_here {
                    true => ops.get(id).map(parent),
                    false => view
                        .operations_with(id, decoded)
                        .and_then(|operations| operations.get(id).map(parent)),
                };
                let parent = parent.ok_or_else(missing)?;
                above.push((id.clone(), made_here));
                at = parent;
            };
            for (id, made_here) in above.into_iter().rev() {
                depth += 1;
                // A change that is refused in the end leaves no entry.
                match made_here {
                    true => own.insert(id, depth),
                    false => self.0.insert(id, depth),
                };
            }
            if depth > MAX_DEPTH {
                return Err(Refusal::Poisoned("the content is nested too deeply"));
            }
        }
        Ok(())
    }
}

/// Makes all checks of a change that are possible before Automerge applies it, without modifying the document.
/// `previous` is the previous change of its actor.
pub(crate) fn check(
    view: View<'_>,
    checked: Checked,
    previous: Option<ChangeId>,
    memory: &mut Memory,
) -> Result<Pending, Refusal> {
    catch_panic(|| {
        let previous = previous.map(|id| ChangeHash(id.0));
        let Memory {
            depths,
            clocks,
            decoded,
        } = memory;
        let (touched, operations) = references(view, &checked, previous, clocks, decoded)?;
        depths.check(view, &checked.change, &operations, &touched, decoded)?;
        if view.has(&checked.change.hash()) {
            return Err(Refusal::Known);
        }
        Ok(Pending {
            checked,
            touched,
            operations: Arc::new(operations),
        })
    })?
}

/// Applies the changes of a batch to a document. After an error, the caller must discard the document.
pub(crate) fn apply(
    doc: &mut Automerge,
    batch: &Batch,
    memory: &mut Memory,
) -> Result<(), Refusal> {
    catch_panic(|| {
        let changes = batch.changes();
        #[cfg(test)]
        for one in changes {
            let fails = FAILS.with_borrow(|fails| fails.contains(&one.checked.id));
            assert!(!fails, "the test makes it fail");
        }
        let bare: Vec<Change> = changes
            .iter()
            .map(|one| one.checked.change.clone())
            .collect();
        doc.apply_changes(bare)
            .map_err(|_| Refusal::Poisoned("Automerge refuses the change"))?;
        let mut touched = Touched::new();
        for one in changes {
            let change = &one.checked.change;
            match doc.get_change_by_hash(&change.hash()) {
                Some(kept) if kept.raw_bytes() == change.raw_bytes() => {}
                _ => {
                    return Err(Refusal::Poisoned(
                        "Automerge does not return the change that it was given",
                    ));
                }
            }
            for (object, keys) in &one.touched {
                let all = touched.entry(object.clone()).or_default();
                all.extend(keys.iter().cloned());
            }
            let operations = Arc::clone(&one.operations);
            memory.decoded.keep(change.hash(), operations);
        }
        readable(doc, &touched)
    })?
}
