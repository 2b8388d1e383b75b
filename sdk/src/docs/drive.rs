//! Documents over the network: a stream each way to every peer that there is something to say to, and finding those who hold a document.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::AsyncWriteExt,
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};
use weft_crdt::{DocumentId, Documents, MAX_MESSAGE_BYTES, Outgoing};
use weft_dht::Dht;
use weft_net::{Class, Network, PeerId, Stream, StreamProtocol};
use weft_proto::frame;

use super::{
    holders::{Wish, keep_found},
    key_of, peer_of,
};

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/docs/1");

/// How often it is looked who is connected.
const LOOK: Duration = Duration::from_millis(500);

/// After a stream has failed, how long until another is opened.
const AGAIN: Duration = Duration::from_secs(5);

/// Bytes that wait for a peer; who does not take them in time is left.
const MAX_WAITING: usize = 8 << 20;

/// How long writing one message may take.
const WRITE: Duration = Duration::from_secs(60);

/// A peer that has sent what no honest peer would is not heard for so long.
const BAN: Duration = Duration::from_secs(3600);

/// What of a node drives its documents.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) documents: Documents,
    network: Network,
    wishes: mpsc::UnboundedSender<Wish>,
    /// A document is held from now on, or holders of one have been connected to.
    changed: Arc<Notify>,
}

/// What reads peers' streams, and what is heard of them.
pub(crate) type Hearing = (Listener, mpsc::Receiver<Heard>);

/// What is heard of peers' streams.
#[derive(Debug)]
pub(crate) enum Heard {
    /// A peer has opened one; whether it is listened to.
    Opened(PeerId, oneshot::Sender<bool>),
    /// A peer's last one has ended.
    Ended(PeerId),
}

/// Reads what peers say; for each stream that one opens. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    documents: Documents,
    heard: mpsc::Sender<Heard>,
    /// Streams that are being read, by peer.
    open: Arc<Mutex<HashMap<PeerId, usize>>>,
}

impl Driver {
    /// With what hears peers, and what finds and is found, to be run until the node stops.
    pub(crate) fn new(
        documents: Documents,
        network: Network,
        dht: Dht,
    ) -> (Arc<Self>, Hearing, impl Future<Output = ()> + use<>) {
        let (heard, called) = mpsc::channel(64);
        let listener = Listener {
            documents: documents.clone(),
            heard,
            open: Arc::default(),
        };
        // Bounded by the number of documents, and by how often an application opens and removes some.
        let (wishes, wished) = mpsc::unbounded_channel();
        let changed = Arc::new(Notify::new());
        let of_node = (dht, network.clone(), documents.clone());
        let keep = keep_found(of_node, Arc::clone(&changed), wished);
        let driver = Arc::new(Self {
            documents,
            network,
            wishes,
            changed,
        });
        (driver, (listener, called), keep)
    }

    /// A document is held from now on: others find this node, and it finds them.
    pub(crate) fn holds(&self, id: DocumentId) {
        // Once the node has stopped there is nobody to be found by.
        let _ = self.wishes.send(Wish::Hold(id));
        self.changed.notify_one();
    }

    pub(crate) fn drops(&self, id: DocumentId) {
        let _ = self.wishes.send(Wish::Drop(id));
    }

    /// Takes back that this node holds anything; for when it stops.
    pub(crate) async fn leave(&self) {
        let (left, is_left) = oneshot::channel();
        if self.wishes.send(Wish::Leave(left)).is_ok() {
            // It has ended if it does not answer.
            let _ = is_left.await;
        }
    }
}

/// Is found, and finds others, under what was held when the node stopped.
pub(crate) async fn hold_again(driver: Arc<Driver>) {
    let held = driver.documents.with(|replica| replica.list()).await;
    match held {
        Ok(held) => held.iter().for_each(|document| driver.holds(document.id)),
        Err(error) => tracing::warn!(%error, "documents"),
    }
}

/// What waits for a peer, and how much of it.
struct Outbox {
    messages: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
    writing: AbortHandle,
}

/// Runs until the network stops: tells documents who is there, and brings messages out. Holds no node.
pub(crate) async fn drive(
    driver: Arc<Driver>,
    mut outgoing: super::Outgoing,
    mut called: mpsc::Receiver<Heard>,
) {
    let network = driver.network.clone();
    let documents = driver.documents.clone();
    let changed = Arc::clone(&driver.changed);
    drop(driver);
    let mut known: HashMap<PeerId, Option<Outbox>> = HashMap::new();
    let mut later: HashMap<PeerId, Instant> = HashMap::new();
    let mut writers = JoinSet::new();
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            out = outgoing.recv() => match out {
                None => return,
                Some(Outgoing::Offence(key, why)) => {
                    if let Some(peer) = peer_of(&key) {
                        tracing::warn!(%peer, why, "a peer's documents are not listened to for an hour");
                        known.remove(&peer);
                        later.insert(peer, Instant::now() + BAN);
                        documents.disconnected(key).await;
                    }
                }
                Some(Outgoing::Send(key, message)) => {
                    let Some(peer) = peer_of(&key) else { continue };
                    let Some(outbox) = known.get_mut(&peer) else { continue };
                    let outbox = outbox.get_or_insert_with(|| open_outbox(&network, peer, &mut writers));
                    if !outbox.put(message) {
                        tracing::debug!(%peer, "does not take what it is told about documents");
                        known.remove(&peer);
                        later.insert(peer, Instant::now() + AGAIN);
                        documents.disconnected(key).await;
                    }
                }
                Some(_) => {}
            },
            Some(ended) = writers.join_next() => {
                let Ok(peer) = ended else { continue };
                known.remove(&peer);
                later.insert(peer, Instant::now() + AGAIN);
                if let Some(key) = key_of(&peer) {
                    documents.disconnected(key).await;
                }
            }
            Some(heard) = called.recv() => match heard {
                Heard::Opened(peer, listened) => {
                    // What it says is to be heard also where the next look would come too late for it.
                    let is_heard = !later.contains_key(&peer);
                    if is_heard
                        && !known.contains_key(&peer)
                        && let Some(key) = key_of(&peer)
                    {
                        known.insert(peer, None);
                        documents.connected(key).await;
                    }
                    // It may be gone again.
                    let _ = listened.send(is_heard);
                }
                // It is gone, or begins anew.
                Heard::Ended(peer) => {
                    if known.remove(&peer).is_some()
                        && let Some(key) = key_of(&peer)
                    {
                        documents.disconnected(key).await;
                    }
                }
            },
            _ = look.tick() => meet(&network, &documents, &mut known, &mut later).await,
            () = changed.notified() => meet(&network, &documents, &mut known, &mut later).await,
        }
    }
}

