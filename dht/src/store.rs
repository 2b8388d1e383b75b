//! The records that this node keeps for the DHT, as Kademlia's store.
//!
//! One Kademlia record holds the set of all publishers' statements under a key. Storing merges sets; reading returns what still
//! holds. libp2p-kad's own provider records are not used: they carry no addresses and no signature.

use std::{
    borrow::Cow,
    collections::HashMap,
    iter,
    time::{Duration, Instant},
};

use libp2p::{
    PeerId,
    kad::{
        ProviderRecord, Record as KadRecord, RecordKey,
        store::{Error, RecordStore, Result},
    },
};
use prost::Message;
use weft_proto::wire;

use crate::Record;

/// Keys held for others.
const MAX_KEYS: usize = 32_768;

/// Bytes of statements held for others. A full store takes no new keys until something expires.
const MAX_BYTES: usize = 64 * 1024 * 1024;

/// Statements under one key.
const MAX_RECORDS: usize = 64;

/// Statements of one publisher under one key, and their bytes: one publisher must not fill the set, nor the answer.
const MAX_PER_PUBLISHER: usize = 16;
const MAX_PUBLISHER_BYTES: usize = MAX_SET / 8;

/// Bytes of statements that an answer carries. Kademlia's packets are limited to [`MAX_PACKET`], and closer peers take room as well.
const MAX_SET: usize = 48 * 1024;

/// The longest Kademlia message, in bytes.
pub(crate) const MAX_PACKET: usize = 64 * 1024;

/// The lifetime by which statements are compared when a set is full: that of the shortest-lived honest ones. Who claims to live
/// longer gains nothing by it.
const COMPARED_LIFE: Duration = Duration::from_secs(3600);

/// In memory; on a restart, publishers say again what still holds.
#[derive(Debug)]
pub(crate) struct Store {
    /// Whose statements are kept whatever strangers send.
    local: PeerId,
    sets: HashMap<RecordKey, Vec<Record>>,
    /// Bytes in the sets.
    bytes: usize,
}

impl Store {
    pub(crate) fn new(local: PeerId) -> Self {
        Self {
            local,
            sets: HashMap::new(),
            bytes: 0,
        }
    }

    /// Statements held.
    pub(crate) fn len(&self) -> usize {
        self.sets.values().map(Vec::len).sum()
    }

    /// Drops what has expired.
    pub(crate) fn sweep(&mut self) {
        self.sets.retain(|_, set| {
            set.retain(|record| !record.remaining().is_zero());
            !set.is_empty()
        });
        self.bytes = self.sets.values().map(|set| size(set)).sum();
    }
}

/// Bytes that statements take.
fn size(set: &[Record]) -> usize {
    set.iter().map(Record::size).sum()
}

/// The statements in a Kademlia record's value that hold, checked. Those that do not are passed over: a set is the work of
/// many, and one bad member must not spoil it.
pub(crate) fn decode(key: &[u8], value: &[u8]) -> Vec<Record> {
    if value.len() > MAX_PACKET {
        return Vec::new();
    }
    let Ok(set) = wire::RecordSet::decode(value) else {
        return Vec::new();
    };
    set.records
        .into_iter()
        .take(MAX_RECORDS)
        .filter_map(|wire| Record::verify(wire, key).ok())
        .collect()
}

/// Statements as a Kademlia record's value, as many as fit.
pub(crate) fn encode<'a>(records: impl Iterator<Item = &'a Record>) -> Vec<u8> {
    let mut size = 0;
    let records = records
        .filter(|record| {
            let fits = size + record.size() <= MAX_SET;
            size += if fits { record.size() } else { 0 };
            fits
        })
        .map(|record| record.as_wire().clone())
        .collect();
    wire::RecordSet { records }.encode_to_vec()
}

/// Adds `record` to `set` unless the set has a newer one about the same thing, or is full of others. Those of `pinned` are always
/// taken and never make room.
pub(crate) fn merge(set: &mut Vec<Record>, record: Record, pinned: Option<PeerId>) {
    if let Some(known) = set.iter_mut().find(|known| known.is_same(&record)) {
        if record.supersedes(known) {
            *known = record;
        }
        return;
    }
    let is_pinned = |record: &Record| Some(record.publisher()) == pinned;
    let (count, bytes) = set
        .iter()
        .filter(|known| known.publisher() == record.publisher())
        .fold((0, 0), |(n, size), known| (n + 1, size + known.size()));
    if count >= MAX_PER_PUBLISHER || bytes + record.size() > MAX_PUBLISHER_BYTES {
        return;
    }
    if set.len() < MAX_RECORDS {
        set.push(record);
        return;
    }
    // Full: what is about to expire makes room. Otherwise first come, first served.
    let life = |record: &Record| record.remaining().min(COMPARED_LIFE);
    if let Some(soonest) = set
        .iter_mut()
        .filter(|known| !is_pinned(known))
        .min_by_key(|known| life(known))
        && (is_pinned(&record) || life(soonest) < life(&record))
    {
        *soonest = record;
    }
}

