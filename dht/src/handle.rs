//! The handle to the DHT: signs records, sends requests to the behaviour and waits for their results.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use libp2p::{Multiaddr, PeerId, identity::Keypair, kad};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    Disk, Record,
    behaviour::{Behaviour, Channels},
    command::{Command, DhtError, Enough, Progress, Status, Stored},
    record,
};

/// Number of nodes with valid records after which [`Dht::get_some`] returns. A record is stored at twenty nodes, so a
/// few answers suffice.
const ENOUGH: usize = 4;

/// Most requests in the channel to the behaviour.
const COMMANDS: usize = 256;

/// Number of times that a record is signed again because a newer record of this node is known: once for a record that
/// was published while the clock was ahead, and further times for records that are published at the same moment.
const TRIES: usize = 4;

/// A handle to the DHT. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dht {
    keys: Keypair,
    commands: mpsc::Sender<Command>,
    nodes: watch::Receiver<usize>,
    nodes_met: watch::Receiver<u64>,
    /// Highest sequence number assigned to, or seen in, a record of this node.
    sequence: Arc<AtomicU64>,
}

impl Dht {
    /// Creates a DHT that signs its records with `keys` and stores records in memory. The behaviour goes into the
    /// swarm.
    pub fn new(keys: &Keypair) -> (Self, Behaviour) {
        Self::make(keys, None)
    }

    /// Creates a DHT like [`new`](Self::new) that stores records on disk, so that they survive a restart.
    pub fn on_disk(keys: &Keypair, disk: Disk) -> (Self, Behaviour) {
        Self::make(keys, Some(disk))
    }

    fn make(keys: &Keypair, disk: Option<Disk>) -> (Self, Behaviour) {
        let (commands, requests) = mpsc::channel(COMMANDS);
        let (count, nodes) = watch::channel(0);
        let (met, nodes_met) = watch::channel(0);
        let channels = Channels {
            requests,
            count,
            met,
        };
        let behaviour = Behaviour::new(keys.public().to_peer_id(), disk, channels);
        let dht = Self {
            keys: keys.clone(),
            commands,
            nodes,
            nodes_met,
            sequence: behaviour.sequence(),
        };
        (dht, behaviour)
    }

    /// Publishes `value` under `key` and `subkey` for `ttl`, and returns the number of other nodes that stored the
    /// record. Zero is no error: this node stores the record itself and returns it to every node that asks.
    ///
    /// # Errors
    /// Returns [`DhtError`] if the record is invalid or superseded, or if the disk or the network fails.
    pub async fn publish(
        &self,
        key: &[u8],
        subkey: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.put(key, subkey, Some(value), ttl).await
    }