/// Tells documents of peers that have come and gone.
async fn meet(
    network: &Network,
    documents: &Documents,
    known: &mut HashMap<PeerId, Option<Outbox>>,
    later: &mut HashMap<PeerId, Instant>,
) {
    let here: HashSet<PeerId> = network
        .peers()
        .await
        .into_iter()
        .map(|peer| peer.peer)
        .collect();
    let now = Instant::now();
    later.retain(|_, until| *until > now);
    let gone: Vec<PeerId> = known
        .keys()
        .filter(|peer| !here.contains(peer))
        .copied()
        .collect();
    for peer in gone {
        known.remove(&peer);
        if let Some(key) = key_of(&peer) {
            documents.disconnected(key).await;
        }
    }
    for peer in here {
        let Some(key) = key_of(&peer) else { continue };
        if known.contains_key(&peer) || later.contains_key(&peer) {
            continue;
        }
        known.insert(peer, None);
        documents.connected(key).await;
    }
}

fn open_outbox(network: &Network, peer: PeerId, writers: &mut JoinSet<PeerId>) -> Outbox {
    let (messages, waiting) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(MAX_WAITING));
    let (network, of_writer) = (network.clone(), Arc::clone(&room));
    let writing = writers.spawn(async move {
        if let Err(error) = write_all(&network, peer, waiting, &of_writer).await {
            tracing::debug!(%peer, %error, "a stream of documents has ended");
        }
        peer
    });
    Outbox {
        messages,
        room,
        writing,
    }
}

impl Outbox {
    /// Whether there is room for it.
    fn put(&self, message: Bytes) -> bool {
        let size = u32::try_from(message.len()).unwrap_or(u32::MAX);
        match self.room.try_acquire_many(size) {
            Ok(room) => {
                room.forget();
                self.messages.send(message).is_ok()
            }
            Err(_) => false,
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.writing.abort();
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

async fn write_all(
    network: &Network,
    peer: PeerId,
    mut waiting: mpsc::UnboundedReceiver<Bytes>,
    room: &Semaphore,
) -> Result<(), Failed> {
    let mut stream: Option<Stream> = None;
    while let Some(message) = waiting.recv().await {
        // On a better path, if there is one.
        if stream
            .as_ref()
            .is_none_or(|stream| stream.best_path().is_better_open())
        {
            stream = Some(network.open(peer, PROTOCOL, Class::Interactive).await?);
        }
        let Some(stream) = &mut stream else {
            return Ok(());
        };
        let written = timeout(WRITE, async {
            frame::write_bytes(stream, &message, MAX_MESSAGE_BYTES).await?;
            stream.flush().await?;
            Ok::<_, Failed>(())
        });
        written.await??;
        room.add_permits(message.len());
    }
    Ok(())
}

impl Listener {
    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<PeerId, usize>> {
        self.open
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Reads what a peer says about documents on one stream.
    pub(crate) async fn listen(self, stream: Stream) {
        let peer = stream.peer();
        *self.open().entry(peer).or_default() += 1;
        self.read(stream).await;
        let is_last = {
            let mut open = self.open();
            let left = open.get(&peer).map_or(0, |count| count - 1);
            match left {
                0 => _ = open.remove(&peer),
                left => _ = open.insert(peer, left),
            }
            left == 0
        };
        if is_last {
            // Once the node has stopped there is nobody to tell.
            let _ = self.heard.send(Heard::Ended(peer)).await;
        }
    }

    /// The next message is read when the one before has been dealt with: a peer cannot fill our memory.
    async fn read(&self, mut stream: Stream) {
        let peer = stream.peer();
        let Some(key) = key_of(&peer) else {
            return;
        };
        let (listened, is_heard) = oneshot::channel();
        let told = self.heard.send(Heard::Opened(peer, listened)).await;
        if told.is_err() || is_heard.await != Ok(true) {
            return;
        }
        loop {
            match frame::read_bytes(&mut stream, MAX_MESSAGE_BYTES).await {
                Ok(Some(message)) => {
                    if let Err(error) = self.documents.received(key, message.into()).await {
                        tracing::warn!(%peer, %error, "documents");
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%peer, %error, "a stream of documents has ended");
                    return;
                }
            }
        }
    }
}
