//! What is known of the documents that are held, without loading them.

use prost::Message;

use crate::{
    document::saved::Figures,
    error::Error,
    id::{Digest, DocumentId, Key},
    log::genesis::{Kind, Readers},
    replica::Replica,
    store::{StoreError, key},
};

/// What is known of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentInfo {
    /// Its id.
    pub id: DocumentId,
    /// The rest is known once it has arrived.
    pub details: Option<DocumentDetails>,
    /// The damage to the document on disk, if any. A damaged document is neither read, written nor given to peers until
    /// it is opened again ([`Replica::hold`]).
    pub damage: Option<String>,
}

/// What is known of a document that is here.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DocumentDetails {
    /// Who decides who may write.
    pub owner: Key,
    /// Whether only the owner writes.
    pub kind: Kind,
    /// Who else may write.
    pub writers: Vec<Key>,
    /// Who may read.
    pub readers: Readers,
    /// What people call it.
    pub label: String,
    /// Decisions of the owner about the above, or new beginnings, since the document was made.
    pub epochs: u64,
    /// Equal on two replicas exactly if they hold the same.
    pub digest: Digest,
    /// Changes since it last began anew.
    pub changes: u64,
    /// Their bytes.
    pub log_bytes: u64,
    /// Changes that its content began anew with, if it did.
    pub base_changes: u64,
    /// Sessions whose author has equivocated.
    pub equivocations: usize,
}

impl Replica {
    /// The documents that are held. None of them is loaded for it, but those of a file that an earlier version has
    /// written, once.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn list(&mut self) -> Result<Vec<DocumentInfo>, Error> {
        self.recover()?;
        let ids: Vec<_> = self.held.keys().copied().collect();
        ids.into_iter().map(|id| self.info(id)).collect()
    }

    /// What is known of a document.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Store`].
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

    /// The figures of a document: of its row if it is not in memory; `None` if it has not arrived or is damaged.
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
        // Of a version that kept none.
        let figures = self.document(id)?.map(|(document, _)| document.figures());
        if let Some(figures) = &figures {
            self.store.put(key::figures(id), figures.encode_to_vec());
        }
        Ok(figures)
    }

    /// Documents that have arrived, with their owners and labels.
    pub fn geneses(&self) -> impl Iterator<Item = (DocumentId, Key, &str)> {
        let held = self.held.values();
        held.filter_map(|held| held.genesis.as_ref())
            .map(|genesis| (genesis.id, genesis.owner, &genesis.label[..]))
    }

    /// The documents that are held, arrived or not.
    pub fn ids(&self) -> impl Iterator<Item = DocumentId> {
        self.held.keys().copied()
    }

    /// Whose a document is, once it has arrived.
    pub fn owner(&self, id: &DocumentId) -> Option<Key> {
        Some(self.held.get(id)?.genesis.as_ref()?.owner)
    }

    /// How many documents are held, and how many were not taken since the start because there were
    /// [`MAX_DOCUMENTS`](crate::MAX_DOCUMENTS).
    pub fn count(&self) -> (usize, u64) {
        (self.held.len(), self.refused)
    }

    /// Connected peers that are known to hold a document as well.
    pub fn sharing(&self, id: &DocumentId) -> Vec<Key> {
        let sharing = self.peers.iter().filter(|(_, peer)| peer.shares(id));
        sharing.map(|(key, _)| *key).collect()
    }
}
