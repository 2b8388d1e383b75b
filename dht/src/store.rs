//! The records that this node keeps for the DHT, as Kademlia's store.
//!
//! One Kademlia record holds the set of all publishers' statements under a key. Storing merges sets; reading returns what still holds, or a part of it where
//! that is more than an answer takes. libp2p-kad's own provider records are not used: they carry no addresses and no signature.
//!
//! What others have us keep is limited for each publisher, for each network that it comes from, for each key, and in all. Where there is no more room in all, or
//! under a key, what is new takes the place of something chosen at random: who floods us loses to it as all others do, and keeps nobody out for long.

use std::{
    borrow::Cow,
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    iter,
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use indexmap::IndexMap;
use libp2p::{
    Multiaddr, PeerId,
    kad::{
        ProviderRecord, Record as KadRecord, RecordKey,
        store::{Error, RecordStore, Result},
    },
    multiaddr::Protocol,
};
use prost::Message;
use weft_proto::wire;

use crate::{Disk, Record};

/// Keys held.
const MAX_KEYS: usize = 32_768;

/// Bytes of statements held for others.
const MAX_BYTES: usize = 64 << 20;

/// Of these, statements of one publisher, and such as have come from one public network (an IPv4 network of 24 bits, an IPv6 network of 48).
const MAX_OF_PUBLISHER: usize = MAX_BYTES / 8;
const MAX_OF_NETWORK: usize = MAX_BYTES / 4;

/// Statements under one key, their bytes, and those that have come from one public network.
const MAX_RECORDS: usize = 1024;
const MAX_SET: usize = 512 << 10;
const MAX_OF_NETWORK_IN_SET: usize = MAX_RECORDS / 8;

/// Statements of one publisher under one key, and their bytes: one publisher must not fill the set, nor the answer.
const MAX_PER_PUBLISHER: usize = 64;
const MAX_PUBLISHER_BYTES: usize = MAX_ANSWER / 8;

/// Bytes of statements that an answer carries. Kademlia's packets are limited to [`MAX_PACKET`], and closer peers take room as well.
const MAX_ANSWER: usize = 48 * 1024;

/// The longest Kademlia message, in bytes.
pub(crate) const MAX_PACKET: usize = 64 * 1024;

/// Statements that a look-up gathers, and their bytes.
const MAX_FOUND: usize = 4096;
const MAX_FOUND_BYTES: usize = 4 << 20;

/// Where a statement has come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Origin(u64);

impl Origin {
    /// From here, or from a network that is not public: whoever is there is no stranger.
    pub(crate) const NEAR: Self = Self(0);

    /// From behind a relay: any stranger gets a place on any public relay, so that all who are relayed count as one
    /// network, and not as their relays'.
    pub(crate) const RELAYED: Self = Self(1 << 60);

    /// From a peer that is seen at this address.
    pub(crate) fn of(seen_at: &Multiaddr) -> Self {
        if !weft_net::is_outside(seen_at) {
            return Self::NEAR;
        }
        if seen_at.iter().any(|part| part == Protocol::P2pCircuit) {
            return Self::RELAYED;
        }
        let ip = seen_at.iter().find_map(|part| match part {
            Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
            Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
            _ => None,
        });
        match ip {
            Some(IpAddr::V4(ip)) => Self(1 << 63 | u64::from(u32::from(ip) >> 8)),
            Some(IpAddr::V6(ip)) => Self(1 << 62 | (u128::from(ip) >> 80) as u64),
            // Within this process; and names, which may lead anywhere: they count as one network.
            None if seen_at
                .iter()
                .any(|part| matches!(part, Protocol::Memory(_))) =>
            {
                Self::NEAR
            }
            None => Self(1 << 61),
        }
    }

    pub(crate) fn is_public(self) -> bool {
        self != Self::NEAR
    }
}

/// What a node keeps for the DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Statements, others' and its own.
    pub records: usize,
    /// Keys that they are under, and how many those of others may be.
    pub keys: (usize, usize),
    /// Bytes of them, and how many those of others may be.
    pub bytes: (usize, usize),
    /// Statements that were refused because of a quota since the start.
    pub refused: u64,
}

