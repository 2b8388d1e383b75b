//! The genesis of a document: the signed entry that fixes its id and owner.

use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use crate::{
    id::{DocumentId, EpochId, Key},
    log::signed::{self, Identity},
    refusal::Refusal,
};

const DOMAIN: &[u8] = b"weft document genesis v1\0";
const NAME: &str = "weft document v1";

/// Most keys in a list of writers or readers.
pub const MAX_KEYS: usize = 1024;

/// Longest label of a document, in bytes.
pub const MAX_LABEL: usize = 256;

/// The kind of a document, which decides who may write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Only the owner may write.
    SingleWriter,
    /// Every key on the owner's list of writers may write.
    MultiWriter,
}

/// The keys that may read a document, besides its owner and writers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Readers {
    /// Every peer in the mesh.
    #[default]
    Everybody,
    /// The keys in this list.
    Named(Vec<Key>),
}

impl Readers {
    pub(crate) fn to_wire(&self) -> wire::Readers {
        match self {
            Self::Everybody => wire::Readers {
                everybody: true,
                named: Vec::new(),
            },
            Self::Named(keys) => wire::Readers {
                everybody: false,
                named: to_wire(keys),
            },
        }
    }

    pub(crate) fn read(readers: Option<&wire::Readers>) -> Result<Self, Refusal> {
        match readers {
            Some(readers) if readers.everybody => Ok(Self::Everybody),
            Some(readers) => Ok(Self::Named(read_keys(&readers.named)?)),
            None => Ok(Self::Named(Vec::new())),
        }
    }
}

pub(crate) fn to_wire(keys: &[Key]) -> Vec<Bytes> {
    keys.iter()
        .map(|key| Bytes::copy_from_slice(&key.0))
        .collect()
}

/// Reads a list of keys, which must be sorted and without duplicates.
pub(crate) fn read_keys(keys: &[Bytes]) -> Result<Vec<Key>, Refusal> {
    if keys.len() > MAX_KEYS {
        return Err(Refusal::Malformed("a list of keys is too long"));
    }
    let keys: Option<Vec<Key>> = keys.iter().map(|key| Key::read(key)).collect();
    let keys = keys.ok_or(Refusal::Malformed("a key does not have 32 bytes"))?;
    if !keys.is_sorted_by(|a, b| a < b) {
        return Err(Refusal::Malformed("a list of keys is not sorted"));
    }
    Ok(keys)
}

/// Returns true if a peer may read a document with these rights.
pub(crate) fn is_reader(owner: &Key, writers: &[Key], readers: &Readers, peer: &Key) -> bool {
    let is_named = |keys: &[Key]| keys.binary_search(peer).is_ok();
    match readers {
        Readers::Everybody => true,
        Readers::Named(keys) => peer == owner || is_named(keys) || is_named(writers),
    }
}

/// Returns a list of keys in its wire form: sorted, without duplicates, and without the owner.
pub(crate) fn normalized(mut keys: Vec<Key>, owner: &Key) -> Vec<Key> {
    keys.retain(|key| key != owner);
    keys.sort();
    keys.dedup();
    keys
}

/// A signed genesis that was checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Genesis {
    pub(crate) id: DocumentId,
    pub(crate) owner: Key,
    pub(crate) kind: Kind,
    pub(crate) writers: Vec<Key>,
    pub(crate) readers: Readers,
    pub(crate) label: String,
    pub(crate) wire: wire::SignedGenesis,
}

/// Returns the bytes that an owner signs. The lists must be in their wire form.
pub(crate) fn unsigned(
    owner: &Key,
    nonce: [u8; 16],
    kind: Kind,
    writers: &[Key],
    readers: &Readers,
    label: &str,
) -> Bytes {
    wire::Genesis {
        owner: Bytes::copy_from_slice(&owner.0),
        single_writer: kind == Kind::SingleWriter,
        nonce: Bytes::copy_from_slice(&nonce),
        writers: to_wire(writers),
        readers: Some(readers.to_wire()),
        label: label.to_owned(),
    }
    .encode_to_vec()
    .into()
}

/// Returns the id of a document with this genesis. The id does not depend on the signature, so it can be computed from
/// the genesis before the owner has created the document.
pub(crate) fn id_of(unsigned: &[u8]) -> DocumentId {
    let mut hasher = blake3::Hasher::new_derive_key(NAME);
    hasher.update(unsigned);
    DocumentId(hasher.finalize().into())
}

impl Genesis {
    pub(crate) fn sign(identity: &Identity, genesis: Bytes) -> Self {
        let signature = identity.sign(DOMAIN, &genesis).into();
        Self::read(wire::SignedGenesis { genesis, signature }).expect(
            "what this crate signs is well-formed: its lists are normalized and limited before",
        )
    }

    pub(crate) fn read(wire: wire::SignedGenesis) -> Result<Self, Refusal> {
        let this = Self::stored(wire)?;
        if !signed::verify(
            &this.owner,
            DOMAIN,
            &this.wire.genesis,
            &this.wire.signature,
        ) {
            return Err(Refusal::Signature);
        }
        Ok(this)
    }

    /// Reads a genesis whose signature was checked before it was put on disk.
    pub(crate) fn stored(wire: wire::SignedGenesis) -> Result<Self, Refusal> {
        let genesis = wire::Genesis::decode(wire.genesis.clone())
            .map_err(|_| Refusal::Malformed("the genesis cannot be decoded"))?;
        // Each genesis must have one encoding; otherwise a document would have several ids.
        if genesis.encode_to_vec() != wire.genesis {
            return Err(Refusal::Malformed("the genesis is not encoded canonically"));
        }
        let owner = Key::read(&genesis.owner).ok_or(Refusal::Malformed("no owner"))?;
        if genesis.nonce.len() != 16 || genesis.label.len() > MAX_LABEL {
            return Err(Refusal::Malformed(
                "the genesis has a field of a wrong length",
            ));
        }
        let writers = read_keys(&genesis.writers)?;
        let kind = match genesis.single_writer {
            true if !writers.is_empty() => {
                return Err(Refusal::Malformed(
                    "a single-writer document has a list of writers",
                ));
            }
            true => Kind::SingleWriter,
            false => Kind::MultiWriter,
        };
        let readers = Readers::read(genesis.readers.as_ref())?;
        let id = id_of(&wire.genesis);
        let label = genesis.label;
        Ok(Self {
            id,
            owner,
            kind,
            writers,
            readers,
            label,
            wire,
        })
    }

    /// Returns the id that stands for the epoch before the first.
    pub(crate) fn epoch(&self) -> EpochId {
        EpochId(self.id.0)
    }
}
