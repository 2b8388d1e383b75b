//! Services by name: announcing them, and calling whoever offers one.
//!
//! Who offers a service says so in the DHT, with labels, for as long as it does. A [`Service`] knows who does, and sends each call where it expects it to be
//! answered soonest: to near peers and over direct paths, and not to where many of its calls are open already. A peer that fails is left alone for a while that
//! grows as it goes on failing, and what it had not begun is asked of another.
//!
//! The node remembers who offers a service, so that the short-lived handles of commands and API clients share it. While
//! a service is used, its providers are watched: one that dies is found out without a call, and costs one failed
//! attempt at most.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use weft_dht::{Dht, Record};
use weft_net::{Class, Heard, Multiaddr, Network, PATH_TIMEOUT, Path, PathKind, PeerId, Place};
use weft_proto::{
    rpc::{
        Caller, Code, Message, Method, Options, Receiver, Seen, Sender, Session, Status as Ended,
    },
    wire,
};

use super::{
    may_repeat,
    retries::{ATTEMPTS, Pauses, Retries},
};
use crate::{
    Node,
    discovery::{
        addresses,
        advertise::{Presence, RecordId, Terms, Value},
        watch::{Change, Watcher},
    },
};

/// Bytes of a service's name.
pub const MAX_NAME: usize = 256;

/// Labels of one announcement, and bytes of a label's name and of its value.
pub const MAX_LABELS: usize = 16;
const MAX_LABEL: usize = 64;
const MAX_LABEL_VALUE: usize = 256;

/// Peers that are remembered of one service.
const MAX_OFFERS: usize = 256;

/// How old what is known of who offers a service may be before it is looked up again, beside the calls.
const FRESH: Duration = Duration::from_secs(15);

/// Time between two looks for other providers while all that are known have failed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How old what is known of the paths to them may be.
const FRESH_PATHS: Duration = Duration::from_secs(2);

/// Peers that are connected to before they are called, so that the nearest of them is known.
const NEAR: usize = 8;

/// Time to reach a peer before another one is tried: a dial over a long path takes less. It doubles, in case there is
/// no other; the dial goes on meanwhile.
const REACH: Duration = Duration::from_secs(1);

/// Interval at which connected providers have to show that they are there, time for which they do so after the last
/// call, and number of providers watched.
const WATCH: Duration = Duration::from_secs(2);
const WATCH_FOR: Duration = Duration::from_secs(60);
const WATCHED: usize = 16;

/// The least and the most that a watched provider may take to answer; between them, a multiple of its round trip.
const ALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));
const ALIVE_TRIPS: u32 = 8;

/// Time for which a service that nothing uses is remembered, and number of services remembered.
const REMEMBER: Duration = Duration::from_secs(600);
const MAX_SERVICES: usize = 256;

/// Longest time for which an offer is believed, whatever its publisher states: the protocol's ten minutes, and some for
/// clocks.
const BELIEVED: Duration = Duration::from_secs(11 * 60);

/// The first and the longest time for which a peer that failed is left alone.
const AVOID: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(120));

/// A round trip that has not been measured counts as this one, to a peer that is connected and to one that is not.
const UNKNOWN: Duration = Duration::from_millis(5);
const FAR: Duration = Duration::from_millis(50);

/// Round trips under this one are all the same.
const NEXT_DOOR: Duration = Duration::from_millis(2);

/// What tells a service's offer from others of the same name: a model, its layers, the load.
pub type Labels = BTreeMap<String, String>;

/// A service that cannot be announced or looked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Its name is empty or too long.
    #[error("a service's name has 1 to {MAX_NAME} bytes, and this has {0}")]
    Name(usize),
    /// There are too many labels.
    #[error("a service has at most {MAX_LABELS} labels, and these are {0}")]
    TooManyLabels(usize),
    /// A label is too long, or has no name.
    #[error(
        "a label's name has 1 to {MAX_LABEL} bytes and its value at most {MAX_LABEL_VALUE}, and {0:?} is another"
    )]
    Label(String),
}

fn check(name: &str) -> Result<(), ServiceError> {
    match name.len() {
        1..=MAX_NAME => Ok(()),
        length => Err(ServiceError::Name(length)),
    }
}

fn check_labels(labels: &Labels) -> Result<(), ServiceError> {
    if labels.len() > MAX_LABELS {
        return Err(ServiceError::TooManyLabels(labels.len()));
    }
    let fits = |(name, value): &(&String, &String)| {
        (1..=MAX_LABEL).contains(&name.len()) && value.len() <= MAX_LABEL_VALUE
    };
    match labels.iter().find(|label| !fits(label)) {
        Some((name, _)) => {
            let shown = name.chars().take(MAX_LABEL).collect();
            Err(ServiceError::Label(shown))
        }
        None => Ok(()),
    }
}

