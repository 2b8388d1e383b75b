//! The owner's decisions about who may write, and about compactions of the content.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use crate::{
    id::{Chain, ChangeId, DocumentId, EpochId, Key, SessionId},
    log::{
        genesis::{Genesis, Kind, Readers, read_keys, to_wire},
        signed::{self, Identity},
    },
    refusal::Refusal,
};

const DOMAIN: &[u8] = b"weft document epoch v1\0";
const NAME: &str = "weft document epoch v1";

/// Most epochs of a document. All of them are kept, because a new replica checks the whole chain.
pub const MAX_EPOCHS: usize = 4096;

/// Most sessions of a document between two compactions, and most changes in a base.
pub(crate) const MAX_SESSIONS: usize = 4096;
pub(crate) const MAX_BASE: usize = 4096;

/// The length of a session: the number of its envelopes, and the chain after the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) count: u64,
    pub(crate) chain: Chain,
}

pub(crate) type Heads = BTreeMap<SessionId, Head>;

pub(crate) fn heads_to_wire(heads: &Heads) -> Vec<wire::SessionHead> {
    let one = |(session, head): (&SessionId, &Head)| wire::SessionHead {
        session: Bytes::copy_from_slice(&session.0),
        count: head.count,
        chain: Bytes::copy_from_slice(&head.chain.0),
    };
    heads.iter().map(one).collect()
}

pub(crate) fn read_heads(heads: &[wire::SessionHead]) -> Result<Heads, Refusal> {
    if heads.len() > MAX_SESSIONS {
        return Err(Refusal::Malformed("a list of sessions is too long"));
    }
    let read = |head: &wire::SessionHead| {
        let session = SessionId::read(&head.session)?;
        let chain = Chain::read(&head.chain)?;
        Some((
            session,
            Head {
                count: head.count,
                chain,
            },
        ))
    };
    let all: Option<Heads> = heads.iter().map(read).collect();
    let all = all.ok_or(Refusal::Malformed(
        "a session's head has a field of a wrong length",
    ))?;
    if all.len() != heads.len() {
        return Err(Refusal::Malformed("a session is listed twice"));
    }
    Ok(all)
}

/// The content of an epoch.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) writers: Vec<Key>,
    pub(crate) readers: Readers,
    pub(crate) heads: Heads,
    pub(crate) base: Vec<ChangeId>,
}

/// A signed epoch that was checked, except for its position in the chain.
#[derive(Debug, Clone)]
pub(crate) struct Epoch {
    pub(crate) id: EpochId,
    pub(crate) document: DocumentId,
    pub(crate) number: u64,
    pub(crate) previous: EpochId,
    pub(crate) terms: Terms,
    pub(crate) wire: wire::SignedEpoch,
}

impl Epoch {
    pub(crate) fn sign(
        identity: &Identity,
        genesis: &Genesis,
        number: u64,
        previous: EpochId,
        terms: &Terms,
    ) -> Self {
        let epoch = wire::Epoch {
            document: Bytes::copy_from_slice(&genesis.id.0),
            number,
            previous: Bytes::copy_from_slice(&previous.0),
            writers: to_wire(&terms.writers),
            readers: Some(terms.readers.to_wire()),
            heads: heads_to_wire(&terms.heads),
            base: terms
                .base
                .iter()
                .map(|id| Bytes::copy_from_slice(&id.0))
                .collect(),
        }
        .encode_to_vec();
        let signature = identity.sign(DOMAIN, &epoch).into();
        let wire = wire::SignedEpoch {
            epoch: epoch.into(),
            signature,
        };
        Self::read(wire, genesis).expect(
            "what this crate signs is well-formed: its lists are normalized and limited before",
        )
    }

    pub(crate) fn read(wire: wire::SignedEpoch, genesis: &Genesis) -> Result<Self, Refusal> {
        let this = Self::stored(wire, genesis)?;
        if !signed::verify(
            &genesis.owner,
            DOMAIN,
            &this.wire.epoch,
            &this.wire.signature,
        ) {
            return Err(Refusal::Signature);
        }
        Ok(this)
    }

