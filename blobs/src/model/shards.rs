//! The index file of a model that is split into several files: it maps each tensor to its file.
//!
//! The format is that of the Hugging Face libraries: a JSON object with two fields. `weight_map` maps each tensor to a
//! file name relative to the index file's folder. `metadata` contains `total_size`, the size of all tensors in bytes
//! (<https://huggingface.co/docs/safetensors/index#sharded-checkpoints> and `save_pretrained` of Transformers). The
//! file is called `model.safetensors.index.json` or similar. Like all content, it comes from a stranger.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value, json};

use crate::{
    Manifest,
    extract::shown,
    manifest::{MAX_FILES, MAX_TENSORS},
    path::{self, PathError},
    selection::{Selected, Wanted},
};

/// The longest index file read, in bytes: 64 bytes for each of a million tensors.
pub const MAX_INDEX: usize = 64 * 1024 * 1024;

/// The most JSON values beside the `weight_map`. Index files have one or two. A hostile one could have thirty million,
/// which take two gigabytes as values.
pub const MAX_VALUES: usize = 10_000;

/// Suffix of index files.
const SUFFIX: &str = ".safetensors.index.json";

/// The reason why bytes are not a valid index file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// The index file is longer than [`MAX_INDEX`].
    #[error("the index has {0} bytes; the limit is {MAX_INDEX}")]
    TooLarge(usize),
    /// The index file is not JSON of the format, or exceeds [`MAX_TENSORS`], [`MAX_FILES`] or [`MAX_VALUES`].
    #[error("the index is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The index file names a file whose path is not allowed.
    #[error("the index names a file that is not allowed: {0}")]
    Path(#[from] PathError),
}

/// Returns the tensors of each file that an index file names, by file name relative to the index file's folder.
///
/// # Errors
/// [`ShardError`] if `index` is not a valid index file, or names a file outside its folder.
pub fn shards(index: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>, ShardError> {
    let weights = Index::parse(index)?.weights;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for name in &weights.files {
        shards.insert(name.clone(), BTreeSet::new());
    }
    for (tensor, file) in weights.tensors {
        if let Some(tensors) = shards.get_mut(&weights.files[file]) {
            tensors.insert(tensor);
        }
    }
    Ok(shards)
}

/// Returns the manifest's index files that cover files of which only some tensors are wanted. Each is to be replaced by
/// the result of [`reduce`], so that the selection can be loaded. The index files themselves may be wanted or not.
pub fn indices(manifest: &Manifest, selected: &Selected) -> Vec<usize> {
    let files = manifest.files();
    // An index file names files in its own folder and in the folders below.
    let folders: HashSet<&str> = selected
        .files()
        .iter()
        .filter(|file| matches!(file.wanted, Wanted::Tensors { .. }))
        .flat_map(|file| {
            let path = &files[file.file].path;
            let ends = path.match_indices('/').map(|(at, _)| at + 1);
            std::iter::once(0).chain(ends).map(|end| &path[..end])
        })
        .collect();
    (0..files.len())
        .filter(|file| {
            let path = &files[*file].path;
            path.ends_with(SUFFIX) && folders.contains(folder(path))
        })
        .collect()
}

/// Reduces the index file at `path` in the manifest to the wanted tensors, and sets `total_size` to their size. All
/// other fields are kept, including any that count all tensors under another name. Returns `None` if the index file
/// names no wanted tensor.
///
/// The manifest decides which tensors a file has; other claims of the index file are dropped.
///
/// # Errors
/// [`ShardError`] if `index` is not a valid index file.
pub fn reduce(
    index: &[u8],
    path: &str,
    manifest: &Manifest,
    selected: &Selected,
) -> Result<Option<Vec<u8>>, ShardError> {
    let Index {
        weights,
        metadata,
        mut rest,
    } = Index::parse(index)?;
    let wanted: Vec<HashMap<&str, u64>> = weights
        .files
        .iter()
        .map(|name| wanted_sizes(&format!("{}{name}", folder(path)), manifest, selected))
        .collect();
    let mut weight_map = Map::new();
    let mut total_size: u64 = 0;
    for (tensor, file) in weights.tensors {
        if let Some(bytes) = wanted[file].get(tensor.as_str()) {
            // The tensors of a hostile manifest may overlap, and add up to more than their files.
            total_size = total_size.saturating_add(*bytes);
            weight_map.insert(tensor, Value::from(weights.files[file].as_str()));
        }
    }
    if weight_map.is_empty() {
        return Ok(None);
    }
    let mut metadata = metadata.unwrap_or_default();
    metadata.insert("total_size".to_owned(), json!(total_size));
    rest.insert("metadata".to_owned(), Value::Object(metadata));
    rest.insert("weight_map".to_owned(), Value::Object(weight_map));
    let mut bytes = serde_json::to_vec_pretty(&rest)?;
    bytes.push(b'\n');
    Ok(Some(bytes))
}

/// Returns the part of a path before its last component, including the `/`.
fn folder(path: &str) -> &str {
    &path[..path.rfind('/').map_or(0, |at| at + 1)]
}

/// Returns the sizes, in bytes, of the wanted tensors in the manifest's file at `path`, by name.
fn wanted_sizes<'a>(
    path: &str,
    manifest: &'a Manifest,
    selected: &Selected,
) -> HashMap<&'a str, u64> {
    let files = manifest.files();
    let Ok(at) = files.binary_search_by(|file| file.path.as_str().cmp(path)) else {
        return HashMap::new();
    };
    let tensors = &files[at].tensors;
    let size = |index: usize| {
        let tensor = &tensors[index];
        (tensor.name.as_str(), tensor.end - tensor.start)
    };
    match selected.get(at).map(|file| &file.wanted) {
        None => HashMap::new(),
        Some(Wanted::Whole) => (0..tensors.len()).map(size).collect(),
        Some(Wanted::Tensors {
            tensors: chosen, ..
        }) => chosen.iter().copied().map(size).collect(),
    }
}

