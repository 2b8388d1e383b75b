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

/// Statements that one request to store may bring, and the bytes of the largest such request: a publisher sends one.
const MAX_PUT: usize = 4;
const MAX_PUT_BYTES: usize = MAX_PUT * record::MAX_SIZE;

/// This node's own statements that have expired are kept out of sight for so long after a start: a machine may start
/// with a clock that is ahead, until it has asked for the time.
const CLOCK_GRACE: Duration = Duration::from_secs(600);

/// Time between two looks at which statements under a key have expired.
const LOOK: Duration = Duration::from_secs(1);

/// Keys whose changes are watched here.
const MAX_WATCHED: usize = 4096;

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
        // First: the address begins with the relay's, which says nothing of the peer behind it.
        if weft_net::is_relayed(seen_at) {
            return Self::RELAYED;
        }
        if !weft_net::is_outside(seen_at) {
            return Self::NEAR;
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

    /// Returns true if a peer at this address is of this network, as [`of`](Self::of) has it. An address that begins
    /// with an IP address of another network is not parsed: a routing table has hundreds.
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
    size: usize,
    origin: Origin,
    /// Counts what has come, so that it is known what is fresh.
    arrival: u64,
    /// It is kept until then even if it has expired by the clock, which may be wrong for a while.
    until: Instant,
}

impl Kept {
    /// By the clock, which shows so many milliseconds since 1970.
    fn holds(&self, now: u64) -> bool {
        self.record.expires_at() > now
    }
}

/// Statements under one key.
#[derive(Debug)]
struct Set {
    kept: Vec<Kept>,
    bytes: usize,
    /// None of them is to be dropped before then.
    look: Instant,
}

/// Why a statement is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A newer one of the same publisher is there, of this sequence number.
    Superseded(u64),
    /// It is over a quota.
    Quota,
    /// No node that follows the protocol sends this.
    Offence,
    /// It has expired, or claims to live for longer than allowed: the clock of one of both is wrong.
    Time,
}

/// The position of a record in its set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It is there.
    Same,
    /// In place of this one of its set.
    Of(usize),
    /// Beside the others.
    New,
}

/// In memory, and on disk as well if there is one.
#[derive(Debug)]
pub(crate) struct Store {
    /// Whose statements are kept whatever strangers send.
    local: PeerId,
    sets: IndexMap<RecordKey, Set>,
    /// Statements, and their bytes: in all, by publisher and by network.
    count: usize,
    bytes: usize,
    by_publisher: HashMap<PeerId, usize>,
    by_network: HashMap<Origin, usize>,
    arrivals: u64,
    /// Statements over a quota.
    refused: u64,
    /// The highest sequence number of this node's own statements that was seen, also of expired ones.
    newest_own: u64,
    /// Keys whose changes somebody here waits for.
    watched: HashMap<RecordKey, watch::Sender<()>>,
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
                // The limits may be lower than they were.
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

    /// Returns the highest sequence number of this node's own statements that the store has seen.
    pub(crate) fn newest_own(&self) -> u64 {
        self.newest_own
    }

    /// Tells of changes under a key from now on. `None` if too many keys are watched.
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

    /// What this node states, or has taken back, under keys that begin like this.
    pub(crate) fn own(&self, prefix: &[u8]) -> Vec<Record> {
        let now = record::now();
        let sets = self.sets.iter();
        let sets = sets.filter(|(key, _)| key.as_ref().starts_with(prefix));
        sets.flat_map(|(_, set)| &set.kept)
            .filter(|kept| kept.record.publisher() == self.local && kept.holds(now))
            .map(|kept| kept.record.clone())
            .collect()
    }

    /// Drops what has expired.
    pub(crate) fn sweep(&mut self) {
        let (clock, now) = (record::now(), Instant::now());
        // From the end: what takes the place of a set that is gone has been looked at.
        for at in (0..self.sets.len()).rev() {
            self.drop_expired(at, clock, now);
        }
        self.watched.retain(|_, sender| sender.receiver_count() > 0);
    }

