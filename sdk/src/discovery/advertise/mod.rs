//! Publishing this node's records in the DHT: its addresses, its models, documents, topics and services, and the
//! records of its applications.
//!
//! Every record of this node is registered here by its key and subkey, a function that makes its value, and its
//! [`Terms`]: its lifetime, and whether it is withdrawn when the node stops. [`Schedule`] decides what is published
//! when. [`run`] gives it the time, and hands its work to the DHT. One pace holds for the whole node.

mod pace;
mod presence;
mod schedule;

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

use self::schedule::{Action, Outcome, Schedule, Token, Work};
pub(crate) use self::{pace::Pace, presence::Presence};
use crate::{Error, discovery::addresses::encode};

/// Delay after a change, because several changes often come together. It is short, because a user may be waiting for
/// the record.
pub(crate) const SETTLE: Duration = Duration::from_millis(200);

/// The longest time between two publications of a record: three within the two hours that most records live, so that
/// one lost round does no harm.
const MAX_REFRESH: Duration = Duration::from_secs(40 * 60);

/// Number of nodes below which each new node is told of all records. A record is stored by the twenty nodes closest
/// to its key, so in a smaller mesh every node stores every record.
pub(crate) const SMALL_MESH: usize = 20;

/// The most background work under way.
const MAX_TASKS: usize = 8;

/// The longest time for withdrawals when the node stops, and the number of records withdrawn at a time.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_WITHDRAWALS: usize = 32;

/// Identifies one of this node's records.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RecordId {
    pub(crate) key: Vec<u8>,
    pub(crate) subkey: Vec<u8>,
}

impl RecordId {
    /// Returns the id of a record without a subkey.
    pub(crate) fn of(key: Vec<u8>) -> Self {
        Self {
            key,
            subkey: Vec::new(),
        }
    }
}

/// The terms of one kind of record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Lifetime of a record without its publisher.
    pub(crate) ttl: Duration,
    pub(crate) rank: Rank,
    /// True if the value contains this node's addresses. The record is then published again when they change.
    pub(crate) has_addresses: bool,
    pub(crate) at_stop: AtStop,
}

impl Terms {
    /// Returns the time between two publications: a third of the record's lifetime, so that one lost round does no
    /// harm.
    fn refresh(&self) -> Duration {
        (self.ttl / 3).min(MAX_REFRESH)
    }
}

/// Order of records that are due at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// Few records, which peers need to connect: those of the node itself, its services and its topics.
    Presence,
    /// Possibly many thousands of records: models, documents and records of applications.
    Content,
}

impl Rank {
    const COUNT: usize = 2;
}

/// The fate of a record when its node stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtStop {
    /// The record is valid only while the node runs. It is withdrawn, so that peers do not try a stopped node.
    Withdraw,
    /// The record stays until it expires.
    Keep,
}

/// Makes the value of a record when it is published.
#[derive(Clone)]
pub(crate) enum Value {
    /// A function of the node's encoded addresses at that time. It returns `None` if there is nothing to publish now.
    Made(Arc<dyn Fn(Vec<Bytes>) -> Made + Send + Sync>),
    /// The DHT's store has the signed record, which is renewed unchanged until it expires.
    Signed,
}

type Made = BoxFuture<'static, Result<Option<Vec<u8>>, Error>>;

