//! Messages of a call, their attachments, and the call's metadata.

use bytes::Bytes;

use crate::wire::RpcMetadata;

/// Bytes beside a message, with an element type and a shape, such as a tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    /// The element type, as in safetensors: `F32`, `BF16`, `I64` and so on. Empty for plain bytes. Not checked against
    /// the number of bytes.
    pub dtype: String,
    /// The dimensions, outermost first.
    pub shape: Vec<u64>,
    /// The content.
    pub bytes: Bytes,
}

/// An encoded message with its attachments.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The encoded message.
    pub bytes: Bytes,
    /// The attachments.
    pub attachments: Vec<Attachment>,
}

impl From<Bytes> for Message {
    fn from(bytes: Bytes) -> Self {
        Self {
            bytes,
            attachments: Vec::new(),
        }
    }
}

/// Names and values that are sent with a call.
pub type Metadata = Vec<(String, Bytes)>;

/// Size of a metadata entry, in bytes, in addition to its name and value.
const ENTRY_OVERHEAD: usize = 64;

pub(super) fn metadata_size(metadata: &[(String, Bytes)]) -> usize {
    metadata
        .iter()
        .map(|(n, v)| n.len() + v.len() + ENTRY_OVERHEAD)
        .sum()
}

pub(super) fn to_wire(metadata: Metadata) -> Vec<RpcMetadata> {
    let pairs = metadata.into_iter();
    pairs
        .map(|(name, value)| RpcMetadata { name, value })
        .collect()
}

pub(super) fn from_wire(metadata: Vec<RpcMetadata>) -> Metadata {
    metadata.into_iter().map(|m| (m.name, m.value)).collect()
}
