//! Finding and reaching those who have a model, until one of them has sent its manifest; from then on there is a [swarm](crate::swarm).

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use prost::Message;
use tokio::time::sleep;
use weft_blobs::{Hash, TransferError};
use weft_net::{Class, Destinations, Heard, Multiaddr, PeerId, Stream, StreamProtocol};
use weft_proto::wire;

use super::failures::{Backoff, Banned, FIRST};
use crate::{Error, Failure, Node, discovery::addresses::decode};

/// The transfer protocol's name on the network.
pub(crate) const BLOBS: StreamProtocol = StreamProtocol::new(weft_blobs::serve::PROTOCOL);

/// The key under which providers of a model state where they are.
pub(crate) fn provider_key(id: &Hash) -> Vec<u8> {
    format!("provider/{id}").into_bytes()
}

/// A peer that says it has a model, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// Who.
    pub peer: PeerId,
    /// Where it says that it is.
    pub addresses: Heard,
    /// The shard groups that it says it has, where it has not all of them: bit `g` for group `g` ([`Manifest::shard_group`](crate::Manifest::shard_group)).
    pub shards: Option<u64>,
    /// There is a connection to it.
    pub connected: bool,
    /// How long its word holds.
    pub remaining: Duration,
}

/// Providers tried in a round.
const MAX_PROVIDERS: usize = 32;

/// Providers connected to at a time; the first that answers is used.
const RACE: usize = 4;

/// When none of them has answered within this time, as many others are tried beside them, up to so many in all: where
/// nodes come and go, most of those that are listed may be dead, and a dial of a dead one takes long to fail.
const STAGGER: Duration = Duration::from_millis(500);
const MAX_RACE: usize = 16;

/// Goes through a model's providers, round after round, until one finishes the work or patience ends.
#[derive(Debug)]
pub(crate) struct Providers {
    node: Node,
    model: Hash,
    /// From a ticket. The first round is theirs alone: they need no look-up.
    given: Vec<(PeerId, Vec<Multiaddr>)>,
    queue: VecDeque<(PeerId, Destinations)>,
    /// Being reached.
    racing: Vec<(PeerId, Destinations)>,
    failures: BTreeMap<PeerId, Failed>,
    /// Sent wrong bytes: never asked again.
    banned: Banned,
    /// Asked, and has neither failed nor finished.
    busy: HashSet<PeerId>,
    /// The first in the queue has proved to be a good one.
    succeeded: bool,
    since: Instant,
    pause: Backoff,
    /// Rounds begun since the last progress.
    rounds: u32,
    /// Those who were not tried yet are looked for, whatever patience says.
    look_again: bool,
}

/// What is known of a model's providers before content is fetched.
#[derive(Debug, Default)]
pub(crate) struct KnownProviders {
    /// Who has it, and where they are.
    pub(crate) given: Vec<(PeerId, Vec<Multiaddr>)>,
    /// Those that are never asked.
    pub(crate) banned: Banned,
}

#[derive(Debug, Default)]
struct Failed {
    times: u32,
    reason: String,
}

impl Providers {
    pub(crate) fn new(node: Node, model: Hash, given: Vec<(PeerId, Vec<Multiaddr>)>) -> Self {
        Self {
            node,
            model,
            given,
            queue: VecDeque::new(),
            racing: Vec::new(),
            failures: BTreeMap::new(),
            banned: Banned::default(),
            busy: HashSet::new(),
            succeeded: false,
            since: Instant::now(),
            pause: Backoff::default(),
            rounds: 0,
            look_again: false,
        }
    }

    /// A stream to the next provider; not to one that is still at work. It may be dropped while it is waited for: nobody is passed over.
    ///
    /// # Errors
    /// [`Error::NoProvider`] when patience has ended, with what each one did. Every provider that is known has been tried by then.
    pub(crate) async fn next(&mut self) -> Result<Stream, Error> {
        self.succeeded = false;
        if self.look_again {
            let mut others = self.look_up().await?;
            others.retain(|(peer, _)| !self.failures.contains_key(peer));
            self.queue.extend(others);
            self.look_again = false;
        }
        loop {
            if let Some(stream) = self.race().await {
                self.busy.insert(stream.peer());
                return Ok(stream);
            }
            let all_banned = !self.failures.is_empty()
                && self.failures.keys().all(|peer| self.banned.contains(peer));
            // The ticket's own round does not count: the mesh may know more.
            if self.rounds >= 2 && (self.since.elapsed() >= FIRST || all_banned) {
                return Err(self.exhausted().await);
            }
            if self.rounds >= 2 {
                sleep(self.pause.current()).await;
                self.pause.take(Backoff::LONGEST);
            }
            self.queue = match self.rounds {
                0 => self.given(),
                _ => self.look_up().await?,
            };
            self.rounds += 1;
        }
    }

    /// The mesh is asked for others once more before patience ends.
    pub(crate) fn look_again(&mut self) {
        self.look_again = true;
    }

    /// `peer` has just proved to be a good one: it comes next, and patience begins anew.
    pub(crate) fn succeeded(&mut self, peer: PeerId) {
        self.failures.remove(&peer);
        self.busy.remove(&peer);
        // We are connected to it: no addresses are needed.
        self.queue.push_front((peer, Destinations::default()));
        self.succeeded = true;
    }

    /// Notes why `peer` did not finish the work.
    pub(crate) fn failed(&mut self, peer: PeerId, error: &TransferError) {
        self.busy.remove(&peer);
        self.banned.judge(peer, error);
        self.note(peer, error.to_string());
    }

