//! The header of a GGUF file.
//!
//! A GGUF file begins with `GGUF`, a version, and the numbers of tensors and metadata pairs. The pairs follow, each a
//! key, a type and a value; then one entry for each tensor, and padding up to the alignment. The tensors' bytes follow,
//! each at an offset from that point. Integers are little-endian; strings are preceded by a length of eight bytes
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! Of the metadata, only the alignment matters here. The rest may be megabytes of vocabulary. It is skipped with reads
//! of [`BUFFER`] bytes, and nothing is allocated for it.

use std::{collections::BTreeSet, fs::File, os::unix::fs::FileExt};

use super::{HeaderError, TensorInfo, sorted_and_checked};
use crate::manifest::{MAX_TENSOR_NAME, MAX_TENSORS};

/// The longest header read, in bytes. A vocabulary of a quarter of a million words takes some 10 MB.
const MAX_HEADER: u64 = 256 * 1024 * 1024;

/// Bytes read at a time.
const BUFFER: u64 = 64 * 1024;

/// The deepest nesting of arrays that is skipped; each level is a call on the stack. Real files have one level.
const MAX_DEPTH: usize = 4;

/// The most dimensions of a tensor. Programs that read GGUF support four; the format has no limit.
const MAX_DIMENSIONS: u32 = 8;

/// The alignment of a file that does not specify one.
const DEFAULT_ALIGNMENT: u64 = 32;

const ALIGNMENT_KEY: &[u8] = b"general.alignment";

/// The metadata type of a `uint32`.
const UINT32: u32 = 4;

/// The metadata type of a string.
const STRING: u32 = 8;

/// The metadata type of an array.
const ARRAY: u32 = 9;

/// The smallest metadata pair, in bytes: the length of an empty key, a type, a value.
const MIN_PAIR: u64 = 8 + 4 + 1;

/// The smallest tensor entry, in bytes: the length of an empty name, the number of dimensions, a type, an offset.
const MIN_TENSOR: u64 = 8 + 4 + 4 + 8;

/// The ggml types: number, name, elements per block, bytes per block (`enum ggml_type` in `ggml.h`, blocks in
/// `ggml-common.h`). Missing numbers belonged to types that were removed.
const TYPES: [(u32, &str, u64, u64); 35] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
    (42, "Q2_0", 64, 18),
];

/// Reads the tensors of the GGUF `file` of `size` bytes.
pub(super) fn read(file: &File, size: u64) -> Result<Vec<TensorInfo>, HeaderError> {
    let mut reader = Reader::new(file, size);
    if reader.array()? != *b"GGUF" {
        return Err(HeaderError::Magic);
    }
    match reader.u32()? {
        2 | 3 => {}
        // A small number in the other byte order.
        version if version != 0 && version & 0xffff == 0 => return Err(HeaderError::BigEndian),
        version => return Err(HeaderError::Version(version)),
    }
    let tensors = reader.u64()?;
    if tensors > MAX_TENSORS as u64 {
        return Err(HeaderError::TooMany(tensors));
    }
    let pairs = reader.count(MIN_PAIR)?;
    let alignment = metadata(&mut reader, pairs)?;
    reader.require(tensors.saturating_mul(MIN_TENSOR))?;
    // The list grows with the entries present, not with the claimed number.
    let mut entries = Vec::new();
    for _ in 0..tensors {
        entries.push(Entry::read(&mut reader)?);
    }
    let data_start = reader.position().next_multiple_of(alignment);
    // A file with only metadata need not be padded.
    if tensors > 0 && data_start > size {
        return Err(HeaderError::Truncated {
            size,
            header_end: data_start,
        });
    }
    byte_ranges(entries, data_start, size)
}

