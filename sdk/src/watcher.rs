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

use crate::records::{ROUND, SMALL};

/// How often the key is looked up.
const WATCH: Duration = Duration::from_secs(5);

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

/// The number of a statement, its value, and when it ends.
type Known = (u64, Option<Vec<u8>>, Instant);

/// Looks a key up again and again. Keeps no node from stopping.
#[derive(Debug)]
pub(crate) struct Watcher {
    dht: Dht,
    key: Vec<u8>,
    known: BTreeMap<(PeerId, Vec<u8>), Known>,
    /// Found and not told.
    changes: VecDeque<Change>,
    meetings: watch::Receiver<u64>,
    next: Instant,
}

impl Watcher {
    pub(crate) fn new(dht: Dht, key: Vec<u8>) -> Self {
        Self {
            meetings: dht.meetings(),
            dht,
            key,
            known: BTreeMap::new(),
            changes: VecDeque::new(),
            next: Instant::now(),
        }
    }

    /// The next change; `None` once the node has stopped. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Option<Change> {
        loop {
            if let Some(change) = self.changes.pop_front() {
                return Some(change);
            }
            let small = *self.dht.nodes().borrow() < SMALL;
            tokio::select! {
                () = sleep_until(self.next) => {}
                met = self.meetings.changed(), if small => {
                    met.ok()?;
                    // It has to be told first.
                    self.next = self.next.min(Instant::now() + ROUND);
                    continue;
                }
            }
            let records = self.dht.get_with_removed(&self.key).await.ok()?;
            let now = Instant::now();
            self.changes = self.learn(records, now).into();
            let ends = self.known.values().filter(|(_, value, _)| value.is_some());
            let soonest = ends.map(|(_, _, until)| *until).min();
            self.next = soonest.map_or(now + WATCH, |soonest| soonest.min(now + WATCH));
        }
    }

    fn learn(&mut self, records: Vec<Record>, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        for record in records {
            let id = (record.publisher(), record.subkey().to_vec());
            let value = record.value().map(<[u8]>::to_vec);
            let new = (record.sequence(), value, now + record.remaining());
            match self.known.entry(id) {
                Entry::Vacant(entry) => {
                    if new.1.is_some() {
                        changes.push(Change::Joined(record));
                    }
                    entry.insert(new);
                }
                Entry::Occupied(mut entry) => {
                    let (sequence, value, _) = entry.get();
                    if *sequence >= new.0 {
                        continue;
                    }
                    match (value, &new.1) {
                        (None, Some(_)) => changes.push(Change::Joined(record)),
                        (Some(old), Some(new)) if old != new => {
                            changes.push(Change::Changed(record));
                        }
                        (Some(_), None) => {
                            let (publisher, subkey) = entry.key().clone();
                            changes.push(Change::Left { publisher, subkey });
                        }
                        _ => {}
                    }
                    entry.insert(new);
                }
            }
        }
        self.known.retain(|(publisher, subkey), (_, value, until)| {
            let holds = *until > now;
            if !holds && value.is_some() {
                let (publisher, subkey) = (*publisher, subkey.clone());
                changes.push(Change::Left { publisher, subkey });
            }
            holds
        });
        changes
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
        let joined = watch.learn(vec![first.clone()], now);
        assert_eq!(joined, [Change::Joined(first.clone())]);
        assert_eq!(watch.learn(vec![first.clone()], now), []);
        // Said again for longer, a look-up that misses it, another value.
        assert_eq!(watch.learn(vec![record(Some(b"1"), 2, hour)], now), []);
        assert_eq!(watch.learn(Vec::new(), now), []);
        let second = record(Some(b"2"), 3, hour);
        let changed = watch.learn(vec![second.clone()], now);
        assert_eq!(changed, [Change::Changed(second)]);
        let gone = watch.learn(vec![record(None, 4, hour)], now);
        assert_eq!(gone, std::slice::from_ref(&left));
        assert_eq!(watch.learn(vec![first], now), []);
        let again = record(Some(b"3"), 5, hour);
        let joined = watch.learn(vec![again.clone()], now);
        assert_eq!(joined, [Change::Joined(again)]);
        // Its time is over.
        assert_eq!(watch.learn(Vec::new(), now + 2 * hour), [left]);
        assert!(watch.known.is_empty());
    }
}
