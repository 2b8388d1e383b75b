//! Topics: messages to all subscribers, over libp2p's gossipsub
//! (<https://github.com/libp2p/specs/blob/master/pubsub/gossipsub/gossipsub-v1.1.md>).
//!
//! The publisher signs every message, and every node checks a message before passing it on: the signature, the size,
//! that the message is new, and the rules of subscribers ([`Validator`]). A peer that passes on invalid messages loses
//! score, until its messages are ignored.
//!
//! This module does not report which nodes have subscribed, other than connected peers.

mod seen;

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use libp2p::{
    Multiaddr, PeerId,
    core::{Endpoint, transport::PortUse},
    gossipsub::{
        self, Event, IdentTopic, MaxCountSubscriptionFilter, Message, MessageAcceptance,
        MessageAuthenticity, MessageId, PeerScoreParams, PeerScoreThresholds, PublishError,
        TopicHash, TopicScoreParams, TopicSubscriptionFilter, ValidationMode,
    },
    identity::Keypair,
    swarm::{
        CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler,
        THandlerInEvent, THandlerOutEvent, ToSwarm,
    },
};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};

use self::seen::Seen;
use crate::address::PeerNetwork;

/// Largest data of a message, in bytes.
pub const MAX_DATA: usize = 64 * 1024;

/// Longest name of a topic, in bytes.
pub const MAX_TOPIC: usize = 256;

/// Most topics that this node, or a connected peer, may take part in.
const MAX_TOPICS: usize = 256;

/// Most bytes sent at once: a message with its signature and control data.
const MAX_TRANSMIT: usize = MAX_DATA + 8 * 1024;

/// Messages that wait for a slow subscriber. Further ones replace the oldest.
const WAITING: usize = 256;

/// Requests and results of validators that may wait.
const COMMANDS: usize = 256;

/// Messages being checked by validators of subscribers. Further messages are not passed on.
const MAX_VALIDATING: usize = 64;

type Gossip =
    gossipsub::Behaviour<gossipsub::IdentityTransform, MaxCountSubscriptionFilter<NameFilter>>;

/// Refuses topic names of an invalid length. With the limit [`MAX_TOPICS`], a peer makes this node keep at most 64 KiB
/// of names.
///
/// gossipsub does not tell the filter which peer subscribes, so [`Behaviour`] reads the flag after each of a peer's
/// messages.
#[derive(Debug, Clone, Default)]
pub(crate) struct NameFilter {
    is_broken: Arc<AtomicBool>,
}

impl TopicSubscriptionFilter for NameFilter {
    fn can_subscribe(&mut self, topic: &TopicHash) -> bool {
        let is_allowed = check(topic.as_str()).is_ok();
        if !is_allowed {
            self.is_broken.store(true, Ordering::Relaxed);
        }
        is_allowed
    }
}

/// A message of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// The topic.
    pub topic: String,
    /// The publisher; its signature has been checked.
    pub from: PeerId,
    /// Sequence number, which increases with each message of a publisher and is unique for the publisher. It also
    /// increases over restarts, unless the publisher's clock was set back before a restart.
    pub sequence: u64,
    /// The published data.
    pub data: Bytes,
}

/// The decision on a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Validity {
    /// Deliver the message, and pass it on.
    Accept,
    /// Drop the message.
    Ignore,
    /// Drop the message, and lower the score of the peer that passed it on.
    Reject,
}

/// Checks each message before it is delivered and passed on. It runs in a task of its own and should take at most a few
/// milliseconds, because the message waits for it.
pub type Validator = Arc<dyn Fn(&Published) -> Validity + Send + Sync>;

/// The reason that a topic cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopicError {
    /// The topic's name is empty or too long.
    #[error("a topic's name has 1 to {MAX_TOPIC} bytes; this one has {0}")]
    Name(usize),
    /// The data is too long.
    #[error(
        "a message has at most {MAX_DATA} bytes; this one has {0}: publish larger data as a model, and its id here"
    )]
    TooLarge(usize),
    /// This node takes part in too many topics.
    #[error(
        "this node already takes part in {MAX_TOPICS} topics, the most allowed; leave one first"
    )]
    TooMany,
    /// Earlier messages have not been sent yet.
    #[error("the queues to all peers are full; publish again later, or less")]
    Busy,
    /// The message could not be signed.
    #[error("cannot sign the message: {0}")]
    Signing(String),
    /// The network has stopped.
    #[error("the network has stopped")]
    Stopped,
}

