//! Signed records: small values that nodes publish in the DHT under a key, for a limited time.
//!
//! Every node may publish records under any key, as itself, and several of them under different subkeys. A reader of
//! a key gets the records of all publishers, each with the publisher's id and a verified signature. A node renews its
//! records until they expire, also after a restart.

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

/// Prefix of the keys of these records in the DHT. It keeps them apart from model names, providers and the rest.
const SPACE: &[u8] = b"record/";

/// Longest key of a record, in bytes.
pub const MAX_RECORD_KEY: usize = 500;

/// Terms of records of applications. A record lasts until its expiry, whether or not its publisher runs.
const TERMS: Terms = Terms {
    ttl: MAX_TTL,
    rank: Rank::Content,
    has_addresses: false,
    at_stop: AtStop::Keep,
};

/// A record that a node has published.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecordInfo {
    /// Key of the record, 1 to 500 bytes.
    pub key: Vec<u8>,
    /// The node that signed the record. The signature was verified.
    pub publisher: PeerId,
    /// Subkey of the record, at most 256 bytes. It tells apart the records of one publisher under the key.
    pub subkey: Vec<u8>,
    /// Value of the record, at most 4,096 bytes.
    pub value: Vec<u8>,
    /// Sequence number: higher than that of the publisher's earlier records under the same key and subkey.
    pub sequence: u64,
    /// Time until the record expires.
    pub remaining: Duration,
}

impl RecordInfo {
    /// Returns `None` for a withdrawn record.
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

/// A change under a watched key; see [`Records::watch`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordChange {
    /// A record is new, or was there when the watch began.
    Joined(RecordInfo),
    /// The value of a record was replaced.
    Changed(RecordInfo),
    /// A record was withdrawn or has expired.
    Left {
        /// Publisher of the record.
        publisher: PeerId,
        /// Subkey of the record.
        subkey: Vec<u8>,
    },
}

/// Publishes, reads and watches signed records; see [`Node::records`].
#[derive(Debug, Clone)]
pub struct Records {
    node: Node,
}

/// Returns the key in the DHT.
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

    /// Publishes `value` under `key` and `subkey` for `ttl`. Returns the number of other nodes that stored the
    /// record.
    ///
    /// - `key`: 1 to [`MAX_RECORD_KEY`] (500) bytes.
    /// - `subkey`: at most [`MAX_RECORD_SUBKEY`](crate::MAX_RECORD_SUBKEY) (256) bytes; often empty.
    /// - `value`: at most [`MAX_RECORD_VALUE`](crate::MAX_RECORD_VALUE) (4,096) bytes.
    /// - `ttl`: from 1 s to [`MAX_RECORD_TTL`](crate::MAX_RECORD_TTL) (48 h).
    ///
    /// A result of zero is not an error: the record is on this node's disk, and other nodes get it when they connect.
    /// Until it expires, the node re-publishes the record, with the same expiry. A second `put` under the same key and
    /// subkey replaces the value.
    ///
    /// # Errors
    /// [`Error::Record`] if `key`, `subkey`, `value` or `ttl` is outside its limits; [`Error::Disk`] if this node's
    /// disk fails; [`Error::Stopped`] after a shutdown.
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
        self.node.advertiser().keep_published(id, TERMS, took);
        Ok(took)
    }

    /// Returns the records of all publishers under `key`, each with its signature verified, sorted by publisher and
    /// subkey. Asks every node that should have the key, for at most 10 s. Within 5 s of the node's start, it first
    /// waits for the mesh, so the call takes at most 15 s.
    ///
    /// # Errors
    /// [`Error::Record`] if the key is empty or too long; [`Error::Disconnected`] if this node has no such record and
    /// there is no peer to ask; [`Error::Stopped`] after a shutdown.
    pub async fn get(&self, key: impl AsRef<[u8]>) -> Result<Vec<RecordInfo>, Error> {
        let key = spaced(key.as_ref())?;
        self.node.meet().await;
        let found = sorted(&self.node.dht().get(&key).await?);
        match found.is_empty() {
            true => self.node.is_connected().await.map(|()| found),
            false => Ok(found),
        }
    }

    /// Withdraws this node's record under `key` and `subkey`. Returns whether there was one, and the number of other
    /// nodes that stored the withdrawal.
    ///
    /// Nodes that cannot be reached now are told later, for as long as the record would have lasted.
    ///
    /// # Errors
    /// Returns the errors of [`put`](Self::put).
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
        // Without a local copy, other nodes may still have the record.
        let ttl = known.map_or(MAX_TTL, Record::remaining);
        let is_known = known.is_some();
        let heard = dht.withdraw(&key, subkey, ttl).await?;
        // Nodes that were not reached are told later.
        let subkey = subkey.to_vec();
        let id = RecordId { key, subkey };
        self.node.advertiser().keep_published(id, TERMS, heard);
        Ok((is_known, heard))
    }

    /// Lists the records that this node has published and renews.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn own(&self) -> Result<Vec<RecordInfo>, Error> {
        Ok(sorted(&self.node.dht().own(SPACE).await?))
    }

    /// Watches the records under `key`: returns those that are there, and then every change.
    ///
    /// In a mesh of fewer than about twenty nodes, every node stores every record, and a change is reported as soon
    /// as it arrives. In a larger mesh, the key is looked up every five seconds; a value that is replaced or
    /// withdrawn before the next lookup is not seen. Of several values within 50 ms, only the last is reported.
    /// Records of a node that has crashed stay until they expire.
    ///
    /// # Errors
    /// [`Error::Record`] if the key is empty or too long.
    pub async fn watch(&self, key: impl AsRef<[u8]>) -> Result<RecordWatch, Error> {
        let key = spaced(key.as_ref())?;
        self.node.meet().await;
        Ok(RecordWatch(Watcher::new(self.node.dht().clone(), key)))
    }
}

/// Changes of the records under a key; see [`Records::watch`]. A watch does not keep its node running.
#[derive(Debug)]
pub struct RecordWatch(Watcher);

impl RecordWatch {
    /// Waits for the next change. Returns `None` once the node has stopped. Cancel safe: if the future is dropped, no
    /// change is lost.
    pub async fn next(&mut self) -> Option<RecordChange> {
        loop {
            let change = match self.0.next().await? {
                Change::Joined(record) => RecordInfo::of(&record).map(RecordChange::Joined),
                Change::Changed(record) => RecordInfo::of(&record).map(RecordChange::Changed),
                Change::Left { publisher, subkey } => {
                    Some(RecordChange::Left { publisher, subkey })
                }
            };
            // Only keys in the space of these records are watched, so this is always `Some`.
            if change.is_some() {
                return change;
            }
        }
    }
}

/// Renews the records that an earlier run of this node has published.
pub(crate) async fn renew(dht: Dht, advertiser: Advertiser) {
    // Once the DHT has stopped, there is nothing to renew.
    let own = dht.own(SPACE).await.unwrap_or_default();
    let ids = own.iter().map(|record| RecordId {
        key: record.key().to_vec(),
        subkey: record.subkey().to_vec(),
    });
    let records = ids.map(|id| (id, Value::Signed)).collect();
    advertiser.register_all(records, TERMS);
}
