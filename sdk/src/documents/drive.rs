//! Documents over the network: one stream each way to every peer with which there is something to exchange, and the
//! search for holders.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout},
};
use tracing::Instrument;
use weft_crdt::{DocumentId, Documents, Key, MAX_MESSAGE_BYTES, Outgoing};
use weft_net::{Class, Network, PeerId, Stream, StreamProtocol};
use weft_proto::frame;

use super::{
    holders::{self, SearchRequest, find_holders},
    key_of, peer_of,
};
use crate::discovery::{advertise::Advertiser, find::Discovery};

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/docs/1");

/// Interval at which the connected peers are looked up.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// First and longest pause before another stream is opened after one has failed soon. The pause doubles with each
/// failure.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// Age from which a stream that fails has not failed soon: another is opened at once.
const EARLY_FAILURE: Duration = Duration::from_secs(10);

/// The most bytes that may wait for one peer. A peer that reads too slowly is disconnected from documents for a
/// while.
const MAX_WAITING: usize = 8 << 20;

/// The shortest time that a stream stays on its path before it moves to a better one.
const SHORTEST_STAY: Duration = Duration::from_secs(5);

/// The longest time to write one message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for which a peer is ignored after it sent something that no honest peer would.
const BAN_TIME: Duration = Duration::from_secs(3600);

/// The longest time that a peer may take to send the first frame of a stream that it has opened.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects the node's documents to the network and the DHT.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) documents: Documents,
    network: Network,
    requests: mpsc::UnboundedSender<SearchRequest>,
    advertiser: Advertiser,
    run: Run,
    /// Notified when a new document is held, or when holders of one have been connected to.
    changed: Arc<Notify>,
}

/// Identifies one run of a program: random bytes drawn at each start. Each stream begins with the writer's.
pub(crate) type Run = [u8; 16];

/// The tasks that exchange documents until the node stops; returned with a [`Driver`].
pub(crate) struct Driving<F> {
    /// Reads the streams of peers.
    pub(crate) listener: Listener,
    /// Streams that peers have opened, for [`drive`].
    pub(crate) called: mpsc::Receiver<Opened>,
    /// The task that finds holders of documents.
    pub(crate) find_holders: F,
}

/// A peer has opened a stream in this run of its program. The reply says whether the stream is accepted.
#[derive(Debug)]
pub(crate) struct Opened(PeerId, Run, oneshot::Sender<bool>);

/// Reads messages on the streams that peers open. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    documents: Documents,
    opened: mpsc::Sender<Opened>,
}

impl Driver {
    /// Returns the driver, and the tasks that have to run with it.
    pub(crate) fn new(
        documents: Documents,
        discovery: Discovery,
        advertiser: Advertiser,
    ) -> (Arc<Self>, Driving<impl Future<Output = ()> + use<>>) {
        let (opened, called) = mpsc::channel(64);
        let listener = Listener {
            documents: documents.clone(),
            opened,
        };
        // Bounded by the number of documents, and by how often an application opens and removes documents.
        let (requests, requested) = mpsc::unbounded_channel();
        let changed = Arc::new(Notify::new());
        let mut run = Run::default();
        if let Err(error) = getrandom::fill(&mut run) {
            tracing::warn!(%error, "cannot get random bytes: peers will notice restarts of this node late");
        }
        let network = discovery.network().clone();
        let find = find_holders(
            discovery,
            documents.clone(),
            Arc::clone(&changed),
            requested,
        );
        let driver = Arc::new(Self {
            documents,
            network,
            requests,
            advertiser,
            run,
            changed,
        });
        let driving = Driving {
            listener,
            called,
            find_holders: find,
        };
        (driver, driving)
    }

    /// Notes that a document is held from now on: advertises this node as a holder, and searches for other holders.
    pub(crate) fn holds(&self, id: DocumentId) {
        self.advertiser.register(
            holders::record(&id),
            holders::value(),
            holders::HOLDER_TERMS,
        );
        // Sending fails once the node has stopped: then no holders are needed.
        let _ = self.requests.send(SearchRequest::Find(id));
        self.changed.notify_one();
    }

    /// Notes that a document is no longer held.
    pub(crate) fn drops(&self, id: DocumentId) {
        self.advertiser.remove(holders::record(&id));
        let _ = self.requests.send(SearchRequest::Forget(id));
    }
}

/// Advertises this node as a holder, and searches for holders, of the documents that it held before the restart.
pub(crate) async fn advertise_held(driver: Arc<Driver>) {
    let held = driver
        .documents
        .with(|replica| Ok(replica.ids().collect::<Vec<_>>()))
        .await;
    match held {
        Ok(held) => held.into_iter().for_each(|id| driver.holds(id)),
        Err(error) => tracing::warn!(%error, "cannot list the held documents"),
    }
}

/// Messages that wait for a peer, and the room for more.
struct Outbox {
    messages: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
    writing: AbortHandle,
    since: Instant,
}

/// A peer that documents know as connected.
#[derive(Default)]
struct Met {
    /// Opened with the first message.
    outbox: Option<Outbox>,
    /// The run of the peer's program from which messages are accepted.
    run: Option<Run>,
}

