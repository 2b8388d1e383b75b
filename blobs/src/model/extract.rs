//! Makes a safetensors file from some tensors of another file.
//!
//! [`plan`] determines, from the manifest and the source's header, how the result begins and which bytes are copied
//! where. [`Plan::write`] writes the result. The same selection gives the same bytes on every machine: the tensors have
//! the source's order, there are no gaps between them, and metadata keys are sorted.
//!
//! Manifests and headers come from strangers and may contradict each other. A result must be a valid file in which
//! every tensor equals the source's. So a plan is refused if manifest and header differ in anything about a chosen
//! tensor.

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

/// Bytes read and written at a time: 1 MiB. Larger pieces do not make a disk faster.
pub const PIECE: u64 = 1024 * 1024;

/// The most entries of a header's `__metadata__`. Files have a handful. A hostile header of 100 MB could have ten
/// million, which take a gigabyte as strings.
pub const MAX_METADATA: usize = 65_536;

/// The header key that is not a tensor name.
const METADATA: &str = "__metadata__";

/// The ggml types that safetensors has too, with the same names and the same bytes. All others are blocks of quantised
/// numbers.
const PLAIN: [&str; 8] = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"];

/// The file format of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// safetensors: the file's name ends in `.safetensors`.
    Safetensors,
    /// GGUF: every other file for which a manifest lists tensors, whatever its name.
    Gguf,
}

impl Format {
    /// Returns the format of the file at a manifest path.
    pub fn of(path: &str) -> Self {
        if path.ends_with(".safetensors") {
            Self::Safetensors
        } else {
            Self::Gguf
        }
    }
}

/// Returns the path of the result of a selection from the file at `path`. It is the same path for a safetensors file
/// and `x.safetensors` for `x.gguf`. Other names get `.safetensors` appended.
pub fn result_path(path: &str) -> String {
    match Format::of(path) {
        Format::Safetensors => path.to_owned(),
        Format::Gguf => format!("{}.safetensors", path.strip_suffix(".gguf").unwrap_or(path)),
    }
}

/// Returns the bytes of `file` that [`plan`] needs: the header for safetensors; nothing for GGUF, because the manifest
/// is enough.
pub fn header_range(file: &manifest::File) -> Range<u64> {
    match Format::of(&file.path) {
        Format::Gguf => 0..0,
        Format::Safetensors => {
            // Without tensor data, the header ends at the end of the file.
            let has_data = file.tensors.iter().any(|tensor| tensor.start < tensor.end);
            let starts = file.tensors.iter().map(|tensor| tensor.start);
            0..starts.min().filter(|_| has_data).unwrap_or(file.size)
        }
    }
}

/// A plan for writing a file of chosen tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    header: Vec<u8>,
    copies: Vec<Copy>,
    size: u64,
}

/// A range of the source and its offset in the result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Byte range in the source. Not empty.
    pub source: Range<u64>,
    /// Offset of the first byte in the result.
    pub to: u64,
}

/// The reason why a file cannot be made from the chosen tensors. Names in messages are cut after 200 characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExtractError {
    /// The file has no tensor with this index.
    #[error("there is no tensor {index}; the file has {tensors}")]
    NoTensor {
        /// The requested index.
        index: usize,
        /// Number of tensors in the file.
        tensors: usize,
    },
    /// Two chosen tensors have the same name, or one was chosen twice.
    #[error("two of the chosen tensors are named {0:?}")]
    Duplicate(String),
    /// A tensor has the name that the header uses for its metadata.
    #[error("a tensor is named `__metadata__`, which no safetensors file can hold")]
    Reserved,
    /// Two chosen tensors share bytes, or one ends before it starts.
    #[error("the byte range of {0:?} is invalid or overlaps another tensor")]
    Overlap(String),
    /// The given header does not have the announced length, or does not end where the first tensor starts.
    #[error(
        "the header has {given} bytes, but the manifest expects {expected} and the header itself announces {announced}"
    )]
    HeaderSize {
        /// Number of bytes given.
        given: u64,
        /// Offset at which the manifest's first tensor starts.
        expected: u64,
        /// The length that the header announces, including the eight bytes of the length field.
        announced: u64,
    },
    /// The header does not follow the format.
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
        /// The differing property.
        what: &'static str,
    },
    /// The tensor's type is not a safetensors type.
    #[error("the tensor {tensor:?} has the unknown type {dtype:?}")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The type of the tensor.
        dtype: String,
    },
    /// The size of a tensor does not match its type and shape.
    #[error("the tensor {tensor:?} has {present} bytes, which does not match its type and shape")]
    Size {
        /// The tensor.
        tensor: String,
        /// Its size in bytes.
        present: u64,
    },
    /// The header of the result would exceed the limit of the format.
    #[error("the header of the chosen tensors would have {0} bytes; the limit is 100000000")]
    TooLong(u64),
}

/// Returns the first 200 characters of a name that may have any length.
pub(crate) fn shown(name: &str) -> String {
    name.chars().take(200).collect()
}

