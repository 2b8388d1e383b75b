//! Rules for the paths in a manifest.
//!
//! A manifest comes from a stranger, and its paths become files on this node. So a path must mean the same on every
//! system: it is relative and separated by `/`. No component may lead upwards, look like one of Weft's own files, or
//! have a special meaning for some file system.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use icu_normalizer::ComposingNormalizerBorrowed;

/// The longest path, in bytes.
pub const MAX_PATH: usize = 1024;

/// The longest component, in bytes: the limit of common file systems.
pub const MAX_COMPONENT: usize = 255;

/// Prefix of Weft's own temporary files; no manifest may name such a file.
pub const OWN_PREFIX: &str = ".weft-";

/// The reason why a path is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathError {
    /// The path.
    pub path: String,
    /// The broken rule.
    pub reason: &'static str,
    /// The other path, if two paths clash.
    pub other: Option<String>,
}

impl std::error::Error for PathError {}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the path {:?} is not allowed: {}",
            self.path, self.reason
        )?;
        match &self.other {
            Some(other) => write!(f, ": {other:?}"),
            None => Ok(()),
        }
    }
}

/// Characters that have a meaning on Windows or its file systems, each with the reason why it is not allowed.
const NOT_PORTABLE: [(char, &str); 9] = [
    (
        '\\',
        "it contains the character `\\`, which separates folders on Windows",
    ),
    (
        ':',
        "it contains the character `:`, which Windows does not allow in names",
    ),
    (
        '<',
        "it contains the character `<`, which Windows does not allow in names",
    ),
    (
        '>',
        "it contains the character `>`, which Windows does not allow in names",
    ),
    (
        '"',
        "it contains the character `\"`, which Windows does not allow in names",
    ),
    (
        '|',
        "it contains the character `|`, which Windows does not allow in names",
    ),
    (
        '?',
        "it contains the character `?`, which Windows does not allow in names",
    ),
    (
        '*',
        "it contains the character `*`, which Windows does not allow in names",
    ),
    (
        '\0',
        "it contains a NUL character, which no system allows in names",
    ),
];

/// Checks one path.
///
/// # Errors
/// [`PathError`] with the broken rule.
pub fn check(path: &str) -> Result<(), PathError> {
    let refuse = |reason| {
        Err(PathError {
            path: path.chars().take(200).collect(),
            reason,
            other: None,
        })
    };
    if path.is_empty() {
        return refuse("it is empty");
    }
    if path.len() > MAX_PATH {
        return refuse("it is longer than 1024 bytes");
    }
    if path.starts_with('/') {
        return refuse("it is absolute");
    }
    for component in path.split('/') {
        if component.is_empty() {
            return refuse("it has an empty component");
        }
        if component == "." || component == ".." {
            return refuse("it contains a component `.` or `..`");
        }
        if component.len() > MAX_COMPONENT {
            return refuse("it has a component longer than 255 bytes");
        }
        if component.starts_with(OWN_PREFIX) {
            return refuse("names that begin with `.weft-` are reserved for Weft's own files");
        }
        let listed = |c: char| NOT_PORTABLE.iter().find(|(listed, _)| *listed == c);
        if let Some((_, reason)) = component.chars().find_map(listed) {
            return refuse(reason);
        }
        if component.chars().any(char::is_control) {
            return refuse("it contains a control character, such as a line break or a tab");
        }
        if component.ends_with(' ') {
            return refuse("a component ends with a space, which Windows drops");
        }
        if component.ends_with('.') {
            return refuse("a component ends with a dot, which Windows drops");
        }
        if is_device(component) {
            return refuse("a component is the name of a device on Windows");
        }
    }
    Ok(())
}

/// Returns true for names that Windows reserves for devices, with or without an extension.
fn is_device(component: &str) -> bool {
    let stem = component.split('.').next().unwrap_or(component);
    let upper = stem.to_ascii_uppercase();
    matches!(upper.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (upper.len() == 4
            && (upper.starts_with("COM") || upper.starts_with("LPT"))
            && upper.as_bytes()[3].is_ascii_digit())
}

/// Checks that all of `paths` can exist together. Each path is allowed, no two are equal when case is ignored, and no
/// path is a file where another needs a folder.
///
/// # Errors
/// [`PathError`] for the first path that breaks a rule.
pub fn check_all<'a>(paths: impl IntoIterator<Item = &'a str>) -> Result<(), PathError> {
    let mut set = PathSet::new(|text| text.to_lowercase());
    for path in paths {
        check(path)?;
        set.add(path)?;
    }
    Ok(())
}

/// Finds every path that cannot be published together with the paths before it. Applies the rules of [`check_all`]. In
/// addition, no two paths may be equal on a system such as macOS, which ignores case and how characters are composed
/// (Unicode's NFC and NFD, compatibility forms).
///
/// Stricter than the check of a manifest from a peer: such names work on the system where they were created.
pub(crate) fn unportable<'a>(paths: impl IntoIterator<Item = &'a str>) -> Vec<PathError> {
    let mut set = PathSet::new(fold);
    let errors = paths.into_iter().filter_map(|path| {
        let placed = check(path).and_then(|()| set.add(path));
        // The full path, however long: the caller compares it.
        placed.err().map(|error| PathError {
            path: path.to_owned(),
            ..error
        })
    });
    errors.collect()
}

/// Returns a form of the text in which two names are equal if some system treats them as equal: compatibility
/// composition, without case.
fn fold(text: &str) -> String {
    let normal = ComposingNormalizerBorrowed::new_nfkc();
    // Upper case first: it turns `ß` into `SS`, and both sigmas into one letter.
    let folded = normal.normalize(text).to_uppercase().to_lowercase();
    normal.normalize(&folded).into_owned()
}

