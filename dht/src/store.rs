//! The records that this node stores for the DHT, as a store for libp2p-kad.
//!
//! One Kademlia record holds the set of all publishers' records under a key. Storing merges sets. Reading returns the
//! records that have not expired, or a part of them if they do not fit into an answer. libp2p-kad's own provider
//! records are not used: they carry neither addresses nor a signature.
//!
//! Records of other publishers are limited for each publisher, for each network group that they come from, for each
//! key, and in all. If the store or a set is full, a new record replaces one chosen at random. A flood therefore
//! displaces its own records as well as those of others, and keeps no publisher out for long.

use std::{
    borrow::Cow,
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hasher},
    iter,
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use indexmap::IndexMap;
use libp2p::{
    Multiaddr, PeerId,
    kad::{
        ProviderRecord, Record as KadRecord, RecordKey,
        store::{Error, RecordStore, Result as StoreResult},
    },
    multiaddr::Protocol,
};
use prost::Message;
use tokio::sync::watch;
use weft_proto::wire;

use crate::{Disk, Record, record};

/// Most keys with records.
const MAX_KEYS: usize = 32_768;

/// Most bytes of records stored for other publishers.
const MAX_BYTES: usize = 64 << 20;

/// Most bytes, of [`MAX_BYTES`], in records of one publisher, and in records from one public network group (an IPv4 /24
/// or an IPv6 /48).
const MAX_OF_PUBLISHER: usize = MAX_BYTES / 8;
const MAX_OF_NETWORK: usize = MAX_BYTES / 4;

/// Most records under one key, most bytes of these, and most records from one public network group.
const MAX_RECORDS: usize = 1024;
const MAX_SET: usize = 512 << 10;
const MAX_OF_NETWORK_IN_SET: usize = MAX_RECORDS / 8;

/// Most records of one publisher under one key, and most bytes of these, so that one publisher fills neither the set
/// nor an answer.
const MAX_PER_PUBLISHER: usize = 64;
const MAX_PUBLISHER_BYTES: usize = MAX_ANSWER / 8;

/// Most bytes of records in an answer. Kademlia's packets are limited to [`MAX_PACKET`], and the closer peers need room
/// as well.
const MAX_ANSWER: usize = 48 * 1024;

/// The longest Kademlia message, in bytes.
pub(crate) const MAX_PACKET: usize = 64 * 1024;

/// Most records in one request to store, and the most bytes of such a request. A publisher sends one record at a time.
const MAX_PUT: usize = 4;
const MAX_PUT_BYTES: usize = MAX_PUT * record::MAX_SIZE;

/// Time after a start for which this node's own expired records are kept but not returned. A machine may start with a
/// clock that is ahead, until it has synchronized.
const CLOCK_GRACE: Duration = Duration::from_secs(600);

/// Shortest time between two searches for expired records under a key.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Most keys whose changes are watched on this node.
const MAX_WATCHED: usize = 4096;

/// Most records that a lookup collects, and their most bytes.
const MAX_FOUND: usize = 4096;
const MAX_FOUND_BYTES: usize = 4 << 20;

/// The network group from which a record has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Origin(u64);

impl Origin {
    /// This node itself, or a network that is not public and thus has no strangers.
    pub(crate) const LOCAL: Self = Self(0);

    /// All peers behind relays, as one network group. Any peer can get a reservation on any public relay, so the
    /// network group of the relay means nothing.
    pub(crate) const RELAYED: Self = Self(1 << 60);

    /// Returns the network group of a peer that is seen at this address.
    pub(crate) fn of(seen_at: &Multiaddr) -> Self {
        // Check for relays first: a relayed address begins with that of the relay, which says nothing about the peer.
        if weft_net::is_relayed(seen_at) {
            return Self::RELAYED;
        }
        if !weft_net::is_outside(seen_at) {
            return Self::LOCAL;
        }
        let ip = seen_at.iter().find_map(|part| match part {
            Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
            Protocol::Ip6(ip) => Some(IpAddr::V6(ip)),
            _ => None,
        });
        match ip {
            Some(IpAddr::V4(ip)) => Self(1 << 63 | u64::from(u32::from(ip) >> 8)),
            Some(IpAddr::V6(ip)) => Self(1 << 62 | (u128::from(ip) >> 80) as u64),
            // Peers in this process are local. Names may lead anywhere, so they count as one network group.
            None if seen_at
                .iter()
                .any(|part| matches!(part, Protocol::Memory(_))) =>
            {
                Self::LOCAL
            }
            None => Self(1 << 61),
        }
    }

