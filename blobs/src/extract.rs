//! A safetensors file of some tensors of another file.
//!
//! [`plan`] says, from the manifest and the source's header, how the result begins and which bytes are copied where;
//! [`Plan::write`] does it. The same choice of tensors gives the same bytes on every machine: the order is the source's, nothing
//! lies between two tensors, and keys of the metadata are sorted.
//!
//! A manifest and a header come from strangers and need not agree. What is written is checked to be a valid file whose every tensor
//! is the source's, so the plan is refused if they differ in anything about a chosen tensor.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
};

use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        self, DeserializeSeed, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess, Visitor,
        value::StrDeserializer,
    },
    ser::SerializeMap,
};

use crate::{
    header::MAX_SAFETENSORS_HEADER,
    manifest::{self, MAX_DIMENSIONS, Tensor},
};

/// Bytes read and written at a time: 1 MiB, beyond which a disk is not faster.
pub const PIECE: u64 = 1024 * 1024;

/// The most entries of a header's `__metadata__`. Files have a handful; a hostile header of 100 MB could have ten million, which
/// take a gigabyte as strings.
pub const MAX_METADATA: usize = 65_536;

/// The key in a header that is no tensor's name.
const METADATA: &str = "__metadata__";

/// The types of ggml that safetensors has too, under the same names and with the same bytes. All others are blocks of quantised
/// numbers.
const PLAIN: [&str; 8] = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"];

/// How a file holds its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The file's name ends in `.safetensors`.
    Safetensors,
    /// Every other file that a manifest lists tensors of, whatever its name.
    Gguf,
}

impl Format {
    /// The format of the file at this path of a manifest.
    pub fn of(path: &str) -> Self {
        if path.ends_with(".safetensors") {
            Self::Safetensors
        } else {
            Self::Gguf
        }
    }
}

/// Where the result of a selection from the file at `path` belongs: there for a safetensors file, at `x.safetensors` for `x.gguf`,
/// and with `.safetensors` behind it for other names.
pub fn result_path(path: &str) -> String {
    match Format::of(path) {
        Format::Safetensors => path.to_owned(),
        Format::Gguf => format!("{}.safetensors", path.strip_suffix(".gguf").unwrap_or(path)),
    }
}

/// The bytes of `file` that [`plan`] needs to know: its header for safetensors, none for GGUF, whose manifest says all.
pub fn header_range(file: &manifest::File) -> Range<u64> {
    match Format::of(&file.path) {
        Format::Gguf => 0..0,
        Format::Safetensors => {
            // Without data nothing but the file's end says where the header ends.
            let has_data = file.tensors.iter().any(|tensor| tensor.start < tensor.end);
            let starts = file.tensors.iter().map(|tensor| tensor.start);
            0..starts.min().filter(|_| has_data).unwrap_or(file.size)
        }
    }
}

/// How a file of chosen tensors is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    header: Vec<u8>,
    copies: Vec<Copy>,
    size: u64,
}

/// Bytes of the source and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Within the source. Not empty.
    pub source: Range<u64>,
    /// First byte within the result.
    pub to: u64,
}

/// Why chosen tensors do not make a file. Names in it are cut after 200 characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// The file has no tensor of this index.
    #[error("there is no tensor {index}; the file has {tensors}")]
    NoTensor {
        /// As asked for.
        index: usize,
        /// Tensors in the file.
        tensors: usize,
    },
    /// Two chosen tensors have one name, or one was chosen twice.
    #[error("two of the chosen tensors are named {0:?}")]
    Duplicate(String),
    /// A tensor has the name that a header keeps for its metadata.
    #[error("a tensor is named `__metadata__`, which no safetensors file can hold")]
    Reserved,
    /// Two chosen tensors share bytes, or one ends before it starts.
    #[error("the bytes of {0:?} are not its own")]
    Overlap(String),
    /// The given header is not what its first eight bytes announce, or does not end where the first tensor starts.
    #[error(
        "the header has {given} bytes where the manifest has {expected} and it says {announced} itself"
    )]
    HeaderSize {
        /// Bytes given.
        given: u64,
        /// Where the manifest's first tensor starts.
        expected: u64,
        /// What the header says, with the eight bytes of the length.
        announced: u64,
    },
    /// The header is not what the format says.
    #[error("the header is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The manifest lists a tensor that the header does not have.
    #[error("the header has no tensor {0:?}, which the manifest lists")]
    Missing(String),
    /// The manifest and the header disagree.
    #[error("the manifest and the header disagree about the {what} of {tensor:?}")]
    Differs {
        /// The tensor.
        tensor: String,
        /// What differs.
        what: &'static str,
    },
    /// No type that safetensors has.
    #[error("the tensor {tensor:?} is of the unknown type {dtype:?}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
    },
    /// A tensor's type and shape do not give the size that it has.
    #[error("the tensor {tensor:?} has {present} bytes, which its type and shape do not give")]
    Size {
        /// The tensor.
        tensor: String,
        /// Its size in bytes.
        present: u64,
    },
    /// The result's header would be longer than the format allows.
    #[error("the header of the chosen tensors would have {0} bytes; the limit is 100000000")]
    TooLong(u64),
}

