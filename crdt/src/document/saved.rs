//! Caches on disk: a save of the state that a document's log produces, and the document's figures. A cache that is
//! missing, damaged or of an earlier version is created again from the log.

use bytes::Bytes;
use prost::Message;

use crate::{
    id::{Chain, Digest, EpochId, Key, SessionId},
    log::{
        envelope::Run,
        epoch::{Head, Heads},
    },
};

/// Most sessions whose heads are stored with a document's figures. Each flush writes the row again, with 72 bytes per
/// session. A document with more sessions is loaded when a peer compares it.
const MAX_HEADS: usize = 64;

/// The entry of a session in a save.
#[derive(Clone, PartialEq, Message)]
struct SavedSession {
    #[prost(bytes = "bytes", tag = "1")]
    author: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    nonce: Bytes,
    #[prost(bytes = "bytes", tag = "3")]
    epoch: Bytes,
    #[prost(uint64, tag = "4")]
    count: u64,
}

#[derive(Clone, PartialEq, Message)]
struct SavedHead {
    #[prost(message, repeated, tag = "1")]
    sessions: Vec<SavedSession>,
    #[prost(uint64, tag = "2")]
    log_bytes: u64,
}

/// A save: its sessions with their lengths, the bytes of their envelopes, and the Automerge document.
#[derive(Debug)]
pub(crate) struct Save<'a> {
    pub(crate) sessions: Vec<(Run, u64)>,
    pub(crate) log_bytes: u64,
    pub(crate) document: &'a [u8],
}

impl<'a> Save<'a> {
    pub(crate) fn pack(&self) -> Vec<u8> {
        let session = |(run, count): &(Run, u64)| SavedSession {
            author: Bytes::copy_from_slice(&run.author.0),
            nonce: Bytes::copy_from_slice(&run.nonce),
            epoch: Bytes::copy_from_slice(&run.epoch.0),
            count: *count,
        };
        let head = SavedHead {
            sessions: self.sessions.iter().map(session).collect(),
            log_bytes: self.log_bytes,
        };
        let mut content = head.encode_length_delimited_to_vec();
        content.extend(self.document);
        [&blake3::hash(&content).as_bytes()[..], &content].concat()
    }

    /// Decodes a save. Returns `None` if it is damaged or from a version without sessions.
    pub(crate) fn unpack(row: &'a [u8]) -> Option<Self> {
        let (digest, mut content) = row.split_at_checked(32)?;
        if blake3::hash(content).as_bytes()[..] != *digest {
            return None;
        }
        let head = SavedHead::decode_length_delimited(&mut content).ok()?;
        let session = |one: &SavedSession| {
            let run = Run {
                author: Key::read(&one.author)?,
                nonce: one.nonce[..].try_into().ok()?,
                epoch: EpochId::read(&one.epoch)?,
            };
            Some((run, one.count))
        };
        Some(Self {
            sessions: head.sessions.iter().map(session).collect::<Option<_>>()?,
            log_bytes: head.log_bytes,
            document: content,
        })
    }
}

/// The size of a document.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) epochs: u64,
    /// Changes since the last compaction, and their bytes.
    pub(crate) changes: u64,
    pub(crate) log_bytes: u64,
    /// Changes in the base of the last compaction.
    pub(crate) base_changes: u64,
}

/// The figures of a document: the data for a listing, and for comparing the document with a peer.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Figures {
    /// Digest of the document to which the figures belong.
    #[prost(bytes = "bytes", tag = "1")]
    digest: Bytes,
    #[prost(uint64, tag = "2")]
    pub(crate) epochs: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) changes: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) log_bytes: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) base_changes: u64,
    #[prost(uint64, tag = "6")]
    pub(crate) equivocations: u64,
    #[prost(bytes = "bytes", tag = "7")]
    epoch: Bytes,
    /// Heads of all sessions, 72 bytes each; empty if there are too many.
    #[prost(bytes = "bytes", tag = "8")]
    heads: Bytes,
    #[prost(bytes = "bytes", tag = "9")]
    forks: Bytes,
    #[prost(bool, tag = "10")]
    has_heads: bool,
}

fn pack_heads(heads: &Heads) -> Bytes {
    let mut bytes = Vec::with_capacity(heads.len() * 72);
    for (session, head) in heads {
        bytes.extend(session.0);
        bytes.extend(head.count.to_be_bytes());
        bytes.extend(head.chain.0);
    }
    bytes.into()
}

fn unpack_heads(bytes: &[u8]) -> Option<Heads> {
    let head = |bytes: &[u8]| {
        let head = Head {
            count: u64::from_be_bytes(bytes.get(32..40)?.try_into().ok()?),
            chain: Chain::read(bytes.get(40..)?)?,
        };
        Some((SessionId::read(&bytes[..32])?, head))
    };
    bytes.chunks(72).map(head).collect()
}

