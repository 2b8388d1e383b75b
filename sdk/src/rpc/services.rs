//! Services by name: calls to the peers that offer one. `announced.rs` is the providers' side, and `choice.rs`
//! chooses the peer to call.
//!
//! A provider publishes a record in the DHT, with labels, while it offers a service. A [`Service`] knows these
//! providers, and sends each call to the one that it expects to answer soonest: to near peers over direct paths, and
//! not to peers with many open calls. A peer that fails is avoided for a while, longer with each failure, and a call
//! that it had not begun goes to another peer.
//!
//! The node remembers the providers of a service, so that short-lived handles of commands and API clients share them.
//! While a service is used, its providers are pinged: a dead provider is noticed without a call, and costs one failed
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
    retries::{MAX_ATTEMPTS, Pauses, Retries},
    service_watch::ServiceWatch,
};
use crate::{Node, discovery::watch::Watcher};

/// Age at which the known providers of a service are looked up again, in the background.
const MAX_AGE: Duration = Duration::from_secs(15);

/// Time between two lookups while all known providers have failed.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(1);

/// Age at which the known paths to providers are updated.
const MAX_PATH_AGE: Duration = Duration::from_secs(2);

/// Number of providers that are connected to before they are called, to measure their round trips.
const MAX_MET: usize = 8;

/// Time to reach a peer before another is tried. A dial over a long path takes less. The time doubles in case there
/// is no other provider; the dial goes on meanwhile.
const REACH_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval between pings of connected providers, time for which they are pinged after the last call, and number of
/// providers pinged.
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIME: Duration = Duration::from_secs(60);
const MAX_PINGED: usize = 16;

/// The shortest and the longest time that a pinged provider may take to answer. Between them, the time is a multiple
/// of its round trip.
const PING_TIMEOUT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));
const PING_TIMEOUT_TRIPS: u32 = 8;

/// Time for which an unused service is remembered, and number of services remembered.
const REMEMBER_TIME: Duration = Duration::from_secs(600);
const MAX_SERVICES: usize = 256;

/// Locks a mutex whose holders do not panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

/// A provider of a service; see [`Service::peers`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServicePeer {
    /// The provider.
    pub peer: PeerId,
    /// Labels of its offer, as the provider claims them.
    pub labels: Labels,
    /// Path to the provider, if it is connected.
    pub path: Option<Path>,
    /// Round-trip time to the provider, once measured.
    pub rtt: Option<Duration>,
    /// Number of this node's open calls to the service on this provider.
    pub outstanding: usize,
    /// Time for which the provider is avoided because it has failed. It is then called only if there is no other.
    /// `None` if it is not avoided.
    pub avoided: Option<Duration>,
}

/// The services that this node calls by name, or did recently.
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
        // A service that a handle refers to is in use.
        let idle = |one: &Remembered| Arc::strong_count(&one.shared) == 1;
        known.retain(|_, one| !idle(one) || now.duration_since(one.used) < REMEMBER_TIME);
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
                lookup_lock: tokio::sync::Mutex::default(),
                retries: Retries::default(),
            }),
            used: now,
        });
        one.used = now;
        Arc::clone(&one.shared)
    }
}

/// The state that all handles of one service share.
struct Shared {
    key: Vec<u8>,
    dht: Dht,
    network: Network,
    offers: Mutex<Offers>,
    /// Held by the task that looks up the providers.
    lookup_lock: tokio::sync::Mutex<()>,
    retries: Retries,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Looks up the providers. With `some`, a few are enough, for a first call.
    async fn look_up_providers(&self, some: bool) {
        let records = match some {
            true => self.dht.get_some(&self.key).await,
            false => self.dht.get_with_withdrawn(&self.key).await,
        };
        let Ok(records) = records else { return };
        let (own, now) = (self.network.local_peer(), Instant::now());
        {
            let mut state = lock(&self.offers);
            state.learn(own, &records, now);
            state.last_lookup = Some(now);
            // After a lookup of a few, the next call starts a full lookup.
            state.last_full_lookup = if some {
                now.checked_sub(MAX_AGE)
            } else {
                Some(now)
            };
        }
        if !some {
            self.meet().await;
        }
        self.refresh_paths().await;
    }

