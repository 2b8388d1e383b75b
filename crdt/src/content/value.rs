//! JSON values and paths, and their translation to an Automerge document.
//!
//! A path is a JSON pointer (RFC 6901). It is empty for the whole document; otherwise `/` precedes each key or index.
//! In a key, `~1` stands for `/` and `~0` for `~`. `-` is the position after a list's last element. Numbers without a
//! fraction are integers. A counter reads as an integer. Text is a plain value that is replaced as a whole.

use std::fmt;

use automerge::{
    Automerge, ObjId, ObjType, PatchAction, Prop, ROOT, ReadDoc, ScalarValue, Value as Stored,
    transaction::{CommitOptions, Transactable, Transaction},
};
use serde_json::{Map, Number, Value};

use crate::{
    content::guard::MAX_DEPTH,
    log::chunk::{MAX_CHANGE, MAX_MAP_KEY, MAX_OPS},
};

/// The reason for which a text is not a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// The text does not begin with `/`.
    #[error(
        "{0:?} is not a path: a path begins with `/`, or is empty for the whole document, as in /models/0/name"
    )]
    NoSlash(String),
    /// `~` precedes a character other than `0` or `1`.
    #[error("{0:?} is not a path: in a key, write `~0` for `~` and `~1` for `/`")]
    Escape(String),
    /// The path has more parts than a document has levels.
    #[error("{0:?} is too deep: a document has at most {MAX_DEPTH} levels")]
    TooDeep(String),
}

/// The reason for which an edit does not fit the document; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// The path leads to no value.
    #[error("there is nothing at {0}")]
    NotFound(Path),
    /// The parent of the path does not exist, or is neither a map nor a list.
    #[error("there is no map or list at {0} to hold the value; put one there first, such as {{}}")]
    NoContainer(Path),
    /// The value is not a list.
    #[error("{0} is not a list; only lists support insertion")]
    NoList(Path),
    /// The last part of a path into a list is not a valid index.
    #[error(
        "{0} is in a list: its last part must be an index up to the list's length, or `-` for its end"
    )]
    Index(Path),
    /// The document itself cannot be replaced by another type or deleted.
    #[error("the whole document is always a map; name a key, as in /name")]
    Root,
    /// The value is not a counter.
    #[error("{0} is not a counter; increment a path without a value to create one")]
    NoCounter(Path),
    /// A key is empty or too long.
    #[error("the key has {0} bytes; a key has 1 to {MAX_MAP_KEY} bytes")]
    Key(usize),
    /// The value is nested too deeply.
    #[error("{0} would be too deep: a document has at most {MAX_DEPTH} levels")]
    TooDeep(Path),
    /// The counter would exceed its range.
    #[error("the counter at {0} would exceed the range of 64 bits")]
    Range(Path),
    /// The edits are too many or too large for one commit.
    #[error("a commit has at most {MAX_OPS} values in {} KiB; split the edits into several commits", MAX_CHANGE >> 10)]
    TooMuch,
}

/// The position of a value in a document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Path(Vec<String>);

impl Path {
    /// Parses a JSON pointer.
    ///
    /// # Errors
    /// Returns [`PathError`] if the text is not a valid pointer.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let rest = text
            .strip_prefix('/')
            .ok_or_else(|| PathError::NoSlash(text.to_owned()))?;
        let parts: Vec<_> = rest
            .split('/')
            .map(unescape)
            .collect::<Option<_>>()
            .ok_or_else(|| PathError::Escape(text.to_owned()))?;
        if parts.len() > MAX_DEPTH {
            return Err(PathError::TooDeep(text.to_owned()));
        }
        Ok(Self(parts))
    }

    /// Returns the path of a child of the value at this path.
    pub fn join(&self, part: impl Into<String>) -> Self {
        let mut parts = self.0.clone();
        parts.push(part.into());
        Self(parts)
    }

    fn split_last(&self) -> Option<(Self, &str)> {
        let (last, parents) = self.0.split_last()?;
        Some((Self(parents.to_vec()), last))
    }

    fn up_to(&self, depth: usize) -> Self {
        Self(self.0[..depth].to_vec())
    }
}

