//! Finding and reaching those who have a model.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use prost::Message;
use tokio::time::sleep;
use weft_blobs::{Hash, TransferError};
use weft_net::{Class, Multiaddr, PeerId, Stream};
use weft_proto::wire;

use crate::{
    Error, Failure, Node,
    announce::{MAX_ADDRESSES, provider_key},
    node::BLOBS,
};

/// How long to look for a first provider that answers: long enough for one that is just starting, short for a person who waits.
const FIRST: Duration = Duration::from_secs(10);

/// How long to wait for a provider once content has come: a restart, a change of network.
const LOST: Duration = Duration::from_secs(120);

/// The first and the longest pause between rounds over the known providers.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Providers tried in a round.
const MAX_PROVIDERS: usize = 32;

/// Goes through a model's providers, round after round, until one finishes the work or patience ends.
#[derive(Debug)]
pub(crate) struct Providers {
    node: Node,
    model: Hash,
    /// From a ticket; they count before those of the DHT.
    given: Vec<(PeerId, Vec<Multiaddr>)>,
    queue: VecDeque<(PeerId, Vec<Multiaddr>)>,
    failures: BTreeMap<PeerId, String>,
    /// Sent wrong bytes: never asked again.
    banned: HashSet<PeerId>,
    /// Content that had arrived at the last progress.
    moved: u64,
    since: Instant,
    patience: Duration,
    pause: Duration,
    /// Whether a round is over.
    waited: bool,
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
            moved: 0,
            since: Instant::now(),
            patience: FIRST,
            pause: PAUSE.0,
            waited: false,
        }
    }

    /// A stream to the next provider. `moved` is the content that has arrived so far: progress renews the patience.
    ///
    /// # Errors
    /// [`Error::NoProvider`] when patience has ended, with what each one did.
    pub(crate) async fn next(&mut self, moved: u64) -> Result<Stream, Error> {
        if moved > self.moved {
            self.moved = moved;
            self.since = Instant::now();
            self.patience = LOST;
            self.pause = PAUSE.0;
        }
        loop {
            while let Some((peer, addresses)) = self.queue.pop_front() {
                match self.reach(peer, addresses).await {
                    Ok(stream) => return Ok(stream),
                    Err(reason) => {
                        tracing::debug!(%peer, reason, "a provider cannot be reached");
                        self.failures.insert(peer, reason);
                    }
                }
            }
            if self.waited {
                let all_banned = !self.failures.is_empty()
                    && self.failures.keys().all(|peer| self.banned.contains(peer));
                if self.since.elapsed() >= self.patience || all_banned {
                    return Err(self.exhausted());
                }
                sleep(self.pause).await;
                self.pause = (self.pause * 2).min(PAUSE.1);
            }
            if !self.waited {
                self.waited = true;
                if self.given.is_empty() {
                    self.node.meet().await;
                }
            }
            self.look_up().await?;
        }
    }

    /// Notes why `peer` did not finish the work.
    pub(crate) fn failed(&mut self, peer: PeerId, error: &TransferError) {
        if error.is_provider_wrong() {
            tracing::warn!(%peer, %error, "a provider is not asked again");
            self.banned.insert(peer);
        } else {
            tracing::debug!(%peer, %error, "a provider did not finish");
        }
        self.failures.insert(peer, error.to_string());
    }

    /// What is being waited for, in words.
    pub(crate) fn waiting_for(&self) -> String {
        match self.failures.iter().next_back() {
            Some((peer, reason)) => format!("a provider ({peer}: {reason})"),
            None => "a provider".to_owned(),
        }
    }

    fn exhausted(&self) -> Error {
        Error::NoProvider {
            model: self.model,
            failures: self
                .failures
                .iter()
                .map(|(peer, reason)| Failure {
                    peer: *peer,
                    reason: reason.clone(),
                })
                .collect(),
        }
    }

    /// Fills the queue: the ticket's peers, then the DHT's, those we are connected to first.
    async fn look_up(&mut self) -> Result<(), Error> {
        let mut found: Vec<(PeerId, Vec<Multiaddr>)> = self.given.clone();
        let mut records = self.node.dht().get(&provider_key(&self.model)).await?;
        // The longest to live is the last that was stated.
        records.sort_by_key(|record| std::cmp::Reverse(record.remaining()));
        for record in records {
            let Some(Ok(claim)) = record.value().map(wire::ProviderClaim::decode) else {
                continue;
            };
            let addresses: Vec<Multiaddr> = claim
                .addresses
                .into_iter()
                .take(MAX_ADDRESSES)
                .filter_map(|bytes| Multiaddr::try_from(bytes.to_vec()).ok())
                .collect();
            match found
                .iter_mut()
                .find(|(peer, _)| *peer == record.publisher())
            {
                Some((_, known)) => known.extend(addresses),
                None => found.push((record.publisher(), addresses)),
            }
        }
        let own = self.node.peer_id();
        found.retain(|(peer, _)| *peer != own && !self.banned.contains(peer));
        let connected: HashSet<PeerId> = self
            .node
            .peers()
            .await
            .iter()
            .map(|info| info.peer)
            .collect();
        found.sort_by_key(|(peer, _)| !connected.contains(peer));
        found.truncate(MAX_PROVIDERS);
        self.queue = found.into();
        Ok(())
    }

    async fn reach(&self, peer: PeerId, addresses: Vec<Multiaddr>) -> Result<Stream, String> {
        let network = self.node.network();
        network
            .connect(peer, addresses)
            .await
            .map_err(|error| error.to_string())?;
        network
            .open(peer, BLOBS, Class::Bulk)
            .await
            .map_err(|error| error.to_string())
    }
}