/// A checked index file.
struct Index {
    weights: Weights,
    metadata: Option<Map<String, Value>>,
    /// Fields that are not part of the format.
    rest: BTreeMap<String, Value>,
}

/// The `weight_map`, with each file name stored once.
#[derive(Default)]
struct Weights {
    /// For each tensor, the position of its file in `files`.
    tensors: BTreeMap<String, usize>,
    files: Vec<String>,
}

impl Index {
    fn parse(bytes: &[u8]) -> Result<Self, ShardError> {
        if bytes.len() > MAX_INDEX {
            return Err(ShardError::TooLarge(bytes.len()));
        }
        let index: Self = serde_json::from_slice(bytes)?;
        for name in &index.weights.files {
            path::check(name)?;
        }
        Ok(index)
    }
}

impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IndexVisitor;
        impl<'de> Visitor<'de> for IndexVisitor {
            type Value = Index;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with a `weight_map`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let mut weights = None;
                let mut others = BTreeMap::new();
                let mut budget = MAX_VALUES;
                while let Some(key) = map.next_key::<String>()? {
                    let is_second = if key == "weight_map" {
                        weights.replace(map.next_value::<Weights>()?).is_some()
                    } else {
                        let value = map.next_value_seed(Budget(&mut budget))?;
                        others.insert(key.clone(), value).is_some()
                    };
                    if is_second {
                        return Err(duplicate(&key));
                    }
                }
                let metadata = match others.remove("metadata") {
                    None | Some(Value::Null) => None,
                    Some(Value::Object(metadata)) => Some(metadata),
                    Some(_) => return Err(de::Error::custom("its `metadata` is not an object")),
                };
                Ok(Index {
                    weights: weights.ok_or_else(|| de::Error::missing_field("weight_map"))?,
                    metadata,
                    rest: others,
                })
            }
        }
        deserializer.deserialize_map(IndexVisitor)
    }
}

fn duplicate<E: de::Error>(key: &str) -> E {
    E::custom(format_args!("{:?} occurs twice", shown(key)))
}