/// The connected peers, and the peers that are ignored for now.
struct Meeting {
    network: Network,
    documents: Documents,
    run: Run,
    known: HashMap<PeerId, Met>,
    banned: HashMap<PeerId, Instant>,
    /// Peers to which a stream has failed: the end and the length of the current pause.
    later: HashMap<PeerId, (Instant, Duration)>,
    writers: JoinSet<PeerId>,
}

/// Tells documents which peers are connected, and sends their messages, until the network stops. Holds no clone of
/// the node.
pub(crate) async fn drive(
    driver: Arc<Driver>,
    mut outgoing: super::Outgoing,
    mut called: mpsc::Receiver<Opened>,
) {
    let changed = Arc::clone(&driver.changed);
    let mut meeting = Meeting {
        network: driver.network.clone(),
        documents: driver.documents.clone(),
        run: driver.run,
        known: HashMap::new(),
        banned: HashMap::new(),
        later: HashMap::new(),
        writers: JoinSet::new(),
    };
    drop(driver);
    let mut look = tokio::time::interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            out = outgoing.recv() => match out {
                None => return,
                Some(Outgoing::Offence(key, why)) => {
                    if let Some(peer) = peer_of(&key) {
                        tracing::warn!(%peer, why, "ignoring a peer's messages about documents for an hour");
                        meeting.banned.insert(peer, Instant::now() + BAN_TIME);
                        meeting.part(peer).await;
                    }
                }
                Some(Outgoing::Send(key, message)) => meeting.send(key, message).await,
                Some(_) => {}
            },
            Some(ended) = meeting.writers.join_next() => if let Ok(peer) = ended {
                meeting.ended(peer).await;
            },
            Some(Opened(peer, run, listened)) = called.recv() => {
                let is_heard = meeting.opened(peer, run).await;
                // The stream may have ended meanwhile.
                let _ = listened.send(is_heard);
            }
            _ = look.tick() => meeting.update_peers().await,
            () = changed.notified() => meeting.update_peers().await,
        }
    }
}

impl Meeting {
    async fn meet(&mut self, peer: PeerId, run: Option<Run>) {
        if let Some(key) = key_of(&peer) {
            tracing::debug!(%peer, "comparing documents with a peer");
            self.known.insert(peer, Met { outbox: None, run });
            self.documents.connected(key).await;
        }
    }

    async fn part(&mut self, peer: PeerId) {
        if self.known.remove(&peer).is_some()
            && let Some(key) = key_of(&peer)
        {
            self.documents.disconnected(key).await;
        }
    }

    /// Tells documents of peers that have connected and disconnected.
    async fn update_peers(&mut self) {
        let peers = self.network.peers().await.into_iter();
        let here: HashSet<PeerId> = peers.map(|peer| peer.peer).collect();
        let now = Instant::now();
        self.banned.retain(|_, until| *until > now);
        // The length of the last pause is forgotten after the same time again.
        self.later
            .retain(|_, (until, pause)| *until + *pause + EARLY_FAILURE > now);
        let gone = self.known.keys().filter(|peer| !here.contains(peer));
        for peer in gone.copied().collect::<Vec<_>>() {
            self.part(peer).await;
        }
        for peer in here {
            let is_later = |(until, _): &(Instant, Duration)| *until > now;
            let waits = self.later.get(&peer).is_some_and(is_later);
            if !waits && !self.known.contains_key(&peer) && !self.banned.contains_key(&peer) {
                self.meet(peer, None).await;
            }
        }
    }

    async fn send(&mut self, key: Key, message: Bytes) {
        let Some(peer) = peer_of(&key) else { return };
        let Some(met) = self.known.get_mut(&peer) else {
            return;
        };
        let (network, writers, run) = (&self.network, &mut self.writers, self.run);
        let outbox = met
            .outbox
            .get_or_insert_with(|| open_outbox(network, peer, run, writers));
        if !outbox.put(message) {
            tracing::debug!(%peer, "peer reads messages about documents too slowly");
            self.fails(peer).await;
        }
    }

    /// Handles the end of a stream to a peer. Messages may be lost, so documents meet the peer again: at once, unless
    /// that was just tried.
    async fn ended(&mut self, peer: PeerId) {
        let outbox = self.known.get(&peer).and_then(|met| met.outbox.as_ref());
        // The peer may have been left, or met again, meanwhile.
        if outbox.is_none_or(|outbox| !outbox.writing.is_finished()) {
            return;
        }
        if outbox.is_some_and(|outbox| outbox.since.elapsed() >= EARLY_FAILURE) {
            self.part(peer).await;
            self.update_peers().await;
        } else {
            self.fails(peer).await;
        }
    }

    async fn fails(&mut self, peer: PeerId) {
        let last = self.later.get(&peer).map(|(_, pause)| *pause * 2);
        let pause = last.unwrap_or(RETRY_PAUSE.0).min(RETRY_PAUSE.1);
        self.later.insert(peer, (Instant::now() + pause, pause));
        self.part(peer).await;
    }

