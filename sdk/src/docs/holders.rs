//! Being found by the documents that this node holds, and finding others that hold them: for all documents together, at a pace that does not grow with their number.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream};
use prost::Message;
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use weft_crdt::{DocumentId, Documents};
use weft_dht::{Dht, place};
use weft_net::Network;
use weft_proto::wire;

use super::peer_of;
use crate::{
    discovery::{Discovery, Round},
    whereabouts,
};

/// How long a claim to hold a document lasts without its holder. A holder that is gone is tried in vain for no longer.
const TTL: Duration = Duration::from_secs(2 * 3600);

/// How often it is said again: three times within its life, so that one lost round costs nothing.
const REFRESH: Duration = Duration::from_secs(40 * 60);

/// What nobody took is said again after the first, then after twice as long each time, up to the second.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A document that nobody connected holds is looked for at least this often for a while, as long as its holders may be just starting.
const STARTING: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(60));

/// In a mesh smaller than this, every node that comes is told: those that were there before may have kept nothing.
const SMALL: usize = 20;

/// A change is waited for this long: several often come together.
const SETTLE: Duration = Duration::from_millis(300);

/// At least this long between two claims of one document that somebody took.
const PAUSE: Duration = Duration::from_secs(5);

/// Visits that are made at once; after them one every so often, which is some hundred requests a second. Twelve thousand documents are said again in the time
/// that there is, and more than thirty thousand before their claims end.
const FIRST: u32 = 50;
const PACE: Duration = Duration::from_millis(200);

/// Visits under way.
const AT_A_TIME: usize = 8;

/// Holders of a document that a node is connected to, if there are so many.
const ENOUGH: usize = 6;

/// The first and the longest pause between two looks for holders of a document; with many documents, each adds [`PACE`] to the longest.
const SEEK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// How long taking claims back may take when the node stops, and how many are taken back at a time.
const LEAVE: Duration = Duration::from_secs(2);
const LEAVING: usize = 32;

fn key(id: &DocumentId) -> Vec<u8> {
    format!("document/{id}").into_bytes()
}

/// What is asked of [`keep_found`].
#[derive(Debug)]
pub(super) enum Wish {
    /// It is held from now on.
    Hold(DocumentId),
    /// It is held no longer.
    Drop(DocumentId),
    /// The node stops: all is taken back.
    Leave(oneshot::Sender<()>),
}

/// What is known of a document that is held.
#[derive(Debug)]
struct Known {
    place: [u8; 32],
    tell_at: Instant,
    seek_at: Instant,
    pause: Duration,
    retry: Duration,
    /// Since when it is held.
    since: Instant,
    /// Somebody has taken the claim, the last time then.
    told: Option<Instant>,
    /// A connected peer holds it as well.
    found: bool,
    /// Where it stands in the queue; `None` while it is visited.
    queued: Option<Instant>,
}

/// What came of a visit.
struct Visited {
    id: DocumentId,
    /// It was told, and how many took it.
    took: Option<usize>,
    /// It was looked for: holders reached now, and connected ones that share it.
    found: Option<(usize, usize)>,
}

struct Keeping {
    discovery: Discovery,
    documents: Documents,
    /// New holders are connected.
    changed: Arc<Notify>,
    withdrawing: Arc<Semaphore>,
    known: HashMap<DocumentId, Known>,
    /// What is due next. Neighbours in the key space follow each other where they are due at once: they are stored at the same nodes.
    queue: BTreeSet<(Instant, [u8; 32], DocumentId)>,
    /// What has never been told goes first, and of that what is held since last.
    unseen: Instant,
    /// Up to when the pace is used up.
    paced: Instant,
}

