//! Watching a key of the DHT for changes of its records.

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use weft_dht::{Dht, Record};
use weft_net::PeerId;

use crate::discovery::advertise::SMALL_MESH;

/// Interval at which the key is looked up on other nodes. Changes of records that this node stores itself are seen at
/// once; in a mesh of fewer than about twenty nodes it stores every record.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(5);

/// Time after which a node that was just met has published its records to this node.
const PUBLISH_DELAY: Duration = Duration::from_secs(2);

/// The shortest time between two reads of this node's own store, so that a publisher that floods the key does not
/// cause more reads. Of several values within this time, only the last is reported.
const READ_INTERVAL: Duration = Duration::from_millis(50);

/// The most records that are remembered, and their most bytes. One lookup may return four times as many. A publisher
/// may also replace its records each second by others, and each would be remembered until it expires.
const MAX_KNOWN: usize = 1024;
const MAX_BYTES: usize = 4 << 20;

/// Memory that a record takes in addition to its subkey and value, in bytes.
const RECORD_OVERHEAD: usize = 128;

/// Number of lookups in a row after which a record that they have not returned counts as gone. One lookup may miss
/// it, because it asks only some of the nodes that have it.
const MAX_MISSES: u32 = 3;

/// A change of the records under the key.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    /// A record is new, or was there when the watch began.
    Joined(Record),
    /// The value of a record was replaced.
    Changed(Record),
    /// A record was withdrawn or has expired.
    Left { publisher: PeerId, subkey: Vec<u8> },
}

/// The remembered state of a record.
#[derive(Debug)]
struct Known {
    sequence: u64,
    /// The value; `None` if the record was withdrawn.
    value: Option<Vec<u8>>,
    until: Instant,
    /// Number of lookups in a row that have not returned the record.
    misses: u32,
    /// Rises with each remembered record.
    number: u64,
    bytes: usize,
}

/// The remembered records of one publisher.
#[derive(Debug, Default)]
struct Share {
    bytes: usize,
    /// Numbers and subkeys of the records.
    records: Vec<(u64, Vec<u8>)>,
}

/// Looks up a key again and again. A watcher does not keep its node running.
#[derive(Debug)]
pub(crate) struct Watcher {
    dht: Dht,
    key: Vec<u8>,
    known: BTreeMap<(PeerId, Vec<u8>), Known>,
    /// Bytes of the remembered records.
    bytes: usize,
    number: u64,
    /// Changes that were found and not yet returned.
    changes: VecDeque<Change>,
    nodes_met: watch::Receiver<u64>,
    next: Instant,
    /// Notified when this node's own records under the key change. `None` if it was not requested yet, or is not
    /// available.
    kept: Option<watch::Receiver<()>>,
    asked: bool,
    /// True if this node's own records have changed and are to be read.
    changed: bool,
    /// The earliest time to read them.
    look: Instant,
}

impl Watcher {
    pub(crate) fn new(dht: Dht, key: Vec<u8>) -> Self {
        Self {
            nodes_met: dht.nodes_met(),
            dht,
            key,
            known: BTreeMap::new(),
            bytes: 0,
            number: 0,
            changes: VecDeque::new(),
            next: Instant::now(),
            kept: None,
            asked: false,
            changed: false,
            look: Instant::now(),
        }
    }