    /// Handles a stream that a peer has opened. Returns true if it is accepted.
    async fn opened(&mut self, peer: PeerId, run: Run) -> bool {
        if self.banned.contains_key(&peer) {
            return false;
        }
        match self.known.get_mut(&peer) {
            // Another run of the peer's program: messages to the run before are lost, and so is its state.
            Some(met) if met.run.is_some_and(|known| known != run) => {
                self.part(peer).await;
                self.meet(peer, Some(run)).await;
            }
            Some(met) => met.run = Some(run),
            // The peer is met now, because the next look would come too late for its first messages.
            None => self.meet(peer, Some(run)).await,
        }
        true
    }
}

fn open_outbox(network: &Network, peer: PeerId, run: Run, writers: &mut JoinSet<PeerId>) -> Outbox {
    let (messages, waiting) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(MAX_WAITING));
    let (network, of_writer) = (network.clone(), Arc::clone(&room));
    let span = tracing::info_span!("documents", %peer);
    let writing = async move {
        if let Err(error) = write_all(&network, peer, run, waiting, &of_writer).await {
            tracing::debug!(%peer, %error, "stream of documents ended");
        }
        peer
    };
    let writing = writers.spawn(writing.instrument(span));
    Outbox {
        messages,
        room,
        writing,
        since: Instant::now(),
    }
}

impl Outbox {
    /// Queues a message. Returns false if the queue has no room for it.
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
    run: Run,
    mut waiting: mpsc::UnboundedReceiver<Bytes>,
    room: &Semaphore,
) -> Result<(), Failed> {
    let mut stream: Option<Stream> = None;
    let mut opened = Instant::now();
    loop {
        let message = tokio::select! {
            message = waiting.recv() => match message {
                Some(message) => message,
                None => return Ok(()),
            },
            // The last messages may not have arrived.
            () = end(&mut stream) => return Err("the peer has closed its side".into()),
        };
        let written = timeout(WRITE_TIMEOUT, async {
            // Moves to a better path, if there is one. This is tried at intervals, because the better path may turn
            // out not to work.
            if opened.elapsed() > SHORTEST_STAY
                && let Some(old) = stream.take_if(|stream| stream.best_path().is_better_open())
            {
                finish(old).await?;
            }
            let stream = match &mut stream {
                Some(stream) => stream,
                none => {
                    let new = network.open(peer, PROTOCOL, Class::Interactive).await?;
                    tracing::debug!(%peer, path = ?new.path(), "opened a stream for documents");
                    opened = Instant::now();
                    let stream = none.insert(new);
                    frame::write_bytes(stream, &run, MAX_MESSAGE_BYTES).await?;
                    stream
                }
            };
            frame::write_bytes(stream, &message, MAX_MESSAGE_BYTES).await?;
            stream.flush().await?;
            Ok::<_, Failed>(())
        });
        written.await??;
        room.add_permits(message.len());
    }
}

/// Ends a stream in order: when the peer closes its side too, it has read everything.
async fn finish(mut stream: Stream) -> Result<(), Failed> {
    stream.shutdown().await?;
    match stream.read(&mut [0]).await? {
        0 => Ok(()),
        _ => Err("the peer sent data on a stream on which it only reads".into()),
    }
}

/// Waits until a stream or its connection has ended. The peer sends nothing on it.
async fn end(stream: &mut Option<Stream>) {
    match stream {
        Some(stream) => _ = stream.read(&mut [0]).await,
        None => std::future::pending().await,
    }
}

impl Listener {
    /// Reads a peer's messages about documents on one stream. The next message is read once the last has been
    /// processed, so a peer cannot fill this node's memory. When the stream ends, the peer has to find out what has
    /// not arrived.
    pub(crate) async fn listen(self, stream: Stream) {
        let peer = stream.peer();
        let span = tracing::info_span!("documents", %peer);
        self.listen_to(peer, stream).instrument(span).await;
    }

    async fn listen_to(self, peer: PeerId, mut stream: Stream) {
        let Some(key) = key_of(&peer) else {
            return;
        };
        let first = timeout(
            FIRST_FRAME_TIMEOUT,
            frame::read_bytes(&mut stream, size_of::<Run>()),
        )
        .await;
        let Ok(Ok(Some(run))) = first else {
            return;
        };
        let Ok(run) = run.try_into() else {
            return;
        };
        let (listened, is_heard) = oneshot::channel();
        let told = self.opened.send(Opened(peer, run, listened)).await;
        if told.is_err() || is_heard.await != Ok(true) {
            return;
        }
        loop {
            match frame::read_bytes(&mut stream, MAX_MESSAGE_BYTES).await {
                Ok(Some(message)) => {
                    if let Err(error) = self.documents.received(key, message.into()).await {
                        tracing::warn!(%peer, %error, "cannot process a message about documents");
                        return;
                    }
                }
                Ok(None) => {
                    // Confirms that everything was read. A peer that misses this compares its documents again.
                    let _ = stream.shutdown().await;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%peer, %error, "stream of documents ended");
                    return;
                }
            }
        }
    }
}
