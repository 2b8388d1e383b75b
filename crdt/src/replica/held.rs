//! A document in the list of those that a node holds, whether it is in memory or not.

use std::time::Duration;

use prost::Message;
use weft_proto::wire;

use crate::{
    document::Document,
    id::{Digest, DocumentId, Key, SessionId},
    log::{
        epoch::{Epoch, Terms},
        genesis::{self, Genesis, Readers},
    },
    store::{Store, StoreError, key},
};

/// Placeholder for the digest of a document that has not arrived. No document has this digest.
pub(super) const NOTHING: Digest = Digest([0; 32]);

/// A document that this node holds.
#[derive(Debug)]
pub(super) struct Held {
    /// The genesis; `None` until a peer has sent it.
    pub(super) genesis: Option<Genesis>,
    pub(super) digest: Digest,
    /// The keys that may write the document and, in `readers`, those that may read it, by the last known decision, even
    /// if it is not in force yet.
    pub(super) writers: Vec<Key>,
    pub(super) readers: Readers,
    pub(super) is_decided: bool,
    pub(super) damage: Option<Damage>,
    pub(super) loaded: Option<Box<Document>>,
    /// The session in which this replica writes, while the document is not in memory.
    pub(super) writing: Option<SessionId>,
    /// Memory estimate of the loaded document, at its last write to disk.
    pub(super) weight: usize,
    pub(super) used: u64,
}

/// The reason for which a document cannot be used.
#[derive(Debug, Clone)]
pub(super) struct Damage {
    pub(super) what: String,
    /// Time of the next attempt; `None` if the document has to be opened again.
    pub(super) until: Option<Duration>,
}

impl Held {
    pub(super) fn new(genesis: Option<Genesis>, digest: Digest) -> Self {
        let (writers, readers) = match &genesis {
            Some(genesis) => (genesis.writers.clone(), genesis.readers.clone()),
            None => (Vec::new(), Readers::Everybody),
        };
        Self {
            genesis,
            digest,
            writers,
            readers,
            is_decided: false,
            damage: None,
            loaded: None,
            writing: None,
            weight: 0,
            used: 0,
        }
    }

    /// Returns true if a peer may read the document, and the document is not damaged.
    pub(super) fn may_read(&self, peer: &Key) -> bool {
        let owner = self.genesis.as_ref().map(|genesis| genesis.owner);
        self.damage.is_none()
            && owner
                .is_none_or(|owner| genesis::is_reader(&owner, &self.writers, &self.readers, peer))
    }

    /// Returns true if a peer is the document's owner, or is named as one of its writers or readers.
    pub(super) fn names(&self, peer: &Key) -> bool {
        let is_named = |keys: &[Key]| keys.binary_search(peer).is_ok();
        self.genesis.as_ref().is_some_and(|one| one.owner == *peer)
            || is_named(&self.writers)
            || matches!(&self.readers, Readers::Named(keys) if is_named(keys))
    }

    /// Returns true if the document's owner has made a decision since the document was created.
    pub(super) fn is_decided(&self) -> bool {
        self.is_decided
    }

    pub(super) fn decided(&mut self, terms: &Terms) {
        self.is_decided = true;
        self.writers.clone_from(&terms.writers);
        self.readers.clone_from(&terms.readers);
    }
}

/// Reads the entry of a document in the list of documents.
pub(super) fn read_held(store: &Store, id: &DocumentId, row: &[u8]) -> Result<Held, StoreError> {
    let Some((digest, genesis)) = row.split_at_checked(32) else {
        return Ok(damaged_held(None, "its entry in the list of documents"));
    };
    let digest = Digest::read(digest).unwrap_or(NOTHING);
    if genesis.is_empty() {
        return Ok(Held::new(None, digest));
    }
    let genesis = wire::SignedGenesis::decode(genesis).ok();
    let genesis = genesis.and_then(|genesis| Genesis::stored(genesis).ok());
    let Some(genesis) = genesis.filter(|genesis| genesis.id == *id) else {
        return Ok(damaged_held(None, "its genesis"));
    };
    let mut held = Held::new(Some(genesis.clone()), digest);
    let of_chain = store.last(&key::epochs(id))?.map(|(_, row)| row);
    let decided = store.get(&key::decided(id))?;
    // A later decision whose base has not arrived determines the readers as well.
    for row in [of_chain, decided].into_iter().flatten() {
        let epoch = wire::SignedEpoch::decode(&row[..]).ok();
        match epoch.and_then(|epoch| Epoch::stored(epoch, &genesis).ok()) {
            Some(epoch) => held.decided(&epoch.terms),
            None => return Ok(damaged_held(Some(genesis), "a decision of its owner")),
        }
    }
    Ok(held)
}

fn damaged_held(genesis: Option<Genesis>, what: &str) -> Held {
    let mut held = Held::new(genesis, NOTHING);
    let what = format!("{what} cannot be read");
    held.damage = Some(Damage { what, until: None });
    held
}