/// A topic that this node takes part in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicInfo {
    /// Name of the topic.
    pub topic: String,
    /// Number of subscriptions on this node.
    pub subscriptions: usize,
    /// Connected peers that have subscribed.
    pub peers: Vec<PeerId>,
}

enum Command {
    Subscribe(
        String,
        Option<Validator>,
        oneshot::Sender<Result<Subscription, TopicError>>,
    ),
    Publish(String, Bytes, oneshot::Sender<Result<usize, TopicError>>),
    /// A subscription was dropped.
    Left(String),
    Peers(String, oneshot::Sender<Vec<PeerId>>),
    List(oneshot::Sender<Vec<TopicInfo>>),
    /// The result of validators.
    Validated(MessageId, PeerId, Published, Validity),
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Command").finish_non_exhaustive()
    }
}

/// A handle to publish and subscribe. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Topics(mpsc::Sender<Command>);

/// The messages of a topic since this subscription was made. The node leaves the topic when the last subscription is
/// dropped.
#[derive(Debug)]
pub struct Subscription {
    topic: String,
    messages: broadcast::Receiver<Published>,
    /// Shows that the subscription's validator is still in use.
    _held: Arc<()>,
    /// The last field, so that all others are dropped when it reports.
    _leave: Leave,
}

/// Reports the end of a subscription when dropped.
#[derive(Debug)]
struct Leave {
    topic: String,
    commands: mpsc::Sender<Command>,
}

/// Number of messages that this subscription has lost, because they were not taken in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} messages were lost because they were not taken in time")]
pub struct Missed(pub u64);

impl Subscription {
    /// Returns the name of the topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Waits for the next message. Returns `None` once the network has stopped.
    ///
    /// # Errors
    ///
    /// Returns [`Missed`] if messages were lost; the next call continues after them.
    pub async fn next(&mut self) -> Option<Result<Published, Missed>> {
        match self.messages.recv().await {
            Ok(message) => Some(Ok(message)),
            Err(broadcast::error::RecvError::Lagged(n)) => Some(Err(Missed(n))),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        // If the queue is full, the end of the subscription is noticed with the next message.
        let _ = self.commands.try_send(Command::Left(self.topic.clone()));
    }
}

fn check(topic: &str) -> Result<(), TopicError> {
    match topic.len() {
        1..=MAX_TOPIC => Ok(()),
        length => Err(TopicError::Name(length)),
    }
}

impl Topics {
    pub(crate) fn new(key: &Keypair) -> (Self, Behaviour) {
        let (sender, requests) = mpsc::channel(COMMANDS);
        let filter = NameFilter::default();
        let behaviour = Behaviour {
            gossip: gossip(key, filter.clone()),
            is_broken: filter.is_broken,
            offenders: VecDeque::new(),
            networks: HashMap::new(),
            own: key.public().to_peer_id(),
            topics: HashMap::new(),
            requests,
            commands: sender.clone(),
            validating: Arc::new(Semaphore::new(MAX_VALIDATING)),
            seen: Seen::default(),
            // Starts from the clock like gossipsub's own number, which is not accessible, so it increases over
            // restarts.
            own_sequence: now_nanos(),
        };
        (Self(sender), behaviour)
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, TopicError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.0.send(command(reply)).await;
        sent.map_err(|_| TopicError::Stopped)?;
        answer.await.map_err(|_| TopicError::Stopped)
    }

    /// Subscribes to a topic. With a validator, this node delivers and passes on only messages that all of its
    /// validators for the topic accept.
    ///
    /// # Errors
    ///
    /// Returns [`TopicError`] if the topic cannot be used.
    pub async fn subscribe(
        &self,
        topic: &str,
        validator: Option<Validator>,
    ) -> Result<Subscription, TopicError> {
        check(topic)?;
        let topic = topic.to_owned();
        self.ask(|reply| Command::Subscribe(topic, validator, reply))
            .await?
    }