fn to_kad(key: &RecordKey, set: &[Record]) -> Option<KadRecord> {
    let live = || set.iter().filter(|record| !record.remaining().is_zero());
    let longest = live().map(Record::remaining).max()?;
    Some(KadRecord {
        key: key.clone(),
        value: encode(live()),
        publisher: None,
        expires: Some(Instant::now() + longest),
    })
}

impl RecordStore for Store {
    type RecordsIter<'a> = Box<dyn Iterator<Item = Cow<'a, KadRecord>> + 'a>;
    type ProvidedIter<'a> = iter::Empty<Cow<'a, ProviderRecord>>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, KadRecord>> {
        to_kad(key, self.sets.get(key)?).map(Cow::Owned)
    }

    fn put(&mut self, record: KadRecord) -> Result<()> {
        let records = decode(record.key.as_ref(), &record.value);
        if records.is_empty() {
            // Kademlia's errors have no word for "not signed"; any of them resets the request.
            return Err(Error::ValueTooLarge);
        }
        let ours = records
            .iter()
            .any(|record| record.publisher() == self.local);
        let full = |store: &Self| {
            (store.sets.len() >= MAX_KEYS && !store.sets.contains_key(&record.key))
                || store.bytes + record.value.len() > MAX_BYTES
        };
        if !ours && full(self) {
            self.sweep();
            if full(self) {
                return Err(Error::MaxRecords);
            }
        }
        let set = self.sets.entry(record.key).or_default();
        let before = size(set);
        set.retain(|record| !record.remaining().is_zero());
        for record in records {
            merge(set, record, Some(self.local));
        }
        self.bytes = self.bytes + size(set) - before;
        Ok(())
    }