impl Value {
    /// Returns a value that is made from the addresses at once.
    pub(crate) fn of(value: impl Fn(Vec<Bytes>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        Self::Made(Arc::new(move |addresses| {
            futures::future::ready(Ok(Some(value(addresses)))).boxed()
        }))
    }

    /// Returns a value that needs a lookup, such as in the store.
    pub(crate) fn looked_up<F>(value: impl Fn(Vec<Bytes>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Option<Vec<u8>>, Error>> + Send + 'static,
    {
        Self::Made(Arc::new(move |addresses| value(addresses).boxed()))
    }
}

/// Receives the result of work on a record: the number of other nodes that stored it.
type Reply = oneshot::Sender<Result<usize, Error>>;

enum Command {
    Register {
        records: Vec<(RecordId, Value)>,
        token: Token,
        terms: Terms,
        many: bool,
    },
    Published {
        id: RecordId,
        terms: Terms,
        took: usize,
    },
    Publish {
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

/// Registers records for publication. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Advertiser {
    /// Bounded by the callers' registrations: a command only changes the state in memory.
    commands: mpsc::UnboundedSender<Command>,
    tokens: Arc<AtomicU64>,
}

impl Advertiser {
    /// Returns the advertiser, and the task that has to run until the node stops.
    pub(crate) fn new(dht: Dht, network: Network) -> (Self, impl Future<Output = ()> + use<>) {
        let (commands, wanted) = mpsc::unbounded_channel();
        let advertiser = Self {
            commands,
            tokens: Arc::new(AtomicU64::new(1)),
        };
        (advertiser, run(dht, network, wanted))
    }

    /// Publishes a record from now on.
    pub(crate) fn register(&self, id: RecordId, value: Value, terms: Terms) {
        self.send(Command::Register {
            records: vec![(id, value)],
            token: 0,
            terms,
            many: false,
        });
    }

    /// Publishes many records from now on.
    pub(crate) fn register_all(&self, records: Vec<(RecordId, Value)>, terms: Terms) {
        self.send(Command::Register {
            records,
            token: 0,
            terms,
            many: true,
        });
    }

    /// Publishes a record until the returned value is dropped.
    pub(crate) fn register_while_held(&self, id: RecordId, value: Value, terms: Terms) -> Presence {
        let token = self.tokens.fetch_add(1, Ordering::Relaxed);
        self.send(Command::Register {
            records: vec![(id.clone(), value)],
            token,
            terms,
            many: false,
        });
        Presence::new(self.clone(), id, token)
    }

    /// Renews a record in the DHT's store from now on. The record was just published or withdrawn, and `took` other
    /// nodes stored it.
    pub(crate) fn keep_published(&self, id: RecordId, terms: Terms, took: usize) {
        self.send(Command::Published { id, terms, took });
    }

    /// Publishes a record like [`register`](Self::register), but at once and ahead of all others. Returns the number
    /// of other nodes that stored it.
    ///
    /// # Errors
    /// Errors of the value and of the DHT, and [`Error::Stopped`] after a shutdown.
    pub(crate) async fn publish(
        &self,
        id: RecordId,
        value: Value,
        terms: Terms,
    ) -> Result<usize, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Publish {
            id,
            value,
            terms,
            reply,
        });
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Stops publishing a record, and withdraws it soon.
    pub(crate) fn remove(&self, id: RecordId) {
        self.end(id, 0);
    }

    /// Stops publishing a record, and withdraws it at once. Returns the number of other nodes that stored the
    /// withdrawal.
    ///
    /// # Errors
    /// Errors of the DHT, and [`Error::Stopped`] after a shutdown.
    pub(crate) async fn withdraw(&self, id: RecordId, terms: Terms) -> Result<usize, Error> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Withdraw(id, terms, reply));
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Withdraws all records that are valid only while the node runs, because it is about to stop. Publishes nothing
    /// after that. Returns after two seconds at most.
    pub(crate) async fn leave(&self) {
        let (left, done) = oneshot::channel();
        self.send(Command::Leave(left));
        // Fails if the task has ended with the network.
        let _ = done.await;
    }

    fn renew(&self, id: RecordId) {
        self.send(Command::Renew(id));
    }

    fn end(&self, id: RecordId, token: Token) {
        self.send(Command::Remove(id, token));
    }

    fn send(&self, command: Command) {
        // If the task has ended, the node has stopped and publishes nothing.
        let _ = self.commands.send(command);
    }
}

/// Publishes and withdraws records by the schedule, until the network stops.
async fn run(dht: Dht, network: Network, mut wanted: mpsc::UnboundedReceiver<Command>) {
    let mut addresses = network.watch_addresses();
    let mut nodes_met = dht.nodes_met();
    let mut nodes = dht.nodes();
    let mut runner = Runner {
        schedule: Schedule::new(Instant::now()),
        works: JoinSet::new(),
        under_way: HashMap::new(),
        waiting: HashMap::new(),
        dht,
        network,
    };
    let mut alone = true;
    loop {
        let next = runner.schedule.next();
        let next = next.filter(|_| runner.works.len() < MAX_TASKS);
        tokio::select! {
            command = wanted.recv() => match command {
                None => return,
                Some(Command::Leave(left)) => {
                    runner.leave().await;
                    // The caller may be gone.
                    let _ = left.send(());
                    return;
                }
                Some(command) => runner.take(command),
            },
            Some(done) = runner.works.join_next_with_id() => runner.ended(done, alone),
            changed = nodes.changed() => {
                let Ok(()) = changed else { return };
                let is_alone = *nodes.borrow_and_update() == 0;
                if std::mem::replace(&mut alone, is_alone) && !is_alone {
                    runner.schedule.joined(Instant::now());
                }
            },
            changed = addresses.changed() => {
                let Ok(()) = changed else { return };
                runner.schedule.addresses_changed(Instant::now());
            },
            met = nodes_met.changed() => {
                let Ok(()) = met else { return };
                let small = *nodes.borrow() < SMALL_MESH;
                runner.schedule.met(small, Instant::now());
            },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                if let Some(work) = runner.schedule.poll(Instant::now()) {
                    runner.begin(work);
                }
            }
        }
    }
}

struct Runner {
    schedule: Schedule<Value>,
    works: JoinSet<Outcome>,
    /// The record of each task in `works`.
    under_way: HashMap<task::Id, RecordId>,
    /// Callers that wait for work on a record which has not begun, in the order of their requests.
    waiting: HashMap<RecordId, VecDeque<Reply>>,
    dht: Dht,
    network: Network,
}

impl Runner {
    fn take(&mut self, command: Command) {
        let now = Instant::now();
        match command {
            Command::Register {
                records,
                token,
                terms,
                many,
            } => self.schedule.register(records, token, terms, many, now),
            Command::Published { id, terms, took } => {
                self.schedule
                    .register_published(id, Value::Signed, terms, took, now);
            }
            Command::Publish {
                id,
                value,
                terms,
                reply,
            } => {
                self.schedule
                    .register([(id.clone(), value)], 0, terms, false, now);
                self.work_now(id, reply);
            }
            Command::Renew(id) => self.schedule.renew(&id, now),
            Command::Remove(id, token) => self.schedule.remove(&id, token, now),
            Command::Withdraw(id, terms, reply) => {
                self.schedule.withdraw(&id, terms);
                self.work_now(id, reply);
            }
            // Handled in the loop.
            Command::Leave(_) => {}
        }
    }

