//! Calls between nodes: serving, and calling by PeerId.
//!
//! A session is one stream for each peer and class, opened with the first call and again when it is lost or a better path is open. A call that had not
//! been seen when its session was lost is made again; one that perhaps was, only if its schema says that it may be (`option idempotency_level`).

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout_at};
use weft_net::{BestPath, Class, Incoming, OpenError, PeerId, Stream, StreamProtocol};
use weft_proto::rpc::{
    Budget, Caller, Code, Context, Ended, Handler, Limits, Message, Method, Options, Receiver,
    Router, SCHEMAS, Seen, Sender, Session, Status,
};

use crate::{Node, node::serve_all};

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/rpc/1");

/// Sessions of others, in all and of one peer.
const MAX_SESSIONS: usize = 512;
const MAX_SESSIONS_PER_PEER: usize = 8;

/// Bytes that wait to be taken by what answers calls, of all sessions together.
const HELD: usize = 512 << 20;

/// How often a call is made at most, and the pause before the second time; it doubles.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// Sessions that are remembered before those that have ended are forgotten.
const REMEMBERED: usize = 256;

/// This node offers a service of this name already.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this node offers {0} already")]
pub struct AlreadyOffered(pub String);

/// Calls to and from other nodes; [`Node::rpc`].
#[derive(Debug, Clone)]
pub struct Rpc {
    node: Node,
}

impl Rpc {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Answers calls with these services, until the node stops.
    ///
    /// # Errors
    /// [`AlreadyOffered`], and nothing is served.
    pub fn serve(&self, router: Router) -> Result<(), AlreadyOffered> {
        let names: Vec<_> = router.services().map(str::to_owned).collect();
        let schemas = router.all_schemas();
        let offer = self.offer(names, schemas, Arc::new(router))?;
        offer.keep();
        Ok(())
    }

    /// Has a handler answer calls of services with these names, which look as `schemas` says (an encoded `FileDescriptorSet`, or nothing), until what this
    /// returns is dropped.
    ///
    /// # Errors
    /// [`AlreadyOffered`], and nothing is offered.
    pub fn offer(
        &self,
        names: Vec<String>,
        schemas: Bytes,
        handler: Arc<dyn Handler>,
    ) -> Result<Offer, AlreadyOffered> {
        self.node.offered().add(names, schemas, handler)
    }

    /// Calls this peer, wherever it is: for a generated client. Nothing is opened before the first call.
    pub fn peer(&self, peer: PeerId) -> Peer {
        Peer {
            node: self.node.clone(),
            peer,
            class: Class::Interactive,
        }
    }
}

/// Who calls. A handler's context knows it as text.
///
/// # Errors
/// [`Code::Internal`] if the context is not one of a call between nodes.
pub fn caller(context: &Context) -> Result<PeerId, Status> {
    let peer = context.peer.parse();
    peer.map_err(|_| Status::new(Code::Internal, "the caller has no PeerId"))
}

/// What a node offers, by the name of the service.
#[derive(Clone, Default)]
pub(crate) struct Offered(Arc<RwLock<Entries>>);

#[derive(Default)]
struct Entries {
    by_name: BTreeMap<String, Entry>,
    /// Of all, made when they change: whoever asks gets the same bytes.
    schemas: Bytes,
}

impl Entries {
    fn changed(&mut self) {
        let parts: Vec<_> = self.by_name.values().map(|e| e.schemas.clone()).collect();
        self.schemas = parts.concat().into();
    }
}

#[derive(Clone)]
struct Entry {
    handler: Arc<dyn Handler>,
    schemas: Bytes,
}

impl fmt::Debug for Offered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.read().by_name.keys()).finish()
    }
}

impl Offered {
    fn read(&self) -> RwLockReadGuard<'_, Entries> {
        self.0
            .read()
            .expect("nothing panics while holding the lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, Entries> {
        self.0
            .write()
            .expect("nothing panics while holding the lock")
    }

