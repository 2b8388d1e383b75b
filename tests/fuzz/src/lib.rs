//! Parts that the fuzzers share: a model, and the first inputs that they vary.

use std::{fs, path::Path, sync::Arc};

use weft_blobs::{
    Manifest, Store,
    index::{self, index},
};

/// A safetensors header, without its length.
pub const SAFETENSORS: &str = concat!(
    r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
    r#""b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#
);

/// Returns [`SAFETENSORS`] as at the start of a file, with its length.
pub fn safetensors() -> Vec<u8> {
    let length = (SAFETENSORS.len() as u64).to_le_bytes();
    [&length, SAFETENSORS.as_bytes()].concat()
}

/// Writes the first inputs into the folder named by `WEFT_FUZZ_CORPUS`.
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

/// A model of two files in a store of its own, which exists as long as the process.
#[derive(Debug)]
pub struct World {
    _home: tempfile::TempDir,
    /// The store that holds the model.
    pub store: Store,
    /// The model's manifest.
    pub manifest: Arc<Manifest>,
}

impl World {
    /// Creates the model.
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
        store.add(&indexed, None).expect("the model can be added");
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