    /// Connects to some providers, to measure their round trips.
    async fn meet(&self) {
        let strangers: Vec<_> = {
            let (state, now) = (lock(&self.offers), Instant::now());
            let met = state.of.values().filter(|c| c.path.is_some()).count();
            let strangers = state.of.iter();
            let strangers = strangers.filter(|(_, c)| c.path.is_none() && c.avoided(now).is_none());
            let strangers = in_turns(strangers.map(|(peer, c)| (c.network.clone(), (*peer, c))));
            strangers
                .into_iter()
                .take(MAX_MET.saturating_sub(met))
                .map(|(peer, c)| (peer, c.addresses.clone()))
                .collect()
        };
        let dials = strangers.into_iter().map(|(peer, addresses)| {
            let dial = timeout(REACH_TIMEOUT, self.network.connect(peer, addresses));
            async move { (peer, matches!(dial.await, Ok(Ok(_)))) }
        });
        for (peer, reached) in futures::future::join_all(dials).await {
            if !reached {
                self.failed(peer);
            }
        }
    }

    /// Pings the connected providers while the service is used. A provider that does not answer is avoided, and its
    /// connections are checked and closed if they do not work.
    async fn watch(self: Arc<Self>) {
        loop {
            sleep(PING_INTERVAL).await;
            {
                let mut state = lock(&self.offers);
                let idle = state.used.is_none_or(|used| used.elapsed() > PING_TIME);
                if idle {
                    state.watched = false;
                    return;
                }
            }
            self.refresh_paths().await;
            let connected: Vec<_> = {
                let state = lock(&self.offers);
                let connected = state.of.iter();
                let connected = connected.filter_map(|(peer, c)| {
                    let (_, rtt) = c.path.as_ref()?;
                    let patience = rtt.unwrap_or_default() * PING_TIMEOUT_TRIPS;
                    Some((
                        c.last,
                        *peer,
                        patience.clamp(PING_TIMEOUT.0, PING_TIMEOUT.1),
                    ))
                });
                let mut connected: Vec<_> = connected.collect();
                // The providers that were called last.
                connected.sort_by_key(|(last, ..)| std::cmp::Reverse(*last));
                connected.truncate(MAX_PINGED);
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
                        tracing::debug!(%peer, "provider of a service does not answer");
                        self.failed(peer);
                        self.network.check(peer, PATH_TIMEOUT).await;
                    }
                    _ => {}
                }
            }
        }
    }

    async fn refresh_paths(&self) {
        let peers = self.network.peers().await;
        let mut state = lock(&self.offers);
        state.paths_refreshed = Some(Instant::now());
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

    /// Notes that the provider has answered a call, with whatever result.
    fn called(&self, peer: PeerId) {
        if let Some(candidate) = lock(&self.offers).of.get_mut(&peer) {
            candidate.proven = true;
            candidate.answered();
        }
    }
}

/// An open call, counted until this is dropped.
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

/// Calls any peer that offers a service; see [`Rpc::service`](super::Rpc::service). A client for generated code.
/// Cheap to clone.
///
/// Each call goes to the provider that is expected to answer soonest. If a provider fails before it has begun the
/// call, another is tried.
///
/// # Errors
/// Calls fail with a [status](weft_proto::rpc::Status). Its code is [`Code::Unavailable`] if no provider is found
/// or reached, and [`Code::DeadlineExceeded`] if the deadline passes first.
#[derive(Debug, Clone)]
pub struct Service {
    node: Node,
    name: String,
    shared: Arc<Shared>,
    wanted: Conditions,
    class: Class,
}

/// Conditions that a provider has to meet to be called.
#[derive(Debug, Clone, Default)]
struct Conditions {
    labels: Labels,
    /// The only peers that may be called, if restricted.
    only: Option<Arc<BTreeSet<PeerId>>>,
    /// Set if only trusted peers may be called; the list is read at each call.
    trusted: Option<Node>,
}

