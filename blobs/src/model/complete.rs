//! Finds files that a model refers to but does not have.
//!
//! A model may consist of several files. An index file names them, or their names count them, as in
//! `model-00001-of-00003.safetensors`. A user who publishes the model, or is about to use it, needs to know if a file
//! is missing. A missing file is reported and not an error: complete models with an outdated index file are common.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::{
    Manifest,
    index::counted,
    manifest,
    shards::{MAX_INDEX, shards},
};

/// Suffixes of index files: those of safetensors and of PyTorch.
const INDEX: [&str; 2] = [".safetensors.index.json", ".bin.index.json"];

/// Suffixes of files that are numbered in their names.
const COUNTED: [&str; 3] = [".safetensors", ".gguf", ".bin"];

/// The most names listed in a note; further names are only counted.
const SHOWN: usize = 5;

/// The most notes returned. A hostile manifest could have fifty thousand index files.
const MAX_NOTES: usize = 100;

/// The most index files read for a model. Real models have one, or one for each component.
const MAX_INDICES: usize = 16;

/// The most files of a split model. The largest published models have some hundreds.
const MAX_SPLIT: u32 = 10_000;

/// Describes the files that `manifest` lacks, as text with one entry for each index file or set of numbered files.
/// `read` returns the content of a file, if the file is here. It is called only for index files of at most
/// [`MAX_INDEX`] bytes.
pub fn lacking(
    manifest: &Manifest,
    mut read: impl FnMut(&manifest::File) -> Option<Vec<u8>>,
) -> Vec<String> {
    let files: BTreeMap<&str, &manifest::File> = manifest
        .files()
        .iter()
        .map(|file| (file.path.as_str(), file))
        .collect();
    let mut notes = Vec::new();
    let mut named = HashSet::new();
    let indices = manifest.files().iter().filter(|file| {
        let is_index = INDEX.iter().any(|ending| file.path.ends_with(ending));
        is_index && file.size <= MAX_INDEX as u64
    });
    for index in indices.take(MAX_INDICES) {
        let Some(content) = read(index) else {
            continue;
        };
        let shards = match shards(&content) {
            Ok(shards) => shards,
            Err(error) => {
                notes.push(format!("{}: {error}", index.path));
                continue;
            }
        };
        let folder = &index.path[..index.path.rfind('/').map_or(0, |at| at + 1)];
        let mut missing = Vec::new();
        let mut misplaced = 0;
        for (name, tensors) in &shards {
            let path = format!("{folder}{name}");
            match files.get(path.as_str()) {
                None => missing.push(path),
                Some(file) if !file.tensors.is_empty() => {
                    let has: HashSet<_> = file.tensors.iter().map(|one| &*one.name).collect();
                    misplaced += tensors.iter().filter(|one| !has.contains(&***one)).count();
                }
                Some(_) => {}
            }
        }
        if !missing.is_empty() {
            let names = missing.len();
            notes.push(format!(
                "{} names {} that the model does not have: {}",
                index.path,
                counted(names, "file"),
                listed(&missing),
            ));
        }
        if misplaced > 0 {
            notes.push(format!(
                "{} names {} in files that do not have them",
                index.path,
                counted(misplaced, "tensor"),
            ));
        }
        named.extend(missing);
    }
    for (set, numbers) in split(manifest) {
        if notes.len() >= MAX_NOTES {
            break;
        }
        let all = (1..=set.of).filter(|number| !numbers.contains(number));
        let missing: Vec<String> = all.map(|number| set.name(number)).collect();
        // Already reported by an index file.
        if missing.is_empty() || missing.iter().all(|path| named.contains(path)) {
            continue;
        }
        notes.push(format!(
            "{} of {} files of {} are here; missing: {}",
            numbers.len(),
            set.of,
            set.name(0).replacen(&set.number(0), "*", 1),
            listed(&missing),
        ));
    }
    notes
}

fn listed(paths: &[String]) -> String {
    let more = paths.len().saturating_sub(SHOWN);
    let mut text = paths[..paths.len() - more].join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

/// A set of numbered files: `before-<number>-of-<written><ending>`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Split<'a> {
    before: &'a str,
    digits: usize,
    of: u32,
    /// The total, as spelled in the names.
    written: &'a str,
    ending: &'static str,
}