    fn add(
        &self,
        names: Vec<String>,
        schemas: Bytes,
        handler: Arc<dyn Handler>,
    ) -> Result<Offer, AlreadyOffered> {
        let mut all = self.write();
        let own = SCHEMAS.split('/').next().unwrap_or_default();
        if let Some(name) = names
            .iter()
            .find(|name| all.by_name.contains_key(*name) || *name == own)
        {
            return Err(AlreadyOffered(name.clone()));
        }
        for (n, name) in names.iter().enumerate() {
            let entry = Entry {
                handler: Arc::clone(&handler),
                // Once is enough.
                schemas: if n == 0 {
                    schemas.clone()
                } else {
                    Bytes::new()
                },
            };
            all.by_name.insert(name.clone(), entry);
        }
        all.changed();
        drop(all);
        Ok(Offer {
            offered: self.clone(),
            names,
        })
    }
}

impl Handler for Offered {
    fn call(&self, context: Context, requests: Receiver, mut responses: Sender) -> Ended {
        if context.method == SCHEMAS {
            let schemas = self.read().schemas.clone();
            return Box::pin(async move { responses.send_last(schemas.into()).await });
        }
        let service = context.method.split('/').next().unwrap_or_default();
        let entry = self.read().by_name.get(service).cloned();
        match entry {
            Some(entry) => entry.handler.call(context, requests, responses),
            None => {
                let text = format!("there is no service {service} here");
                Box::pin(std::future::ready(Err(Status::new(
                    Code::Unimplemented,
                    text,
                ))))
            }
        }
    }
}

/// Services that are offered for as long as this is held.
#[derive(Debug)]
#[must_use = "what is dropped is offered no more"]
pub struct Offer {
    offered: Offered,
    names: Vec<String>,
}

impl Offer {
    /// Until the node stops.
    fn keep(mut self) {
        self.names.clear();
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut all = self.offered.write();
        for name in &self.names {
            all.by_name.remove(name);
        }
        all.changed();
    }
}

/// Answers calls until the network stops.
pub(crate) async fn serve_calls(incoming: Incoming, offered: Offered) {
    let (budget, offered): (_, Arc<dyn Handler>) = (Budget::new(HELD), Arc::new(offered));
    let serve = move |stream: Stream| {
        let peer = stream.peer();
        let (budget, offered) = (budget.clone(), Arc::clone(&offered));
        async move {
            let name = peer.to_string().into();
            let served = Session::serve_within(budget, stream, Limits::default(), name, offered);
            if let Err(error) = served.await {
                tracing::debug!(%peer, %error, "a session of calls has ended");
            }
        }
    };
    serve_all(incoming, MAX_SESSIONS, MAX_SESSIONS_PER_PEER, serve).await;
}

/// The sessions of a node, by peer and class.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sessions(Arc<Mutex<HashMap<(PeerId, Class), Slot>>>);

type Slot = Arc<tokio::sync::Mutex<Option<Open>>>;

#[derive(Debug)]
struct Open {
    session: Session,
    best: BestPath,
}

impl Sessions {
    fn slot(&self, peer: PeerId, class: Class) -> Slot {
        let mut sessions = self
            .0
            .lock()
            .expect("nothing panics while holding the lock");
        if sessions.len() >= REMEMBERED {
            sessions.retain(|_, slot| match slot.try_lock() {
                Ok(open) => open.as_ref().is_some_and(|open| open.session.is_open()),
                // In use.
                Err(_) => true,
            });
        }
        Arc::clone(sessions.entry((peer, class)).or_default())
    }
}

/// Calls one peer. Cheap to clone.
#[derive(Clone)]
pub struct Peer {
    node: Node,
    peer: PeerId,
    class: Class,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer")
            .field("peer", &self.peer)
            .field("class", &self.class)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// Calls that move much, on a session of their own: they hold up no others.
    #[must_use]
    pub fn bulk(mut self) -> Self {
        self.class = Class::Bulk;
        self
    }

    /// Whom it calls.
    pub fn id(&self) -> PeerId {
        self.peer
    }