    fn work_now(&mut self, id: RecordId, reply: Reply) {
        self.waiting.entry(id.clone()).or_default().push_back(reply);
        if let Some(work) = self.schedule.begin(&id, Instant::now()) {
            self.begin(work);
        }
    }

    fn begin(&mut self, work: Work<Value>) {
        let waiting = self.waiting.get_mut(&work.id);
        let reply = waiting.and_then(VecDeque::pop_front);
        let (dht, network) = (self.dht.clone(), self.network.clone());
        let id = work.id.clone();
        let task = self.works.spawn(async move {
            let (done, outcome) = match &work.action {
                Action::Publish {
                    value: Value::Signed,
                    ..
                } => renew(&dht, &work.id).await,
                Action::Publish {
                    value: Value::Made(make),
                    again,
                } => {
                    let value = make(encode(&network.addresses().for_strangers)).await;
                    publish(&dht, &work, value, *again).await
                }
                Action::Withdraw => withdraw(&dht, &work, reply.is_some()).await,
            };
            let key = String::from_utf8_lossy(&work.id.key);
            match &done {
                Ok(took) => tracing::debug!(%key, took, ?outcome, "published a record"),
                Err(error) => tracing::debug!(%key, %error, "cannot publish a record"),
            }
            if let Some(reply) = reply {
                // The caller may be gone.
                let _ = reply.send(done);
            }
            outcome
        });
        self.under_way.insert(task.id(), id);
    }