impl Split<'_> {
    fn number(&self, number: u32) -> String {
        format!("{number:0digits$}", digits = self.digits)
    }

    fn name(&self, number: u32) -> String {
        let number = self.number(number);
        format!(
            "{}-{number}-of-{}{}",
            self.before, self.written, self.ending
        )
    }
}

fn split(manifest: &Manifest) -> BTreeMap<Split<'_>, BTreeSet<u32>> {
    let mut sets: BTreeMap<Split<'_>, BTreeSet<u32>> = BTreeMap::new();
    for file in manifest.files() {
        if let Some((set, number)) = numbered(&file.path) {
            sets.entry(set).or_default().insert(number);
        }
    }
    sets
}

/// Parses a name such as `before-00001-of-00003.ending`.
fn numbered(path: &str) -> Option<(Split<'_>, u32)> {
    let ending = *COUNTED.iter().find(|ending| path.ends_with(**ending))?;
    let (rest, written) = path.strip_suffix(ending)?.rsplit_once("-of-")?;
    let (before, number) = rest.rsplit_once('-')?;
    let parse = |text: &str| -> Option<u32> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    let (of, at) = (parse(written)?, parse(number)?);
    if of > MAX_SPLIT || !(1..=of).contains(&at) {
        return None;
    }
    let set = Split {
        before,
        digits: number.len(),
        of,
        written,
        ending,
    };
    Some((set, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hash;

    fn model(paths: &[&str]) -> Manifest {
        let files = paths.iter().map(|path| manifest::File {
            path: (*path).to_owned(),
            size: 3,
            blake3: Hash::of(path.as_bytes()),
            sha256: [0; 32],
            tensors: Vec::new(),
        });
        Manifest::new(files.collect()).unwrap()
    }

    fn index(files: &[&str]) -> Vec<u8> {
        let weights = files.iter().enumerate();
        let weights: Vec<_> = weights
            .map(|(at, file)| format!(r#""t{at}":"{file}""#))
            .collect();
        format!(r#"{{"weight_map":{{{}}}}}"#, weights.join(",")).into_bytes()
    }

    #[test]
    fn missing_files_that_an_index_or_a_numbered_name_refers_to_are_reported() {
        let m = "m.safetensors.index.json";
        for (paths, says, expected) in [
            (
                &[
                    "m-00001-of-00002.safetensors",
                    "m-00002-of-00002.safetensors",
                    m,
                ][..],
                Some(index(&[
                    "m-00001-of-00002.safetensors",
                    "m-00002-of-00002.safetensors",
                ])),
                &[][..],
            ),
            (
                &["m-00001-of-00002.safetensors", m],
                Some(index(&[
                    "m-00001-of-00002.safetensors",
                    "m-00002-of-00002.safetensors",
                ])),
                &[
                    "m.safetensors.index.json names 1 file that the model does not have: \
                     m-00002-of-00002.safetensors",
                ],
            ),
            // An outdated index file, beside a complete model.
            (
                &["m-00001-of-00001.safetensors", m],
                Some(index(&["m-00001-of-00005.safetensors"])),
                &[
                    "m.safetensors.index.json names 1 file that the model does not have: \
                     m-00001-of-00005.safetensors",
                ],
            ),
            (
                &["q/m-00002-of-00003.gguf"],
                None,
                &[
                    "1 of 3 files of q/m-*-of-00003.gguf are here; missing: q/m-00001-of-00003.gguf, \
                     q/m-00003-of-00003.gguf",
                ],
            ),
            (
                &[
                    "m-1-of-2.gguf",
                    "m-2-of-2.gguf",
                    "x-00000-of-00002.gguf",
                    "a-of-b.gguf",
                ],
                None,
                &[],
            ),
            (
                &["m-00001-of-4294967295.gguf", "m-00001-of-99999999999.gguf"],
                None,
                &[],
            ),
        ] {
            let notes = lacking(&model(paths), |_| says.clone());
            assert_eq!(notes, expected, "{paths:?}");
        }
        let broken = lacking(&model(&[m]), |_| Some(b"{\"weight_map\": {".to_vec()));
        assert!(broken[0].contains("malformed"), "{broken:?}");
        // An index file that is not here cannot be checked.
        assert!(lacking(&model(&[m]), |_| None).is_empty());
    }
}
