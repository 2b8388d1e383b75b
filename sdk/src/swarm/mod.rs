//! Fetching a model from many providers at once: finding them, connecting to them, and keeping those that deliver.
//!
//! Providers come from a ticket, the DHT, the local network and each other. The swarm connects to a few providers at
//! a time, near ones first. [`Transfer`] decides which chunk groups are requested from each. A provider that fails is
//! tried again later; one that sends wrong bytes is never tried again.

pub(crate) mod bandwidth;
mod failures;
mod hub;
mod path_watch;
pub(crate) mod providers;
mod shown;
pub(crate) mod turns;

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::{Instant, interval, timeout, timeout_at},
};
use weft_blobs::{
    Hash, Plan, Transfer, TransferError, availability, plan,
    rate::Limit,
    transfer::{Peer, QUEUED},
};
use weft_net::{Destinations, PathKind, PeerId, Stream, is_superseded};
use weft_proto::frame::FrameError;

use self::{
    failures::{Backoff, Banned, FIRST_PATIENCE},
    hub::{Link, Linked, News},
    path_watch::SUSPICIOUS,
    shown::{PathUse, Traffic},
};
pub(crate) use self::{
    hub::{Exchanger, Hub, PROTOCOL},
    path_watch::watch,
    shown::Shown,
};
use crate::{
    Error, Failure, Node, Priority, Provider,
    swarm::{
        providers::{KnownProviders, find_providers, reach},
        turns::Rank,
    },
};

/// Returns the span of all work to fetch a model, which groups its log lines.
pub(crate) fn span(model: &Hash) -> tracing::Span {
    tracing::info_span!("transfer", %model)
}

/// The most providers that are fetched from at a time.
const MAX_ACTIVE: usize = 8;

/// The most providers that are remembered. A new provider replaces one that failed.
const MAX_MEMBERS: usize = 128;

/// The most peers per transfer that are tried because other peers named them. A peer that names many useless peers
/// causes no more dials than this.
const MAX_INTRODUCED: u32 = 256;

/// The most addresses kept of a provider.
const MAX_ADDRESSES: usize = 32;

/// The most peers that are dialed at a time only to ask for their bitfields, and the longest time for each. Most of
/// the peers that others name may be gone.
const MAX_REACHING: usize = 16;
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// The most peers on the local network that are asked whether they have the model.
const MAX_NEIGHBOURS: usize = 16;

/// Time to wait for a provider after content has arrived: enough for a restart or a change of network.
const LOST_PATIENCE: Duration = Duration::from_secs(120);

/// The longest time in which nothing at all arrives while providers are connected.
const SILENCE_PATIENCE: Duration = Duration::from_secs(45);

/// Head start of the providers in a ticket before the DHT is asked.
const TICKET_HEAD_START: Duration = Duration::from_millis(1500);

/// The longest pause of a transfer that keeps trying, after it has waited for [`LOST_PATIENCE`].
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Time between lookups while a provider delivers and there is room for more.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(10);

/// Interval at which the state is checked when nothing happens.
const TICK: Duration = Duration::from_millis(250);

/// Number of failures since its last complete chunk group after which single bytes from a provider no longer count as
/// progress: a part of a group is lost with the stream.
const MAX_FRUITLESS: u32 = 3;

/// Time after which a provider that delivers nothing is replaced by a waiting one: if it sends no bytes at all, and
/// if it sends no complete chunk group.
const NO_BYTES_TIMEOUT: Duration = Duration::from_secs(5);
const NO_GROUP_TIMEOUT: Duration = Duration::from_secs(60);

/// Time without content after which a provider that lacked announced groups is asked for all of them again, because
/// they may have arrived there since: at first, and at most. It doubles each time.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Time for streams to end in order once everything is here.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The most changes of path without content in between before a provider counts as having failed.
const MAX_CHANGES: u32 = 3;

/// The most news of peers that may wait to be handled.
const MAX_NEWS: usize = 64;

