//! The keeper of what this node advertises in the DHT: where it is, which models, documents, topics and services it has,
//! and the records of its applications.
//!
//! Everything that a node states by itself is registered here as a record's key and subkey, what makes its value, and
//! its [`Terms`]: how long it lives without the node, and whether it is withdrawn when the node stops. [`Book`] decides
//! what is stated when; [`keep`] is its clock, and hands its work to the DHT. One pace holds for the whole node.

mod book;
mod pace;
mod presence;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use tokio::{
    sync::{mpsc, oneshot},
    task::{self, JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};
use weft_dht::{Dht, DhtError};
use weft_net::Network;

use self::book::{Book, Deed, Outcome, Token, Work};
pub(crate) use self::{pace::Pace, presence::Presence};
use crate::{Error, discovery::addresses::encode};

/// A change is waited for this long: several often come together. It is short, as somebody may be waiting to be found.
pub(crate) const SETTLE: Duration = Duration::from_millis(200);

/// The longest time between two statements of a record: three times within the two hours that most of them live, so
/// that one lost round costs nothing.
const REFRESH: Duration = Duration::from_secs(40 * 60);

/// In a mesh with fewer nodes than this, each node that comes is told: a record is kept by the twenty nodes closest to
/// it, so a new node is to keep every record.
pub(crate) const SMALL_MESH: usize = 20;

/// Work under way that nobody waits for.
const AT_A_TIME: usize = 8;

/// How long withdrawing may take when the node stops, and how many records are withdrawn at a time.
const LEAVE: Duration = Duration::from_secs(2);
const LEAVING: usize = 32;

/// The identity of one of this node's records.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RecordId {
    pub(crate) key: Vec<u8>,
    pub(crate) subkey: Vec<u8>,
}

impl RecordId {
    /// The record without a subkey.
    pub(crate) fn of(key: Vec<u8>) -> Self {
        Self {
            key,
            subkey: Vec::new(),
        }
    }
}

/// The terms of one kind of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// How long a record holds without its publisher.
    pub(crate) ttl: Duration,
    pub(crate) rank: Rank,
    /// The value has this node's addresses in it: it is stated again when they change.
    pub(crate) has_addresses: bool,
    pub(crate) at_stop: AtStop,
}

impl Terms {
    /// The time between two statements: a third of the life of a record, so that one lost round costs nothing.
    fn refresh(&self) -> Duration {
        (self.ttl / 3).min(REFRESH)
    }
}

/// Which records go first where several are due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// There are few of them, and peers look for them to connect: the node itself, its services and topics.
    Presence,
    /// There may be many thousands: models, documents, records of applications.
    Content,
}

impl Rank {
    const COUNT: usize = 2;
}

/// What happens to a record when the node stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtStop {
    /// It holds only while the node runs, so it is withdrawn: nobody is to try in vain.
    Withdraw,
    /// It stays until its life ends.
    Keep,
}

/// What makes the value of a record when it is stated.
#[derive(Clone)]
pub(crate) enum Value {
    /// Made of this node's addresses, encoded, as they are then. `None`: there is nothing to be stated now.
    Made(Arc<dyn Fn(Vec<Bytes>) -> Made + Send + Sync>),
    /// The DHT's store has the record, signed; it is said again as it is for as long as it holds.
    Signed,
}

type Made = BoxFuture<'static, Result<Option<Vec<u8>>, Error>>;