    /// Reads an epoch whose signature was checked before it was put on disk.
    pub(crate) fn stored(wire: wire::SignedEpoch, genesis: &Genesis) -> Result<Self, Refusal> {
        let epoch = wire::Epoch::decode(wire.epoch.clone())
            .map_err(|_| Refusal::Malformed("an epoch cannot be decoded"))?;
        if epoch.document[..] != genesis.id.0 {
            return Err(Refusal::Malformed("an epoch belongs to another document"));
        }
        let previous = EpochId::read(&epoch.previous)
            .ok_or(Refusal::Malformed("an epoch has no predecessor"))?;
        if epoch.number == 0 || epoch.number > MAX_EPOCHS as u64 {
            return Err(Refusal::Malformed("an epoch's number is out of range"));
        }
        let writers = read_keys(&epoch.writers)?;
        if genesis.kind == Kind::SingleWriter && !writers.is_empty() {
            return Err(Refusal::Malformed(
                "a single-writer document has a list of writers",
            ));
        }
        if epoch.base.len() > MAX_BASE {
            return Err(Refusal::Malformed("a base has too many changes"));
        }
        let base: Option<Vec<_>> = epoch.base.iter().map(|id| ChangeId::read(id)).collect();
        let terms = Terms {
            writers,
            readers: Readers::read(epoch.readers.as_ref())?,
            heads: read_heads(&epoch.heads)?,
            base: base.ok_or(Refusal::Malformed("a change's hash does not have 32 bytes"))?,
        };
        let mut hasher = blake3::Hasher::new_derive_key(NAME);
        hasher.update(&wire.epoch).update(&wire.signature);
        let id = EpochId(hasher.finalize().into());
        let (document, number) = (genesis.id, epoch.number);
        Ok(Self {
            id,
            document,
            number,
            previous,
            terms,
            wire,
        })
    }

    /// Returns true if the epoch compacts the document.
    pub(crate) fn is_compaction(&self) -> bool {
        !self.terms.base.is_empty()
    }

    /// Returns the actor of the base's changes. No session has this actor.
    pub(crate) fn base_actor(document: &DocumentId, number: u64, previous: &EpochId) -> [u8; 16] {
        let mut hasher = blake3::Hasher::new_derive_key("weft document base v1");
        hasher
            .update(&document.0)
            .update(&previous.0)
            .update(&number.to_be_bytes());
        prefix(hasher.finalize().as_bytes())
    }
}

pub(crate) fn prefix(bytes: &[u8; 32]) -> [u8; 16] {
    let mut actor = [0; 16];
    actor.copy_from_slice(&bytes[..16]);
    actor
}

/// The current chain of epochs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Epochs {
    chain: Vec<Epoch>,
    numbers: HashMap<EpochId, u64>,
    /// Number of the last epoch that compacted the document.
    compaction: Option<u64>,
}

/// The part of a session that the epochs permit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// All of the session.
    Open,
    /// The envelopes up to this head, which also fixes the branch.
    Until(Head),
    /// No part of the session.
    Void,
}

