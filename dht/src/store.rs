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
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    /// Bytes in a signature.
    const SIGNATURE: usize = 64;

    const HOUR: Duration = Duration::from_secs(2 * 3600);

    fn store() -> Store {
        Store::new(PeerId::random(), None)
    }

    fn record(keys: &Keypair, subkey: &[u8], value: &[u8], sequence: u64) -> Record {
        Record::sign(keys, b"k", subkey, Some(value), sequence, HOUR).unwrap()
    }

    /// Stores as a stranger does, from a network.
    fn put_from(store: &mut Store, key: &[u8], value: &[u8], from: Origin) -> Result<(), Refusal> {
        let worth = store.consider(&RecordKey::new(&key), value, from)?;
        let mut taken = Ok(());
        for wire in worth {
            let record = Record::verify(wire, key).map_err(|_| Refusal::Offence)?;
            taken = store.take(record, from);
        }
        taken
    }

    fn put(store: &mut Store, records: &[Record]) -> Result<(), Refusal> {
        let value = encode(records.iter());
        put_from(store, records[0].key(), &value, Origin::NEAR)
    }

    /// Returns the records of the store's answer, each of them checked.
    fn read(store: &Store) -> Vec<Record> {
        let key = RecordKey::new(b"k");
        let mut found = Found::default();
        gather(&mut found, b"k", &store.get(&key).unwrap().value);
        found.into_records()
    }

    fn gather(found: &mut Found, key: &[u8], value: &[u8]) -> bool {
        let Some((known, unknown)) = found.sort_out(key, value) else {
            return false;
        };
        let records = unknown.into_iter();
        let records: Vec<_> = records.map_while(|w| Record::verify(w, key).ok()).collect();
        let any = known || !records.is_empty();
        found.add(records);
        any
    }

    fn network(n: u8) -> Origin {
        Origin::of(&format!("/ip4/8.8.{n}.1/tcp/1").parse().unwrap())
    }

    /// What is counted is what is there.
    fn check(store: &Store) {
        let all = || store.sets.values().flat_map(|set| &set.kept);
        let sum = |of: &dyn Fn(&&Kept) -> bool| {
            all()
                .filter(of)
                .map(|kept| kept.record.size())
                .sum::<usize>()
        };
        assert_eq!(store.count, all().count());
        assert_eq!(store.bytes, sum(&|_| true));
        for set in store.sets.values() {
            assert!(!set.kept.is_empty());
            assert_eq!(set.bytes, set.kept.iter().map(|kept| kept.size).sum());
            assert!(set.kept.iter().all(|kept| kept.size == kept.record.size()));
            assert!(
                set.kept.iter().all(|kept| kept.until >= set.look)
                    || set.look <= Instant::now() + LOOK
            );
        }
        for (publisher, bytes) in &store.by_publisher {
            assert_eq!(*bytes, sum(&|kept| kept.record.publisher() == *publisher));
        }
        for (origin, bytes) in &store.by_network {
            assert_eq!(*bytes, sum(&|kept| kept.origin == *origin));
        }
    }

    #[test]
    fn an_address_is_of_its_own_network_only() {
        let relay = PeerId::random();
        let addresses = [
            "/ip4/8.8.8.8/tcp/1".to_owned(),
            "/ip4/8.8.8.9/udp/1/quic-v1".to_owned(),
            "/ip4/8.8.9.8/tcp/1".to_owned(),
            "/ip4/192.168.8.8/tcp/1".to_owned(),
            "/ip6/2a00:1450:4001::1/tcp/1".to_owned(),
            "/ip6/2a00:1450:4002::1/tcp/1".to_owned(),
            "/dns/example.com/tcp/1".to_owned(),
            "/memory/1".to_owned(),
            format!("/ip4/8.8.8.8/tcp/1/p2p/{relay}/p2p-circuit"),
        ];
        let addresses = addresses.map(|text| text.parse::<Multiaddr>().unwrap());
        for a in &addresses {
            for b in &addresses {
                let network = Origin::of(a);
                assert_eq!(network.is_of(b), network == Origin::of(b), "{a} {b}");
            }
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
            assert!(put_from(&mut store, b"k", &bad, Origin::NEAR).is_err());
        }
        let value = set(vec![good.as_wire().clone()]);
        let wrong = put_from(&mut store, b"other", &value, Origin::NEAR);
        assert_eq!(wrong, Err(Refusal::Offence));
        assert_eq!(store.usage().records, 0);
        // Of another clock is not of another mind: the rest of the set counts.
        let mixed = set(vec![expired.as_wire().clone(), good.as_wire().clone()]);
        put_from(&mut store, b"k", &mixed, Origin::NEAR).unwrap();
        assert_eq!(read(&store), [good]);
        // Nor does Kademlia itself store anything.
        assert!(RecordStore::put(&mut store, KadRecord::new(b"k".to_vec(), value)).is_err());
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
        let mut taken = 0;
        let put_at = |store: &mut Store, record: &Record, from| {
            put_from(store, b"k", &encode([record]), from)
        };
        for _ in 0..MAX_OF_NETWORK_IN_SET + 30 {
            let sybil = record(&Keypair::generate_ed25519(), b"", b"x", 1);
            taken += usize::from(put_at(&mut store, &sybil, network(1)).is_ok());
        }
        assert_eq!(taken, MAX_OF_NETWORK_IN_SET);
        let honest = record(&Keypair::generate_ed25519(), b"", b"v", 1);
        put_at(&mut store, &honest, network(2)).unwrap();
        assert!(read(&store).contains(&honest));
        check(&store);
    }

    #[test]
    fn a_record_can_be_replaced_while_the_quota_of_its_network_is_full() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let put_at = |store: &mut Store, record: &Record, from| {
            put_from(store, b"k", &encode([record]), from)
        };
        put_at(&mut store, &record(&keys, b"", &[1; 100], 1), network(1)).unwrap();
        // As if others of the network had filled it.
        store.by_network.insert(network(1), MAX_OF_NETWORK);
        store.by_network.insert(network(2), MAX_OF_NETWORK);
        let new = record(&keys, b"", &[2; 100], 2);
        put_at(&mut store, &new, network(1)).unwrap();
        assert_eq!(read(&store), [new]);
        assert_eq!(store.by_network[&network(1)], MAX_OF_NETWORK);
        // Neither does one that is larger fit, nor one that comes from another network that is full.
        let larger = record(&keys, b"", &[3; 101], 3);
        assert_eq!(put_at(&mut store, &larger, network(1)), Err(Refusal::Quota));
        let elsewhere = record(&keys, b"", &[3; 100], 3);
        assert_eq!(
            put_at(&mut store, &elsewhere, network(2)),
            Err(Refusal::Quota)
        );
        // In a network with room it leaves the old one.
        put_at(&mut store, &elsewhere, network(3)).unwrap();
        assert!(store.by_network[&network(1)] < MAX_OF_NETWORK - 100);
        assert_eq!(store.by_network[&network(3)], elsewhere.size());
    }

    #[test]
    fn a_replacement_for_which_there_is_no_room_leaves_the_older_record() {
        let own = Keypair::generate_ed25519();
        let mut store = Store::new(own.public().to_peer_id(), None);
        let other = Keypair::generate_ed25519();
        let old = record(&other, b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&old)).unwrap();
        // Our own records make room for nobody.
        let mut n = 0_u16;
        while store.bytes + 4000 <= MAX_SET {
            let ours = record(&own, &n.to_be_bytes(), &[0; 3000], 1);
            store.take(ours, Origin::NEAR).unwrap();
            n += 1;
        }
        let larger = record(&other, b"", &[0; 4000], 2);
        assert_eq!(put(&mut store, &[larger]), Err(Refusal::Quota));
        let set = &store.sets[&RecordKey::new(b"k")];
        assert!(set.kept.iter().any(|kept| kept.record == old));
        check(&store);
    }

    #[test]
    fn a_peer_behind_a_relay_counts_as_relayed_wherever_the_relay_is() {
        let relay = PeerId::random();
        for at in [
            "/ip4/8.8.8.8/tcp/1",
            "/ip4/192.168.1.1/tcp/1",
            "/ip4/127.0.0.1/udp/1/quic-v1",
            "/ip6/fd00::1/tcp/1",
            "/dns4/relay.example/tcp/1",
        ] {
            let relayed = format!("{at}/p2p/{relay}/p2p-circuit");
            for relayed in [format!("{relayed}/p2p/{}", PeerId::random()), relayed] {
                let origin = Origin::of(&relayed.parse().unwrap());
                assert_eq!(origin, Origin::RELAYED, "{relayed}");
                assert!(origin.is_public());
            }
        }
        let near = Origin::of(&"/ip4/192.168.1.1/tcp/1".parse().unwrap());
        assert_eq!(near, Origin::NEAR);
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
                assert!(set.kept.iter().any(|kept| kept.record == other));
            }
        }
        assert!(store.usage().records <= MAX_RECORDS);
        assert!(store.bytes <= MAX_SET);
        assert!(read(&store).contains(&ours));
        check(&store);
    }

    #[test]
    fn a_request_to_store_more_than_a_few_statements_is_refused_unread() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let key = RecordKey::new(b"k");
        let bad = |subkey: u16| wire::SignedRecord {
            signature: vec![1; SIGNATURE].into(),
            ..record(&keys, &subkey.to_le_bytes(), b"", 1)
                .as_wire()
                .clone()
        };
        let set = |count| {
            let records = (0..count).map(bad).collect();
            wire::RecordSet { records }.encode_to_vec()
        };
        let full = set(500);
        assert!((55_000..MAX_PACKET).contains(&full.len()), "{}", full.len());
        for many in [full, set(MAX_PUT as u16 + 1)] {
            let refused = store.consider(&key, &many, Origin::NEAR);
            assert_eq!(refused, Err(Refusal::Offence));
        }
        let few = store.consider(&key, &set(MAX_PUT as u16), Origin::NEAR);
        assert_eq!(few.unwrap().len(), MAX_PUT);
        // The largest statement that there may be is taken.
        let largest = Record::sign(&keys, &[b'k'; 512], &[0; 256], Some(&[0; 4096]), 1, HOUR);
        let largest = largest.unwrap();
        assert!(largest.size() <= record::MAX_SIZE);
        put(&mut store, &[largest]).unwrap();
    }

    #[test]
    fn quotas_and_what_is_known_are_looked_at_before_any_signature() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let key = RecordKey::new(b"k");
        for n in 0..MAX_PER_PUBLISHER as u8 {
            // Until its share is full.
            let _ = put(&mut store, &[record(&keys, &[n], b"v", 5)]);
        }
        // A wrong signature that nobody looks at.
        let unsigned = |subkey: &[u8], sequence| {
            let mut wire = record(&keys, subkey, b"w", sequence).as_wire().clone();
            wire.signature = vec![1; SIGNATURE].into();
            wire::RecordSet {
                records: vec![wire],
            }
            .encode_to_vec()
        };
        let over = store.consider(&key, &unsigned(b"one more", 5), Origin::NEAR);
        assert_eq!(over, Err(Refusal::Quota));
        let older = store.consider(&key, &unsigned(&[0], 4), Origin::NEAR);
        assert_eq!(older, Err(Refusal::Superseded(5)));
        let newer = store.consider(&key, &unsigned(&[0], 6), Origin::NEAR);
        assert_eq!(newer.unwrap().len(), 1);
        let same = read(&store).remove(0);
        let again = store.consider(&key, &encode([&same]), Origin::NEAR);
        assert_eq!(again.unwrap(), []);
    }

    #[test]
    fn the_sequence_numbers_of_our_own_statements_are_remembered_over_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.redb");
        let keys = Keypair::generate_ed25519();
        let local = keys.public().to_peer_id();
        let ahead = record::now() + 36_000_000;
        {
            let mut store = Store::new(local, Some(Disk::open(&path).unwrap()));
            let other = record(&Keypair::generate_ed25519(), b"", b"v", u64::MAX);
            put(&mut store, &[other]).unwrap();
            put(&mut store, &[record(&keys, b"", b"v", ahead)]).unwrap();
            // And one whose time is over when the store is opened again.
            let brief = Record::sign(&keys, b"b", b"", None, ahead + 1, Duration::ZERO);
            store.take(brief.unwrap(), Origin::NEAR).unwrap();
            assert_eq!(store.newest_own(), ahead + 1);
        }
        let store = Store::new(local, Some(Disk::open(&path).unwrap()));
        assert_eq!(store.newest_own(), ahead + 1);
    }

    #[test]
    fn a_clock_that_jumps_ahead_and_back_loses_nothing() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        put(&mut store, &[record(&keys, b"", b"v", 1)]).unwrap();
        let (now, later) = (Instant::now(), Instant::now() + 2 * HOUR);
        let ahead = record::now() + 36_000_000;
        store.drop_expired(0, ahead, now + 2 * LOOK);
        assert_eq!(read(&store).len(), 1);
        // Nor does one that goes back keep what nobody else takes for valid.
        store.drop_expired(0, record::now(), later);
        assert_eq!(store.usage().records, 1);
        store.drop_expired(0, ahead, later + 2 * LOOK);
        assert_eq!(store.usage().records, 0);
        check(&store);
    }

    #[test]
    fn what_is_kept_under_a_watched_key_is_told() {
        let mut store = store();
        let keys = Keypair::generate_ed25519();
        let mut watched = store.watch(&RecordKey::new(b"k")).unwrap();
        let other = Record::sign(&keys, b"other", b"", Some(b"v"), 1, HOUR).unwrap();
        put(&mut store, &[other]).unwrap();
        assert!(!watched.has_changed().unwrap());
        let one = record(&keys, b"", b"v", 1);
        put(&mut store, std::slice::from_ref(&one)).unwrap();
        assert!(watched.has_changed().unwrap());
        watched.mark_unchanged();
        put(&mut store, &[one]).unwrap();
        assert!(!watched.has_changed().unwrap());
        drop(watched);
        store.sweep();
        assert!(store.watched.is_empty());
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
        while store.usage().records > 9 {
            store.sweep();
            std::thread::sleep(Duration::from_millis(20));
        }
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
        let (old, new) = (record(&keys, b"a", b"1", 1), record(&keys, b"a", b"2", 2));
        let brief = Record::sign(&keys, b"k", b"b", Some(b"v"), 1, Duration::from_secs(2)).unwrap();
        let other = Record::sign(&keys, b"other", b"", Some(b"v"), 1, HOUR).unwrap();
        for record in [&old, &brief, &other, &new] {
            put_from(&mut store, record.key(), &encode([record]), network(7)).unwrap();
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
            gather(&mut found, b"k", &mutant);
            // What it was, or nothing.
            assert!(
                found
                    .into_records()
                    .iter()
                    .all(|found| good.contains(found))
            );
            // Refused or taken, as the mutation has it.
            let _ = put_from(&mut store, b"k", &mutant, Origin::NEAR);
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
        assert!(gather(&mut found, b"k", &encode([&new, &other])));
        assert!(gather(&mut found, b"k", &encode([&old])));
        // What is known still counts as an answer.
        let (known, unknown) = found.sort_out(b"k", &encode([&other])).unwrap();
        assert!(known && unknown.is_empty(), "and is not checked again");
        assert!(!gather(&mut found, b"k", b"\xff"));
        assert!(!gather(&mut Found::default(), b"other", &encode([&other])));
        let mut records = found.into_records();
        records.sort_by_key(Record::sequence);
        assert_eq!(records, [other, new]);
    }
}
