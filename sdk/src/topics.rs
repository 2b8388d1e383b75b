//! Topics: messages to all subscribers in the mesh.
//!
//! Messages pass from subscriber to subscriber; [`weft_net::Topics`] has the rules. Subscribers find each other in
//! the DHT and connect to a few others. A publisher that has not subscribed connects to a few subscribers as well.
//! Delivery is at most once: a subscriber that is connected to no other subscriber misses the messages of that time.

use std::{
    collections::HashMap,
    sync::{Arc, MutexGuard, Weak},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    task::AbortHandle,
    time::{Instant, sleep, timeout},
};
use weft_net::{MAX_TOPIC, Missed, PeerId, Published, TopicInfo, Validator, Validity};
use weft_proto::wire;

use crate::{
    Error, Node,
    discovery::{
        advertise::{Presence, RecordId, Terms, Value},
        find::Discovery,
    },
};

/// Number of subscribers that a node connects to, if there are as many: as many as gossipsub passes a message on to.
const WANTED_SUBSCRIBERS: usize = 6;

/// The first and the longest pause between two searches for subscribers.
const SEARCH_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Longest search for subscribers by a publisher that knows none, and the shortest time between two such searches.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(5);
const SEARCH_INTERVAL: Duration = Duration::from_secs(30);

/// The most topics for which the time of the last search is remembered.
const MAX_SEARCHED: usize = 256;

/// Pause between two looks at a new peer's subscriptions, which arrive right after the connection opens.
const SUBSCRIPTION_POLL: Duration = Duration::from_millis(20);

fn key(topic: &str) -> Vec<u8> {
    // The topic is hashed because its name may be longer than a key.
    let mut hasher = blake3::Hasher::new_derive_key("weft topic v1");
    hasher.update(topic.as_bytes());
    format!("topic/{}", hasher.finalize()).into_bytes()
}

/// The topics that a node takes part in, and those that it has searched subscribers for.
#[derive(Debug, Default)]
pub(crate) struct KnownTopics {
    members: HashMap<String, Weak<Member>>,
    searched: HashMap<String, Instant>,
}

/// This node's part in a topic: it advertises itself and searches for other subscribers.
#[derive(Debug)]
struct Member {
    _presence: Presence,
    searching: AbortHandle,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.searching.abort();
    }
}

/// The messages of a topic, from the time of the subscription on; see [`Topics::subscribe`]. The node leaves the
/// topic when its last subscription is dropped.
#[derive(Debug)]
pub struct Subscription {
    inner: weft_net::Subscription,
    _member: Arc<Member>,
}

impl Subscription {
    /// Returns the topic.
    pub fn topic(&self) -> &str {
        self.inner.topic()
    }

    /// Waits for the next message. Returns `None` once the node has stopped.
    ///
    /// # Errors
    /// [`Missed`] if messages arrived faster than they were taken. The next call returns the messages after the gap.
    pub async fn next(&mut self) -> Option<Result<Published, Missed>> {
        self.inner.next().await
    }
}

/// Publishes messages on topics and subscribes to topics; see [`Node::topics`].
#[derive(Debug, Clone)]
pub struct Topics {
    node: Node,
}

impl Topics {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Subscribes to a topic, and accepts messages of any publisher.
    ///
    /// # Errors
    /// [`Error::Topic`] if the topic's name is empty or too long, or a limit is reached; [`Error::Stopped`] after a
    /// shutdown.
    pub async fn subscribe(&self, topic: &str) -> Result<Subscription, Error> {
        self.subscribe_checked(topic, None).await
    }

    /// Subscribes to a topic, and accepts only messages of these publishers. Other messages are not passed on either.
    ///
    /// # Errors
    /// Returns the errors of [`subscribe`](Self::subscribe).
    pub async fn subscribe_from(
        &self,
        topic: &str,
        publishers: impl IntoIterator<Item = PeerId>,
    ) -> Result<Subscription, Error> {
        let publishers: Vec<_> = publishers.into_iter().collect();
        let check: Validator = Arc::new(move |message| match publishers.contains(&message.from) {
            true => Validity::Accept,
            // Ignored, not rejected: the peer that passed the message on may accept more publishers.
            false => Validity::Ignore,
        });
        self.subscribe_checked(topic, Some(check)).await
    }

    /// Subscribes to a topic, and accepts only messages that the validator accepts. Other messages are not passed on
    /// either. The validator should return within a few milliseconds, because the message waits for it.
    ///
    /// # Errors
    /// Returns the errors of [`subscribe`](Self::subscribe).
    pub async fn subscribe_with(
        &self,
        topic: &str,
        validator: impl Fn(&Published) -> Validity + Send + Sync + 'static,
    ) -> Result<Subscription, Error> {
        self.subscribe_checked(topic, Some(Arc::new(validator)))
            .await
    }