    /// Sends a message to all subscribers, including those on this node. Returns the number of connected peers that
    /// have subscribed. Zero is not an error: no peer is subscribed at the moment.
    ///
    /// # Errors
    ///
    /// Returns [`TopicError`] if the message cannot be sent.
    pub async fn publish(&self, topic: &str, data: Bytes) -> Result<usize, TopicError> {
        check(topic)?;
        if data.len() > MAX_DATA {
            return Err(TopicError::TooLarge(data.len()));
        }
        let topic = topic.to_owned();
        self.ask(|reply| Command::Publish(topic, data, reply))
            .await?
    }

    /// Returns the connected peers that have subscribed to a topic.
    ///
    /// # Errors
    ///
    /// Returns [`TopicError::Stopped`] if the network has stopped.
    pub async fn peers(&self, topic: &str) -> Result<Vec<PeerId>, TopicError> {
        let topic = topic.to_owned();
        self.ask(|reply| Command::Peers(topic, reply)).await
    }

    /// Returns the topics that this node takes part in.
    ///
    /// # Errors
    ///
    /// Returns [`TopicError::Stopped`] if the network has stopped.
    pub async fn list(&self) -> Result<Vec<TopicInfo>, TopicError> {
        self.ask(Command::List).await
    }
}

fn now_nanos() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64)
}

fn gossip(key: &Keypair, filter: NameFilter) -> Gossip {
    let config = gossipsub::ConfigBuilder::default()
        .max_transmit_size(MAX_TRANSMIT)
        .validation_mode(ValidationMode::Strict)
        .validate_messages()
        // A publisher sends to all connected subscribers, not only to those in its gossipsub mesh.
        .flood_publish(true)
        // At most 72 KiB each.
        .connection_handler_queue_len(256)
        .max_publish_messages(64)
        .build()
        .expect("the values are consistent");
    let filter = MaxCountSubscriptionFilter {
        filter,
        max_subscribed_topics: MAX_TOPICS,
        max_subscriptions_per_request: MAX_TOPICS,
    };
    let mut gossip = Gossip::new_with_subscription_filter(
        MessageAuthenticity::Signed(key.clone()),
        config,
        filter,
    )
    .expect("signing and validation modes match");
    let score = PeerScoreParams {
        // The connection manager limits connections from one address, and many machines may share one.
        ip_colocation_factor_weight: 0.0,
        ..PeerScoreParams::default()
    };
    gossip
        .with_peer_score(score, PeerScoreThresholds::default())
        .expect("the defaults are valid, and no score is set yet");
    gossip
}

/// Only invalid messages lower a peer's score; heartbeats are too rare for the other measures.
fn score() -> TopicScoreParams {
    TopicScoreParams {
        topic_weight: 1.0,
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        invalid_message_deliveries_weight: -10.0,
        invalid_message_deliveries_decay: 0.9,
        ..TopicScoreParams::default()
    }
}

/// A topic with subscriptions on this node.
struct Topic {
    sender: broadcast::Sender<Published>,
    /// Validators, with a reference that is dead once the subscription is dropped.
    validators: Vec<(std::sync::Weak<()>, Validator)>,
}

/// The part of topics in the swarm.
pub(crate) struct Behaviour {
    gossip: Gossip,
    /// Set by the [`NameFilter`] while it checks a peer's message.
    is_broken: Arc<AtomicBool>,
    /// Peers to be disconnected because of an invalid name.
    offenders: VecDeque<PeerId>,
    /// The network of each connected peer, from its latest connection.
    networks: HashMap<PeerId, PeerNetwork>,
    own: PeerId,
    topics: HashMap<String, Topic>,
    requests: mpsc::Receiver<Command>,
    commands: mpsc::Sender<Command>,
    validating: Arc<Semaphore>,
    seen: Seen,
    own_sequence: u64,
}

