//! Exchange of bitfields: peers that fetch or have a model tell each other which parts they have, and which other
//! peers they know.

use std::{
    collections::{HashMap, hash_map::Entry},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::{Semaphore, mpsc},
    time::{interval, sleep, timeout},
};
use tracing::Instrument;
use weft_blobs::{
    Hash, Store, Transfer,
    availability::{self, MAX_MESSAGE, MAX_PEERS, Told},
};
use weft_net::{Class, Heard, Network, PeerId, Stream, StreamProtocol};
use weft_proto::{
    frame::{self, FrameError},
    wire,
};

use crate::{
    Error,
    discovery::addresses::{decode, encode},
    operation::blocking,
};

/// Name of the protocol on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new(availability::PROTOCOL);

/// Interval at which a peer is told what has arrived.
const TELL_INTERVAL: Duration = Duration::from_millis(250);

/// The shortest time between two messages of a peer, which limits their cost for this node.
const MESSAGE_PACE: Duration = Duration::from_millis(10);

/// Number of files in a message for which one more pause is added.
const FILES_AT_A_TIME: u32 = 1000;

/// The longest time for a peer's first message.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time without a message after which the exchange of a model that is not being fetched here ends. A peer that
/// fetches reports what has arrived. A peer that has all of the model, or waits for very long, starts another
/// exchange when it has a reason.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(600);

/// The most peers of one model that are introduced to each other.
const MAX_PARTNERS: usize = 256;

/// News from the peers of a swarm.
#[derive(Debug)]
pub(crate) enum News {
    /// A peer's bitfields.
    Have(PeerId, wire::Have),
    /// A peer has nothing of the model.
    Nothing(PeerId),
    /// A peer was named, with unverified addresses.
    Peer(PeerId, Heard),
}

/// The transfer of a model that is being fetched here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) transfer: Transfer,
    pub(crate) news: mpsc::Sender<News>,
}

/// All exchanges of this node, by model. Cheap to clone; all clones share their state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hub {
    rooms: Arc<Mutex<HashMap<Hash, Room>>>,
    looks: StoreLooks,
}

/// Limits the number of tasks that look through the store for peers' requests: each look opens every file of a model.
#[derive(Debug, Clone)]
struct StoreLooks(Arc<Semaphore>);

impl Default for StoreLooks {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(2)))
    }
}

#[derive(Debug, Default)]
struct Room {
    partners: HashMap<PeerId, Partner>,
    next: u64,
    link: Option<Link>,
}

#[derive(Debug)]
struct Partner {
    /// Identifies the exchange: there may be two with one peer.
    number: u64,
    addresses: Heard,
    /// Receives the peers that this peer is to be told about.
    introduce: mpsc::Sender<(PeerId, Heard)>,
}

impl Hub {
    /// Returns the transfer of a model that is being fetched here, if any.
    pub(crate) fn transfer(&self, model: &Hash) -> Option<Transfer> {
        let rooms = self.rooms();
        let link = rooms.get(model)?.link.as_ref()?;
        Some(link.transfer.clone())
    }
}

/// Keeps a transfer linked to the exchanges of its model. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Linked {
    hub: Hub,
    model: Hash,
}

impl Drop for Linked {
    fn drop(&mut self) {
        let mut rooms = self.hub.rooms();
        if let Entry::Occupied(mut room) = rooms.entry(self.model) {
            room.get_mut().link = None;
            if room.get().partners.is_empty() {
                room.remove();
            }
        }
    }
}

/// An exchange with a peer. Dropping it removes the peer from the room.
struct Present<'a> {
    hub: &'a Hub,
    model: Hash,
    peer: PeerId,
    number: u64,
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        let mut rooms = self.hub.rooms();
        if let Entry::Occupied(mut room) = rooms.entry(self.model) {
            let partners = &mut room.get_mut().partners;
            if partners
                .get(&self.peer)
                .is_some_and(|partner| partner.number == self.number)
            {
                partners.remove(&self.peer);
            }
            if room.get().partners.is_empty() && room.get().link.is_none() {
                room.remove();
            }
        }
    }
}