impl Value {
    /// A value made of addresses at once.
    pub(crate) fn of(value: impl Fn(Vec<Bytes>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::Made(Arc::new(move |addresses| {
            futures::future::ready(Ok(Some(value(addresses)))).boxed()
        }))
    }

    /// A value that something has to be looked up for.
    pub(crate) fn looked_up<F>(value: impl Fn(Vec<Bytes>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Option<Vec<u8>>, Error>> + Send + 'static,
    {
        Self::Made(Arc::new(move |addresses| value(addresses).boxed()))
    }
}

/// Takes the answer to work on a record: how many other nodes took it.
type Reply = oneshot::Sender<Result<usize, Error>>;

enum Command {
    Register {
        records: Vec<(RecordId, Value)>,
        token: Token,
        terms: Terms,
        many: bool,
    },
    Stated {
        id: RecordId,
        terms: Terms,
        took: usize,
    },
    State {
        id: RecordId,
        value: Value,
        terms: Terms,
        reply: Reply,
    },
    Renew(RecordId),
    Remove(RecordId, Token),
    Withdraw(RecordId, Terms, Reply),
    Leave(oneshot::Sender<()>),
}

/// Registers records with the keeper. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Advertiser {
    /// Bounded by what callers register: each command is answered by a change of memory alone.
    commands: mpsc::UnboundedSender<Command>,
    tokens: Arc<AtomicU64>,
}

impl Advertiser {
    /// Returns the keeper as well, to be run until the node stops.
    pub(crate) fn new(dht: Dht, network: Network) -> (Self, impl Future<Output = ()> + use<>) {
        let (commands, wanted) = mpsc::unbounded_channel();
        let advertiser = Self {
            commands,
            tokens: Arc::new(AtomicU64::new(1)),
        };
        (advertiser, keep(dht, network, wanted))
    }

    /// States a record from now on.
    pub(crate) fn register(&self, id: RecordId, value: Value, terms: Terms) {
        self.send(Command::Register {
            records: vec![(id, value)],
            token: 0,
            terms,
            many: false,
        });
    }

    /// States many records from now on.
    pub(crate) fn register_all(&self, records: Vec<(RecordId, Value)>, terms: Terms) {
        self.send(Command::Register {
            records,
            token: 0,
            terms,
            many: true,
        });
    }

    /// States a record from now on, for as long as what this returns is held.
    pub(crate) fn be_present(&self, id: RecordId, value: Value, terms: Terms) -> Presence {
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        self.send(Command::Register {
            records: vec![(id.clone(), value)],
            token,
            terms,
            many: false,
        });
        Presence::new(self.clone(), id, token)
    }

    /// Says a record of the DHT's store again from now on. It has just been stated or withdrawn, and so many other nodes
    /// took it.
    pub(crate) fn keep_stated(&self, id: RecordId, terms: Terms, took: usize) {
        self.send(Command::Stated { id, terms, took });
    }

    /// As [`register`](Self::register), and states the record at once, ahead of all others; how many other nodes took it.
    ///
    /// # Errors
    /// The value's, [`DhtError`]'s, [`Error::Stopped`].
    pub(crate) async fn state(
        &self,
        id: RecordId,
        value: Value,
        terms: Terms,
    ) -> Result<usize, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::State {
            id,
            value,
            terms,
            reply,
        });
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// States a record no longer, and withdraws it sometime soon.
    pub(crate) fn remove(&self, id: RecordId) {
        self.end(id, 0);
    }

    /// States a record no longer, and withdraws it at once; how many other nodes heard of it.
    ///
    /// # Errors
    /// [`DhtError`]'s, [`Error::Stopped`].
    pub(crate) async fn withdraw(&self, id: RecordId, terms: Terms) -> Result<usize, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Withdraw(id, terms, reply));
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Withdraws all records that hold only while the node runs, because it is about to stop; states nothing after
    /// that. Returns after two seconds at most.
    pub(crate) async fn leave(&self) {
        let (left, done) = oneshot::channel();
        self.send(Command::Leave(left));
        // The keeper ends with the network.
        let _ = done.await;
    }

    fn renew(&self, id: RecordId) {
        self.send(Command::Renew(id));
    }

    fn end(&self, id: RecordId, token: Token) {
        self.send(Command::Remove(id, token));
    }

    fn send(&self, command: Command) {
        // Without a keeper the node has stopped, and states nothing.
        let _ = self.commands.send(command);
    }
}