    /// Waits for the next change. Returns `None` once the node has stopped. Cancel safe: if the future is dropped, no
    /// change is lost.
    pub(crate) async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Some(change);
            }
            if !self.asked {
                self.kept = self.dht.changes(&self.key).await.ok()?;
                self.asked = true;
            }
            if self.changed {
                sleep_until(self.look.min(self.next)).await;
            }
            if self.changed && Instant::now() < self.next {
                let records = self.dht.kept(&self.key).await.ok()?;
                (self.changed, self.look) = (false, Instant::now() + READ_INTERVAL);
                self.changes = self.learn(records, false, Instant::now()).into();
                self.next = self.next.min(self.soonest_end().unwrap_or(self.next));
                continue;
            }
            let small = *self.dht.nodes().borrow() < SMALL_MESH;
            tokio::select! {
                () = sleep_until(self.next) => {}
                () = changed(&mut self.kept) => {
                    self.changed = true;
                    continue;
                }
                met = self.nodes_met.changed(), if small => {
                    met.ok()?;
                    // The new node first needs time to publish its records.
                    self.next = self.next.min(Instant::now() + PUBLISH_DELAY);
                    continue;
                }
            }
            let records = self.dht.get_with_withdrawn(&self.key).await.ok()?;
            let now = Instant::now();
            // A lookup that no node has answered misses everything. So does a lookup for a key under which nothing is
            // left; the records then expire by themselves.
            let answered = !records.is_empty() && *self.dht.nodes().borrow() > 0;
            self.changes = self.learn(records, answered, now).into();
            let next = now + LOOKUP_INTERVAL;
            self.next = self.soonest_end().map_or(next, |soonest| soonest.min(next));
        }
    }

    /// Returns the time at which the next record expires.
    fn soonest_end(&self) -> Option<Instant> {
        let ends = self.known.values().filter(|known| known.value.is_some());
        ends.map(|known| known.until).min()
    }

    /// Learns the records of a lookup. If `complete` is true, records that are missing may be gone.
    fn learn(&mut self, records: Vec<Record>, complete: bool, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        if complete {
            for known in self.known.values_mut() {
                known.misses += 1;
            }
        }
        for record in records {
            self.learn_one(record, now, &mut changes);
        }
        let mut bytes = 0;
        self.known.retain(|id, known| {
            let holds = known.until > now && known.misses < MAX_MISSES;
            if holds {
                bytes += known.bytes;
            } else if known.value.is_some() {
                changes.push(left(id));
            }
            holds
        });
        self.bytes = bytes;
        self.make_room(&mut changes);
        changes
    }

    /// Forgets records above the limits: the oldest record of the publisher whose records take the most room, and so
    /// on.
    fn make_room(&mut self, changes: &mut Vec<Change>) {
        if self.known.len() <= MAX_KNOWN && self.bytes <= MAX_BYTES {
            return;
        }
        let mut shares: BTreeMap<PeerId, Share> = BTreeMap::new();
        for ((publisher, subkey), known) in &self.known {
            let share = shares.entry(*publisher).or_default();
            share.bytes += known.bytes;
            share.records.push((known.number, subkey.clone()));
        }
        for Share { records, .. } in shares.values_mut() {
            records.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        }
        while self.known.len() > MAX_KNOWN || self.bytes > MAX_BYTES {
            // Of equal shares, the one with the oldest record.
            let most = shares
                .iter_mut()
                .max_by_key(|(_, Share { bytes, records })| {
                    let oldest = records.last().map(|(number, _)| *number);
                    (*bytes, std::cmp::Reverse(oldest))
                });
            let Some((publisher, Share { bytes, records })) = most else {
                return;
            };
            let Some((_, subkey)) = records.pop() else {
                return;
            };
            let id = (*publisher, subkey);
            if let Some(known) = self.known.remove(&id) {
                *bytes -= known.bytes;
                self.bytes -= known.bytes;
                if known.value.is_some() {
                    changes.push(left(&id));
                }
            }
        }
    }

    fn learn_one(&mut self, record: Record, now: Instant, changes: &mut Vec<Change>) {
        let id = (record.publisher(), record.subkey().to_vec());
        let value = record.value().map(<[u8]>::to_vec);
        self.number += 1;
        let new = Known {
            sequence: record.sequence(),
            bytes: RECORD_OVERHEAD + id.1.len() + value.as_ref().map_or(0, Vec::len),
            until: now + record.remaining(),
            value,
            misses: 0,
            number: self.number,
        };
        match self.known.entry(id) {
            Entry::Vacant(entry) => {
                if new.value.is_some() {
                    changes.push(Change::Joined(record));
                }
                entry.insert(new);
            }
            Entry::Occupied(mut entry) => {
                let old = entry.get_mut();
                old.misses = 0;
                if old.sequence >= new.sequence {
                    return;
                }
                match (&old.value, &new.value) {
                    (None, Some(_)) => changes.push(Change::Joined(record)),
                    (Some(old), Some(new)) if old != new => {
                        changes.push(Change::Changed(record));
                    }
                    (Some(_), None) => changes.push(left(entry.key())),
                    _ => {}
                }
                let number = entry.get().number;
                entry.insert(Known { number, ..new });
            }
        }
    }
}

/// Waits until this node's own records have changed; waits forever if that is not reported.
async fn changed(kept: &mut Option<watch::Receiver<()>>) {
    if let Some(told) = kept
        && told.changed().await.is_ok()
    {
        return;
    }
    *kept = None;
    std::future::pending().await
}

fn left((publisher, subkey): &(PeerId, Vec<u8>)) -> Change {
    Change::Left {
        publisher: *publisher,
        subkey: subkey.clone(),
    }
}

#[cfg(test)]
mod tests {
    use weft_net::identity::Keypair;

    use super::*;

