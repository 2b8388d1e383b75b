//! The header of a safetensors file: which tensor is where.
//!
//! Format: eight bytes of little-endian header length, a JSON object, then the tensors' bytes without gaps
//! (<https://github.com/huggingface/safetensors#format>). The `safetensors` crate checks the JSON; what is checked here is what it
//! leaves to its caller: that the length is sane before it is read, and that the data is as long as the file.

use std::{fs::File, os::unix::fs::FileExt};

use safetensors::tensor::Metadata;
use weft_proto::wire::ManifestTensor;

/// The longest header read, in bytes: the format's own limit.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// Why a file that claims to be safetensors is not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It is too short to hold the header it announces.
    #[error(
        "the file has {size} bytes and its header alone would end at {header_end}: it is truncated or no safetensors file"
    )]
    Truncated {
        /// The file's size in bytes.
        size: u64,
        /// Where the header would end.
        header_end: u64,
    },
    /// The header is longer than the format allows.
    #[error("the header claims {0} bytes; the limit is 100000000")]
    TooLong(u64),
    /// The header is not what the format says.
    #[error("the header is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The tensors do not fill the file exactly.
    #[error("the header describes {described} bytes of tensors and the file holds {present}")]
    Length {
        /// Bytes that the header's tensors take.
        described: u64,
        /// Bytes after the header.
        present: u64,
    },
    /// The file could not be read.
    #[error("cannot read the header: {0}")]
    Io(#[from] std::io::Error),
}

/// The tensors of the safetensors `file` of `size` bytes, by start, then name; byte ranges are within the file.
pub(crate) fn read(file: &File, size: u64) -> Result<Vec<ManifestTensor>, HeaderError> {
    if size < 8 {
        return Err(HeaderError::Truncated {
            size,
            header_end: 8,
        });
    }
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(HeaderError::TooLong(length));
    }
    let data_start = 8 + length;
    if data_start > size {
        return Err(HeaderError::Truncated {
            size,
            header_end: data_start,
        });
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8)?;
    let metadata: Metadata = serde_json::from_slice(&header)?;
    let described = metadata.data_len() as u64;
    if described != size - data_start {
        return Err(HeaderError::Length {
            described,
            present: size - data_start,
        });
    }
    let mut tensors: Vec<ManifestTensor> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| ManifestTensor {
            name,
            dtype: info.dtype.to_string(),
            shape: info.shape.iter().map(|n| *n as u64).collect(),
            start: data_start + info.data_offsets.0 as u64,
            end: data_start + info.data_offsets.1 as u64,
        })
        .collect();
    tensors.sort_by(|a, b| (a.start, &a.name).cmp(&(b.start, &b.name)));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn parse(header: &str, data: usize) -> Result<Vec<ManifestTensor>, HeaderError> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        parse_bytes(&bytes)
    }

    fn parse_bytes(bytes: &[u8]) -> Result<Vec<ManifestTensor>, HeaderError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        read(&file, bytes.len() as u64)
    }

    #[test]
    fn tensors_are_listed_with_ranges_within_the_file() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#;
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
            Err(HeaderError::TooLong(_))
        ));
        assert!(matches!(
            parse("not json", 0),
            Err(HeaderError::Malformed(_))
        ));
        assert!(matches!(parse("[]", 0), Err(HeaderError::Malformed(_))));
        let whole = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(parse(whole, 8).is_ok());
        assert!(matches!(parse(whole, 7), Err(HeaderError::Length { .. })));
        assert!(matches!(parse(whole, 9), Err(HeaderError::Length { .. })));
        for bad in [
            // ranges that overlap, leave a hole, run backwards, or do not match the shape
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
            r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
            // a shape whose product overflows
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"NOPE","shape":[2],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#,
        ] {
            assert!(
                matches!(parse(bad, 8), Err(HeaderError::Malformed(_))),
                "{bad}"
            );
        }
        let deep = "[".repeat(100_000);
        assert!(parse(&deep, 0).is_err());
    }
}