/// States and withdraws what the book says, until the network stops.
async fn keep(dht: Dht, network: Network, mut wanted: mpsc::UnboundedReceiver<Command>) {
    let mut addresses = network.watch_addresses();
    let mut meetings = dht.meetings();
    let mut nodes = dht.nodes();
    let mut keeper = Keeper {
        book: Book::new(Instant::now()),
        works: JoinSet::new(),
        under_way: HashMap::new(),
        waiting: HashMap::new(),
        dht,
        network,
    };
    let mut alone = true;
    loop {
        let next = keeper.book.next();
        let next = next.filter(|_| keeper.works.len() < AT_A_TIME);
        tokio::select! {
            command = wanted.recv() => match command {
                None => return,
                Some(Command::Leave(left)) => {
                    keeper.leave().await;
                    // The caller may have gone.
                    let _ = left.send(());
                    return;
                }
                Some(command) => keeper.take(command),
            },
            Some(done) = keeper.works.join_next_with_id() => keeper.ended(done, alone),
            changed = nodes.changed() => {
                let Ok(()) = changed else { return };
                let is_alone = *nodes.borrow_and_update() == 0;
                if std::mem::replace(&mut alone, is_alone) && !is_alone {
                    keeper.book.joined(Instant::now());
                }
            },
            changed = addresses.changed() => {
                let Ok(()) = changed else { return };
                keeper.book.addresses_changed(Instant::now());
            },
            met = meetings.changed() => {
                let Ok(()) = met else { return };
                let small = *nodes.borrow() < SMALL_MESH;
                keeper.book.met(small, Instant::now());
            },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                if let Some(work) = keeper.book.poll(Instant::now()) {
                    keeper.begin(work);
                }
            }
        }
    }
}

struct Keeper {
    book: Book<Value>,
    works: JoinSet<Outcome>,
    /// The record that each task of `works` is about.
    under_way: HashMap<task::Id, RecordId>,
    /// Callers that wait for work on a record which has not begun, in the order in which they came.
    waiting: HashMap<RecordId, VecDeque<Reply>>,
    dht: Dht,
    network: Network,
}

impl Keeper {
    fn take(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Register {
                records,
                token,
                terms,
                many,
            } => self.book.register(records, token, terms, many, now),
            Command::Stated { id, terms, took } => {
                self.book
                    .register_stated(id, Value::Signed, terms, took, now);
            }
            Command::State {
                id,
                value,
                terms,
                reply,
            } => {
                self.book
                    .register([(id.clone(), value)], 0, terms, false, now);
                self.urge(id, reply);
            }
            Command::Renew(id) => self.book.renew(&id, now),
            Command::Remove(id, token) => self.book.remove(&id, token, now),
            Command::Withdraw(id, terms, reply) => {
                self.book.withdraw(&id, terms);
                self.urge(id, reply);
            }
            // Taken where commands come in.
            Command::Leave(_) => {}
        }
    }

    fn urge(&mut self, id: RecordId, reply: Reply) {
        self.waiting.entry(id.clone()).or_default().push_back(reply);
        if let Some(work) = self.book.begin(&id, Instant::now()) {
            self.begin(work);
        }
    }

    fn begin(&mut self, work: Work<Value>) {
        let waiting = self.waiting.get_mut(&work.id);
        let reply = waiting.and_then(VecDeque::pop_front);
        let (dht, network) = (self.dht.clone(), self.network.clone());
        let id = work.id.clone();
        let task = self.works.spawn(async move {
            let (done, outcome) = match &work.deed {
                Deed::State {
                    value: Value::Signed,
                    ..
                } => say_again(&dht, &work.id).await,
                Deed::State {
                    value: Value::Made(make),
                    again,
                } => {
                    let value = make(encode(&network.addresses().for_strangers)).await;
                    state(&dht, &work, value, *again).await
                }
                Deed::Withdraw => withdraw(&dht, &work, reply.is_some()).await,
            };
            let key = String::from_utf8_lossy(&work.id.key);
            match &done {
                Ok(took) => tracing::debug!(%key, took, ?outcome, "advertised"),
                Err(error) => tracing::debug!(%key, %error, "not advertised"),
            }
            if let Some(reply) = reply {
                // The caller may have gone.
                let _ = reply.send(done);
            }
            outcome
        });
        self.under_way.insert(task.id(), id);
    }

    /// A task has ended. One that has panicked is as one that has failed: the record is not lost with it.
    fn ended(&mut self, task: Result<(task::Id, Outcome), JoinError>, alone: bool) {
        let (task, outcome) = task.unwrap_or_else(|error| (error.id(), Outcome::Failed));
        if let Some(id) = self.under_way.remove(&task) {
            self.done(&id, outcome, alone);
        }
    }

    fn done(&mut self, id: &RecordId, outcome: Outcome, alone: bool) {
        let now = Instant::now();
        self.book.done(id, outcome, alone, now);
        if self.waiting.get(id).is_none_or(VecDeque::is_empty) {
            self.waiting.remove(id);
        } else if let Some(work) = self.book.begin(id, now) {
            self.begin(work);
        } else {
            // Withdrawn for another caller.
            for reply in self.waiting.remove(id).into_iter().flatten() {
                let _ = reply.send(Ok(0));
            }
        }
    }

    async fn leave(&mut self) {
        self.works.shutdown().await;
        let dht = &self.dht;
        let all = async {
            // Also what an earlier run of this node has stated, and what was broken off on its way.
            let own = dht.own(b"").await?.into_iter();
            let stated = own.filter(|record| record.value().is_some());
            let by_id = stated.map(|record| {
                let (key, subkey) = (record.key().to_vec(), record.subkey().to_vec());
                (RecordId { key, subkey }, record.remaining())
            });
            let stated: HashMap<_, _> = by_id.collect();
            let leaving = self.book.leaving().into_iter().filter_map(|leaving| {
                let left = stated.get(&leaving.id).copied().or(leaving.began)?;
                Some((leaving.id, left))
            });
            let withdrawn =
                stream::iter(leaving).for_each_concurrent(LEAVING, async |(id, left)| {
                    // Nodes that do not hear of it forget the record by themselves.
                    let _ = dht.withdraw(&id.key, &id.subkey, left).await;
                });
            withdrawn.await;
            Ok::<_, DhtError>(())
        };
        let _ = timeout(LEAVE, all).await;
    }
}

