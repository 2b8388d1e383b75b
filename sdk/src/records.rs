//! Signed records: what anybody states under a key, for a time.
//!
//! Every node may state something under any key, each under its own identity, and under subkeys of its own choice; who reads a key gets what all have stated,
//! each statement with its publisher. A node says again what it has stated for as long as it holds, also after a restart.

use std::time::Duration;

use weft_dht::{Dht, MAX_TTL, Record, RecordError};
use weft_net::PeerId;

use crate::{
    Error, Node,
    discovery::{
        advertise::{Advertiser, AtStop, Rank, RecordId, Terms, Value},
        watch::{Change, Watcher},
    },
};

/// What keys of records begin with in the DHT: they are apart from those of names, providers and the rest.
const SPACE: &[u8] = b"record/";

/// Bytes of a record's key.
pub const MAX_RECORD_KEY: usize = 500;

/// The terms of records of applications. Each holds for as long as its publisher says, whether or not its node runs.
const TERMS: Terms = Terms {
    ttl: MAX_TTL,
    rank: Rank::Content,
    has_addresses: false,
    at_stop: AtStop::Keep,
};

/// What somebody states.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordInfo {
    /// Under what.
    pub key: Vec<u8>,
    /// Who; its signature is checked.
    pub publisher: PeerId,
    /// Which of the publisher's statements under the key.
    pub subkey: Vec<u8>,
    /// What.
    pub value: Vec<u8>,
    /// Higher than that of the publisher's statements before it.
    pub sequence: u64,
    /// How long it still holds.
    pub remaining: Duration,
}

impl RecordInfo {
    /// `None` for what has been taken back.
    fn of(record: &Record) -> Option<Self> {
        Some(Self {
            key: record.key().strip_prefix(SPACE)?.to_vec(),
            publisher: record.publisher(),
            subkey: record.subkey().to_vec(),
            value: record.value()?.to_vec(),
            sequence: record.sequence(),
            remaining: record.remaining(),
        })
    }
}

fn sorted(records: &[Record]) -> Vec<RecordInfo> {
    let mut infos: Vec<_> = records.iter().filter_map(RecordInfo::of).collect();
    infos.sort_by(|a, b| {
        let of = |info: &RecordInfo| (info.key.clone(), info.publisher, info.subkey.clone());
        of(a).cmp(&of(b))
    });
    infos
}

/// What has changed under a key that is watched.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordChange {
    /// Stated for the first time, or there when the watch began.
    Joined(RecordInfo),
    /// Stated anew, with another value.
    Changed(RecordInfo),
    /// Taken back, or its time is over.
    Left {
        /// Who had stated it.
        publisher: PeerId,
        /// Which of the publisher's statements.
        subkey: Vec<u8>,
    },
}

/// Stating, reading and watching records; [`Node::records`].
#[derive(Debug, Clone)]
pub struct Records {
    node: Node,
}

/// The key in the DHT.
fn spaced(key: &[u8]) -> Result<Vec<u8>, Error> {
    let size = key.len();
    if size == 0 {
        return Err(Error::Record(RecordError::NoKey));
    }
    if size > MAX_RECORD_KEY {
        let (field, limit) = ("key", MAX_RECORD_KEY);
        return Err(Error::Record(RecordError::TooLong { field, size, limit }));
    }
    Ok([SPACE, key].concat())
}

impl Records {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// States `value` under `key` (1 to 500 bytes) and `subkey` (at most 256; often empty), at most 4,096 bytes, for 1 s to 48 h; how many other nodes took it.
    /// Zero is no error: it is on this node's disk, and other nodes are told as they come.
    ///
    /// # Errors
    /// [`Error::Record`] if something is too long, [`Error::Disk`] if this node's disk fails, [`Error::Stopped`].
    pub async fn put(
        &self,
        key: impl AsRef<[u8]>,
        subkey: impl AsRef<[u8]>,
        value: impl AsRef<[u8]>,
        ttl: Duration,
    ) -> Result<usize, Error> {
        let key = spaced(key.as_ref())?;
        if ttl < Duration::from_secs(1) {
            return Err(Error::Record(RecordError::TooBrief));
        }
        self.node.meet().await;
        let subkey = subkey.as_ref().to_vec();
        let dht = self.node.dht();
        let took = dht.publish(&key, &subkey, value.as_ref(), ttl).await?;
        let id = RecordId { key, subkey };
        self.node.advertiser().keep_stated(id, TERMS, took);
        Ok(took)
    }