    /// Returns true if a peer at this address is in this network group, as [`of`](Self::of) determines. An address that
    /// begins with an IP address of another group is not parsed, because a routing table has hundreds of addresses.
    pub(crate) fn is_of(self, address: &Multiaddr) -> bool {
        /// The codes of `/ip4` and `/ip6`.
        const IP4: u8 = 4;
        const IP6: u8 = 41;
        let bytes = self.0.to_be_bytes();
        let may_be = match (self.0.leading_zeros(), address.as_ref() as &[u8]) {
            (0, [IP4, ip @ ..]) => ip.starts_with(&bytes[5..]),
            (1, [IP6, ip @ ..]) => ip.starts_with(&bytes[2..]),
            (0, [IP6, ..]) | (1, [IP4, ..]) => false,
            _ => true,
        };
        may_be && Self::of(address) == self
    }

    pub(crate) fn is_public(self) -> bool {
        self != Self::LOCAL
    }
}

/// The size of the records that a node stores for the DHT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Stored records, including this node's own.
    pub records: usize,
    /// Keys with records, and the limit for those of other publishers.
    pub keys: (usize, usize),
    /// Total size of the records in bytes, and the limit for those of other publishers.
    pub bytes: (usize, usize),
    /// Records refused because of a quota since the start.
    pub refused: u64,
}

#[derive(Debug)]
struct Kept {
    record: Record,
    size: usize,
    origin: Origin,
    /// Number of records that had come before this one, to tell which records are fresh.
    arrival: u64,
    /// Time until which the record is kept even if it has expired by the clock, which may be wrong for a while.
    until: Instant,
}

impl Kept {
    /// Returns true if the record has not expired at `now`, in milliseconds since 1970.
    fn holds(&self, now: u64) -> bool {
        self.record.expires_at() > now
    }
}

/// The records under one key.
#[derive(Debug)]
struct Set {
    kept: Vec<Kept>,
    bytes: usize,
    /// Time of the next search for expired records; none is dropped before.
    next_check: Instant,
}

/// The reason for which a record is not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The store has a newer record of the same publisher, with this sequence number.
    Superseded(u64),
    /// The record is over a quota.
    Quota,
    /// No node that follows the protocol sends such a record.
    Offence,
    /// The record has expired, or claims to live longer than allowed. The clock of one of the two nodes is wrong.
    Time,
}

/// The slot for a record in its set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// The record is already stored.
    Same,
    /// The record replaces the one at this index.
    Of(usize),
    /// The record is added to the set.
    New,
}

