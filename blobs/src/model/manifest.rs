//! The manifest: the list of a model's files and tensors.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use prost::Message;
use weft_proto::wire;

use crate::{
    Hash,
    header::TensorInfo,
    path::{self, PathError},
};

/// The longest encoded manifest, in bytes. Room for 10,000 files and some 400,000 tensors with names of 60 bytes.
pub const MAX_MANIFEST: u64 = 64 * 1024 * 1024;

/// The most files in a manifest.
pub const MAX_FILES: usize = 100_000;

/// The most tensors in a manifest.
pub const MAX_TENSORS: usize = 1_000_000;

/// The most dimensions of a tensor.
pub const MAX_DIMENSIONS: usize = 32;

/// The most bytes in all files: 16 TiB. A bitfield has one bit for each 64 KiB, so that of a model takes at most 32
/// MiB.
pub const MAX_SIZE: u64 = 1 << 44;

/// The longest name of a tensor, in bytes.
pub const MAX_TENSOR_NAME: usize = 1024;

/// Version of the manifest format.
const VERSION: u32 = 1;

/// A checked manifest: a model's files and their tensors.
///
/// Every value satisfies these rules: paths are safe and do not clash; hashes have the right length; tensors lie within
/// their files, in order, and do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    files: Vec<File>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Path relative to the model's folder, separated by `/`.
    pub path: String,
    /// Size in bytes.
    pub size: u64,
    /// BLAKE3 hash of the content.
    pub blake3: Hash,
    /// SHA-256 hash of the content.
    pub sha256: [u8; 32],
    /// The tensors in the file, by start, then name; empty for files that are neither safetensors nor GGUF.
    pub tensors: Vec<Tensor>,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name of the tensor.
    pub name: String,
    /// Element type as spelled in the file.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// First byte within the file.
    pub start: u64,
    /// One past the last byte within the file.
    pub end: u64,
    /// BLAKE3 hash of the bytes. Tensors with the same hash have the same bytes, wherever they are.
    pub blake3: Hash,
}

impl Tensor {
    /// Makes a tensor from its description in a header and the hash of its bytes.
    pub fn new(info: TensorInfo, blake3: Hash) -> Self {
        Self {
            name: info.name,
            dtype: info.dtype,
            shape: info.shape,
            start: info.start,
            end: info.end,
            blake3,
        }
    }
}

/// The reason why bytes or files do not form a valid manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// The bytes are not a protobuf message of the schema.
    #[error("the manifest is malformed: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The manifest has a later version than this program supports.
    #[error("the manifest has version {0}; this program supports version {VERSION}")]
    Version(u32),
    /// A path is not allowed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// An entry breaks a rule.
    #[error("the manifest's entry {path:?} is invalid: {reason}")]
    Entry {
        /// Path of the file.
        path: String,
        /// The broken rule.
        reason: &'static str,
    },
    /// The manifest lists no file.
    #[error("the model has no files")]
    Empty,
    /// A limit such as [`MAX_MANIFEST`] or [`MAX_FILES`] is exceeded.
    #[error("the model exceeds the limit of {limit} {what}")]
    TooLarge {
        /// The limit.
        limit: u64,
        /// The counted unit.
        what: &'static str,
    },
}

/// The most shard groups of a model. A set of them fits the bits of a `u64`.
pub const SHARD_GROUPS: usize = 64;

impl Manifest {
    /// Makes a manifest of `files`, given in any order.
    ///
    /// # Errors
    /// [`ManifestError`] if the files break a rule that receivers check.
    pub fn new(mut files: Vec<File>) -> Result<Self, ManifestError> {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let manifest = Self { files };
        manifest.check()?;
        if manifest.to_wire().encoded_len() as u64 > MAX_MANIFEST {
            return Err(ManifestError::TooLarge {
                limit: MAX_MANIFEST,
                what: "bytes of manifest",
            });
        }
        Ok(manifest)
    }

    /// Returns the shard group of the file with index `file`. The files, in order, form at most [`SHARD_GROUPS`] groups
    /// of neighbours. A provider of a part of a model announces which groups it has completely.
    pub fn shard_group(&self, file: usize) -> usize {
        let groups = self.files.len().min(SHARD_GROUPS);
        file * groups / self.files.len().max(1)
    }