fn key(name: &str) -> Vec<u8> {
    // A name may be longer than a key.
    let mut hasher = blake3::Hasher::new_derive_key("weft service v1");
    hasher.update(name.as_bytes());
    format!("service/{}", hasher.finalize()).into_bytes()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

/// The record of a service that this node offers.
fn record(name: &str, labels: Arc<Mutex<Labels>>) -> (RecordId, Value) {
    let value = move |addresses: Vec<Bytes>| {
        let labels = lock(&labels);
        let labels = labels.iter().map(|(name, value)| wire::Label {
            name: name.clone(),
            value: value.clone(),
        });
        let labels = labels.collect();
        wire::ServiceClaim { addresses, labels }.encode_to_vec()
    };
    (RecordId::of(key(name)), Value::of(value))
}

/// Makes this node be found as one that offers a service, without labels, for as long as it runs.
pub(super) fn announce_always(node: &Node, name: &str) -> Result<(), ServiceError> {
    check(name)?;
    let (id, value) = record(name, Arc::default());
    node.advertiser().register(id, value, Terms::PRESENCE);
    Ok(())
}

/// This node is found as one that offers a service, for as long as this is held.
#[derive(Debug, Clone)]
#[must_use = "what is dropped is announced no more"]
pub struct Announced {
    labels: Arc<Mutex<Labels>>,
    presence: Arc<Presence>,
}

impl Announced {
    pub(super) fn new(node: &Node, name: &str, labels: Labels) -> Result<Self, ServiceError> {
        check(name)?;
        check_labels(&labels)?;
        let labels = Arc::new(Mutex::new(labels));
        let (id, value) = record(name, Arc::clone(&labels));
        let presence = node.advertiser().be_present(id, value, Terms::PRESENCE);
        Ok(Self {
            labels,
            presence: Arc::new(presence),
        })
    }

    /// States other labels from now on. Others know within twenty seconds.
    ///
    /// # Errors
    /// [`ServiceError`], and the labels stay as they are.
    pub fn set_labels(&self, labels: Labels) -> Result<(), ServiceError> {
        check_labels(&labels)?;
        let before = std::mem::replace(&mut *lock(&self.labels), labels);
        if before != *lock(&self.labels) {
            self.presence.renew();
        }
        Ok(())
    }
}

/// One that offers a service.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServicePeer {
    /// Who.
    pub peer: PeerId,
    /// What it says of its offer.
    pub labels: Labels,
    /// The path to it, if it is connected.
    pub path: Option<Path>,
    /// The round trip to it, once measured.
    pub rtt: Option<Duration>,
    /// Calls of this node's to the service there that are open.
    pub outstanding: usize,
    /// It has failed, and is not asked for so long unless there is no other.
    pub avoided: Option<Duration>,
}

/// The services that this node calls by name, or did so lately.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<HashMap<String, Remembered>>);

#[derive(Debug)]
struct Remembered {
    shared: Arc<Shared>,
    used: Instant,
}

impl Known {
    fn get(&self, name: &str, node: &Node) -> Arc<Shared> {
        let now = Instant::now();
        let mut known = lock(&self.0);
        // One that a handle has is in use.
        let idle = |one: &Remembered| Arc::strong_count(&one.shared) == 1;
        known.retain(|_, one| !idle(one) || now.duration_since(one.used) < REMEMBER);
        if known.len() >= MAX_SERVICES && !known.contains_key(name) {
            let unused = known.iter().filter(|(_, one)| idle(one));
            let oldest = unused.min_by_key(|(_, one)| one.used);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                known.remove(&oldest);
            }
        }
        let one = known.entry(name.to_owned()).or_insert_with(|| Remembered {
            shared: Arc::new(Shared {
                key: key(name),
                dht: node.dht().clone(),
                network: node.network().clone(),
                state: Mutex::default(),
                looking: tokio::sync::Mutex::default(),
                retries: Retries::default(),
            }),
            used: now,
        });
        one.used = now;
        Arc::clone(&one.shared)
    }
}

/// What all handles of one service know.
struct Shared {
    key: Vec<u8>,
    dht: Dht,
    network: Network,
    state: Mutex<State>,
    /// Held by whoever looks it up.
    looking: tokio::sync::Mutex<()>,
    retries: Retries,
}

#[derive(Default)]
struct State {
    offers: HashMap<PeerId, Candidate>,
    looked: Option<Instant>,
    /// The last look of any kind.
    looked_some: Option<Instant>,
    looked_at_paths: Option<Instant>,
    /// When it was called last.
    used: Option<Instant>,
    /// Its providers are being watched.
    watched: bool,
    /// Counts calls, so that of equals the one that was not asked for longest is.
    calls: u64,
}

#[derive(Default)]
struct Candidate {
    addresses: Heard,
    labels: Labels,
    sequence: u64,
    /// When its statement ends.
    until: Option<Instant>,
    path: Option<(Path, Option<Duration>)>,
    outstanding: usize,
    /// Times that it failed since it last answered.
    failures: u32,
    avoid_until: Option<Instant>,
    /// It failed to answer the last ping, and not a call.
    silent: bool,
    /// It has answered a call.
    proven: bool,
    /// The network that its first public address is in, or the relay.
    network: Option<String>,
    last: u64,
}

impl Candidate {
    /// How long a call is expected to take, in arbitrary units.
    fn cost(&self) -> u128 {
        let (relayed, rtt) = match &self.path {
            Some((path, rtt)) => (path.kind == PathKind::Relayed, rtt.unwrap_or(UNKNOWN)),
            None => (false, FAR),
        };
        // What a relay forwards is slower than its round trip says, and is another's to pay for.
        let rtt = rtt.max(NEXT_DOOR) * if relayed { 2 } else { 1 };
        rtt.as_micros() * (self.outstanding as u128 + 1)
    }

    /// Nothing shows that it is there at all.
    fn is_stranger(&self) -> bool {
        !self.proven && self.path.is_none()
    }

    /// The lowest is asked first, where so many were asked in vain in its network: those that have not failed, those
    /// that are connected or have answered before, and of strangers those of networks that were not tried.
    fn rank(&self, now: Instant, tried: usize) -> impl Ord + use<> {
        let stranger = self.is_stranger();
        let tried = if stranger { tried } else { 0 };
        (
            self.avoided(now),
            self.is_suspect(),
            stranger,
            tried,
            self.cost(),
        )
    }

    /// It failed, and nothing has been heard of it since.
    fn is_suspect(&self) -> bool {
        self.silent || self.failures > 0 && self.path.is_none()
    }

    fn avoided(&self, now: Instant) -> Option<Duration> {
        let until = self.avoid_until?;
        (until > now).then(|| until.duration_since(now))
    }
}