#[derive(Debug)]
struct Member {
    addresses: Destinations,
    /// True if the provider has announced that it has a part.
    offers: bool,
    /// True if the provider has all of the model, by the DHT, a ticket or its own word.
    complete: bool,
    busy: bool,
    exchanging: bool,
    retry_at: Instant,
    failures: u32,
    changes: u32,
    reason: String,
    /// True if the provider was reached and lacks what it was asked for.
    lacks: bool,
    /// Time without content after which it is asked for that again.
    again: Duration,
    /// Bytes delivered, and the time of the last increase.
    moved: (u64, Instant),
    /// Signs of life: received bytes and keep-alive messages, and the time of the last one.
    alive: (u64, Instant),
    /// Stops the fetch from this provider, in favour of another.
    stop: Arc<Notify>,
    /// The provider's part in the transfer.
    handle: Arc<Peer>,
}

enum Event {
    LookedUp(Result<Vec<Provider>, Error>),
    Reached(PeerId, Result<Box<Stream>, String>),
    Ended(PeerId, Result<(), TransferError>),
    Exchanged(PeerId),
}

pub(crate) struct Swarm {
    node: Node,
    model: Hash,
    transfer: Transfer,
    limits: Vec<Limit>,
    rank: Rank,
    progress: Arc<plan::Progress>,
    shown: Shown,
    members: BTreeMap<PeerId, Member>,
    banned: Banned,
    asked_neighbours: HashSet<PeerId>,
    introduced: u32,
    /// Permits to dial peers only to ask for their bitfields.
    reaching: Arc<Semaphore>,
    work: FuturesUnordered<BoxFuture<'static, Event>>,
    sessions: FuturesUnordered<BoxFuture<'static, Event>>,
    news: mpsc::Receiver<News>,
    _linked: Linked,
    exchanger: Exchanger,
    looking_up: bool,
    look_ups: u32,
    next_look_up: Instant,
    pause: Backoff,
    moved: u64,
    /// Bytes received, of complete chunk groups or not, and the time of the last increase.
    heard: (u64, Instant),
    /// Number of times that a provider reported this node as waiting in its queue.
    queued: u64,
    /// True while transfers of higher priority go first.
    held: bool,
    /// Time of the last sign of progress, or of the start.
    since: Instant,
    patience: Duration,
    /// Never give up; only the pauses grow longer.
    keep_trying: bool,
    /// Time at which the first provider answered.
    pub(crate) first_answer: Option<Instant>,
}

/// A model to fetch for one caller, with its options.
pub(crate) struct Job {
    pub(crate) model: Hash,
    pub(crate) transfer: Transfer,
    pub(crate) progress: Arc<plan::Progress>,
    pub(crate) shown: Shown,
    /// Providers that are known to have all of the model, and banned peers.
    pub(crate) known: KnownProviders,
    pub(crate) limits: Vec<Limit>,
    pub(crate) priority: Priority,
    /// Never give up, however long no provider delivers.
    pub(crate) keep_trying: bool,
}

impl Swarm {
    /// Starts with the providers of the job. Nothing is fetched yet.
    pub(crate) fn new(node: &Node, job: Job) -> Self {
        let Job {
            model,
            transfer,
            progress,
            shown,
            known: KnownProviders { given, banned },
            limits,
            priority,
            keep_trying,
        } = job;
        let (sender, news) = mpsc::channel(MAX_NEWS);
        let exchanger = node.exchanger();
        let link = Link {
            transfer: transfer.clone(),
            news: sender,
        };
        let now = Instant::now();
        let mut swarm = Self {
            node: node.clone(),
            model,
            transfer,
            limits,
            rank: node.ranks().join(priority),
            progress,
            shown,
            members: BTreeMap::new(),
            banned,
            asked_neighbours: HashSet::new(),
            introduced: 0,
            reaching: Arc::new(Semaphore::new(MAX_REACHING)),
            work: FuturesUnordered::new(),
            sessions: FuturesUnordered::new(),
            news,
            _linked: exchanger.hub.link(model, link),
            exchanger,
            looking_up: false,
            look_ups: 0,
            next_look_up: match given.is_empty() {
                true => now,
                false => now + TICKET_HEAD_START,
            },
            pause: Backoff::default(),
            moved: 0,
            heard: (0, now),
            queued: 0,
            held: false,
            since: now,
            patience: FIRST_PATIENCE,
            keep_trying,
            first_answer: None,
        };
        for (peer, addresses) in given {
            swarm.meet(peer, addresses, true);
        }
        swarm
    }

