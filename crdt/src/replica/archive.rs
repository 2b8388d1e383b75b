//! Exports a document to a file and imports it. The file consists of the messages that would send all of the document
//! to a peer, each after its length in 8 bytes (big-endian).
//!
//! Envelopes are written in causal order. Files of earlier versions have them session by session. Both kinds can be
//! imported, because the order is computed from the changes themselves. All data in a file is checked as if a peer had
//! sent it. A file belongs to the user, so its changes may wait in memory for their dependencies without any limit
//! other than the size of the file.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    mem,
};

use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use crate::{
    content::guard,
    document::{Document, Source, Taken, saved},
    error::Error,
    id::{Chain, ChangeId, DocumentId, EpochId, Key, SessionId},
    imported::{Imported, Refused},
    log::{
        causal::{CausalOrder, Position},
        chunk,
        envelope::{Envelope, Header, Proof},
        epoch::Epoch,
        genesis::Genesis,
    },
    refusal::{Refusal, TakeError},
    replica::Replica,
    store::{Store, StoreError, key},
};

const EXPORT: &[u8] = b"weft document 1\n";

/// Approximate bytes of the changes that an import processes at once. Each batch costs a copy of the document.
const BATCH: usize = 4 << 20;

fn not_a_document(why: &str) -> Error {
    Error::Import(why.to_owned())
}

/// The readable contents of a file.
#[derive(Debug, Default)]
struct Content {
    document: Option<DocumentId>,
    genesis: Option<wire::SignedGenesis>,
    epochs: Vec<wire::SignedEpoch>,
    /// Changes of the base of an epoch, from an index on.
    bases: BTreeMap<(Vec<u8>, u64), Vec<Bytes>>,
    /// For rows on disk: the base, whichever epoch it belongs to.
    base: Option<Vec<Bytes>>,
    proofs: Vec<wire::Equivocation>,
    envelopes: Vec<wire::Envelope>,
    faults: Vec<&'static str>,
}

impl Content {
    fn read(content: &[u8]) -> Result<Self, Error> {
        let mut rest = content
            .strip_prefix(EXPORT)
            .ok_or_else(|| not_a_document("it does not begin like one"))?;
        let mut this = Self::default();
        // Each part but the last says that another follows; in files of earlier versions none does.
        let mut is_complete = rest.is_empty();
        while !rest.is_empty() {
            let part = rest.split_first_chunk().and_then(|(length, rest)| {
                let length = usize::try_from(u64::from_be_bytes(*length)).ok()?;
                rest.split_at_checked(length)
            });
            let Some((part, after)) = part else {
                this.faults.push("the file ends early");
                break;
            };
            rest = after;
            match wire::Give::decode(part) {
                Ok(give) => {
                    is_complete |= !give.more;
                    this.add(give)?;
                }
                Err(_) => this.faults.push("a part of the file cannot be decoded"),
            }
        }
        if !is_complete && this.faults.is_empty() {
            this.faults.push("the file ends early");
        }
        Ok(this)
    }

    /// Reads the rows of a document on disk, as far as they are readable.
    fn rows(store: &Store, id: &DocumentId) -> Result<Self, StoreError> {
        let mut this = Self {
            document: Some(*id),
            ..Self::default()
        };
        let rows = |key: Vec<u8>| store.scan(&key, &[], usize::MAX);
        for (_, row) in rows(key::epochs(id))? {
            this.epochs.extend(wire::SignedEpoch::decode(&row[..]));
        }
        for (_, row) in rows(key::proofs(id))? {
            this.proofs.extend(wire::Equivocation::decode(&row[..]));
        }
        for (_, row) in rows(key::log(id))? {
            let is_intact = saved::is_sealed(&row) != Some(false);
            let envelope = wire::Envelope::decode(&row[..]).ok();
            this.envelopes.extend(envelope.filter(|_| is_intact));
        }
        // A base belongs to the last epoch that is a compaction.
        let base: Vec<Bytes> = rows(key::base(id))?
            .into_iter()
            .map(|(_, row)| row.into())
            .collect();
        this.base = Some(base).filter(|base| !base.is_empty());
        Ok(this)
    }