impl Hub {
    fn rooms(&self) -> MutexGuard<'_, HashMap<Hash, Room>> {
        self.rooms
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Links a transfer to the exchanges of a model: it receives the news of peers, and they are told which parts it
    /// has.
    pub(crate) fn link(&self, model: Hash, link: Link) -> Linked {
        self.rooms().entry(model).or_default().link = Some(link);
        Linked {
            hub: self.clone(),
            model,
        }
    }

    fn linked(&self, model: &Hash) -> Option<Link> {
        self.rooms().get(model).and_then(|room| room.link.clone())
    }

    /// Adds `peer` to the room of a model, and introduces the peers there to each other. Returns the channel of peers
    /// that `peer` is to be told about.
    fn enter(&self, model: Hash, peer: PeerId) -> (Present<'_>, mpsc::Receiver<(PeerId, Heard)>) {
        let (introduce, introduced) = mpsc::channel(MAX_PEERS);
        let mut rooms = self.rooms();
        let room = rooms.entry(model).or_default();
        let others = room.partners.iter().filter(|(other, _)| **other != peer);
        for (other, partner) in others.filter(|(_, partner)| !partner.addresses.is_empty()) {
            // If the channel is full, the rest is met through other peers.
            let _ = introduce.try_send((*other, partner.addresses.clone()));
        }
        let number = room.next;
        room.next += 1;
        if room.partners.len() < MAX_PARTNERS {
            let partner = Partner {
                number,
                addresses: Heard::default(),
                introduce,
            };
            room.partners.insert(peer, partner);
        }
        drop(rooms);
        let present = Present {
            hub: self,
            model,
            peer,
            number,
        };
        (present, introduced)
    }

    /// Notes the addresses that `peer` has given, and introduces it to the others.
    fn note_addresses(&self, model: &Hash, peer: PeerId, addresses: Heard) {
        let mut rooms = self.rooms();
        let Some(room) = rooms.get_mut(model) else {
            return;
        };
        // Only the first message with addresses is news for the others.
        match room.partners.get_mut(&peer) {
            Some(partner) if partner.addresses.is_empty() => partner.addresses = addresses.clone(),
            _ => return,
        }
        for (_, partner) in room.partners.iter().filter(|(other, _)| **other != peer) {
            let _ = partner.introduce.try_send((peer, addresses.clone()));
        }
    }
}

/// Takes part in exchanges.
#[derive(Debug, Clone)]
pub(crate) struct Exchanger {
    pub(crate) hub: Hub,
    pub(crate) network: Network,
    pub(crate) store: Store,
}

