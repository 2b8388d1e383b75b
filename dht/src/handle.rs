//! The handle to the DHT: signs statements, sends requests to the behaviour and waits for their outcomes.

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
    behaviour::{Behaviour, Ends},
    command::{Command, DhtError, Enough, Progress, Status, Stored},
    record,
};

/// [`Dht::get_some`] ends once this many nodes have answered with valid statements: they were stored at twenty.
const ENOUGH: usize = 4;

/// Requests that may wait.
const COMMANDS: usize = 256;

/// The number of times that a record is signed again because a newer record of this node is known: once for a record
/// that was published while the clock was ahead, and further times for records that are published at the same moment.
const TRIES: usize = 4;

/// The handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dht {
    keys: Keypair,
    commands: mpsc::Sender<Command>,
    nodes: watch::Receiver<usize>,
    meetings: watch::Receiver<u64>,
    /// The highest sequence number given out or seen in a statement of this node.
    sequence: Arc<AtomicU64>,
}

impl Dht {
    /// A DHT whose statements `keys` signs; the behaviour goes into the swarm. What it keeps is in memory.
    pub fn new(keys: &Keypair) -> (Self, Behaviour) {
        Self::make(keys, None)
    }

    /// As [`new`](Self::new), with what it keeps on disk: it is there again after a restart.
    pub fn on_disk(keys: &Keypair, disk: Disk) -> (Self, Behaviour) {
        Self::make(keys, Some(disk))
    }

    fn make(keys: &Keypair, disk: Option<Disk>) -> (Self, Behaviour) {
        let (commands, requests) = mpsc::channel(COMMANDS);
        let (count, nodes) = watch::channel(0);
        let (met, meetings) = watch::channel(0);
        let ends = Ends {
            requests,
            count,
            met,
        };
        let behaviour = Behaviour::new(keys.public().to_peer_id(), disk, ends);
        let dht = Self {
            keys: keys.clone(),
            commands,
            nodes,
            meetings,
            sequence: behaviour.sequence(),
        };
        (dht, behaviour)
    }

    /// States `value` under `key` and `subkey` for `ttl`; how many other nodes took it. Zero is no error: this node keeps it, and
    /// whoever asks this node gets it.
    ///
    /// # Errors
    /// [`DhtError`].
    pub async fn publish(
        &self,
        key: &[u8],
        subkey: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.put(key, subkey, Some(value), ttl).await
    }

    /// What this node states under keys that begin with `prefix`, and what it has taken back ([`Record::value`] is `None`), as far as it still holds.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn own(&self, prefix: &[u8]) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let prefix = prefix.to_vec();
        self.send(Command::Own { prefix, reply }).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// What anybody states under keys that begin with `prefix`, as far as this node keeps it: no other is asked. At most `most` statements.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn seen(&self, prefix: &[u8], most: usize) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let prefix = prefix.to_vec();
        self.send(Command::Seen(prefix, most, reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// As [`publish`](Self::publish), for what has been stated before, or is one of many: it is stored where a look-up towards a neighbouring key has ended within the last ten
    /// minutes, if there was one. Ten thousand keys in the order of their [`place`]s cost little more than their storing.
    ///
    /// # Errors
    /// [`DhtError`].
    pub async fn publish_again(
        &self,
        key: &[u8],
        subkey: &[u8],
        value: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.state((key, subkey), Some(value), ttl, true).await
    }

    /// Says a statement again, as it was signed, as [`publish_again`](Self::publish_again) does; how many other nodes
    /// took it, or have it.
    ///
    /// It is signed anew if it claims to live longer than any may, or if others have one of a higher number: this
    /// machine's clock was ahead when one of them was stated.
    ///
    /// # Errors
    /// [`DhtError`].
    pub async fn say_again(&self, record: Record) -> Result<usize, DhtError> {
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
        self.state(about, record.value(), ttl, true).await
    }

    /// Takes back what this node stated under `key` and `subkey`; how many other nodes heard it.
    ///
    /// # Errors
    /// [`DhtError`].
    pub async fn withdraw(
        &self,
        key: &[u8],
        subkey: &[u8],
        ttl: Duration,
    ) -> Result<usize, DhtError> {
        self.put(key, subkey, None, ttl).await
    }

    /// What anybody states under `key`, each statement checked, at most one per publisher and subkey, the newest. Asks every node that should
    /// know. One that does not answer delays it by a second at most, and 10 s are the limit.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn get(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.look_up(key, Enough::All).await.map(valid)
    }

    /// As [`get`](Self::get), and ends as soon as `is_enough` accepts the statements found so far, those of this
    /// node's own store among them. Statements that were taken back are among them ([`Record::value`] is `None`). It
    /// is called in the swarm's task, with each answer and ten times a second: it must be quick.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn get_until<F>(&self, key: &[u8], is_enough: F) -> Result<Vec<Record>, DhtError>
    where
        F: Fn(&mut dyn Iterator<Item = &Record>, Progress) -> bool + Send + 'static,
    {
        let enough = Enough::When(Box::new(is_enough));
        self.look_up(key, enough).await.map(valid)
    }

    /// Returns the answer of one connected peer for `key`, including statements that were taken back; for this node's
    /// own id, what its own store has. The result is empty if the peer is not connected, or does not answer within a
    /// second.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn ask(&self, peer: PeerId, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let key = key.to_vec();
        self.send(Command::Ask { key, peer, reply }).await?;
        let mut records = answer.await.map_err(|_| DhtError::Stopped)?;
        records.retain(|record| !record.remaining().is_zero());
        Ok(records)
    }