impl Behaviour {
    fn on_command(&mut self, command: Command) {
        // The callers of all commands may be gone by the time of the answer.
        match command {
            Command::Subscribe(topic, validator, reply) => {
                let _ = reply.send(self.subscribe(topic, validator));
            }
            Command::Publish(topic, data, reply) => {
                let _ = reply.send(self.publish(topic, data));
            }
            Command::Left(topic) => self.leave_if_unwanted(&topic),
            Command::Peers(topic, reply) => {
                let _ = reply.send(self.peers(&topic));
            }
            Command::List(reply) => {
                let topics = self.topics.iter();
                let mut topics: Vec<_> = topics
                    .map(|(name, topic)| TopicInfo {
                        topic: name.clone(),
                        subscriptions: topic.sender.receiver_count(),
                        peers: self.peers(name),
                    })
                    .collect();
                topics.sort_by(|a, b| a.topic.cmp(&b.topic));
                let _ = reply.send(topics);
            }
            Command::Validated(id, source, message, validity) => {
                self.settle(&id, &source, message, validity);
            }
        }
    }

    fn peers(&self, topic: &str) -> Vec<PeerId> {
        let hash = IdentTopic::new(topic).hash();
        let peers = self.gossip.all_peers();
        peers
            .filter(|(_, topics)| topics.contains(&&hash))
            .map(|(peer, _)| *peer)
            .collect()
    }

    fn subscribe(
        &mut self,
        name: String,
        validator: Option<Validator>,
    ) -> Result<Subscription, TopicError> {
        if !self.topics.contains_key(&name) {
            if self.topics.len() >= MAX_TOPICS {
                return Err(TopicError::TooMany);
            }
            let topic = IdentTopic::new(&name);
            self.gossip
                .set_topic_params(topic.clone(), score())
                .map_err(|error| TopicError::Signing(error.to_owned()))?;
            self.gossip
                .subscribe(&topic)
                .map_err(|_| TopicError::TooMany)?;
            let (sender, _) = broadcast::channel(WAITING);
            let topic = Topic {
                sender,
                validators: Vec::new(),
            };
            self.topics.insert(name.clone(), topic);
        }
        let topic = self.topics.get_mut(&name).expect("put there if it was not");
        let held = Arc::new(());
        if let Some(validator) = validator {
            topic.validators.push((Arc::downgrade(&held), validator));
        }
        Ok(Subscription {
            messages: topic.sender.subscribe(),
            topic: name.clone(),
            _held: held,
            _leave: Leave {
                topic: name,
                commands: self.commands.clone(),
            },
        })
    }

    fn leave_if_unwanted(&mut self, name: &str) {
        let Some(topic) = self.topics.get_mut(name) else {
            return;
        };
        topic.validators.retain(|(held, _)| held.strong_count() > 0);
        if topic.sender.receiver_count() == 0 {
            self.topics.remove(name);
            self.gossip.unsubscribe(&IdentTopic::new(name));
        }
    }

    fn publish(&mut self, name: String, data: Bytes) -> Result<usize, TopicError> {
        let topic = IdentTopic::new(&name);
        let peers = self.peers(&name).len();
        match self.gossip.publish(topic, data.to_vec()) {
            Ok(_) | Err(PublishError::NoPeersSubscribedToTopic) => {}
            Err(PublishError::AllQueuesFull(_)) => return Err(TopicError::Busy),
            Err(PublishError::MessageTooLarge) => return Err(TopicError::TooLarge(data.len())),
            Err(error) => return Err(TopicError::Signing(error.to_string())),
        }
        if let Some(topic) = self.topics.get(&name) {
            self.own_sequence += 1;
            // There may be no subscriber.
            let _ = topic.sender.send(Published {
                topic: name,
                from: self.own,
                sequence: self.own_sequence,
                data,
            });
        }
        Ok(peers)
    }