#[derive(Debug)]
struct Kept {
    record: Record,
    origin: Origin,
    /// Counts what has come, so that it is known what is fresh.
    arrival: u64,
}

/// In memory, and on disk as well if there is one.
#[derive(Debug)]
pub(crate) struct Store {
    /// Whose statements are kept whatever strangers send.
    local: PeerId,
    sets: IndexMap<RecordKey, Vec<Kept>>,
    /// Statements, and their bytes: in all, by publisher and by network.
    count: usize,
    bytes: usize,
    by_publisher: HashMap<PeerId, usize>,
    by_network: HashMap<Origin, usize>,
    arrivals: u64,
    /// Statements over a quota.
    refused: u64,
    /// Whose request is being answered.
    pub(crate) sender: Origin,
    disk: Option<Disk>,
    /// SplitMix64 (Steele, Lea, Flood 2014); it only has to be unknown to strangers.
    random: AtomicU64,
}

impl Store {
    pub(crate) fn new(local: PeerId, disk: Option<Disk>) -> Self {
        let mut store = Self {
            local,
            sets: IndexMap::new(),
            count: 0,
            bytes: 0,
            by_publisher: HashMap::new(),
            by_network: HashMap::new(),
            arrivals: 0,
            refused: 0,
            sender: Origin::NEAR,
            disk: None,
            random: AtomicU64::new(RandomState::new().build_hasher().finish()),
        };
        let Some(mut disk) = disk else { return store };
        for (key, row) in disk.take_loaded() {
            // The limits may be lower than they were.
            let taken = of_row(&row).map(|(record, origin)| store.take(record, origin));
            if !matches!(taken, Some(Ok(()))) {
                disk.change(key, None);
            }
        }
        store.disk = Some(disk);
        store
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            records: self.count,
            keys: (self.sets.len(), MAX_KEYS),
            bytes: (self.bytes, MAX_BYTES),
            refused: self.refused,
        }
    }

    pub(crate) fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// What this node states, or has taken back, under keys that begin like this.
    pub(crate) fn own(&self, prefix: &[u8]) -> Vec<Record> {
        let sets = self.sets.iter();
        let sets = sets.filter(|(key, _)| key.as_ref().starts_with(prefix));
        sets.flat_map(|(_, set)| set)
            .map(|kept| &kept.record)
            .filter(|r| r.publisher() == self.local && !r.remaining().is_zero())
            .cloned()
            .collect()
    }

    /// Drops what has expired.
    pub(crate) fn sweep(&mut self) {
        // From the end: what takes the place of a set that is gone has been looked at.
        for at in (0..self.sets.len()).rev() {
            self.drop_expired(at);
        }
    }

    fn drop_expired(&mut self, at: usize) {
        let expired = |kept: &Kept| kept.record.remaining().is_zero();
        let Some((_, set)) = self.sets.get_index_mut(at) else {
            return;
        };
        if !set.iter().any(expired) {
            return;
        }
        let (gone, left): (Vec<_>, Vec<_>) = std::mem::take(set).into_iter().partition(expired);
        *set = left;
        if set.is_empty() {
            self.sets.swap_remove_index(at);
        }
        for kept in gone {
            self.forget(&kept);
        }
    }

    /// It is in no set any more.
    fn forget(&mut self, kept: &Kept) {
        let size = kept.record.size();
        self.count -= 1;
        self.bytes -= size;
        subtract(&mut self.by_publisher, kept.record.publisher(), size);
        if kept.origin.is_public() {
            subtract(&mut self.by_network, kept.origin, size);
        }
        if let Some(disk) = &self.disk {
            disk.change(row_key(&kept.record), None);
        }
    }

    fn remember(&mut self, record: &Record, origin: Origin) {
        let size = record.size();
        self.count += 1;
        self.bytes += size;
        *self.by_publisher.entry(record.publisher()).or_default() += size;
        if origin.is_public() {
            *self.by_network.entry(origin).or_default() += size;
        }
        if let Some(disk) = &self.disk {
            disk.change(row_key(record), Some(to_row(record, origin)));
        }
    }

    /// Keeps a statement, if it says something new and there is room.
    fn take(&mut self, record: Record, origin: Origin) -> Result<()> {
        let is_own = record.publisher() == self.local;
        let (publisher, size) = (record.publisher(), record.size());
        let key = RecordKey::new(&record.key());
        if let Some(at) = self.sets.get_index_of(&key) {
            self.drop_expired(at);
        }
        let set = self.sets.get(&key).map_or(&[][..], Vec::as_slice);
        let known = set.iter().position(|known| known.record.is_same(&record));
        if let Some(known) = known.map(|at| &set[at].record) {
            if record.as_wire() == known.as_wire() {
                return Ok(());
            }
            if !record.supersedes(known) {
                return Err(Error::MaxRecords);
            }
        }
        let before = known.map_or(0, |at| set[at].record.size());
        if !is_own {
            let (mut count, mut bytes) = (0, 0);
            for other in set.iter().filter(|k| k.record.publisher() == publisher) {
                count += 1;
                bytes += other.record.size();
            }
            let of_publisher = self.by_publisher.get(&publisher).copied().unwrap_or(0);
            let of_network = self.by_network.get(&origin).copied().unwrap_or(0);
            let of_network_here = set.iter().filter(|k| k.origin == origin).count();
            let is_new = known.is_none();
            if bytes - before + size > MAX_PUBLISHER_BYTES
                || (is_new && count >= MAX_PER_PUBLISHER)
                || of_publisher - before.min(of_publisher) + size > MAX_OF_PUBLISHER
                || of_network + size > MAX_OF_NETWORK
                || (is_new && origin.is_public() && of_network_here >= MAX_OF_NETWORK_IN_SET)
            {
                self.refused += 1;
                return Err(Error::MaxRecords);
            }
        }
        if let Some(index) = known {
            let set = self.sets.get_mut(&key).expect("it was found there");
            let old = set.swap_remove(index);
            self.forget(&old);
        }
        if !is_own && !self.make_room(&key, size) {
            self.refused += 1;
            return Err(Error::MaxRecords);
        }
        self.arrivals += 1;
        self.remember(&record, origin);
        let kept = Kept {
            record,
            origin,
            arrival: self.arrivals,
        };
        self.sets.entry(key).or_default().push(kept);
        Ok(())
    }

    /// Drops others' statements, chosen at random, until this fits.
    fn make_room(&mut self, key: &RecordKey, size: usize) -> bool {
        // Under the key.
        for _ in 0..MAX_RECORDS {
            let Some(at) = self.sets.get_index_of(key) else {
                break;
            };
            let set = &self.sets[at];
            let bytes: usize = set.iter().map(|kept| kept.record.size()).sum();
            if set.len() < MAX_RECORDS && bytes + size <= MAX_SET {
                break;
            }
            if !self.drop_some(at) {
                return false;
            }
        }
        // In all. Sets that are nothing but our own are passed over.
        for _ in 0..MAX_RECORDS {
            let fits = self.bytes + size <= MAX_BYTES
                && (self.sets.len() < MAX_KEYS || self.sets.contains_key(key));
            if fits {
                return true;
            }
            self.drop_some(self.random(self.sets.len()));
        }
        false
    }

    /// Drops one statement of others from a set, chosen at random.
    fn drop_some(&mut self, at: usize) -> bool {
        let Some((_, set)) = self.sets.get_index(at) else {
            return false;
        };
        let others = set.iter().enumerate();
        let others: Vec<_> = others
            .filter(|(_, kept)| kept.record.publisher() != self.local)
            .map(|(index, _)| index)
            .collect();
        if others.is_empty() {
            return false;
        }
        let index = others[self.random(others.len())];
        let Some((_, set)) = self.sets.get_index_mut(at) else {
            return false;
        };
        let gone = set.swap_remove(index);
        if set.is_empty() {
            self.sets.swap_remove_index(at);
        }
        self.forget(&gone);
        true
    }

    /// What an answer says of a set: our own, and of a set that is too large one half the freshest and one half any.
    fn sample<'a>(&'a self, set: &'a [Kept]) -> Vec<&'a Record> {
        let mut live: Vec<_> = set
            .iter()
            .filter(|kept| !kept.record.remaining().is_zero())
            .collect();
        let size = |kept: &&Kept| kept.record.size();
        if live.iter().map(size).sum::<usize>() > MAX_ANSWER {
            live.sort_by_key(|kept| {
                let is_own = kept.record.publisher() == self.local;
                std::cmp::Reverse((is_own, kept.arrival))
            });
            let mut half = 0;
            let fresh = live.iter().take_while(|kept| {
                half += size(kept);
                half <= MAX_ANSWER / 2
            });
            let fresh = fresh.count();
            // Fisher and Yates, of the rest.
            for at in (fresh + 1..live.len()).rev() {
                live.swap(at, fresh + self.random(at - fresh + 1));
            }
        }
        live.into_iter().map(|kept| &kept.record).collect()
    }

    /// What anybody states under keys that begin like this, as far as it is kept here; at most so many.
    pub(crate) fn seen(&self, prefix: &[u8], most: usize) -> Vec<Record> {
        let sets = self.sets.iter();
        let sets = sets.filter(|(key, _)| key.as_ref().starts_with(prefix));
        sets.flat_map(|(_, set)| set)
            .map(|kept| &kept.record)
            .filter(|r| r.value().is_some() && !r.remaining().is_zero())
            .take(most)
            .cloned()
            .collect()
    }

    fn random(&self, below: usize) -> usize {
        let step = 0x9e37_79b9_7f4a_7c15_u64;
        let mut z = self.random.fetch_add(step, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below.max(1) as u64) as usize
    }
}