/// Skips the metadata, and returns the alignment.
fn metadata(reader: &mut Reader<'_>, pairs: u64) -> Result<u64, HeaderError> {
    let mut alignment = None;
    for _ in 0..pairs {
        let length = reader.u64()?;
        let is_alignment = if length == ALIGNMENT_KEY.len() as u64 {
            reader.bytes(length)? == ALIGNMENT_KEY
        } else {
            reader.skip(length)?;
            false
        };
        let kind = reader.u32()?;
        if !is_alignment {
            skip_value(reader, kind, 0)?;
            continue;
        }
        if kind != UINT32 {
            return Err(reader.refuse("general.alignment is not a uint32"));
        }
        let value = reader.u32()?;
        if !value.is_power_of_two() {
            return Err(reader.refuse("general.alignment is not a power of two"));
        }
        // Readers would differ in which of two values they use.
        if alignment.replace(u64::from(value)).is_some() {
            return Err(reader.refuse("general.alignment occurs twice"));
        }
    }
    Ok(alignment.unwrap_or(DEFAULT_ALIGNMENT))
}

/// Returns the size of a metadata value, in bytes, if its type determines it.
fn fixed_size(kind: u32) -> Option<u64> {
    match kind {
        // uint8, int8, bool
        0 | 1 | 7 => Some(1),
        // uint16, int16
        2 | 3 => Some(2),
        // uint32, int32, float32
        UINT32 | 5 | 6 => Some(4),
        // uint64, int64, float64
        10..=12 => Some(8),
        _ => None,
    }
}

fn skip_value(reader: &mut Reader<'_>, kind: u32, depth: usize) -> Result<(), HeaderError> {
    match kind {
        STRING => {
            let length = reader.u64()?;
            reader.skip(length)
        }
        ARRAY => {
            if depth == MAX_DEPTH {
                return Err(reader.refuse("arrays are nested more than 4 levels deep"));
            }
            let kind = reader.u32()?;
            // A string has at least a length; an array also has a type.
            let least = match (fixed_size(kind), kind) {
                (Some(size), _) => {
                    let elements = reader.u64()?;
                    return reader.skip(elements.saturating_mul(size));
                }
                (None, STRING) => 8,
                (None, ARRAY) => 12,
                (None, _) => {
                    return Err(reader.refuse("the elements of an array have an unknown type"));
                }
            };
            for _ in 0..reader.count(least)? {
                skip_value(reader, kind, depth + 1)?;
            }
            Ok(())
        }
        _ => match fixed_size(kind) {
            Some(size) => reader.skip(size),
            None => Err(reader.refuse("a value has an unknown type")),
        },
    }
}

struct Entry {
    name: String,
    kind: u32,
    /// Dimensions, outermost first.
    shape: Vec<u64>,
    /// Offset from the beginning of the data, in bytes.
    offset: u64,
}

impl Entry {
    fn read(reader: &mut Reader<'_>) -> Result<Self, HeaderError> {
        let length = reader.u64()?;
        if length > MAX_TENSOR_NAME as u64 {
            return Err(reader.refuse("a tensor's name is longer than 1024 bytes"));
        }
        let name = String::from_utf8(reader.bytes(length)?)
            .map_err(|_| reader.refuse("a tensor's name is not UTF-8"))?;
        let dimensions = reader.u32()?;
        if dimensions > MAX_DIMENSIONS {
            return Err(HeaderError::tensor(&name, "it has more than 8 dimensions"));
        }
        // The file has the innermost dimension first.
        let mut shape = (0..dimensions)
            .map(|_| reader.u64())
            .collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        Ok(Self {
            name,
            kind: reader.u32()?,
            shape,
            offset: reader.u64()?,
        })
    }

    /// Returns the number of elements; `None` if it overflows.
    fn elements(&self) -> Option<u64> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        self.shape.iter().try_fold(1, |n: u64, m| n.checked_mul(*m))
    }

    /// Returns true if each row is a whole number of blocks.
    fn has_whole_rows(&self, block: u64) -> bool {
        self.shape.last().unwrap_or(&1).is_multiple_of(block)
    }

    /// Returns the length of the elements, in bytes. Rows must be whole numbers of blocks.
    fn length(&self, elements: u64, block: u64, bytes: u64) -> Result<u64, HeaderError> {
        (elements / block)
            .checked_mul(bytes)
            .ok_or_else(|| HeaderError::tensor(&self.name, "its size overflows"))
    }
}