    fn on_message(&mut self, id: MessageId, source: PeerId, message: Message) {
        let name = message.topic.as_str().to_owned();
        self.leave_if_unwanted(&name);
        let (Some(from), Some(sequence)) = (message.source, message.sequence_number) else {
            // Strict validation lets no such message through.
            return self.report(&id, &source, Validity::Reject);
        };
        let Some(topic) = self.topics.get(&name) else {
            return self.report(&id, &source, Validity::Ignore);
        };
        if message.data.len() > MAX_DATA {
            return self.report(&id, &source, Validity::Reject);
        }
        let via = self.networks.get(&source).copied().unwrap_or_default();
        if from == self.own || !self.seen.take(from, sequence, via, Instant::now()) {
            return self.report(&id, &source, Validity::Ignore);
        }
        let message = Published {
            topic: name,
            from,
            sequence,
            data: message.data.into(),
        };
        if topic.validators.is_empty() {
            return self.settle(&id, &source, message, Validity::Accept);
        }
        let Ok(permit) = Arc::clone(&self.validating).try_acquire_owned() else {
            return self.report(&id, &source, Validity::Ignore);
        };
        let validators: Vec<_> = topic
            .validators
            .iter()
            .map(|(_, v)| Arc::clone(v))
            .collect();
        let commands = self.commands.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let said = validators.iter().map(|validator| validator(&message)).max();
            let said = said.unwrap_or(Validity::Accept);
            // The network may have stopped.
            let _ = commands
                .send(Command::Validated(id, source, message, said))
                .await;
        });
    }

    fn settle(&mut self, id: &MessageId, source: &PeerId, message: Published, validity: Validity) {
        self.report(id, source, validity);
        if validity == Validity::Accept
            && let Some(topic) = self.topics.get(&message.topic)
        {
            // There may be no subscriber any more.
            let _ = topic.sender.send(message);
        }
    }

    fn report(&mut self, id: &MessageId, source: &PeerId, validity: Validity) {
        let acceptance = match validity {
            Validity::Accept => MessageAcceptance::Accept,
            Validity::Ignore => MessageAcceptance::Ignore,
            Validity::Reject => MessageAcceptance::Reject,
        };
        // Returns false if the message is too old to be passed on.
        self.gossip
            .report_message_validation_result(id, source, acceptance);
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = <Gossip as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.gossip
            .handle_pending_inbound_connection(id, local, remote)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.gossip
            .handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        self.gossip
            .handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.gossip
            .handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            FromSwarm::ConnectionEstablished(opened) => {
                let remote = opened.endpoint.get_remote_address();
                self.networks
                    .insert(opened.peer_id, PeerNetwork::of(remote));
            }
            FromSwarm::ConnectionClosed(closed) if closed.remaining_established == 0 => {
                self.networks.remove(&closed.peer_id);
            }
            _ => {}
        }
        self.gossip.on_swarm_event(event);
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        self.gossip.on_connection_handler_event(peer, id, event);
        if self.is_broken.swap(false, Ordering::Relaxed) && !self.offenders.contains(&peer) {
            self.offenders.push_back(peer);
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some(peer_id) = self.offenders.pop_front() {
            tracing::debug!(peer = %peer_id, "disconnected: it subscribed to an invalid topic name");
            return Poll::Ready(ToSwarm::CloseConnection {
                peer_id,
                connection: CloseConnection::All,
            });
        }
        loop {
            // Never closed, because this behaviour holds a sender itself.
            if let Poll::Ready(Some(command)) = self.requests.poll_recv(cx) {
                self.on_command(command);
                continue;
            }
            match self.gossip.poll(cx) {
                Poll::Ready(ToSwarm::GenerateEvent(Event::Message {
                    propagation_source,
                    message_id,
                    message,
                })) => self.on_message(message_id, propagation_source, message),
                Poll::Ready(ToSwarm::GenerateEvent(Event::SlowPeer { peer_id, .. })) => {
                    tracing::debug!(peer = %peer_id, "receives topic messages too slowly");
                }
                // Subscriptions are read when they are asked for.
                Poll::Ready(ToSwarm::GenerateEvent(_)) => {}
                Poll::Ready(other) => {
                    return Poll::Ready(
                        other.map_out(|_| unreachable!("events are handled above")),
                    );
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_any_length_are_not_kept_for_a_peer() {
        let mut filter = NameFilter::default();
        for good in ["a".repeat(MAX_TOPIC), "7".into()] {
            assert!(filter.can_subscribe(&TopicHash::from_raw(good)));
            assert!(!filter.is_broken.load(Ordering::Relaxed));
        }
        for bad in ["a".repeat(MAX_TOPIC + 1), String::new()] {
            assert!(!filter.can_subscribe(&TopicHash::from_raw(bad)));
            assert!(filter.is_broken.swap(false, Ordering::Relaxed));
        }
    }
}