impl Exchanger {
    /// Exchanges bitfields of `model` with `peer`, until either side ends the exchange.
    pub(crate) async fn dial(self, peer: PeerId, model: Hash) {
        let result = match self.network.open(peer, PROTOCOL, Class::Interactive).await {
            Ok(stream) => {
                let span = tracing::info_span!("exchange", %model, %peer);
                self.exchange(stream, model, None).instrument(span).await
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "cannot open an exchange of bitfields");
                return;
            }
        };
        tracing::debug!(%peer, ?result, "exchange of bitfields ended");
    }

    /// Answers a peer that starts an exchange.
    pub(crate) async fn accept(self, mut stream: Stream) {
        let peer = stream.peer();
        let first = timeout(FIRST_MESSAGE_TIMEOUT, frame::read(&mut stream, MAX_MESSAGE)).await;
        let Ok(Ok(Some(first))) = first else {
            tracing::debug!(%peer, "no first message in an exchange of bitfields");
            return;
        };
        let first: wire::SwarmMessage = first;
        let Some(model) = Hash::from_slice(&first.manifest) else {
            tracing::debug!(%peer, "the first message of an exchange of bitfields names no model");
            return;
        };
        let span = tracing::info_span!("exchange", %model, %peer);
        let exchange = self.exchange(stream, model, Some(first));
        let result = exchange.instrument(span).await;
        tracing::debug!(%peer, ?result, "exchange of bitfields ended");
    }

    /// Runs an exchange. `first` is the peer's first message, if the peer has started the exchange.
    async fn exchange(
        &self,
        stream: Stream,
        model: Hash,
        first: Option<wire::SwarmMessage>,
    ) -> Result<(), Error> {
        let peer = stream.peer();
        let (present, introduced) = self.hub.enter(model, peer);
        let dialed = first.is_none();
        if let Some(first) = first {
            self.handle_message(peer, &model, first).await;
        }
        let (reader, writer) = tokio::io::split(stream);
        let said = self.send_all(writer, model, dialed, introduced);
        let heard = self.receive_all(reader, peer, model);
        let result = tokio::select! {
            result = said => result,
            result = heard => result,
        };
        drop(present);
        result
    }

    async fn send_all<W>(
        &self,
        mut writer: W,
        model: Hash,
        dialed: bool,
        mut introduced: mpsc::Receiver<(PeerId, Heard)>,
    ) -> Result<(), Error>
    where
        W: AsyncWrite + Unpin,
    {
        let mut first = wire::SwarmMessage {
            peers: vec![wire::SwarmPeer {
                peer: self.network.local_peer().to_bytes().into(),
                addresses: encode(&self.network.addresses().for_strangers),
            }],
            ..Default::default()
        };
        if dialed {
            first.manifest = model.as_bytes().to_vec().into();
        }
        let mut told = Told::default();
        let mut linked = self.hub.linked(&model);
        let mut news = match &linked {
            Some(link) => told.news(&link.transfer),
            None => self.stored(model).await?,
        };
        if !dialed && news.is_empty() && linked.is_none() {
            first.unknown = true;
        }
        if !news.is_empty() {
            first.have = Some(news.remove(0));
        }
        send(&mut writer, &first).await?;
        let mut tell = interval(TELL_INTERVAL);
        loop {
            for have in news {
                let message = wire::SwarmMessage {
                    have: Some(have),
                    ..Default::default()
                };
                send(&mut writer, &message).await?;
            }
            writer.flush().await.map_err(|_| Error::Stopped)?;
            if first.unknown {
                return Ok(());
            }
            tokio::select! {
                Some(one) = introduced.recv() => {
                    let mut peers = vec![one];
                    while peers.len() < MAX_PEERS && let Ok(more) = introduced.try_recv() {
                        peers.push(more);
                    }
                    let peers = peers.iter().map(|(peer, addresses)| wire::SwarmPeer {
                        peer: peer.to_bytes().into(),
                        addresses: addresses.to_wire().into_iter().map(Into::into).collect(),
                    });
                    let message = wire::SwarmMessage { peers: peers.collect(), ..Default::default() };
                    send(&mut writer, &message).await?;
                    news = Vec::new();
                }
                _ = tell.tick() => {
                    let now = self.hub.linked(&model);
                    news = match &now {
                        Some(link) => told.news(&link.transfer),
                        // The transfer has just been completed or cancelled.
                        None if linked.is_some() => self.stored(model).await?,
                        None => Vec::new(),
                    };
                    linked = now;
                }
            }
        }
    }

    async fn receive_all<R>(&self, mut reader: R, peer: PeerId, model: Hash) -> Result<(), Error>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            let is_wanted = || self.hub.linked(&model).is_some();
            let Some(message) = next_message(&mut reader, SILENCE_TIMEOUT, is_wanted).await else {
                return Ok(());
            };
            let message = message.map_err(|error| {
                tracing::debug!(%peer, %error, "exchange of bitfields failed");
                Error::Stopped
            })?;
            let ends = message.unknown;
            let files = message.have.as_ref().map_or(0, |have| have.files.len());
            self.handle_message(peer, &model, message).await;
            if ends {
                return Ok(());
            }
            // Handling a file costs microseconds. An honest peer's messages arrive more slowly than this pause.
            sleep(MESSAGE_PACE * (1 + files as u32 / FILES_AT_A_TIME)).await;
        }
    }

    async fn handle_message(&self, peer: PeerId, model: &Hash, message: wire::SwarmMessage) {
        let mut news = Vec::new();
        let has_nothing = message.unknown;
        let own = self.network.local_peer();
        if has_nothing {
            news.push(News::Nothing(peer));
        }
        if let Some(have) = message.have {
            news.push(News::Have(peer, have));
        }
        for other in message.peers.into_iter().take(MAX_PEERS) {
            let Ok(id) = PeerId::from_bytes(&other.peer) else {
                continue;
            };
            let addresses = decode(&other.addresses);
            if id == peer {
                self.hub.note_addresses(model, peer, addresses.clone());
            }
            if is_to_contact(id, own, peer, has_nothing) {
                news.push(News::Peer(id, addresses));
            }
        }
        if let Some(link) = self.hub.linked(model) {
            for one in news {
                // Sending fails only if the swarm has just ended.
                let _ = link.news.send(one).await;
            }
        }
    }

    /// Returns the bitfields of a model that is stored here and not being fetched.
    async fn stored(&self, model: Hash) -> Result<Vec<wire::Have>, Error> {
        let store = self.store.clone();
        let looks = Arc::clone(&self.hub.looks.0);
        let permit = looks.acquire_owned().await.map_err(|_| Error::Stopped)?;
        blocking(move || {
            // The permit is held until the look is over, even if the caller is gone.
            let _permit = permit;
            Ok(match store.manifest(&model)? {
                Some(manifest) => availability::of_store(&store, &manifest)?,
                None => Vec::new(),
            })
        })
        .await
    }
}