/// The beginning of a name that may have any length.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(200).collect()
}

/// Plans the file that holds those of `file`'s tensors whose indices are in `tensors`, in any order.
///
/// `header` is the source's bytes in [`header_range`]. From a safetensors file the tensors keep type and shape, and the file its
/// `__metadata__`. From a GGUF file those of a type that safetensors has keep type and shape; the others become `U8` of
/// shape `[bytes]`, and `__metadata__` has their type at `gguf.dtype.<name>` and their shape, outermost dimension first, as a JSON
/// array at `gguf.shape.<name>`.
///
/// # Errors
/// [`ExtractError`] if the choice is none, the header is malformed, or it and the manifest disagree about a chosen tensor.
pub fn plan(file: &manifest::File, tensors: &[usize], header: &[u8]) -> Result<Plan, ExtractError> {
    let chosen = choose(file, tensors)?;
    match Format::of(&file.path) {
        Format::Safetensors => from_safetensors(header_range(file).end, &chosen, header),
        Format::Gguf => from_gguf(&chosen),
    }
}

impl Plan {
    /// The result's first bytes: eight of length, then JSON, then spaces up to a multiple of eight.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// What follows the header, in order, without a gap. What is adjacent in the source is one copy.
    pub fn copies(&self) -> &[Copy] {
        &self.copies
    }

    /// The result's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the result to `destination`, which gets its size first and keeps nothing of what it held. `source` fills a buffer of
    /// at most [`PIECE`] bytes from an offset of the source; with a file that is [`FileExt::read_exact_at`].
    ///
    /// Nothing is synced: the caller does it before it tells anyone that the file is there. The two must not be one file.
    ///
    /// # Errors
    /// What `source` returns, which ends the writing, or what the disk says. The destination is incomplete then.
    pub fn write(
        &self,
        mut source: impl FnMut(&mut [u8], u64) -> io::Result<()>,
        destination: &File,
    ) -> io::Result<()> {
        destination.set_len(0)?;
        destination.set_len(self.size)?;
        destination.write_all_at(&self.header, 0)?;
        let longest = self.copies.iter().map(|c| c.source.end - c.source.start);
        let mut buffer = vec![0; longest.max().unwrap_or(0).min(PIECE) as usize];
        for copy in &self.copies {
            let (mut from, mut to) = (copy.source.start, copy.to);
            while from < copy.source.end {
                let n = (copy.source.end - from).min(PIECE);
                let piece = &mut buffer[..n as usize];
                source(piece, from)?;
                destination.write_all_at(piece, to)?;
                from += n;
                to += n;
            }
        }
        Ok(())
    }
}

