//! A real model, and the Python environment that was installed with it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Returns the folder of a real model with a `model.safetensors` of 90 MB, installed by `tests/run`.
///
/// # Panics
/// If `tests/run` has not installed it.
pub fn real_model() -> PathBuf {
    let path = env::var_os("WEFT_TEST_MODEL").map(PathBuf::from);
    match path {
        Some(path) if path.join("model.safetensors").is_file() => path,
        _ => panic!(
            "WEFT_TEST_MODEL names no folder with a model.safetensors: run tests/run, which installs one"
        ),
    }
}

/// Returns Python with the packages that the tests use, installed by `tests/run`.
///
/// # Panics
/// If `tests/run` has not installed it.
pub fn python() -> Command {
    match env::var_os("WEFT_TEST_PYTHON") {
        Some(path) => Command::new(path),
        None => panic!("WEFT_TEST_PYTHON is not set: run tests/run, which installs an environment"),
    }
}

/// Checks that two folders have the same files with the same bytes, and that `got` has no other files.
///
/// # Panics
/// At the first difference.
pub fn same_files(want: &Path, got: &Path) {
    let (want_names, got_names) = (names(want, want), names(got, got));
    assert_eq!(want_names, got_names);
    for name in want_names {
        let read = |folder: &Path| {
            fs::read(folder.join(&name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        assert!(read(want) == read(got), "{name} differs");
    }
}

/// Returns the files below `folder`, relative to `root`, sorted.
fn names(root: &Path, folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}")) {
        let path = entry.expect("a folder can be listed").path();
        if path.is_dir() {
            found.extend(names(root, &path));
        } else {
            let relative = path.strip_prefix(root).expect("the path is below the root");
            found.push(relative.display().to_string());
        }
    }
    found.sort();
    found
}
