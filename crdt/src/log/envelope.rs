//! The data that an author signs: one change, its position in the author's session, and, by the chain's hash, all
//! changes before it.
//!
//! The signature covers `"weft document envelope v1\0"`, the document's id, the session's id, the index as 8 bytes
//! (big-endian), the chain's hash before the change, and the change's hash. The chain begins with the session's id.
//! After a change, it is BLAKE3 (derive key "weft document chain v1") of the previous chain hash and the change's hash.

use bytes::Bytes;
use weft_proto::wire;

use crate::{
    id::{Chain, ChangeId, DocumentId, EpochId, Key, SessionId},
    log::{
        epoch::prefix,
        signed::{self, Identity},
    },
    refusal::Refusal,
};

const DOMAIN: &[u8] = b"weft document envelope v1\0";

/// A run of an author's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) author: Key,
    pub(crate) nonce: [u8; 16],
    pub(crate) epoch: EpochId,
}

impl Run {
    pub(crate) fn session(&self, document: &DocumentId) -> SessionId {
        let mut hasher = blake3::Hasher::new_derive_key("weft document session v1");
        hasher
            .update(&self.author.0)
            .update(&document.0)
            .update(&self.epoch.0)
            .update(&self.nonce);
        SessionId(hasher.finalize().into())
    }
}

impl SessionId {
    /// Returns the Automerge actor of the session's changes.
    pub(crate) fn actor(&self) -> [u8; 16] {
        prefix(&self.0)
    }

    /// Returns the chain before the first envelope.
    pub(crate) fn chain(&self) -> Chain {
        Chain(self.0)
    }
}

impl Chain {
    pub(crate) fn then(&self, change: &ChangeId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("weft document chain v1");
        hasher.update(&self.0).update(&change.0);
        Self(hasher.finalize().into())
    }
}

/// An envelope without its change. It is well-formed, but only [`Header::is_signed`] checks its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) run: Run,
    pub(crate) session: SessionId,
    pub(crate) index: u64,
    pub(crate) previous: Chain,
    pub(crate) change: ChangeId,
    pub(crate) signature: [u8; 64],
}

fn signed_bytes(document: &DocumentId, header: &Header) -> Vec<u8> {
    [
        &document.0[..],
        &header.session.0,
        &header.index.to_be_bytes(),
        &header.previous.0,
        &header.change.0,
    ]
    .concat()
}

impl Header {
    pub(crate) fn sign(
        identity: &Identity,
        document: &DocumentId,
        run: Run,
        index: u64,
        previous: Chain,
        change: ChangeId,
    ) -> Self {
        let session = run.session(document);
        let mut header = Self {
            run,
            session,
            index,
            previous,
            change,
            signature: [0; 64],
        };
        let signature = identity.sign(DOMAIN, &signed_bytes(document, &header));
        header.signature.copy_from_slice(&signature);
        header
    }

    pub(crate) fn read(
        wire: &wire::EnvelopeHeader,
        document: &DocumentId,
    ) -> Result<Self, Refusal> {
        let read = || {
            let run = Run {
                author: Key::read(&wire.author)?,
                nonce: wire.nonce[..].try_into().ok()?,
                epoch: EpochId::read(&wire.epoch)?,
            };
            Some(Self {
                session: run.session(document),
                run,
                index: wire.index,
                previous: Chain::read(&wire.previous)?,
                change: ChangeId::read(&wire.change)?,
                signature: wire.signature[..].try_into().ok()?,
            })
        };
        read().ok_or(Refusal::Malformed(
            "an envelope has a field of a wrong length",
        ))
    }

    pub(crate) fn to_wire(&self) -> wire::EnvelopeHeader {
        wire::EnvelopeHeader {
            author: Bytes::copy_from_slice(&self.run.author.0),
            nonce: Bytes::copy_from_slice(&self.run.nonce),
            epoch: Bytes::copy_from_slice(&self.run.epoch.0),
            index: self.index,
            previous: Bytes::copy_from_slice(&self.previous.0),
            change: Bytes::copy_from_slice(&self.change.0),
            signature: Bytes::copy_from_slice(&self.signature),
        }
    }

    pub(crate) fn is_signed(&self, document: &DocumentId) -> bool {
        signed::verify(
            &self.run.author,
            DOMAIN,
            &signed_bytes(document, self),
            &self.signature,
        )
    }

    /// Returns the chain after this envelope.
    pub(crate) fn chain(&self) -> Chain {
        self.previous.then(&self.change)
    }
}

/// An envelope with its change.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub(crate) header: Header,
    pub(crate) change: Bytes,
}

impl Envelope {
    pub(crate) fn to_wire(&self) -> wire::Envelope {
        wire::Envelope {
            header: Some(self.header.to_wire()),
            change: self.change.clone(),
        }
    }
}

/// Two envelopes of one session with the same index and previous chain, which prove that the author has equivocated.
/// All replicas drop the session from this index on.
#[derive(Debug, Clone)]
pub(crate) struct Proof {
    pub(crate) one: Header,
    pub(crate) other: Header,
}

impl Proof {
    /// Combines two headers into a proof, or returns `None` if they prove nothing. The caller checks the signatures.
    pub(crate) fn of(one: Header, other: Header) -> Option<Self> {
        let same = one.session == other.session
            && one.index == other.index
            && one.previous == other.previous
            && one.change != other.change;
        same.then_some(Self { one, other })
    }

    pub(crate) fn read(wire: &wire::Equivocation, document: &DocumentId) -> Result<Self, Refusal> {
        let proof = Self::stored(wire, document)?;
        match proof.is_signed(document) {
            true => Ok(proof),
            false => Err(Refusal::Signature),
        }
    }

    pub(crate) fn is_signed(&self, document: &DocumentId) -> bool {
        self.one.is_signed(document) && self.other.is_signed(document)
    }

    /// Reads a proof whose signatures were checked before it was put on disk.
    pub(crate) fn stored(
        wire: &wire::Equivocation,
        document: &DocumentId,
    ) -> Result<Self, Refusal> {
        let part = |header: &Option<wire::EnvelopeHeader>| match header {
            Some(header) => Header::read(header, document),
            None => Err(Refusal::Malformed("a proof lacks an envelope")),
        };
        Self::of(part(&wire.one)?, part(&wire.other)?)
            .ok_or(Refusal::Malformed("a proof proves nothing"))
    }

    pub(crate) fn to_wire(&self) -> wire::Equivocation {
        wire::Equivocation {
            one: Some(self.one.to_wire()),
            other: Some(self.other.to_wire()),
        }
    }

    pub(crate) fn session(&self) -> SessionId {
        self.one.session
    }

    /// Returns the index from which on the session is void.
    pub(crate) fn index(&self) -> u64 {
        self.one.index
    }
}
