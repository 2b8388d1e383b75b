//! What the fuzzers share: a model to begin with, and the first inputs that they vary.

use std::{fs, path::Path, sync::Arc};

use weft_blobs::{
    Manifest, Store,
    index::{self, index},
};

/// A safetensors header with its length, and what tensors it describes.
pub const SAFETENSORS: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;

/// The bytes of [`SAFETENSORS`] as a file begins with them.
pub fn safetensors() -> Vec<u8> {
    let length = (SAFETENSORS.len() as u64).to_le_bytes();
    [&length, SAFETENSORS.as_bytes()].concat()
}

/// Writes first inputs into the folder that `WEFT_FUZZ_CORPUS` names.
///
/// # Panics
/// If the folder cannot be written to.
pub fn seed(inputs: &[&[u8]]) {
    let Some(folder) = std::env::var_os("WEFT_FUZZ_CORPUS") else {
        return;
    };
    for (number, input) in inputs.iter().enumerate() {
        let path = Path::new(&folder).join(format!("seed-{number}"));
        fs::write(path, input).expect("the corpus can be written to");
    }
}

/// A model of two files in a store of its own, for as long as the process lives.
#[derive(Debug)]
pub struct World {
    _home: tempfile::TempDir,
    /// Where it is.
    pub store: Store,
    /// What it is made of.
    pub manifest: Arc<Manifest>,
}

impl World {
    /// Makes it.
    ///
    /// # Panics
    /// If the folder for temporary files cannot be written to.
    pub fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary folder");
        let source = home.path().join("source");
        fs::create_dir_all(source.join("sub")).expect("a folder");
        let tensors = [safetensors(), vec![7; 12]].concat();
        fs::write(source.join("model.safetensors"), tensors).expect("a file");
        fs::write(source.join("sub/big.bin"), vec![3; 300_000]).expect("a file");
        let indexed = index(&source, &index::Progress::default()).expect("a model");
        let store = Store::open(&home.path().join("store")).expect("a store");
        store.add(&indexed, None).expect("it can be added");
        Self {
            _home: home,
            store,
            manifest: Arc::new(indexed.manifest),
        }
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