    /// Fetches the content that `plan` lacks.
    ///
    /// # Errors
    /// [`Error::NoProvider`] if no provider delivers for too long; [`Error::Store`] if this node's store fails.
    pub(crate) async fn fetch(&mut self, plan: &mut Plan) -> Result<(), Error> {
        let transfer = self.transfer.clone();
        let mut run = Box::pin(transfer.run(plan));
        let mut tick = interval(TICK);
        self.ask_neighbours().await;
        loop {
            self.start_lookup_if_due();
            self.start_some();
            self.note_progress();
            tokio::select! {
                result = &mut run => {
                    result?;
                    break;
                }
                Some(event) = self.sessions.next() => self.handle(event)?,
                Some(event) = self.work.next() => self.handle(event)?,
                Some(news) = self.news.recv() => self.handle_news(news),
                _ = tick.tick() => {
                    self.ask_neighbours().await;
                    self.handle_silent();
                    if let Err(error) = self.check_patience() {
                        return Err(match &error {
                            Error::NoProvider { failures, .. } if failures.is_empty() => {
                                self.node.not_found(error).await
                            }
                            _ => error,
                        });
                    }
                }
            }
        }
        // Providers see their streams end in order.
        let farewell = Instant::now() + CLOSE_TIMEOUT;
        while let Ok(Some(event)) = timeout_at(farewell, self.sessions.next()).await {
            if let Event::Ended(peer, result) = event {
                self.ended(peer, result);
            }
        }
        self.sessions.clear();
        self.members.values_mut().for_each(|one| one.busy = false);
        self.end_sources();
        Ok(())
    }

    fn end_sources(&self) {
        self.shown.state().sources.iter_mut().for_each(PathUse::end);
    }

    /// Adds a peer that has the model, or may have it.
    fn meet(&mut self, peer: PeerId, addresses: impl Into<Destinations>, complete: bool) {
        if peer == self.node.peer_id() || self.banned.contains(&peer) {
            return;
        }
        if !self.members.contains_key(&peer) && self.members.len() >= MAX_MEMBERS {
            let useless = self.members.iter();
            let is_useless = |one: &Member| {
                !one.complete && !one.exchanging && (one.failures > 0 || !one.offers)
            };
            let useless = useless.filter(|(_, one)| !one.busy && is_useless(one));
            let Some(worst) = useless
                .max_by_key(|(_, one)| one.failures)
                .map(|(peer, _)| *peer)
            else {
                return;
            };
            self.members.remove(&worst);
        }
        let transfer = &self.transfer;
        let member = self.members.entry(peer).or_insert_with(|| Member {
            addresses: Destinations::default(),
            offers: false,
            complete: false,
            busy: false,
            exchanging: false,
            retry_at: Instant::now(),
            failures: 0,
            changes: 0,
            reason: String::new(),
            lacks: false,
            again: ASK_AGAIN.0,
            moved: (0, Instant::now()),
            alive: (0, Instant::now()),
            stop: Arc::default(),
            handle: Arc::new(transfer.join(false, None)),
        });
        let Destinations { given, heard } = addresses.into();
        for address in given {
            let known = &mut member.addresses.given;
            if known.len() < MAX_ADDRESSES && !known.contains(&address) {
                known.push(address);
            }
        }
        member.addresses.hear(heard);
        if complete && !member.complete {
            member.complete = true;
            member.offers = true;
            member.handle.has_all();
        }
        self.note_other_fetchers();
    }