/// Tells the DHT which documents are held, and connects to others that hold them, until the network stops or nobody wishes anything any more.
pub(super) async fn keep_found(
    discovery: Discovery,
    documents: Documents,
    changed: Arc<Notify>,
    mut wishes: mpsc::UnboundedReceiver<Wish>,
) {
    let now = Instant::now();
    let mut addresses = discovery.network().watch_addresses();
    let mut meetings = discovery.dht().meetings();
    let mut nodes = discovery.dht().nodes();
    let mut keeping = Keeping {
        discovery,
        documents,
        changed,
        withdrawing: Arc::new(Semaphore::new(AT_A_TIME)),
        known: HashMap::new(),
        queue: BTreeSet::new(),
        unseen: now,
        paced: now,
    };
    let mut visits: JoinSet<Visited> = JoinSet::new();
    let mut withdrawals = JoinSet::new();
    loop {
        let alone = *nodes.borrow_and_update() == 0;
        let next = keeping
            .next()
            .filter(|_| !alone && visits.len() < AT_A_TIME);
        tokio::select! {
            changed = nodes.changed(), if alone => if changed.is_err() {
                return;
            },
            wish = wishes.recv() => match wish {
                None => return,
                Some(Wish::Hold(id)) => keeping.hold(id),
                Some(Wish::Drop(id)) => {
                    if keeping.forget(&id) {
                        withdrawals.spawn(keeping.withdraw(id));
                    }
                }
                Some(Wish::Leave(left)) => {
                    visits.shutdown().await;
                    keeping.leave().await;
                    // Who asked may wait no more.
                    let _ = left.send(());
                    return;
                }
            },
            Some(_) = withdrawals.join_next() => {}
            Some(visited) = visits.join_next() => if let Ok(visited) = visited {
                let id = visited.id;
                // Dropped meanwhile, and perhaps told after that.
                if !keeping.visited(visited) {
                    withdrawals.spawn(keeping.withdraw(id));
                }
            },
            changed = addresses.changed() => match changed {
                // A claim that leads nowhere is worse than none.
                Ok(()) => keeping.tell_again(true),
                Err(_) => return,
            },
            met = meetings.changed() => match met {
                Ok(()) => keeping.met(*nodes.borrow() < SMALL),
                Err(_) => return,
            },
            () = sleep_until(next.unwrap_or(now)), if next.is_some() => {
                if let Some(visit) = keeping.visit() {
                    visits.spawn(visit);
                }
            }
        }
    }
}

impl Keeping {
    /// When something is to be done next.
    fn next(&self) -> Option<Instant> {
        let (due, ..) = self.queue.first()?;
        let burst = PACE * FIRST;
        Some((*due).max(self.paced.checked_sub(burst).unwrap_or(*due)))
    }

    fn queue(&mut self, id: DocumentId) {
        if let Some(known) = self.known.get_mut(&id) {
            let at = known.tell_at.min(known.seek_at);
            if let Some(before) = known.queued.replace(at) {
                self.queue.remove(&(before, known.place, id));
            }
            self.queue.insert((at, known.place, id));
        }
    }

    /// As [`queue`](Self::queue), unless it is being visited, after which it is queued.
    fn requeue(&mut self, ids: Vec<DocumentId>) {
        for id in ids {
            if self
                .known
                .get(&id)
                .is_some_and(|known| known.queued.is_some())
            {
                self.queue(id);
            }
        }
    }

    fn hold(&mut self, id: DocumentId) {
        if self.known.contains_key(&id) {
            return;
        }
        let earlier = self.unseen.checked_sub(Duration::from_micros(1));
        self.unseen = earlier.unwrap_or(self.unseen);
        let known = Known {
            place: place(&key(&id)),
            tell_at: self.unseen,
            seek_at: self.unseen,
            pause: SEEK.0,
            retry: RETRY.0,
            since: Instant::now(),
            told: None,
            found: false,
            queued: None,
        };
        self.known.insert(id, known);
        self.queue(id);
    }

    /// Whether it is to be taken back now; what is being visited is when that is over.
    fn forget(&mut self, id: &DocumentId) -> bool {
        let Some(known) = self.known.remove(id) else {
            return false;
        };
        match known.queued {
            Some(at) => {
                self.queue.remove(&(at, known.place, *id));
                known.told.is_some()
            }
            None => false,
        }
    }

    fn withdraw(&self, id: DocumentId) -> impl Future<Output = ()> + use<> {
        let dht = self.discovery.dht().clone();
        let turn = Arc::clone(&self.withdrawing);
        async move {
            let _turn = turn.acquire().await;
            // Who does not hear of it forgets by itself.
            let _ = dht.withdraw(&key(&id), &[], TTL).await;
        }
    }

    /// Claims are to be said again soon; `all`: also those that were just said.
    fn tell_again(&mut self, all: bool) {
        let soon = Instant::now() + SETTLE;
        for known in self.known.values_mut() {
            let at = match known.told {
                Some(told) if !all => soon.max(told + PAUSE),
                _ => soon,
            };
            known.tell_at = known.tell_at.min(at);
        }
        self.requeue(self.known.keys().copied().collect());
    }

    /// A node was met: it may know more, and in a small mesh it is to know what we hold.
    fn met(&mut self, small: bool) {
        let soon = Instant::now() + SEEK.0;
        let mut sought = Vec::new();
        for (id, known) in &mut self.known {
            // Who looks often looks again in any case.
            if (small || !known.found) && known.pause > SEEK.0 * 8 && known.seek_at > soon {
                known.seek_at = soon;
                sought.push(*id);
            }
            if known.told.is_none() && known.tell_at > soon {
                known.tell_at = soon;
                sought.push(*id);
            }
        }
        self.requeue(sought);
        if small {
            self.tell_again(false);
        }
    }