/// An entry of [`TYPES`].
type Known = (u32, &'static str, u64, u64);

/// Returns the known types whose lengths contradict the offsets in this file: a fork of ggml uses these numbers for
/// other types.
fn contradicted(entries: &[Entry], offsets: &[u64]) -> BTreeSet<u32> {
    let wrong = entries.iter().filter(|entry| {
        let (Some(known), Some(elements)) = (known(entry.kind), entry.elements()) else {
            return false;
        };
        if elements == 0 {
            return false;
        }
        let (_, _, block, bytes) = known;
        if !entry.has_whole_rows(block) {
            return true;
        }
        let length = entry.length(elements, block, bytes);
        let room = next_offset(offsets, entry.offset).map(|next| next - entry.offset);
        matches!((length, room), (Ok(length), Some(room)) if length > room)
    });
    wrong.map(|entry| entry.kind).collect()
}

fn known(kind: u32) -> Option<Known> {
    TYPES.into_iter().find(|(known, ..)| *known == kind)
}

/// Returns the first of the sorted `offsets` that is greater than `offset`.
fn next_offset(offsets: &[u64], offset: u64) -> Option<u64> {
    let next = offsets.partition_point(|other| *other <= offset);
    offsets.get(next).copied()
}

/// Determines the byte ranges of the tensors. A tensor of an unknown type, or of a type that means something else in
/// this file, ends where the next tensor begins, or at the end of the file.
fn byte_ranges(
    entries: Vec<Entry>,
    data_start: u64,
    size: u64,
) -> Result<Vec<TensorInfo>, HeaderError> {
    let mut offsets: Vec<u64> = entries.iter().map(|entry| entry.offset).collect();
    offsets.sort_unstable();
    let contradicted = contradicted(&entries, &offsets);
    let tensors = entries
        .into_iter()
        .map(|entry| {
            let overflow = || HeaderError::tensor(&entry.name, "its size overflows");
            let elements = entry.elements().ok_or_else(overflow)?;
            let start = data_start.checked_add(entry.offset).ok_or_else(overflow)?;
            let known = known(entry.kind).filter(|_| !contradicted.contains(&entry.kind));
            let end = if let Some((_, _, block, bytes)) = known {
                let length = entry.length(elements, block, bytes)?;
                start.checked_add(length).ok_or_else(overflow)?
            } else if elements == 0 {
                start
            } else {
                match next_offset(&offsets, entry.offset) {
                    Some(next) => data_start.checked_add(next).ok_or_else(overflow)?,
                    None => size,
                }
            };
            Ok(TensorInfo {
                dtype: known.map_or_else(
                    || format!("ggml-{}", entry.kind),
                    |(_, name, ..)| name.to_owned(),
                ),
                name: entry.name,
                shape: entry.shape,
                start,
                end,
            })
        })
        .collect::<Result<_, HeaderError>>()?;
    sorted_and_checked(tensors, size)
}

/// Reads a header from its beginning, within the file and [`MAX_HEADER`].
struct Reader<'a> {
    file: &'a File,
    size: u64,
    buffer: Vec<u8>,
    /// Number of bytes of the buffer that were read.
    used: usize,
    /// Offset in the file at which the buffer ends.
    buffered: u64,
}

impl<'a> Reader<'a> {
    fn new(file: &'a File, size: u64) -> Self {
        Self {
            file,
            size,
            buffer: Vec::new(),
            used: 0,
            buffered: 0,
        }
    }

    fn position(&self) -> u64 {
        self.buffered - (self.buffer.len() - self.used) as u64
    }

    fn refuse(&self, reason: &'static str) -> HeaderError {
        HeaderError::Field {
            at: self.position(),
            reason,
        }
    }

    /// Checks that `n` more bytes can be part of the header.
    fn require(&self, n: u64) -> Result<(), HeaderError> {
        let end = self.position().saturating_add(n);
        if end > self.size {
            return Err(HeaderError::Truncated {
                size: self.size,
                header_end: end,
            });
        }
        if end > MAX_HEADER {
            return Err(HeaderError::TooLong {
                length: end,
                limit: MAX_HEADER,
            });
        }
        Ok(())
    }