/// The record store, in memory and optionally on disk.
#[derive(Debug)]
pub(crate) struct Store {
    /// This node. Its own records are subject to no limit.
    local: PeerId,
    sets: IndexMap<RecordKey, Set>,
    /// Number of records, and their bytes: in all, by publisher and by network group.
    count: usize,
    bytes: usize,
    by_publisher: HashMap<PeerId, usize>,
    by_network: HashMap<Origin, usize>,
    arrivals: u64,
    /// Records refused because of a quota.
    refused: u64,
    /// Highest sequence number seen in this node's own records, including expired ones.
    newest_own: u64,
    /// Keys whose changes are watched on this node.
    watched: HashMap<RecordKey, watch::Sender<()>>,
    disk: Option<Disk>,
    /// State of SplitMix64 (Steele, Lea, Flood 2014). The numbers only have to be unpredictable to other peers.
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
            newest_own: 0,
            watched: HashMap::new(),
            disk: None,
            random: AtomicU64::new(RandomState::new().build_hasher().finish()),
        };
        let Some(mut disk) = disk else { return store };
        let now = record::now();
        for (key, row) in disk.take_loaded() {
            let taken = of_row(&row).is_some_and(|(record, origin)| {
                let wire = record.as_wire();
                let is_own = record.publisher() == local;
                if is_own {
                    store.newest_own = store.newest_own.max(record.sequence());
                }
                let holds = is_own || record::check_claims(wire, record.key(), now).is_ok();
                // The limits may be lower than at the last run.
                holds && store.take(record, origin).is_ok()
            });
            if !taken {
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

    /// Returns the highest sequence number that the store has seen in this node's own records.
    pub(crate) fn newest_own(&self) -> u64 {
        self.newest_own
    }

    /// Returns a receiver that is notified of changes under a key, or `None` if too many keys are watched.
    pub(crate) fn watch(&mut self, key: &RecordKey) -> Option<watch::Receiver<()>> {
        if self.watched.len() >= MAX_WATCHED {
            self.watched.retain(|_, sender| sender.receiver_count() > 0);
        }
        if self.watched.len() >= MAX_WATCHED && !self.watched.contains_key(key) {
            return None;
        }
        let sender = self.watched.entry(key.clone());
        Some(sender.or_insert_with(|| watch::channel(()).0).subscribe())
    }

    /// Returns this node's own unexpired records under keys with this prefix, including withdrawals.
    pub(crate) fn own(&self, prefix: &[u8]) -> Vec<Record> {
        let now = record::now();
        let sets = self.sets.iter();
        let sets = sets.filter(|(key, _)| key.as_ref().starts_with(prefix));
        sets.flat_map(|(_, set)| &set.kept)
            .filter(|kept| kept.record.publisher() == self.local && kept.holds(now))
            .map(|kept| kept.record.clone())
            .collect()
    }

    /// Drops expired records.
    pub(crate) fn sweep(&mut self) {
        let (clock, now) = (record::now(), Instant::now());
        // Go backwards: the set that replaces a removed one was already checked.
        for at in (0..self.sets.len()).rev() {
            self.drop_expired(at, clock, now);
        }
        self.watched.retain(|_, sender| sender.receiver_count() > 0);
    }

    /// Drops records that have expired both by the clock and by the time that has passed on this node. A clock that
    /// jumps ahead and back thus loses no record.
    fn drop_expired(&mut self, at: usize, clock: u64, now: Instant) {
        let Some((_, set)) = self.sets.get_index_mut(at) else {
            return;
        };
        if now < set.next_check {
            return;
        }
        let mut gone = Vec::new();
        let kept = std::mem::take(&mut set.kept);
        for one in kept {
            let expired = one.until <= now && !one.holds(clock);
            match expired {
                true => gone.push(one),
                false => set.kept.push(one),
            }
        }
        set.bytes -= gone.iter().map(|one| one.size).sum::<usize>();
        let soonest = set.kept.iter().map(|one| one.until).min();
        // A record that is still valid by the clock is checked again, but not at each request.
        set.next_check = soonest.map_or(now, |soonest| soonest.max(now + CHECK_INTERVAL));
        if set.kept.is_empty() {
            self.sets.swap_remove_index(at);
        }
        for kept in gone {
            self.forget(&kept);
        }
    }

    /// Updates the sums for a record that has left its set.
    fn forget(&mut self, kept: &Kept) {
        self.count -= 1;
        self.bytes -= kept.size;
        subtract(&mut self.by_publisher, kept.record.publisher(), kept.size);
        if kept.origin.is_public() {
            subtract(&mut self.by_network, kept.origin, kept.size);
        }
        if let Some(disk) = &self.disk {
            disk.change(row_key(&kept.record), None);
        }
    }

    fn remember(&mut self, record: &Record, size: usize, origin: Origin) {
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

    /// Decodes a peer's request to store records without a signature check. Returns the records to check: those that
    /// are neither stored already, nor superseded, nor over a quota. Returns an empty list if all are stored already.
    pub(crate) fn consider(
        &mut self,
        key: &RecordKey,
        value: &[u8],
        origin: Origin,
    ) -> Result<Vec<wire::SignedRecord>, Refusal> {
        if value.len() > MAX_PUT_BYTES {
            return Err(Refusal::Offence);
        }
        let set = wire::RecordSet::decode(value).map_err(|_| Refusal::Offence)?;
        if set.records.is_empty() || set.records.len() > MAX_PUT {
            return Err(Refusal::Offence);
        }
        let (now, mut worth, mut outcome) = (record::now(), Vec::new(), Err(Refusal::Time));
        for wire in set.records {
            if let Err(error) = record::check_claims(&wire, key.as_ref(), now) {
                if error.is_offence() {
                    return Err(Refusal::Offence);
                }
                continue;
            }
            let publisher = record::claimed_publisher(&wire).ok_or(Refusal::Offence)?;
            match self.slot(key, &publisher, &wire, origin) {
                Ok(Slot::Same) => outcome = Ok(()),
                Ok(_) => worth.push(wire),
                Err(refusal) => {
                    self.refused += u64::from(refusal == Refusal::Quota);
                    outcome = outcome.or(Err(refusal));
                }
            }
        }
        match worth.is_empty() {
            true => outcome.map(|()| worth),
            false => Ok(worth),
        }
    }

    /// Returns the slot of a record in its set, or an error if the record has been superseded or is over a quota.
    fn slot(
        &self,
        key: &RecordKey,
        publisher: &PeerId,
        wire: &wire::SignedRecord,
        origin: Origin,
    ) -> Result<Slot, Refusal> {
        let set = self.sets.get(key).map_or(&[][..], |set| &set.kept);
        let (mut known, mut count, mut bytes, mut of_network_here) = (None, 0, 0, 0);
        for (at, kept) in set.iter().enumerate() {
            of_network_here += usize::from(kept.origin == origin);
            if kept.record.publisher() == *publisher {
                count += 1;
                bytes += kept.size;
                if kept.record.is_about(publisher, &wire.subkey) {
                    known = Some(at);
                }
            }
        }
        if let Some(before) = known.map(|at| set[at].record.as_wire()) {
            if before == wire {
                return Ok(Slot::Same);
            }
            if (before.sequence, &before.signature) >= (wire.sequence, &wire.signature) {
                return Err(Refusal::Superseded(before.sequence));
            }
        }
        let slot = known.map_or(Slot::New, Slot::Of);
        if *publisher == self.local {
            return Ok(slot);
        }
        // The replaced record frees quota of its publisher and of its network group.
        let (size, before) = (record::size_of(wire), known.map(|at| &set[at]));
        let freed = before.map_or(0, |before| before.size);
        let freed_of_network = before.filter(|before| before.origin == origin);
        let freed_of_network = freed_of_network.map_or(0, |before| before.size);
        let of_publisher = self.by_publisher.get(publisher).copied().unwrap_or(0);
        let of_network = self.by_network.get(&origin).copied().unwrap_or(0);
        let is_new = known.is_none();
        if bytes - freed + size > MAX_PUBLISHER_BYTES
            || (is_new && count >= MAX_PER_PUBLISHER)
            || of_publisher.saturating_sub(freed) + size > MAX_OF_PUBLISHER
            || of_network.saturating_sub(freed_of_network) + size > MAX_OF_NETWORK
            || (is_new && origin.is_public() && of_network_here >= MAX_OF_NETWORK_IN_SET)
        {
            return Err(Refusal::Quota);
        }
        Ok(slot)
    }

    /// Stores a record with a verified signature if it is new and there is room. This node's own records count as
    /// local, even if another peer sends them.
    pub(crate) fn take(&mut self, record: Record, origin: Origin) -> Result<(), Refusal> {
        let (now, clock) = (Instant::now(), record::now());
        let is_own = record.publisher() == self.local;
        let origin = if is_own { Origin::LOCAL } else { origin };
        let key = RecordKey::new(&record.key());
        if let Some(at) = self.sets.get_index_of(&key) {
            self.drop_expired(at, clock, now);
        }
        let slot = self
            .slot(&key, &record.publisher(), record.as_wire(), origin)
            .inspect_err(|refusal| self.refused += u64::from(*refusal == Refusal::Quota))?;
        let replaced = match slot {
            Slot::Same => return Ok(()),
            Slot::Of(at) => {
                let set = self.sets.get_mut(&key).expect("it was found there");
                let old = set.kept.swap_remove(at);
                set.bytes -= old.size;
                self.forget(&old);
                Some(old)
            }
            Slot::New => None,
        };
        let size = record.size();
        if !is_own && !self.make_room(&key, size) {
            self.refused += 1;
            // The older record still holds, and there was room for it.
            if let Some(old) = replaced {
                self.keep(key, old);
            }
            return Err(Refusal::Quota);
        }
        if is_own {
            self.newest_own = self.newest_own.max(record.sequence());
        }
        self.arrivals += 1;
        let mut remaining = Duration::from_millis(record.expires_at().saturating_sub(clock));
        if is_own {
            remaining = remaining.max(CLOCK_GRACE);
        }
        let until = now + remaining.min(record::MAX_TTL + record::MAX_SKEW);
        let kept = Kept {
            record,
            size,
            origin,
            arrival: self.arrivals,
            until,
        };
        if let Some(changed) = self.watched.get(&key) {
            changed.send_replace(());
        }
        self.keep(key, kept);
        Ok(())
    }

    /// Adds a record to its set and updates the sums.
    fn keep(&mut self, key: RecordKey, kept: Kept) {
        self.remember(&kept.record, kept.size, kept.origin);
        let set = self.sets.entry(key).or_insert_with(|| Set {
            kept: Vec::new(),
            bytes: 0,
            next_check: kept.until,
        });
        set.bytes += kept.size;
        set.next_check = set.next_check.min(kept.until);
        set.kept.push(kept);
    }

    /// Drops randomly chosen records of other publishers until there is room. Returns false if there is none.
    fn make_room(&mut self, key: &RecordKey, size: usize) -> bool {
        // Make room under the key.
        for _ in 0..MAX_RECORDS {
            let Some(at) = self.sets.get_index_of(key) else {
                break;
            };
            let set = &self.sets[at];
            if set.kept.len() < MAX_RECORDS && set.bytes + size <= MAX_SET {
                break;
            }
            if !self.drop_some(at) {
                return false;
            }
        }
        // Make room in the whole store. Sets with only this node's own records are skipped.
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

    /// Drops one record of another publisher from a set: the first one at or after a random index.
    fn drop_some(&mut self, at: usize) -> bool {
        let Some((_, set)) = self.sets.get_index(at) else {
            return false;
        };
        let (length, start) = (set.kept.len(), self.random(set.kept.len()));
        let is_others = |index: &usize| set.kept[*index].record.publisher() != self.local;
        let index = (0..length).map(|n| (start + n) % length).find(is_others);
        let (Some(index), Some((_, set))) = (index, self.sets.get_index_mut(at)) else {
            return false;
        };
        let gone = set.kept.swap_remove(index);
        set.bytes -= gone.size;
        if set.kept.is_empty() {
            self.sets.swap_remove_index(at);
        }
        self.forget(&gone);
        true
    }

    /// Returns the records in an answer for this key.
    pub(crate) fn answer(&self, key: &RecordKey) -> Vec<&Record> {
        let set = self.sets.get(key);
        set.map(|set| self.sample(&set.kept)).unwrap_or_default()
    }

    /// Orders the records of a set for an answer. If the set is too large for one answer, half of the answer consists
    /// of this node's own and the freshest records, and the other half is chosen at random.
    fn sample<'a>(&'a self, set: &'a [Kept]) -> Vec<&'a Record> {
        let now = record::now();
        let mut live: Vec<_> = set.iter().filter(|kept| kept.holds(now)).collect();
        let size = |kept: &&Kept| kept.size;
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
            // Fisher-Yates shuffle of the rest.
            for at in (fresh + 1..live.len()).rev() {
                live.swap(at, fresh + self.random(at - fresh + 1));
            }
        }
        live.into_iter().map(|kept| &kept.record).collect()
    }

    /// Returns at most `most` records of any publisher that are stored here under keys with this prefix.
    pub(crate) fn seen(&self, prefix: &[u8], most: usize) -> Vec<Record> {
        let now = record::now();
        let sets = self.sets.iter();
        let sets = sets.filter(|(key, _)| key.as_ref().starts_with(prefix));
        sets.flat_map(|(_, set)| &set.kept)
            .filter(|kept| kept.record.value().is_some() && kept.holds(now))
            .take(most)
            .map(|kept| kept.record.clone())
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

/// Returns the key of a record on disk: its key, publisher and subkey.
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

/// Encodes records as the value of a Kademlia record, as many as fit.
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

/// The records collected by a lookup: the newest for each publisher and subkey.
#[derive(Debug, Default)]
pub(crate) struct Found {
    records: HashMap<(Vec<u8>, Vec<u8>), Record>,
    bytes: usize,
    /// Signatures that were checked or wait for their check; at most [`MAX_FOUND`].
    checks: usize,
}

impl Found {
    /// Decodes an answer without a signature check. Returns whether it has records that were found before, and the
    /// records to check, which count as checked unless returned by [`Self::unchecked`]. Records that break other rules
    /// are skipped, because a set comes from many publishers. Returns `None` if the answer itself is malformed.
    pub(crate) fn decode_answer(
        &mut self,
        key: &[u8],
        value: &[u8],
    ) -> Option<(bool, Vec<wire::SignedRecord>)> {
        if value.len() > MAX_PACKET {
            return None;
        }
        let set = wire::RecordSet::decode(value).ok()?;
        let (now, mut any_known, mut unknown) = (record::now(), false, Vec::new());
        for wire in set.records {
            if record::check_claims(&wire, key, now).is_err() {
                continue;
            }
            let id = (wire.publisher.to_vec(), wire.subkey.to_vec());
            match self.records.get(&id) {
                Some(known) if *known.as_wire() == wire => any_known = true,
                None if self.is_full() => {}
                _ if self.checks >= MAX_FOUND => {}
                _ => {
                    self.checks += 1;
                    unknown.push(wire);
                }
            }
        }
        Some((any_known, unknown))
    }

    /// Returns the budget for records of [`Self::decode_answer`] whose signatures are not checked after all.
    pub(crate) fn unchecked(&mut self, records: usize) {
        self.checks = self.checks.saturating_sub(records);
    }

    fn is_full(&self) -> bool {
        self.records.len() >= MAX_FOUND || self.bytes >= MAX_FOUND_BYTES
    }

    /// Adds records with verified signatures.
    pub(crate) fn add(&mut self, records: impl IntoIterator<Item = Record>) {
        for record in records {
            let wire = record.as_wire();
            let id = (wire.publisher.to_vec(), wire.subkey.to_vec());
            match self.records.get(&id) {
                Some(before) if !record.supersedes(before) => continue,
                None if self.is_full() => continue,
                _ => {}
            }
            self.bytes += record.size();
            if let Some(before) = self.records.insert(id, record) {
                self.bytes -= before.size();
            }
        }
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
        let records = self.answer(key);
        let longest = records.iter().map(|record| record.remaining()).max()?;
        Some(Cow::Owned(KadRecord {
            key: key.clone(),
            value: encode(records),
            publisher: None,
            expires: Some(Instant::now() + longest),
        }))
    }

    /// Stores nothing. Records of other peers go through [`Store::consider`], the signature check and [`Store::take`],
    /// so that no signature is checked in the swarm's task.
    fn put(&mut self, _: KadRecord) -> StoreResult<()> {
        Err(Error::ValueTooLarge)
    }

    /// Does nothing. Kademlia calls this for a whole set it considers expired; records expire one by one in
    /// [`Self::sweep`].
    fn remove(&mut self, _: &RecordKey) {}

    /// Returns nothing. Kademlia would replicate these records, but publishers renew their own.
    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
    }

    fn add_provider(&mut self, _: ProviderRecord) -> StoreResult<()> {
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
mod tests;