    /// Whom it has found to answer, and who sent wrong bytes, each with what it did.
    pub(crate) fn into_known(self) -> KnownProviders {
        let mut good = self.given;
        // It is connected: what was heard of where it is need not be told.
        let answered = self.queue.into_iter().take(1).filter(|_| self.succeeded);
        good.extend(answered.map(|(peer, at)| (peer, at.given)));
        good.retain(|(peer, _)| !self.banned.contains(peer));
        KnownProviders {
            given: good,
            banned: self.banned,
        }
    }

    /// The ticket's peers, at the addresses that it names.
    fn given(&self) -> VecDeque<(PeerId, Destinations)> {
        let given = self.given.iter().cloned();
        given.map(|(peer, at)| (peer, at.into())).collect()
    }

    fn note(&mut self, peer: PeerId, reason: String) {
        let failed = self.failures.entry(peer).or_default();
        failed.times += 1;
        failed.reason = reason;
    }

    async fn exhausted(&self) -> Error {
        let failures = self.failures.iter();
        let failures = failures.map(|(peer, failed)| Failure {
            peer: *peer,
            reason: failed.reason.clone(),
        });
        let error = Error::NoProvider {
            model: self.model,
            failures: failures.collect(),
        };
        match self.failures.is_empty() {
            true => self.node.not_found(error).await,
            false => error,
        }
    }

    /// Goes through the queue, a few at a time; the first stream that opens. Those that were not waited for stay in the queue.
    async fn race(&mut self) -> Option<Stream> {
        let mut running = FuturesUnordered::new();
        self.back_to_queue();
        let mut places = RACE;
        loop {
            while running.len() < places
                && let Some((peer, addresses)) = self.queue.pop_front()
            {
                if self.banned.contains(&peer) || self.busy.contains(&peer) {
                    continue;
                }
                self.racing.push((peer, addresses.clone()));
                let node = self.node.clone();
                running.push(async move { (peer, reach(&node, peer, addresses).await) });
            }
            let (peer, result) = tokio::select! {
                ended = running.next() => ended?,
                () = sleep(STAGGER), if places < MAX_RACE && !self.queue.is_empty() => {
                    places += RACE;
                    continue;
                }
            };
            self.racing.retain(|(other, _)| *other != peer);
            match result {
                Ok(stream) => {
                    self.back_to_queue();
                    return Some(stream);
                }
                Err(reason) => {
                    tracing::debug!(%peer, reason, "a provider cannot be reached");
                    self.note(peer, reason);
                }
            }
        }
    }

    /// Those who were being reached come first again.
    fn back_to_queue(&mut self) {
        for candidate in self.racing.drain(..).rev() {
            self.queue.push_front(candidate);
        }
    }

    /// Whom to try: the ticket's peers and the DHT's, those that failed least and that we are connected to first.
    async fn look_up(&mut self) -> Result<VecDeque<(PeerId, Destinations)>, Error> {
        if self.given.is_empty() {
            self.node.meet().await;
        }
        let mut found = Vec::from(self.given());
        let mut partial = HashSet::new();
        for provider in find_providers(&self.node, &self.model, false).await? {
            let peer = provider.peer;
            if provider.shards.is_some() {
                partial.insert(peer);
            }
            match found.iter_mut().find(|(known, _)| *known == peer) {
                Some((_, known)) => known.hear(provider.addresses),
                None => found.push((peer, provider.addresses.into())),
            }
        }
        let own = self.node.peer_id();
        found.retain(|(peer, _)| *peer != own && !self.banned.contains(peer));
        let connected = connected(&self.node).await;
        found.sort_by_key(|(peer, _)| {
            let failures = self.failures.get(peer).map_or(0, |failed| failed.times);
            // Who has all of it needs no other.
            (failures, partial.contains(peer), !connected.contains(peer))
        });
        found.truncate(MAX_PROVIDERS);
        Ok(found.into())
    }
}

async fn connected(node: &Node) -> HashSet<PeerId> {
    node.peers().await.iter().map(|info| info.peer).collect()
}

/// Who says that it has a model, or a part of it; `all` of those that can be found, or some. Not this node.
///
/// # Errors
/// [`Error::Stopped`].
pub(crate) async fn find_providers(
    node: &Node,
    model: &Hash,
    all: bool,
) -> Result<Vec<Provider>, Error> {
    let key = provider_key(model);
    let records = match all {
        true => node.dht().get(&key).await?,
        false => node.dht().get_some(&key).await?,
    };
    let own = node.peer_id();
    let connected = connected(node).await;
    let providers = records.iter().filter_map(|record| {
        let claim = wire::ProviderClaim::decode(record.value()?).ok()?;
        let peer = record.publisher();
        let is_claim = record.subkey().is_empty() && peer != own;
        is_claim.then(|| Provider {
            peer,
            addresses: decode(&claim.addresses),
            shards: (claim.shards != 0).then_some(claim.shards),
            connected: connected.contains(&peer),
            remaining: record.remaining(),
        })
    });
    Ok(providers.collect())
}

pub(crate) async fn reach(
    node: &Node,
    peer: PeerId,
    addresses: impl Into<Destinations>,
) -> Result<Stream, String> {
    let network = node.network();
    network
        .connect(peer, addresses)
        .await
        .map_err(|error| error.to_string())?;
    network
        .open(peer, BLOBS, Class::Bulk)
        .await
        .map_err(|error| error.to_string())
}