    /// Drops what has expired both by the clock and by the time that has passed here: a clock that jumps ahead and back
    /// loses nothing.
    fn drop_expired(&mut self, at: usize, clock: u64, now: Instant) {
        let Some((_, set)) = self.sets.get_index_mut(at) else {
            return;
        };
        if now < set.look {
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
        // One that still holds by the clock is looked at again, but not at each request.
        set.look = soonest.map_or(now, |soonest| soonest.max(now + LOOK));
        if set.kept.is_empty() {
            self.sets.swap_remove_index(at);
        }
        for kept in gone {
            self.forget(&kept);
        }
    }

    /// It is in no set any more.
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

    /// Reads what a stranger wants stored, without a check of any signature. Returns the statements that are worth one:
    /// not those that are there, have been superseded, or are over a quota. If all are there, there is none.
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
            match self.place(key, &publisher, &wire, origin) {
                Ok(Place::Same) => outcome = Ok(()),
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

    /// Returns the position of this publisher's record in its set, or an error if the record has been superseded or is
    /// over a quota.
    fn place(
        &self,
        key: &RecordKey,
        publisher: &PeerId,
        wire: &wire::SignedRecord,
        origin: Origin,
    ) -> Result<Place, Refusal> {
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
                return Ok(Place::Same);
            }
            if (before.sequence, &before.signature) >= (wire.sequence, &wire.signature) {
                return Err(Refusal::Superseded(before.sequence));
            }
        }
        let place = known.map_or(Place::New, Place::Of);
        if *publisher == self.local {
            return Ok(place);
        }
        // The record that is replaced makes room wherever it is counted: with its publisher, and with its network.
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
        Ok(place)
    }

    /// Keeps a statement whose signature was checked, if it says something new and there is room. This node's own count
    /// as from here, whoever brings them.
    pub(crate) fn take(&mut self, record: Record, origin: Origin) -> Result<(), Refusal> {
        let (now, clock) = (Instant::now(), record::now());
        let is_own = record.publisher() == self.local;
        let origin = if is_own { Origin::NEAR } else { origin };
        let key = RecordKey::new(&record.key());
        if let Some(at) = self.sets.get_index_of(&key) {
            self.drop_expired(at, clock, now);
        }
        let place = self
            .place(&key, &record.publisher(), record.as_wire(), origin)
            .inspect_err(|refusal| self.refused += u64::from(*refusal == Refusal::Quota))?;
        let replaced = match place {
            Place::Same => return Ok(()),
            Place::Of(at) => {
                let set = self.sets.get_mut(&key).expect("it was found there");
                let old = set.kept.swap_remove(at);
                set.bytes -= old.size;
                self.forget(&old);
                Some(old)
            }
            Place::New => None,
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

    /// Puts a record into its set and counts it.
    fn keep(&mut self, key: RecordKey, kept: Kept) {
        self.remember(&kept.record, kept.size, kept.origin);
        let set = self.sets.entry(key).or_insert_with(|| Set {
            kept: Vec::new(),
            bytes: 0,
            look: kept.until,
        });
        set.bytes += kept.size;
        set.look = set.look.min(kept.until);
        set.kept.push(kept);
    }

    /// Drops others' statements, chosen at random, until this fits.
    fn make_room(&mut self, key: &RecordKey, size: usize) -> bool {
        // Under the key.
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

    /// Drops one statement of others from a set, chosen at random: the first that is not our own from a random place
    /// on.
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

    /// Returns the records that an answer for this key contains.
    pub(crate) fn answer(&self, key: &RecordKey) -> Vec<&Record> {
        let set = self.sets.get(key);
        set.map(|set| self.sample(&set.kept)).unwrap_or_default()
    }

    /// What an answer says of a set: our own, and of a set that is too large one half the freshest and one half any.
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
            // Fisher and Yates, of the rest.
            for at in (fresh + 1..live.len()).rev() {
                live.swap(at, fresh + self.random(at - fresh + 1));
            }
        }
        live.into_iter().map(|kept| &kept.record).collect()
    }

    /// What anybody states under keys that begin like this, as far as it is kept here; at most so many.
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
    /// Signatures that were checked, or wait for it: [`MAX_FOUND`] at most.
    checks: usize,
}

impl Found {
    /// Reads an answer without a check of any signature: whether it holds statements that were found before, and those
    /// whose signatures are to be checked, which is counted as done until [`Self::unchecked`]. Records that break other
    /// rules are skipped, because a set comes from many publishers. An answer whose own form is wrong is `None`.
    pub(crate) fn sort_out(
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

    /// Gives back the budget for so many statements of [`Self::sort_out`] whose signatures are not checked after all.
    pub(crate) fn unchecked(&mut self, statements: usize) {
        self.checks = self.checks.saturating_sub(statements);
    }

    fn is_full(&self) -> bool {
        self.records.len() >= MAX_FOUND || self.bytes >= MAX_FOUND_BYTES
    }

    /// Takes in statements whose signatures were checked.
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

    /// Takes nothing: what strangers send goes through [`Store::consider`], the check of its signature, and
    /// [`Store::take`], so that no signature is checked in the swarm's task.
    fn put(&mut self, _: KadRecord) -> StoreResult<()> {
        Err(Error::ValueTooLarge)
    }

    /// Kademlia calls this for records it takes for expired; statements expire one by one, in [`Self::sweep`].
    fn remove(&mut self, _: &RecordKey) {}

    /// For replication by Kademlia, which is not used: publishers say again what still holds.
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