    fn add(&mut self, give: wire::Give) -> Result<(), Error> {
        let id = DocumentId::read(&give.document)
            .ok_or_else(|| not_a_document("a part of it names no document"))?;
        if *self.document.get_or_insert(id) != id {
            return Err(not_a_document("it has parts of several documents"));
        }
        self.genesis = self.genesis.take().or(give.genesis);
        self.epochs.extend(give.epochs);
        if !give.base_changes.is_empty() {
            let position = (give.base.to_vec(), give.base_from);
            self.bases.insert(position, give.base_changes);
        }
        self.proofs.extend(give.proofs);
        self.envelopes.extend(give.envelopes);
        Ok(())
    }

    /// Returns the base of an epoch up to the first gap.
    fn base(&self, epoch: &EpochId) -> Vec<Bytes> {
        if let Some(base) = &self.base {
            return base.clone();
        }
        let mut base: Vec<Bytes> = Vec::new();
        for ((of, from), changes) in &self.bases {
            if of[..] == epoch.0
                && let Ok(known) = usize::try_from((base.len() as u64).saturating_sub(*from))
                && *from <= base.len() as u64
            {
                base.extend(changes.iter().skip(known).cloned());
            }
        }
        base
    }
}

/// Reasons for which envelopes were refused, by session, index and the chain after them.
type Refusals = HashMap<(SessionId, u64, Chain), Refusal>;

/// The envelopes of a file, without duplicates, by session and index.
#[derive(Debug, Default)]
struct Log {
    sessions: BTreeMap<SessionId, Vec<Envelope>>,
}

impl Log {
    /// Decodes the envelopes. Also returns the number of those that cannot be decoded.
    fn read(envelopes: Vec<wire::Envelope>, document: &DocumentId) -> (Self, u64) {
        let mut this = Self::default();
        let mut damaged = 0;
        for envelope in envelopes {
            let header = envelope
                .header
                .as_ref()
                .and_then(|header| Header::read(header, document).ok());
            let Some(header) = header else {
                damaged += 1;
                continue;
            };
            let session = this.sessions.entry(header.session).or_default();
            session.push(Envelope {
                header,
                change: envelope.change,
            });
        }
        for session in this.sessions.values_mut() {
            session.sort_by_key(|envelope| (envelope.header.index, envelope.header.chain()));
            session.dedup_by(|one, other| one.header == other.header && one.change == other.change);
        }
        (this, damaged)
    }

    fn at(&self, (session, position): &Position) -> Option<&Envelope> {
        let position = usize::try_from(*position).ok()?;
        self.sessions.get(session)?.get(position)
    }

    /// Returns the positions in causal order, by the dependencies that the changes declare.
    fn causal(&self) -> Vec<Position> {
        let mut positions: HashMap<ChangeId, Position> = HashMap::new();
        for (session, envelopes) in &self.sessions {
            for (position, envelope) in envelopes.iter().enumerate() {
                positions.insert(envelope.header.change, (*session, position as u64));
            }
        }
        let ranges = self.sessions.iter();
        let ranges = ranges.map(|(session, envelopes)| (*session, 0..envelopes.len() as u64));
        let dependencies = |session: &SessionId, position: u64| {
            let envelope = self.at(&(*session, position));
            let deps = envelope.map(|envelope| chunk::dependencies(&envelope.change));
            let deps = deps.unwrap_or_default().into_iter();
            deps.filter_map(|dep| positions.get(&dep).copied())
                .collect()
        };
        CausalOrder::new(ranges, dependencies).collect()
    }
}

