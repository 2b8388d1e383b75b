//! The content of a registry's documents.
//!
//! A registry is a document of type [`TYPE`]. Its map `publishers` has a key `<PeerId> <pattern>` for each publisher
//! and each pattern of names that it may publish. For each of these keys there is another document, the publisher's
//! catalogue, which only the publisher writes. The genesis of a catalogue follows from the registry, the publisher
//! and the pattern, so that every node can compute its id. A catalogue has a key for each name, `org/name@revision`,
//! with an [`Entry`].

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use weft_blobs::{Hash, Manifest, hf_cache::Commit};
use weft_crdt::{DocumentId, Key, NewDocument, Path};

use crate::{ModelInfo, ModelName, models::manifest_size};

/// Value of the key `type` in a registry.
pub(super) const TYPE: &str = "weft registry 1";

const NONCE: &str = "weft registry catalogue v1";
const LABEL: &str = "catalogue ";

/// Longest pattern, in bytes.
const MAX_PATTERN: usize = 100;

/// Longest commit, in bytes: 40 hex digits.
const MAX_COMMIT: usize = 40;

/// The most files of a model that a catalogue lists, and the most bytes of this list. For a larger model, only the
/// number of files is listed.
const MAX_FILES: usize = 128;
const MAX_LIST: usize = 8 << 10;

/// A pattern of model names: a prefix followed by `*`. It matches the names that begin with the prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamePattern(String);

/// The error of parsing a pattern of names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a pattern of names; a pattern is * for all names, or a prefix such as acme/*"
)]
pub struct ParsePatternError(String);

impl NamePattern {
    /// Returns the pattern `*`, which matches all names.
    pub fn all() -> Self {
        Self("*".to_owned())
    }

    /// Returns the prefix: the pattern without its `*`.
    pub fn prefix(&self) -> &str {
        &self.0[..self.0.len() - 1]
    }

    /// Returns true if the pattern matches `name`.
    pub fn matches(&self, name: &ModelName) -> bool {
        key(name).starts_with(self.prefix())
    }

    /// Returns true if a name could begin with `prefix` and match the pattern.
    pub(super) fn overlaps(&self, prefix: &str) -> bool {
        self.prefix().starts_with(prefix) || prefix.starts_with(self.prefix())
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NamePattern {
    type Err = ParsePatternError;

    fn from_str(text: &str) -> Result<Self, ParsePatternError> {
        let in_names = |c: char| c.is_ascii_alphanumeric() || "._-/@".contains(c);
        match text.strip_suffix('*') {
            Some(prefix) if text.len() <= MAX_PATTERN && prefix.chars().all(in_names) => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(ParsePatternError(text.chars().take(200).collect())),
        }
    }
}

/// Returns the genesis of a publisher's catalogue. At first, every peer may read the catalogue. Before the publisher
/// writes to it, the publisher restricts it to the registry's readers.
pub(super) fn beginning(registry: &DocumentId, pattern: &NamePattern) -> NewDocument {
    let mut hasher = blake3::Hasher::new_derive_key(NONCE);
    hasher.update(&registry.0).update(pattern.0.as_bytes());
    let mut nonce = [0; 16];
    hasher.finalize_xof().fill(&mut nonce);
    NewDocument {
        single_writer: true,
        label: format!("{LABEL}{registry} {pattern}"),
        nonce: Some(nonce),
        ..NewDocument::default()
    }
}

/// Returns the id of a publisher's catalogue.
pub(super) fn id(registry: &DocumentId, publisher: &Key, pattern: &NamePattern) -> DocumentId {
    let id = beginning(registry, pattern).id_by(publisher);
    id.ok()
        .flatten()
        .expect("it has a nonce, a short label and no writers")
}

/// Returns the registry of a catalogue; `None` if the document is not a catalogue.
pub(super) fn registry_of(id: &DocumentId, owner: &Key, label: &str) -> Option<DocumentId> {
    let (registry, pattern) = label.strip_prefix(LABEL)?.split_once(' ')?;
    let (registry, pattern) = (registry.parse().ok()?, pattern.parse().ok()?);
    (self::id(&registry, owner, &pattern) == *id).then_some(registry)
}

/// Returns the key of a name in a catalogue.
pub(super) fn key(name: &ModelName) -> String {
    format!("{}/{}@{}", name.org(), name.name(), name.revision())
}

/// Returns the path of a name in a catalogue.
pub(super) fn path(name: &ModelName) -> Path {
    Path::default().join(key(name))
}

/// The entry of a name in a catalogue.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Id of the model, 64 hex digits.
    pub(super) manifest: String,
    pub(super) manifest_size: u64,
    /// Total size of the model's files, in bytes.
    pub(super) size: u64,
    pub(super) tensors: u64,
    /// Number of shard groups: the parts by which providers announce what they have.
    pub(super) shard_groups: u32,
    pub(super) file_count: u64,
    /// A line for each file: its size in bytes and its path. Empty if there are too many files. It is one text,
    /// because documents are best kept below some ten thousand values.
    pub(super) files: String,
    /// Time of publication in milliseconds since the Unix epoch, by the publisher's clock.
    pub(super) published: u64,
    /// The commit of the hub that the model is a cache's part of, 40 hex digits; empty if there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) commit: String,
}

impl Entry {
    pub(super) fn of(
        info: &ModelInfo,
        manifest: &Manifest,
        published: u64,
        commit: Option<Commit>,
    ) -> Self {
        let files = manifest.files();
        let line = |file: &weft_blobs::manifest::File| format!("{} {}\n", file.size, file.path);
        let list: String = files.iter().take(MAX_FILES + 1).map(line).collect();
        let is_long = files.len() > MAX_FILES || list.len() > MAX_LIST;
        let groups = files.len().checked_sub(1);
        Self {
            manifest: info.id.to_string(),
            manifest_size: manifest_size(manifest),
            size: info.size,
            tensors: info.tensor_count as u64,
            shard_groups: groups.map_or(0, |last| manifest.shard_group(last) as u32 + 1),
            file_count: files.len() as u64,
            files: if is_long { String::new() } else { list },
            published,
            commit: commit.map_or_else(String::new, |commit| commit.to_string()),
        }
    }

