//! What goes over a call: messages, what is attached to them, and names and values beside.

use bytes::Bytes;

use crate::wire::RpcMetadata;

/// Bytes of a stated type and shape beside a message, such as a tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    /// As in safetensors: `F32`, `BF16`, `I64` and so on. Empty: bytes. Nobody checks that it fits.
    pub dtype: String,
    /// Its dimensions, the slowest first.
    pub shape: Vec<u64>,
    /// The bytes.
    pub bytes: Bytes,
}

/// A message as it goes over the wire: encoded, with what is attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Message {
    /// The encoded message.
    pub bytes: Bytes,
    /// What is attached.
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

/// Names and values beside a call.
pub type Metadata = Vec<(String, Bytes)>;

/// What a name and a value cost beside their bytes.
const EACH: usize = 64;

pub(super) fn metadata_size(metadata: &[(String, Bytes)]) -> usize {
    metadata.iter().map(|(n, v)| n.len() + v.len() + EACH).sum()
}

pub(super) fn to_wire(metadata: Metadata) -> Vec<RpcMetadata> {
    let pairs = metadata.into_iter();
    pairs
        .map(|(name, value)| RpcMetadata { name, value })
        .collect()
}

pub(super) fn of_wire(metadata: Vec<RpcMetadata>) -> Metadata {
    metadata.into_iter().map(|m| (m.name, m.value)).collect()
}