/// The widest network around the first public address, or the relay; `None` if there is neither.
fn network(addresses: &Heard) -> Option<String> {
    let addresses = addresses.to_wire().into_iter();
    let addresses = addresses.filter_map(|address| Multiaddr::try_from(address).ok());
    let places = addresses.map(|address| Place::of(&Path::of(&address)));
    places.filter_map(|place| place.networks().last()).next()
}

/// One of each network, in random order, then a second of each, and so on.
fn in_turns<T>(all: impl Iterator<Item = (Option<String>, T)>) -> Vec<T> {
    let mut all: Vec<_> = all.collect();
    fastrand::shuffle(&mut all);
    let mut seen = HashMap::<Option<String>, usize>::new();
    let turns = all.into_iter().map(|(network, one)| {
        let turn = seen.entry(network).or_default();
        *turn += 1;
        (*turn, one)
    });
    let mut turns: Vec<_> = turns.collect();
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, one)| one).collect()
}

fn has(labels: &Labels, wanted: &Labels) -> bool {
    let mut wanted = wanted.iter();
    wanted.all(|(name, value)| labels.get(name) == Some(value))
}

/// What a statement says, if it is one of an offer: labels, and where to reach it.
fn offer(value: &[u8]) -> Option<(Labels, Heard)> {
    let claim = wire::ServiceClaim::decode(value).ok()?;
    let labels = claim.labels.into_iter().take(MAX_LABELS);
    let labels: Labels = labels.map(|l| (l.name, l.value)).collect();
    check_labels(&labels).ok()?;
    Some((labels, addresses::decode(&claim.addresses)))
}

impl State {
    /// Whom to ask: the cheapest of those that have not failed, or of all if they have.
    fn choose(
        &mut self,
        wanted: &WantedNow<'_>,
        tried: &HashSet<PeerId>,
        now: Instant,
    ) -> Option<(PeerId, Heard)> {
        let mut tried_in = HashMap::<_, usize>::new();
        for tried in tried.iter().filter_map(|peer| self.offers.get(peer)) {
            *tried_in.entry(tried.network.clone()).or_default() += 1;
        }
        let candidates = self.offers.iter_mut();
        let (peer, chosen) = candidates
            .filter(|(peer, c)| !tried.contains(peer) && wanted.fits(peer, &c.labels))
            .min_by_key(|(_, c)| {
                let tried = tried_in.get(&c.network).copied().unwrap_or_default();
                (c.rank(now, tried), c.last)
            })?;
        self.calls += 1;
        chosen.last = self.calls;
        chosen.outstanding += 1;
        Some((*peer, chosen.addresses.clone()))
    }

    /// Takes in what publishers state. Who is silent is remembered until its last statement ends: a look-up may miss some.
    fn learn(&mut self, own: PeerId, records: &[Record], now: Instant) {
        for record in records {
            let peer = record.publisher();
            if !record.subkey().is_empty() || peer == own {
                continue;
            }
            if let Some(known) = self.offers.get(&peer)
                && known.sequence >= record.sequence()
            {
                continue;
            }
            let Some((labels, addresses)) = record.value().and_then(offer) else {
                self.offers.remove(&peer);
                continue;
            };
            if self.offers.len() >= MAX_OFFERS
                && !self.offers.contains_key(&peer)
                && !self.make_room()
            {
                continue;
            }
            let candidate = self.offers.entry(peer).or_default();
            candidate.network = network(&addresses);
            candidate.addresses = addresses;
            candidate.labels = labels;
            candidate.sequence = record.sequence();
            candidate.until = Some(now + record.remaining().min(BELIEVED));
        }
        self.offers
            .retain(|_, c| c.outstanding > 0 || c.until.is_some_and(|until| until > now));
    }
}