/// Returns the next message. Returns `None` at the end of the stream, or after `silent` without a message if the
/// model is not wanted here.
async fn next_message<R>(
    reader: &mut R,
    silent: Duration,
    is_wanted: impl Fn() -> bool,
) -> Option<Result<wire::SwarmMessage, FrameError>>
where
    R: AsyncRead + Unpin,
{
    // A message that has partly arrived is continued after a timeout.
    let mut message = pin!(frame::read(reader, MAX_MESSAGE));
    loop {
        match timeout(silent, &mut message).await {
            Ok(message) => return message.transpose(),
            Err(_) if is_wanted() => {}
            Err(_) => return None,
        }
    }
}

/// Returns true if `id`, which `peer` has named, is to be contacted. A peer that has nothing names itself too. If it
/// counted as new, it would be asked again at once, and again after its answer.
fn is_to_contact(id: PeerId, own: PeerId, peer: PeerId, has_nothing: bool) -> bool {
    id != own && !(has_nothing && id == peer)
}

async fn send<W>(writer: &mut W, message: &wire::SwarmMessage) -> Result<(), Error>
where
    W: AsyncWrite + Unpin,
{
    // After any failure the exchange is over; another begins when there is a reason.
    frame::write(writer, message, MAX_MESSAGE)
        .await
        .map_err(|_| Error::Stopped)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::duplex;

    use super::*;

    #[test]
    fn a_peer_that_has_nothing_is_not_asked_again_because_it_names_itself() {
        let [own, peer, third] = [PeerId::random(), PeerId::random(), PeerId::random()];
        assert!(!is_to_contact(peer, own, peer, true));
        assert!(is_to_contact(peer, own, peer, false));
        assert!(is_to_contact(third, own, peer, true));
        assert!(!is_to_contact(own, own, peer, false));
    }

    #[tokio::test]
    async fn a_silent_exchange_ends_unless_the_model_is_fetched() {
        const BRIEF: Duration = Duration::from_millis(20);
        let (near, mut far) = duplex(1 << 16);
        let (mut reader, _writer) = tokio::io::split(near);
        let wanted = AtomicBool::new(true);
        let is_wanted = || wanted.load(Ordering::Relaxed);
        let message = wire::SwarmMessage {
            unknown: true,
            ..Default::default()
        };
        // A part of the message now, and the rest much later.
        let mut bytes = Vec::new();
        frame::write(&mut bytes, &message, MAX_MESSAGE)
            .await
            .unwrap();
        far.write_all(&bytes[..1]).await.unwrap();
        let late = async {
            sleep(10 * BRIEF).await;
            far.write_all(&bytes[1..]).await.unwrap();
            // The stream stays open.
            far
        };
        let next = next_message(&mut reader, BRIEF, is_wanted);
        let (heard, _far) = tokio::join!(next, late);
        assert!(heard.unwrap().unwrap().unknown);
        wanted.store(false, Ordering::Relaxed);
        let next = next_message(&mut reader, BRIEF, is_wanted);
        let next = timeout(Duration::from_secs(20), next).await.unwrap();
        assert!(next.is_none());
    }
}
