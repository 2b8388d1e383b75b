//! The header of a safetensors file.
//!
//! A safetensors file begins with a little-endian length of eight bytes and a JSON object. The tensors' bytes follow
//! without gaps. The object has one entry for each tensor, and `__metadata__`, a map of strings
//! (<https://github.com/huggingface/safetensors#format>). Entries are parsed one by one, so that a hostile header
//! cannot cause allocations of many times its own size.

use std::{collections::BTreeMap, fmt, fs::File, os::unix::fs::FileExt};

use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{
        self, Error as _, IntoDeserializer, MapAccess, SeqAccess, Visitor, value::StrDeserializer,
    },
};

use super::{HeaderError, TensorInfo, sorted_and_checked};
use crate::manifest::{MAX_DIMENSIONS, MAX_TENSORS};

/// The longest JSON read, in bytes: the limit of the format.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// The longest name of an element type, in bytes. The longest known name has eleven.
const MAX_DTYPE: usize = 64;

/// Size of the length field at the beginning of the file, in bytes.
const LENGTH: u64 = 8;

/// The parsed header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SafetensorsHeader {
    /// The tensors, by start, then name; byte ranges are relative to the file.
    pub tensors: Vec<TensorInfo>,
    /// The `__metadata__` map; empty if there is none.
    pub metadata: BTreeMap<String, String>,
    /// Offset at which the header ends and the tensors' bytes begin: 8 plus the length of the JSON with its padding.
    pub data_start: u64,
}

/// Parses the header of a safetensors file of `size` bytes. `header` is the beginning of the file, including the length
/// field. Bytes after the header are ignored.
///
/// # Errors
/// [`HeaderError::Incomplete`] if `header` ends too early, with the number of bytes needed. Other errors if the file is
/// not a safetensors file, or its tensors do not fill `size` bytes.
pub fn parse(header: &[u8], size: u64) -> Result<SafetensorsHeader, HeaderError> {
    let incomplete = |header_end| HeaderError::Incomplete {
        present: header.len() as u64,
        header_end,
    };
    let Some((length, json)) = header.split_first_chunk() else {
        return Err(if size < LENGTH {
            truncated(size, LENGTH)
        } else {
            incomplete(LENGTH)
        });
    };
    let data_start = data_start(*length, size)?;
    let json = json
        .get(..(data_start - LENGTH) as usize)
        .ok_or_else(|| incomplete(data_start))?;
    let Entries { tensors, metadata } = serde_json::from_slice(json)?;
    let tensors = byte_ranges(tensors, data_start, size)?;
    Ok(SafetensorsHeader {
        tensors: sorted_and_checked(tensors, size)?,
        metadata,
        data_start,
    })
}

/// Reads the header of the safetensors `file` of `size` bytes.
pub(super) fn read(file: &File, size: u64) -> Result<SafetensorsHeader, HeaderError> {
    if size < LENGTH {
        return Err(truncated(size, LENGTH));
    }
    let mut length = [0; LENGTH as usize];
    file.read_exact_at(&mut length, 0)?;
    // Bounded by the size of the file and the limit of the format.
    let mut header = vec![0; data_start(length, size)? as usize];
    file.read_exact_at(&mut header, 0)?;
    parse(&header, size)
}

fn truncated(size: u64, header_end: u64) -> HeaderError {
    HeaderError::Truncated { size, header_end }
}

/// Returns the offset at which a header with this length field ends.
fn data_start(length: [u8; LENGTH as usize], size: u64) -> Result<u64, HeaderError> {
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(HeaderError::TooLong {
            length,
            limit: MAX_HEADER,
        });
    }
    let data_start = LENGTH + length;
    if data_start > size {
        return Err(truncated(size, data_start));
    }
    Ok(data_start)
}

