//! Information about the held documents, without loading them.

use prost::Message;

use crate::{
    document::saved::Figures,
    error::Error,
    id::{Digest, DocumentId, Key},
    log::genesis::{Kind, Readers},
    replica::Replica,
    store::{StoreError, key},
};

/// Information about a held document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentInfo {
    /// The document's id.
    pub id: DocumentId,
    /// Details, known once the document has arrived.
    pub details: Option<DocumentDetails>,
    /// The damage to the document on disk, if any. A damaged document is neither read, written nor sent to peers until
    /// it is opened again ([`Replica::hold`]).
    pub damage: Option<String>,
}

/// Details of a document that has arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentDetails {
    /// The owner, who decides who may write.
    pub owner: Key,
    /// The kind, which says whether only the owner may write.
    pub kind: Kind,
    /// Other keys that may write.
    pub writers: Vec<Key>,
    /// The keys that may read.
    pub readers: Readers,
    /// The label for users.
    pub label: String,
    /// Number of decisions of the owner since the creation: changes of rights, and compactions.
    pub epochs: u64,
    /// Digest of the data, which is equal on two replicas exactly if their data is.
    pub digest: Digest,
    /// Number of changes since the last compaction.
    pub changes: u64,
    /// Size of these changes, in bytes.
    pub log_bytes: u64,
    /// Number of changes in the base of the last compaction; 0 without one.
    pub base_changes: u64,
    /// Number of sessions whose author has equivocated.
    pub equivocations: usize,
}

impl Replica {
    /// Returns information about all held documents. Loads none of them, except once those in a file of an earlier
    /// version.
    ///
    /// # Errors
    /// Returns [`Error::Store`] if the disk fails.
    pub fn list(&mut self) -> Result<Vec<DocumentInfo>, Error> {
        self.recover()?;
        let ids: Vec<_> = self.held.keys().copied().collect();
        ids.into_iter().map(|id| self.info(id)).collect()
    }

    /// Returns information about a document.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, and [`Error::Store`] if the disk fails.
    pub fn info(&mut self, id: DocumentId) -> Result<DocumentInfo, Error> {
        self.recover()?;
        let figures = match self.figures(&id) {
            Ok(figures) => figures,
            Err(StoreError::Document { what, .. }) => {
                return Ok(DocumentInfo {
                    id,
                    details: None,
                    damage: Some(what),
                });
            }
            Err(error) => return Err(error.into()),
        };
        let held = self.held.get(&id).ok_or(Error::Unknown(id))?;
        let details = held.genesis.as_ref().zip(figures);
        let details = details.map(|(genesis, figures)| DocumentDetails {
            owner: genesis.owner,
            kind: genesis.kind,
            writers: held.writers.clone(),
            readers: held.readers.clone(),
            label: genesis.label.clone(),
            epochs: figures.epochs,
            digest: held.digest,
            changes: figures.changes,
            log_bytes: figures.log_bytes,
            base_changes: figures.base_changes,
            equivocations: usize::try_from(figures.equivocations).unwrap_or(usize::MAX),
        });
        let damage = held.damage.as_ref().map(|damage| damage.what.clone());
        Ok(DocumentInfo {
            id,
            details,
            damage,
        })
    }

    /// Returns the figures of a document, from its row if it is not in memory. Returns `None` if it has not arrived or
    /// is damaged.
    pub(super) fn figures(&mut self, id: &DocumentId) -> Result<Option<Figures>, StoreError> {
        let Some(held) = self.held.get_mut(id) else {
            return Ok(None);
        };
        if let Some(document) = &mut held.loaded {
            held.digest = document.digest();
            return Ok(Some(document.figures()));
        }
        if held.genesis.is_some() && held.damage.is_none() {
            let row = self.store.get(&key::figures(id))?;
            let figures = row.and_then(|row| Figures::read(&row, &held.digest));
            if figures.is_some() {
                return Ok(figures);
            }
        }
        // An earlier version stored no figures.
        let figures = self.document(id)?.map(|(document, _)| document.figures());
        if let Some(figures) = &figures {
            self.store.put(key::figures(id), figures.encode_to_vec());
        }
        Ok(figures)
    }

    /// Returns the documents that have arrived, with their owners and labels.
    pub fn geneses(&self) -> impl Iterator<Item = (DocumentId, Key, &str)> {
        let held = self.held.values();
        held.filter_map(|held| held.genesis.as_ref())
            .map(|genesis| (genesis.id, genesis.owner, &genesis.label[..]))
    }

    /// Returns the held documents, whether they have arrived or not.
    pub fn ids(&self) -> impl Iterator<Item = DocumentId> {
        self.held.keys().copied()
    }

    /// Returns the owner of a document, once it has arrived.
    pub fn owner(&self, id: &DocumentId) -> Option<Key> {
        Some(self.held.get(id)?.genesis.as_ref()?.owner)
    }

    /// Returns the number of held documents, and the number refused since the start because of
    /// [`MAX_DOCUMENTS`](crate::MAX_DOCUMENTS).
    pub fn count(&self) -> (usize, u64) {
        (self.held.len(), self.refused)
    }

    /// Returns the connected peers that are known to hold a document as well.
    pub fn sharing(&self, id: &DocumentId) -> Vec<Key> {
        let sharing = self.peers.iter().filter(|(_, peer)| peer.shares(id));
        sharing.map(|(key, _)| *key).collect()
    }
}