    /// Tells the transfer whether others fetch the same model. Each node then fetches different parts first, so that
    /// they can fetch from each other.
    fn note_other_fetchers(&self) {
        let others = self.members.values().any(|one| one.offers && !one.complete);
        self.transfer.set_contended(others);
    }

    fn handle_news(&mut self, news: News) {
        match news {
            News::Have(peer, have) => {
                self.meet(peer, Destinations::default(), false);
                if let Some(member) = self.members.get_mut(&peer) {
                    member.complete |= have.complete;
                    member.offers |= have.complete || !have.files.is_empty();
                    availability::hear(&member.handle, &have);
                }
                self.note_other_fetchers();
            }
            News::Nothing(peer) => {
                // The peer's record is out of date, or it was only a neighbour.
                let idle = self
                    .members
                    .get(&peer)
                    .is_some_and(|one| !one.busy && !one.offers);
                if idle {
                    self.members.remove(&peer);
                }
            }
            News::Peer(peer, addresses) => {
                let new = !self.members.contains_key(&peer);
                if new && self.introduced >= MAX_INTRODUCED {
                    return;
                }
                self.introduced += u32::from(new);
                self.meet(peer, addresses, false);
                if new && self.members.contains_key(&peer) {
                    self.exchange_with(peer);
                }
            }
        }
    }

    /// Exchanges bitfields with `peer`, and connects to it first.
    fn exchange_with(&mut self, peer: PeerId) {
        let Some(member) = self.members.get_mut(&peer) else {
            return;
        };
        if std::mem::replace(&mut member.exchanging, true) {
            return;
        }
        let (exchanger, model) = (self.exchanger.clone(), self.model);
        let addresses = member.addresses.clone();
        let reaching = Arc::clone(&self.reaching);
        let work = async move {
            let network = &exchanger.network;
            let connected = network.peers().await.iter().any(|one| one.peer == peer);
            let reached = match connected {
                true => true,
                false => {
                    let _permit = reaching.acquire().await;
                    let reached = timeout(REACH_TIMEOUT, network.connect(peer, addresses)).await;
                    matches!(reached, Ok(Ok(_)))
                }
            };
            match reached {
                true => exchanger.dial(peer, model).await,
                false => tracing::debug!(%peer, "cannot reach a peer"),
            }
            Event::Exchanged(peer)
        };
        self.work.push(work.boxed());
    }

    /// Asks peers on the local network whether they have the model, whatever the DHT knows.
    async fn ask_neighbours(&mut self) {
        if self.asked_neighbours.len() >= MAX_NEIGHBOURS {
            return;
        }
        for info in self.node.network().peers().await {
            if info.path.kind <= PathKind::Lan
                && self.asked_neighbours.len() < MAX_NEIGHBOURS
                && !self.banned.contains(&info.peer)
                && self.asked_neighbours.insert(info.peer)
            {
                self.meet(info.peer, Destinations::default(), false);
                self.exchange_with(info.peer);
            }
        }
    }

    fn start_lookup_if_due(&mut self) {
        let now = Instant::now();
        if self.looking_up || now < self.next_look_up || self.sessions.len() >= MAX_ACTIVE {
            return;
        }
        self.looking_up = true;
        let (node, model) = (self.node.clone(), self.model);
        let first = self.look_ups == 0 && self.members.is_empty();
        let work = async move {
            if first {
                node.meet().await;
            }
            Event::LookedUp(find_providers(&node, &model, false).await)
        };
        self.work.push(work.boxed());
    }