/// Determines the byte ranges of the tensors. Each range matches the tensor's shape and begins where another one ends,
/// and the last ends with the file.
fn byte_ranges(
    mut entries: Vec<(String, Entry)>,
    data_start: u64,
    size: u64,
) -> Result<Vec<TensorInfo>, HeaderError> {
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut at = 0;
    for (name, entry) in &entries {
        let refuse = |reason| Err(HeaderError::tensor(name, reason));
        let (start, end) = entry.data_offsets;
        if start != at || end < start {
            return refuse("its data does not begin where the data of the previous tensor ends");
        }
        let elements = entry
            .shape
            .0
            .iter()
            .try_fold(1, |n: u64, m| n.checked_mul(*m));
        // For an unknown type, the size given in the header is used.
        if let Some(bits) = entry.dtype.bits() {
            match elements.and_then(|n| n.checked_mul(bits)) {
                None => return refuse("its size overflows"),
                Some(bits) if !bits.is_multiple_of(8) || bits / 8 != end - start => {
                    return refuse("its range does not match its shape");
                }
                Some(_) => {}
            }
        }
        at = end;
    }
    if at != size - data_start {
        return Err(HeaderError::Length {
            described: at,
            present: size - data_start,
        });
    }
    Ok(entries
        .into_iter()
        .map(|(name, entry)| TensorInfo {
            name,
            dtype: entry.dtype.0,
            shape: entry.shape.0,
            start: data_start + entry.data_offsets.0,
            end: data_start + entry.data_offsets.1,
        })
        .collect())
}

struct Entries {
    tensors: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: TypeName,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// An element type as spelled in the file. It may be unknown: the offsets alone give the range of such a tensor.
struct TypeName(String);

impl TypeName {
    /// Returns the bits per element; `None` for an unknown type.
    fn bits(&self) -> Option<u64> {
        let name: StrDeserializer<'_, de::value::Error> = self.0.as_str().into_deserializer();
        let known = Dtype::deserialize(name).ok()?;
        Some(known.bitsize() as u64)
    }
}

impl<'de> Deserialize<'de> for TypeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        if name.len() > MAX_DTYPE {
            return Err(D::Error::invalid_length(
                name.len(),
                &"the name of a type of at most 64 bytes",
            ));
        }
        Ok(Self(name))
    }
}

struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;

        impl<'de> Visitor<'de> for Names {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                const METADATA: &str = "__metadata__";
                let mut tensors = Vec::new();
                let mut metadata: Option<Option<_>> = None;
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::duplicate_field(METADATA));
                        }
                    } else if tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_TENSORS} tensors"
                        )));
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(Entries {
                    tensors,
                    metadata: metadata.flatten().unwrap_or_default(),
                })
            }
        }

        deserializer.deserialize_map(Names)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Dimensions;

        impl<'de> Visitor<'de> for Dimensions {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_DIMENSIONS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dimension) = seq.next_element()? {
                    if shape.len() == MAX_DIMENSIONS {
                        return Err(A::Error::invalid_length(MAX_DIMENSIONS + 1, &self));
                    }
                    shape.push(dimension);
                }
                Ok(Shape(shape))
            }
        }

        deserializer.deserialize_seq(Dimensions)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn parse(header: &str, data: usize) -> Result<Vec<TensorInfo>, HeaderError> {
        parse_bytes(&file(header, data))
    }

    /// Parses from a file and from memory, and asserts that both agree.
    fn parse_bytes(bytes: &[u8]) -> Result<Vec<TensorInfo>, HeaderError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let size = bytes.len() as u64;
        let from_file = read(&file, size);
        let from_memory = super::parse(bytes, size);
        assert_eq!(format!("{from_file:?}"), format!("{from_memory:?}"));
        from_file.map(|header| header.tensors)
    }

    #[test]
    fn tensors_are_listed_with_ranges_within_the_file() {
        let header = concat!(
            r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},"#,
            r#""a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#
        );
        let start = 8 + header.len() as u64;
        let tensors = parse(header, 20).unwrap();
        assert_eq!(tensors.len(), 2);
        assert_eq!(
            (
                tensors[0].name.as_str(),
                tensors[0].dtype.as_str(),
                tensors[0].start,
                tensors[0].end
            ),
            ("a", "BF16", start, start + 4)
        );
        assert_eq!(tensors[1].shape, [2, 2]);
        assert_eq!((tensors[1].start, tensors[1].end), (start + 4, start + 20));
    }

    #[test]
    fn empty_tensors_may_lie_where_others_begin() {
        let header = concat!(
            r#"{"z":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},"#,
            r#""a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"#,
            r#""y":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},"#,
            r#""s":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}"#
        );
        let tensors = parse(header, 5).unwrap();
        let names: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["a", "z", "s", "y"]);
    }

    #[test]
    fn the_offsets_give_the_ranges_of_tensors_of_unknown_types() {
        for (dtype, shape) in [
            ("F4_E3M0", "[16]"),
            ("float32", "[2]"),
            ("U4", "[3,5]"),
            ("C128", "[1]"),
            ("", "[]"),
        ] {
            let header = format!(
                concat!(
                    r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,8]}},"#,
                    r#""x":{{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}}}"#
                ),
                dtype = dtype,
                shape = shape
            );
            let tensors = parse(&header, 12).unwrap();
            assert_eq!(tensors[0].dtype, dtype);
            assert_eq!(tensors[0].end - tensors[0].start, 8);
            // The tensors must still fill the file.
            assert!(parse(&header, 13).is_err() && parse(&header, 11).is_err());
        }
    }

    #[test]
    fn a_header_in_memory_is_read_with_its_metadata_and_a_short_one_reports_the_bytes_needed() {
        let bytes = file(
            concat!(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
                r#""__metadata__":{"format":"pt","b":"c"}}   "#
            ),
            8,
        );
        let size = bytes.len() as u64;
        let whole = super::parse(&bytes, size).unwrap();
        assert_eq!(whole.data_start, size - 8);
        assert_eq!(whole.metadata["format"], "pt");
        assert_eq!(whole.metadata.len(), 2);
        assert_eq!(
            super::parse(&bytes[..bytes.len() - 8], size).unwrap(),
            whole
        );
        for present in 0..bytes.len() - 8 {
            let needed = match super::parse(&bytes[..present], size) {
                Err(HeaderError::Incomplete { header_end, .. }) => header_end,
                other => panic!("{present}: {other:?}"),
            };
            assert_eq!(needed, if present < 8 { 8 } else { size - 8 });
        }
        let none = super::parse(&file("{}", 0), 10).unwrap();
        assert_eq!((none.tensors.len(), none.metadata.len()), (0, 0));
    }

    #[test]
    fn truncated_and_hostile_headers_are_errors() {
        assert!(matches!(
            parse_bytes(b""),
            Err(HeaderError::Truncated { .. })
        ));
        assert!(matches!(
            parse_bytes(b"1234567"),
            Err(HeaderError::Truncated { .. })
        ));
        assert!(matches!(
            parse_bytes(&[50, 0, 0, 0, 0, 0, 0, 0, b'{']),
            Err(HeaderError::Truncated { .. })
        ));
        assert!(matches!(
            parse_bytes(&[0xff; 64]),
            Err(HeaderError::TooLong { .. })
        ));
        let many = "1,".repeat(MAX_DIMENSIONS);
        for bad in [
            "not json",
            "[]",
            "{} {}",
            r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#,
            &format!(
                r#"{{"a":{{"dtype":"{}","shape":[2],"data_offsets":[0,8]}}}}"#,
                "N".repeat(65)
            ),
            r#"{"a":{"dtype":5,"shape":[2],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2]}}"#,
            r#"{"__metadata__":{"a":1}}"#,
            r#"{"__metadata__":{},"__metadata__":{}}"#,
            &format!(r#"{{"a":{{"dtype":"U8","shape":[{many}8],"data_offsets":[0,8]}}}}"#),
            &"[".repeat(100_000),
            &format!(r#"{{"a":{}"#, "[".repeat(100_000)),
        ] {
            assert!(
                matches!(parse(bad, 8), Err(HeaderError::Malformed(_))),
                "{bad}"
            );
        }
        let whole = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(parse(whole, 8).is_ok());
        assert!(matches!(parse(whole, 7), Err(HeaderError::Length { .. })));
        assert!(matches!(parse(whole, 9), Err(HeaderError::Length { .. })));
        let long = "n".repeat(1025);
        for bad in [
            // ranges that overlap, leave a gap, run backwards, or do not match the shape
            concat!(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"#,
                r#""b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#
            ),
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F4","shape":[15],"data_offsets":[0,8]}}"#,
            // a shape whose product overflows
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#,
            // a name that occurs twice, and one that no manifest allows
            concat!(
                r#"{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"#,
                r#""a":{"dtype":"I8","shape":[4],"data_offsets":[4,8]}}"#
            ),
            &format!(r#"{{"{long}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#),
        ] {
            assert!(
                matches!(parse(bad, 8), Err(HeaderError::Tensor { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn mutated_and_truncated_headers_never_panic() {
        let bytes = file(
            concat!(
                r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},"#,
                r#""a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#
            ),
            20,
        );
        for at in 0..bytes.len() {
            assert!(super::parse(&bytes[..at], at as u64).is_err());
            for value in [0, 1, b'"', b'9', b'}', 0x7f, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] = value;
                if let Ok(header) = super::parse(&bad, bad.len() as u64) {
                    assert!(header.tensors.iter().all(|t| t.end <= bad.len() as u64));
                }
            }
        }
    }
}
