//! Documents over the network: a stream each way to every peer that there is something to say to, and finding those who hold a document.

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
    holders::{self, Wish, find_holders},
    key_of, peer_of,
};
use crate::discovery::{advertise::Advertiser, find::Discovery};

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/docs/1");

/// How often it is looked who is connected.
const LOOK: Duration = Duration::from_millis(500);

/// After a stream has failed soon, how long until another is opened; after each more twice as long, up to the second.
const AGAIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A stream that was there for so long has not failed soon: another is opened at once.
const LIVED: Duration = Duration::from_secs(10);

/// Bytes that wait for a peer; who does not take them in time is left.
const MAX_WAITING: usize = 8 << 20;

/// How long a stream is kept where it is, at least, before it goes on over a better path.
const SWITCH: Duration = Duration::from_secs(5);

/// How long writing one message may take.
const WRITE: Duration = Duration::from_secs(60);

/// A peer that has sent what no honest peer would is not heard for so long.
const BAN: Duration = Duration::from_secs(3600);

/// The longest time that a peer may take to begin on a stream that it has opened.
const FIRST: Duration = Duration::from_secs(10);

/// What of a node drives its documents.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) documents: Documents,
    network: Network,
    wishes: mpsc::UnboundedSender<Wish>,
    advertiser: Advertiser,
    run: Run,
    /// A document is held from now on, or holders of one have been connected to.
    changed: Arc<Notify>,
}

/// A run of a program: drawn anew at every start. Each stream begins with its writer's.
pub(crate) type Run = [u8; 16];

/// What drives documents beside the [`Driver`], until the node stops.
pub(crate) struct Driving<F> {
    /// Reads peers' streams.
    pub(crate) listener: Listener,
    /// What is heard of these, for [`drive`].
    pub(crate) called: mpsc::Receiver<Opened>,
    /// Finds holders of documents.
    pub(crate) find_holders: F,
}

/// A peer has opened a stream, in this run of its program; whether it is listened to.
#[derive(Debug)]
pub(crate) struct Opened(PeerId, Run, oneshot::Sender<bool>);

/// Reads what peers say; for each stream that one opens. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Listener {
    documents: Documents,
    opened: mpsc::Sender<Opened>,
}