impl State {
    /// Forgets an offer that leads nowhere as far as is known: of a peer that never answered, in the network that has
    /// the most of those, the one that has failed most, or else is the oldest. Offers of connected peers stay.
    fn make_room(&mut self) -> bool {
        let mut of_network = HashMap::<_, usize>::new();
        for candidate in self.offers.values().filter(|c| c.is_stranger()) {
            *of_network.entry(candidate.network.clone()).or_default() += 1;
        }
        let offers = self.offers.iter();
        let idle = offers.filter(|(_, c)| c.outstanding == 0 && c.path.is_none());
        let worst = idle.max_by_key(|(_, c)| {
            let neighbours = of_network.get(&c.network).copied().unwrap_or_default();
            let until = std::cmp::Reverse(c.until);
            (c.is_stranger(), neighbours, c.failures, until)
        });
        let Some(worst) = worst.map(|(peer, _)| *peer) else {
            return false;
        };
        self.offers.remove(&worst);
        true
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Who offers it; a few will do for a first call.
    async fn look(&self, some: bool) {
        let records = match some {
            true => self.dht.get_some(&self.key).await,
            false => self.dht.get_with_removed(&self.key).await,
        };
        let Ok(records) = records else { return };
        let (own, now) = (self.network.local_peer(), Instant::now());
        {
            let mut state = lock(&self.state);
            state.learn(own, &records, now);
            state.looked_some = Some(now);
            // After a few, all, with the next call.
            state.looked = if some {
                now.checked_sub(FRESH)
            } else {
                Some(now)
            };
        }
        if !some {
            self.meet().await;
        }
        self.look_at_paths().await;
    }

    /// Connects to some, so that the nearest is known.
    async fn meet(&self) {
        let strangers: Vec<_> = {
            let (state, now) = (lock(&self.state), Instant::now());
            let met = state.offers.values().filter(|c| c.path.is_some()).count();
            let strangers = state.offers.iter();
            let strangers = strangers.filter(|(_, c)| c.path.is_none() && c.avoided(now).is_none());
            let strangers = in_turns(strangers.map(|(peer, c)| (c.network.clone(), (*peer, c))));
            strangers
                .into_iter()
                .take(NEAR.saturating_sub(met))
                .map(|(peer, c)| (peer, c.addresses.clone()))
                .collect()
        };
        let dials = strangers.into_iter().map(|(peer, addresses)| {
            let dial = timeout(REACH, self.network.connect(peer, addresses));
            async move { (peer, matches!(dial.await, Ok(Ok(_)))) }
        });
        for (peer, reached) in futures::future::join_all(dials).await {
            if !reached {
                self.failed(peer);
            }
        }
    }

    /// Has the connected providers show that they are there, for as long as the service is used. One that does not is
    /// left alone, and its connections are made to show that they work, or are closed.
    async fn watch(self: Arc<Self>) {
        loop {
            sleep(WATCH).await;
            {
                let mut state = lock(&self.state);
                let idle = state.used.is_none_or(|used| used.elapsed() > WATCH_FOR);
                if idle {
                    state.watched = false;
                    return;
                }
            }
            self.look_at_paths().await;
            let connected: Vec<_> = {
                let state = lock(&self.state);
                let connected = state.offers.iter();
                let connected = connected.filter_map(|(peer, c)| {
                    let (_, rtt) = c.path.as_ref()?;
                    let patience = rtt.unwrap_or_default() * ALIVE_TRIPS;
                    Some((c.last, *peer, patience.clamp(ALIVE.0, ALIVE.1)))
                });
                let mut connected: Vec<_> = connected.collect();
                // Those that are called.
                connected.sort_by_key(|(last, ..)| std::cmp::Reverse(*last));
                connected.truncate(WATCHED);
                connected
            };
            let network = &self.network;
            let pings = connected.into_iter().map(|(_, peer, patience)| async move {
                let answered = timeout(patience, network.ping(peer)).await;
                (peer, matches!(answered, Ok(Ok(_))))
            });
            for (peer, alive) in futures::future::join_all(pings).await {
                let was_silent = {
                    let mut state = lock(&self.state);
                    let candidate = state.offers.get_mut(&peer);
                    candidate.is_some_and(|c| std::mem::replace(&mut c.silent, !alive))
                };
                match (alive, was_silent) {
                    (true, true) => self.answered(peer),
                    (false, false) => {
                        tracing::debug!(%peer, "a provider of a service does not answer");
                        self.failed(peer);
                        self.network.check(peer, PATH_TIMEOUT).await;
                    }
                    _ => {}
                }
            }
        }
    }

    async fn look_at_paths(&self) {
        let peers = self.network.peers().await;
        let mut state = lock(&self.state);
        state.looked_at_paths = Some(Instant::now());
        for (peer, candidate) in &mut state.offers {
            let info = peers.iter().find(|info| info.peer == *peer);
            candidate.path = info.map(|info| (info.path.clone(), info.rtt));
        }
    }

    fn failed(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.state).offers.get_mut(&peer) {
            let times = candidate.failures.min(16);
            let pause = (AVOID.0 * (1 << times)).min(AVOID.1);
            candidate.failures += 1;
            candidate.avoid_until = Some(Instant::now() + pause);
        }
    }

    fn answered(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.state).offers.get_mut(&peer) {
            candidate.failures = 0;
            candidate.avoid_until = None;
        }
    }

    /// It has answered a call, whatever it said.
    fn called(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.state).offers.get_mut(&peer) {
            candidate.proven = true;
        }
        self.answered(peer);
    }
}

/// A call that is open, counted until this is dropped.
struct Outstanding {
    shared: Arc<Shared>,
    peer: PeerId,
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if let Some(candidate) = lock(&self.shared.state).offers.get_mut(&self.peer) {
            candidate.outstanding = candidate.outstanding.saturating_sub(1);
        }
    }
}

/// Calls whoever offers a service of this name: for a generated client. Cheap to clone; [`Rpc::service`](super::Rpc::service).
#[derive(Debug, Clone)]
pub struct Service {
    node: Node,
    name: String,
    shared: Arc<Shared>,
    wanted: Wanted,
    class: Class,
}

/// The conditions that a provider of a service has to meet to be called.
#[derive(Debug, Clone, Default)]
struct Wanted {
    labels: Labels,
    /// Only these.
    only: Option<Arc<BTreeSet<PeerId>>>,
    /// Only those that the node trusts, as it does at the time.
    trusted: Option<Node>,
}

impl Wanted {
    /// Returns the conditions as they are at this moment.
    fn now(&self) -> WantedNow<'_> {
        WantedNow {
            labels: &self.labels,
            only: self.only.as_deref(),
            trusted: self.trusted.as_ref().map(|node| node.trusted().peers()),
        }
    }

    /// In words, for a person; empty if any will do.
    fn in_words(&self) -> String {
        let mut words = String::new();
        if !self.labels.is_empty() {
            words.push_str(&format!(" with {:?}", self.labels));
        }
        if let Some(only) = &self.only {
            words.push_str(&format!(
                " among the {} peers that may be called",
                only.len()
            ));
        }
        if self.trusted.is_some() {
            words.push_str(" among the trusted publishers");
        }
        words
    }
}

/// [`Wanted`], with the list of trusted peers as it is.
#[derive(Debug)]
struct WantedNow<'a> {
    labels: &'a Labels,
    only: Option<&'a BTreeSet<PeerId>>,
    trusted: Option<BTreeSet<PeerId>>,
}

impl WantedNow<'_> {
    fn fits(&self, peer: &PeerId, labels: &Labels) -> bool {
        has(labels, self.labels)
            && self.only.is_none_or(|only| only.contains(peer))
            && self.trusted.as_ref().is_none_or(|all| all.contains(peer))
    }
}

impl Service {
    pub(super) fn new(node: &Node, name: &str) -> Result<Self, ServiceError> {
        check(name)?;
        let shared = node.services().get(name, node);
        Ok(Self {
            node: node.clone(),
            name: name.to_owned(),
            shared,
            wanted: Wanted::default(),
            class: Class::Interactive,
        })
    }