    async fn subscribe_checked(
        &self,
        topic: &str,
        validator: Option<Validator>,
    ) -> Result<Subscription, Error> {
        let network = self.node.network();
        let inner = network.topics().subscribe(topic, validator).await?;
        let mut known = self.known();
        known.members.retain(|_, member| member.strong_count() > 0);
        let member = known.members.get(topic).and_then(Weak::upgrade);
        let member = member.unwrap_or_else(|| {
            let member = Arc::new(self.join(topic));
            known
                .members
                .insert(topic.to_owned(), Arc::downgrade(&member));
            member
        });
        Ok(Subscription {
            inner,
            _member: member,
        })
    }

    fn join(&self, topic: &str) -> Member {
        let value = Value::of(|addresses| wire::PeerClaim { addresses }.encode_to_vec());
        let advertiser = self.node.advertiser();
        let presence =
            advertiser.register_while_held(RecordId::of(key(topic)), value, Terms::PRESENCE);
        let (finder, topic) = (Finder::new(&self.node), topic.to_owned());
        let searching = tokio::spawn(async move { finder.keep_searching(&topic).await });
        Member {
            _presence: presence,
            searching: searching.abort_handle(),
        }
    }

    /// Publishes a message to all subscribers of a topic. Returns the number of connected peers that have subscribed.
    ///
    /// If no connected peer has subscribed, first searches for subscribers for up to five seconds, at most once in 30
    /// seconds for each topic. A result of zero is not an error: no subscriber could be found now.
    ///
    /// # Errors
    /// [`Error::Topic`] if the topic's name or the message breaks a limit; [`Error::Stopped`] after a shutdown.
    pub async fn publish(&self, topic: &str, data: impl Into<Bytes>) -> Result<usize, Error> {
        let topics = self.node.network().topics();
        if (1..=MAX_TOPIC).contains(&topic.len())
            && topics.peers(topic).await?.is_empty()
            && self.is_search_due(topic)
        {
            self.node.meet().await;
            let finder = Finder::new(&self.node);
            // A search that takes longer counts as having found nobody.
            let _ = timeout(SEARCH_TIMEOUT, finder.search(topic)).await;
        }
        Ok(topics.publish(topic, data.into()).await?)
    }

    /// Lists the topics that this node has subscribed to.
    ///
    /// # Errors
    /// [`Error::Stopped`] after a shutdown.
    pub async fn list(&self) -> Result<Vec<TopicInfo>, Error> {
        Ok(self.node.network().topics().list().await?)
    }

    fn known(&self) -> MutexGuard<'_, KnownTopics> {
        let known = self.node.known_topics();
        known.lock().expect("nothing panics while holding the lock")
    }

    /// Returns true, and notes the time, if subscribers of the topic were not searched within the last 30 seconds.
    fn is_search_due(&self, topic: &str) -> bool {
        let (mut known, now) = (self.known(), Instant::now());
        known
            .searched
            .retain(|_, at| now.duration_since(*at) < SEARCH_INTERVAL);
        if known.searched.contains_key(topic) || known.searched.len() >= MAX_SEARCHED {
            return false;
        }
        known.searched.insert(topic.to_owned(), now);
        true
    }
}

/// Finds subscribers. It holds no clone of the node, so it does not keep the node running.
struct Finder(Discovery);

impl Finder {
    fn new(node: &Node) -> Self {
        Self(node.discovery().clone())
    }

    async fn keep_searching(&self, topic: &str) {
        let mut pause = SEARCH_PAUSE.0;
        let mut nodes_met = self.0.dht().nodes_met();
        loop {
            nodes_met.mark_unchanged();
            let Ok(peers) = self.0.network().topics().peers(topic).await else {
                return;
            };
            let subject = weft_dht::key_position(&key(topic));
            self.0.proved(&subject, peers.iter().copied());
            if peers.len() >= WANTED_SUBSCRIBERS || self.search(topic).await == 0 {
                pause = (pause * 2).min(SEARCH_PAUSE.1);
            } else {
                pause = SEARCH_PAUSE.0;
            }
            tokio::select! {
                () = sleep(pause) => {}
                met = nodes_met.changed() => {
                    if met.is_err() {
                        return;
                    }
                    // The new node may know more subscribers.
                    sleep(SEARCH_PAUSE.0).await;
                }
            }
        }
    }

    /// Connects to subscribers until there are enough. Returns the number of new connections.
    async fn search(&self, topic: &str) -> usize {
        let topics = self.0.network().topics();
        let subscribed = topics.peers(topic).await.map_or(0, |peers| peers.len());
        let wanted = WANTED_SUBSCRIBERS.saturating_sub(subscribed);
        let round = self.0.find(&key(topic), Terms::PRESENCE.ttl, wanted).await;
        let reached = round.unwrap_or_default().reached;
        // Waits until the new peers have sent their subscriptions, for at most one second.
        for _ in 0..50 {
            let now = topics.peers(topic).await;
            if reached == 0 || now.map_or(true, |now| now.len() > subscribed) {
                break;
            }
            sleep(SUBSCRIPTION_POLL).await;
        }
        reached
    }
}