fn unescape(part: &str) -> Option<String> {
    let mut text = String::with_capacity(part.len());
    let mut rest = part.chars();
    while let Some(next) = rest.next() {
        text.push(match next {
            '~' => match rest.next()? {
                '0' => '~',
                '1' => '/',
                _ => return None,
            },
            other => other,
        });
    }
    Some(text)
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() || !self.0.is_empty() {
            return self
                .0
                .iter()
                .try_for_each(|part| write!(f, "/{}", part.replace('~', "~0").replace('/', "~1")));
        }
        f.write_str("the top")
    }
}

impl Path {
    /// Returns the JSON pointer.
    pub fn to_pointer(&self) -> String {
        format!("{self:#}")
    }
}

/// One edit of a document.
#[derive(Debug, Clone, PartialEq)]
pub enum Edit {
    /// Sets the value at a path, replacing any earlier value. The map or list that contains it must exist.
    Put(Path, Value),
    /// Removes the value at a path.
    Delete(Path),
    /// Adds to a counter, or creates one if there is no value. Increments of several writers add up.
    Increment(Path, i64),
    /// Inserts a value into a list, before the element with the path's index.
    Insert(Path, Value),
}

/// Returns the approximate number of operations and bytes that an edit writes.
fn size(value: &Value) -> (u64, usize) {
    match value {
        Value::Array(values) => values.iter().map(size).fold((1, 8), add),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| add(size(value), (0, key.len())))
            .fold((1, 8), add),
        Value::String(text) => (1, text.len() + 8),
        _ => (1, 8),
    }
}

fn add(a: (u64, usize), b: (u64, usize)) -> (u64, usize) {
    (a.0 + b.0, a.1 + b.1)
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

impl Edit {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Put(path, _)
            | Self::Delete(path)
            | Self::Increment(path, _)
            | Self::Insert(path, _) => path,
        }
    }
}

/// Checks that the edits fit into one commit.
pub(crate) fn check(edits: &[Edit]) -> Result<(), EditError> {
    let mut total = (0, 0);
    for edit in edits {
        let path = edit.path();
        let written = match edit {
            Edit::Put(path, value) | Edit::Insert(path, value) => {
                if path.0.len() + depth(value) > MAX_DEPTH {
                    return Err(EditError::TooDeep(path.clone()));
                }
                size(value)
            }
            Edit::Delete(_) | Edit::Increment(..) => (1, 8),
        };
        let key = path.0.last().map_or(0, String::len);
        total = add(total, add(written, (0, key)));
    }
    // Reserve an eighth for the encoding around the values.
    if total.0 > MAX_OPS || total.1 > MAX_CHANGE / 8 * 7 {
        return Err(EditError::TooMuch);
    }
    Ok(())
}

fn scalar(value: &Value) -> Option<ScalarValue> {
    Some(match value {
        Value::Null => ScalarValue::Null,
        Value::Bool(value) => ScalarValue::Boolean(*value),
        Value::Number(number) => number_to_scalar(number),
        Value::String(text) => ScalarValue::Str(text.as_str().into()),
        Value::Array(_) | Value::Object(_) => return None,
    })
}

fn number_to_scalar(number: &Number) -> ScalarValue {
    match (number.as_i64(), number.as_u64()) {
        (Some(value), _) => ScalarValue::Int(value),
        (None, Some(value)) => ScalarValue::Uint(value),
        (None, None) => ScalarValue::F64(number.as_f64().unwrap_or(f64::NAN)),
    }
}

/// The position that an edit applies to.
struct Target {
    container: ObjId,
    prop: Prop,
    /// True if the container is a list and the index is its length.
    at_end: bool,
}

fn containing(doc: &impl ReadDoc, path: &Path) -> Result<(ObjId, ObjType), EditError> {
    let (mut container, mut kind) = (ROOT, ObjType::Map);
    for (depth, part) in path.0.iter().enumerate() {
        let none = || EditError::NoContainer(path.up_to(depth + 1));
        let prop = match kind {
            ObjType::List => Prop::Seq(part.parse().map_err(|_| none())?),
            _ => Prop::Map(part.clone()),
        };
        match doc.get(&container, prop) {
            Ok(Some((Stored::Object(of @ (ObjType::Map | ObjType::List)), id))) => {
                (container, kind) = (id, of);
            }
            _ => return Err(none()),
        }
    }
    Ok((container, kind))
}