impl Figures {
    pub(crate) fn of(
        digest: Digest,
        epoch: EpochId,
        heads: &Heads,
        forks: &Heads,
        counts: Counts,
    ) -> Self {
        let Counts {
            epochs,
            changes,
            log_bytes,
            base_changes,
        } = counts;
        let has_heads = heads.len() + forks.len() <= MAX_HEADS;
        let pack = |heads| match has_heads {
            true => pack_heads(heads),
            false => Bytes::new(),
        };
        Self {
            digest: Bytes::copy_from_slice(&digest.0),
            epochs,
            changes,
            log_bytes,
            base_changes,
            equivocations: forks.len() as u64,
            epoch: Bytes::copy_from_slice(&epoch.0),
            heads: pack(heads),
            forks: pack(forks),
            has_heads,
        }
    }

    /// Decodes figures, if they belong to the document with this digest.
    pub(crate) fn read(row: &[u8], digest: &Digest) -> Option<Self> {
        let this = Self::decode(row).ok()?;
        (this.digest[..] == digest.0).then_some(this)
    }

    /// Returns the last epoch and the heads of sessions and forks, if they are stored.
    pub(crate) fn heads(&self) -> Option<(EpochId, Heads, Heads)> {
        if !self.has_heads {
            return None;
        }
        Some((
            EpochId::read(&self.epoch)?,
            unpack_heads(&self.heads)?,
            unpack_heads(&self.forks)?,
        ))
    }
}

/// Tag and length of the seal of an envelope's row: a field unknown to the wire format, which readers of earlier
/// versions skip. It holds the first bytes of the BLAKE3 hash of all bytes before it. Every part of a row is covered by
/// its author's signature or the chain, but checking those costs a hundred times as much. A row without a seal is from
/// an earlier version.
const SEAL: [u8; 2] = [15 << 3 | 2, 8];

fn seal_of(row: &[u8]) -> [u8; 8] {
    let mut seal = [0; 8];
    seal.copy_from_slice(&blake3::hash(row).as_bytes()[..8]);
    seal
}

/// Appends the seal to the row of an envelope.
pub(crate) fn seal(mut row: Vec<u8>) -> Vec<u8> {
    let seal = seal_of(&row);
    row.extend(SEAL);
    row.extend(seal);
    row
}

/// Returns whether the row of an envelope is unchanged; `None` if it has no seal.
pub(crate) fn is_sealed(row: &[u8]) -> Option<bool> {
    let (row, end) = row.split_last_chunk::<10>()?;
    let seal = end.strip_prefix(&SEAL)?;
    Some(*seal == seal_of(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_with_one_bit_changed_is_not_read() {
        let run = Run {
            author: Key([1; 32]),
            nonce: [2; 16],
            epoch: EpochId([3; 32]),
        };
        let save = Save {
            sessions: vec![(run, 7)],
            log_bytes: 1234,
            document: b"content",
        };
        let packed = save.pack();
        let read = Save::unpack(&packed).unwrap();
        assert_eq!(
            (read.sessions, read.log_bytes, read.document),
            (save.sessions, save.log_bytes, save.document)
        );
        for bit in 0..packed.len() * 8 {
            let mut bent = packed.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert!(Save::unpack(&bent).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn a_sealed_row_with_one_bit_changed_is_detected() {
        let envelope = weft_proto::wire::Envelope {
            change: Bytes::from_static(b"a change"),
            ..weft_proto::wire::Envelope::default()
        };
        let row = envelope.encode_to_vec();
        assert_eq!(is_sealed(&row), None);
        let sealed = seal(row);
        assert_eq!(is_sealed(&sealed), Some(true));
        assert_eq!(
            weft_proto::wire::Envelope::decode(&sealed[..]),
            Ok(envelope)
        );
        for bit in 0..sealed.len() * 8 {
            let mut bent = sealed.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(is_sealed(&bent), Some(true), "bit {bit}");
        }
    }

    #[test]
    fn figures_belong_to_one_digest_and_store_the_heads_of_few_sessions() {
        let head = |number: u8| {
            let head = Head {
                count: u64::from(number) + 1,
                chain: Chain([number; 32]),
            };
            (SessionId([number; 32]), head)
        };
        for sessions in [0, 3, MAX_HEADS as u8 + 1] {
            let heads: Heads = (0..sessions).map(head).collect();
            let (digest, epoch) = (Digest([9; 32]), EpochId([8; 32]));
            let counts = Counts {
                epochs: 1,
                changes: 2,
                log_bytes: 3,
                base_changes: 4,
            };
            let figures = Figures::of(digest, epoch, &heads, &Heads::new(), counts);
            let row = figures.encode_to_vec();
            assert_eq!(Figures::read(&row, &digest), Some(figures.clone()));
            assert_eq!(Figures::read(&row, &Digest([7; 32])), None);
            let kept = (usize::from(sessions) <= MAX_HEADS).then_some((epoch, heads, Heads::new()));
            assert_eq!(figures.heads(), kept);
        }
    }
}