    /// Returns what this node itself keeps under `key`, including statements that were taken back; no other node is
    /// asked.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn kept(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.ask(self.keys.public().to_peer_id(), key).await
    }

    /// As [`get`](Self::get), and what has been taken back as well ([`Record::value`] is `None`): for whoever remembers what was stated before.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn get_with_removed(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.look_up(key, Enough::All).await
    }

    /// As [`get`](Self::get), but content with what the first few nodes say: for when some of many statements will do.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn get_some(&self, key: &[u8]) -> Result<Vec<Record>, DhtError> {
        self.look_up(key, Enough::Answers(ENOUGH)).await.map(valid)
    }

    async fn look_up(&self, key: &[u8], enough: Enough) -> Result<Vec<Record>, DhtError> {
        let (reply, answer) = oneshot::channel();
        let key = key.to_vec();
        self.send(Command::Get { key, enough, reply }).await?;
        let mut records = answer.await.map_err(|_| DhtError::Stopped)?;
        records.retain(|record| !record.remaining().is_zero());
        Ok(records)
    }

    /// Says whether strangers reach this node. One that they do not reach serves only a mesh in which it has met nobody from outside its own networks.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn set_reachable(&self, reachable: bool) -> Result<(), DhtError> {
        self.send(Command::Reachable(reachable)).await
    }

    /// Where some of the nodes of the routing table are, connected ones first, each address ending in `/p2p/<PeerId>`: for the next start.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn routes(&self, most: usize) -> Result<Vec<Multiaddr>, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Routes(most, reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// What the DHT looks like from here.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
    pub async fn status(&self) -> Result<Status, DhtError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Status(reply)).await?;
        answer.await.map_err(|_| DhtError::Stopped)
    }

    /// The number of nodes in the routing table, as it changes.
    pub fn nodes(&self) -> watch::Receiver<usize> {
        self.nodes.clone()
    }

    /// Counts the nodes met, and met again after they were gone: each may know nothing of what was stated before.
    pub fn meetings(&self) -> watch::Receiver<u64> {
        self.meetings.clone()
    }

    /// Tells when something changes in what this node keeps under `key`, whoever states it: in a mesh of less than some
    /// twenty nodes every node keeps every record. `None` if too many keys are watched.
    ///
    /// # Errors
    /// [`DhtError::Stopped`].
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
        // What is taken back is told to those who have it.
        let again = value.is_none();
        self.state((key, subkey), value, ttl, again).await
    }

    /// Signs and stores a statement of a number above all that are known. If others turn out to know a higher one, it
    /// is signed once more.
    async fn state(
        &self,
        (key, subkey): (&[u8], &[u8]),
        value: Option<&[u8]>,
        ttl: Duration,
        again: bool,
    ) -> Result<usize, DhtError> {
        let mut tries = 0..TRIES;
        loop {
            let record = Record::sign(&self.keys, key, subkey, value, self.next_sequence(), ttl)?;
            let is_last = tries.next().is_none();
            match self.send_record(record.clone(), again).await {
                // Another that was stated at the same time has overtaken it.
                Err(DhtError::Superseded(number)) if !is_last => self.raise(number),
                Err(error) => return Err(error),
                Ok(stored) if is_last || !self.is_behind(&record, &stored).await? => {
                    return Ok(stored.took);
                }
                Ok(_) => {}
            }
        }
    }

    /// Returns true if a node that has refused this statement has one of this node's that is newer, and this node
    /// itself knows none: it was stated while the clock was ahead. Its number counts from now on.
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

    async fn send_record(&self, record: Record, again: bool) -> Result<Stored, DhtError> {
        let (reply, answer) = oneshot::channel();
        let record = Box::new(record);
        let put = Command::Put {
            record,
            again,
            reply,
        };
        self.send(put).await?;
        answer.await.map_err(|_| DhtError::Stopped)?
    }

    /// A statement of this node with this number is known.
    pub(crate) fn raise(&self, number: u64) {
        self.sequence.fetch_max(number, Ordering::AcqRel);
    }

    /// Returns the clock in milliseconds, or, if that is no more than a number that was given out or seen before, the
    /// next after that: also when the clock was ahead and has been set back.
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

/// Where in the key space a key is: keys in the order of their places are neighbours of each other.
pub fn place(key: &[u8]) -> [u8; 32] {
    let key = kad::KBucketKey::new(key.to_vec());
    let bytes = key.hashed_bytes().try_into();
    bytes.expect("places are SHA-256 hashes")
}

/// What has not been taken back.
fn valid(mut records: Vec<Record>) -> Vec<Record> {
    records.retain(|record| record.value().is_some());
    records
}
