//! Paths that may stand in a manifest.
//!
//! A manifest comes from a stranger and its paths become files here, so only paths that mean the same on every system are
//! allowed: relative, `/`-separated, no component that climbs, hides our own files, or that some file system reads in another way.

use std::collections::{HashMap, HashSet};

/// The longest path, in bytes.
pub const MAX_PATH: usize = 1024;

/// The longest component, in bytes: what common file systems take.
pub const MAX_COMPONENT: usize = 255;

/// What Weft's own temporary files begin with; no manifest may name such a file.
pub const OWN_PREFIX: &str = ".weft-";

/// Why a path is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the path {path:?} is refused: {reason}")]
pub struct PathError {
    /// The path as given.
    pub path: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Checks one path.
///
/// # Errors
/// [`PathError`] with the reason.
pub fn check(path: &str) -> Result<(), PathError> {
    let refuse = |reason| {
        Err(PathError {
            path: path.chars().take(200).collect(),
            reason,
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
            return refuse("it has a component `.` or `..`");
        }
        if component.len() > MAX_COMPONENT {
            return refuse("it has a component longer than 255 bytes");
        }
        if component.starts_with(OWN_PREFIX) {
            return refuse("names that begin with `.weft-` are for Weft's own files");
        }
        if component.ends_with([' ', '.']) {
            return refuse("a component ends with a space or a dot, which some systems drop");
        }
        if component
            .chars()
            .any(|c| c.is_control() || matches!(c, '\\' | ':' | '<' | '>' | '"' | '|' | '?' | '*'))
        {
            return refuse("it has a character that some systems give a meaning");
        }
        if is_device(component) {
            return refuse("it has a component that names a device on some systems");
        }
    }
    Ok(())
}

/// Names that Windows keeps for devices, with or without an extension.
fn is_device(component: &str) -> bool {
    let stem = component.split('.').next().unwrap_or(component);
    let upper = stem.to_ascii_uppercase();
    matches!(upper.as_str(), "CON" | "PRN" | "AUX" | "NUL")
        || (upper.len() == 4
            && (upper.starts_with("COM") || upper.starts_with("LPT"))
            && upper.as_bytes()[3].is_ascii_digit())
}

/// Checks that all of `paths` can stand beside each other: each allowed, no two equal when case is ignored, none a file where
/// another needs a folder.
///
/// # Errors
/// [`PathError`] for the first path that cannot.
pub fn check_all<'a>(paths: impl IntoIterator<Item = &'a str>) -> Result<(), PathError> {
    let mut files: HashMap<String, &'a str> = HashMap::new();
    let mut folders: HashMap<String, &'a str> = HashMap::new();
    let mut seen_folders: HashSet<&'a str> = HashSet::new();
    for path in paths {
        check(path)?;
        let refuse = |reason| {
            Err(PathError {
                path: path.to_owned(),
                reason,
            })
        };
        let folded = path.to_lowercase();
        if folders.contains_key(&folded) {
            return refuse("another path needs a folder of this name");
        }
        if files.insert(folded, path).is_some() {
            return refuse("another path is the same when case is ignored");
        }
        for (at, _) in path.match_indices('/') {
            let folder = &path[..at];
            if !seen_folders.insert(folder) {
                continue;
            }
            let folded = folder.to_lowercase();
            if files.contains_key(&folded) {
                return refuse("another path is a file where this one needs a folder");
            }
            if folders
                .insert(folded, folder)
                .is_some_and(|other| other != folder)
            {
                return refuse("a folder of another path is the same when case is ignored");
            }
        }
    }
    Ok(())
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
    fn paths_that_climb_hide_or_mean_something_else_are_refused() {
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
}