    /// Only those that state this label.
    #[must_use]
    pub fn labelled(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.wanted.labels.insert(name.into(), value.into());
        self
    }

    /// Calls only these peers. Anybody may state that a service is at their node, and labels are their own word: this,
    /// or [`trusted`](Self::trusted), says who may see requests and answer them. Called again, it narrows the choice to
    /// the peers that are in both.
    #[must_use]
    pub fn only(mut self, peers: impl IntoIterator<Item = PeerId>) -> Self {
        let mut peers: BTreeSet<_> = peers.into_iter().collect();
        if let Some(before) = &self.wanted.only {
            peers.retain(|peer| before.contains(peer));
        }
        self.wanted.only = Some(Arc::new(peers));
        self
    }

    /// Calls only peers that this node trusts ([`Node::trust`]) when the call is made. A peer has to state the service
    /// itself.
    #[must_use]
    pub fn trusted(mut self) -> Self {
        self.wanted.trusted = Some(self.node.clone());
        self
    }

    /// Calls that move much, on sessions of their own: they hold up no others.
    #[must_use]
    pub fn bulk(mut self) -> Self {
        self.class = Class::Bulk;
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who offers it, in the order in which they would be asked. Asks the DHT.
    pub async fn peers(&self) -> Vec<ServicePeer> {
        self.node.meet().await;
        {
            let _looking = self.shared.looking.lock().await;
            self.shared.look(false).await;
        }
        let wanted = self.wanted.now();
        let (state, now) = (lock(&self.shared.state), Instant::now());
        let mut offers: Vec<_> = state
            .offers
            .iter()
            .filter(|(peer, c)| wanted.fits(peer, &c.labels))
            .collect();
        offers.sort_by_key(|(peer, c)| (c.rank(now, 0), c.last, **peer));
        let offers = offers.into_iter().map(|(peer, c)| ServicePeer {
            peer: *peer,
            labels: c.labels.clone(),
            path: c.path.as_ref().map(|(path, _)| path.clone()),
            rtt: c.path.as_ref().and_then(|(_, rtt)| *rtt),
            outstanding: c.outstanding,
            avoided: c.avoided(now),
        });
        offers.collect()
    }

    /// Who offers it, and how that changes: the same as [`peers`](Self::peers) shows, told within five seconds and the time of a look-up; that a node which has
    /// crashed offers nothing any more, when its word ends (ten minutes).
    ///
    /// With [`trusted`](Self::trusted), it shows those that are trusted when it begins.
    pub async fn watch(&self) -> ServiceWatch {
        self.node.meet().await;
        ServiceWatch {
            watcher: Watcher::new(self.shared.dht.clone(), self.shared.key.clone()),
            own: self.node.peer_id(),
            wanted: self.wanted.labels.clone(),
            only: self.wanted.only.clone(),
            trusted: self.wanted.now().trusted,
            known: HashMap::new(),
        }
    }

    /// Whom to ask, other than those that were tried; looks for more where there are none.
    async fn choose(&self, tried: &HashSet<PeerId>) -> Option<(Outstanding, Heard)> {
        self.keep_fresh().await;
        if self.is_doubtful(tried) {
            // Another may have begun to offer it.
            let _looking = self.shared.looking.lock().await;
            if self.is_doubtful(tried) {
                self.shared.look(true).await;
            }
        }
        if let Some(chosen) = self.choose_known(tried) {
            return Some(chosen);
        }
        if !tried.is_empty() {
            return None;
        }
        self.node.meet().await;
        let _looking = self.shared.looking.lock().await;
        // Somebody else may have looked meanwhile.
        if let Some(chosen) = self.choose_known(tried) {
            return Some(chosen);
        }
        self.shared.look(true).await;
        self.choose_known(tried)
    }

    /// Returns true if all providers that are known, and were not tried, failed lately, and this was not looked into
    /// for a second.
    fn is_doubtful(&self, tried: &HashSet<PeerId>) -> bool {
        let wanted = self.wanted.now();
        let (state, now) = (lock(&self.shared.state), Instant::now());
        let lately = |at: Instant| now.duration_since(at) < LOOK_AGAIN;
        let known = state.offers.iter();
        let mut known = known
            .filter(|(peer, c)| !tried.contains(peer) && wanted.fits(peer, &c.labels))
            .peekable();
        known.peek().is_some()
            && known.all(|(_, c)| c.is_suspect() || c.avoided(now).is_some())
            && !state.looked_some.is_some_and(lately)
    }

    fn choose_known(&self, tried: &HashSet<PeerId>) -> Option<(Outstanding, Heard)> {
        let wanted = self.wanted.now();
        let mut state = lock(&self.shared.state);
        let (peer, addresses) = state.choose(&wanted, tried, Instant::now())?;
        let shared = Arc::clone(&self.shared);
        Some((Outstanding { shared, peer }, addresses))
    }

    /// Looks again, beside the calls, if what is known is old; at paths before the call, which asks nobody.
    async fn keep_fresh(&self) {
        let now = Instant::now();
        let (all, paths, watch) = {
            let mut state = lock(&self.shared.state);
            let old =
                |at: Option<Instant>, than| at.is_some_and(|at| now.duration_since(at) > than);
            let all = old(state.looked, FRESH);
            let paths = old(state.looked_at_paths, FRESH_PATHS);
            // One looks at a time.
            if all {
                state.looked = Some(now);
            }
            if paths {
                state.looked_at_paths = Some(now);
            }
            state.used = Some(now);
            (all, paths, !std::mem::replace(&mut state.watched, true))
        };
        if watch {
            self.node.spawn(Arc::clone(&self.shared).watch());
        }
        if all {
            let shared = Arc::clone(&self.shared);
            self.node.spawn(async move {
                let _looking = shared.looking.lock().await;
                shared.look(false).await;
            });
        }
        if paths {
            self.shared.look_at_paths().await;
        }
    }

    async fn attempt<T, F>(
        &self,
        method: Method,
        options: Options,
        call: impl Fn(Session, Options, Outstanding) -> F,
    ) -> Result<T, Ended>
    where
        F: Future<Output = Result<T, Ended>>,
    {
        let deadline = options
            .timeout
            .and_then(|time| Instant::now().checked_add(time));
        let attempts = async {
            let (mut tried, mut pauses, mut reach) = (HashSet::new(), Pauses::new(), REACH);
            self.shared.retries.called();
            let mut last = None;
            for attempt in 1..=ATTEMPTS {
                let mut chosen = self.choose(&tried).await;
                if chosen.is_none() && !tried.is_empty() {
                    // All have failed; the first of them may be well again.
                    tried.clear();
                    sleep(pauses.next()).await;
                    reach *= 2;
                    chosen = self.choose(&tried).await;
                }
                let Some((outstanding, addresses)) = chosen else {
                    return Err(match last {
                        Some(last) => last,
                        None => self.nobody().await,
                    });
                };
                let peer = outstanding.peer;
                tried.insert(peer);
                let session = timeout(reach, self.session(peer, addresses)).await;
                let was_reached = matches!(session, Ok(Ok(_)));
                let failed = match session {
                    Err(_) => {
                        let text = format!("{peer} was not reached in {} s", reach.as_secs());
                        unreached(text)
                    }
                    Ok(Err(status)) => status,
                    Ok(Ok(session)) => {
                        let left = Options {
                            timeout: deadline
                                .map(|deadline| deadline.saturating_duration_since(Instant::now())),
                            ..options.clone()
                        };
                        match call(session, left, outstanding).await {
                            Err(status) if is_failure(&status) => status,
                            ended => {
                                self.shared.called(peer);
                                return ended;
                            }
                        }
                    }
                };
                self.shared.failed(peer);
                tracing::debug!(%peer, service = self.name, status = %failed, attempt, "a call by name has failed");
                let may_go_on = may_ask_another(&failed, &method);
                // One that was not reached has not been asked anything.
                let is_asked_again = may_go_on && (!was_reached || self.shared.retries.take());
                if !is_asked_again {
                    return Err(failed);
                }
                last = Some(failed);
            }
            Err(match last {
                Some(last) => last,
                None => self.nobody().await,
            })
        };
        match deadline {
            None => attempts.await,
            Some(deadline) => timeout_at(deadline, attempts).await.unwrap_or_else(|_| {
                Err(Ended::new(
                    Code::DeadlineExceeded,
                    "the caller's time is over",
                ))
            }),
        }
    }

    async fn session(&self, peer: PeerId, addresses: Heard) -> Result<Session, Ended> {
        let (network, sessions) = (self.node.network(), self.node.sessions());
        // Where it says it is, unless it is connected.
        if !sessions.has(peer, self.class) {
            let connected = network.connect(peer, addresses).await;
            connected.map_err(|error| unreached(error.to_string()))?;
        }
        sessions.get(&self.node, peer, self.class).await
    }

    async fn nobody(&self) -> Ended {
        if let Err(error) = self.node.is_connected().await {
            return unreached(error.to_string());
        }
        let wanted = self.wanted.in_words();
        let own = match self.node.offered().has(&self.name) {
            true => "; this node does itself, and a node calls others only",
            false => "",
        };
        unreached(format!("nobody offers {:?}{wanted}{own}", self.name))
    }
}

/// What has changed of who offers a service.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServiceChange {
    /// Offers it now, or did so when the watch began.
    Joined {
        /// Who.
        peer: PeerId,
        /// What it says of its offer.
        labels: Labels,
    },
    /// Says something else of its offer.
    Changed {
        /// Who.
        peer: PeerId,
        /// What it says now.
        labels: Labels,
    },
    /// Offers it no more, or states other labels than those that are wanted.
    Left {
        /// Who.
        peer: PeerId,
    },
}

