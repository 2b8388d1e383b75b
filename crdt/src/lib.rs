//! Replicated documents that no peer can poison.
//!
//! What is here are the names the other parts may use; the documents themselves are the subject of work to come. The design:
//! Automerge is the data model, and its sync messages never meet a peer. What replicates is a log of signed envelopes per
//! author and session, chained by hash, checked in a fixed order before Automerge sees a change. A document is named by the hash
//! of its signed genesis, which names the owner; who may write is a chain of epochs that the owner signs.
//!
//! It will promise: what one replica acknowledges survives its crash; replicas with the same envelopes show the same document; a
//! peer that equivocates is found out by all alike. It leaves out: transport (`weft-net`) and short-lived facts, which are
//! records (`weft-dht`).

use std::fmt;

/// A document's name: the BLAKE3 hash of its signed genesis.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentId(pub [u8; 32]);

/// Who wrote an envelope, in which run of their program: a hash of the author's key, the document and a nonce that is fresh at every
/// start, so that a restored backup never continues an old sequence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 32]);

/// Who may write a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Its owner only.
    SingleWriter,
    /// Everybody on the owner's write list.
    MultiWriter,
}

fn hex(bytes: &[u8; 32], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DocumentId({self})")
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_hex() {
        let mut bytes = [0; 32];
        bytes[31] = 0xab;
        let text = format!("{}ab", "00".repeat(31));
        assert_eq!(DocumentId(bytes).to_string(), text);
        assert_eq!(SessionId(bytes).to_string(), text);
    }
}
