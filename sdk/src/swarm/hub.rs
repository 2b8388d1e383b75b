//! Who else fetches or has a model: peers tell each other what they have of it, and whom else they know.

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

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new(availability::PROTOCOL);

/// How often a peer is told what has come.
const TELL: Duration = Duration::from_millis(250);

/// Between two messages of a peer at least: what they cost us is bounded by that.
const PACE: Duration = Duration::from_millis(10);

/// For so many files in a message there is one such pause more.
const FILES_AT_A_TIME: u32 = 1000;

/// How long the first message may take.
const FIRST: Duration = Duration::from_secs(10);

/// The time for which a peer may say nothing of a model that is not being fetched here before the exchange is ended. A
/// peer that fetches says what has come; a peer that has all of the model, or waits for very long, exchanges again when
/// it has a reason.
const SILENT: Duration = Duration::from_secs(600);

/// Peers of one model that are introduced to each other.
const MAX_GUESTS: usize = 256;

/// What a swarm hears from its peers.
#[derive(Debug)]
pub(crate) enum News {
    /// A peer has this.
    Have(PeerId, wire::Have),
    /// A peer has nothing of the model.
    Nothing(PeerId),
    /// There is such a peer, it is said.
    Peer(PeerId, Heard),
}

/// A model that is being fetched here.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub(crate) transfer: Transfer,
    pub(crate) news: mpsc::Sender<News>,
}

/// All of them, by model. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hub {
    rooms: Arc<Mutex<HashMap<Hash, Gathering>>>,
    looking: Looking,
}

/// How many may look through the store for strangers at a time: each look opens every file of a model.
#[derive(Debug, Clone)]
struct Looking(Arc<Semaphore>);

impl Default for Looking {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(2)))
    }
}

#[derive(Debug, Default)]
struct Gathering {
    guests: HashMap<PeerId, Guest>,
    next: u64,
    link: Option<Link>,
}

#[derive(Debug)]
struct Guest {
    /// Which exchange put it here: there may be two with one peer.
    number: u64,
    addresses: Heard,
    /// Takes whom it is to be told of.
    introduce: mpsc::Sender<(PeerId, Heard)>,
}

impl Hub {
    /// What fetches a model here, if anything does.
    pub(crate) fn transfer(&self, model: &Hash) -> Option<Transfer> {
        let rooms = self.rooms();
        let link = rooms.get(model)?.link.as_ref()?;
        Some(link.transfer.clone())
    }
}

/// A model that is linked while this is held.
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
            if room.get().guests.is_empty() {
                room.remove();
            }
        }
    }
}

/// A peer that is in a room while this is held.
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
            let guests = &mut room.get_mut().guests;
            if guests
                .get(&self.peer)
                .is_some_and(|guest| guest.number == self.number)
            {
                guests.remove(&self.peer);
            }
            if room.get().guests.is_empty() && room.get().link.is_none() {
                room.remove();
            }
        }
    }
}

impl Hub {
    fn rooms(&self) -> MutexGuard<'_, HashMap<Hash, Gathering>> {
        self.rooms
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// What peers say of `model` goes to `link` from now on, and what its transfer has is told to them.
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

    /// Introduces `peer` and those who are there to each other; whom it is to be told of.
    fn enter(&self, model: Hash, peer: PeerId) -> (Present<'_>, mpsc::Receiver<(PeerId, Heard)>) {
        let (introduce, introduced) = mpsc::channel(MAX_PEERS);
        let mut rooms = self.rooms();
        let room = rooms.entry(model).or_default();
        let others = room.guests.iter().filter(|(other, _)| **other != peer);
        for (other, guest) in others.filter(|(_, guest)| !guest.addresses.is_empty()) {
            // Those for whom there is no room are met through others.
            let _ = introduce.try_send((*other, guest.addresses.clone()));
        }
        let number = room.next;
        room.next += 1;
        if room.guests.len() < MAX_GUESTS {
            let guest = Guest {
                number,
                addresses: Heard::default(),
                introduce,
            };
            room.guests.insert(peer, guest);
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

    /// `peer` has said where it is.
    fn is_at(&self, model: &Hash, peer: PeerId, addresses: Heard) {
        let mut rooms = self.rooms();
        let Some(room) = rooms.get_mut(model) else {
            return;
        };
        // Said again, it is no news for the others.
        match room.guests.get_mut(&peer) {
            Some(guest) if guest.addresses.is_empty() => guest.addresses = addresses.clone(),
            _ => return,
        }
        for (_, guest) in room.guests.iter().filter(|(other, _)| **other != peer) {
            let _ = guest.introduce.try_send((peer, addresses.clone()));
        }
    }
}

/// What takes part in exchanges.
#[derive(Debug, Clone)]
pub(crate) struct Exchanger {
    pub(crate) hub: Hub,
    pub(crate) network: Network,
    pub(crate) store: Store,
}

impl Exchanger {
    /// Exchanges with `peer` what both have of `model`, until either side ends it.
    pub(crate) async fn dial(self, peer: PeerId, model: Hash) {
        let result = match self.network.open(peer, PROTOCOL, Class::Interactive).await {
            Ok(stream) => {
                let span = tracing::info_span!("exchange", %model, %peer);
                self.exchange(stream, model, None).instrument(span).await
            }
            Err(error) => {
                tracing::debug!(%peer, %error, "no exchange");
                return;
            }
        };
        tracing::debug!(%peer, ?result, "an exchange ended");
    }

    /// Answers a peer that begins to exchange.
    pub(crate) async fn accept(self, mut stream: Stream) {
        let peer = stream.peer();
        let first = timeout(FIRST, frame::read(&mut stream, MAX_MESSAGE)).await;
        let Ok(Ok(Some(first))) = first else {
            tracing::debug!(%peer, "an exchange did not begin");
            return;
        };
        let first: wire::SwarmMessage = first;
        let Some(model) = Hash::from_slice(&first.manifest) else {
            tracing::debug!(%peer, "an exchange began with no model");
            return;
        };
        let span = tracing::info_span!("exchange", %model, %peer);
        let exchange = self.exchange(stream, model, Some(first));
        let result = exchange.instrument(span).await;
        tracing::debug!(%peer, ?result, "an exchange ended");
    }

    /// `first`: what the peer began with, if it was the peer who did.
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
            self.heard(peer, &model, first).await;
        }
        let (reader, writer) = tokio::io::split(stream);
        let said = self.say(writer, model, dialed, introduced);
        let heard = self.hear(reader, peer, model);
        let result = tokio::select! {
            result = said => result,
            result = heard => result,
        };
        drop(present);
        result
    }

