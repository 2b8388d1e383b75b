//! The headers of files of weights: which tensor is where.
//!
//! The modules `safetensors` and `gguf` know a format each. What a header says is checked here against the rules that a
//! manifest's receiver has for tensors, so that a file that is read can be published.

mod gguf;
mod safetensors;

use std::{fmt, fs::File};

pub(crate) use self::safetensors::MAX_HEADER as MAX_SAFETENSORS_HEADER;
pub use self::safetensors::{SafetensorsHeader, parse as parse_safetensors};
use crate::manifest;

/// A format whose header is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Format {
    /// <https://github.com/huggingface/safetensors#format>.
    Safetensors,
    /// <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little endian.
    Gguf,
}

/// A tensor as its file's header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Element type as the file spells it; a number of GGUF that is not known here is `ggml-` and the number.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// First byte within the file.
    pub start: u64,
    /// One past the last byte within the file.
    pub end: u64,
}

/// Why a file is not of the format that its name says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It is too short to hold the header it announces.
    #[error(
        "the file has {size} bytes and its header would reach to {header_end}: it is truncated or of another format"
    )]
    Truncated {
        /// The file's size in bytes.
        size: u64,
        /// Where the header ends, as far as it was read.
        header_end: u64,
    },
    /// The bytes at hand end before the header does.
    #[error("the header ends at {header_end}; {present} bytes are here")]
    Incomplete {
        /// Bytes at hand.
        present: u64,
        /// Where the header ends.
        header_end: u64,
    },
    /// The header is longer than its format allows, or than any real one.
    #[error("the header claims {length} bytes; the limit is {limit}")]
    TooLong {
        /// Its length in bytes, as far as it was read.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// It describes more tensors than a manifest holds.
    #[error("the header claims {0} tensors; the limit is {limit}", limit = manifest::MAX_TENSORS)]
    TooMany(u64),
    /// A safetensors header is not the JSON that the format asks for.
    #[error("the header is malformed: {0}")]
    Malformed(#[from] serde_json::Error),
    /// It does not begin as a GGUF file does.
    #[error("it does not begin with the letters GGUF")]
    Magic,
    /// A GGUF file for machines of the other byte order.
    #[error("it is big-endian; only little-endian files are read")]
    BigEndian,
    /// A GGUF file of a version that is not read.
    #[error("it is of version {0}; versions 2 and 3 are read")]
    Version(u32),
    /// A field of a GGUF header breaks a rule of the format.
    #[error("the header is malformed at byte {at}: {reason}")]
    Field {
        /// Where the field ends in the file.
        at: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// A tensor breaks a rule of the format or of manifests.
    #[error("the tensor {name:?} is refused: {reason}")]
    Tensor {
        /// Its name, cut at 200 characters.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A safetensors file whose tensors do not fill it exactly.
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

impl HeaderError {
    fn tensor(name: &str, reason: &'static str) -> Self {
        Self::Tensor {
            name: name.chars().take(200).collect(),
            reason,
        }
    }
}

impl Format {
    /// The format that a file's name says it has.
    pub fn of(path: &str) -> Option<Self> {
        if path.ends_with(".safetensors") {
            Some(Self::Safetensors)
        } else if path.ends_with(".gguf") {
            Some(Self::Gguf)
        } else {
            None
        }
    }

    /// The tensors of `file`, which is of this format and has `size` bytes: by start, then name; they do not overlap, and their names
    /// are unique.
    ///
    /// Memory is bounded by the header's length, at most 100 MB for safetensors and 256 MiB for GGUF, of which only the names and
    /// shapes of tensors are kept. The file's own position is neither used nor moved.
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

/// Sorts `tensors` and checks them by the rules for a manifest's file of `size` bytes.
fn in_order(mut tensors: Vec<TensorInfo>, size: u64) -> Result<Vec<TensorInfo>, HeaderError> {
    tensors.sort_by(|a, b| (a.start, &a.name).cmp(&(b.start, &b.name)));
    let placed = tensors
        .iter()
        .map(|tensor| (&*tensor.name, &*tensor.shape, tensor.start..tensor.end));
    manifest::check_tensors(size, placed)
        .map_err(|(name, reason)| HeaderError::tensor(name, reason))?;
    Ok(tensors)
}