impl<'de> Deserialize<'de> for Weights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WeightsVisitor;
        impl<'de> Visitor<'de> for WeightsVisitor {
            type Value = Weights;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(
                    f,
                    "an object of at most {MAX_TENSORS} tensors in {MAX_FILES} files"
                )
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Weights, A::Error> {
                let mut weights = Weights::default();
                let mut indices: HashMap<String, usize> = HashMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    if weights.tensors.len() == MAX_TENSORS {
                        return Err(de::Error::invalid_length(MAX_TENSORS + 1, &self));
                    }
                    let index = match indices.get(&file) {
                        Some(index) => *index,
                        None if indices.len() == MAX_FILES => {
                            return Err(de::Error::invalid_length(MAX_FILES + 1, &self));
                        }
                        None => {
                            weights.files.push(file.clone());
                            indices.insert(file, weights.files.len() - 1);
                            weights.files.len() - 1
                        }
                    };
                    // A tensor that is listed in two files could be in either.
                    if weights.tensors.contains_key(&tensor) {
                        return Err(duplicate(&tensor));
                    }
                    weights.tensors.insert(tensor, index);
                }
                Ok(weights)
            }
        }
        deserializer.deserialize_map(WeightsVisitor)
    }
}

/// Reads a JSON value, and subtracts the number of values in it from a budget. The nesting depth is bounded by
/// `serde_json`.
struct Budget<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Budget<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        match self.0.checked_sub(1) {
            Some(left) => *self.0 = left,
            None => {
                return Err(de::Error::custom(format_args!(
                    "it has more than {MAX_VALUES} values beside its `weight_map`"
                )));
            }
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Budget<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(Budget(&mut *self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Budget(&mut *self.0))?;
            values.insert(key, value);
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Hash, Selection,
        manifest::{self, Tensor},
        testing::Random,
    };