    /// Decodes and checks a manifest from an untrusted peer.
    ///
    /// # Errors
    /// [`ManifestError`] with the rule that is broken.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > MAX_MANIFEST {
            return Err(ManifestError::TooLarge {
                limit: MAX_MANIFEST,
                what: "bytes of manifest",
            });
        }
        // An entry of two bytes becomes a structure of a hundred bytes, so entries are counted before anything is
        // allocated.
        count_entries(bytes)?;
        let message = wire::Manifest::decode(bytes)?;
        if message.version != VERSION {
            return Err(ManifestError::Version(message.version));
        }
        let files = message
            .files
            .into_iter()
            .map(|file| {
                let refuse = |reason| ManifestError::Entry {
                    path: file.path.chars().take(200).collect(),
                    reason,
                };
                Ok(File {
                    size: file.size,
                    blake3: Hash::from_slice(&file.blake3)
                        .ok_or_else(|| refuse("its BLAKE3 hash does not have 32 bytes"))?,
                    sha256: file
                        .sha256
                        .as_ref()
                        .try_into()
                        .map_err(|_| refuse("its SHA-256 hash does not have 32 bytes"))?,
                    tensors: file
                        .tensors
                        .into_iter()
                        .map(Tensor::decode)
                        .collect::<Option<_>>()
                        .ok_or_else(|| refuse("a tensor's BLAKE3 hash does not have 32 bytes"))?,
                    path: file.path,
                })
            })
            .collect::<Result<_, ManifestError>>()?;
        let manifest = Self { files };
        manifest.check()?;
        Ok(manifest)
    }

    /// Returns the bytes whose hash is the model's id.
    pub fn encode(&self) -> Vec<u8> {
        self.to_wire().encode_to_vec()
    }

    /// Returns the files, by path.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Returns the total size of the files, in bytes.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// Returns the number of tensors in all files.
    pub fn tensors(&self) -> usize {
        self.files.iter().map(|file| file.tensors.len()).sum()
    }

    fn to_wire(&self) -> wire::Manifest {
        wire::Manifest {
            version: VERSION,
            files: self.files.iter().cloned().map(Into::into).collect(),
        }
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.files.is_empty() {
            return Err(ManifestError::Empty);
        }
        if self.files.len() > MAX_FILES {
            return Err(ManifestError::TooLarge {
                limit: MAX_FILES as u64,
                what: "files",
            });
        }
        if self.tensors() > MAX_TENSORS {
            return Err(ManifestError::TooLarge {
                limit: MAX_TENSORS as u64,
                what: "tensors",
            });
        }
        path::check_all(self.files.iter().map(|file| file.path.as_str()))?;
        let mut total: u64 = 0;
        let mut previous: Option<&str> = None;
        let mut sizes = HashMap::new();
        for file in &self.files {
            let refuse = |reason| {
                Err(ManifestError::Entry {
                    path: file.path.clone(),
                    reason,
                })
            };
            if previous.is_some_and(|previous| previous >= file.path.as_str()) {
                return refuse("the files are not in order");
            }
            previous = Some(&file.path);
            total = match total.checked_add(file.size) {
                Some(total) if total <= MAX_SIZE => total,
                _ => return refuse("the sizes add up to more than 16 TiB"),
            };
            if *sizes.entry(file.blake3).or_insert(file.size) != file.size {
                return refuse("it has the same hash as content of another size");
            }
            let tensors = file
                .tensors
                .iter()
                .map(|tensor| (&*tensor.name, &*tensor.shape, tensor.start..tensor.end));
            if let Err((_, reason)) = check_tensors(file.size, tensors) {
                return refuse(reason);
            }
            for tensor in &file.tensors {
                let length = tensor.end - tensor.start;
                if *sizes.entry(tensor.blake3).or_insert(length) != length {
                    return refuse("a tensor has the same hash as content of another size");
                }
            }
        }
        Ok(())
    }
}

