//! Services by name: calling peers that offer one. `announced.rs` is the other side, and `choice.rs` says which peer
//! is called.
//!
//! Who offers a service says so in the DHT, with labels, for as long as it does. A [`Service`] knows who does, and sends each call where it expects it to be
//! answered soonest: to near peers and over direct paths, and not to where many of its calls are open already. A peer that fails is left alone for a while that
//! grows as it goes on failing, and what it had not begun is asked of another.
//!
//! The node remembers who offers a service, so that the short-lived handles of commands and API clients share it. While
//! a service is used, its providers are watched: one that dies is found out without a call, and costs one failed
//! attempt at most.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::Instrument;
use weft_dht::Dht;
use weft_net::{Class, Heard, Network, PATH_TIMEOUT, Path, PeerId};
use weft_proto::rpc::{
    Caller, Code, Message, Method, Options, Receiver, Seen, Sender, Session, Status as Ended,
};

use super::{
    announced::{Labels, ServiceError, check, key},
    choice::{ConditionsNow, Offers, in_turns},
    may_repeat, names,
    retries::{ATTEMPTS, Pauses, Retries},
    service_watch::ServiceWatch,
};
use crate::{Node, discovery::watch::Watcher};

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

/// Locks what no holder of the lock panics over.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
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
pub(crate) struct KnownServices(Mutex<HashMap<String, Remembered>>);

#[derive(Debug)]
struct Remembered {
    shared: Arc<Shared>,
    used: Instant,
}

impl KnownServices {
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
                offers: Mutex::default(),
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
    offers: Mutex<Offers>,
    /// Held by whoever looks it up.
    looking: tokio::sync::Mutex<()>,
    retries: Retries,
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
            let mut state = lock(&self.offers);
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
            let (state, now) = (lock(&self.offers), Instant::now());
            let met = state.of.values().filter(|c| c.path.is_some()).count();
            let strangers = state.of.iter();
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
                let mut state = lock(&self.offers);
                let idle = state.used.is_none_or(|used| used.elapsed() > WATCH_FOR);
                if idle {
                    state.watched = false;
                    return;
                }
            }
            self.look_at_paths().await;
            let connected: Vec<_> = {
                let state = lock(&self.offers);
                let connected = state.of.iter();
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
                    let mut state = lock(&self.offers);
                    let candidate = state.of.get_mut(&peer);
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
        let mut state = lock(&self.offers);
        state.looked_at_paths = Some(Instant::now());
        for (peer, candidate) in &mut state.of {
            let info = peers.iter().find(|info| info.peer == *peer);
            candidate.path = info.map(|info| (info.path.clone(), info.rtt));
        }
    }

    fn failed(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.offers).of.get_mut(&peer) {
            candidate.failed(Instant::now());
        }
    }

    fn answered(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.offers).of.get_mut(&peer) {
            candidate.answered();
        }
    }

    /// It has answered a call, whatever it said.
    fn called(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.offers).of.get_mut(&peer) {
            candidate.proven = true;
            candidate.answered();
        }
    }
}

/// A call that is open, counted until this is dropped.
struct Outstanding {
    shared: Arc<Shared>,
    peer: PeerId,
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if let Some(candidate) = lock(&self.shared.offers).of.get_mut(&self.peer) {
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
    wanted: Conditions,
    class: Class,
}

/// The conditions that a provider of a service has to meet to be called.
#[derive(Debug, Clone, Default)]
struct Conditions {
    labels: Labels,
    /// Only these.
    only: Option<Arc<BTreeSet<PeerId>>>,
    /// Only those that the node trusts, as it does at the time.
    trusted: Option<Node>,
}

impl Conditions {
    /// Returns the conditions as they are at this moment.
    fn now(&self) -> ConditionsNow<'_> {
        ConditionsNow {
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

impl Service {
    pub(super) fn new(node: &Node, name: &str) -> Result<Self, ServiceError> {
        check(name)?;
        let shared = node.services().get(name, node);
        Ok(Self {
            node: node.clone(),
            name: name.to_owned(),
            shared,
            wanted: Conditions::default(),
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
        let (state, now) = (lock(&self.shared.offers), Instant::now());
        let mut offers: Vec<_> = state
            .of
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
        let (state, now) = (lock(&self.shared.offers), Instant::now());
        let lately = |at: Instant| now.duration_since(at) < LOOK_AGAIN;
        let known = state.of.iter();
        let mut known = known
            .filter(|(peer, c)| !tried.contains(peer) && wanted.fits(peer, &c.labels))
            .peekable();
        known.peek().is_some()
            && known.all(|(_, c)| c.is_suspect() || c.avoided(now).is_some())
            && !state.looked_some.is_some_and(lately)
    }

    fn choose_known(&self, tried: &HashSet<PeerId>) -> Option<(Outstanding, Heard)> {
        let wanted = self.wanted.now();
        let mut state = lock(&self.shared.offers);
        let (peer, addresses) = state.choose(&wanted, tried, Instant::now())?;
        let shared = Arc::clone(&self.shared);
        Some((Outstanding { shared, peer }, addresses))
    }

    /// Looks again, beside the calls, if what is known is old; at paths before the call, which asks nobody.
    async fn keep_fresh(&self) {
        let now = Instant::now();
        let (all, paths, watch) = {
            let mut state = lock(&self.shared.offers);
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
        let method_name = method.name.clone();
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
                tracing::Span::current().record("peer", tracing::field::display(peer));
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
        let (_, name) = names(&method_name);
        let attempts = attempts.instrument(tracing::debug_span!(
            "call",
            service = self.name,
            method = name,
            peer = tracing::field::Empty
        ));
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
    use super::*;

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