    /// Kademlia calls this for records it takes for expired; statements expire one by one, in [`Self::sweep`].
    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        Box::new(
            self.sets
                .iter()
                .filter_map(|(key, set)| to_kad(key, set).map(Cow::Owned)),
        )
    }

    fn add_provider(&mut self, _: ProviderRecord) -> Result<()> {
        Err(Error::MaxProvidedKeys)
    }

    fn providers(&self, _: &RecordKey) -> Vec<ProviderRecord> {
        Vec::new()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        iter::empty()
    }

    fn remove_provider(&mut self, _: &RecordKey, _: &PeerId) {}
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    const HOUR: Duration = Duration::from_secs(2 * 3600);

    fn store() -> Store {
        Store::new(PeerId::random())
    }

    fn record(keys: &Keypair, subkey: &[u8], value: &[u8], sequence: u64) -> Record {
        Record::sign(keys, b"k", subkey, Some(value), sequence, HOUR).unwrap()
    }

    fn put(store: &mut Store, records: &[Record]) -> Result<()> {
        let value = encode(records.iter());
        store.put(KadRecord::new(b"k".to_vec(), value))
    }

    fn read(store: &Store) -> Vec<Record> {
        let key = RecordKey::new(b"k");
        decode(b"k", &store.get(&key).unwrap().value)
    }

    #[test]
    fn publishers_share_a_key_and_none_replaces_another() {
        let mut store = store();
        let keys: Vec<_> = (0..3).map(|_| Keypair::generate_ed25519()).collect();
        for key in &keys {
            put(&mut store, &[record(key, b"", b"v", 1)]).unwrap();
        }
        put(&mut store, &[record(&keys[0], b"sub", b"w", 1)]).unwrap();
        assert_eq!(read(&store).len(), 4);
    }

    #[test]
    fn an_older_statement_never_replaces_a_newer_one() {
        let keys = Keypair::generate_ed25519();
        let (old, new) = (record(&keys, b"", b"old", 1), record(&keys, b"", b"new", 2));
        for order in [[&old, &new], [&new, &old]] {
            let mut store = store();
            for record in order {
                put(&mut store, std::slice::from_ref(record)).unwrap();
            }
            assert_eq!(read(&store), std::slice::from_ref(&new));
        }
        let mut store = store();
        let gone = Record::sign(&keys, b"k", b"", None, 3, HOUR).unwrap();
        put(&mut store, &[gone.clone(), old, new]).unwrap();
        assert_eq!(read(&store), [gone]);
    }

    #[test]
    fn forged_expired_and_misplaced_statements_are_not_stored() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let good = record(&keys, b"", b"v", 1);
        let mut forged = good.as_wire().clone();
        forged.value = vec![1].into();
        let expired = Record::sign(&keys, b"k", b"", Some(b"v"), 1, Duration::ZERO).unwrap();
        let set = |records| wire::RecordSet { records }.encode_to_vec();
        for bad in [
            set(vec![forged.clone()]),
            set(vec![expired.as_wire().clone()]),
            set(vec![]),
            vec![0xff; 10],
            vec![0; MAX_PACKET + 1],
        ] {
            assert!(store.put(KadRecord::new(b"k".to_vec(), bad)).is_err());
        }
        let value = set(vec![good.as_wire().clone()]);
        assert!(store.put(KadRecord::new(b"other".to_vec(), value)).is_err());
        assert_eq!(store.len(), 0);
        // A bad member does not spoil the set.
        let mixed = set(vec![forged, good.as_wire().clone()]);
        store.put(KadRecord::new(b"k".to_vec(), mixed)).unwrap();
        assert_eq!(read(&store), [good]);
    }

    #[test]
    fn a_flood_under_one_key_is_bounded() {
        let mut store = store();
        let one = Keypair::generate_ed25519();
        for i in 0..100u8 {
            put(&mut store, &[record(&one, &[i], &[0; 100], 1)]).unwrap();
        }
        assert_eq!(store.len(), MAX_PER_PUBLISHER);
        for _ in 0..100 {
            put(
                &mut store,
                &[record(&Keypair::generate_ed25519(), b"", &[0; 4000], 1)],
            )
            .unwrap();
        }
        assert_eq!(store.len(), MAX_RECORDS);
        let key = RecordKey::new(b"k");
        assert!(store.get(&key).unwrap().value.len() <= MAX_SET);
        assert!(!read(&store).is_empty());
    }

    #[test]
    fn strangers_neither_evict_nor_block_what_this_node_states() {
        let keys = Keypair::generate_ed25519();
        let mut store = Store::new(keys.public().to_peer_id());
        let flood = |store: &mut Store| {
            for _ in 0..MAX_RECORDS + 10 {
                let other = Keypair::generate_ed25519();
                let long = Record::sign(&other, b"k", b"", Some(b"x"), 1, crate::MAX_TTL).unwrap();
                put(store, &[long]).unwrap();
            }
        };
        flood(&mut store);
        let ours = record(&keys, b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&ours)).unwrap();
        assert!(read(&store).contains(&ours));
        flood(&mut store);
        assert!(read(&store).contains(&ours));
        // Nor do they evict each other by claiming a longer life.
        let mut set = vec![];
        let honest = record(&Keypair::generate_ed25519(), b"", b"v", 1);
        merge(&mut set, honest.clone(), None);
        for _ in 0..MAX_RECORDS + 10 {
            let other = Keypair::generate_ed25519();
            let long = Record::sign(&other, b"k", b"", Some(b"x"), 1, crate::MAX_TTL).unwrap();
            merge(&mut set, long, None);
        }
        assert!(set.contains(&honest));
    }

    #[test]
    fn one_publisher_does_not_fill_the_answer() {
        let mut store = store();
        let one = Keypair::generate_ed25519();
        for i in 0..MAX_PER_PUBLISHER as u8 {
            put(&mut store, &[record(&one, &[i], &[0; 4000], 1)]).unwrap();
        }
        let late = record(&Keypair::generate_ed25519(), b"", &[1; 4000], 1);
        put(&mut store, std::slice::from_ref(&late)).unwrap();
        assert!(read(&store).contains(&late));
    }

    #[test]
    fn expired_statements_are_swept_and_never_returned() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let brief =
            Record::sign(&keys, b"k", b"", Some(b"v"), 1, Duration::from_millis(30)).unwrap();
        put(&mut store, std::slice::from_ref(&brief)).unwrap();
        while !brief.remaining().is_zero() {
            std::thread::yield_now();
        }
        assert!(store.get(&RecordKey::new(b"k")).is_none());
        assert_eq!(store.records().count(), 0);
        store.sweep();
        assert_eq!(store.len(), 0);
    }
}