    /// Handles the end of a task. A panic counts as a failure, so that the record is not lost.
    fn ended(&mut self, task: Result<(task::Id, Outcome), JoinError>, alone: bool) {
        let (task, outcome) = task.unwrap_or_else(|error| (error.id(), Outcome::Failed));
        if let Some(id) = self.under_way.remove(&task) {
            self.done(&id, outcome, alone);
        }
    }

    fn done(&mut self, id: &RecordId, outcome: Outcome, alone: bool) {
        let now = Instant::now();
        self.schedule.done(id, outcome, alone, now);
        if self.waiting.get(id).is_none_or(VecDeque::is_empty) {
            self.waiting.remove(id);
        } else if let Some(work) = self.schedule.begin(id, now) {
            self.begin(work);
        } else {
            // The record was withdrawn for another caller.
            for reply in self.waiting.remove(id).into_iter().flatten() {
                let _ = reply.send(Ok(0));
            }
        }
    }

    async fn leave(&mut self) {
        self.works.shutdown().await;
        let dht = &self.dht;
        let all = async {
            // Includes records of an earlier run, and withdrawals that were cancelled above.
            let own = dht.own(b"").await?.into_iter();
            let published = own.filter(|record| record.value().is_some());
            let by_id = published.map(|record| {
                let (key, subkey) = (record.key().to_vec(), record.subkey().to_vec());
                (RecordId { key, subkey }, record.remaining())
            });
            let published: HashMap<_, _> = by_id.collect();
            let leaving = self.schedule.leaving().into_iter().filter_map(|leaving| {
                let left = published.get(&leaving.id).copied().or(leaving.began)?;
                Some((leaving.id, left))
            });
            let withdrawn =
                stream::iter(leaving).for_each_concurrent(MAX_WITHDRAWALS, async |(id, left)| {
                    // Nodes that miss the withdrawal forget the record when it expires.
                    let _ = dht.withdraw(&id.key, &id.subkey, left).await;
                });
            withdrawn.await;
            Ok::<_, DhtError>(())
        };
        let _ = timeout(LEAVE_TIMEOUT, all).await;
    }
}

/// The answer to the caller, and the outcome for the schedule.
type Done = (Result<usize, Error>, Outcome);

fn ended(done: Result<usize, DhtError>) -> Done {
    let outcome = done
        .as_ref()
        .map_or(Outcome::Failed, |took| Outcome::Took(*took));
    (done.map_err(Error::from), outcome)
}

async fn publish(
    dht: &Dht,
    work: &Work<Value>,
    value: Result<Option<Vec<u8>>, Error>,
    again: bool,
) -> Done {
    let (key, subkey) = (&work.id.key, &work.id.subkey);
    match value {
        Ok(Some(value)) if again => ended(dht.publish_near(key, subkey, &value, work.ttl).await),
        Ok(Some(value)) => ended(dht.publish(key, subkey, &value, work.ttl).await),
        Ok(None) => (Ok(0), Outcome::Nothing),
        Err(error) => (Err(error), Outcome::Nothing),
    }
}

/// Renews a record from the DHT's store.
async fn renew(dht: &Dht, id: &RecordId) -> Done {
    let own = match dht.own(&id.key).await {
        Ok(own) => own,
        Err(error) => return ended(Err(error)),
    };
    let mut own = own.into_iter();
    match own.find(|record| record.key() == id.key && record.subkey() == id.subkey) {
        Some(record) if !record.remaining().is_zero() => ended(dht.renew(record).await),
        _ => (Ok(0), Outcome::Over),
    }
}

async fn withdraw(dht: &Dht, work: &Work<Value>, has_caller: bool) -> Done {
    let RecordId { key, subkey } = &work.id;
    if !has_caller {
        let own = dht.own(key).await.unwrap_or_default();
        let mut of_key = own.iter().filter(|record| record.key() == key);
        if !of_key.any(|record| record.subkey() == subkey && record.value().is_some()) {
            return (Ok(0), Outcome::Over);
        }
    }
    ended(dht.withdraw(key, subkey, work.ttl).await)
}
