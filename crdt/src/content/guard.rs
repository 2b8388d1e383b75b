//! A change meets Automerge: with every panic caught, and only if all that it refers to is among what it builds on.
//!
//! The verdict depends on nothing but the change and its ancestors, so that every replica comes to the same: a change
//! that one replica refuses and another takes would keep them apart for good. Hence an operation may refer only to
//! operations of ancestors, even where others happen to be here; and the objects, keys and elements that it refers to
//! are checked against these ancestors, and not against a document, in which concurrent changes are as well.
//!
//! Changes that passed [`check`] are applied together ([`Batch`]). Automerge has no reason to fail on them; if it
//! does, the caller throws the document away and applies them one by one.

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

/// How deep maps and lists are in each other: a reader recurses.
pub const MAX_DEPTH: usize = 32;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

#[cfg(test)]
thread_local! {
    static FAILS: std::cell::RefCell<BTreeSet<ChangeId>> = const { std::cell::RefCell::new(BTreeSet::new()) };
}

/// Has Automerge panic on these changes, on this thread.
#[cfg(test)]
pub(crate) fn fail_on(changes: BTreeSet<ChangeId>) {
    FAILS.set(changes);
}

static HOOK: Once = Once::new();

/// Runs what a hostile change may make panic; the panic is not reported, for the peer that caused it is.
pub(crate) fn contained<T>(work: impl FnOnce() -> T) -> Result<T, Refusal> {
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
    result.map_err(|_| Refusal::Poisoned("Automerge panics on it"))
}

/// A change that is well-formed by itself.
#[derive(Debug, Clone)]
pub(crate) struct Checked {
    pub(crate) change: Change,
    pub(crate) id: ChangeId,
}