impl Conditions {
    /// Returns the conditions at this moment.
    fn now(&self) -> ConditionsNow<'_> {
        ConditionsNow {
            labels: &self.labels,
            only: self.only.as_deref(),
            trusted: self.trusted.as_ref().map(|node| node.trusted().peers()),
        }
    }

    /// Describes the conditions as a text for people. Empty if there are none.
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

    /// Restricts the choice to providers whose offer has this label.
    #[must_use]
    pub fn labelled(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.wanted.labels.insert(name.into(), value.into());
        self
    }

    /// Restricts the choice to these peers.
    ///
    /// Any node may claim to offer a service, and labels are the provider's own claim. Use this method or
    /// [`trusted`](Self::trusted) to decide which peers may see requests and answer them. A second call restricts the
    /// choice to the peers in both lists.
    #[must_use]
    pub fn only(mut self, peers: impl IntoIterator<Item = PeerId>) -> Self {
        let mut peers: BTreeSet<_> = peers.into_iter().collect();
        if let Some(before) = &self.wanted.only {
            peers.retain(|peer| before.contains(peer));
        }
        self.wanted.only = Some(Arc::new(peers));
        self
    }

    /// Restricts the choice to peers that this node trusts ([`Node::trust`]) at the time of the call. The peer itself
    /// has to offer the service.
    #[must_use]
    pub fn trusted(mut self) -> Self {
        self.wanted.trusted = Some(self.node.clone());
        self
    }

    /// Makes calls that transfer much data, on sessions of their own, so that they delay no other calls.
    #[must_use]
    pub fn bulk(mut self) -> Self {
        self.class = Class::Bulk;
        self
    }

    /// Returns the name of the service.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the providers in the order in which they would be called. Looks them up in the DHT.
    pub async fn peers(&self) -> Vec<ServicePeer> {
        self.node.meet().await;
        {
            let _lookup = self.shared.lookup_lock.lock().await;
            self.shared.look_up_providers(false).await;
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

    /// Watches the providers: returns those that [`peers`](Self::peers) would list, and then every change.
    ///
    /// A change is reported within five seconds plus the time of a lookup. A provider that has crashed is reported as
    /// gone when its record expires, after ten minutes at most.
    ///
    /// With [`trusted`](Self::trusted), the list of trusted peers is read once, when the watch begins.
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

    /// Chooses a provider that was not tried yet, and looks for more if there is none.
    async fn choose(&self, tried: &HashSet<PeerId>) -> Option<(Outstanding, Heard)> {
        self.refresh().await;
        if self.is_doubtful(tried) {
            // Another peer may have begun to offer the service.
            let _lookup = self.shared.lookup_lock.lock().await;
            if self.is_doubtful(tried) {
                self.shared.look_up_providers(true).await;
            }
        }
        if let Some(chosen) = self.choose_known(tried) {
            return Some(chosen);
        }
        if !tried.is_empty() {
            return None;
        }
        self.node.meet().await;
        let _lookup = self.shared.lookup_lock.lock().await;
        // Another task may have looked them up meanwhile.
        if let Some(chosen) = self.choose_known(tried) {
            return Some(chosen);
        }
        self.shared.look_up_providers(true).await;
        self.choose_known(tried)
    }

    /// Returns true if all known providers that were not tried have failed recently, and no lookup was made in the
    /// last second.
    fn is_doubtful(&self, tried: &HashSet<PeerId>) -> bool {
        let wanted = self.wanted.now();
        let (state, now) = (lock(&self.shared.offers), Instant::now());
        let lately = |at: Instant| now.duration_since(at) < LOOKUP_INTERVAL;
        let known = state.of.iter();
        let mut known = known
            .filter(|(peer, c)| !tried.contains(peer) && wanted.fits(peer, &c.labels))
            .peekable();
        known.peek().is_some()
            && known.all(|(_, c)| c.is_suspect() || c.avoided(now).is_some())
            && !state.last_lookup.is_some_and(lately)
    }

    fn choose_known(&self, tried: &HashSet<PeerId>) -> Option<(Outstanding, Heard)> {
        let wanted = self.wanted.now();
        let mut state = lock(&self.shared.offers);
        let (peer, addresses) = state.choose(&wanted, tried, Instant::now())?;
        let shared = Arc::clone(&self.shared);
        Some((Outstanding { shared, peer }, addresses))
    }

    /// Refreshes old knowledge: providers in the background, and paths before the call, which needs no network
    /// traffic.
    async fn refresh(&self) {
        let now = Instant::now();
        let (all, paths, watch) = {
            let mut state = lock(&self.shared.offers);
            let old =
                |at: Option<Instant>, than| at.is_some_and(|at| now.duration_since(at) > than);
            let all = old(state.last_full_lookup, MAX_AGE);
            let paths = old(state.paths_refreshed, MAX_PATH_AGE);
            // One task looks at a time.
            if all {
                state.last_full_lookup = Some(now);
            }
            if paths {
                state.paths_refreshed = Some(now);
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
                let _lookup = shared.lookup_lock.lock().await;
                shared.look_up_providers(false).await;
            });
        }
        if paths {
            self.shared.refresh_paths().await;
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
            let (mut tried, mut pauses, mut reach) = (HashSet::new(), Pauses::new(), REACH_TIMEOUT);
            self.shared.retries.called();
            let mut last = None;
            for attempt in 1..=MAX_ATTEMPTS {
                let mut chosen = self.choose(&tried).await;
                if chosen.is_none() && !tried.is_empty() {
                    // All have failed; the first of them may have recovered.
                    tried.clear();
                    sleep(pauses.next()).await;
                    reach *= 2;
                    chosen = self.choose(&tried).await;
                }
                let Some((outstanding, addresses)) = chosen else {
                    return Err(match last {
                        Some(last) => last,
                        None => self.no_provider().await,
                    });
                };
                let peer = outstanding.peer;
                tried.insert(peer);
                tracing::Span::current().record("peer", tracing::field::display(peer));
                let session = timeout(reach, self.session(peer, addresses)).await;
                let was_reached = matches!(session, Ok(Ok(_)));
                let failed = match session {
                    Err(_) => {
                        let text = format!(
                            "cannot reach {peer}: no connection within {} s",
                            reach.as_secs()
                        );
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
                tracing::debug!(%peer, service = self.name, status = %failed, attempt, "call to a service failed");
                let may_go_on = may_ask_another(&failed, &method);
                // A provider that was not reached has not seen the call, so the attempt is not counted as a retry.
                let is_asked_again = may_go_on && (!was_reached || self.shared.retries.take());
                if !is_asked_again {
                    return Err(failed);
                }
                last = Some(failed);
            }
            Err(match last {
                Some(last) => last,
                None => self.no_provider().await,
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
                    "the deadline of the call has passed",
                ))
            }),
        }
    }

    async fn session(&self, peer: PeerId, addresses: Heard) -> Result<Session, Ended> {
        let (network, sessions) = (self.node.network(), self.node.sessions());
        // Dials the addresses in the provider's record, unless it is connected.
        if !sessions.has(peer, self.class) {
            let connected = network.connect(peer, addresses).await;
            connected.map_err(|error| unreached(error.to_string()))?;
        }
        sessions.get(&self.node, peer, self.class).await
    }

    async fn no_provider(&self) -> Ended {
        if let Err(error) = self.node.is_connected().await {
            return unreached(error.to_string());
        }
        let wanted = self.wanted.in_words();
        let own = match self.node.offered().has(&self.name) {
            true => "; this node offers it, but a node cannot call itself",
            false => "",
        };
        unreached(format!("no peer offers {:?}{wanted}{own}", self.name))
    }
}

fn unreached(text: String) -> Ended {
    Ended {
        seen: Some(Seen::No),
        ..Ended::new(Code::Unavailable, text)
    }
}

/// Returns true if the status says something about the peer rather than about the call.
fn is_failure(status: &Ended) -> bool {
    match status.code {
        Code::Unavailable | Code::Unimplemented => true,
        Code::ResourceExhausted => status.seen == Some(Seen::No),
        _ => false,
    }
}

/// Returns true if the call may go to another peer: the failed one has not begun it or lacks the method, or the call
/// may be repeated.
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
    fn a_call_goes_to_another_provider_only_if_it_cannot_take_effect_twice() {
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
