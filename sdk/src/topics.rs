//! Topics: messages to whoever has subscribed, wherever in the mesh.
//!
//! Messages go from subscriber to subscriber ([`weft_net::Topics`] has the rules). Subscribers find each other in the DHT, and connect to a few; who publishes
//! without having subscribed connects to a few as well. Delivery is at most once: who is not connected to any subscriber at the moment misses what is said.

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

/// Subscribers that a node is connected to, if there are so many. As many as gossipsub passes a message on to.
const ENOUGH: usize = 6;

/// The first and the longest pause between two looks for subscribers.
const LOOK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long a publisher that knows no subscriber looks for some, and how soon it looks again.
const FIND: Duration = Duration::from_secs(5);
const FIND_AGAIN: Duration = Duration::from_secs(30);

/// Topics of which it is remembered when subscribers were looked for.
const MAX_LOOKED: usize = 256;

/// What a new connection's peer has subscribed to comes right after it is open.
const EXCHANGE: Duration = Duration::from_millis(20);

fn key(topic: &str) -> Vec<u8> {
    // A name may be longer than a key.
    let mut hasher = blake3::Hasher::new_derive_key("weft topic v1");
    hasher.update(topic.as_bytes());
    format!("topic/{}", hasher.finalize()).into_bytes()
}

/// What a node remembers of topics.
#[derive(Debug, Default)]
pub(crate) struct KnownTopics {
    members: HashMap<String, Weak<Member>>,
    looked: HashMap<String, Instant>,
}

/// This node takes part in a topic.
#[derive(Debug)]
struct Member {
    _presence: Presence,
    looking: AbortHandle,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

/// The messages of a topic, from when it was made. The node leaves the topic when the last is dropped.
#[derive(Debug)]
pub struct Subscription {
    inner: weft_net::Subscription,
    _member: Arc<Member>,
}

impl Subscription {
    /// Its topic.
    pub fn topic(&self) -> &str {
        self.inner.topic()
    }

    /// The next message; `None` once the node has stopped.
    ///
    /// # Errors
    /// [`Missed`] if messages came faster than they were taken; the next call goes on after them.
    pub async fn next(&mut self) -> Option<Result<Published, Missed>> {
        self.inner.next().await
    }
}

/// Publishing and subscribing; [`Node::topics`].
#[derive(Debug, Clone)]
pub struct Topics {
    node: Node,
}

impl Topics {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Takes part in a topic, and takes whatever anybody publishes.
    ///
    /// # Errors
    /// [`Error::Topic`], [`Error::Stopped`].
    pub async fn subscribe(&self, topic: &str) -> Result<Subscription, Error> {
        self.subscribe_checked(topic, None).await
    }

    /// Takes part in a topic, and takes and passes on only what these publish.
    ///
    /// # Errors
    /// [`Error::Topic`], [`Error::Stopped`].
    pub async fn subscribe_from(
        &self,
        topic: &str,
        publishers: impl IntoIterator<Item = PeerId>,
    ) -> Result<Subscription, Error> {
        let publishers: Vec<_> = publishers.into_iter().collect();
        let check: Validator = Arc::new(move |message| match publishers.contains(&message.from) {
            true => Validity::Accept,
            // Whoever passed it on may have been asked for less.
            false => Validity::Ignore,
        });
        self.subscribe_checked(topic, Some(check)).await
    }

    /// Takes part in a topic, and takes and passes on only what the validator accepts.
    ///
    /// # Errors
    /// [`Error::Topic`], [`Error::Stopped`].
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
        let presence = advertiser.be_present(RecordId::of(key(topic)), value, Terms::PRESENCE);
        let (finder, topic) = (Finder::new(&self.node), topic.to_owned());
        let looking = tokio::spawn(async move { finder.keep_looking(&topic).await });
        Member {
            _presence: presence,
            looking: looking.abort_handle(),
        }
    }

    /// Sends a message to all who have subscribed; how many of the connected peers have. Zero is no error: nobody could be found now.
    ///
    /// # Errors
    /// [`Error::Topic`], [`Error::Stopped`].
    pub async fn publish(&self, topic: &str, data: impl Into<Bytes>) -> Result<usize, Error> {
        let topics = self.node.network().topics();
        if (1..=MAX_TOPIC).contains(&topic.len())
            && topics.peers(topic).await?.is_empty()
            && self.is_to_look(topic)
        {
            self.node.meet().await;
            let finder = Finder::new(&self.node);
            // Whom it has not found by then, it has not found.
            let _ = timeout(FIND, finder.look(topic)).await;
        }
        Ok(topics.publish(topic, data.into()).await?)
    }

    /// The topics that this node takes part in.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub async fn list(&self) -> Result<Vec<TopicInfo>, Error> {
        Ok(self.node.network().topics().list().await?)
    }

    fn known(&self) -> MutexGuard<'_, KnownTopics> {
        let known = self.node.known_topics();
        known.lock().expect("nothing panics while holding the lock")
    }

    /// Whether nobody has looked for subscribers a moment ago.
    fn is_to_look(&self, topic: &str) -> bool {
        let (mut known, now) = (self.known(), Instant::now());
        known
            .looked
            .retain(|_, at| now.duration_since(*at) < FIND_AGAIN);
        if known.looked.contains_key(topic) || known.looked.len() >= MAX_LOOKED {
            return false;
        }
        known.looked.insert(topic.to_owned(), now);
        true
    }
}

/// Finds subscribers. Holds no node, so that it does not keep one from stopping.
struct Finder(Discovery);

impl Finder {
    fn new(node: &Node) -> Self {
        Self(node.discovery().clone())
    }

    async fn keep_looking(&self, topic: &str) {
        let mut pause = LOOK.0;
        let mut meetings = self.0.dht().meetings();
        loop {
            meetings.mark_unchanged();
            let Ok(peers) = self.0.network().topics().peers(topic).await else {
                return;
            };
            let subject = weft_dht::place(&key(topic));
            self.0.proved(&subject, peers.iter().copied());
            if peers.len() >= ENOUGH || self.look(topic).await == 0 {
                pause = (pause * 2).min(LOOK.1);
            } else {
                pause = LOOK.0;
            }
            tokio::select! {
                () = sleep(pause) => {}
                met = meetings.changed() => {
                    if met.is_err() {
                        return;
                    }
                    // It may know more.
                    sleep(LOOK.0).await;
                }
            }
        }
    }

    /// Connects to subscribers until there are enough. Returns how many peers it has connected to.
    async fn look(&self, topic: &str) -> usize {
        let topics = self.0.network().topics();
        let subscribed = topics.peers(topic).await.map_or(0, |peers| peers.len());
        let wanted = ENOUGH.saturating_sub(subscribed);
        let round = self.0.find(&key(topic), Terms::PRESENCE.ttl, wanted).await;
        let reached = round.unwrap_or_default().reached;
        // Until they have said what they have subscribed to.
        for _ in 0..50 {
            let now = topics.peers(topic).await;
            if reached == 0 || now.map_or(true, |now| now.len() > subscribed) {
                break;
            }
            sleep(EXCHANGE).await;
        }
        reached
    }
}