    /// What is due first.
    fn visit(&mut self) -> Option<impl Future<Output = Visited> + use<>> {
        let now = Instant::now();
        let longest = self.longest();
        let (_, _, id) = self.queue.pop_first()?;
        let known = self.known.get_mut(&id)?;
        known.queued = None;
        let (tell, seek) = (known.tell_at <= now, known.seek_at <= now);
        // Sooner, if something happens meanwhile.
        if tell {
            known.tell_at = now + REFRESH;
        }
        if seek {
            known.seek_at = now + longest;
        }
        let again = known.told.is_some();
        self.paced = self.paced.max(now) + PACE;
        let discovery = self.discovery.clone();
        let documents = self.documents.clone();
        Some(async move {
            let (dht, network) = (discovery.dht(), discovery.network());
            let mut visited = Visited {
                id,
                took: None,
                found: None,
            };
            if tell {
                visited.took = Some(say(dht, network, &id, again).await);
            }
            if seek {
                // Only a peer that shares the document counts as a holder; to be connected and to say so is nothing.
                let sharing = documents.with(move |replica| Ok(replica.sharing(&id)));
                visited.found = Some(match sharing.await {
                    Ok(sharing) => {
                        let key = key(&id);
                        let holders = sharing.iter().filter_map(peer_of);
                        discovery.proved(&weft_dht::place(&key), holders);
                        let wanted = ENOUGH.saturating_sub(sharing.len());
                        let round = match wanted {
                            0 => Round::default(),
                            // Once the DHT has stopped nobody is found.
                            _ => discovery.find(&key, TTL, wanted).await.unwrap_or_default(),
                        };
                        (round.reached, sharing.len())
                    }
                    // Once documents have stopped nobody is looked for.
                    Err(_) => (0, ENOUGH),
                });
            }
            visited
        })
    }

    /// The longest pause between two looks for holders of one document.
    fn longest(&self) -> Duration {
        let all = u32::try_from(self.known.len()).unwrap_or(u32::MAX);
        SEEK.1.max(PACE.saturating_mul(all))
    }

    /// Whether it is still held.
    fn visited(&mut self, visited: Visited) -> bool {
        let now = Instant::now();
        let longest = self.longest();
        let Some(known) = self.known.get_mut(&visited.id) else {
            return false;
        };
        match visited.took {
            Some(0) => {
                known.tell_at = known.tell_at.min(now + known.retry);
                known.retry = (known.retry * 2).min(RETRY.1);
            }
            Some(_) => {
                known.told = Some(now);
                known.retry = RETRY.0;
            }
            None => {}
        }
        if let Some((reached, sharing)) = visited.found {
            known.found = reached + sharing > 0;
            known.pause = match (reached, sharing) {
                (0, ENOUGH..) => longest,
                (0, 0) if known.since.elapsed() < STARTING.1 => (known.pause * 2).min(STARTING.0),
                (0, _) => (known.pause * 2).min(longest),
                _ => SEEK.0,
            };
            known.seek_at = known.seek_at.min(now + known.pause);
            if reached > 0 {
                self.changed.notify_one();
            }
        }
        self.queue(visited.id);
        true
    }

    async fn leave(&mut self) {
        // A visit that was broken off may have told it.
        let is_told = |known: &Known| known.told.is_some() || known.queued.is_none();
        let told = self.known.drain().filter(|(_, known)| is_told(known));
        let dht = self.discovery.dht();
        let withdrawn = stream::iter(told)
            .map(|(id, _)| async move { dht.withdraw(&key(&id), &[], TTL).await })
            .buffer_unordered(LEAVING)
            .for_each(async |_| {});
        // Who does not hear of it forgets by itself.
        let _ = timeout(LEAVE, withdrawn).await;
    }
}

/// States that this node holds a document; how many took it.
async fn say(dht: &Dht, network: &Network, id: &DocumentId, again: bool) -> usize {
    let addresses = whereabouts::encode(&network.addresses().for_strangers);
    let value = wire::PeerClaim { addresses }.encode_to_vec();
    let said = match again {
        true => dht.publish_again(&key(id), &[], &value, TTL).await,
        false => dht.publish(&key(id), &[], &value, TTL).await,
    };
    said.inspect_err(|error| tracing::debug!(document = %id, %error, "not announced"))
        .unwrap_or(0)
}
