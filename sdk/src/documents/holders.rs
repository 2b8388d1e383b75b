//! The holders of the documents that this node holds. The node advertises itself as a holder and searches for others.
//! All documents share one queue, so the pace of searches does not grow with their number.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use prost::Message;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tracing::Instrument;
use weft_crdt::{DocumentId, Documents};
use weft_dht::key_position;
use weft_proto::wire;

use super::peer_of;
use crate::discovery::{
    advertise::{AtStop, Pace, Rank, RecordId, SMALL_MESH, Terms, Value},
    find::{Discovery, Round},
};

/// Terms of the record of a document's holder. Peers try a holder that has crashed for two hours at most.
pub(super) const HOLDER_TERMS: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Content,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

/// Longest pause between searches for a document that no connected peer holds, and the time for which this limit
/// applies: the holders may be just starting.
const STARTING_PAUSE: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(60));

/// The most searches under way.
const MAX_SEARCHES: usize = 8;

/// Number of holders of a document that a node connects to, if there are as many.
const WANTED_HOLDERS: usize = 6;

/// The first and the longest pause between two searches for holders of a document. With many documents, the longest
/// pause is the time of one round of searches.
const SEARCH_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

fn key(id: &DocumentId) -> Vec<u8> {
    format!("document/{id}").into_bytes()
}

/// Returns the id of the record that advertises this node as a holder of a document.
pub(super) fn record(id: &DocumentId) -> RecordId {
    RecordId::of(key(id))
}

/// Returns the value of that record.
pub(super) fn value() -> Value {
    Value::of(|addresses| wire::PeerClaim { addresses }.encode_to_vec())
}

/// A request to [`find_holders`].
#[derive(Debug)]
pub(super) enum SearchRequest {
    /// Finds holders of a document from now on.
    Find(DocumentId),
    /// Stops finding holders of a document.
    Forget(DocumentId),
}

/// The state of the search for a document's holders.
#[derive(Debug)]
struct Known {
    key_position: [u8; 32],
    seek_at: Instant,
    pause: Duration,
    /// Time since which the document is held.
    since: Instant,
    /// True if a connected peer holds the document.
    found: bool,
    /// Time of its entry in the queue. `None` while a search is under way.
    queued: Option<Instant>,
}

/// The result of a search: the number of holders reached now, and of connected peers that share the document.
struct Sought {
    id: DocumentId,
    reached: usize,
    sharing: usize,
}

struct Finding {
    discovery: Discovery,
    documents: Documents,
    /// Notified when new holders are connected.
    changed: Arc<Notify>,
    known: HashMap<DocumentId, Known>,
    /// The searches, by the time at which they are due. Of those due at the same time, neighbours in the key space
    /// follow each other.
    queue: BTreeSet<(Instant, [u8; 32], DocumentId)>,
    /// Due time of the next new document. It decreases, so that new documents are searched first, the latest before
    /// the others.
    unseen: Instant,
    pace: Pace,
}

/// Connects to holders of the documents that this node holds, until the network stops or the sender of requests is
/// dropped.
pub(super) async fn find_holders(
    discovery: Discovery,
    documents: Documents,
    changed: Arc<Notify>,
    mut requests: mpsc::UnboundedReceiver<SearchRequest>,
) {
    let now = Instant::now();
    let mut nodes_met = discovery.dht().nodes_met();
    let mut nodes = discovery.dht().nodes();
    let mut finding = Finding {
        discovery,
        documents,
        changed,
        known: HashMap::new(),
        queue: BTreeSet::new(),
        unseen: now,
        pace: Pace::new(now),
    };
    let mut searches: JoinSet<Sought> = JoinSet::new();
    loop {
        let alone = *nodes.borrow_and_update() == 0;
        let next = finding
            .next()
            .filter(|_| !alone && searches.len() < MAX_SEARCHES);
        tokio::select! {
            changed = nodes.changed(), if alone => if changed.is_err() {
                return;
            },
            request = requests.recv() => match request {
                None => return,
                Some(SearchRequest::Find(id)) => finding.find(id),
                Some(SearchRequest::Forget(id)) => finding.forget(&id),
            },
            Some(sought) = searches.join_next() => if let Ok(sought) = sought {
                finding.sought(&sought);
            },
            met = nodes_met.changed() => match met {
                Ok(()) => finding.met(*nodes.borrow() < SMALL_MESH),
                Err(_) => return,
            },
            () = sleep_until(next.unwrap_or(now)), if next.is_some() => {
                if let Some(search) = finding.seek() {
                    searches.spawn(search);
                }
            }
        }
    }
}