    /// What anybody states under `key`, each statement checked, by publisher and subkey. Asks every node that should know: 30 s at most.
    ///
    /// # Errors
    /// [`Error::Record`] if the key is too long, [`Error::Disconnected`] if nothing is here and there is nobody to ask,
    /// [`Error::Stopped`].
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Vec<RecordInfo>, Error> {
        let key = spaced(key.as_ref())?;
        self.node.meet().await;
        let found = sorted(&self.node.dht().get(&key).await?);
        match found.is_empty() {
            true => self.node.is_connected().await.map(|()| found),
            false => Ok(found),
        }
    }

    /// Takes back what this node stated under `key` and `subkey`: whether there was anything, and how many other nodes heard it. Those that did not hear it are
    /// told later, for as long as the statement would have held.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub async fn remove(
        &self,
        key: impl AsRef<[u8]>,
        subkey: impl AsRef<[u8]>,
    ) -> Result<(bool, usize), Error> {
        let (key, subkey) = (spaced(key.as_ref())?, subkey.as_ref());
        let dht = self.node.dht();
        let own = dht.own(&key).await?;
        let known = own
            .iter()
            .find(|r| r.key() == key && r.subkey() == subkey && r.value().is_some());
        // Without it here, others may still have it.
        let ttl = known.map_or(MAX_TTL, Record::remaining);
        let is_known = known.is_some();
        let heard = dht.withdraw(&key, subkey, ttl).await?;
        // Nodes that have not heard it are told later.
        let subkey = subkey.to_vec();
        let id = RecordId { key, subkey };
        self.node.advertiser().keep_stated(id, TERMS, heard);
        Ok((is_known, heard))
    }

    /// What this node states, and keeps up.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub async fn own(&self) -> Result<Vec<RecordInfo>, Error> {
        Ok(sorted(&self.node.dht().own(SPACE).await?))
    }

    /// Watches what is stated under `key`, and how that changes. In a mesh of less than some twenty nodes every node
    /// keeps every record, and a change is told as soon as it arrives. In a larger one the key is looked up every five
    /// seconds: a value that was replaced or taken back before the next look-up is not seen. Of several values within
    /// 50 ms only the last is told. Records of a node that has crashed stay until they expire.
    ///
    /// # Errors
    /// [`Error::Record`] if the key is too long.
    pub async fn watch(&self, key: impl AsRef<[u8]>) -> Result<RecordWatch, Error> {
        let key = spaced(key.as_ref())?;
        self.node.meet().await;
        Ok(RecordWatch(Watcher::new(self.node.dht().clone(), key)))
    }
}

/// The changes under a key; [`Records::watch`]. Keeps no node from stopping.
#[derive(Debug)]
pub struct RecordWatch(Watcher);

impl RecordWatch {
    /// The next change; `None` once the node has stopped. May be dropped and called again.
    pub async fn next(&mut self) -> Option<RecordChange> {
        loop {
            let change = match self.0.next().await? {
                Change::Joined(record) => RecordInfo::of(&record).map(RecordChange::Joined),
                Change::Changed(record) => RecordInfo::of(&record).map(RecordChange::Changed),
                Change::Left { publisher, subkey } => {
                    Some(RecordChange::Left { publisher, subkey })
                }
            };
            // Only what is in the space of records is watched, so there always is one.
            if change.is_some() {
                return change;
            }
        }
    }
}

/// Says again what an earlier run of this node has stated.
pub(crate) async fn say_again(dht: Dht, advertiser: Advertiser) {
    // Once the DHT has stopped, nothing is said.
    let own = dht.own(SPACE).await.unwrap_or_default();
    let ids = own.iter().map(|record| RecordId {
        key: record.key().to_vec(),
        subkey: record.subkey().to_vec(),
    });
    let records = ids.map(|id| (id, Value::Signed)).collect();
    advertiser.register_all(records, TERMS);
}
