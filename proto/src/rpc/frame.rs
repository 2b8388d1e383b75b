//! Frames: a head of ten bytes, then up to [`MAX_FRAME`] bytes.
//!
//! The head consists of the kind (1 byte), flags (1), the call's number (4, little-endian) and the length of the bytes
//! that follow (4, little-endian).

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// The only version of the protocol, sent in `RpcHello`.
pub(crate) const VERSION: u32 = 1;

/// Size of a frame's head, in bytes.
pub(crate) const HEAD: usize = 10;

/// Largest frame in bytes, without its head. Longer messages and attachments are split into several frames, so that
/// other calls wait for one frame at most.
pub(crate) const MAX_FRAME: usize = 64 * 1024;

/// Cost of a frame in credit, in addition to its bytes, so that empty frames are not free.
pub(crate) const OVERHEAD: u32 = 16;

/// Flag: the message continues in another frame.
pub(crate) const MORE: u8 = 1;

/// Flag: the last frame of this side for this call. From the called side, it means that the call succeeded.
pub(crate) const LAST: u8 = 2;

/// The kind of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// `RpcHello`: the first frame, with call number 0.
    Hello = 0,
    /// `RpcRequest`: begins a call.
    Request = 1,
    /// A message or a part of one.
    Data = 2,
    /// `RpcAttachment`: describes an attachment of the next message.
    Attachment = 3,
    /// Bytes of the attachment that was described last.
    Raw = 4,
    /// More credit for this call, in bytes: 4 bytes, little-endian.
    Credit = 5,
    /// The caller cancels the call.
    Cancel = 6,
    /// `RpcStatus`: the call has ended.
    End = 7,
    /// `RpcShutdown`, with call number 0: this side handles no new calls.
    Shutdown = 8,
    /// The caller sends no more messages, but still receives. An empty frame.
    Close = 9,
}

/// A violation of the protocol by the other side, which ends the session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The kind or the flags of a frame are unknown.
    #[error("there is no frame of kind {kind} with flags {flags}")]
    Unknown {
        /// The kind.
        kind: u8,
        /// The flags.
        flags: u8,
    },
    /// A frame, message, attachment, metadata, number of calls or credit is over its limit.
    #[error("{what} of {size} is over the limit of {limit}")]
    Limit {
        /// The limited thing.
        what: &'static str,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A message cannot be decoded.
    #[error("{what} cannot be decoded: {reason}")]
    Malformed {
        /// The expected message.
        what: &'static str,
        /// The decoder's error.
        reason: String,
    },
    /// A frame is not allowed at this point.
    #[error("{0}")]
    Order(&'static str),
    /// The two sides have no version of the protocol in common.
    #[error("no version in common: this side speaks 1, the other {0:?}")]
    Version(Vec<u32>),
}

pub(crate) fn limit(what: &'static str, size: u64, limit: u64) -> Result<(), Violation> {
    match size > limit {
        true => Err(Violation::Limit { what, size, limit }),
        false => Ok(()),
    }
}

/// A frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) flags: u8,
    pub(crate) call: u32,
    pub(crate) length: u32,
}

impl Head {
    pub(crate) fn read(bytes: [u8; HEAD]) -> Result<Self, Violation> {
        let [kind, flags, a, b, c, d, e, f, g, h] = bytes;
        let unknown = Violation::Unknown { kind, flags };
        let (known, allowed) = match kind {
            0 => (Kind::Hello, 0),
            1 => (Kind::Request, 0),
            2 => (Kind::Data, MORE | LAST),
            3 => (Kind::Attachment, 0),
            4 => (Kind::Raw, 0),
            5 => (Kind::Credit, 0),
            6 => (Kind::Cancel, 0),
            7 => (Kind::End, 0),
            8 => (Kind::Shutdown, 0),
            9 => (Kind::Close, 0),
            _ => return Err(unknown),
        };
        if flags & !allowed != 0 || flags == MORE | LAST {
            return Err(unknown);
        }
        let length = u32::from_le_bytes([e, f, g, h]);
        limit("a frame", length.into(), MAX_FRAME as u64)?;
        Ok(Self {
            kind: known,
            flags,
            call: u32::from_le_bytes([a, b, c, d]),
            length,
        })
    }

    pub(crate) fn write(self, to: &mut impl BufMut) {
        to.put_u8(self.kind as u8);
        to.put_u8(self.flags);
        to.put_u32_le(self.call);
        to.put_u32_le(self.length);
    }
}

/// Appends a frame with a protobuf message.
pub(crate) fn put_message(to: &mut BytesMut, kind: Kind, call: u32, message: &impl Message) {
    let head = Head {
        kind,
        flags: 0,
        call,
        length: message.encoded_len() as u32,
    };
    to.reserve(HEAD + head.length as usize);
    head.write(to);
    message
        .encode(to)
        .expect("the buffer has room for the encoded length");
}

/// Appends a short frame.
pub(crate) fn put(to: &mut BytesMut, kind: Kind, flags: u8, call: u32, bytes: &[u8]) {
    to.reserve(HEAD + bytes.len());
    let head = Head {
        kind,
        flags,
        call,
        length: bytes.len() as u32,
    };
    head.write(to);
    to.put_slice(bytes);
}

pub(crate) fn decode<M: Message + Default>(
    what: &'static str,
    bytes: &[u8],
) -> Result<M, Violation> {
    M::decode(bytes).map_err(|error| Violation::Malformed {
        what,
        reason: error.to_string(),
    })
}

/// Splits bytes into parts of at most [`MAX_FRAME`] bytes. Each part comes with true if it is the last one.
pub(crate) fn parts(bytes: &Bytes) -> impl Iterator<Item = (Bytes, bool)> + use<> {
    let bytes = bytes.clone();
    let count = bytes.len().div_ceil(MAX_FRAME).max(1);
    (0..count).map(move |n| {
        let end = bytes.len().min((n + 1) * MAX_FRAME);
        (bytes.slice(n * MAX_FRAME..end), n + 1 == count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_and_written() {
        let head = Head {
            kind: Kind::Data,
            flags: LAST,
            call: 0x0102_0304,
            length: 65_536,
        };
        let mut bytes = Vec::new();
        head.write(&mut bytes);
        assert_eq!(bytes.len(), HEAD);
        assert_eq!(Head::read(bytes.try_into().unwrap()), Ok(head));
    }

    #[test]
    fn an_invalid_head_is_refused() {
        let unknown = |kind, flags| Err(Violation::Unknown { kind, flags });
        for (kind, flags) in [(10, 0), (255, 0), (2, 3), (2, 4), (1, 1), (5, 2)] {
            let mut bytes = [0; HEAD];
            bytes[..2].copy_from_slice(&[kind, flags]);
            assert_eq!(Head::read(bytes), unknown(kind, flags));
        }
        let too_long = Head::read([2, 0, 0, 0, 0, 0, 1, 0, 1, 0]).unwrap_err();
        assert!(matches!(too_long, Violation::Limit { limit: 65_536, .. }));
    }

    #[test]
    fn bytes_are_split_into_frames() {
        let lengths = |n: usize| -> Vec<(usize, bool)> {
            let bytes = Bytes::from(vec![0; n]);
            parts(&bytes)
                .map(|(part, last)| (part.len(), last))
                .collect()
        };
        assert_eq!(lengths(0), [(0, true)]);
        assert_eq!(lengths(MAX_FRAME), [(MAX_FRAME, true)]);
        assert_eq!(lengths(MAX_FRAME + 1), [(MAX_FRAME, false), (1, true)]);
    }
}