    async fn say<W>(
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
        let mut tell = interval(TELL);
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
                        // It has just been completed, or given up.
                        None if linked.is_some() => self.stored(model).await?,
                        None => Vec::new(),
                    };
                    linked = now;
                }
            }
        }
    }

    async fn hear<R>(&self, mut reader: R, peer: PeerId, model: Hash) -> Result<(), Error>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            let is_wanted = || self.hub.linked(&model).is_some();
            let Some(message) = next_message(&mut reader, SILENT, is_wanted).await else {
                return Ok(());
            };
            let message = message.map_err(|error| {
                tracing::debug!(%peer, %error, "an exchange broke");
                Error::Stopped
            })?;
            let ends = message.unknown;
            let files = message.have.as_ref().map_or(0, |have| have.files.len());
            self.heard(peer, &model, message).await;
            if ends {
                return Ok(());
            }
            // Taking note of a file costs microseconds: so much as an honest peer says in that time is free.
            sleep(PACE * (1 + files as u32 / FILES_AT_A_TIME)).await;
        }
    }

    async fn heard(&self, peer: PeerId, model: &Hash, message: wire::SwarmMessage) {
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
                self.hub.is_at(model, peer, addresses.clone());
            }
            if is_to_be_met(id, own, peer, has_nothing) {
                news.push(News::Peer(id, addresses));
            }
        }
        if let Some(link) = self.hub.linked(model) {
            for one in news {
                // The swarm has just ended otherwise.
                let _ = link.news.send(one).await;
            }
        }
    }

    /// What is here of a model that is not being fetched.
    async fn stored(&self, model: Hash) -> Result<Vec<wire::Have>, Error> {
        let store = self.store.clone();
        let looking = Arc::clone(&self.hub.looking.0);
        let permit = looking.acquire_owned().await.map_err(|_| Error::Stopped)?;
        blocking(move || {
            // Until the look is over, whether or not anybody still waits for it.
            let _permit = permit;
            Ok(match store.manifest(&model)? {
                Some(manifest) => availability::of_store(&store, &manifest)?,
                None => Vec::new(),
            })
        })
        .await
    }
}

/// The next message; `None` at the end, or if nothing is said for so long and it is not wanted either.
async fn next_message<R>(
    reader: &mut R,
    silent: Duration,
    is_wanted: impl Fn() -> bool,
) -> Option<Result<wire::SwarmMessage, FrameError>>
where
    R: AsyncRead + Unpin,
{
    // A message that has begun goes on where it was.
    let mut message = pin!(frame::read(reader, MAX_MESSAGE));
    loop {
        match timeout(silent, &mut message).await {
            Ok(message) => return message.transpose(),
            Err(_) if is_wanted() => {}
            Err(_) => return None,
        }
    }
}

/// Returns whether `id`, which `peer` names, is to be asked. A peer that has nothing names itself too: taken for a new
/// one, it would be asked again at once, and again after its answer.
fn is_to_be_met(id: PeerId, own: PeerId, peer: PeerId, has_nothing: bool) -> bool {
    id != own && !(has_nothing && id == peer)
}

async fn send<W>(writer: &mut W, message: &wire::SwarmMessage) -> Result<(), Error>
where
    W: AsyncWrite + Unpin,
{
    // Whatever went wrong, the exchange is over, and a new one begins when there is a reason.
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
        assert!(!is_to_be_met(peer, own, peer, true));
        assert!(is_to_be_met(peer, own, peer, false));
        assert!(is_to_be_met(third, own, peer, true));
        assert!(!is_to_be_met(own, own, peer, false));
    }

    #[tokio::test]
    async fn an_exchange_on_which_nothing_is_said_ends_unless_the_model_is_fetched() {
        const BRIEF: Duration = Duration::from_millis(20);
        let (near, mut far) = duplex(1 << 16);
        let (mut reader, _writer) = tokio::io::split(near);
        let wanted = AtomicBool::new(true);
        let is_wanted = || wanted.load(Ordering::Relaxed);
        let message = wire::SwarmMessage {
            unknown: true,
            ..Default::default()
        };
        // A part of it now, the rest much later.
        let mut bytes = Vec::new();
        frame::write(&mut bytes, &message, MAX_MESSAGE)
            .await
            .unwrap();
        far.write_all(&bytes[..1]).await.unwrap();
        let late = async {
            sleep(10 * BRIEF).await;
            far.write_all(&bytes[1..]).await.unwrap();
            // It stays open.
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