    /// Connects to providers that offer something, the best first, up to the limit.
    fn start_some(&mut self) {
        let now = Instant::now();
        let busy = self.members.values().filter(|one| one.busy).count();
        let idle = self.members.iter();
        let idle = idle.filter(|(_, one)| !one.busy && one.offers && one.retry_at <= now);
        let mut idle: Vec<_> = idle
            .map(|(peer, one)| (one.failures, !one.complete, *peer))
            .collect();
        idle.sort();
        for (_, _, peer) in idle.into_iter().take(MAX_ACTIVE.saturating_sub(busy)) {
            let Some(member) = self.members.get_mut(&peer) else {
                continue;
            };
            member.busy = true;
            let (node, addresses) = (self.node.clone(), member.addresses.clone());
            let work = async move {
                Event::Reached(peer, reach(&node, peer, addresses).await.map(Box::new))
            }
            .boxed();
            self.work.push(work);
        }
    }

    /// Asks silent providers again for what they lacked. If all slots are in use, replaces a useless provider by a
    /// waiting one.
    fn handle_silent(&mut self) {
        let now = Instant::now();
        let waits_for_us = self.held || self.transfer.is_idle();
        let mut busy = 0;
        for member in self.members.values_mut().filter(|one| one.busy) {
            busy += 1;
            let moved = member.handle.delivered();
            if moved != member.moved.0 {
                member.moved = (moved, now);
                member.again = ASK_AGAIN.0;
            }
            let alive = member.handle.arrivals().signs();
            if alive != member.alive.0 {
                member.alive = (alive, now);
            }
            if let Some(unreadable) = member.handle.unreadable() {
                member.lacks = true;
                member.reason = unreadable.to_string();
            }
            // Not with each of its streams: if it were asked first for what it lacks each time, it would never send
            // the rest.
            let silent = now.duration_since(member.moved.1) >= member.again;
            if member.complete && member.lacks && silent && !waits_for_us {
                member.handle.has_all();
                member.again = (member.again * 2).min(ASK_AGAIN.1);
            }
        }
        let others = self.members.values();
        let mut others = others.filter(|one| !one.busy && one.offers && one.failures == 0);
        if busy < MAX_ACTIVE || self.held || others.next().is_none() {
            return;
        }
        let useless = self.members.values().filter(|one| one.busy);
        let useless = useless.filter(|one| {
            now.duration_since(one.moved.1) >= NO_GROUP_TIMEOUT
                || now.duration_since(one.alive.1) >= NO_BYTES_TIMEOUT
        });
        if let Some(member) = useless.min_by_key(|one| one.moved.1) {
            member.stop.notify_one();
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::LookedUp(found) => {
                self.looking_up = false;
                self.look_ups += 1;
                for provider in found? {
                    let complete = provider.shards.is_none();
                    self.meet(provider.peer, provider.addresses, complete);
                    if !complete {
                        self.exchange_with(provider.peer);
                    }
                }
                let longest = match self.keep_trying && self.since.elapsed() >= LOST_PATIENCE {
                    true => LONGEST_PAUSE,
                    false => Backoff::LONGEST,
                };
                let pause = self.pause.take(longest);
                let pause = match self.sessions.is_empty() {
                    true => pause,
                    false => LOOKUP_INTERVAL,
                };
                self.next_look_up = Instant::now() + pause;
            }
            Event::Reached(peer, Ok(stream)) => self.begin(peer, *stream),
            Event::Reached(peer, Err(reason)) => {
                tracing::debug!(%peer, reason, "cannot reach a provider");
                if let Some(member) = self.members.get_mut(&peer) {
                    member.lacks = false;
                }
                self.failed(peer, reason);
            }
            // This node failed, so no other provider can help.
            Event::Ended(_, Err(TransferError::Store(error))) => return Err(error.into()),
            Event::Ended(peer, result) => self.ended(peer, result),
            Event::Exchanged(peer) => {
                if let Some(member) = self.members.get_mut(&peer) {
                    member.exchanging = false;
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, peer: PeerId, mut stream: Stream) {
        let Some(member) = self.members.get_mut(&peer) else {
            return;
        };
        self.first_answer.get_or_insert_with(Instant::now);
        // A relayed path is used from the first byte, and left as soon as there is a direct one.
        stream.yield_to_better_path();
        let path = stream.path().clone();
        let handle = Arc::clone(&member.handle);
        handle.set_path(path.kind == PathKind::Relayed, None);
        self.shown.state().sources.push(PathUse {
            peer,
            path: path.kind,
            transport: path.transport,
            traffic: Traffic::Active {
                before: handle.moved(),
                handle: Arc::clone(&handle),
            },
        });
        let (node, transfer) = (self.node.clone(), self.transfer.clone());
        member.moved = (handle.delivered(), Instant::now());
        member.alive = (handle.arrivals().signs(), Instant::now());
        let stop = Arc::new(Notify::new());
        member.stop = Arc::clone(&stop);
        let mut limits = self.limits.clone();
        limits.extend(node.bandwidth().download_of(peer));
        let session = async move {
            let result = tokio::select! {
                result = transfer.fetch(&handle, stream, &limits) => result,
                () = stop.notified() => Err(TransferError::Replaced),
                never = watch(&node, peer, handle.arrivals()) => match never {},
            };
            Event::Ended(peer, result)
        };
        self.sessions.push(session.boxed());
        self.exchange_with(peer);
    }

    fn ended(&mut self, peer: PeerId, result: Result<(), TransferError>) {
        let mut sent = 0;
        for source in &mut self.shown.state().sources {
            if source.peer == peer && source.is_active() {
                sent = source.bytes();
                source.end();
            }
        }
        let Some(member) = self.members.get_mut(&peer) else {
            return;
        };
        if sent > 0 {
            member.failures = 0;
            member.changes = 0;
        }
        match result {
            Ok(()) => member.busy = false,
            Err(TransferError::Frame(FrameError::Io(error)))
                if is_superseded(&error) && member.changes < MAX_CHANGES =>
            {
                tracing::debug!(%peer, "going on over a better path");
                member.changes += 1;
                member.busy = false;
                member.retry_at = Instant::now();
            }
            Err(error) if self.banned.judge(peer, &error) => _ = self.members.remove(&peer),
            Err(error) => {
                let lacks = matches!(error, TransferError::Missing(_));
                member.lacks = lacks || member.handle.unreadable().is_some();
                self.failed(peer, error.to_string());
            }
        }
    }

    fn failed(&mut self, peer: PeerId, reason: String) {
        if let Some(member) = self.members.get_mut(&peer) {
            member.busy = false;
            member.failures += 1;
            member.reason = reason;
            // A transfer that never gives up asks less often after a while.
            let longest = match self.keep_trying && self.since.elapsed() >= LOST_PATIENCE {
                true => LONGEST_PAUSE,
                false => Backoff::LONGEST,
            };
            member.retry_at = Instant::now() + Backoff::after(member.failures, longest);
        }
        // The given providers are unreliable; others may be known.
        self.next_look_up = self.next_look_up.min(Instant::now() + self.pause.current());
    }

    fn note_progress(&mut self) {
        let moved = self.progress.moved.load(Ordering::Relaxed)
            + self.progress.reused.load(Ordering::Relaxed);
        self.held = self.rank.is_outranked() && !self.transfer.is_urged();
        self.transfer.hold_back(self.held);
        if self.held || self.transfer.is_idle() || self.transfer.is_limited() {
            // Nothing is requested, so no provider is late.
            self.since = Instant::now();
        }
        let heard = self.transfer.heard();
        let mut busy = self.members.values().filter(|member| member.busy);
        if heard > self.heard.0 && busy.any(|member| member.failures < MAX_FRUITLESS) {
            // On a slow link a chunk group takes long, so any byte counts as progress here. Only complete groups are
            // kept.
            self.heard = (heard, Instant::now());
            self.since = Instant::now();
            self.patience = self.patience.max(SILENCE_PATIENCE);
        }
        let queued = self.transfer.queued();
        if queued > self.queued {
            self.queued = queued;
            // A provider's keep-alive messages extend the patience only for a limited time.
            if self.heard.1.elapsed() < QUEUED {
                self.since = Instant::now();
                self.patience = LOST_PATIENCE;
            }
        }
        if moved > self.moved {
            self.moved = moved;
            self.rank.note();
            self.since = Instant::now();
            self.patience = LOST_PATIENCE;
            self.pause = Backoff::default();
        }
        let waiting_for = match self.sessions.is_empty() {
            _ if self.held => Some("a transfer of higher priority".to_owned()),
            false if self.since.elapsed() < SUSPICIOUS => None,
            false => Some(self.waits_for_content()),
            true => Some(self.waits_for_provider()),
        };
        self.shown.state().waiting_for = waiting_for;
    }

    fn waits_for_provider(&self) -> String {
        let failed = self.members.iter().find(|(_, one)| !one.reason.is_empty());
        match failed {
            Some((peer, one)) => format!("a provider ({peer}: {})", one.reason),
            None => "a provider".to_owned(),
        }
    }

    fn waits_for_content(&self) -> String {
        let active = self.shown.sources();
        let mut active = active.iter().filter(|source| source.is_active());
        match (active.next(), active.next()) {
            (Some(one), None) if one.is_queued() => {
                format!(
                    "its turn: the provider {} serves other peers first",
                    one.peer
                )
            }
            (Some(one), None) => format!("content from {}", one.peer),
            (Some(one), Some(other)) if one.is_queued() && other.is_queued() => {
                "its turn: the providers serve other peers first".to_owned()
            }
            _ => "content: no connected provider sends the missing parts".to_owned(),
        }
    }

    /// Returns true if a round trip on one of the paths in use takes seconds.
    fn is_slow(&self) -> bool {
        let mut members = self.members.values();
        members.any(|member| member.busy && member.handle.arrivals().is_slow())
    }

    /// Gives up if no provider delivers for too long. Every known provider has been tried by then.
    fn check_patience(&mut self) -> Result<(), Error> {
        let waited = self.since.elapsed();
        // Providers that failed are tried again and again, so only those that were not tried yet are waited for.
        let reaching = self
            .members
            .values()
            .any(|one| one.busy && one.failures == 0);
        let trying = reaching || self.looking_up || self.look_ups == 0;
        let nobody = !self.banned.is_empty() && self.members.is_empty();
        // All known providers were reached and lack the rest: waiting would not help.
        let mut offering = self.members.values().filter(|one| one.offers).peekable();
        let all_lack = offering.peek().is_some() && offering.all(|one| one.lacks);
        let patience = match all_lack {
            true => FIRST_PATIENCE,
            false => self.patience,
        };
        let over = match self.sessions.is_empty() {
            true => !trying && (waited >= patience || nobody),
            false if all_lack => waited >= FIRST_PATIENCE,
            false if self.is_slow() => waited >= LOST_PATIENCE,
            false => waited >= self.patience.max(SILENCE_PATIENCE),
        };
        if !over || self.keep_trying {
            return Ok(());
        }
        let mut failures: BTreeMap<PeerId, String> = self.banned.reasons();
        for (peer, one) in &self.members {
            let reason = match (one.reason.is_empty(), one.busy) {
                (false, _) => one.reason.clone(),
                (true, true) if one.handle.is_queued() => {
                    "its queue is too long: it serves other peers first".to_owned()
                }
                (true, true) => "sends none of the missing parts".to_owned(),
                (true, false) => continue,
            };
            failures.insert(*peer, reason);
        }
        let failures = failures
            .into_iter()
            .map(|(peer, reason)| Failure { peer, reason });
        Err(Error::NoProvider {
            model: self.model,
            failures: failures.collect(),
        })
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.end_sources();
    }
}