/// The changes of who offers a service; [`Service::watch`]. Keeps no node from stopping.
#[derive(Debug)]
pub struct ServiceWatch {
    watcher: Watcher,
    own: PeerId,
    wanted: Labels,
    only: Option<Arc<BTreeSet<PeerId>>>,
    trusted: Option<BTreeSet<PeerId>>,
    known: HashMap<PeerId, Labels>,
}

impl ServiceWatch {
    /// The next change; `None` once the node has stopped. May be dropped and called again.
    pub async fn next(&mut self) -> Option<ServiceChange> {
        loop {
            let change = self.watcher.next().await?;
            if let Some(change) = self.learn(change) {
                return Some(change);
            }
        }
    }

    fn learn(&mut self, change: Change) -> Option<ServiceChange> {
        let (peer, labels) = match change {
            Change::Joined(record) | Change::Changed(record) => {
                if !record.subkey().is_empty() {
                    return None;
                }
                let offer = record.value().and_then(offer);
                (record.publisher(), offer.map(|(labels, _)| labels))
            }
            Change::Left { publisher, subkey } if subkey.is_empty() => (publisher, None),
            Change::Left { .. } => return None,
        };
        let wanted = WantedNow {
            labels: &self.wanted,
            only: self.only.as_deref(),
            trusted: None,
        };
        let is_trusted = self.trusted.as_ref().is_none_or(|all| all.contains(&peer));
        let labels = labels.filter(|labels| is_trusted && wanted.fits(&peer, labels));
        if peer == self.own {
            return None;
        }
        let Some(labels) = labels else {
            self.known.remove(&peer)?;
            return Some(ServiceChange::Left { peer });
        };
        match self.known.insert(peer, labels.clone()) {
            None => Some(ServiceChange::Joined { peer, labels }),
            Some(before) if before != labels => Some(ServiceChange::Changed { peer, labels }),
            Some(_) => None,
        }
    }
}