impl Replica {
    /// Returns the document as the content of a file, for [`import`](Self::import) on another node.
    ///
    /// # Errors
    /// Returns [`Error::Unknown`] if the document is not held, [`Error::NotYet`] if it has not arrived, and
    /// [`Error::Store`] if the disk fails.
    pub fn export(&mut self, id: DocumentId) -> Result<Vec<u8>, Error> {
        self.present(&id)?;
        let mut out = EXPORT.to_vec();
        for give in self.give_all(id)? {
            out.extend((give.encoded_len() as u64).to_be_bytes());
            out.extend(give.encode_to_vec());
        }
        Ok(out)
    }

    /// Imports an exported document, which this node holds from now on. All data in the file is checked as if a peer
    /// had sent it. The valid part is kept, whatever is wrong with the rest. At the end, the file is compared with the
    /// document to determine which changes are valid.
    ///
    /// # Errors
    /// Returns [`Error::Import`] if the content is not an exported document, [`Error::TooLarge`], [`Error::Store`];
    /// then nothing was imported. [`Error::ImportIncomplete`] if a part of the file is not valid although it should be;
    /// the valid part is kept, and so are all earlier changes of the document.
    pub fn import(&mut self, content: &[u8]) -> Result<Imported, Error> {
        let content = Content::read(content)?;
        let id = content
            .document
            .ok_or_else(|| match content.faults.first() {
                Some(fault) => not_a_document(fault),
                None => not_a_document("it is empty"),
            })?;
        let is_held = self.held.contains_key(&id);
        let genesis = match content.genesis.clone().map(Genesis::read) {
            Some(Ok(genesis)) if genesis.id == id => Some(genesis),
            Some(_) => return Err(not_a_document("its genesis is damaged")),
            None => None,
        };
        if is_held {
            // If the document on disk is damaged, its readable part is restored first.
            self.hold(id)?;
        }
        if !self.has_genesis(&id) {
            let genesis = genesis.ok_or_else(|| not_a_document("its genesis is missing"))?;
            self.hold(id)?;
            self.arrived(genesis)?;
        }
        let imported = match self.take_content(id, content) {
            Ok(imported) => imported,
            Err(error) => {
                if !is_held {
                    self.remove(id)?;
                }
                return Err(error.into());
            }
        };
        if imported.is_whole() {
            return Ok(imported);
        }
        if !is_held && imported.counted == 0 {
            self.remove(id)?;
        }
        Err(Error::ImportIncomplete(Box::new(imported)))
    }

    /// Restores a damaged document from its readable rows, each checked as if a peer had sent it. Peers that hold the
    /// document get a summary of the result, and are asked for the rest.
    pub(crate) fn salvage(&mut self, id: DocumentId) -> Result<(), StoreError> {
        let content = Content::rows(&self.store, &id)?;
        let genesis = self.held.get(&id).and_then(|held| held.genesis.as_ref());
        let genesis = genesis.and_then(|genesis| Genesis::read(genesis.wire.clone()).ok());
        let Some(genesis) = genesis else {
            // The genesis has to come from a peer; the rows are kept until then.
            self.seek_again(id);
            return Ok(());
        };
        let own = self.store.scan(&key::owns(&id), &[], usize::MAX)?;
        for part in key::PARTS {
            self.store.delete_all(&key::part(*part, &id))?;
        }
        self.keep(genesis);
        let imported = self.take_content(id, content)?;
        if let Some((document, store)) = self.document(&id)? {
            let own = own
                .iter()
                .filter_map(|(row, _)| SessionId::read(row.get(33..)?));
            document.adopt(store, own);
        }
        tracing::warn!(document = %id, kept = %imported, "restored a damaged document from its readable part");
        self.announce_interest(&[id], &[]);
        Ok(())
    }

    fn has_genesis(&self, id: &DocumentId) -> bool {
        self.held.get(id).is_some_and(|held| held.genesis.is_some())
    }