/// Removes tensor lists from files, longest first, until the files fit into one manifest. Returns the paths of the
/// files whose list was removed.
pub(crate) fn leave_out_tensors(files: &mut [File]) -> Vec<String> {
    leave_out(files, MAX_TENSORS, MAX_MANIFEST)
}

fn leave_out(files: &mut [File], max_tensors: usize, max_bytes: u64) -> Vec<String> {
    let encoded = |file: &File| {
        let file = wire::ManifestFile::from(file.clone()).encoded_len();
        // A key of one byte, and the length.
        (1 + prost::length_delimiter_len(file) + file) as u64
    };
    let mut tensors: usize = files.iter().map(|file| file.tensors.len()).sum();
    // The version takes two bytes.
    let mut bytes = 2 + files.iter().map(encoded).sum::<u64>();
    let mut longest: Vec<usize> = (0..files.len())
        .filter(|at| !files[*at].tensors.is_empty())
        .collect();
    longest.sort_by_key(|at| files[*at].tensors.len());
    let mut left_out = Vec::new();
    while tensors > max_tensors || bytes > max_bytes {
        let Some(at) = longest.pop() else {
            break;
        };
        let file = &mut files[at];
        bytes -= encoded(file);
        tensors -= file.tensors.len();
        file.tensors = Vec::new();
        bytes += encoded(file);
        left_out.push(file.path.clone());
    }
    left_out.sort();
    left_out
}

/// Checks that the tensors of a file of `size` bytes, given as name, shape and range, are in order and do not overlap.
/// An error names the tensor that breaks a rule.
pub(crate) fn check_tensors<'a>(
    size: u64,
    tensors: impl Iterator<Item = (&'a str, &'a [u64], Range<u64>)>,
) -> Result<(), (&'a str, &'static str)> {
    let mut names = HashSet::new();
    let mut previous = None;
    let mut end = 0;
    for (name, shape, range) in tensors {
        let refuse = |reason| Err((name, reason));
        if name.len() > MAX_TENSOR_NAME {
            return refuse("a tensor's name is longer than 1024 bytes");
        }
        if shape.len() > MAX_DIMENSIONS {
            return refuse("a tensor has more than 32 dimensions");
        }
        if range.start > range.end || range.end > size {
            return refuse("a tensor lies outside the file");
        }
        if previous.is_some_and(|previous| previous > (range.start, name)) {
            return refuse("the tensors are not in order");
        }
        previous = Some((range.start, name));
        if !names.insert(name) {
            return refuse("two tensors have the same name");
        }
        // An empty tensor has no bytes that could overlap.
        if !range.is_empty() {
            if range.start < end {
                return refuse("two tensors overlap");
            }
            end = range.end;
        }
    }
    Ok(())
}

/// Checks the numbers of files, tensors and dimensions in an encoded manifest, by scanning its fields.
fn count_entries(bytes: &[u8]) -> Result<(), ManifestError> {
    // Field numbers in manifest.proto.
    const FILES: u64 = 2;
    const TENSORS: u64 = 5;
    const SHAPE: u64 = 3;
    let mut tensors = 0;
    for file in fields(bytes, FILES, MAX_FILES, "files")? {
        let of_file = fields(file, TENSORS, MAX_TENSORS - tensors, "tensors")?;
        tensors += of_file.len();
        for tensor in of_file {
            // A packed dimension takes at least one byte; an unpacked one is a field of its own.
            let dimensions: usize = fields(tensor, SHAPE, MAX_DIMENSIONS, "dimensions")?
                .iter()
                .map(|packed| packed.iter().filter(|byte| **byte < 0x80).count().max(1))
                .sum();
            if dimensions > MAX_DIMENSIONS {
                return Err(ManifestError::TooLarge {
                    limit: MAX_DIMENSIONS as u64,
                    what: "dimensions",
                });
            }
        }
    }
    Ok(())
}

/// Returns the contents of the fields with this number, at most `limit`.
fn fields<'a>(
    message: &'a [u8],
    number: u64,
    limit: usize,
    what: &'static str,
) -> Result<Vec<&'a [u8]>, ManifestError> {
    let mut found = Vec::new();
    for field in Fields(message) {
        if field.number == GROUP {
            return Err(ManifestError::Entry {
                path: String::new(),
                reason: "it contains a protobuf group, which is not allowed",
            });
        }
        if field.number == number {
            if found.len() == limit {
                return Err(ManifestError::TooLarge {
                    limit: limit as u64,
                    what,
                });
            }
            found.push(field.bytes);
        }
    }
    Ok(found)
}