/// The answer to the caller, and what the book needs to know.
type Done = (Result<usize, Error>, Outcome);

fn ended(done: Result<usize, DhtError>) -> Done {
    let outcome = done
        .as_ref()
        .map_or(Outcome::Failed, |took| Outcome::Took(*took));
    (done.map_err(Error::from), outcome)
}

async fn state(
    dht: &Dht,
    work: &Work<Value>,
    value: Result<Option<Vec<u8>>, Error>,
    again: bool,
) -> Done {
    let (key, subkey) = (&work.id.key, &work.id.subkey);
    match value {
        Ok(Some(value)) if again => ended(dht.publish_again(key, subkey, &value, work.ttl).await),
        Ok(Some(value)) => ended(dht.publish(key, subkey, &value, work.ttl).await),
        Ok(None) => (Ok(0), Outcome::Nothing),
        Err(error) => (Err(error), Outcome::Nothing),
    }
}

/// Says a record again that the DHT's store has.
async fn say_again(dht: &Dht, id: &RecordId) -> Done {
    let own = match dht.own(&id.key).await {
        Ok(own) => own,
        Err(error) => return ended(Err(error)),
    };
    let mut own = own.into_iter();
    match own.find(|record| record.key() == id.key && record.subkey() == id.subkey) {
        Some(record) if !record.remaining().is_zero() => ended(dht.say_again(record).await),
        _ => (Ok(0), Outcome::Over),
    }
}

async fn withdraw(dht: &Dht, work: &Work<Value>, is_waited_for: bool) -> Done {
    let RecordId { key, subkey } = &work.id;
    if !is_waited_for {
        let own = dht.own(key).await.unwrap_or_default();
        let mut of_key = own.iter().filter(|record| record.key() == key);
        if !of_key.any(|record| record.subkey() == subkey && record.value().is_some()) {
            return (Ok(0), Outcome::Over);
        }
    }
    ended(dht.withdraw(key, subkey, work.ttl).await)
}
