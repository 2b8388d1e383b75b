//! Headers of weight files: the names, types, shapes and byte ranges of tensors.
//!
//! The modules `safetensors` and `gguf` implement one format each. Headers are checked against the same rules for
//! tensors as manifests, so that a file that can be read can be published.

mod gguf;
mod safetensors;

use std::{fmt, fs::File};

pub(crate) use self::safetensors::MAX_HEADER as MAX_SAFETENSORS_HEADER;
pub use self::safetensors::{SafetensorsHeader, parse as parse_safetensors};
use crate::manifest;

/// A format whose header can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// <https://github.com/huggingface/safetensors#format>.
    Safetensors,
    /// <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little endian.
    Gguf,
}

/// A tensor as described in the header of its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name of the tensor.
    pub name: String,
    /// Element type as spelled in the file; an unknown GGUF type is `ggml-` followed by its number.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// First byte within the file.
    pub start: u64,
    /// One past the last byte within the file.
    pub end: u64,
}

/// The reason why a file does not have the format that its name says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file is too short for the header it announces.
    #[error(
        "the file has {size} bytes but its header ends at byte {header_end}: the file is truncated or has another \
         format"
    )]
    Truncated {
        /// Size of the file, in bytes.
        size: u64,
        /// Offset at which the header ends, as far as it was read.
        header_end: u64,
    },
    /// The given bytes end before the header does.
    #[error("the header ends at byte {header_end}, but only {present} bytes are available")]
    Incomplete {
        /// Number of bytes given.
        present: u64,
        /// Offset at which the header ends.
        header_end: u64,
    },
    /// The header is longer than its format allows, or than any real header.
    #[error("the header claims {length} bytes; the limit is {limit}")]
    TooLong {
        /// Length of the header in bytes, as far as it was read.
        length: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// The header describes more tensors than a manifest may list.
    #[error("the header claims {0} tensors; the limit is {limit}", limit = manifest::MAX_TENSORS)]
    TooMany(u64),
    /// A safetensors header is not valid JSON of the format.
    #[error("the header is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The file does not begin as a GGUF file does.
    #[error("the file does not begin with the letters GGUF")]
    Magic,
    /// A GGUF file in big-endian byte order.
    #[error("the file is big-endian; only little-endian files are supported")]
    BigEndian,
    /// A GGUF file of an unsupported version.
    #[error("the file has version {0}; only versions 2 and 3 are supported")]
    Version(u32),
    /// A field of a GGUF header breaks a rule of the format.
    #[error("the header is malformed at byte {at}: {reason}")]
    Field {
        /// Offset in the file at which the field ends.
        at: u64,
        /// The broken rule.
        reason: &'static str,
    },
    /// A tensor breaks a rule of the format or of manifests.
    #[error("the tensor {name:?} is invalid: {reason}")]
    Tensor {
        /// Name of the tensor, cut after 200 characters.
        name: String,
        /// The broken rule.
        reason: &'static str,
    },
    /// The tensors of a safetensors file do not fill the file exactly.
    #[error("the header describes {described} bytes of tensors, but the file holds {present}")]
    Length {
        /// Bytes of the tensors that the header describes.
        described: u64,
        /// Bytes after the header.
        present: u64,
    },
    /// The file could not be read.
    #[error("cannot read the header: {0}")]
    Io(#[from] std::io::Error),
}

impl HeaderError {
    fn tensor(name: &str, reason: &'static str) -> Self {
        Self::Tensor {
            name: name.chars().take(200).collect(),
            reason,
        }
    }
}

impl Format {
    /// Returns the format that a file's name indicates.
    pub fn of(path: &str) -> Option<Self> {
        if path.ends_with(".safetensors") {
            Some(Self::Safetensors)
        } else if path.ends_with(".gguf") {
            Some(Self::Gguf)
        } else {
            None
        }
    }

    /// Reads the tensors of `file`, which has this format and `size` bytes. They are sorted by start, then name; they
    /// do not overlap, and their names are unique.
    ///
    /// Memory is bounded by the length of the header, at most 100 MB for safetensors. Of a GGUF header of at most 256
    /// MiB, only the names and shapes of tensors are kept. The file's own position is neither used nor moved.
    ///
    /// # Errors
    /// [`HeaderError`].
    pub fn read(self, file: &File, size: u64) -> Result<Vec<TensorInfo>, HeaderError> {
        match self {
            Self::Safetensors => Ok(self::safetensors::read(file, size)?.tensors),
            Self::Gguf => self::gguf::read(file, size),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::Gguf => "GGUF",
        })
    }
}

/// Sorts `tensors` and checks them against the rules for a manifest's file of `size` bytes.
fn sorted_and_checked(
    mut tensors: Vec<TensorInfo>,
    size: u64,
) -> Result<Vec<TensorInfo>, HeaderError> {
    tensors.sort_by(|a, b| (a.start, &a.name).cmp(&(b.start, &b.name)));
    let placed = tensors
        .iter()
        .map(|tensor| (&*tensor.name, &*tensor.shape, tensor.start..tensor.end));
    manifest::check_tensors(size, placed)
        .map_err(|(name, reason)| HeaderError::tensor(name, reason))?;
    Ok(tensors)
}