impl Finding {
    /// Returns the time of the next search.
    fn next(&self) -> Option<Instant> {
        let (due, ..) = self.queue.first()?;
        Some(self.pace.next(*due))
    }

    /// Puts a document at its position in the queue.
    fn queue(&mut self, id: DocumentId) {
        if let Some(known) = self.known.get_mut(&id) {
            let at = known.seek_at;
            if let Some(before) = known.queued.replace(at) {
                self.queue.remove(&(before, known.key_position, id));
            }
            self.queue.insert((at, known.key_position, id));
        }
    }

    fn find(&mut self, id: DocumentId) {
        if self.known.contains_key(&id) {
            return;
        }
        let earlier = self.unseen.checked_sub(Duration::from_micros(1));
        self.unseen = earlier.unwrap_or(self.unseen);
        let known = Known {
            key_position: key_position(&key(&id)),
            seek_at: self.unseen,
            pause: SEARCH_PAUSE.0,
            since: Instant::now(),
            found: false,
            queued: None,
        };
        self.known.insert(id, known);
        self.queue(id);
    }

    fn forget(&mut self, id: &DocumentId) {
        if let Some(known) = self.known.remove(id)
            && let Some(at) = known.queued
        {
            self.queue.remove(&(at, known.key_position, *id));
        }
    }

    /// Brings searches forward after a node was met, because it may know more holders.
    fn met(&mut self, small: bool) {
        let soon = Instant::now() + SEARCH_PAUSE.0;
        let mut sooner = Vec::new();
        for (id, known) in &mut self.known {
            // Documents that are searched often are searched again soon in any case.
            if (small || !known.found) && known.pause > SEARCH_PAUSE.0 * 8 && known.seek_at > soon {
                known.seek_at = soon;
                // A document whose search is under way is queued when the search ends.
                if known.queued.is_some() {
                    sooner.push(*id);
                }
            }
        }
        for id in sooner {
            self.queue(id);
        }
    }

    /// Starts the search that is due first.
    fn seek(&mut self) -> Option<impl Future<Output = Sought> + use<>> {
        let now = Instant::now();
        let longest = self.longest();
        let (_, _, id) = self.queue.pop_first()?;
        let known = self.known.get_mut(&id)?;
        known.queued = None;
        // May be brought forward meanwhile.
        known.seek_at = now + longest;
        self.pace.take(now);
        let discovery = self.discovery.clone();
        let documents = self.documents.clone();
        let span = tracing::info_span!("documents", document = %id);
        let search = async move {
            // Only a peer that shares the document counts as a holder; a connection and a claim prove nothing.
            let sharing = documents.with(move |replica| Ok(replica.sharing(&id)));
            let Ok(sharing) = sharing.await else {
                // Documents have stopped: end the search.
                return Sought {
                    id,
                    reached: 0,
                    sharing: WANTED_HOLDERS,
                };
            };
            let key = key(&id);
            discovery.proved(&key_position(&key), sharing.iter().filter_map(peer_of));
            let wanted = WANTED_HOLDERS.saturating_sub(sharing.len());
            let round = match wanted {
                0 => Round::default(),
                // Once the DHT has stopped, nothing is found.
                _ => discovery
                    .find(&key, HOLDER_TERMS.ttl, wanted)
                    .await
                    .unwrap_or_default(),
            };
            Sought {
                id,
                reached: round.reached,
                sharing: sharing.len(),
            }
        };
        Some(search.instrument(span))
    }

    /// Returns the longest pause between two searches for one document.
    fn longest(&self) -> Duration {
        SEARCH_PAUSE.1.max(Pace::round_of(self.known.len()))
    }

    fn sought(&mut self, sought: &Sought) {
        let now = Instant::now();
        let longest = self.longest();
        let Some(known) = self.known.get_mut(&sought.id) else {
            return;
        };
        known.found = sought.reached + sought.sharing > 0;
        known.pause = match (sought.reached, sought.sharing) {
            (0, WANTED_HOLDERS..) => longest,
            (0, 0) if known.since.elapsed() < STARTING_PAUSE.1 => {
                (known.pause * 2).min(STARTING_PAUSE.0)
            }
            (0, _) => (known.pause * 2).min(longest),
            _ => SEARCH_PAUSE.0,
        };
        known.seek_at = known.seek_at.min(now + known.pause);
        if sought.reached > 0 {
            self.changed.notify_one();
        }
        self.queue(sought.id);
    }
}