/// The chosen tensors in the source's order, with ranges that do not touch each other's bytes.
fn choose<'a>(
    file: &'a manifest::File,
    tensors: &[usize],
) -> Result<Vec<&'a Tensor>, ExtractError> {
    let mut chosen = tensors
        .iter()
        .map(|index| {
            file.tensors.get(*index).ok_or(ExtractError::NoTensor {
                index: *index,
                tensors: file.tensors.len(),
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    chosen.sort_by_key(|tensor| order(tensor));
    let mut names = HashSet::with_capacity(chosen.len());
    let mut end = 0;
    for tensor in &chosen {
        if tensor.name == METADATA {
            return Err(ExtractError::Reserved);
        }
        if !names.insert(tensor.name.as_str()) {
            return Err(ExtractError::Duplicate(shown(&tensor.name)));
        }
        // Without this a list of tensors that all are the whole file would make a result larger than any disk.
        if tensor.start < end || tensor.end < tensor.start {
            return Err(ExtractError::Overlap(shown(&tensor.name)));
        }
        end = tensor.end;
    }
    Ok(chosen)
}

/// What tensors of a file are sorted by. An empty tensor comes before the one that starts where it does.
pub(crate) fn order(tensor: &Tensor) -> (u64, u64, &str) {
    (tensor.start, tensor.end, &tensor.name)
}

fn from_safetensors(
    data_start: u64,
    chosen: &[&Tensor],
    header: &[u8],
) -> Result<Plan, ExtractError> {
    let length = header.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
    let announced = length.saturating_add(8);
    let given = header.len() as u64;
    if given != data_start || given != announced {
        return Err(ExtractError::HeaderSize {
            given,
            expected: data_start,
            announced,
        });
    }
    let mut json = serde_json::Deserializer::from_slice(&header[8..]);
    let parsed = HeaderSeed {
        indices: chosen
            .iter()
            .enumerate()
            .map(|(index, tensor)| (tensor.name.as_str(), index))
            .collect(),
    }
    .deserialize(&mut json)?;
    json.end()?;
    for (tensor, entry) in chosen.iter().zip(&parsed.entries) {
        let name = || shown(&tensor.name);
        let Some(entry) = entry else {
            return Err(ExtractError::Missing(name()));
        };
        let differs = |what| {
            Err(ExtractError::Differs {
                tensor: name(),
                what,
            })
        };
        if entry.dtype != tensor.dtype {
            return differs("type");
        }
        if entry.shape != tensor.shape {
            return differs("shape");
        }
        let (start, end) = entry.data_offsets;
        if data_start.checked_add(start) != Some(tensor.start)
            || data_start.checked_add(end) != Some(tensor.end)
        {
            return differs("place");
        }
        // A type that is not known here is the reader's to know: the result says of it what the source does.
        if dtype(tensor).is_some() {
            check_size(tensor)?;
        }
    }
    let entries = chosen
        .iter()
        .map(|tensor| Described {
            tensor,
            dtype: &tensor.dtype,
            as_bytes: false,
        })
        .collect();
    pack(parsed.metadata, entries)
}

fn from_gguf(chosen: &[&Tensor]) -> Result<Plan, ExtractError> {
    let mut metadata = BTreeMap::new();
    let mut entries = Vec::with_capacity(chosen.len());
    for tensor in chosen {
        let is_plain = PLAIN.contains(&tensor.dtype.as_str());
        if is_plain {
            check_size(tensor)?;
        } else {
            let name = &tensor.name;
            metadata.insert(format!("gguf.dtype.{name}"), tensor.dtype.clone());
            metadata.insert(
                format!("gguf.shape.{name}"),
                serde_json::to_string(&tensor.shape)?,
            );
        }
        entries.push(Described {
            tensor,
            dtype: if is_plain { &tensor.dtype } else { "U8" },
            as_bytes: !is_plain,
        });
    }
    pack((!metadata.is_empty()).then_some(metadata), entries)
}

/// The tensor's element type; `None` if it is not known here.
fn dtype(tensor: &Tensor) -> Option<Dtype> {
    let name: StrDeserializer<'_, de::value::Error> = tensor.dtype.as_str().into_deserializer();
    Dtype::deserialize(name).ok()
}

/// Checks that type and shape give the tensor's size, as every reader of safetensors does.
fn check_size(tensor: &Tensor) -> Result<(), ExtractError> {
    let dtype = dtype(tensor).ok_or_else(|| ExtractError::Dtype {
        tensor: shown(&tensor.name),
        dtype: shown(&tensor.dtype),
    })?;
    let present = tensor.end - tensor.start;
    // In the reader's steps, so that what overflows there is refused here.
    let bits = tensor
        .shape
        .iter()
        .try_fold(1_usize, |n, dimension| {
            n.checked_mul(usize::try_from(*dimension).ok()?)
        })
        .and_then(|n| n.checked_mul(dtype.bitsize()));
    match bits {
        Some(bits) if bits % 8 == 0 && (bits / 8) as u64 == present => Ok(()),
        _ => Err(ExtractError::Size {
            tensor: shown(&tensor.name),
            present,
        }),
    }
}

/// A chosen tensor as the result describes it.
struct Described<'a> {
    tensor: &'a Tensor,
    dtype: &'a str,
    /// Its shape is its size in bytes, not that of the source.
    as_bytes: bool,
}

impl Described<'_> {
    fn size(&self) -> u64 {
        self.tensor.end - self.tensor.start
    }
}

/// Lays the tensors out one behind the other.
fn pack(
    metadata: Option<BTreeMap<String, String>>,
    tensors: Vec<Described<'_>>,
) -> Result<Plan, ExtractError> {
    let mut header = vec![0; 8];
    serde_json::to_writer(
        &mut header,
        &Header {
            metadata: &metadata,
            tensors: &tensors,
        },
    )?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = header.len() as u64 - 8;
    if length > MAX_SAFETENSORS_HEADER {
        return Err(ExtractError::TooLong(length));
    }
    header[..8].copy_from_slice(&length.to_le_bytes());
    let mut size = header.len() as u64;
    let mut copies: Vec<Copy> = Vec::new();
    for described in tensors.iter().filter(|described| described.size() > 0) {
        let source = described.tensor.start..described.tensor.end;
        match copies.last_mut() {
            Some(last) if last.source.end == source.start => last.source.end = source.end,
            _ => copies.push(Copy { source, to: size }),
        }
        // Tensors are disjoint and the header has its limit; only a file of 2^64 bytes could come here.
        size = size
            .checked_add(described.size())
            .ok_or_else(|| ExtractError::Size {
                tensor: shown(&described.tensor.name),
                present: described.size(),
            })?;
    }
    Ok(Plan {
        header,
        copies,
        size,
    })
}

/// The JSON of the result.
struct Header<'a> {
    metadata: &'a Option<BTreeMap<String, String>>,
    tensors: &'a [Described<'a>],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Entry<'a> {
            dtype: &'a str,
            shape: &'a [u64],
            data_offsets: (u64, u64),
        }
        let mut map = serializer.serialize_map(None)?;
        if let Some(metadata) = self.metadata {
            map.serialize_entry(METADATA, metadata)?;
        }
        let mut start = 0;
        for described in self.tensors {
            let size = [described.size()];
            let end = start + described.size();
            map.serialize_entry(
                &described.tensor.name,
                &Entry {
                    dtype: described.dtype,
                    shape: if described.as_bytes {
                        &size
                    } else {
                        &described.tensor.shape
                    },
                    data_offsets: (start, end),
                },
            )?;
            start = end;
        }
        map.end()
    }
}