fn subtract<K: std::hash::Hash + Eq>(sums: &mut HashMap<K, usize>, key: K, size: usize) {
    if let std::collections::hash_map::Entry::Occupied(mut sum) = sums.entry(key) {
        *sum.get_mut() -= size.min(*sum.get());
        if *sum.get() == 0 {
            sum.remove();
        }
    }
}

/// Under what a statement is on disk: key, publisher and subkey.
fn row_key(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in [record.key(), &record.publisher().to_bytes()] {
        bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    bytes.extend_from_slice(record.subkey());
    bytes
}

fn to_row(record: &Record, origin: Origin) -> Vec<u8> {
    let mut row = origin.0.to_le_bytes().to_vec();
    row.extend_from_slice(&record.as_wire().encode_to_vec());
    row
}

fn of_row(row: &[u8]) -> Option<(Record, Origin)> {
    let (origin, wire) = row.split_first_chunk()?;
    let wire = wire::SignedRecord::decode(wire).ok()?;
    let record = Record::checked_before(wire).ok()?;
    Some((record, Origin(u64::from_le_bytes(*origin))))
}

/// The statements in a Kademlia record's value that hold, checked. Those that do not are passed over: a set is the work of
/// many, and one bad member must not spoil it. What is `known` need not be checked again, and is left out.
pub(crate) fn decode(
    key: &[u8],
    value: &[u8],
    known: impl Fn(&wire::SignedRecord) -> bool,
) -> Vec<Record> {
    if value.len() > MAX_PACKET {
        return Vec::new();
    }
    let Ok(set) = wire::RecordSet::decode(value) else {
        return Vec::new();
    };
    set.records
        .into_iter()
        .filter(|wire| !known(wire))
        .filter_map(|wire| Record::verify(wire, key).ok())
        .collect()
}

/// Statements as a Kademlia record's value, as many as fit.
pub(crate) fn encode<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<u8> {
    let mut size = 0;
    let records = records
        .into_iter()
        .filter(|record| {
            let fits = size + record.size() <= MAX_ANSWER;
            size += if fits { record.size() } else { 0 };
            fits
        })
        .map(|record| record.as_wire().clone())
        .collect();
    wire::RecordSet { records }.encode_to_vec()
}

/// What a look-up has gathered: of each publisher's statements under a subkey the newest.
#[derive(Debug, Default)]
pub(crate) struct Found {
    records: HashMap<(Vec<u8>, Vec<u8>), Record>,
    bytes: usize,
}

impl Found {
    /// Takes in an answer; whether there was anything in it that holds.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) -> bool {
        let known = std::cell::Cell::new(false);
        let records = decode(key, value, |wire| {
            let id = (wire.publisher.to_vec(), wire.subkey.to_vec());
            let is_known = self.records.get(&id).is_some_and(|r| r.as_wire() == wire);
            known.set(known.get() | is_known);
            is_known
        });
        let any = known.get() || !records.is_empty();
        for record in records {
            let wire = record.as_wire();
            let id = (wire.publisher.to_vec(), wire.subkey.to_vec());
            let before = self.records.get(&id);
            let is_full = self.records.len() >= MAX_FOUND || self.bytes >= MAX_FOUND_BYTES;
            match before {
                Some(before) if !record.supersedes(before) => continue,
                None if is_full => continue,
                _ => {}
            }
            self.bytes += record.size();
            if let Some(before) = self.records.insert(id, record) {
                self.bytes -= before.size();
            }
        }
        any
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    pub(crate) fn into_records(self) -> Vec<Record> {
        self.records.into_values().collect()
    }
}

impl RecordStore for Store {
    type RecordsIter<'a> = iter::Empty<Cow<'a, KadRecord>>;
    type ProvidedIter<'a> = iter::Empty<Cow<'a, ProviderRecord>>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, KadRecord>> {
        let records = self.sample(self.sets.get(key)?);
        let longest = records.iter().map(|record| record.remaining()).max()?;
        Some(Cow::Owned(KadRecord {
            key: key.clone(),
            value: encode(records),
            publisher: None,
            expires: Some(Instant::now() + longest),
        }))
    }

    fn put(&mut self, record: KadRecord) -> Result<()> {
        let records = decode(record.key.as_ref(), &record.value, |_| false);
        // Kademlia's errors have no word for "not signed"; any of them resets the request.
        let mut taken = Err(Error::ValueTooLarge);
        for record in records {
            let origin = match record.publisher() == self.local {
                true => Origin::NEAR,
                false => self.sender,
            };
            let this = self.take(record, origin);
            taken = taken.or(this);
        }
        taken
    }

    /// Kademlia calls this for records it takes for expired; statements expire one by one, in [`Self::sweep`].
    fn remove(&mut self, _: &RecordKey) {}

    /// For replication by Kademlia, which is not used: publishers say again what still holds.
    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
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
    use std::time::Duration;

    use libp2p::identity::Keypair;

    use super::*;

    const HOUR: Duration = Duration::from_secs(2 * 3600);

    fn store() -> Store {
        Store::new(PeerId::random(), None)
    }

    fn record(keys: &Keypair, subkey: &[u8], value: &[u8], sequence: u64) -> Record {
        Record::sign(keys, b"k", subkey, Some(value), sequence, HOUR).unwrap()
    }

    fn put(store: &mut Store, records: &[Record]) -> Result<()> {
        let key = records[0].key().to_vec();
        let value = encode(records.iter());
        store.put(KadRecord::new(key, value))
    }

    fn read(store: &Store) -> Vec<Record> {
        let key = RecordKey::new(b"k");
        let value = &store.get(&key).unwrap().value;
        decode(b"k", value, |_| false)
    }

    fn network(n: u8) -> Origin {
        Origin::of(&format!("/ip4/8.8.{n}.1/tcp/1").parse().unwrap())
    }

    /// What is counted is what is there.
    fn check(store: &Store) {
        let all = || store.sets.values().flatten();
        let sum = |of: &dyn Fn(&&Kept) -> bool| {
            all()
                .filter(of)
                .map(|kept| kept.record.size())
                .sum::<usize>()
        };
        assert_eq!(store.count, all().count());
        assert_eq!(store.bytes, sum(&|_| true));
        assert!(store.sets.values().all(|set| !set.is_empty()));
        for (publisher, bytes) in &store.by_publisher {
            assert_eq!(*bytes, sum(&|kept| kept.record.publisher() == *publisher));
        }
        for (origin, bytes) in &store.by_network {
            assert_eq!(*bytes, sum(&|kept| kept.origin == *origin));
        }
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
        check(&store);
    }

    #[test]
    fn an_older_statement_never_replaces_a_newer_one() {
        let keys = Keypair::generate_ed25519();
        let (old, new) = (record(&keys, b"", b"old", 1), record(&keys, b"", b"new", 2));
        let mut store = store();
        put(&mut store, std::slice::from_ref(&old)).unwrap();
        put(&mut store, std::slice::from_ref(&new)).unwrap();
        // And whoever comes with it is not told that it is kept.
        assert!(put(&mut store, std::slice::from_ref(&old)).is_err());
        put(&mut store, std::slice::from_ref(&new)).unwrap();
        assert_eq!(read(&store), std::slice::from_ref(&new));
        let gone = Record::sign(&keys, b"k", b"", None, 3, HOUR).unwrap();
        put(&mut store, &[gone.clone(), old, new]).unwrap();
        assert_eq!(read(&store), [gone]);
        check(&store);
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
        assert_eq!(store.usage().records, 0);
        // A bad member does not spoil the set.
        let mixed = set(vec![forged, good.as_wire().clone()]);
        store.put(KadRecord::new(b"k".to_vec(), mixed)).unwrap();
        assert_eq!(read(&store), [good]);
    }

    #[test]
    fn a_publisher_that_floods_is_refused_and_keeps_nobody_out() {
        let mut store = store();
        let one = Keypair::generate_ed25519();
        let under_one_key = (0..200_u8).map(|n| record(&one, &[n], b"", 1));
        let taken = under_one_key.filter(|r| put(&mut store, std::slice::from_ref(r)).is_ok());
        let taken = taken.count();
        assert!(taken <= MAX_PER_PUBLISHER);
        assert!(store.bytes <= MAX_PUBLISHER_BYTES);
        let late = record(&Keypair::generate_ed25519(), b"", &[1; 4000], 1);
        put(&mut store, std::slice::from_ref(&late)).unwrap();
        assert!(read(&store).contains(&late));
        // Under many keys.
        let mut refused = 0;
        for n in 0..2200_u32 {
            let key = n.to_be_bytes();
            let big = Record::sign(&one, &key, b"", Some(&[0; 4000]), 1, HOUR).unwrap();
            refused += usize::from(put(&mut store, &[big]).is_err());
        }
        assert!(refused > 0);
        let of_one = store.by_publisher[&one.public().to_peer_id()];
        assert!((MAX_OF_PUBLISHER - 10_000..=MAX_OF_PUBLISHER).contains(&of_one));
        assert!(read(&store).contains(&late));
        check(&store);
    }

    #[test]
    fn a_hundred_identities_of_one_network_leave_room_under_a_key() {
        let mut store = store();
        store.sender = network(1);
        let mut taken = 0;
        for _ in 0..MAX_OF_NETWORK_IN_SET + 30 {
            let sybil = record(&Keypair::generate_ed25519(), b"", b"x", 1);
            taken += usize::from(put(&mut store, &[sybil]).is_ok());
        }
        assert_eq!(taken, MAX_OF_NETWORK_IN_SET);
        store.sender = network(2);
        let honest = record(&Keypair::generate_ed25519(), b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&honest)).unwrap();
        assert!(read(&store).contains(&honest));
        check(&store);
    }

    #[test]
    fn a_set_larger_than_an_answer_is_told_in_parts_the_fresh_ones_first() {
        let keys = Keypair::generate_ed25519();
        let mut store = Store::new(keys.public().to_peer_id(), None);
        let ours = record(&keys, b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&ours)).unwrap();
        let mut last = None;
        for _ in 0..400 {
            let other = record(&Keypair::generate_ed25519(), b"", &[0; 200], 1);
            put(&mut store, std::slice::from_ref(&other)).unwrap();
            last = Some(other);
        }
        let mut told = std::collections::HashSet::new();
        for _ in 0..100 {
            let answer = read(&store);
            assert!(encode(&answer).len() <= MAX_ANSWER);
            assert!(answer.len() < 200);
            assert!(answer.contains(&ours));
            assert!(answer.contains(last.as_ref().unwrap()));
            told.extend(answer.iter().map(Record::publisher));
        }
        // Each has its turn.
        assert_eq!(told.len(), 401);
    }

    #[test]
    fn what_is_full_takes_what_is_new_and_keeps_our_own() {
        let keys = Keypair::generate_ed25519();
        let mut store = Store::new(keys.public().to_peer_id(), None);
        let ours = record(&keys, b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&ours)).unwrap();
        for n in 0..MAX_RECORDS + 50 {
            let other = record(&Keypair::generate_ed25519(), b"", &[0; 600], 1);
            put(&mut store, std::slice::from_ref(&other)).unwrap();
            if n % 100 == 0 {
                let set = &store.sets[&RecordKey::new(b"k")];
                assert!(set.iter().any(|kept| kept.record == other));
            }
        }
        assert!(store.usage().records <= MAX_RECORDS);
        assert!(store.bytes <= MAX_SET);
        assert!(read(&store).contains(&ours));
        check(&store);
    }

    #[test]
    fn expired_statements_are_swept_and_never_returned() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let brief = Record::sign(&keys, b"k", b"", Some(b"v"), 1, Duration::from_secs(2)).unwrap();
        put(&mut store, std::slice::from_ref(&brief)).unwrap();
        for n in 0..9_u8 {
            let other = Record::sign(&keys, &[n], b"", Some(b"v"), 1, HOUR).unwrap();
            put(&mut store, &[other]).unwrap();
        }
        while !brief.remaining().is_zero() {
            std::thread::sleep(brief.remaining());
        }
        assert!(store.get(&RecordKey::new(b"k")).is_none());
        store.sweep();
        assert_eq!(store.usage().records, 9);
        check(&store);
    }

    #[test]
    fn a_restart_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        let open = |local| Store::new(local, Some(Disk::open(&path).unwrap()));
        let local = PeerId::random();
        let mut store = open(local);
        let keys = Keypair::generate_ed25519();
        store.sender = network(7);
        let (old, new) = (record(&keys, b"a", b"1", 1), record(&keys, b"a", b"2", 2));
        let brief = Record::sign(&keys, b"k", b"b", Some(b"v"), 1, Duration::from_secs(2)).unwrap();
        let other = Record::sign(&keys, b"other", b"", Some(b"v"), 1, HOUR).unwrap();
        for record in [&old, &brief, &other, &new] {
            put(&mut store, std::slice::from_ref(record)).unwrap();
        }
        let before = store.by_network.clone();
        drop(store);
        while !brief.remaining().is_zero() {
            std::thread::sleep(brief.remaining());
        }
        let store = open(local);
        assert_eq!(read(&store), [new]);
        assert_eq!(store.usage().records, 2);
        assert!(store.by_network[&network(7)] < before[&network(7)]);
        check(&store);
    }

    #[test]
    fn mutated_sets_are_refused_or_what_they_were() {
        let mut store = store();
        let keys = [Keypair::generate_ed25519(), Keypair::generate_ed25519()];
        let good = keys.each_ref().map(|keys| record(keys, b"s", b"v", 5));
        let bytes = encode(&good);
        for _ in 0..5000 {
            let mut mutant = bytes.clone();
            for _ in 0..=store.random(3) {
                let at = store.random(mutant.len());
                match store.random(5) {
                    0 => mutant[at] ^= 1 << store.random(8),
                    1 => mutant[at] = [0, 1, 0x7f, 0x80, 0xff][store.random(5)],
                    2 => mutant.insert(at, store.random(256) as u8),
                    3 if at > 0 => mutant.truncate(at),
                    _ if mutant.len() > 1 => drop(mutant.remove(at)),
                    _ => {}
                }
            }
            let mut found = Found::default();
            found.add(b"k", &mutant);
            // What it was, or nothing.
            assert!(
                found
                    .into_records()
                    .iter()
                    .all(|found| good.contains(found))
            );
            let _ = store.put(KadRecord::new(b"k".to_vec(), mutant));
        }
        assert!(read(&store).iter().all(|kept| good.contains(kept)));
        check(&store);
    }

    #[test]
    fn answers_are_gathered_and_the_newest_counts() {
        let keys = Keypair::generate_ed25519();
        let (old, new) = (record(&keys, b"a", b"1", 1), record(&keys, b"a", b"2", 2));
        let other = record(&Keypair::generate_ed25519(), b"", b"3", 1);
        let mut found = Found::default();
        assert!(found.add(b"k", &encode([&new, &other])));
        assert!(found.add(b"k", &encode([&old])));
        // What is known still counts as an answer.
        assert!(found.add(b"k", &encode([&other])));
        assert!(!found.add(b"k", b"\xff"));
        assert!(!Found::default().add(b"other", &encode([&other])));
        let mut records = found.into_records();
        records.sort_by_key(Record::sequence);
        assert_eq!(records, [other, new]);
    }
}
