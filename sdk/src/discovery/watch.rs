//! Watching a key of the DHT: what anybody states under it, and how that changes.

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

/// The interval at which the key is looked up at other nodes. Changes of the records that this node keeps itself are
/// seen at once; in a mesh of less than some twenty nodes it keeps every record.
const WATCH: Duration = Duration::from_secs(5);

/// After this long, a node that was just met has stated what it states.
const TOLD: Duration = Duration::from_secs(2);

/// At least this long between two looks at what this node keeps: a publisher that floods the key does not have it read
/// more often. Of several values within this time the last is told.
const LOOK: Duration = Duration::from_millis(50);

/// Statements that are remembered, and their bytes. One look-up may bring four times as many, and a publisher may
/// replace its own each second by others, each of which would be remembered until its end.
const MAX_KNOWN: usize = 1024;
const MAX_BYTES: usize = 4 << 20;

/// Memory that a statement takes beside its subkey and value.
const OVERHEAD: usize = 128;

/// A statement that this many look-ups in a row have not shown has ended: one may miss it, as it asks only some of the
/// nodes that have it.
const MISSES: u32 = 3;

/// What has changed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    /// Stated for the first time, or there when the watch began.
    Joined(Record),
    /// Stated anew, with another value.
    Changed(Record),
    /// Taken back, or its time is over.
    Left { publisher: PeerId, subkey: Vec<u8> },
}

/// The remembered state of a statement.
#[derive(Debug)]
struct Known {
    sequence: u64,
    /// `None`: taken back.
    value: Option<Vec<u8>>,
    until: Instant,
    /// Look-ups in a row that have not shown it.
    misses: u32,
    /// Rises with each statement that is remembered.
    number: u64,
    bytes: usize,
}

/// A publisher's part of what is remembered.
#[derive(Debug, Default)]
struct Share {
    bytes: usize,
    /// Numbers and subkeys.
    statements: Vec<(u64, Vec<u8>)>,
}

/// Looks a key up again and again. Keeps no node from stopping.
#[derive(Debug)]
pub(crate) struct Watcher {
    dht: Dht,
    key: Vec<u8>,
    known: BTreeMap<(PeerId, Vec<u8>), Known>,
    /// Bytes of these.
    bytes: usize,
    number: u64,
    /// Found and not told.
    changes: VecDeque<Change>,
    meetings: watch::Receiver<u64>,
    next: Instant,
    /// Tells when what this node keeps under the key changes. `None` if it is not asked for yet, or cannot be told.
    kept: Option<watch::Receiver<()>>,
    asked: bool,
    /// The records that this node keeps have changed, and are to be read.
    changed: bool,
    /// Not before then.
    look: Instant,
}

impl Watcher {
    pub(crate) fn new(dht: Dht, key: Vec<u8>) -> Self {
        Self {
            meetings: dht.meetings(),
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

    /// The next change; `None` once the node has stopped. May be dropped and called again.
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
                (self.changed, self.look) = (false, Instant::now() + LOOK);
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
                met = self.meetings.changed(), if small => {
                    met.ok()?;
                    // It has to be told first.
                    self.next = self.next.min(Instant::now() + TOLD);
                    continue;
                }
            }
            let records = self.dht.get_with_removed(&self.key).await.ok()?;
            let now = Instant::now();
            // A look-up that nobody has answered misses everything. So does one for a key of which nothing is left;
            // then the statements end in their own time.
            let answered = !records.is_empty() && *self.dht.nodes().borrow() > 0;
            self.changes = self.learn(records, answered, now).into();
            let next = now + WATCH;
            self.next = self.soonest_end().map_or(next, |soonest| soonest.min(next));
        }
    }

    /// When the first of the statements ends.
    fn soonest_end(&self) -> Option<Instant> {
        let ends = self.known.values().filter(|known| known.value.is_some());
        ends.map(|known| known.until).min()
    }

    /// Takes in what a look-up has found. `complete`: what it does not show may have ended.
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
            let holds = known.until > now && known.misses < MISSES;
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

    /// Forgets what is too much: the oldest statement of the publisher whose statements take the most room, and so on.
    fn make_room(&mut self, changes: &mut Vec<Change>) {
        if self.known.len() <= MAX_KNOWN && self.bytes <= MAX_BYTES {
            return;
        }
        let mut shares: BTreeMap<PeerId, Share> = BTreeMap::new();
        for ((publisher, subkey), known) in &self.known {
            let share = shares.entry(*publisher).or_default();
            share.bytes += known.bytes;
            share.statements.push((known.number, subkey.clone()));
        }
        for Share { statements, .. } in shares.values_mut() {
            statements.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
        }
        while self.known.len() > MAX_KNOWN || self.bytes > MAX_BYTES {
            // Of equal shares, that with the oldest statement.
            let most = shares
                .iter_mut()
                .max_by_key(|(_, Share { bytes, statements })| {
                    let oldest = statements.last().map(|(number, _)| *number);
                    (*bytes, std::cmp::Reverse(oldest))
                });
            let Some((publisher, Share { bytes, statements })) = most else {
                return;
            };
            let Some((_, subkey)) = statements.pop() else {
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
            bytes: OVERHEAD + id.1.len() + value.as_ref().map_or(0, Vec::len),
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

/// Comes when what this node keeps has changed; never if that is not told.
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
    async fn a_watch_tells_what_has_changed_and_nothing_twice() {
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
        // Said again for longer, a look-up that misses it, another value.
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
        // Its time is over.
        assert_eq!(watch.learn(Vec::new(), false, now + 2 * hour), [left]);
        assert!(watch.known.is_empty());
    }

    #[tokio::test]
    async fn what_a_watch_remembers_is_bounded_and_the_greediest_publisher_pays() {
        let (dht, _behaviour) = Dht::new(&Keypair::generate_ed25519());
        let mut watch = Watcher::new(dht, Vec::new());
        let (honest, greedy) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let hour = Duration::from_secs(3600);
        let now = Instant::now();
        let state = |keys: &Keypair, n: u32, size: usize| {
            let value = vec![7; size];
            Record::sign(keys, b"record/k", &n.to_be_bytes(), Some(&value), 1, hour).unwrap()
        };
        let joined = watch.learn(vec![state(&honest, 0, 10)], false, now);
        assert_eq!(joined.len(), 1);
        let (mut joined, mut gone) = (1, 0);
        for round in 0..8 {
            let many = (0..512)
                .map(|n| state(&greedy, 512 * round + n, 1000))
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
        // Every watcher has been told of each statement that went.
        assert_eq!(joined - gone, watch.known.len());
        let large = (0..5000).map(|n| state(&greedy, 9000 + n, 1000)).collect();
        watch.learn(large, false, now);
        assert!(watch.known.len() <= MAX_KNOWN && watch.bytes <= MAX_BYTES);
    }

    #[tokio::test]
    async fn what_three_look_ups_in_a_row_do_not_show_has_ended() {
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
