//! Chooses the file names of blobs in the Hugging Face cache: the ETags that the hub sends for the files.
//!
//! A file that the hub keeps in Git LFS is named by the SHA-256 of its content. Any other file is named by the id of
//! its git blob, a SHA-1. The hub decides which applies when a file is uploaded. Weft does not contact the hub, so
//! this module predicts the hub's choice from the file's name and size. A wrong prediction is harmless: readers reach
//! blobs through the snapshot's links.

use std::fmt;

use sha1::{Digest, Sha1};

use super::name::hex;
use crate::manifest::File;

/// Size in bytes above which a file is in Git LFS whatever its name: the hub accepts no larger files into git.
pub const LFS_SIZE: u64 = 10 * 1024 * 1024;

/// Endings of files that are in Git LFS whatever their size.
///
/// The first are those in the `.gitattributes` that the hub gives to a new model repository, with its predecessor's
/// `zstandard`. The endings of llama.cpp's formats are not in it; all but toy files of these formats are larger than
/// [`LFS_SIZE`].
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

/// Parts of names of files in Git LFS, from the same source: `*.lfs.*`, `*.tar.*`, `*tfevents*`.
const LFS_PARTS: &[&str] = &[".lfs.", ".tar.", "tfevents"];

/// The folder whose files are all in Git LFS, from the same source: `saved_model/**/*`.
const LFS_FOLDER: &str = "saved_model/";

/// The name of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Etag {
    /// The SHA-256 of the content, for a file in Git LFS.
    Sha256([u8; 32]),
    /// The SHA-1 of the content as a git blob, for any other file.
    GitBlob([u8; 20]),
}

impl Etag {
    /// Returns the name of the blob of `file`, if the name is known without the content.
    pub fn known(file: &File) -> Option<Self> {
        is_lfs(&file.path, file.size).then_some(Self::Sha256(file.sha256))
    }

    /// Returns the name of the blob of `content`, for a file that is not in Git LFS.
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

/// Returns true if the hub would keep a file in Git LFS, by its path in the repository and its size in bytes.
pub fn is_lfs(path: &str, size: u64) -> bool {
    if size == 0 {
        // Git LFS does not store empty files.
        return false;
    }
    let name = path.rsplit('/').next().unwrap_or(path);
    // Git compares case-sensitively, and counts a bare `.bin` as an ending.
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
        // Ids printed by `git hash-object`.
        for (content, id) in [
            ("", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
            ("hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        ] {
            assert_eq!(Etag::git_blob(content.as_bytes()).to_string(), id);
        }
    }
}