    /// Returns the unexpired records that this node has published under keys that begin with `prefix`. A withdrawn
    /// record has no [value](Record::value).
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn own(&self, prefix: &[u8]) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let prefix = prefix.to_vec();
        self.send(Command::Own { prefix, reply }).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// Returns at most `most` records of any publisher that this node stores under keys that begin with `prefix`. No
    /// other node is asked.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn seen(&self, prefix: &[u8], most: usize) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let prefix = prefix.to_vec();
        self.send(Command::Seen(prefix, most, reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// Publishes a value as [`publish`](Self::publish) does, but may skip the lookup. If a lookup for a neighboring key
    /// has ended within the last ten minutes, the record is stored at the nodes that it found. This suits renewals and
    /// large batches: ten thousand keys in the order of their [`key_position`]s cost little more than storing them.
    ///
    /// # Errors
    /// Returns [`DhtError`] if the record is invalid or superseded, or if the disk or the network fails.
    pub async fn publish_near(
        &self,
        key: &[u8],
        subkey: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.sign_and_store((key, subkey), Some(value), ttl, true)
            .await
    }

    /// Renews a record as it was signed, like [`publish_near`](Self::publish_near), and returns the number of other
    /// nodes that stored it or already had it.
    ///
    /// The record is signed anew in two cases: if it claims to live longer than allowed, or if other nodes have a
    /// record with a higher number. In both cases this machine's clock was ahead when one of the records was published.
    ///
    /// # Errors
    /// Returns [`DhtError`] if the record is invalid or superseded, or if the disk or the network fails.
    pub async fn renew(&self, record: Record) -> Result<usize, DhtError> {
        let ttl = record.remaining().min(record::MAX_TTL);
        if record.remaining() <= record::MAX_TTL + record::MAX_SKEW {
            let stored = match self.send_record(record.clone(), true).await {
                Err(DhtError::Superseded(_)) => return Ok(0),
                stored => stored?,
            };
            if !self.is_behind(&record, &stored).await? {
                return Ok(stored.took);
            }
        }
        let about = (record.key(), record.subkey());
        self.sign_and_store(about, record.value(), ttl, true).await
    }

    /// Withdraws the record that this node published under `key` and `subkey`, and returns the number of other nodes
    /// that stored the withdrawal.
    ///
    /// # Errors
    /// Returns [`DhtError`] if the record is invalid or superseded, or if the disk or the network fails.
    pub async fn withdraw(
        &self,
        key: &[u8],
        subkey: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.put(key, subkey, None, ttl).await
    }

    /// Returns the records under `key`, all verified: for each publisher and subkey, the newest one. Asks all nodes
    /// that should have records. A node that does not answer delays the lookup by a second at most; the whole lookup
    /// takes at most 10 s.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn get(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.lookup(key, Enough::All).await.map(valid)
    }

    /// Looks up `key` like [`get`](Self::get), but returns as soon as `is_enough` accepts the records found so far.
    /// These include records of this node's own store, and withdrawn records, which have no [value](Record::value).
    /// `is_enough` runs in the swarm's task, at each answer and ten times a second, so it must be quick.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn get_until<F>(&self, key: &[u8], is_enough: F) -> Result<Vec<Record>, DhtError>
    where
        F: Fn(&mut dyn Iterator<Item = &Record>, Progress) -> bool + Send + 'static,
    {
        let enough = Enough::When(Box::new(is_enough));
        self.lookup(key, enough).await.map(valid)
    }

    /// Returns one connected peer's answer for `key`, including withdrawn records. For this node's own id, returns the
    /// records of its own store. The result is empty if the peer is not connected or does not answer within a second.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn ask(&self, peer: PeerId, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let key = key.to_vec();
        self.send(Command::Ask { key, peer, reply }).await?;
        let mut records = answer.await.map_err(|_| DhtError::Stopped)?;
        records.retain(|record| !record.remaining().is_zero());
        Ok(records)
    }

