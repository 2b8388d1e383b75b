//! Settings for new documents, and for the rights to write and read them.

use bytes::Bytes;

use crate::{
    error::Error,
    id::{DocumentId, Key},
    log::genesis::{self, Kind, MAX_LABEL, Readers},
};

/// Settings of a document to create.
#[derive(Debug, Clone, Default)]
pub struct NewDocument {
    /// If true, only the owner can ever write.
    pub single_writer: bool,
    /// Other keys that may write, at most 1,024.
    pub writers: Vec<Key>,
    /// The keys that may read.
    pub readers: Readers,
    /// A label for users, at most 256 bytes.
    pub label: String,
    /// Distinguishes documents with equal settings. `None` chooses an unused nonce, and thus creates a new document.
    /// The same nonce with the same settings always gives the same document, so others can compute its id before it is
    /// created ([`id_by`](Self::id_by)).
    pub nonce: Option<[u8; 16]>,
}

impl NewDocument {
    /// Returns the id of the document that this owner would create, or `None` without a nonce.
    ///
    /// # Errors
    /// Returns [`Error::TooLarge`] if a setting is over its limit, and [`Error::SingleWriter`] if a single-writer
    /// document has other writers.
    pub fn id_by(&self, owner: &Key) -> Result<Option<DocumentId>, Error> {
        match self.nonce {
            Some(nonce) => Ok(Some(genesis::id_of(&self.begin(owner, nonce)?))),
            None => Ok(None),
        }
    }

    /// Returns the genesis to be signed.
    pub(super) fn begin(&self, owner: &Key, nonce: [u8; 16]) -> Result<Bytes, Error> {
        let kind = if self.single_writer {
            Kind::SingleWriter
        } else {
            Kind::MultiWriter
        };
        let writers = genesis::normalized(self.writers.clone(), owner);
        check_keys("the list of writers", writers.len())?;
        let readers = normalized_readers(self.readers.clone(), owner)?;
        if self.label.len() > MAX_LABEL {
            return Err(Error::TooLarge {
                what: "the label",
                size: self.label.len() as u64,
                limit: MAX_LABEL as u64,
                advice: " bytes",
            });
        }
        let others = match self.single_writer {
            true => &[],
            false => &writers[..],
        };
        let genesis = genesis::unsigned(owner, nonce, kind, others, &readers, &self.label);
        if self.single_writer && !writers.is_empty() {
            return Err(Error::SingleWriter(genesis::id_of(&genesis)));
        }
        Ok(genesis)
    }
}

/// Changes of the rights to write and read a document.
#[derive(Debug, Clone, Default)]
pub struct Rights {
    /// Keys that may write from now on.
    pub add: Vec<Key>,
    /// Keys that may no longer write; their earlier changes stay.
    pub revoke: Vec<Key>,
    /// Keys that may read from now on, if that changes.
    pub readers: Option<Readers>,
}

pub(super) fn check_keys(what: &'static str, size: usize) -> Result<(), Error> {
    if size > genesis::MAX_KEYS {
        return Err(Error::TooLarge {
            what,
            size: size as u64,
            limit: genesis::MAX_KEYS as u64,
            advice: " keys",
        });
    }
    Ok(())
}

pub(super) fn normalized_readers(readers: Readers, owner: &Key) -> Result<Readers, Error> {
    match readers {
        Readers::Everybody => Ok(Readers::Everybody),
        Readers::Named(keys) => {
            let keys = genesis::normalized(keys, owner);
            check_keys("the list of readers", keys.len())?;
            Ok(Readers::Named(keys))
        }
    }
}