fn target(doc: &impl ReadDoc, path: &Path) -> Result<(Target, ObjType), EditError> {
    let (parents, last) = path.split_last().ok_or(EditError::Root)?;
    let (container, kind) = containing(doc, &parents)?;
    if kind == ObjType::List {
        let length = doc.length(&container);
        let index = match last {
            "-" => length,
            digits => digits.parse().map_err(|_| EditError::Index(path.clone()))?,
        };
        if index > length {
            return Err(EditError::Index(path.clone()));
        }
        let at_end = index == length;
        return Ok((
            Target {
                container,
                prop: Prop::Seq(index),
                at_end,
            },
            kind,
        ));
    }
    if last.is_empty() || last.len() > MAX_MAP_KEY {
        return Err(EditError::Key(last.len()));
    }
    Ok((
        Target {
            container,
            prop: Prop::Map(last.to_owned()),
            at_end: false,
        },
        kind,
    ))
}

/// Converts an error that Automerge should not return, because the position was checked before.
fn unexpected(error: automerge::AutomergeError) -> EditError {
    tracing::warn!(%error, "an edit that was checked does not fit the document");
    EditError::TooMuch
}

fn write(
    tx: &mut Transaction<'_>,
    target: &Target,
    insert: bool,
    value: &Value,
) -> Result<(), EditError> {
    let Target {
        container, prop, ..
    } = target;
    let made = match (scalar(value), prop) {
        (Some(scalar), Prop::Seq(index)) if insert => {
            tx.insert(container, *index, scalar).map(|()| None)
        }
        (Some(scalar), prop) => tx.put(container, prop.clone(), scalar).map(|()| None),
        (None, Prop::Seq(index)) if insert => tx
            .insert_object(container, *index, kind_of(value))
            .map(Some),
        (None, prop) => tx
            .put_object(container, prop.clone(), kind_of(value))
            .map(Some),
    };
    let Some(object) = made.map_err(unexpected)? else {
        return Ok(());
    };
    match value {
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                let target = Target {
                    container: object.clone(),
                    prop: Prop::Seq(index),
                    at_end: true,
                };
                write(tx, &target, true, value)?;
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                if key.is_empty() || key.len() > MAX_MAP_KEY {
                    return Err(EditError::Key(key.len()));
                }
                let target = Target {
                    container: object.clone(),
                    prop: Prop::Map(key.clone()),
                    at_end: false,
                };
                write(tx, &target, false, value)?;
            }
        }
        _ => {}
    }
    Ok(())
}

fn kind_of(value: &Value) -> ObjType {
    if value.is_array() {
        ObjType::List
    } else {
        ObjType::Map
    }
}

/// Makes an edit. After an error, the caller must roll the transaction back.
pub(crate) fn apply(tx: &mut Transaction<'_>, edit: &Edit) -> Result<(), EditError> {
    // The root map cannot be replaced, so replace its keys. Keys that other writers add concurrently remain.
    if let Edit::Put(path, Value::Object(map)) = edit
        && path.0.is_empty()
    {
        let others: Vec<_> = tx.keys(ROOT).filter(|key| !map.contains_key(key)).collect();
        for key in others {
            tx.delete(ROOT, key).map_err(unexpected)?;
        }
        return map
            .iter()
            .try_for_each(|(key, value)| apply(tx, &Edit::Put(path.join(key), value.clone())));
    }
    let (target, kind) = target(tx, edit.path())?;
    let there = match target.at_end {
        true => None,
        false => tx
            .get(&target.container, target.prop.clone())
            .map_err(unexpected)?,
    };
    let there = there.map(|(value, _)| value.into_owned());
    match edit {
        Edit::Put(_, value) => write(tx, &target, target.at_end, value),
        Edit::Insert(path, value) => match kind {
            ObjType::List => write(tx, &target, true, value),
            _ => Err(EditError::NoList(
                path.split_last()
                    .map(|(parent, _)| parent)
                    .unwrap_or_default(),
            )),
        },
        Edit::Delete(path) => match there {
            None => Err(EditError::NotFound(path.clone())),
            Some(_) => tx
                .delete(&target.container, target.prop)
                .map_err(unexpected),
        },
        Edit::Increment(path, by) => match there {
            None => {
                let counter = ScalarValue::counter(*by);
                match (&target.prop, target.at_end) {
                    (Prop::Seq(index), true) => tx.insert(&target.container, *index, counter),
                    (prop, _) => tx.put(&target.container, prop.clone(), counter),
                }
                .map_err(unexpected)
            }
            Some(Stored::Scalar(value)) => match value.as_ref() {
                ScalarValue::Counter(counter) => {
                    i64::from(counter)
                        .checked_add(*by)
                        .ok_or_else(|| EditError::Range(path.clone()))?;
                    tx.increment(&target.container, target.prop, *by)
                        .map_err(unexpected)
                }
                _ => Err(EditError::NoCounter(path.clone())),
            },
            Some(Stored::Object(_)) => Err(EditError::NoCounter(path.clone())),
        },
    }
}

