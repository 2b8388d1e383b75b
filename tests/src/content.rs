//! Generated models: incompressible bytes in the file formats that Weft knows.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::json;

/// Returns incompressible bytes. The same seed gives the same bytes.
pub fn noise(seed: &str, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut hasher = blake3::Hasher::new();
    hasher.update(seed.as_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Returns a safetensors file of byte tensors, in this order.
///
/// # Panics
/// Never: the header is JSON.
pub fn safetensors(tensors: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut at = 0;
    for (name, bytes) in tensors {
        let entry = json!({
            "dtype": "U8", "shape": [bytes.len()], "data_offsets": [at, at + bytes.len()],
        });
        header.insert((*name).to_owned(), entry);
        at += bytes.len();
    }
    let mut header = serde_json::to_vec(&header).expect("JSON can be written");
    while !header.len().is_multiple_of(8) {
        header.push(b' ');
    }
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    for (_, bytes) in tensors {
        file.extend(bytes);
    }
    file
}

/// Creates the folder of a model of `size` bytes: a `weights.bin` of noise and a `config.json` of 1,000 bytes.
///
/// # Panics
/// If the folder exists, or cannot be made.
pub fn opaque_model(folder: PathBuf, seed: &str, size: usize) -> PathBuf {
    let bytes = noise(seed, size);
    made(
        folder,
        &[
            ("weights.bin", &bytes[1000..]),
            ("config.json", &bytes[..1000]),
        ],
    )
}

/// Creates the folder of a model whose only file is a `config.json` with this content.
///
/// # Panics
/// If the folder exists, or cannot be made.
pub fn tiny_model(folder: PathBuf, content: &str) -> PathBuf {
    made(folder, &[("config.json", content.as_bytes())])
}

/// Creates the folder of a model of three safetensors files, with `size` bytes of tensors together.
///
/// # Panics
/// If the folder exists, or cannot be made.
pub fn split_model(folder: PathBuf, size: usize) -> PathBuf {
    let bytes = noise("split", size);
    let files: Vec<_> = bytes
        .chunks(size.div_ceil(3))
        .enumerate()
        .map(|(i, part)| {
            let file = safetensors(&[(&format!("tensor{i}"), part.to_vec())]);
            (format!("{i}.safetensors"), file)
        })
        .collect();
    let files: Vec<_> = files
        .iter()
        .map(|(name, file)| (&**name, &**file))
        .collect();
    made(folder, &files)
}

/// Size of each layer's weight in [`sharded_model`], in bytes.
pub const LAYER: usize = 900_000;

/// Creates the folder of a sharded model: four layers in two files, an index, and a configuration.
///
/// A tensor is [`noise`] with its name as the seed.
///
/// # Panics
/// If the folder exists, or cannot be made.
pub fn sharded_model(folder: PathBuf) -> PathBuf {
    let mut map = serde_json::Map::new();
    let mut shards = Vec::new();
    for shard in 0..2 {
        let name = format!("model-{}-of-2.safetensors", shard + 1);
        let names: Vec<_> = (0..2)
            .map(|i| shard * 2 + i)
            .flat_map(|layer| ["weight", "norm"].map(|of| format!("model.layers.{layer}.{of}")))
            .collect();
        let tensors: Vec<_> = names
            .iter()
            .map(|tensor| {
                map.insert(tensor.clone(), name.clone().into());
                let size = if tensor.ends_with("weight") {
                    LAYER
                } else {
                    1000
                };
                (tensor.as_str(), noise(tensor, size))
            })
            .collect();
        shards.push((name, safetensors(&tensors)));
    }
    let index = json!({"metadata": {"total_size": 4 * LAYER + 4000}, "weight_map": map});
    let index = index.to_string();
    let mut files: Vec<(&str, &[u8])> = shards
        .iter()
        .map(|(name, file)| (&**name, &**file))
        .collect();
    files.push(("model.safetensors.index.json", index.as_bytes()));
    files.push(("config.json", b"{\"layers\": 4}"));
    made(folder, &files)
}

fn made(folder: PathBuf, files: &[(&str, &[u8])]) -> PathBuf {
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent).expect("folders can be made");
    }
    fs::create_dir(&folder).expect("the folder can be made");
    for (name, content) in files {
        fs::write(folder.join(name), content).expect("files can be written");
    }
    folder
}

/// Returns the tensors of a safetensors file, by name.
///
/// # Panics
/// If the file is not a safetensors file.
pub fn tensors(file: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(file).expect("the file can be read");
    let (length, rest) = bytes.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(header).expect("a header");
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, entry)| {
            let at = |i: usize| entry["data_offsets"][i].as_u64().expect("an offset") as usize;
            (name, data[at(0)..at(1)].to_vec())
        })
        .collect()
}
