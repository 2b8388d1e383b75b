//! Documents that are to be made, and who may write and read them.

use bytes::Bytes;

use crate::{
    error::Error,
    id::{DocumentId, Key},
    log::genesis::{self, Kind, MAX_LABEL, Readers},
};

/// A document that is to be made.
#[derive(Debug, Clone, Default)]
pub struct NewDocument {
    /// Only the owner may write, for good.
    pub single_writer: bool,
    /// Who else may write, at most 1,024.
    pub writers: Vec<Key>,
    /// Who may read.
    pub readers: Readers,
    /// What people call it, at most 256 bytes.
    pub label: String,
    /// Tells apart documents that begin alike. `None`: one that was never used, for a document of its own; with the
    /// same one, and all else the same, it is the same document, and its id is known to others before it is made
    /// ([`id_by`](Self::id_by)).
    pub nonce: Option<[u8; 16]>,
}

impl NewDocument {
    /// The id of the document that this owner makes of it; `None` without a nonce.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::SingleWriter`] if it is to have other writers as well.
    pub fn id_by(&self, owner: &Key) -> Result<Option<DocumentId>, Error> {
        match self.nonce {
            Some(nonce) => Ok(Some(genesis::id_of(&self.begin(owner, nonce)?))),
            None => Ok(None),
        }
    }

    /// Its genesis, to be signed.
    pub(super) fn begin(&self, owner: &Key, nonce: [u8; 16]) -> Result<Bytes, Error> {
        let kind = if self.single_writer {
            Kind::SingleWriter
        } else {
            Kind::MultiWriter
        };
        let writers = genesis::tidy(self.writers.clone(), owner);
        check_keys("the list of writers", writers.len())?;
        let readers = tidy_readers(self.readers.clone(), owner)?;
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

/// What changes in who may write and read a document.
#[derive(Debug, Clone, Default)]
pub struct Rights {
    /// Who may write from now on.
    pub add: Vec<Key>,
    /// Who no longer may; what they have written so far stays.
    pub revoke: Vec<Key>,
    /// Who may read from now on, if that changes.
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

pub(super) fn tidy_readers(readers: Readers, owner: &Key) -> Result<Readers, Error> {
    match readers {
        Readers::Everybody => Ok(Readers::Everybody),
        Readers::Named(keys) => {
            let keys = genesis::tidy(keys, owner);
            check_keys("the list of readers", keys.len())?;
            Ok(Readers::Named(keys))
        }
    }
}