impl Driver {
    /// Returns what drives it as well.
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
        // Bounded by the number of documents, and by how often an application opens and removes some.
        let (wishes, wished) = mpsc::unbounded_channel();
        let changed = Arc::new(Notify::new());
        let mut run = Run::default();
        if let Err(error) = getrandom::fill(&mut run) {
            tracing::warn!(%error, "no randomness: peers notice late when this node restarts");
        }
        let network = discovery.network().clone();
        let find = find_holders(discovery, documents.clone(), Arc::clone(&changed), wished);
        let driver = Arc::new(Self {
            documents,
            network,
            wishes,
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

    /// A document is held from now on: others find this node, and it finds them.
    pub(crate) fn holds(&self, id: DocumentId) {
        self.advertiser
            .register(holders::record(&id), holders::value(), holders::HOLDER);
        // Once the node has stopped there is nobody to be found.
        let _ = self.wishes.send(Wish::Find(id));
        self.changed.notify_one();
    }

    /// A document is held no longer.
    pub(crate) fn drops(&self, id: DocumentId) {
        self.advertiser.remove(holders::record(&id));
        let _ = self.wishes.send(Wish::Forget(id));
    }
}

/// Is found, and finds others, under what was held when the node stopped.
pub(crate) async fn hold_again(driver: Arc<Driver>) {
    let held = driver
        .documents
        .with(|replica| Ok(replica.ids().collect::<Vec<_>>()))
        .await;
    match held {
        Ok(held) => held.into_iter().for_each(|id| driver.holds(id)),
        Err(error) => tracing::warn!(%error, "documents"),
    }
}

/// What waits for a peer, and how much of it.
struct Outbox {
    messages: mpsc::UnboundedSender<Bytes>,
    room: Arc<Semaphore>,
    writing: AbortHandle,
    since: Instant,
}

/// A peer that documents know to be there.
#[derive(Default)]
struct Met {
    /// Opened when there is something to say.
    outbox: Option<Outbox>,
    /// Which run of the peer's program is heard.
    run: Option<Run>,
}

/// Who is there, and who is not listened to or talked to for now.
struct Meeting {
    network: Network,
    documents: Documents,
    run: Run,
    known: HashMap<PeerId, Met>,
    banned: HashMap<PeerId, Instant>,
    /// To whom a stream has failed: until when, and how long the pause was.
    later: HashMap<PeerId, (Instant, Duration)>,
    writers: JoinSet<PeerId>,
}

/// Runs until the network stops: tells documents who is there, and brings messages out. Holds no node.
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
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            out = outgoing.recv() => match out {
                None => return,
                Some(Outgoing::Offence(key, why)) => {
                    if let Some(peer) = peer_of(&key) {
                        tracing::warn!(%peer, why, "a peer's documents are not listened to for an hour");
                        meeting.banned.insert(peer, Instant::now() + BAN);
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
                // It may be gone again.
                let _ = listened.send(is_heard);
            }
            _ = look.tick() => meeting.look().await,
            () = changed.notified() => meeting.look().await,
        }
    }
}

impl Meeting {
    async fn meet(&mut self, peer: PeerId, run: Option<Run>) {
        if let Some(key) = key_of(&peer) {
            tracing::debug!(%peer, "documents are compared");
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

    /// Tells documents of peers that have come and gone.
    async fn look(&mut self) {
        let peers = self.network.peers().await.into_iter();
        let here: HashSet<PeerId> = peers.map(|peer| peer.peer).collect();
        let now = Instant::now();
        self.banned.retain(|_, until| *until > now);
        // How long the last pause was is forgotten after as long again.
        self.later
            .retain(|_, (until, pause)| *until + *pause + LIVED > now);
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
            tracing::debug!(%peer, "does not take what it is told about documents");
            self.fails(peer).await;
        }
    }

    /// What was to be told may be lost. It is met again: at once, unless that has just been tried.
    async fn ended(&mut self, peer: PeerId) {
        let outbox = self.known.get(&peer).and_then(|met| met.outbox.as_ref());
        // It may have been left, or met again, meanwhile.
        if outbox.is_none_or(|outbox| !outbox.writing.is_finished()) {
            return;
        }
        if outbox.is_some_and(|outbox| outbox.since.elapsed() >= LIVED) {
            self.part(peer).await;
            self.look().await;
        } else {
            self.fails(peer).await;
        }
    }

    async fn fails(&mut self, peer: PeerId) {
        let last = self.later.get(&peer).map(|(_, pause)| *pause * 2);
        let pause = last.unwrap_or(AGAIN.0).min(AGAIN.1);
        self.later.insert(peer, (Instant::now() + pause, pause));
        self.part(peer).await;
    }

    /// A peer has opened a stream; whether it is listened to.
    async fn opened(&mut self, peer: PeerId, run: Run) -> bool {
        if self.banned.contains_key(&peer) {
            return false;
        }
        match self.known.get_mut(&peer) {
            // Another run of its program: what was told to the one before is lost, and so is what that had.
            Some(met) if met.run.is_some_and(|known| known != run) => {
                self.part(peer).await;
                self.meet(peer, Some(run)).await;
            }
            Some(met) => met.run = Some(run),
            // What it says is to be heard also where the next look would come too late for it.
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
            tracing::debug!(%peer, %error, "a stream of documents has ended");
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
            // What was written may not have arrived.
            () = end(&mut stream) => return Err("the peer does not listen any more".into()),
        };
        let written = timeout(WRITE, async {
            // On a better path, if there is one; not looked for all the time, for it may turn out to be none.
            if opened.elapsed() > SWITCH
                && let Some(old) = stream.take_if(|stream| stream.best_path().is_better_open())
            {
                finish(old).await?;
            }
            let stream = match &mut stream {
                Some(stream) => stream,
                none => {
                    let new = network.open(peer, PROTOCOL, Class::Interactive).await?;
                    tracing::debug!(%peer, path = ?new.path(), "a stream for documents");
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

/// Ends a stream in order: all that was written has been read when the peer closes it too.
async fn finish(mut stream: Stream) -> Result<(), Failed> {
    stream.shutdown().await?;
    match stream.read(&mut [0]).await? {
        0 => Ok(()),
        _ => Err("the peer says something where it only listens".into()),
    }
}

/// Until a stream has ended, or its connection: nothing is said on it the other way.
async fn end(stream: &mut Option<Stream>) {
    match stream {
        Some(stream) => _ = stream.read(&mut [0]).await,
        None => std::future::pending().await,
    }
}

impl Listener {
    /// Reads what a peer says about documents on one stream. The next message is read when the one before has been dealt with: a peer cannot fill our memory. When
    /// the stream ends, it is for the peer to see what of it has not arrived.
    pub(crate) async fn listen(self, stream: Stream) {
        let peer = stream.peer();
        let span = tracing::info_span!("documents", %peer);
        self.listen_to(peer, stream).instrument(span).await;
    }

    async fn listen_to(self, peer: PeerId, mut stream: Stream) {
        let Some(key) = key_of(&peer) else {
            return;
        };
        let first = timeout(FIRST, frame::read_bytes(&mut stream, size_of::<Run>())).await;
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
                        tracing::warn!(%peer, %error, "documents");
                        return;
                    }
                }
                Ok(None) => {
                    // Says that all of it was read. Who does not hear it compares again.
                    let _ = stream.shutdown().await;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%peer, %error, "a stream of documents has ended");
                    return;
                }
            }
        }
    }
}