fn unreached(text: String) -> Ended {
    Ended {
        seen: Some(Seen::No),
        ..Ended::new(Code::Unavailable, text)
    }
}

/// Whether it says something of the peer, and not of the call.
fn is_failure(status: &Ended) -> bool {
    match status.code {
        Code::Unavailable | Code::Unimplemented => true,
        Code::ResourceExhausted => status.seen == Some(Seen::No),
        _ => false,
    }
}

/// Who has not begun it, or does not have the method, has done nothing of it.
fn may_ask_another(status: &Ended, method: &Method) -> bool {
    status.code == Code::Unimplemented
        || status.seen == Some(Seen::No)
        || may_repeat(status, method)
}

impl Caller for Service {
    async fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> Result<Message, Ended> {
        let call = |session: Session, options, outstanding: Outstanding| {
            let (message, name) = (message.clone(), method.name.clone());
            async move {
                let _outstanding = outstanding;
                session.unary(&name, message, options).await
            }
        };
        self.attempt(method.clone(), options, call).await
    }

    async fn open(&self, method: Method, options: Options) -> Result<(Sender, Receiver), Ended> {
        let call = |session: Session, options, outstanding: Outstanding| {
            let name = method.name.clone();
            async move {
                let (sender, receiver) = session.call(&name, options).await?;
                Ok((sender, receiver.holding(outstanding)))
            }
        };
        self.attempt(method.clone(), options, call).await
    }
}

#[cfg(test)]
mod tests {
    use weft_net::identity::Keypair;

    use super::*;

    fn candidate(rtt: Duration, address: &str) -> Candidate {
        let path = Path::of(&address.parse().unwrap());
        Candidate {
            path: Some((path, Some(rtt))),
            until: Some(Instant::now() + Duration::from_secs(60)),
            ..Candidate::default()
        }
    }

    fn state(candidates: Vec<Candidate>) -> (State, Vec<PeerId>) {
        let mut state = State::default();
        let peers = candidates.into_iter().map(|candidate| {
            let peer = PeerId::random();
            state.offers.insert(peer, candidate);
            peer
        });
        let peers = peers.collect();
        (state, peers)
    }

    fn choose(state: &mut State) -> PeerId {
        let labels = Labels::new();
        let chosen = state.choose(&any(&labels), &HashSet::new(), Instant::now());
        chosen.unwrap().0
    }