    /// Returns the records that this node itself stores under `key`, including withdrawn records. No other node is
    /// asked.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn kept(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.ask(self.keys.public().to_peer_id(), key).await
    }

    /// Looks up `key` like [`get`](Self::get), and returns withdrawn records as well, which have no
    /// [value](Record::value). For callers that remember earlier records.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn get_with_withdrawn(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.lookup(key, Enough::All).await
    }

    /// Looks up `key` like [`get`](Self::get), but returns after the first few answers. For callers to which some of
    /// many records are enough.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn get_some(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.lookup(key, Enough::Answers(ENOUGH)).await.map(valid)
    }

    async fn lookup(&self, key: &[u8], enough: Enough) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let key = key.to_vec();
        self.send(Command::Get { key, enough, reply }).await?;
        let mut records = answer.await.map_err(|_| DhtError::Stopped)?;
        records.retain(|record| !record.remaining().is_zero());
        Ok(records)
    }

    /// Tells the DHT whether peers outside this node's own networks can reach it. An unreachable node is a server only
    /// until it has connected to a peer outside those networks.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn set_reachable(&self, reachable: bool) -> Result<(), DhtError> {
        self.send(Command::Reachable(reachable)).await
    }

    /// Returns addresses of up to `most` nodes of the routing table, for the next start. Connected nodes come first,
    /// and each address ends in `/p2p/<PeerId>`.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn routes(&self, most: usize) -> Result<Vec<Multiaddr>, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Routes(most, reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// Returns the state of the DHT as this node sees it.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn status(&self) -> Result<Status, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Status(reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// Returns a receiver for the number of nodes in the routing table.
    pub fn nodes(&self) -> watch::Receiver<usize> {
        self.nodes.clone()
    }

    /// Returns a receiver for the number of times that a node was met, or met again after it was gone. Such a node may
    /// not have this node's records.
    pub fn nodes_met(&self) -> watch::Receiver<u64> {
        self.nodes_met.clone()
    }

    /// Returns a receiver that is notified when the records of any publisher change that this node stores under
    /// `key`. In a mesh of fewer than some twenty nodes, every node stores every record. Returns `None` if too many
    /// keys are watched.
    ///
    /// # Errors
    /// Returns [`DhtError::Stopped`] if the network has stopped.
    pub async fn changes(&self, key: &[u8]) -> Result<Option<watch::Receiver<()>>, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Watch(key.to_vec(), reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    async fn put(
        &self,
        key: &[u8],
        subkey: &[u8],
        value: Option<&[u8]>,
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        // A withdrawal goes to the nodes that have the record.
        let reuse_lookup = value.is_none();
        self.sign_and_store((key, subkey), value, ttl, reuse_lookup)
            .await
    }

    /// Signs and stores a record with a sequence number above all known ones. If other nodes turn out to know a higher
    /// number, signs it once more.
    async fn sign_and_store(
        &self,
        (key, subkey): (&[u8], &[u8]),
        value: Option<&[u8]>,
        ttl: Duration,
        reuse_lookup: bool,
    ) -> Result<usize, DhtError> {
        let mut tries = 0..TRIES;
        loop {
            let record = Record::sign(&self.keys, key, subkey, value, self.next_sequence(), ttl)?;
            let is_last = tries.next().is_none();
            match self.send_record(record.clone(), reuse_lookup).await {
                // Another record, published at the same time, has overtaken this one.
                Err(DhtError::Superseded(number)) if !is_last => self.raise(number),
                Err(error) => return Err(error),
                Ok(stored) if is_last || !self.is_behind(&record, &stored).await? => {
                    return Ok(stored.took);
                }
                Ok(_) => {}
            }
        }
    }

    /// Returns true if a node that refused this record has a newer record of this node that is unknown here. That one
    /// was published while the clock was ahead. Its sequence number counts from now on.
    async fn is_behind(&self, record: &Record, stored: &Stored) -> Result<bool, DhtError> {
        let about = |other: &&Record| {
            other.key() == record.key() && other.is_about(&record.publisher(), record.subkey())
        };
        let newest = |records: &[Record]| records.iter().filter(about).map(Record::sequence).max();
        for peer in &stored.refused {
            let theirs = newest(&self.ask(*peer, record.key()).await?);
            let Some(number) = theirs.filter(|number| *number >= record.sequence()) else {
                continue;
            };
            self.raise(number);
            let ours = newest(&self.own(record.key()).await?);
            return Ok(ours.is_none_or(|ours| ours == record.sequence()));
        }
        Ok(false)
    }

    async fn send_record(&self, record: Record, reuse_lookup: bool) -> Result<Stored, DhtError> {
        let (reply, answer) = oneshot::channel();
        let record = Box::new(record);
        let put = Command::Put {
            record,
            reuse_lookup,
            reply,
        };
        self.send(put).await?;
        answer.await.map_err(|_| DhtError::Stopped)?
    }

    /// Notes a sequence number that was seen in a record of this node.
    pub(crate) fn raise(&self, number: u64) {
        self.sequence.fetch_max(number, Ordering::AcqRel);
    }

    /// Returns the next sequence number: the clock in milliseconds, or one more than the highest known number if the
    /// clock is not above that. It thus increases even if the clock was ahead and has been set back.
    pub(crate) fn next_sequence(&self) -> u64 {
        let now = record::now();
        let next = |last: u64| now.max(last.saturating_add(1));
        match self
            .sequence
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |last| Some(next(last)))
        {
            Ok(last) | Err(last) => next(last),
        }
    }

    async fn send(&self, command: Command) -> Result<(), DhtError> {
        self.commands
            .send(command)
            .await
            .map_err(|_| DhtError::Stopped)
    }
}

/// Returns the position of a key in the key space. Keys that are adjacent in the order of their positions are
/// neighbors.
pub fn key_position(key: &[u8]) -> [u8; 32] {
    let key = kad::KBucketKey::new(key.to_vec());
    let bytes = key.hashed_bytes().try_into();
    bytes.expect("positions are SHA-256 hashes")
}

/// Keeps the records that were not withdrawn.
fn valid(mut records: Vec<Record>) -> Vec<Record> {
    records.retain(|record| record.value().is_some());
    records
}