    fn take_content(
        &mut self,
        id: DocumentId,
        mut content: Content,
    ) -> Result<Imported, StoreError> {
        let (log, damaged) = Log::read(mem::take(&mut content.envelopes), &id);
        let envelopes: usize = log.sessions.values().map(Vec::len).sum();
        let mut imported = Imported {
            document: id,
            changes: envelopes as u64 + damaged,
            counted: 0,
            refused: Refused {
                damaged,
                ..Refused::default()
            },
            faults: Vec::new(),
        };
        for fault in &content.faults {
            imported.fault(*fault);
        }
        let epochs = self.import_epochs(id, &content, &mut imported)?;
        let proofs = self.import_proofs(id, &content, &mut imported)?;
        let order = log.causal();
        let mut refused = Refusals::new();
        let mut positions = order.iter().peekable();
        while positions.peek().is_some() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while bytes < BATCH
                && let Some(position) = positions.next()
            {
                let Some(envelope) = log.at(position) else {
                    continue;
                };
                bytes += envelope.change.len();
                batch.push((envelope.clone(), Source::File));
            }
            let Some((document, store)) = self.document(&id)? else {
                break;
            };
            let mut taken = document.take(store, batch)?;
            for (header, refusal) in mem::take(&mut taken.refused) {
                refused.insert((header.session, header.index, header.chain()), refusal);
            }
            self.follow_quietly(id, taken)?;
        }
        self.settle()?;
        let file = File {
            log: &log,
            order: &order,
            refused: &refused,
            epochs: &epochs,
            proofs: &proofs,
        };
        self.compare_with_file(id, &file, &mut imported)?;
        let peers: Vec<Key> = self.peers.keys().copied().collect();
        for peer in peers {
            // Send one summary instead of every change.
            if self.shares(&peer, &id) {
                self.send_summary(peer, id, true)?;
            }
        }
        Ok(imported)
    }

    /// Acts like [`follow`](Self::follow), but peers learn of the changes only after the whole file.
    fn follow_quietly(&mut self, id: DocumentId, taken: Taken) -> Result<(), StoreError> {
        let quiet = Taken {
            quiet: true,
            ..taken
        };
        self.follow(id, quiet)
    }

    /// Imports the owner's decisions. Returns those that could be read.
    fn import_epochs(
        &mut self,
        id: DocumentId,
        content: &Content,
        imported: &mut Imported,
    ) -> Result<Vec<Epoch>, StoreError> {
        let Some((document, store)) = self.document(&id)? else {
            return Ok(Vec::new());
        };
        let genesis = document.genesis.clone();
        let mut epochs = Vec::new();
        for epoch in &content.epochs {
            match Epoch::read(epoch.clone(), &genesis) {
                Ok(epoch) => epochs.push(epoch),
                Err(refusal) => imported.fault(format!("a decision of the owner: {refusal}")),
            }
        }
        epochs.sort_by_key(|epoch| epoch.number);
        let mut chain = document.epochs.clone();
        let mut new: Vec<Epoch> = Vec::new();
        for epoch in &epochs {
            if chain.would_take(epoch, &genesis).is_ok() {
                chain.take(epoch.clone());
                new.retain(|before| before.number < epoch.number);
                new.push(epoch.clone());
            }
        }
        if new.is_empty() {
            return Ok(epochs);
        }
        let compaction = new.iter().rev().find(|epoch| epoch.is_compaction());
        let base = compaction.map_or(Vec::new(), |epoch| content.base(&epoch.id));
        match document.take_epochs(store, new.clone(), &base) {
            Ok(taken) => {
                // Any of these epochs that a peer was sending are present now.
                self.arrivals.remove(&id);
                self.epochs_taken(id, new, None, taken)?;
            }
            Err(TakeError::Refused(Refusal::Early)) => {
                imported.fault("the base of a compaction is incomplete")
            }
            Err(TakeError::Refused(refusal)) => {
                imported.fault(format!("the base of a compaction: {refusal}"));
            }
            Err(TakeError::Store(error)) => return Err(error),
        }
        Ok(epochs)
    }

    fn import_proofs(
        &mut self,
        id: DocumentId,
        content: &Content,
        imported: &mut Imported,
    ) -> Result<Vec<Proof>, StoreError> {
        let mut proofs = Vec::new();
        for proof in &content.proofs {
            match Proof::read(proof, &id) {
                Ok(proof) => {
                    self.take_proof(id, &proof)?;
                    proofs.push(proof);
                }
                Err(refusal) => imported.fault(format!("a proof of equivocation: {refusal}")),
            }
        }
        Ok(proofs)
    }

    /// Determines which changes of a file are valid, and the reason for the others.
    fn compare_with_file(
        &mut self,
        id: DocumentId,
        file: &File<'_>,
        imported: &mut Imported,
    ) -> Result<(), StoreError> {
        if let Some((document, _)) = self.document(&id)? {
            compare_decisions(document, file, imported);
            compare_changes(document, file, imported);
        }
        Ok(())
    }
}