/// What a header says about the chosen tensors.
struct Parsed {
    metadata: Option<BTreeMap<String, String>>,
    /// One for each chosen tensor.
    entries: Vec<Option<Entry>>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    #[serde(deserialize_with = "shape")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads what is needed of a header, so that it takes no more memory than the chosen tensors do.
struct HeaderSeed<'a> {
    /// Which chosen tensor has a name.
    indices: HashMap<&'a str, usize>,
}

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Parsed;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Parsed, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
        let mut metadata = None;
        let mut entries: Vec<Option<Entry>> = Vec::new();
        entries.resize_with(self.indices.len(), || None);
        while let Some(key) = map.next_key::<String>()? {
            if key == METADATA {
                if metadata.is_some() {
                    return Err(de::Error::duplicate_field(METADATA));
                }
                metadata = Some(map.next_value::<Option<Strings>>()?);
            } else if let Some(index) = self.indices.get(key.as_str()) {
                // Readers take the first or the last of two, and would not agree on what the file holds.
                if entries[*index].replace(map.next_value()?).is_some() {
                    return Err(de::Error::custom(format_args!(
                        "the tensor {:?} is there twice",
                        shown(&key)
                    )));
                }
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Parsed {
            metadata: metadata.flatten().map(|strings| strings.0),
            entries,
        })
    }
}

