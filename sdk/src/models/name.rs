//! Model names: `org/name`, `org/name@revision`.

use std::{fmt, str::FromStr};

/// Longest part of a name, in bytes: the limit of the Hugging Face hub.
const MAX_PART: usize = 96;

/// Prefix of the keys of names in the DHT.
const KEY: &[u8] = b"name/";

/// The revision of a name that is given without one.
const DEFAULT_REVISION: &str = "main";

/// The name of a model: an organisation, a name and a revision.
///
/// It is parsed from `org/name@revision`, or `org/name` for the revision `main`. Each part has 1 to 96 ASCII letters,
/// digits, dots, dashes and underscores, and begins with neither a dot nor a dash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName {
    org: String,
    name: String,
    revision: String,
}

/// The error of parsing a model name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a model name: {reason}; a name looks like org/name or org/name@revision")]
pub struct ParseNameError {
    text: String,
    reason: &'static str,
}

impl ModelName {
    /// Returns the organisation: the part before the slash.
    pub fn org(&self) -> &str {
        &self.org
    }

    /// Returns the name: the part between the slash and the `@`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the revision: the part after the `@`, or `main`.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// Parses a key that [`record_key`](Self::record_key) has made.
    pub(crate) fn of_record_key(key: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(key.strip_prefix(KEY)?).ok()?;
        let name: Self = text.parse().ok()?;
        // Each name has exactly one key.
        (name.record_key() == key).then_some(name)
    }

    /// Returns the prefix of the keys of all names that begin with `prefix`.
    pub(crate) fn record_keys(prefix: &str) -> Vec<u8> {
        [KEY, prefix.as_bytes()].concat()
    }

    /// Returns the key in the DHT under which publishers claim the name.
    pub(crate) fn record_key(&self) -> Vec<u8> {
        let name = format!("{}/{}@{}", self.org, self.name, self.revision);
        Self::record_keys(&name)
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

impl FromStr for ModelName {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, ParseNameError> {
        let refuse = |reason| {
            Err(ParseNameError {
                text: text.chars().take(200).collect(),
                reason,
            })
        };
        let (path, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let Some((org, name)) = path.split_once('/') else {
            return refuse("it has no slash");
        };
        for part in [org, name, revision] {
            if part.is_empty() {
                return refuse("a part of it is empty");
            }
            if part.len() > MAX_PART {
                return refuse("a part of it is longer than 96 bytes");
            }
            if part.starts_with(['.', '-']) {
                return refuse("a part of it begins with a dot or a dash");
            }
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if !part.chars().all(allowed) {
                return refuse("only letters, digits, dots, dashes and underscores are allowed");
            }
        }
        Ok(Self {
            org: org.to_owned(),
            name: name.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_print() {
        let plain: ModelName = "acme/llama-3.1_8B".parse().unwrap();
        assert_eq!(plain.to_string(), "acme/llama-3.1_8B");
        assert_eq!(plain.revision(), "main");
        assert_eq!("acme/llama-3.1_8B@main".parse(), Ok(plain));
        let revision: ModelName = "a/b@v1.0".parse().unwrap();
        assert_eq!(revision.to_string(), "a/b@v1.0");
    }

    #[test]
    fn other_texts_are_refused() {
        let long = format!("a/{}", "b".repeat(97));
        for bad in [
            "", "a", "/", "a/", "/b", "a/b/c", "a/b@", "a/b@c@d", "../b", "a/..", "a/-b", "a b/c",
            "é/b", &long,
        ] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad:?}");
        }
    }
}