fn scalar_to_json(value: &ScalarValue) -> Value {
    match value {
        ScalarValue::Str(text) => Value::String(text.to_string()),
        ScalarValue::Int(value) | ScalarValue::Timestamp(value) => (*value).into(),
        ScalarValue::Uint(value) => (*value).into(),
        ScalarValue::F64(value) => Number::from_f64(*value).map_or(Value::Null, Value::Number),
        ScalarValue::Counter(counter) => i64::from(counter).into(),
        ScalarValue::Boolean(value) => (*value).into(),
        ScalarValue::Bytes(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            Value::String(hex)
        }
        ScalarValue::Null | ScalarValue::Unknown { .. } => Value::Null,
    }
}

fn to_json(doc: &Automerge, value: &Stored<'_>, id: &ObjId) -> Value {
    match value {
        Stored::Scalar(value) => scalar_to_json(value),
        Stored::Object(ObjType::List) => {
            let values = doc.list_range(id, ..);
            values
                .map(|item| {
                    let id = item.id();
                    to_json(doc, &item.value.into(), &id)
                })
                .collect()
        }
        Stored::Object(_) => {
            let mut map = Map::new();
            for item in doc.map_range(id, ..) {
                let id = item.id();
                map.insert(item.key.to_string(), to_json(doc, &item.value.into(), &id));
            }
            Value::Object(map)
        }
    }
}

/// Returns the value at a path, or `None` if there is none.
pub(crate) fn get(doc: &Automerge, path: &Path) -> Option<Value> {
    let Some((parents, last)) = path.split_last() else {
        return Some(to_json(doc, &Stored::Object(ObjType::Map), &ROOT));
    };
    let (container, kind) = containing(doc, &parents).ok()?;
    let prop = match kind {
        ObjType::List => Prop::Seq(last.parse().ok()?),
        _ => Prop::Map(last.to_owned()),
    };
    let (value, id) = doc.get(&container, prop).ok()??;
    Some(to_json(doc, &value, &id))
}

/// Returns the difference between two states as edits, which can be applied to another state.
pub(crate) fn edits_of(
    doc: &Automerge,
    before: &[automerge::ChangeHash],
    after: &[automerge::ChangeHash],
) -> Vec<Edit> {
    let patches = doc.diff(before, after);
    let mut edits = Vec::new();
    for patch in patches {
        let at = path_of(&patch.path);
        let empty = |value: &Stored<'_>| match value {
            Stored::Scalar(value) => scalar_to_json(value),
            Stored::Object(ObjType::List) => Value::Array(Vec::new()),
            Stored::Object(_) => Value::Object(Map::new()),
        };
        let counter = |value: &Stored<'_>| match value {
            Stored::Scalar(value) => match value.as_ref() {
                ScalarValue::Counter(counter) => Some(i64::from(counter)),
                _ => None,
            },
            Stored::Object(_) => None,
        };
        match patch.action {
            PatchAction::PutMap {
                key,
                value: (value, _),
                ..
            } => {
                let path = at.join(key);
                match counter(&value) {
                    Some(count) => edits.push(Edit::Increment(path, count)),
                    None => edits.push(Edit::Put(path, empty(&value))),
                }
            }
            PatchAction::PutSeq {
                index,
                value: (value, _),
                ..
            } => {
                edits.push(Edit::Put(at.join(index.to_string()), empty(&value)));
            }
            PatchAction::Insert { index, values } => {
                for (offset, (value, _, _)) in values.iter().enumerate() {
                    edits.push(Edit::Insert(
                        at.join((index + offset).to_string()),
                        empty(value),
                    ));
                }
            }
            PatchAction::Increment { prop, value } => {
                edits.push(Edit::Increment(at.join(part_of(&prop)), value));
            }
            PatchAction::DeleteMap { key } => edits.push(Edit::Delete(at.join(key))),
            PatchAction::DeleteSeq { index, length } => {
                edits.extend((0..length).map(|_| Edit::Delete(at.join(index.to_string()))));
            }
            PatchAction::SpliceText { .. }
            | PatchAction::Mark { .. }
            | PatchAction::Conflict { .. } => {}
        }
    }
    edits
}

