//! What a blob in the cache is called: by the ETag that the hub sends for it.
//!
//! For a file that the hub keeps in Git LFS it is the SHA-256 of the content, for another the id of its git blob, a SHA-1.
//! Which of the two a file is, the hub decides when it is uploaded; without the hub this is a guess by its rules. A wrong
//! guess costs nothing but another name: who reads a cache follows the links.

use std::fmt;

use sha1::{Digest, Sha1};

use super::name::hex;
use crate::manifest::File;

/// A file over this many bytes is in Git LFS whatever it is called: the hub takes no larger ones into git.
pub const LFS_SIZE: u64 = 10 * 1024 * 1024;

/// Endings of files that are in Git LFS whatever their size.
///
/// The first are those of the `.gitattributes` that the hub gives to a new repository of a model, and its predecessor's
/// `zstandard`. Those of llama.cpp's formats are not there; their files are over [`LFS_SIZE`] but for toys.
const LFS_ENDINGS: &[&str] = &[
    "7z",
    "arrow",
    "bin",
    "bz2",
    "ckpt",
    "ftz",
    "gz",
    "h5",
    "joblib",
    "mlmodel",
    "model",
    "msgpack",
    "npy",
    "npz",
    "onnx",
    "ot",
    "parquet",
    "pb",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "rar",
    "safetensors",
    "tar",
    "tflite",
    "tgz",
    "wasm",
    "xz",
    "zip",
    "zst",
    "zstandard",
    "ggml",
    "gguf",
];

/// What may stand anywhere in the name of a file in Git LFS, from the same source: `*.lfs.*`, `*.tar.*`, `*tfevents*`.
const LFS_PARTS: &[&str] = &[".lfs.", ".tar.", "tfevents"];

/// The folder whose files are all in Git LFS, from the same source: `saved_model/**/*`.
const LFS_FOLDER: &str = "saved_model/";

/// The name of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Etag {
    /// The SHA-256 of the content: of a file in Git LFS.
    Sha256([u8; 32]),
    /// The SHA-1 of the content as a git blob: of any other.
    GitBlob([u8; 20]),
}

impl Etag {
    /// The name of `file`'s blob if it is known without the content.
    pub fn known(file: &File) -> Option<Self> {
        is_lfs(&file.path, file.size).then_some(Self::Sha256(file.sha256))
    }

    /// The name of a blob of `content` that is not in Git LFS.
    pub fn git_blob(content: &[u8]) -> Self {
        let mut hasher = Sha1::new();
        hasher.update(format!("blob {}\0", content.len()));
        hasher.update(content);
        Self::GitBlob(hasher.finalize().into())
    }
}

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&match self {
            Self::Sha256(bytes) => hex(bytes),
            Self::GitBlob(bytes) => hex(bytes),
        })
    }
}

/// Whether the hub would hold a file in Git LFS: by its path in the repository and its size in bytes.
pub fn is_lfs(path: &str, size: u64) -> bool {
    if size == 0 {
        // Git LFS leaves empty files alone.
        return false;
    }
    let name = path.rsplit('/').next().unwrap_or(path);
    // As git matches: case counts, and a bare `.bin` has an ending too.
    let ending = name.rsplit_once('.').map(|(_, ending)| ending);
    size > LFS_SIZE
        || ending.is_some_and(|ending| LFS_ENDINGS.contains(&ending))
        || LFS_PARTS.iter().any(|part| name.contains(part))
        || path.starts_with(LFS_FOLDER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_models_are_where_the_hub_keeps_them() {
        for path in [
            "model.safetensors",
            "pytorch_model.bin",
            "sub/tokenizer.model",
            "x.Q4_K_M.gguf",
            "a.tar.gz",
            "a.tar.001",
            "x.lfs.json",
            "logs/events.out.tfevents.1",
            "saved_model/1/variables.txt",
        ] {
            assert!(is_lfs(path, 1), "{path}");
            assert!(!is_lfs(path, 0), "{path}");
        }
        for path in [
            "config.json",
            "README.md",
            ".gitattributes",
            "MODEL.BIN",
            "bin",
            "x.bin/config.json",
            "sub/saved_model/x.txt",
            "model.safetensors.index.json",
        ] {
            assert!(!is_lfs(path, LFS_SIZE), "{path}");
            assert!(is_lfs(path, LFS_SIZE + 1), "{path}");
        }
    }

    #[test]
    fn a_git_blob_has_the_id_that_git_gives_it() {
        // `git hash-object`.
        for (content, id) in [
            ("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            ("hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        ] {
            assert_eq!(Etag::git_blob(content.as_bytes()).to_string(), id);
        }
    }
}
