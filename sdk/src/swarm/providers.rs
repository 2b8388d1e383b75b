//! Finding and reaching providers of a model, until one of them has sent the manifest. After that, the
//! [swarm](crate::swarm) takes over.

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

use super::failures::{Backoff, Banned, FIRST_PATIENCE};
use crate::{Error, Failure, Node, discovery::addresses::decode};

/// Name of the transfer protocol on the network.
pub(crate) const BLOBS: StreamProtocol = StreamProtocol::new(weft_blobs::serve::PROTOCOL);

/// Returns the key in the DHT under which providers of a model publish their addresses.
pub(crate) fn provider_key(id: &Hash) -> Vec<u8> {
    format!("provider/{id}").into_bytes()
}

/// A peer that claims to provide a model or a part of it; see [`Models::providers`](crate::Models::providers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provider {
    /// The provider.
    pub peer: PeerId,
    /// Unverified addresses from the provider's record.
    pub addresses: Heard,
    /// Shard groups that the provider claims to have: bit `g` stands for group `g`
    /// ([`Manifest::shard_group`](crate::Manifest::shard_group)). `None` if it claims to have the whole model.
    pub shards: Option<u64>,
    /// True if this node is connected to the provider.
    pub connected: bool,
    /// Time until the provider's record expires.
    pub remaining: Duration,
}

/// The most providers that are tried in a round.
const MAX_PROVIDERS: usize = 32;

/// Number of providers that are dialed at a time; the first that answers is used.
const RACE: usize = 4;

/// Time without an answer after which as many other providers are dialed beside the first ones, and the most dials in
/// all. Most listed providers may be dead where nodes come and go, and a dial of a dead peer takes long to fail.
const STAGGER: Duration = Duration::from_millis(500);
const MAX_RACE: usize = 16;

/// Tries a model's providers, round after round, until one finishes the work or patience ends.
#[derive(Debug)]
pub(crate) struct Providers {
    node: Node,
    model: Hash,
    /// Providers from a ticket. The first round is for them alone, because they need no lookup.
    given: Vec<(PeerId, Vec<Multiaddr>)>,
    queue: VecDeque<(PeerId, Destinations)>,
    /// Providers that are being dialed.
    racing: Vec<(PeerId, Destinations)>,
    failures: BTreeMap<PeerId, Failed>,
    /// Peers that sent wrong bytes and are never asked again.
    banned: Banned,
    /// Providers that were asked, and have neither failed nor finished.
    busy: HashSet<PeerId>,
    /// True if the first provider in the queue has finished its work.
    succeeded: bool,
    since: Instant,
    pause: Backoff,
    /// Number of rounds begun since the last progress.
    rounds: u32,
    /// Set to look up providers that were not tried yet, even if patience has ended.
    look_again: bool,
}

/// The known providers of a model, before content is fetched.
#[derive(Debug, Default)]
pub(crate) struct KnownProviders {
    /// Providers that have the model, with addresses.
    pub(crate) given: Vec<(PeerId, Vec<Multiaddr>)>,
    /// Peers that are never asked.
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

    /// Returns a stream to the next provider, except one that is still at work. Cancel safe: if the future is
    /// dropped, no provider is skipped.
    ///
    /// # Errors
    /// [`Error::NoProvider`] when patience has ended, with each provider's last failure. Every known provider has
    /// been tried by then.
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
            // The ticket's own round does not count, because the DHT may know more providers.
            if self.rounds >= 2 && (self.since.elapsed() >= FIRST_PATIENCE || all_banned) {
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

    /// Looks up other providers once more before patience ends.
    pub(crate) fn look_again(&mut self) {
        self.look_again = true;
    }

    /// Notes that `peer` has finished its work. It comes next, and patience begins anew.
    pub(crate) fn succeeded(&mut self, peer: PeerId) {
        self.failures.remove(&peer);
        self.busy.remove(&peer);
        // The peer is connected, so no addresses are needed.
        self.queue.push_front((peer, Destinations::default()));
        self.succeeded = true;
    }

    /// Notes that `peer` has failed, with the reason.
    pub(crate) fn failed(&mut self, peer: PeerId, error: &TransferError) {
        self.busy.remove(&peer);
        self.banned.judge(peer, error);
        self.note(peer, error.to_string());
    }

    /// Returns the provider that has answered, the given ones, and the banned peers.
    pub(crate) fn into_known(self) -> KnownProviders {
        let mut good = self.given;
        // The provider is connected, so its unverified addresses are not needed.
        let answered = self.queue.into_iter().take(1).filter(|_| self.succeeded);
        good.extend(answered.map(|(peer, at)| (peer, at.given)));
        good.retain(|(peer, _)| !self.banned.contains(peer));
        KnownProviders {
            given: good,
            banned: self.banned,
        }
    }

    /// Returns the ticket's peers, with the ticket's addresses.
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

    /// Dials the providers in the queue, a few at a time. Returns the first stream that opens. Dials that were not
    /// finished go back to the queue.
    async fn race(&mut self) -> Option<Stream> {
        let mut running = FuturesUnordered::new();
        self.back_to_queue();
        let mut slots = RACE;
        loop {
            while running.len() < slots
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
                () = sleep(STAGGER), if slots < MAX_RACE && !self.queue.is_empty() => {
                    slots += RACE;
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
                    tracing::debug!(%peer, reason, "cannot reach a provider");
                    self.note(peer, reason);
                }
            }
        }
    }

    /// Puts the providers that were being dialed back to the front of the queue.
    fn back_to_queue(&mut self) {
        for candidate in self.racing.drain(..).rev() {
            self.queue.push_front(candidate);
        }
    }

    /// Returns the providers to try, from the ticket and the DHT. Those with the fewest failures come first, and
    /// connected ones before others.
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
            // A provider with the whole model needs no other.
            (failures, partial.contains(peer), !connected.contains(peer))
        });
        found.truncate(MAX_PROVIDERS);
        Ok(found.into())
    }
}

async fn connected(node: &Node) -> HashSet<PeerId> {
    node.peers().await.iter().map(|info| info.peer).collect()
}

/// Finds providers of a model or a part of it in the DHT: all that can be found, or some. This node is left out.
///
/// # Errors
/// [`Error::Stopped`] after a shutdown.
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