    fn skip(&mut self, n: u64) -> Result<(), HeaderError> {
        self.require(n)?;
        let left = (self.buffer.len() - self.used) as u64;
        if n <= left {
            self.used += n as usize;
        } else {
            self.buffered += n - left;
            self.buffer.clear();
            self.used = 0;
        }
        Ok(())
    }

    fn fill(&mut self, mut into: &mut [u8]) -> Result<(), HeaderError> {
        self.require(into.len() as u64)?;
        while !into.is_empty() {
            if self.used == self.buffer.len() {
                let size = BUFFER.min(self.size - self.buffered);
                self.buffer.resize(size as usize, 0);
                // If filling the buffer fails, none of it is used.
                self.used = self.buffer.len();
                self.file.read_exact_at(&mut self.buffer, self.buffered)?;
                self.used = 0;
                self.buffered += size;
            }
            let n = into.len().min(self.buffer.len() - self.used);
            let (now, later) = into.split_at_mut(n);
            now.copy_from_slice(&self.buffer[self.used..self.used + n]);
            self.used += n;
            into = later;
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, HeaderError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads the number of elements that take at least `least` bytes each.
    fn count(&mut self, least: u64) -> Result<u64, HeaderError> {
        let count = self.u64()?;
        self.require(count.saturating_mul(least))?;
        Ok(count)
    }

    /// Reads `n` bytes; the caller has bounded `n`.
    fn bytes(&mut self, n: u64) -> Result<Vec<u8>, HeaderError> {
        self.require(n)?;
        let mut bytes = vec![0; n as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A GGUF file under construction.
    struct Gguf {
        version: u32,
        pairs: Vec<Vec<u8>>,
        tensors: Vec<Vec<u8>>,
        alignment: usize,
        data: usize,
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        [&string(key)[..], &kind.to_le_bytes(), value].concat()
    }

    fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), elements].concat()
    }

    /// Encodes a tensor entry. `shape` is innermost first, as in the file.
    fn tensor(name: &str, shape: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = string(name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    impl Gguf {
        fn new(data: usize, tensors: Vec<Vec<u8>>) -> Self {
            Self {
                version: 3,
                pairs: vec![],
                tensors,
                alignment: 32,
                data,
            }
        }

        fn with(mut self, pair: Vec<u8>) -> Self {
            self.pairs.push(pair);
            self
        }

        /// Returns the file, and the offset at which its data begins.
        fn bytes(&self) -> (Vec<u8>, u64) {
            let mut bytes = b"GGUF".to_vec();
            bytes.extend(self.version.to_le_bytes());
            bytes.extend((self.tensors.len() as u64).to_le_bytes());
            bytes.extend((self.pairs.len() as u64).to_le_bytes());
            bytes.extend(self.pairs.concat());
            bytes.extend(self.tensors.concat());
            let start = bytes.len().next_multiple_of(self.alignment);
            bytes.resize(start + self.data, 7);
            (bytes, start as u64)
        }

        fn parse(&self) -> Result<Vec<TensorInfo>, HeaderError> {
            parse(&self.bytes().0)
        }
    }

    fn parse(bytes: &[u8]) -> Result<Vec<TensorInfo>, HeaderError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(&file, bytes.len() as u64)
    }

    /// Adds metadata of every type.
    fn rich(gguf: Gguf) -> Gguf {
        let words = [string("a"), string(""), string("word")].concat();
        let nested = array(
            9,
            2,
            &[array(0, 3, &[1, 2, 3]), array(8, 3, &words)].concat(),
        );
        [
            (0, vec![1]),
            (1, vec![1]),
            (2, vec![1; 2]),
            (3, vec![1; 2]),
            (4, vec![1; 4]),
            (5, vec![1; 4]),
            (6, vec![1; 4]),
            (7, vec![1]),
            (8, string("text")),
            (9, array(8, 3, &words)),
            (9, array(4, 2, &[0; 8])),
            (9, nested),
            (9, array(12, 0, &[])),
            (10, vec![1; 8]),
            (11, vec![1; 8]),
            (12, vec![1; 8]),
        ]
        .into_iter()
        .enumerate()
        .fold(gguf, |gguf, (i, (kind, value))| {
            gguf.with(pair(&format!("key.{i}"), kind, &value))
        })
    }

    #[test]
    fn tensors_are_listed_by_offset_with_shapes_outermost_first() {
        for version in [2, 3] {
            let mut gguf = rich(Gguf::new(
                192 + 24,
                vec![
                    tensor("z", &[64, 2], 2, 0),
                    tensor("bias", &[3, 1, 2], 0, 192),
                    tensor("half", &[16], 1, 96),
                    tensor("scalar", &[], 30, 128),
                    tensor("none", &[0, 7], 12, 192),
                ],
            ));
            gguf.version = version;
            let (bytes, start) = gguf.bytes();
            let tensors = parse(&bytes).unwrap();
            let listed: Vec<_> = tensors
                .iter()
                .map(|t| {
                    let range = t.start - start..t.end - start;
                    (t.name.as_str(), t.dtype.as_str(), t.shape.as_slice(), range)
                })
                .collect();
            assert_eq!(
                listed,
                [
                    ("z", "Q4_0", &[2, 64][..], 0..72),
                    ("half", "F16", &[16], 96..128),
                    ("scalar", "BF16", &[], 128..130),
                    ("bias", "F32", &[2, 1, 3], 192..216),
                    ("none", "Q4_K", &[7, 0], 192..192),
                ]
            );
        }
    }

    #[test]
    fn the_alignment_given_in_the_file_is_used() {
        let alignment = |value: u32| pair("general.alignment", 4, &value.to_le_bytes());
        for value in [1, 8, 64, 4096] {
            let mut gguf = Gguf::new(4, vec![tensor("a", &[4], 24, 0)]).with(alignment(value));
            gguf.alignment = value as usize;
            let (bytes, start) = gguf.bytes();
            let tensors = parse(&bytes).unwrap();
            assert_eq!((tensors[0].start, tensors[0].end), (start, start + 4));
        }
        for bad in [
            alignment(0),
            alignment(48),
            pair("general.alignment", 10, &[0; 8]),
            pair("general.alignment", 8, &string("32")),
        ] {
            let gguf = Gguf::new(4, vec![tensor("a", &[4], 24, 0)]).with(bad);
            assert!(matches!(gguf.parse(), Err(HeaderError::Field { .. })));
        }
        let twice = Gguf::new(4, vec![]).with(alignment(32)).with(alignment(64));
        assert!(matches!(twice.parse(), Err(HeaderError::Field { .. })));
    }

    #[test]
    fn a_file_of_metadata_alone_need_not_be_padded() {
        let mut gguf = rich(Gguf::new(0, vec![]));
        gguf.alignment = 1;
        let (bytes, end) = gguf.bytes();
        assert_ne!(end % 32, 0);
        assert_eq!(parse(&bytes).unwrap(), []);
        assert!(matches!(
            parse(&bytes[..bytes.len() - 1]),
            Err(HeaderError::Truncated { .. })
        ));
    }

    #[test]
    fn a_tensor_of_an_unknown_type_ends_where_the_next_begins() {
        let (bytes, start) = Gguf::new(
            200,
            vec![
                tensor("last", &[5], 1000, 128),
                tensor("first", &[1 << 40], 36, 0),
                tensor("known", &[8], 0, 64),
                tensor("none", &[0], 1000, 64),
            ],
        )
        .bytes();
        let tensors = parse(&bytes).unwrap();
        let listed: Vec<_> = tensors
            .iter()
            .map(|t| {
                (
                    t.name.as_str(),
                    t.dtype.as_str(),
                    t.start - start..t.end - start,
                )
            })
            .collect();
        assert_eq!(
            listed,
            [
                ("first", "ggml-36", 0..64),
                ("known", "F32", 64..96),
                ("none", "ggml-1000", 64..64),
                ("last", "ggml-1000", 128..200),
            ]
        );
        let at_the_same_place = Gguf::new(
            64,
            vec![tensor("a", &[8], 1000, 0), tensor("b", &[8], 0, 0)],
        );
        assert!(matches!(
            at_the_same_place.parse(),
            Err(HeaderError::Tensor { .. })
        ));
    }

    #[test]
    fn a_type_whose_length_contradicts_the_offsets_counts_as_unknown() {
        // 39 is MXFP4 here, with 17 bytes for 32 elements; a fork uses 39 for a type of two bits per element.
        let fork = vec![
            tensor("a", &[256], 39, 0),
            tensor("b", &[256], 39, 64),
            tensor("c", &[8], 0, 128),
        ];
        let (bytes, start) = Gguf::new(160, fork).bytes();
        let tensors = parse(&bytes).unwrap();
        let listed: Vec<_> = tensors
            .iter()
            .map(|t| (t.dtype.as_str(), t.start - start..t.end - start))
            .collect();
        let expected = [("ggml-39", 0..64), ("ggml-39", 64..128), ("F32", 128..160)];
        assert_eq!(listed, expected);
        // The rows are not whole numbers of blocks.
        let (bytes, start) = Gguf::new(64, vec![tensor("a", &[33], 2, 0)]).bytes();
        let tensors = parse(&bytes).unwrap();
        assert_eq!((&*tensors[0].dtype, tensors[0].end), ("ggml-2", start + 64));
    }

    #[test]
    fn other_formats_versions_and_byte_orders_are_reported() {
        let good = Gguf::new(4, vec![tensor("a", &[4], 24, 0)]);
        let (bytes, _) = good.bytes();
        let with_version = |version: [u8; 4]| {
            let mut bytes = bytes.clone();
            bytes[4..8].copy_from_slice(&version);
            parse(&bytes)
        };
        assert!(with_version([3, 0, 0, 0]).is_ok());
        assert!(matches!(
            with_version([0, 0, 0, 3]),
            Err(HeaderError::BigEndian)
        ));
        for version in [0_u32, 1, 4] {
            assert!(matches!(
                with_version(version.to_le_bytes()),
                Err(HeaderError::Version(found)) if found == version
            ));
        }
        assert!(matches!(parse(&[b'x'; 100]), Err(HeaderError::Magic)));
    }

    #[test]
    fn truncated_and_hostile_headers_are_errors() {
        for cut in [&b""[..], b"GG", b"GGUF", b"GGUF\x03\0\0\0"] {
            assert!(matches!(parse(cut), Err(HeaderError::Truncated { .. })));
        }
        let huge = u64::MAX.to_le_bytes();
        let one = || vec![tensor("a", &[4], 24, 0)];
        // Counts and lengths that exceed any file.
        let mut pairs = Gguf::new(4, one()).bytes().0;
        pairs[16..24].copy_from_slice(&huge);
        assert!(matches!(parse(&pairs), Err(HeaderError::Truncated { .. })));
        let mut tensors = Gguf::new(4, one()).bytes().0;
        tensors[8..16].copy_from_slice(&huge);
        assert!(matches!(parse(&tensors), Err(HeaderError::TooMany(_))));
        tensors[8..16].copy_from_slice(&(MAX_TENSORS as u64).to_le_bytes());
        assert!(matches!(
            parse(&tensors),
            Err(HeaderError::Truncated { .. })
        ));
        let deep = (0..1000).fold(vec![1], |inner, i| {
            array(if i == 0 { 0 } else { 9 }, 1, &inner)
        });
        for (bad, truncated) in [
            (pair("k", 8, &huge), true),
            (pair("k", 9, &array(0, u64::MAX, &[])), true),
            (pair("k", 9, &array(12, 1 << 61, &[])), true),
            (pair("k", 9, &array(8, 1 << 61, &[])), true),
            (pair("k", 9, &array(9, 1 << 61, &[])), true),
            (pair("k", 9, &array(13, 0, &[])), false),
            (pair("k", 13, &[0; 8]), false),
            (pair("k", 9, &deep), false),
        ] {
            match Gguf::new(4, one()).with(bad).parse() {
                Err(HeaderError::Truncated { .. }) => assert!(truncated),
                Err(HeaderError::Field { .. }) => assert!(!truncated),
                other => panic!("{other:?}"),
            }
        }
        let long = "n".repeat(1025);
        for bad in [
            // outside the file, at its end and by an overflow
            vec![tensor("a", &[65], 24, 0)],
            vec![tensor("a", &[1], 24, 64)],
            vec![tensor("a", &[4], 24, u64::MAX)],
            vec![tensor("a", &[4], 24, u64::MAX - 200)],
            vec![tensor("a", &[4], 1000, 65)],
            vec![tensor("a", &[0], 24, 65)],
            // a product that overflows, in elements and in bytes
            vec![tensor("a", &[1 << 32, 1 << 32, 1 << 32], 24, 0)],
            vec![tensor("a", &[1 << 62], 0, 0)],
            // overlapping, the same name, a name that is too long, too many dimensions
            vec![tensor("a", &[40], 24, 0), tensor("b", &[4], 24, 0)],
            vec![tensor("a", &[4], 24, 0), tensor("a", &[4], 24, 32)],
            vec![tensor(&long, &[4], 24, 0)],
            vec![tensor("a", &[1; 9], 24, 0)],
        ] {
            let got = Gguf::new(64, bad).parse();
            assert!(
                matches!(
                    got,
                    Err(HeaderError::Tensor { .. } | HeaderError::Field { .. })
                ),
                "{got:?}"
            );
        }
        assert!(
            Gguf::new(64, vec![tensor("a", &[1; 8], 24, 0)])
                .parse()
                .is_ok()
        );
        // The name is not UTF-8.
        let mut bytes = Gguf::new(4, one()).bytes().0;
        bytes[32] = 0xff;
        assert!(matches!(parse(&bytes), Err(HeaderError::Field { .. })));
    }

    #[test]
    fn a_header_over_the_limit_is_refused_without_being_read() {
        let file = tempfile::tempfile().unwrap();
        let size = 4 * MAX_HEADER;
        file.set_len(size).unwrap();
        let (bytes, _) = Gguf::new(0, vec![])
            .with(pair("k", 9, &array(0, MAX_HEADER, &[])))
            .bytes();
        file.write_all_at(&bytes, 0).unwrap();
        assert!(matches!(
            read(&file, size),
            Err(HeaderError::TooLong { .. })
        ));
    }

    #[test]
    fn strings_longer_than_the_buffer_and_across_its_end_are_skipped() {
        for length in [0, 1, BUFFER as usize - 60, BUFFER as usize, 300_000] {
            let words = string(&"w".repeat(length)).repeat(3);
            let (bytes, start) = Gguf::new(4, vec![tensor("a", &[4], 24, 0)])
                .with(pair("k", 9, &array(8, 3, &words)))
                .bytes();
            assert_eq!(parse(&bytes).unwrap()[0].start, start, "{length}");
        }
    }

    #[test]
    fn mutated_and_truncated_headers_never_panic() {
        let (bytes, start) = rich(Gguf::new(
            96,
            vec![
                tensor("a", &[32, 2], 2, 0),
                tensor("b", &[3], 1000, 64),
                tensor("c", &[], 0, 92),
            ],
        ))
        .bytes();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for at in 0..bytes.len() {
            // Cut within the header, or with less data than it describes.
            let cut = read(&file, at as u64);
            assert!(cut.is_err() || at as u64 > start, "{at}: {cut:?}");
            for value in [0, 1, 8, 9, 0x7f, 0x80, 0xff] {
                file.write_all_at(&[value], at as u64).unwrap();
                if let Ok(tensors) = read(&file, bytes.len() as u64) {
                    assert!(tensors.iter().all(|t| t.end <= bytes.len() as u64));
                }
            }
            file.write_all_at(&bytes[at..=at], at as u64).unwrap();
        }
    }
}