    #[tokio::test]
    async fn a_watch_reports_each_change_once() {
        let (dht, _behaviour) = Dht::new(&Keypair::generate_ed25519());
        let mut watch = Watcher::new(dht, Vec::new());
        let keys = Keypair::generate_ed25519();
        let hour = Duration::from_secs(3600);
        let record = |value: Option<&[u8]>, sequence, ttl| {
            Record::sign(&keys, b"record/k", b"s", value, sequence, ttl).unwrap()
        };
        let left = Change::Left {
            publisher: keys.public().to_peer_id(),
            subkey: b"s".to_vec(),
        };
        let now = Instant::now();
        let first = record(Some(b"1"), 1, hour);
        let joined = watch.learn(vec![first.clone()], false, now);
        assert_eq!(joined, [Change::Joined(first.clone())]);
        assert_eq!(watch.learn(vec![first.clone()], false, now), []);
        // The same value for longer, a lookup that misses the record, and another value.
        assert_eq!(
            watch.learn(vec![record(Some(b"1"), 2, hour)], false, now),
            []
        );
        assert_eq!(watch.learn(Vec::new(), false, now), []);
        let second = record(Some(b"2"), 3, hour);
        let changed = watch.learn(vec![second.clone()], false, now);
        assert_eq!(changed, [Change::Changed(second)]);
        let gone = watch.learn(vec![record(None, 4, hour)], false, now);
        assert_eq!(gone, std::slice::from_ref(&left));
        assert_eq!(watch.learn(vec![first], false, now), []);
        let again = record(Some(b"3"), 5, hour);
        let joined = watch.learn(vec![again.clone()], false, now);
        assert_eq!(joined, [Change::Joined(again)]);
        // The record has expired.
        assert_eq!(watch.learn(Vec::new(), false, now + 2 * hour), [left]);
        assert!(watch.known.is_empty());
    }

    #[tokio::test]
    async fn remembered_records_are_bounded_and_the_greediest_publisher_loses_its_own() {
        let (dht, _behaviour) = Dht::new(&Keypair::generate_ed25519());
        let mut watch = Watcher::new(dht, Vec::new());
        let (honest, greedy) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let hour = Duration::from_secs(3600);
        let now = Instant::now();
        let record = |keys: &Keypair, n: u32, size: usize| {
            let value = vec![7; size];
            Record::sign(keys, b"record/k", &n.to_be_bytes(), Some(&value), 1, hour).unwrap()
        };
        let joined = watch.learn(vec![record(&honest, 0, 10)], false, now);
        assert_eq!(joined.len(), 1);
        let (mut joined, mut gone) = (1, 0);
        for round in 0..8 {
            let many = (0..512)
                .map(|n| record(&greedy, 512 * round + n, 1000))
                .collect();
            for change in watch.learn(many, false, now) {
                match change {
                    Change::Joined(_) => joined += 1,
                    Change::Left { publisher, .. } => {
                        assert_eq!(publisher, greedy.public().to_peer_id());
                        gone += 1;
                    }
                    Change::Changed(_) => panic!("{change:?}"),
                }
            }
            assert!(watch.known.len() <= MAX_KNOWN && watch.bytes <= MAX_BYTES);
        }
        // Every record that was forgotten was reported.
        assert_eq!(joined - gone, watch.known.len());
        let large = (0..5000).map(|n| record(&greedy, 9000 + n, 1000)).collect();
        watch.learn(large, false, now);
        assert!(watch.known.len() <= MAX_KNOWN && watch.bytes <= MAX_BYTES);
    }

    #[tokio::test]
    async fn a_record_that_three_lookups_in_a_row_do_not_return_is_gone() {
        let (dht, _behaviour) = Dht::new(&Keypair::generate_ed25519());
        let mut watch = Watcher::new(dht, Vec::new());
        let keys = Keypair::generate_ed25519();
        let (hour, now) = (Duration::from_secs(3600), Instant::now());
        let record = Record::sign(&keys, b"record/k", b"s", Some(b"1"), 1, hour).unwrap();
        watch.learn(vec![record.clone()], true, now);
        assert_eq!(watch.learn(Vec::new(), true, now), []);
        assert_eq!(watch.learn(Vec::new(), true, now), []);
        assert_eq!(watch.learn(vec![record], true, now), []);
        assert_eq!(watch.learn(Vec::new(), true, now), []);
        assert_eq!(watch.learn(Vec::new(), true, now), []);
        let left = watch.learn(Vec::new(), true, now);
        assert!(matches!(&left[..], [Change::Left { .. }]), "{left:?}");
        assert!(watch.known.is_empty());
    }
}