/// At most [`MAX_METADATA`] strings by name.
struct Strings(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StringsVisitor;
        impl<'de> Visitor<'de> for StringsVisitor {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object of at most {MAX_METADATA} strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Strings, A::Error> {
                let mut strings = BTreeMap::new();
                while let Some((key, value)) = map.next_entry()? {
                    if strings.len() == MAX_METADATA {
                        return Err(de::Error::invalid_length(MAX_METADATA + 1, &self));
                    }
                    strings.insert(key, value);
                }
                Ok(Strings(strings))
            }
        }
        deserializer.deserialize_map(StringsVisitor)
    }
}

/// At most [`MAX_DIMENSIONS`] dimensions.
fn shape<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    struct ShapeVisitor;
    impl<'de> Visitor<'de> for ShapeVisitor {
        type Value = Vec<u64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_DIMENSIONS} dimensions")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut dimensions: A) -> Result<Vec<u64>, A::Error> {
            let mut shape = Vec::new();
            while let Some(dimension) = dimensions.next_element()? {
                if shape.len() == MAX_DIMENSIONS {
                    return Err(de::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                }
                shape.push(dimension);
            }
            Ok(shape)
        }
    }
    deserializer.deserialize_seq(ShapeVisitor)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use safetensors::SafeTensors;

    use super::*;
    use crate::{Hash, header::Format as Header, testing::Random};

    fn file_of(path: &str, size: u64, tensors: Vec<Tensor>) -> manifest::File {
        manifest::File {
            path: path.to_owned(),
            size,
            blake3: Hash::of(b""),
            sha256: [0; 32],
            tensors,
        }
    }

    /// A safetensors file with this JSON and data, and the manifest's entry for it.
    fn indexed(json: &str, data: &[u8]) -> (Vec<u8>, manifest::File) {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend_from_slice(data);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let found = Header::Safetensors
            .read(&file, bytes.len() as u64)
            .unwrap()
            .into_iter()
            .map(|info| {
                let hash = Hash::of(&bytes[info.start as usize..info.end as usize]);
                Tensor::new(info, hash)
            })
            .collect();
        let entry = file_of("a/model.safetensors", bytes.len() as u64, found);
        (bytes, entry)
    }

    fn written(plan: &Plan, source: &[u8]) -> Vec<u8> {
        let mut destination = tempfile::tempfile().unwrap();
        destination.write_all_at(&[0xee; 5000], 0).unwrap();
        plan.write(
            |buffer, at| {
                assert!(buffer.len() as u64 <= PIECE);
                buffer.copy_from_slice(&source[at as usize..][..buffer.len()]);
                Ok(())
            },
            &destination,
        )
        .unwrap();
        destination.rewind().unwrap();
        let mut bytes = Vec::new();
        destination.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, plan.size());
        bytes
    }

    fn head<'a>(bytes: &'a [u8], file: &manifest::File) -> &'a [u8] {
        &bytes[..header_range(file).end as usize]
    }

    const JSON: &str = r#"{"__metadata__":{"format":"pt","a":"é\n"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[4,12]},
        "a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"c\u0001":{"dtype":"U8","shape":[3],"data_offsets":[12,15]}}   "#;

    #[test]
    fn a_result_has_the_chosen_tensors_packed_in_order_with_the_metadata() {
        let data: Vec<u8> = (0..15).collect();
        let (bytes, file) = indexed(JSON, &data);
        let plan = plan(&file, &[2, 0], head(&bytes, &file)).unwrap();
        assert_eq!(plan.header().len() % 8, 0);
        let json = std::str::from_utf8(&plan.header()[8..]).unwrap();
        assert_eq!(
            json.trim_end(),
            "{\"__metadata__\":{\"a\":\"é\\n\",\"format\":\"pt\"},\"a\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[0,4]},\"c\\u0001\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[4,7]}}"
        );
        let start = header_range(&file).end;
        assert_eq!(
            plan.copies(),
            [
                Copy {
                    source: start..start + 4,
                    to: plan.header().len() as u64
                },
                Copy {
                    source: start + 12..start + 15,
                    to: plan.header().len() as u64 + 4
                }
            ]
        );
        let result = written(&plan, &bytes);
        let read = SafeTensors::deserialize(&result).unwrap();
        assert_eq!(read.len(), 2);
        assert_eq!(read.tensor("a").unwrap().data(), &data[..4]);
        assert_eq!(read.tensor("c\u{1}").unwrap().data(), &data[12..]);
        let (_, metadata) = SafeTensors::read_metadata(&result).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["a"], "é\n");
    }

    #[test]
    fn a_tensor_of_a_type_that_is_not_known_yet_is_taken_as_it_is() {
        let json = r#"{"a":{"dtype":"F4_E3M0","shape":[16],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}"#;
        let (bytes, file) = indexed(json, &[7; 9]);
        let planned = plan(&file, &[0], head(&bytes, &file)).unwrap();
        let header = std::str::from_utf8(&planned.header()[8..]).unwrap();
        assert_eq!(
            header.trim_end(),
            r#"{"a":{"dtype":"F4_E3M0","shape":[16],"data_offsets":[0,8]}}"#
        );
        // The manifest may not say otherwise of it than the file.
        let mut other = file.clone();
        other.tensors[0].dtype = "F4_E3M1".to_owned();
        assert!(matches!(
            plan(&other, &[0], head(&bytes, &other)),
            Err(ExtractError::Differs { what: "type", .. })
        ));
    }

    #[test]
    fn neighbours_in_the_source_are_one_copy_of_many_pieces() {
        let json = r#"{"a":{"dtype":"U8","shape":[2097153],"data_offsets":[0,2097153]},"b":{"dtype":"U8","shape":[1048577],"data_offsets":[2097153,3145730]}}"#;
        let data: Vec<u8> = (0..3_145_730_u32).map(|i| (i * 31 / 7) as u8).collect();
        let (bytes, file) = indexed(json, &data);
        let plan = plan(&file, &[0, 1], head(&bytes, &file)).unwrap();
        assert_eq!(plan.copies().len(), 1);
        let result = written(&plan, &bytes);
        assert_eq!(&result[plan.header().len()..], data);
        SafeTensors::deserialize(&result).unwrap();
    }

    #[test]
    fn random_selections_of_random_files_hold_the_same_tensors() {
        const DTYPES: [(&str, usize); 12] = [
            ("BOOL", 8),
            ("U8", 8),
            ("I16", 16),
            ("F16", 16),
            ("BF16", 16),
            ("F8_E4M3", 8),
            ("F32", 32),
            ("F64", 64),
            ("C64", 64),
            ("U64", 64),
            ("F4", 4),
            ("F6_E2M3", 6),
        ];
        let mut random = Random(1);
        for round in 0..200 {
            let mut entries = Vec::new();
            let mut offset = 0;
            for i in 0..random.below(12) {
                let (dtype, bits) = DTYPES[random.below(DTYPES.len())];
                let mut shape: Vec<usize> = (0..random.below(4)).map(|_| random.below(7)).collect();
                // Types of less than a byte fill whole bytes only in multiples.
                shape.push(4);
                let size = shape.iter().product::<usize>() * bits / 8;
                entries.push(format!(
                    r#""t.{}.{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{offset},{}]}}"#,
                    random.below(5),
                    offset + size
                ));
                offset += size;
            }
            for i in (1..entries.len()).rev() {
                entries.swap(i, random.below(i + 1));
            }
            if round % 3 == 0 {
                entries.insert(0, r#""__metadata__":{"k":"v"}"#.to_owned());
            }
            let json = format!("{{{}}}{}", entries.join(", "), " ".repeat(random.below(9)));
            let data: Vec<u8> = (0..offset).map(|_| random.below(256) as u8).collect();
            let (bytes, file) = indexed(&json, &data);
            let chosen: Vec<usize> = (0..file.tensors.len())
                .filter(|_| random.below(2) == 0)
                .collect();
            let plan = plan(&file, &chosen, head(&bytes, &file)).unwrap();
            let result = written(&plan, &bytes);
            let (before, after) = (
                SafeTensors::deserialize(&bytes).unwrap(),
                SafeTensors::deserialize(&result).unwrap(),
            );
            assert_eq!(after.len(), chosen.len());
            for index in chosen {
                let name = &file.tensors[index].name;
                assert_eq!(before.tensor(name).unwrap(), after.tensor(name).unwrap());
            }
        }
    }

    fn tensor(name: &str, dtype: &str, shape: &[u64], range: Range<u64>) -> Tensor {
        Tensor {
            name: name.to_owned(),
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            start: range.start,
            blake3: Hash::of(format!("{name} {range:?}").as_bytes()),
            end: range.end,
        }
    }

    #[test]
    fn of_gguf_plain_types_stay_and_quantised_ones_are_bytes_that_say_what_they_were() {
        let source: Vec<u8> = (0..400_u32).map(|i| i as u8).collect();
        let file = file_of(
            "m.gguf",
            400,
            vec![
                tensor("norm", "F32", &[4], 32..48),
                tensor("blk.0.w", "Q4_K", &[1, 256], 64..208),
                tensor("scale", "BF16", &[2, 2], 224..232),
            ],
        );
        assert_eq!(header_range(&file), 0..0);
        let plan = plan(&file, &[0, 1, 2], &[]).unwrap();
        assert_eq!(plan.copies().len(), 3);
        let result = written(&plan, &source);
        let read = SafeTensors::deserialize(&result).unwrap();
        let norm = read.tensor("norm").unwrap();
        assert_eq!(
            (norm.dtype(), norm.shape(), norm.data()),
            (Dtype::F32, &[4][..], &source[32..48])
        );
        let scale = read.tensor("scale").unwrap();
        assert_eq!(
            (scale.dtype(), scale.shape(), scale.data()),
            (Dtype::BF16, &[2, 2][..], &source[224..232])
        );
        let quantised = read.tensor("blk.0.w").unwrap();
        assert_eq!(
            (quantised.dtype(), quantised.shape(), quantised.data()),
            (Dtype::U8, &[144][..], &source[64..208])
        );
        let (_, metadata) = SafeTensors::read_metadata(&result).unwrap();
        let metadata = metadata.metadata().as_ref().unwrap();
        assert_eq!(metadata.len(), 2);
        assert_eq!(metadata["gguf.dtype.blk.0.w"], "Q4_K");
        assert_eq!(metadata["gguf.shape.blk.0.w"], "[1,256]");
    }

    #[test]
    fn results_are_named_after_their_source() {
        assert_eq!(result_path("a/x.safetensors"), "a/x.safetensors");
        assert_eq!(result_path("a/x.gguf"), "a/x.safetensors");
        assert_eq!(result_path("a/x.bin"), "a/x.bin.safetensors");
    }

    #[test]
    fn a_header_and_a_manifest_that_disagree_are_refused() {
        use ExtractError as E;
        let (bytes, file) = indexed(JSON, &[0; 15]);
        let header = head(&bytes, &file);
        let changed = |change: fn(&mut Tensor)| {
            let mut file = file.clone();
            change(&mut file.tensors[1]);
            plan(&file, &[1], header)
        };
        assert!(changed(|_| {}).is_ok());
        for (change, expected) in [
            ((|t| t.dtype = "I32".to_owned()) as fn(&mut Tensor), "type"),
            (|t| t.shape = vec![1, 2], "shape"),
            (|t| t.start += 1, "place"),
            (|t| t.end += 1, "place"),
        ] {
            assert!(
                matches!(changed(change), Err(E::Differs { what, .. }) if what == expected),
                "{expected}"
            );
        }
        assert!(matches!(
            changed(|t| t.name = "x".to_owned()),
            Err(E::Missing(name)) if name == "x"
        ));
        assert!(matches!(
            changed(|t| t.name = METADATA.to_owned()),
            Err(E::Reserved)
        ));
        assert!(matches!(
            changed(|t| (t.start, t.end) = (t.end, t.start)),
            Err(E::Overlap(_))
        ));
        assert!(matches!(
            plan(&file, &[3], header),
            Err(E::NoTensor {
                index: 3,
                tensors: 3
            })
        ));
        assert!(matches!(
            plan(&file, &[1, 1], header),
            Err(E::Duplicate(name)) if name == "b"
        ));
        for given in [&[][..], &header[..5], &header[..header.len() - 1], &bytes] {
            assert!(matches!(
                plan(&file, &[1], given),
                Err(E::HeaderSize { .. })
            ));
        }
    }

    #[test]
    fn tensors_that_share_bytes_are_refused() {
        let file = file_of(
            "m.gguf",
            100,
            vec![
                tensor("a", "Q8_0", &[100], 0..100),
                tensor("b", "Q8_0", &[100], 0..100),
                tensor("c", "F32", &[2], 8..12),
                tensor("d", "F32", &[1 << 63, 2], 8..12),
                tensor("e", "I8", &[0], 50..50),
                tensor("f", "I8", &[50], 50..100),
            ],
        );
        assert!(plan(&file, &[0], &[]).is_ok());
        assert!(plan(&file, &[5, 4], &[]).is_ok());
        assert!(matches!(
            plan(&file, &[0, 1], &[]),
            Err(ExtractError::Overlap(_))
        ));
        for wrong in [2, 3] {
            assert!(matches!(
                plan(&file, &[wrong], &[]),
                Err(ExtractError::Size { present: 4, .. })
            ));
        }
    }

    /// Plans from a header of this JSON and a manifest that lists one tensor `a` of four bytes behind it.
    fn hostile(json: &[u8]) -> Result<Plan, ExtractError> {
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend_from_slice(json);
        let start = header.len() as u64;
        let entry = tensor("a", "F32", &[1], start..start + 4);
        plan(
            &file_of("m.safetensors", start + 4, vec![entry]),
            &[0],
            &header,
        )
    }

    #[test]
    fn malformed_headers_are_errors() {
        let good = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        assert!(hostile(good.as_bytes()).is_ok());
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let dimensions = vec!["1"; 33].join(",");
        let many = (0..=MAX_METADATA)
            .map(|i| format!(r#""{i}":"""#))
            .collect::<Vec<_>>()
            .join(",");
        for bad in [
            String::new(),
            "[]".to_owned(),
            "null".to_owned(),
            format!("{good} x"),
            format!(r#"{{"a":{entry},"a":{entry}}}"#),
            format!(r#"{{"__metadata__":{{}},"__metadata__":{{}},"a":{entry}}}"#),
            format!(r#"{{"__metadata__":{{"x":1}},"a":{entry}}}"#),
            format!(r#"{{"__metadata__":[],"a":{entry}}}"#),
            format!(r#"{{"__metadata__":{{{many}}},"a":{entry}}}"#),
            format!(r#"{{"a":{{"dtype":"F32","shape":[{dimensions}],"data_offsets":[0,4]}}}}"#),
            r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.to_owned(),
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#.to_owned(),
            r#"{"a":{"shape":[1],"data_offsets":[0,4]}}"#.to_owned(),
            "{\"x\":".to_owned() + &"[".repeat(100_000),
            "{\"a\":".to_owned() + &"[".repeat(100_000),
        ] {
            let result = hostile(bad.as_bytes());
            assert!(
                matches!(result, Err(ExtractError::Malformed(_))),
                "{bad:.100}: {result:?}"
            );
        }
        assert!(matches!(
            hostile(
                br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}}"#
            ),
            Err(ExtractError::Differs { what: "place", .. })
        ));
        assert!(matches!(hostile(b"{}"), Err(ExtractError::Missing(_))));
        assert!(
            hostile(format!(r#"{{"__metadata__":null,"a":{entry}}}"#).as_bytes())
                .is_ok_and(|plan| !plan.header().windows(4).any(|w| w == b"meta"))
        );
    }

    #[test]
    fn no_change_of_a_header_makes_planning_panic() {
        let mut random = Random(2);
        let data = [7; 15];
        let (bytes, file) = indexed(JSON, &data);
        let header = head(&bytes, &file);
        let mut refused = 0;
        for _ in 0..20_000 {
            let mut header = header.to_vec();
            for _ in 0..=random.below(3) {
                let at = random.below(header.len());
                header[at] = random.below(256) as u8;
            }
            match plan(&file, &[0, 1, 2], &header) {
                Ok(plan) => {
                    SafeTensors::deserialize(&written(&plan, &bytes)).unwrap();
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 10_000);
    }

    #[test]
    fn a_source_that_fails_ends_the_writing() {
        let (bytes, file) = indexed(JSON, &[0; 15]);
        let plan = plan(&file, &[0], head(&bytes, &file)).unwrap();
        let result = plan.write(
            |_, _| Err(io::Error::other("gone")),
            &tempfile::tempfile().unwrap(),
        );
        assert_eq!(result.unwrap_err().to_string(), "gone");
    }
}