    fn any(labels: &Labels) -> WantedNow<'_> {
        WantedNow {
            labels,
            only: None,
            trusted: None,
        }
    }

    const DIRECT: &str = "/ip4/192.0.2.1/tcp/1";

    #[test]
    fn near_ones_come_first_and_busy_ones_later() {
        let ms = Duration::from_millis;
        let relayed = format!("{DIRECT}/p2p/{}/p2p-circuit", PeerId::random());
        let (mut state, peers) = state(vec![
            candidate(ms(10), DIRECT),
            candidate(ms(25), DIRECT),
            candidate(ms(11), &relayed),
        ]);
        let order: Vec<_> = (0..5).map(|_| choose(&mut state)).collect();
        // Costs are 10, 25 and 22 a call that is open.
        assert_eq!(order[..2], [peers[0], peers[0]][..]);
        assert_eq!(state.offers[&peers[0]].outstanding, 3);
        assert_eq!(state.offers[&peers[1]].outstanding, 1);
        assert_eq!(state.offers[&peers[2]].outstanding, 1);
    }

    #[test]
    fn equals_take_turns() {
        let micros = Duration::from_micros;
        let (mut state, peers) = state(vec![
            candidate(micros(90), DIRECT),
            candidate(micros(400), DIRECT),
        ]);
        for _ in 0..10 {
            let both = [choose(&mut state), choose(&mut state)];
            assert!(peers.iter().all(|peer| both.contains(peer)));
            state.offers.values_mut().for_each(|c| c.outstanding = 0);
        }
    }

    #[test]
    fn one_that_fails_is_left_alone_unless_there_is_no_other() {
        let ms = Duration::from_millis;
        let (mut state, peers) = state(vec![candidate(ms(1), DIRECT), candidate(ms(90), DIRECT)]);
        let until = Instant::now() + Duration::from_secs(9);
        state.offers.get_mut(&peers[0]).unwrap().avoid_until = Some(until);
        for _ in 0..20 {
            assert_eq!(choose(&mut state), peers[1]);
        }
        state.offers.remove(&peers[1]);
        assert_eq!(choose(&mut state), peers[0]);
    }

    #[test]
    fn labels_are_matched_and_statements_replaced_and_taken_back() {
        let keys = Keypair::generate_ed25519();
        let claim = |model: &str| {
            let label = |name: &str, value: &str| wire::Label {
                name: name.to_owned(),
                value: value.to_owned(),
            };
            let labels = vec![label("model", model), label("load", "3")];
            wire::ServiceClaim {
                addresses: Vec::new(),
                labels,
            }
            .encode_to_vec()
        };
        let ttl = Duration::from_secs(60);
        let record = |value: Option<Vec<u8>>, sequence| {
            Record::sign(&keys, b"k", b"", value.as_deref(), sequence, ttl).unwrap()
        };
        let wanted = |model: &str| Labels::from([("model".to_owned(), model.to_owned())]);
        let (mut state, now) = (State::default(), Instant::now());
        let own = PeerId::random();
        let mut has = |records: &[Record], model: &str| {
            state.learn(own, records, now);
            let wanted = wanted(model);
            state.choose(&any(&wanted), &HashSet::new(), now).is_some()
        };
        assert!(has(&[record(Some(claim("a")), 1)], "a"));
        assert!(has(&[record(Some(claim("b")), 2)], "b"));
        // An older one changes nothing, and a look-up that misses it neither.
        assert!(!has(&[record(Some(claim("a")), 1)], "a"));
        assert!(has(&[], "b"));
        assert!(!has(&[record(None, 3)], "b"));
        // What cannot be read, has too many labels or is our own is nobody's offer.
        assert!(!has(&[record(Some(vec![0xff; 9]), 4)], "b"));
        let label = |n| wire::Label {
            name: "x".repeat(n),
            value: String::new(),
        };
        let odd = wire::ServiceClaim {
            addresses: Vec::new(),
            labels: vec![label(MAX_LABEL + 1)],
        };
        assert!(!has(&[record(Some(odd.encode_to_vec()), 5)], ""));
        state.learn(
            keys.public().to_peer_id(),
            &[record(Some(claim("b")), 6)],
            now,
        );
        assert!(state.offers.is_empty());
        state.learn(own, &[record(Some(claim("b")), 6)], now + 2 * ttl);
        assert!(state.offers.is_empty() || state.offers.values().all(|c| c.until > Some(now)));
    }

    /// An offer that nothing is known of but where it is said to be.
    fn stated(keys: &Keypair, address: &str, sequence: u64) -> Record {
        let address: Multiaddr = address.parse().unwrap();
        let claim = wire::ServiceClaim {
            addresses: vec![address.to_vec().into()],
            labels: Vec::new(),
        };
        let claim = claim.encode_to_vec();
        let ttl = Duration::from_secs(600);
        Record::sign(keys, b"k", b"", Some(&claim), sequence, ttl).unwrap()
    }

    #[test]
    fn false_offers_push_out_no_peer_that_answers_nor_one_of_another_network() {
        let (mut state, now) = (State::default(), Instant::now());
        let own = PeerId::random();
        let keys = Keypair::generate_ed25519;
        let [proven, connected, honest] = [keys(), keys(), keys()];
        let ids = [&proven, &connected, &honest].map(|keys| keys.public().to_peer_id());
        let at = |n: usize| format!("/ip4/203.0.{}.{}/tcp/1", 113 + n % 2, n % 250 + 1);
        // In the same network as the liars, which tells nothing against those that answer.
        let first = [(&proven, at(1)), (&connected, at(2))];
        let first = first.map(|(keys, address)| stated(keys, &address, 1));
        state.learn(own, &first, now);
        state.offers.get_mut(&ids[0]).unwrap().proven = true;
        let path = Path::of(&DIRECT.parse().unwrap());
        state.offers.get_mut(&ids[1]).unwrap().path = Some((path, None));
        let liars: Vec<_> = (0..2 * MAX_OFFERS)
            .map(|n| stated(&keys(), &at(n), 1))
            .collect();
        state.learn(own, &liars[..MAX_OFFERS], now);
        assert_eq!(state.offers.len(), MAX_OFFERS);
        state.learn(own, &[stated(&honest, "/ip4/198.51.100.1/tcp/1", 1)], now);
        state.learn(own, &liars[MAX_OFFERS..], now);
        assert_eq!(state.offers.len(), MAX_OFFERS);
        assert!(ids.iter().all(|id| state.offers.contains_key(id)));
        // Those that are known to be there come first, and then one of each network.
        let (labels, mut tried) = (Labels::new(), HashSet::new());
        let mut next = || {
            let (peer, _) = state.choose(&any(&labels), &tried, now).unwrap();
            tried.insert(peer);
            peer
        };
        let asked: HashSet<_> = (0..5).map(|_| next()).collect();
        assert!(ids.iter().all(|id| asked.contains(id)));
    }

    #[test]
    fn only_peers_that_are_named_or_trusted_are_asked() {
        let ms = Duration::from_millis;
        let (mut state, peers) = state(vec![candidate(ms(1), DIRECT), candidate(ms(90), DIRECT)]);
        let labels = Labels::new();
        let far = BTreeSet::from([peers[1]]);
        let asked = |state: &mut State, wanted: &WantedNow<'_>| {
            let asked = state.choose(wanted, &HashSet::new(), Instant::now());
            asked.map(|(peer, _)| peer)
        };
        let only = WantedNow {
            only: Some(&far),
            ..any(&labels)
        };
        let trusted = WantedNow {
            trusted: Some(far.clone()),
            ..any(&labels)
        };
        for wanted in [&only, &trusted] {
            assert_eq!(asked(&mut state, wanted), Some(peers[1]));
        }
        let nobody = WantedNow {
            only: Some(&far),
            trusted: Some(BTreeSet::from([peers[0]])),
            ..any(&labels)
        };
        assert_eq!(asked(&mut state, &nobody), None);
        assert_eq!(asked(&mut state, &any(&labels)), Some(peers[0]));
    }

    #[test]
    fn what_may_be_asked_of_another() {
        let method = |idempotent| Method {
            name: "a.B/C".into(),
            idempotent,
        };
        let status = |code, seen| Ended {
            seen,
            ..Ended::new(code, "")
        };
        for (code, seen, idempotent, failure, another) in [
            (Code::Unavailable, Some(Seen::No), false, true, true),
            (Code::Unavailable, Some(Seen::Yes), false, true, false),
            (Code::Unavailable, Some(Seen::Yes), true, true, true),
            (Code::Unavailable, None, true, true, false),
            (Code::Unimplemented, None, false, true, true),
            (Code::ResourceExhausted, Some(Seen::No), false, true, true),
            (Code::ResourceExhausted, None, false, false, false),
            (Code::NotFound, None, true, false, false),
        ] {
            let status = status(code, seen);
            assert_eq!(is_failure(&status), failure, "{status}");
            let asked = failure && may_ask_another(&status, &method(idempotent));
            assert_eq!(asked, another, "{status}");
        }
    }
}
