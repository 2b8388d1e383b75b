//! Names on the hub: repositories, revisions, commits.

use std::{fmt, str::FromStr};

use crate::{
    Hash,
    path::{self, OWN_PREFIX},
};

/// The longest part of a repository's name, in bytes.
const MAX_PART: usize = 96;

/// The prefix of the folder of a model repository.
const MODELS: &str = "models--";

/// The text that replaces the slash in the folder's name. The hub does not allow it in names.
const SEPARATOR: &str = "--";

/// The revision of a name that gives none.
const DEFAULT_REVISION: &str = "main";

/// The error for a text that is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {what}: {reason}")]
pub struct NameError {
    /// The text as given, at most its first 200 characters.
    pub text: String,
    /// The kind of name that was expected.
    pub what: &'static str,
    /// The reason why the text is refused.
    pub reason: &'static str,
}

fn refuse(text: &str, what: &'static str, reason: &'static str) -> NameError {
    NameError {
        text: text.chars().take(200).collect(),
        what,
        reason,
    }
}

/// A model repository on the hub: `org/name`, or just `name` for some that are older than organisations, like `gpt2`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// Returns the name as the hub writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of the repository's folder in a cache: `models--org--name`.
    pub fn folder_name(&self) -> String {
        format!("{MODELS}{}", self.0.replace('/', SEPARATOR))
    }

    /// Returns the repository of a folder, the reverse of [`folder_name`](Self::folder_name); `None` if the folder is
    /// not that of a model.
    ///
    /// # Errors
    /// [`NameError`] if the folder has the prefix of a model, and the rest is not a valid name.
    pub(super) fn of_folder(folder: &str) -> Option<Result<Self, NameError>> {
        let name = folder.strip_prefix(MODELS)?;
        Some(name.replacen(SEPARATOR, "/", 1).parse())
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RepoId {
    type Err = NameError;

    /// Checks the rules of huggingface_hub's `validate_repo_id`.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let refuse = |reason| Err(refuse(text, "the name of a repository", reason));
        let (org, name) = match text.split_once('/') {
            Some((org, name)) => (Some(org), name),
            None => (None, text),
        };
        for part in org.into_iter().chain([name]) {
            if part.is_empty() {
                return refuse("a part of it is empty");
            }
            if part.len() > MAX_PART {
                return refuse("a part of it is longer than 96 bytes");
            }
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if !part.chars().all(allowed) {
                return refuse(
                    "only letters, digits, dots, dashes, underscores and one slash are allowed",
                );
            }
            if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) {
                return refuse("a part of it begins or ends with a dot or a dash");
            }
        }
        if text.contains(SEPARATOR) || text.contains("..") {
            return refuse("it has two dashes or two dots in a row");
        }
        if text.ends_with(".git") {
            return refuse("it ends with .git");
        }
        Ok(Self(text.to_owned()))
    }
}

/// A revision: a branch, a tag or another ref like `refs/pr/1`, or a commit's 40 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(String);

impl Revision {
    /// Returns the revision as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the commit, if the revision is a commit id: huggingface_hub then reads no ref.
    pub fn commit(&self) -> Option<Commit> {
        self.0.parse().ok()
    }
}

impl Default for Revision {
    /// Returns `main`.
    fn default() -> Self {
        Self(DEFAULT_REVISION.to_owned())
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Revision {
    type Err = NameError;

    /// A revision becomes a path below `refs`, so names that [`crate::path::check`] refuses are not revisions.
    fn from_str(text: &str) -> Result<Self, NameError> {
        match path::check(text) {
            Ok(()) => Ok(Self(text.to_owned())),
            Err(error) => Err(refuse(text, "a revision", error.reason)),
        }
    }
}

/// The id of a commit: 20 bytes, written as 40 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Commit([u8; 20]);

impl Commit {
    /// Makes a commit of these bytes; `None` if there are not 20 of them.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }

    /// Returns the 20 bytes.
    pub fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }

    /// Returns the commit id for a model that does not come from the hub: the first 40 hex digits of the model's id.
    /// The same files always get the same commit.
    pub fn of_model(id: &Hash) -> Self {
        let (first, _) = id
            .as_bytes()
            .split_first_chunk()
            .expect("a hash has 32 bytes");
        Self(*first)
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Commit({self})")
    }
}

impl FromStr for Commit {
    type Err = NameError;

    /// Accepts exactly 40 lower-case digits: huggingface_hub accepts no other commit ids, not even with a line break at
    /// the end.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = (|| {
            let mut bytes = [0; 20];
            if text.len() != 2 * bytes.len() {
                return None;
            }
            for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                *byte = digit(pair[0])? << 4 | digit(pair[1])?;
            }
            Some(Self(bytes))
        })();
        parsed.ok_or_else(|| {
            refuse(
                text,
                "a commit id",
                "a commit id has 40 hex digits, in lower case",
            )
        })
    }
}

fn digit(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;

    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the name of a temporary file of an export: `.weft-<what>.new`.
pub(super) fn temporary(what: &str) -> String {
    format!("{OWN_PREFIX}{what}{TEMPORARY}")
}

/// Returns the name of the folder into which a model is fetched that exports as `commit`.
pub(super) fn temporary_folder(commit: &Commit) -> String {
    format!("{OWN_PREFIX}{commit}")
}

/// Returns true if a file is a leftover of an interrupted export. Part files of downloads end differently.
pub(super) fn is_temporary(name: &str) -> bool {
    name.starts_with(OWN_PREFIX) && name.ends_with(TEMPORARY)
}

const TEMPORARY: &str = ".new";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_and_their_folders_name_each_other() {
        for (name, folder) in [
            ("gpt2", "models--gpt2"),
            ("acme/llama-3.1_8B", "models--acme--llama-3.1_8B"),
            ("_a/_b_", "models--_a--_b_"),
        ] {
            let repo: RepoId = name.parse().unwrap();
            assert_eq!(repo.folder_name(), folder);
            assert_eq!(RepoId::of_folder(folder), Some(Ok(repo)));
        }
        assert_eq!(RepoId::of_folder("datasets--a--b"), None);
        for folder in [
            "models--",
            "models--a--b--c",
            "models----a",
            "models--a--",
            "models--..--..",
        ] {
            assert!(RepoId::of_folder(folder).unwrap().is_err(), "{folder}");
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "a".repeat(97);
        for bad in [
            "", "/", "a/", "/a", "a/b/c", "../a", "a/..", ".a/b", "a/-b", "a/b.", "a--b/c", "a..b",
            "a b", "a\0b", "é/b", "a/b.git", &long,
        ] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad:?}");
        }
        for bad in [
            "", "/main", "..", "a/../b", "a//b", "a/", "./a", "a\nb", "a\0b", "a\\b", ".weft-x",
        ] {
            assert!(bad.parse::<Revision>().is_err(), "{bad:?}");
        }
        for good in ["main", "v1.0", "refs/pr/1", "feature/a-b", ".x"] {
            assert_eq!(good.parse::<Revision>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_commit_is_just_forty_digits() {
        let text = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(text.parse::<Commit>().unwrap().to_string(), text);
        for bad in [
            "",
            &text[1..],
            &format!("{text}\n"),
            &text.to_uppercase(),
            &"é".repeat(20),
            &text.replace('0', "g"),
        ] {
            assert!(bad.parse::<Commit>().is_err(), "{bad:?}");
        }
        let id = Hash::of(b"weft");
        assert_eq!(Commit::of_model(&id).to_string(), id.to_string()[..40]);
    }
}