/// Stands for the number of a protobuf group, in which entries could hide from the count. No field has this number.
const GROUP: u64 = u64::MAX;

/// The fields of an encoded protobuf message, up to the first malformed one; decoding reports that one.
struct Fields<'a>(&'a [u8]);

struct Field<'a> {
    number: u64,
    /// The content of a length-delimited field; empty for others.
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        prost::encoding::decode_varint(&mut self.0).ok()
    }

    fn take(&mut self, n: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(n).ok()?)?;
        self.0 = rest;
        Some(taken)
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Field<'a>;

    fn next(&mut self) -> Option<Field<'a>> {
        let key = self.varint()?;
        let mut number = key >> 3;
        let mut bytes: &[u8] = &[];
        // The wire types of the protobuf encoding.
        match key & 7 {
            0 => drop(self.varint()?),
            1 => drop(self.take(8)?),
            2 => {
                let size = self.varint()?;
                bytes = self.take(size)?;
            }
            5 => drop(self.take(4)?),
            3 => number = GROUP,
            _ => return None,
        }
        Some(Field { number, bytes })
    }
}

impl Tensor {
    /// Returns `None` if the hash does not have 32 bytes.
    fn decode(tensor: wire::ManifestTensor) -> Option<Self> {
        Some(Self {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            start: tensor.start,
            end: tensor.end,
            blake3: Hash::from_slice(&tensor.blake3)?,
        })
    }
}