    /// Parses an entry. Returns `None` if it is malformed or over a limit, as a hostile publisher may write it.
    pub(super) fn read(value: Value) -> Option<Self> {
        let entry: Self = serde_json::from_value(value).ok()?;
        let is_long = entry.files.len() > MAX_LIST
            || entry.files.lines().count() > MAX_FILES
            || entry.commit.len() > MAX_COMMIT;
        (!is_long && entry.model().is_some()).then_some(entry)
    }

    pub(super) fn model(&self) -> Option<Hash> {
        self.manifest.parse().ok()
    }

    pub(super) fn files(&self) -> Vec<(String, u64)> {
        let file = |line: &str| {
            let (size, path) = line.split_once(' ')?;
            Some((path.to_owned(), size.parse().ok()?))
        };
        self.files.lines().filter_map(file).collect()
    }
}

/// Returns the entries of a catalogue whose names begin with `prefix` and match the pattern. Malformed entries are
/// ignored.
pub(super) fn entries(
    content: Map<String, Value>,
    pattern: &NamePattern,
    prefix: &str,
) -> Vec<(ModelName, Entry)> {
    let entry = |(key, value): (String, Value)| {
        let name: ModelName = key.parse().ok()?;
        let is_meant = self::key(&name) == key && key.starts_with(prefix) && pattern.matches(&name);
        Some((name, is_meant.then(|| Entry::read(value)).flatten()?))
    };
    content.into_iter().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patterns_match_names_with_their_prefix() {
        let some: NamePattern = "acme/*".parse().unwrap();
        let name = |text: &str| text.parse::<ModelName>().unwrap();
        assert!(some.matches(&name("acme/tiny")) && !some.matches(&name("acmes/tiny")));
        assert!(NamePattern::all().matches(&name("a/b")));
        let one: NamePattern = "acme/tiny@main*".parse().unwrap();
        assert!(one.matches(&name("acme/tiny")) && !one.matches(&name("acme/tiny@v2")));
        for (pattern, prefix, overlaps) in [
            ("*", "acme/", true),
            ("acme/*", "", true),
            ("acme/*", "acme/t", true),
            ("acme/tiny*", "acme/", true),
            ("acme/*", "other/", false),
        ] {
            let pattern: NamePattern = pattern.parse().unwrap();
            assert_eq!(pattern.overlaps(prefix), overlaps, "{pattern} {prefix}");
        }
        let long = "x".repeat(MAX_PATTERN) + "*";
        for bad in ["", "acme/", "*a", "a**", "a b*", "é*", &long] {
            assert!(bad.parse::<NamePattern>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_label_identifies_a_catalogue_only_if_the_id_matches() {
        let (registry, publisher) = (DocumentId([1; 32]), Key([2; 32]));
        let pattern: NamePattern = "acme/*".parse().unwrap();
        let id = id(&registry, &publisher, &pattern);
        let label = beginning(&registry, &pattern).label;
        assert_eq!(registry_of(&id, &publisher, &label), Some(registry));
        assert_eq!(registry_of(&DocumentId([3; 32]), &publisher, &label), None);
        assert_eq!(registry_of(&id, &Key([4; 32]), &label), None);
        assert_eq!(registry_of(&id, &publisher, "catalogue"), None);
    }

    #[test]
    fn malformed_entries_are_ignored() {
        let entry = json!({
            "manifest": "ab".repeat(32), "manifest_size": 1, "size": 2, "tensors": 3, "shard_groups": 1,
            "file_count": 1, "files": "2 a b\n", "published": 4,
        });
        let mut short = entry.clone();
        short["manifest"] = json!("ab");
        let content = json!({
            "acme/a@main": entry, "acme/b": entry, "other/a@main": entry, "acme/c@main": short,
            "acme/d@main": 7, "x": {},
        });
        let Value::Object(content) = content else {
            unreachable!()
        };
        let found = entries(content, &"acme/*".parse().unwrap(), "");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, "acme/a".parse().unwrap());
        assert_eq!(found[0].1.files(), [("a b".to_owned(), 2)]);
    }
}