    const INDEX: &str = r#"{
        "metadata": {"total_size": 999, "format": "pt", "x": [1, {"y": null}, -2.5, true]},
        "weight_map": {
            "a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors", "only.here": "m-2.safetensors"
        },
        "more": "kept"
    }"#;

    fn file(path: &str, tensors: &[(&str, u64, u64)]) -> manifest::File {
        manifest::File {
            path: path.to_owned(),
            size: 1000,
            blake3: Hash::of(path.as_bytes()),
            sha256: [0; 32],
            tensors: tensors
                .iter()
                .map(|(name, start, end)| Tensor {
                    name: (*name).to_owned(),
                    dtype: "U8".to_owned(),
                    shape: vec![end - start],
                    start: *start,
                    end: *end,
                    blake3: Hash::of(format!("{path} {name} {start} {end}").as_bytes()),
                })
                .collect(),
        }
    }

    fn model() -> Manifest {
        Manifest::new(vec![
            file("unet/m-1.safetensors", &[("a", 100, 300), ("b", 300, 1000)]),
            file("unet/m-2.safetensors", &[("c", 100, 1000)]),
            file("unet/m.safetensors.index.json", &[]),
            file("vae/m.safetensors", &[("a", 100, 1000)]),
            file("vae/m.safetensors.index.json", &[]),
            file("m.safetensors.index.json", &[]),
            file("unet/config.json", &[]),
        ])
        .unwrap()
    }

    fn select(files: &[&str], tensors: &[&str]) -> Selected {
        let parse = |patterns: &[&str]| patterns.iter().map(|p| p.parse().unwrap()).collect();
        Selection {
            files: parse(files),
            tensors: parse(tensors),
        }
        .select(&model())
        .unwrap()
    }

    fn reduced(selected: &Selected) -> Option<Value> {
        let bytes = reduce(
            INDEX.as_bytes(),
            "unet/m.safetensors.index.json",
            &model(),
            selected,
        )
        .unwrap()?;
        Some(serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn an_index_file_maps_tensors_to_files() {
        let shards = shards(INDEX.as_bytes()).unwrap();
        let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        assert_eq!(
            shards,
            BTreeMap::from([
                ("m-1.safetensors".to_owned(), set(&["a", "b"])),
                ("m-2.safetensors".to_owned(), set(&["c", "only.here"])),
            ])
        );
    }

    #[test]
    fn a_reduced_index_file_has_the_wanted_tensors_their_size_and_all_other_fields() {
        let expected = json!({
            "metadata": {"total_size": 700, "format": "pt", "x": [1, {"y": null}, -2.5, true]},
            "weight_map": {"b": "m-1.safetensors"},
            "more": "kept",
        });
        assert_eq!(reduced(&select(&[], &["b"])), Some(expected));
        let index = reduced(&select(&["m-2.*"], &["a"])).unwrap();
        assert_eq!(
            index["weight_map"],
            json!({"a": "m-1.safetensors", "c": "m-2.safetensors"})
        );
        assert_eq!(index["metadata"]["total_size"], 1100);
        assert_eq!(reduced(&select(&["vae/*"], &[])), None);
        let bare = br#"{"weight_map": {"a": "m-1.safetensors"}}"#;
        let bytes = reduce(bare, "unet/x", &model(), &select(&[], &["a"])).unwrap();
        assert_eq!(
            String::from_utf8(bytes.unwrap()).unwrap(),
            "{\n  \"metadata\": {\n    \"total_size\": 200\n  },\n  \
             \"weight_map\": {\n    \"a\": \"m-1.safetensors\"\n  }\n}\n"
        );
    }

    #[test]
    fn the_index_files_to_reduce_are_those_above_files_with_chosen_tensors() {
        let model = model();
        let paths = |selected: &Selected| -> Vec<_> {
            indices(&model, selected)
                .into_iter()
                .map(|file| model.files()[file].path.clone())
                .collect()
        };
        assert_eq!(
            paths(&select(&[], &["b"])),
            ["m.safetensors.index.json", "unet/m.safetensors.index.json"]
        );
        assert_eq!(paths(&select(&[], &["a"])).len(), 3);
        assert!(paths(&select(&["m-1*"], &[])).is_empty());
        assert!(paths(&Selection::default().select(&model).unwrap()).is_empty());
    }

    #[test]
    fn hostile_index_files_are_errors() {
        let values = |n: usize| {
            format!(
                r#"{{"weight_map":{{}},"metadata":{{"x":[{}]}}}}"#,
                vec!["0"; n].join(",")
            )
        };
        // The array and the object around the numbers also count.
        assert!(shards(values(MAX_VALUES - 2).as_bytes()).is_ok());
        for bad in [
            "",
            "[]",
            "null",
            "{}",
            r#"{"weight_map":[]}"#,
            r#"{"weight_map":{"a":1}}"#,
            r#"{"weight_map":{"a":"x","a":"y"}}"#,
            r#"{"weight_map":{},"weight_map":{}}"#,
            r#"{"weight_map":{},"metadata":{},"metadata":{}}"#,
            r#"{"weight_map":{},"metadata":[]}"#,
            r#"{"weight_map":{}} x"#,
            &values(MAX_VALUES - 1),
            &format!(r#"{{"weight_map":{{}},"x":{}"#, "[".repeat(100_000)),
            &format!(r#"{{"weight_map":{}"#, "[".repeat(100_000)),
        ] {
            assert!(
                matches!(shards(bad.as_bytes()), Err(ShardError::Malformed(_))),
                "{bad:.100}"
            );
        }
        for name in ["", "/etc/passwd", "../x", "a/../../x", "C:\\\\x", ".weft-x"] {
            let index = format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#);
            assert!(
                matches!(shards(index.as_bytes()), Err(ShardError::Path(_))),
                "{name}"
            );
        }
        assert!(matches!(
            shards(&vec![b' '; MAX_INDEX + 1]),
            Err(ShardError::TooLarge(_))
        ));
        let many: Vec<String> = (0..=MAX_FILES)
            .map(|i| format!(r#""{i}":"f{i}""#))
            .collect();
        let index = format!(r#"{{"weight_map":{{{}}}}}"#, many.join(","));
        assert!(matches!(
            shards(index.as_bytes()),
            Err(ShardError::Malformed(_))
        ));
    }

    #[test]
    fn mutated_index_files_never_make_reducing_panic() {
        let mut random = Random(1);
        let (model, selected) = (model(), select(&[], &["a", "c"]));
        for _ in 0..20_000 {
            let mut index = INDEX.as_bytes().to_vec();
            for _ in 0..=random.below(3) {
                let at = random.below(index.len());
                index[at] = random.below(256) as u8;
            }
            if let Ok(Some(bytes)) = reduce(&index, "unet/i", &model, &selected) {
                assert!(shards(&bytes).is_ok());
            }
        }
    }
}