/// The paths added so far, in the form in which they are compared.
struct PathSet<'a> {
    fold: fn(&str) -> String,
    files: HashMap<String, &'a str>,
    folders: HashMap<String, &'a str>,
    seen_folders: HashSet<&'a str>,
}

impl<'a> PathSet<'a> {
    fn new(fold: fn(&str) -> String) -> Self {
        Self {
            fold,
            files: HashMap::new(),
            folders: HashMap::new(),
            seen_folders: HashSet::new(),
        }
    }

    /// Adds a path. A path that is not allowed is not added.
    fn add(&mut self, path: &'a str) -> Result<(), PathError> {
        let refuse = |reason, other: &str| {
            Err(PathError {
                path: path.to_owned(),
                reason,
                other: Some(other.to_owned()),
            })
        };
        let folded = (self.fold)(path);
        if let Some(other) = self.folders.get(&folded) {
            return refuse("another path needs a folder of this name", other);
        }
        if let Some(other) = self.files.get(&folded) {
            return refuse(same(path, other, SAME_FILE), other);
        }
        let mut folders = Vec::new();
        for (at, _) in path.match_indices('/') {
            let folder = &path[..at];
            if self.seen_folders.contains(folder) {
                continue;
            }
            let folded = (self.fold)(folder);
            if let Some(other) = self.files.get(&folded) {
                return refuse(
                    "another path is a file where this one needs a folder",
                    other,
                );
            }
            if let Some(other) = self.folders.get(&folded).filter(|other| **other != folder) {
                return refuse(same(folder, other, SAME_FOLDER), other);
            }
            folders.push((folded, folder));
        }
        for (folded, folder) in folders {
            self.folders.insert(folded, folder);
            self.seen_folders.insert(folder);
        }
        self.files.insert(folded, path);
        Ok(())
    }
}

/// Reasons for rejecting a second path: equal when case is ignored, and equal only in another Unicode form.
const SAME_FILE: [&str; 2] = [
    "another path is the same when case is ignored",
    "another path is the same when composed and decomposed forms of Unicode are equal, as on macOS",
];
const SAME_FOLDER: [&str; 2] = [
    "a folder of another path is the same when case is ignored",
    "a folder of another path is the same when composed and decomposed forms of Unicode are equal, as on macOS",
];

fn same(path: &str, other: &str, reasons: [&'static str; 2]) -> &'static str {
    reasons[usize::from(path.to_lowercase() != other.to_lowercase())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_paths_pass() {
        for path in [
            "config.json",
            ".gitattributes",
            "onnx/model_quantized.onnx",
            "1_Pooling/config.json",
            "model-00001-of-00002.safetensors",
            "模型/重み.bin",
            "..hidden/...a",
        ] {
            check(path).unwrap();
        }
    }

    #[test]
    fn paths_that_lead_upwards_are_reserved_or_are_not_portable_are_refused() {
        let long = "a".repeat(256);
        let deep = "a/".repeat(600) + "b";
        for path in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/..",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "C:x",
            "c:\\x",
            "a\0b",
            "a\nb",
            "x/.weft-1.part",
            "nul",
            "a/COM1.txt",
            "a./b",
            "a /b",
            "a?",
            &long,
            &deep,
        ] {
            assert!(check(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn clashes_are_refused() {
        for (paths, ok) in [
            (&["a", "b", "c/d", "c/e"][..], true),
            (&["a", "a"], false),
            (&["a", "A"], false),
            (&["a/b", "A/c"], false),
            (&["a", "a/b"], false),
            (&["a/b", "a"], false),
            (&["a/b", "A"], false),
            (&["ÄB", "äb"], false),
        ] {
            assert_eq!(check_all(paths.iter().copied()).is_ok(), ok, "{paths:?}");
        }
    }

    #[test]
    fn an_error_names_the_character_that_is_not_allowed() {
        for (path, says) in [
            ("results_12:30:05.json", "`:`"),
            ("What is Lazy Loading?.txt", "`?`"),
            ("a|b", "`|`"),
            ("runs\\x", "`\\`"),
            ("line\nbreak", "control character"),
            ("README.", "ends with a dot"),
            ("y.txt ", "ends with a space"),
            ("aux.py", "device"),
        ] {
            let error = check(path).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn all_names_that_are_equal_on_another_system_are_found_before_publishing() {
        for (paths, refused) in [
            (&["a", "b", "c/d", "c/e"][..], 0),
            (&["caf\u{e9}.txt", "cafe\u{301}.txt"], 1),
            (&["\u{e9}/a.txt", "e\u{301}/b.txt"], 1),
            (&["README.md", "readme.md"], 1),
            (&["Unet/a", "unet/b", "UNET/c"], 2),
            (&["STRASSE.txt", "stra\u{df}e.txt"], 1),
            (&["\u{fb01}le", "file"], 1),
            (&["a:b", "c?d", "fine", "aux"], 3),
            // A path that is not allowed does not clash with later paths.
            (&["A:/x", "a/x"], 1),
            // Names that are equal on one system and not on another remain valid in manifests of peers.
            (&["\u{130}.txt", "i.txt"], 0),
        ] {
            let errors = unportable(paths.iter().copied());
            assert_eq!(errors.len(), refused, "{paths:?}: {errors:?}");
        }
        let error = &unportable(["caf\u{e9}", "cafe\u{301}"])[0];
        assert_eq!(error.other.as_deref(), Some("caf\u{e9}"));
        assert!(error.to_string().contains("composed"), "{error}");
        check_all(["caf\u{e9}", "cafe\u{301}"]).unwrap();
    }
}