impl Epochs {
    pub(crate) fn last(&self) -> Option<&Epoch> {
        self.chain.last()
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Epoch> {
        self.chain.iter()
    }

    pub(crate) fn count(&self) -> u64 {
        self.chain.len() as u64
    }

    pub(crate) fn get(&self, number: u64) -> Option<&Epoch> {
        self.chain
            .get(usize::try_from(number.checked_sub(1)?).ok()?)
    }

    /// Returns the id of the epoch with this number; the genesis has number 0.
    pub(crate) fn id_of(&self, number: u64, genesis: &Genesis) -> Option<EpochId> {
        match number {
            0 => Some(genesis.epoch()),
            number => self.get(number).map(|epoch| epoch.id),
        }
    }

    pub(crate) fn current(&self, genesis: &Genesis) -> EpochId {
        self.last().map_or(genesis.epoch(), |epoch| epoch.id)
    }

    /// Returns the number of an epoch of this chain.
    pub(crate) fn number_of(&self, id: &EpochId, genesis: &Genesis) -> Option<u64> {
        match *id == genesis.epoch() {
            true => Some(0),
            false => self.numbers.get(id).copied(),
        }
    }

    pub(crate) fn writers<'a>(&'a self, genesis: &'a Genesis) -> &'a [Key] {
        self.last()
            .map_or(&genesis.writers, |epoch| &epoch.terms.writers)
    }

    pub(crate) fn readers<'a>(&'a self, genesis: &'a Genesis) -> &'a Readers {
        self.last()
            .map_or(&genesis.readers, |epoch| &epoch.terms.readers)
    }

    /// Returns the last epoch that compacted the document, if there is one.
    pub(crate) fn compaction(&self) -> Option<&Epoch> {
        self.get(self.compaction?)
    }

    /// Returns the permitted part of a session of `author` that began in `epoch`.
    pub(crate) fn standing(
        &self,
        genesis: &Genesis,
        author: &Key,
        session: &SessionId,
        epoch: &EpochId,
    ) -> Standing {
        let Some(number) = self.number_of(epoch, genesis) else {
            return Standing::Void;
        };
        if self
            .compaction()
            .is_some_and(|compaction| number < compaction.number)
        {
            return Standing::Void;
        }
        if *author == genesis.owner {
            return Standing::Open;
        }
        let began = match number {
            0 => &genesis.writers,
            number => match self.get(number) {
                Some(epoch) => &epoch.terms.writers,
                None => return Standing::Void,
            },
        };
        if began.binary_search(author).is_err() {
            return Standing::Void;
        }
        // The first later epoch that does not list the author determines the permitted part.
        let revoked = self.chain[number as usize..]
            .iter()
            .find(|later| later.terms.writers.binary_search(author).is_err());
        match revoked {
            None => Standing::Open,
            Some(epoch) => match epoch.terms.heads.get(session) {
                Some(head) if head.count > 0 => Standing::Until(*head),
                _ => Standing::Void,
            },
        }
    }

    /// Checks whether `epoch` would enter the chain: it follows the last epoch, or replaces one of the same number with
    /// a greater hash. Two epochs have the same number only if the owner's key has signed both, because of a restored
    /// backup or a dishonest owner. All replicas then choose the same one.
    pub(crate) fn would_take(&self, epoch: &Epoch, genesis: &Genesis) -> Result<(), Refusal> {
        if let Some(known) = self.get(epoch.number) {
            if known.id == epoch.id {
                return Err(Refusal::Known);
            }
            if known.id < epoch.id {
                return Err(Refusal::Void);
            }
        }
        match self.id_of(epoch.number - 1, genesis) {
            Some(previous) if previous == epoch.previous => Ok(()),
            Some(_) => Err(Refusal::Void),
            None => Err(Refusal::Early),
        }
    }

    /// Adds an epoch that [`would_take`](Self::would_take) allows. Drops the epochs from its number on, and returns how
    /// many there were.
    pub(crate) fn take(&mut self, epoch: Epoch) -> usize {
        let position = (epoch.number - 1) as usize;
        let dropped = self.chain.split_off(position);
        for epoch in &dropped {
            self.numbers.remove(&epoch.id);
        }
        self.numbers.insert(epoch.id, epoch.number);
        let is_compaction = epoch.is_compaction();
        self.chain.push(epoch);
        if is_compaction {
            self.compaction = self.last().map(|epoch| epoch.number);
        } else if dropped.iter().any(Epoch::is_compaction) {
            let last = self.iter().rev().find(|epoch| epoch.is_compaction());
            self.compaction = last.map(|epoch| epoch.number);
        }
        dropped.len()
    }
}