/// Plans a file with the tensors of `file` whose indices are in `tensors`, in any order.
///
/// `header` is the source's bytes in [`header_range`]. Tensors from a safetensors file keep their type and shape, and
/// the result keeps the file's `__metadata__`. Tensors from a GGUF file keep their type and shape if safetensors has
/// the type. The others become `U8` of shape `[bytes]`; their type is in `__metadata__` at `gguf.dtype.<name>`, and
/// their shape, outermost dimension first, as a JSON array at `gguf.shape.<name>`.
///
/// # Errors
/// [`ExtractError`] if the selection is invalid, the header is malformed, or header and manifest disagree about a
/// chosen tensor.
pub fn plan(file: &manifest::File, tensors: &[usize], header: &[u8]) -> Result<Plan, ExtractError> {
    let chosen = choose(file, tensors)?;
    match Format::of(&file.path) {
        Format::Safetensors => from_safetensors(header_range(file).end, &chosen, header),
        Format::Gguf => from_gguf(&chosen),
    }
}

impl Plan {
    /// Returns the first bytes of the result: eight bytes of length, then JSON, then spaces up to a multiple of eight.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Returns the ranges that follow the header, in order and without gaps. Adjacent ranges of the source are one
    /// copy.
    pub fn copies(&self) -> &[Copy] {
        &self.copies
    }

    /// Returns the size of the result, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes the result to `destination`, which first loses its content and gets its final size. `source` fills a
    /// buffer of at most [`PIECE`] bytes from an offset of the source; for a file, use [`FileExt::read_exact_at`].
    ///
    /// Does not sync: the caller syncs the file before reporting it. Source and destination must be different files.
    ///
    /// # Errors
    /// An error of `source`, which ends the writing, or of the disk. The destination is incomplete then.
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

/// Returns the chosen tensors in the source's order, and checks that their ranges do not overlap.
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
    chosen.sort_by_key(|tensor| sort_key(tensor));
    let mut names = HashSet::with_capacity(chosen.len());
    let mut end = 0;
    for tensor in &chosen {
        if tensor.name == METADATA {
            return Err(ExtractError::Reserved);
        }
        if !names.insert(tensor.name.as_str()) {
            return Err(ExtractError::Duplicate(shown(&tensor.name)));
        }
        // Otherwise tensors that each cover the whole file would make a result larger than any disk.
        if tensor.start < end || tensor.end < tensor.start {
            return Err(ExtractError::Overlap(shown(&tensor.name)));
        }
        end = tensor.end;
    }
    Ok(chosen)
}

/// Returns the sort key of a file's tensors. An empty tensor comes before the tensor that starts at the same offset.
pub(crate) fn sort_key(tensor: &Tensor) -> (u64, u64, &str) {
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
            return differs("offset");
        }
        // An unknown type is left to the reader: the result describes the tensor as the source does.
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

/// Returns the tensor's element type; `None` if it is unknown.
fn dtype(tensor: &Tensor) -> Option<Dtype> {
    let name: StrDeserializer<'_, de::value::Error> = tensor.dtype.as_str().into_deserializer();
    Dtype::deserialize(name).ok()
}

/// Checks that type and shape match the tensor's size, as every safetensors reader does.
fn check_size(tensor: &Tensor) -> Result<(), ExtractError> {
    let dtype = dtype(tensor).ok_or_else(|| ExtractError::Dtype {
        tensor: shown(&tensor.name),
        dtype: shown(&tensor.dtype),
    })?;
    let present = tensor.end - tensor.start;
    // In the same steps as the reader, so that a shape that overflows there is refused here.
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

/// A chosen tensor as described in the result.
struct Described<'a> {
    tensor: &'a Tensor,
    dtype: &'a str,
    /// True if its shape in the result is its size in bytes, and not the shape in the source.
    as_bytes: bool,
}

impl Described<'_> {
    fn size(&self) -> u64 {
        self.tensor.end - self.tensor.start
    }
}

/// Lays out the tensors one after the other.
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
        // Tensors are disjoint and the header has a limit, so only a file of 2^64 bytes could overflow here.
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

/// The JSON header of the result.
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

/// The parts of a header that concern the chosen tensors.
struct Parsed {
    metadata: Option<BTreeMap<String, String>>,
    /// One entry for each chosen tensor.
    entries: Vec<Option<Entry>>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    #[serde(deserialize_with = "shape")]
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads only the needed parts of a header, so that memory is bounded by the number of chosen tensors.
struct HeaderSeed<'a> {
    /// Position of each chosen tensor, by name.
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
                // Some readers take the first of two entries and others the last, so they would disagree about the
                // content.
                if entries[*index].replace(map.next_value()?).is_some() {
                    return Err(de::Error::custom(format_args!(
                        "the tensor {:?} occurs twice",
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

/// Reads a shape of at most [`MAX_DIMENSIONS`] dimensions.
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
mod tests;