    /// The session that there is, if calls can be made on it and no better path is open; else a new one.
    async fn session(&self) -> Result<Session, Status> {
        let slot = self.node.sessions().slot(self.peer, self.class);
        let mut open = slot.lock().await;
        if let Some(open) = &*open
            && open.session.is_open()
            && !open.best.is_better_open()
        {
            return Ok(open.session.clone());
        }
        let unreachable = |error: &dyn fmt::Display| Status {
            seen: Some(Seen::No),
            ..Status::new(Code::Unavailable, error.to_string())
        };
        let network = self.node.network();
        let opened = match network.open(self.peer, PROTOCOL, self.class).await {
            Err(OpenError::NotConnected(_)) => {
                let connected = self.node.connect(self.peer, Vec::new()).await;
                connected.map_err(|error| unreachable(&error))?;
                network.open(self.peer, PROTOCOL, self.class).await
            }
            opened => opened,
        };
        let stream = opened.map_err(|error| unreachable(&error))?;
        let best = stream.best_path();
        let peer = self.peer;
        let (session, driver) = Session::client(stream, Limits::default());
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::debug!(%peer, %error, "a session of calls has ended");
            }
        });
        // The old one ends with its last call.
        *open = Some(Open {
            session: session.clone(),
            best,
        });
        Ok(session)
    }

    /// Makes a call as often as it may be made, and there is time for.
    async fn attempt<T, F>(
        &self,
        method: Method,
        options: Options,
        call: impl Fn(Session, Options) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let deadline = options
            .timeout
            .and_then(|time| Instant::now().checked_add(time));
        let attempts = async {
            let mut pause = PAUSE;
            for attempt in 1.. {
                let session = self.session().await?;
                let left = Options {
                    timeout: deadline
                        .map(|deadline| deadline.saturating_duration_since(Instant::now())),
                    ..options.clone()
                };
                match call(session, left).await {
                    Err(status) if attempt < ATTEMPTS && may_repeat(&status, &method) => {
                        tracing::debug!(peer = %self.peer, method = %method.name, %status, "again");
                        sleep(pause).await;
                        pause *= 2;
                    }
                    ended => return ended,
                }
            }
            unreachable!("the last attempt returns")
        };
        match deadline {
            None => attempts.await,
            Some(deadline) => timeout_at(deadline, attempts).await.unwrap_or_else(|_| {
                Err(Status::new(
                    Code::DeadlineExceeded,
                    "the caller's time is over",
                ))
            }),
        }
    }
}

/// Whether a call that has failed can be made again without doing twice what is to be done once.
fn may_repeat(status: &Status, method: &Method) -> bool {
    status.code == Code::Unavailable
        && match status.seen {
            Some(Seen::No) => true,
            Some(Seen::Perhaps | Seen::Yes) => method.idempotent,
            // The handler itself says so.
            None => false,
        }
}

impl Caller for Peer {
    async fn unary(
        &self,
        method: Method,
        message: Message,
        options: Options,
    ) -> Result<Message, Status> {
        let call = |session: Session, options| {
            let (message, name) = (message.clone(), method.name.clone());
            async move { session.unary(&name, message, options).await }
        };
        self.attempt(method.clone(), options, call).await
    }

    async fn open(&self, method: Method, options: Options) -> Result<(Sender, Receiver), Status> {
        let call = |session: Session, options| {
            let name = method.name.clone();
            async move { session.call(&name, options).await }
        };
        self.attempt(method.clone(), options, call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_done_is_not_done_again() {
        let method = |idempotent| Method {
            name: "a.B/C".into(),
            idempotent,
        };
        let lost = |seen| Status {
            seen,
            ..Status::new(Code::Unavailable, "lost")
        };
        for (seen, idempotent, repeated) in [
            (Some(Seen::No), false, true),
            (Some(Seen::Perhaps), false, false),
            (Some(Seen::Perhaps), true, true),
            (Some(Seen::Yes), false, false),
            (Some(Seen::Yes), true, true),
            (None, true, false),
        ] {
            assert_eq!(may_repeat(&lost(seen), &method(idempotent)), repeated);
        }
        let failed = Status::new(Code::Internal, "failed");
        assert!(!may_repeat(&failed, &method(true)));
    }
}