/// Decodes a change, and checks what can be checked without a document.
pub(crate) fn decode(bytes: &[u8], actor: [u8; 16], seq: u64) -> Result<Checked, Refusal> {
    chunk::check(bytes)?;
    let change = contained(|| Change::from_bytes(bytes.to_vec()))?
        .map_err(|_| Refusal::Malformed("a change cannot be decoded"))?;
    if change.hash().0[..4] != bytes[4..8] {
        return Err(Refusal::Malformed("a change's checksum is wrong"));
    }
    if change.raw_bytes() != bytes {
        return Err(Refusal::Malformed(
            "a change is not encoded as Automerge does",
        ));
    }
    if change.actor_id().to_bytes() != actor {
        return Err(Refusal::Malformed(
            "a change is of another actor than its session's",
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

/// The hash of a change, as far as it can be decoded.
pub(crate) fn hash_of(bytes: &[u8]) -> Option<ChangeId> {
    chunk::check(bytes).ok()?;
    let change = contained(|| Change::from_bytes(bytes.to_vec()))
        .ok()?
        .ok()?;
    Some(ChangeId(change.hash().0))
}

pub(crate) fn object(id: &OpId) -> ObjId {
    // The last number is only a hint.
    ObjId::Id(id.counter(), id.actor().clone(), 0)
}

/// What of a document a change may refer to.
struct Ancestry<'a> {
    view: View<'a>,
    /// `None`: all that is here is an ancestor.
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

    /// Returns true if an operation is of this change.
    fn is_own(&self, id: &OpId) -> bool {
        id.actor() == self.actor && id.counter() >= self.start
    }

    /// Whether an operation is an ancestor, or of this change and before its operation number `place`.
    fn has(&self, id: &OpId, place: usize) -> bool {
        if self.is_own(id) {
            return id.counter() < self.start + place as u64;
        }
        self.view
            .change_of(id)
            .is_some_and(|hash| self.has_change(&hash))
    }

    /// Returns true if a change that is here is an ancestor.
    fn has_change(&self, change: &ChangeHash) -> bool {
        let clock = self.clock.as_ref();
        clock.is_none_or(|clock| clock.has(&self.view, change))
    }

    /// Checks that each operation is of the kind that its object is, and that the element that it names and what it
    /// replaces are at its own place: Automerge looks nowhere else for them, and a document in which it found them
    /// elsewhere would depend on which changes are applied together.
    ///
    /// The references are sorted by the change that they lead to, so that each of these changes is decoded at most
    /// once, however many there are and in whatever order they are referred to.
    fn check_places(&self, decoded: &mut Decoded) -> Result<(), Refusal> {
        let mut elsewhere: Vec<(ChangeHash, &Op, Role, &OpId)> = Vec::new();
        for op in self.own.all() {
            if matches!(op.obj, ObjectId::Root) && matches!(op.key, OpKey::Seq(_)) {
                return Err(Refusal::Poisoned(TAKES_FOR));
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

const TAKES_FOR: &str = "it takes a map for a list, or a list for a map";

/// The purpose for which an operation refers to another.
#[derive(Debug, Clone, Copy)]
enum Role {
    /// The operation that made its object.
    Object,
    /// The operation that inserted the element that it is at, or after.
    Element,
    /// An operation that it replaces.
    Before,
}

impl Role {
    /// Returns all that an operation refers to.
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

    /// Checks `other`, which has the number `id`, against the operation that refers to it.
    fn check(self, op: &Op, id: &OpId, other: Option<&Op>) -> Result<(), Refusal> {
        match self {
            Self::Object => {
                let is_list = match other.map(|made| &made.action) {
                    Some(OpType::Make(ObjType::List)) => true,
                    Some(OpType::Make(ObjType::Map)) => false,
                    _ => return Err(Refusal::Poisoned("it changes neither a map nor a list")),
                };
                match is_list == matches!(op.key, OpKey::Seq(_)) {
                    true => Ok(()),
                    false => Err(Refusal::Poisoned(TAKES_FOR)),
                }
            }
            Self::Element => match other.is_some_and(|made| made.insert && made.obj == op.obj) {
                true => Ok(()),
                false => Err(Refusal::Poisoned(
                    "it changes an element that is not in its list",
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
                    false => Err(Refusal::Poisoned("it replaces what is at another place")),
                }
            }
        }
    }
}

/// Checks what a change refers to; what it touches.
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
        return Err(Refusal::Poisoned("its operations have wrong numbers"));
    }
    let expanded = change.decode();
    // A second encoding of the same operations would have another hash in a save. So envelopes of version 1 have one
    // encoding, that of Automerge 0.12: an Automerge that encodes otherwise needs a version of its own, which replicas
    // agree on before they write with it.
    if Change::from(expanded.clone()).raw_bytes() != change.raw_bytes() {
        return Err(Refusal::Foreign);
    }
    let own = Operations::new(change.start_op().get(), expanded.operations);
    let ancestry = Ancestry::of(view, change, &own, clocks);
    // Automerge's clocks hold only if an actor's changes build on each other.
    if previous.is_some_and(|previous| !ancestry.has_change(&previous)) {
        return Err(Refusal::Poisoned(
            "it does not build on its author's change before",
        ));
    }
    let mut touched = Touched::default();
    for (place, op) in own.all().iter().enumerate() {
        let known = |id: &OpId| ancestry.has(id, place);
        match &op.obj {
            ObjectId::Root => {}
            ObjectId::Id(id) if known(id) => {}
            ObjectId::Id(_) => {
                return Err(Refusal::Poisoned(
                    "it changes an object that it cannot know",
                ));
            }
        }
        let keys = touched.entry(op.obj.clone()).or_default();
        match &op.key {
            OpKey::Map(key) if key.len() > MAX_MAP_KEY || key.is_empty() => {
                return Err(Refusal::Poisoned("a key is empty or too long"));
            }
            OpKey::Map(_) if op.insert => return Err(Refusal::Poisoned("it inserts into a map")),
            OpKey::Map(key) => _ = keys.insert(key.to_string()),
            OpKey::Seq(ElementId::Head) if op.insert => {}
            OpKey::Seq(ElementId::Id(id)) if known(id) => {}
            OpKey::Seq(_) => {
                return Err(Refusal::Poisoned(
                    "it changes an element that it cannot know",
                ));
            }
        }
        if !op.pred.iter().all(known) {
            return Err(Refusal::Poisoned("it replaces what it cannot know"));
        }
        if op.insert && !op.pred.is_empty() {
            return Err(Refusal::Poisoned("an insertion replaces something"));
        }
        match &op.action {
            OpType::Make(ObjType::Map | ObjType::List) | OpType::Put(_) => {}
            OpType::Delete | OpType::Increment(_) if !op.insert && !op.pred.is_empty() => {}
            _ => {
                return Err(Refusal::Poisoned(
                    "it holds an operation that is not allowed",
                ));
            }
        }
    }
    ancestry.check_places(decoded)?;
    Ok((touched, own))
}

/// Objects that a change touches, and of maps which keys.
pub(crate) type Touched = HashMap<ObjectId, HashSet<String>>;

/// Whether the objects that were touched can still be read.
fn readable(doc: &Automerge, touched: &Touched) -> Result<(), Refusal> {
    for (id, keys) in touched {
        let id = &match id {
            ObjectId::Root => ObjId::Root,
            ObjectId::Id(id) => object(id),
        };
        let kind = doc
            .object_type(id)
            .map_err(|_| Refusal::Poisoned("it changes what is no object"))?;
        if !matches!(kind, ObjType::Map | ObjType::List) {
            return Err(Refusal::Poisoned("it changes neither a map nor a list"));
        }
        let as_list = matches!(kind, ObjType::List);
        if as_list == keys.is_empty() {
            doc.values(id)
                .take(if as_list { usize::MAX } else { 0 })
                .for_each(drop);
        } else {
            return Err(Refusal::Poisoned(
                "it takes a map for a list, or a list for a map",
            ));
        }
        for key in keys {
            doc.get_all(id, key.as_str())
                .map_err(|_| Refusal::Poisoned("what it sets cannot be read"))?;
        }
    }
    Ok(())
}

/// The guard's memory of a document.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    depths: Depths,
    clocks: Clocks,
    decoded: Decoded,
}

impl Memory {
    /// An estimate of the memory that decoded operations take, in bytes; clocks are few.
    pub(crate) fn bytes(&self) -> usize {
        self.decoded.bytes()
    }
}

/// How deep objects are, as far as that was asked for. Automerge's own walk to the top panics below an element that is deleted.
#[derive(Debug, Clone, Default)]
struct Depths(HashMap<OpId, usize>);

impl Depths {
    /// Whether none of the objects is too deep. `ops` are those of the change itself.
    fn check(
        &mut self,
        view: View<'_>,
        change: &Change,
        ops: &Operations,
        touched: &Touched,
        decoded: &mut Decoded,
    ) -> Result<(), Refusal> {
        let missing = || Refusal::Poisoned("it changes an object that is nowhere");
        let (start, actor) = (change.start_op().get(), change.actor_id());
        let mut own: HashMap<OpId, usize> = HashMap::new();
        // By the change that made them, so that none is decoded over and over.
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
                    return Err(Refusal::Poisoned("it is nested too deeply"));
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
                // A change that is refused in the end leaves nothing behind.
                match made_here {
                    true => own.insert(id, depth),
                    false => self.0.insert(id, depth),
                };
            }
            if depth > MAX_DEPTH {
                return Err(Refusal::Poisoned("it is nested too deeply"));
            }
        }
        Ok(())
    }
}

/// Checks everything of a change that can be checked before Automerge takes it; nothing is changed. `previous` is its
/// actor's change before.
pub(crate) fn check(
    view: View<'_>,
    checked: Checked,
    previous: Option<ChangeId>,
    memory: &mut Memory,
) -> Result<Pending, Refusal> {
    contained(|| {
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

/// Puts the changes of a batch into a document. When this fails, the document is to be thrown away.
pub(crate) fn apply(
    doc: &mut Automerge,
    batch: &Batch,
    memory: &mut Memory,
) -> Result<(), Refusal> {
    contained(|| {
        let changes = batch.changes();
        #[cfg(test)]
        for one in changes {
            let fails = FAILS.with_borrow(|fails| fails.contains(&one.checked.id));
            assert!(!fails, "as the test has it");
        }
        let bare: Vec<Change> = changes
            .iter()
            .map(|one| one.checked.change.clone())
            .collect();
        doc.apply_changes(bare)
            .map_err(|_| Refusal::Poisoned("Automerge refuses it"))?;
        let mut touched = Touched::new();
        for one in changes {
            let change = &one.checked.change;
            match doc.get_change_by_hash(&change.hash()) {
                Some(kept) if kept.raw_bytes() == change.raw_bytes() => {}
                _ => {
                    return Err(Refusal::Poisoned(
                        "Automerge does not give back what it took",
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