/// The contents of a file, and the refusals of its changes.
struct File<'a> {
    log: &'a Log,
    order: &'a [Position],
    refused: &'a Refusals,
    epochs: &'a [Epoch],
    proofs: &'a [Proof],
}

fn compare_decisions(document: &Document, file: &File<'_>, imported: &mut Imported) {
    for epoch in file.epochs {
        let is_decided = document.epochs.get(epoch.number);
        // Of two decisions with the same number, all replicas choose the same one.
        if is_decided.is_none() {
            imported.fault(format!(
                "decision {} of the owner does not follow the known ones",
                epoch.number
            ));
        }
    }
    for proof in file.proofs {
        let known = document.proof(&proof.session());
        if document.is_relevant(proof) && known.is_none_or(|known| known.index() > proof.index()) {
            imported.fault("there is no room for a proof of equivocation");
        }
    }
}

fn compare_changes(document: &Document, file: &File<'_>, imported: &mut Imported) {
    let of_file: BTreeSet<EpochId> = file
        .epochs
        .iter()
        .map(|epoch| epoch.id)
        .chain([document.genesis.epoch()])
        .collect();
    let mut void: HashSet<ChangeId> = HashSet::new();
    for position in file.order {
        let Some(envelope) = file.log.at(position) else {
            continue;
        };
        let header = &envelope.header;
        let chain = header.chain();
        if document.chain_at(&header.session, header.index.saturating_add(1)) == Some(chain) {
            imported.counted += 1;
            continue;
        }
        let refusal = file.refused.get(&(header.session, header.index, chain));
        let knows = document.knows(&header.run.epoch);
        // A change is void only if it is intact: its author and session may be damaged too.
        let is_intact = || {
            let hash = guard::hash_of(&envelope.change);
            hash == Some(header.change) && header.is_signed(&document.id())
        };
        // The change is void if an earlier change of its session, or one that it builds on, is void.
        let follows_void = || {
            let deps = chunk::dependencies(&envelope.change);
            deps.iter().any(|dep| void.contains(dep))
        };
        match refusal {
            Some(refusal) if refusal.is_offence() || *refusal == Refusal::Foreign => {
                imported.refused.damaged += 1;
                imported.fault(refusal.to_string());
            }
            Some(Refusal::Full) => imported.refused.full += 1,
            _ if !is_intact() => {
                imported.refused.damaged += 1;
                imported.fault("a change or its signature is damaged");
            }
            Some(Refusal::Void) => {
                imported.refused.void += 1;
                void.insert(header.change);
            }
            _ if knows && document.is_void(header)
                || !knows && of_file.contains(&header.run.epoch)
                || follows_void() =>
            {
                imported.refused.void += 1;
                void.insert(header.change);
            }
            _ => imported.refused.missing += 1,
        }
    }
}
