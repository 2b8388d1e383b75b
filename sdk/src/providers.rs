//! Finding and reaching those who have a model.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use prost::Message;
use tokio::time::sleep;
use weft_blobs::{Hash, TransferError};
use weft_net::{Class, Multiaddr, PeerId, Stream};
use weft_proto::wire;

use crate::{
    Error, Failure, Node, Provider, announce::provider_key, node::BLOBS, whereabouts::decode,
};

/// How long to look for a first provider that answers: long enough for one that is just starting, short for a person who waits.
const FIRST: Duration = Duration::from_secs(10);

/// How long to wait for a provider once content has come: a restart, a change of network.
const LOST: Duration = Duration::from_secs(120);

/// The first and the longest pause between rounds over the known providers.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Providers tried in a round.
const MAX_PROVIDERS: usize = 32;

/// Changes of path without content in between that a provider may make before others are asked first.
const MAX_CHANGES: u32 = 3;

/// Providers connected to at a time; the first that answers is used.
const RACE: usize = 4;

/// Goes through a model's providers, round after round, until one finishes the work or patience ends.
#[derive(Debug)]
pub(crate) struct Providers {
    node: Node,
    model: Hash,
    /// From a ticket. The first round is theirs alone: they need no look-up.
    given: Vec<(PeerId, Vec<Multiaddr>)>,
    queue: VecDeque<(PeerId, Vec<Multiaddr>)>,
    failures: BTreeMap<PeerId, Failed>,
    /// Sent wrong bytes: never asked again.
    banned: HashSet<PeerId>,
    /// The shard groups that are to be fetched, as far as that is known.
    missing: u64,
    /// Content that had arrived at the last progress.
    moved: u64,
    since: Instant,
    patience: Duration,
    pause: Duration,
    /// Rounds begun since the last progress.
    rounds: u32,
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
            failures: BTreeMap::new(),
            banned: HashSet::new(),
            missing: u64::MAX,
            moved: 0,
            since: Instant::now(),
            patience: FIRST,
            pause: PAUSE.0,
            rounds: 0,
        }
    }

    /// A stream to the next provider. `moved` is the content that has arrived so far: progress renews the patience.
    ///
    /// # Errors
    /// [`Error::NoProvider`] when patience has ended, with what each one did. Every provider that is known has been tried by then.
    pub(crate) async fn next(&mut self, moved: u64) -> Result<Stream, Error> {
        if moved > self.moved {
            self.moved = moved;
            self.patience = LOST;
            self.renew();
        }
        loop {
            if let Some(stream) = self.race().await {
                return Ok(stream);
            }
            let all_banned = !self.failures.is_empty()
                && self.failures.keys().all(|peer| self.banned.contains(peer));
            // The ticket's own round does not count: the mesh may know more.
            if self.rounds >= 2 && (self.since.elapsed() >= self.patience || all_banned) {
                return Err(self.exhausted());
            }
            if self.rounds >= 2 {
                sleep(self.pause).await;
                self.pause = (self.pause * 2).min(PAUSE.1);
            }
            self.rounds += 1;
            self.queue = if self.rounds == 1 {
                self.given.clone().into()
            } else {
                self.look_up().await?
            };
        }
    }

    /// Which shard groups are to be fetched: who has none of them is not asked.
    pub(crate) fn set_missing(&mut self, shards: u64) {
        self.missing = shards;
    }

    /// `peer` has just proved to be a good one: it comes next, and patience begins anew.
    pub(crate) fn succeeded(&mut self, peer: PeerId) {
        self.failures.remove(&peer);
        // We are connected to it: no addresses are needed.
        self.queue.push_front((peer, Vec::new()));
        self.renew();
    }

    /// There is a better path to `peer`: it comes next. If content had come, patience begins anew; otherwise it may do so a few times.
    pub(crate) fn superseded(&mut self, peer: PeerId, content: bool) {
        if content {
            self.failures.remove(&peer);
            self.renew();
        } else {
            self.note(
                peer,
                "left one path for another without sending anything".to_owned(),
            );
            if self.failures[&peer].times > MAX_CHANGES {
                return;
            }
        }
        // We are connected to it: no addresses are needed.
        self.queue.push_front((peer, Vec::new()));
    }

    /// Patience begins anew: what took the time since was not a provider.
    pub(crate) fn renew(&mut self) {
        self.since = Instant::now();
        self.pause = PAUSE.0;
        // The next look-up is the mesh's.
        self.rounds = 1;
    }

    /// Notes why `peer` did not finish the work.
    pub(crate) fn failed(&mut self, peer: PeerId, error: &TransferError) {
        if error.is_provider_wrong() {
            tracing::warn!(%peer, %error, "a provider is not asked again");
            self.banned.insert(peer);
        } else {
            tracing::debug!(%peer, %error, "a provider did not finish");
        }
        self.note(peer, error.to_string());
    }

    /// What is being waited for, in words.
    pub(crate) fn waiting_for(&self) -> String {
        match self.failures.iter().next_back() {
            Some((peer, failed)) => format!("a provider ({peer}: {})", failed.reason),
            None => "a provider".to_owned(),
        }
    }

    fn note(&mut self, peer: PeerId, reason: String) {
        let failed = self.failures.entry(peer).or_default();
        failed.times += 1;
        failed.reason = reason;
    }

    fn exhausted(&self) -> Error {
        Error::NoProvider {
            model: self.model,
            failures: self
                .failures
                .iter()
                .map(|(peer, failed)| Failure {
                    peer: *peer,
                    reason: failed.reason.clone(),
                })
                .collect(),
        }
    }

    /// Goes through the queue, a few at a time; the first stream that opens. Those that were not waited for stay in the queue.
    async fn race(&mut self) -> Option<Stream> {
        let mut running = FuturesUnordered::new();
        let mut waiting: Vec<(PeerId, Vec<Multiaddr>)> = Vec::new();
        loop {
            while running.len() < RACE
                && let Some((peer, addresses)) = self.queue.pop_front()
            {
                if self.banned.contains(&peer) {
                    continue;
                }
                waiting.push((peer, addresses.clone()));
                let node = self.node.clone();
                running.push(async move { (peer, reach(&node, peer, addresses).await) });
            }
            let (peer, result) = running.next().await?;
            waiting.retain(|(other, _)| *other != peer);
            match result {
                Ok(stream) => {
                    for candidate in waiting.into_iter().rev() {
                        self.queue.push_front(candidate);
                    }
                    return Some(stream);
                }
                Err(reason) => {
                    tracing::debug!(%peer, reason, "a provider cannot be reached");
                    self.note(peer, reason);
                }
            }
        }
    }

    /// Whom to try: the ticket's peers and the DHT's, those that failed least and that we are connected to first.
    async fn look_up(&mut self) -> Result<VecDeque<(PeerId, Vec<Multiaddr>)>, Error> {
        if self.given.is_empty() {
            self.node.meet().await;
        }
        let mut found: Vec<(PeerId, Vec<Multiaddr>)> = self.given.clone();
        let mut partial = HashMap::new();
        for provider in find_providers(&self.node, &self.model, false).await? {
            let peer = provider.peer;
            if let Some(shards) = provider.shards {
                partial.insert(peer, shards);
            }
            match found.iter_mut().find(|(known, _)| *known == peer) {
                Some((_, known)) => known.extend(provider.addresses),
                None => found.push((peer, provider.addresses)),
            }
        }
        let own = self.node.peer_id();
        let missing = self.missing;
        let is_of_use =
            |peer: &PeerId| partial.get(peer).is_none_or(|shards| shards & missing != 0);
        found.retain(|(peer, _)| *peer != own && !self.banned.contains(peer) && is_of_use(peer));
        let connected = connected(&self.node).await;
        found.sort_by_key(|(peer, _)| {
            let failures = self.failures.get(peer).map_or(0, |failed| failed.times);
            // Who has all of it needs no other.
            (
                failures,
                partial.contains_key(peer),
                !connected.contains(peer),
            )
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

async fn reach(node: &Node, peer: PeerId, addresses: Vec<Multiaddr>) -> Result<Stream, String> {
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