impl From<File> for wire::ManifestFile {
    fn from(file: File) -> Self {
        Self {
            path: file.path,
            size: file.size,
            blake3: file.blake3.as_bytes().to_vec().into(),
            sha256: file.sha256.to_vec().into(),
            tensors: file.tensors.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Tensor> for wire::ManifestTensor {
    fn from(tensor: Tensor) -> Self {
        Self {
            name: tensor.name,
            dtype: tensor.dtype,
            shape: tensor.shape,
            start: tensor.start,
            end: tensor.end,
            blake3: tensor.blake3.as_bytes().to_vec().into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64) -> File {
        File {
            path: path.to_owned(),
            size,
            blake3: Hash::of(path.as_bytes()),
            sha256: [1; 32],
            tensors: vec![],
        }
    }

    fn tensor(name: &str, range: Range<u64>) -> Tensor {
        Tensor {
            name: name.to_owned(),
            dtype: "U8".to_owned(),
            shape: vec![range.end - range.start],
            start: range.start,
            end: range.end,
            blake3: Hash::of(format!("{} bytes of {name}", range.end - range.start).as_bytes()),
        }
    }

    fn hostile(change: impl FnOnce(&mut wire::Manifest)) -> Result<Manifest, ManifestError> {
        let mut message = Manifest::new(vec![file("a", 1), file("b/c", 2)])
            .unwrap()
            .to_wire();
        change(&mut message);
        Manifest::decode(&message.encode_to_vec())
    }

    #[test]
    fn the_same_files_in_any_order_have_the_same_id() {
        let one = Manifest::new(vec![file("a", 1), file("b/c", 2)]).unwrap();
        let two = Manifest::new(vec![file("b/c", 2), file("a", 1)]).unwrap();
        assert_eq!(one.encode(), two.encode());
        assert_eq!(Manifest::decode(&one.encode()).unwrap(), one);
        assert_eq!(one.size(), 3);
    }

    #[test]
    fn hostile_manifests_are_refused() {
        assert!(hostile(|_| {}).is_ok());
        assert!(matches!(
            hostile(|m| m.version = 2),
            Err(ManifestError::Version(2))
        ));
        assert!(matches!(
            hostile(|m| m.files.clear()),
            Err(ManifestError::Empty)
        ));
        for path in ["../a", "/a", "b/../../c", "B", ".weft-x", "B/x"] {
            assert!(
                hostile(|m| m.files[0].path = path.to_owned()).is_err(),
                "{path}"
            );
        }
        assert!(matches!(
            hostile(|m| m.files[1].path = "A".to_owned()),
            Err(ManifestError::Path(_))
        ));
        for change in [
            |m: &mut wire::Manifest| m.files.swap(0, 1),
            |m: &mut wire::Manifest| m.files[0].blake3 = vec![1; 31].into(),
            |m: &mut wire::Manifest| m.files[0].sha256 = vec![1; 33].into(),
            |m: &mut wire::Manifest| m.files[0].size = u64::MAX,
            |m: &mut wire::Manifest| m.files[1].blake3 = m.files[0].blake3.clone(),
            |m: &mut wire::Manifest| m.files[0].tensors.push(tensor("a", 0..2).into()),
            |m: &mut wire::Manifest| m.files[0].tensors.push(wire::ManifestTensor::default()),
        ] {
            assert!(matches!(hostile(change), Err(ManifestError::Entry { .. })));
        }
        assert!(Manifest::decode(&[0xff; 100]).is_err());
    }

    #[test]
    fn tensors_must_be_in_order_disjoint_and_uniquely_named() {
        let decode = |tensors: Vec<Tensor>| {
            let mut message = Manifest::new(vec![file("a", 10), file("b", 20)])
                .unwrap()
                .to_wire();
            message.files[1].tensors = tensors.into_iter().map(Into::into).collect();
            Manifest::decode(&message.encode_to_vec())
        };
        let backwards = Tensor {
            start: 5,
            end: 4,
            ..tensor("x", 4..5)
        };
        let of_the_file = |end| Tensor {
            blake3: Hash::of(b"a"),
            ..tensor("x", 0..end)
        };
        let like_x = |range| Tensor {
            blake3: tensor("x", 0..4).blake3,
            ..tensor("y", range)
        };
        let many_dimensions = Tensor {
            shape: vec![1; MAX_DIMENSIONS],
            ..tensor("x", 0..1)
        };
        let longest = "n".repeat(MAX_TENSOR_NAME);
        for good in [
            vec![tensor("y", 0..4), tensor("x", 4..10), tensor("z", 12..20)],
            // Empty tensors may lie anywhere.
            vec![tensor("a", 0..0), tensor("b", 0..4), tensor("c", 0..0)],
            vec![tensor("b", 0..4), tensor("c", 2..2), tensor("d", 20..20)],
            vec![tensor(&longest, 0..1)],
            vec![many_dimensions],
            // The same bytes twice, and the bytes of another file.
            vec![tensor("x", 0..4), like_x(4..8)],
            vec![of_the_file(10)],
        ] {
            let decoded = decode(good.clone()).unwrap();
            assert_eq!(decoded.files()[1].tensors, good);
            assert_eq!(Manifest::decode(&decoded.encode()).unwrap(), decoded);
        }
        for bad in [
            vec![tensor("x", 4..10), tensor("y", 0..4)],
            vec![tensor("c", 0..0), tensor("b", 0..4)],
            vec![tensor("x", 0..5), tensor("y", 4..10)],
            vec![tensor("x", 0..5), tensor("y", 2..2), tensor("z", 4..10)],
            vec![tensor("x", 0..4), tensor("x", 4..8)],
            vec![tensor("x", 0..0), tensor("x", 0..0)],
            vec![tensor(&"n".repeat(MAX_TENSOR_NAME + 1), 0..1)],
            vec![tensor("x", 19..21)],
            vec![backwards],
            vec![tensor("x", 0..4), like_x(4..9)],
            vec![of_the_file(9)],
        ] {
            let got = decode(bad.clone());
            assert!(matches!(got, Err(ManifestError::Entry { .. })), "{bad:?}");
        }
        for length in [0, 31, 33] {
            let mut message = Manifest::new(vec![file("a", 1)]).unwrap().to_wire();
            let mut short: wire::ManifestTensor = tensor("x", 0..1).into();
            short.blake3 = vec![1; length].into();
            message.files[0].tensors.push(short);
            assert!(matches!(
                Manifest::decode(&message.encode_to_vec()),
                Err(ManifestError::Entry { .. })
            ));
        }
    }

    #[test]
    fn a_model_of_ten_thousand_files_and_a_hundred_thousand_tensors_fits() {
        let files = (0..10_000)
            .map(|i| {
                let path = format!("model-{i:05}-of-10000.safetensors");
                File {
                    tensors: (0..10_u64)
                        .map(|n| {
                            let start = n << 27;
                            Tensor {
                                dtype: "F8_E4M3FNUZ".to_owned(),
                                shape: vec![1 << 11, 1 << 16],
                                ..tensor(
                                    &format!("{path}.layers.{n:026}"),
                                    start..start + (1 << 27),
                                )
                            }
                        })
                        .collect(),
                    ..file(&path, 10 << 27)
                }
            })
            .collect();
        let manifest = Manifest::new(files).unwrap();
        assert!(manifest.files()[0].tensors[0].name.len() > 60);
        let encoded = manifest.encode();
        assert!((encoded.len() as u64) < MAX_MANIFEST / 3);
        assert_eq!(Manifest::decode(&encoded).unwrap(), manifest);
    }

    #[test]
    fn a_bomb_of_empty_entries_is_refused_before_it_is_decoded() {
        let refused = |bytes: &[u8]| {
            assert!(matches!(
                Manifest::decode(bytes),
                Err(ManifestError::TooLarge { .. })
            ));
        };
        // Empty files; a file of empty tensors; a tensor of many dimensions, packed and unpacked.
        refused(&[0x12, 0].repeat(MAX_FILES + 1));
        let field = |tag: u8, content: Vec<u8>| {
            let mut bytes = vec![tag];
            prost::encoding::encode_varint(content.len() as u64, &mut bytes);
            bytes.extend(content);
            bytes
        };
        refused(&field(0x12, [0x2a, 0].repeat(MAX_TENSORS + 1)));
        refused(&field(0x12, field(0x2a, field(0x1a, vec![1; 33]))));
        refused(&field(0x12, field(0x2a, [0x18, 1].repeat(33))));
        // A group could hide entries from the count, and is refused.
        let mut hidden = vec![0x7b, 0x7c];
        hidden.extend([0x12, 0].repeat(MAX_FILES + 1));
        assert!(matches!(
            Manifest::decode(&hidden),
            Err(ManifestError::Entry { .. })
        ));
    }

    #[test]
    fn mutated_bytes_never_panic() {
        let bytes = Manifest::new(vec![file("a", 1), file("b/c", 2)])
            .unwrap()
            .encode();
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                let _ = Manifest::decode(&bad);
                let _ = Manifest::decode(&bytes[..at]);
            }
        }
    }

    #[test]
    fn a_model_over_the_limits_is_published_without_its_longest_lists_of_tensors() {
        let with = |path: &str, tensors: usize| {
            let mut file = file(path, 1000);
            file.tensors = (0..tensors)
                .map(|at| Tensor {
                    name: format!("t{at:04}"),
                    dtype: "U8".to_owned(),
                    shape: vec![1],
                    start: at as u64,
                    end: at as u64 + 1,
                    blake3: Hash::of(b"x"),
                })
                .collect();
            file
        };
        let all = || vec![with("a", 300), with("b", 10), with("c", 200), file("d", 5)];
        let bytes = |files: &[File]| {
            let files = files.to_vec();
            Manifest { files }.encode().len() as u64
        };
        let mut files = all();
        let whole = bytes(&files);
        assert!(leave_out(&mut files, 510, whole).is_empty());
        assert_eq!(files, all());
        assert_eq!(leave_out(&mut files, 509, whole), ["a"]);
        assert_eq!((files[0].tensors.len(), files[2].tensors.len()), (0, 200));
        let mut files = all();
        assert_eq!(leave_out(&mut files, 510, whole - 1), ["a"]);
        let mut files = all();
        let left_out = leave_out(&mut files, 510, 3000);
        assert_eq!(left_out, ["a", "c"]);
        assert!(bytes(&files) <= 3000);
        let mut files = all();
        assert_eq!(leave_out(&mut files, 0, 0), ["a", "b", "c"]);
    }
}