fn part_of(prop: &Prop) -> String {
    match prop {
        Prop::Map(key) => key.clone(),
        Prop::Seq(index) => index.to_string(),
    }
}

fn path_of(path: &[(ObjId, Prop)]) -> Path {
    Path(path.iter().map(|(_, prop)| part_of(prop)).collect())
}

/// Returns the paths that patches affect: keys of maps, and whole lists, because elements of lists move.
pub(crate) fn touched(patches: &[automerge::Patch]) -> Vec<Path> {
    let mut paths: Vec<Path> = patches
        .iter()
        .map(|patch| {
            let at = path_of(&patch.path);
            match &patch.action {
                PatchAction::PutMap { key, .. } | PatchAction::DeleteMap { key } => at.join(key),
                PatchAction::PutSeq { index, .. } => at.join(index.to_string()),
                PatchAction::Increment { prop, .. } | PatchAction::Conflict { prop } => {
                    at.join(part_of(prop))
                }
                _ => at,
            }
        })
        .collect();
    paths.sort();
    paths.dedup();
    // Drop paths below a path that is reported.
    let mut kept: Vec<Path> = Vec::new();
    for path in paths {
        if !kept.last().is_some_and(|last| path.0.starts_with(&last.0)) {
            kept.push(path);
        }
    }
    kept
}

/// Copies all of the content into an empty document, each counter as a counter, in commits of limited size with the
/// given time.
pub(crate) fn copy(
    from: &Automerge,
    to: &mut Automerge,
    time: i64,
) -> Result<(), automerge::AutomergeError> {
    const OPS: usize = 4096;
    const BYTES: usize = MAX_CHANGE / 4;
    let options = || CommitOptions::default().with_time(time);
    // Objects that were created and are still to be filled.
    let mut open = vec![(ROOT, ROOT, ObjType::Map)];
    let (mut ops, mut bytes) = (0, 0);
    let mut tx = to.transaction();
    while let Some((source, target, kind)) = open.pop() {
        let values: Vec<(Prop, Stored<'static>, ObjId)> = match kind {
            ObjType::List => {
                let items = from.list_range(&source, ..).enumerate();
                items
                    .map(|(index, item)| {
                        let id = item.id();
                        (Prop::Seq(index), Stored::from(item.value).into_owned(), id)
                    })
                    .collect()
            }
            _ => from
                .map_range(&source, ..)
                .map(|item| {
                    let id = item.id();
                    (
                        Prop::Map(item.key.to_string()),
                        Stored::from(item.value).into_owned(),
                        id,
                    )
                })
                .collect(),
        };
        for (prop, value, id) in values {
            ops += 1;
            bytes += 16
                + if let Prop::Map(key) = &prop {
                    key.len()
                } else {
                    0
                };
            match value {
                Stored::Scalar(value) => {
                    let value = match value.into_owned() {
                        ScalarValue::Counter(counter) => ScalarValue::counter(i64::from(&counter)),
                        value => value,
                    };
                    bytes += match &value {
                        ScalarValue::Str(text) => text.len(),
                        ScalarValue::Bytes(data) | ScalarValue::Unknown { bytes: data, .. } => {
                            data.len()
                        }
                        _ => 8,
                    };
                    match prop {
                        Prop::Seq(index) => tx.insert(&target, index, value)?,
                        prop => tx.put(&target, prop, value)?,
                    }
                }
                Stored::Object(kind) => {
                    let made = match prop {
                        Prop::Seq(index) => tx.insert_object(&target, index, kind)?,
                        prop => tx.put_object(&target, prop, kind)?,
                    };
                    open.push((id, made, kind));
                }
            }
            if ops >= OPS || bytes >= BYTES {
                tx.commit_with(options());
                tx = to.transaction();
                (ops, bytes) = (0, 0);
            }
        }
    }
    if ops == 0 && tx.base_heads().is_empty() {
        // An empty document needs at least one change.
        tx.put(ROOT, "-", ScalarValue::Null)?;
        tx.delete(ROOT, "-")?;
    }
    tx.commit_with(options());
    Ok(())
}

#[cfg(test)]
mod tests;
