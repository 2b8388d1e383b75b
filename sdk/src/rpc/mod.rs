//! Calls between nodes: serving, and calling by PeerId.
//!
//! A session is one stream for each peer and class, opened with the first call and again when it is lost or a better path is open. A call that had not
//! been seen when its session was lost is made again; one that perhaps was, only if its schema says that it may be (`option idempotency_level`).

mod announced;
mod choice;
mod offered;
mod retries;
mod service_watch;
pub(crate) mod services;
mod serving;
mod sessions;

use std::{fmt, sync::Arc};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::Instrument;
use weft_net::{Class, PeerId, StreamProtocol};
use weft_proto::rpc::{
    Caller, Code, Context, Handler, Message, Method, Options, Receiver, Router, Seen, Sender,
    Session, Status,
};

use self::retries::{ATTEMPTS, Pauses};
use crate::Node;

pub use self::{
    announced::{Announced, Labels, MAX_LABELS, MAX_NAME, ServiceError},
    offered::{AlreadyOffered, Offer},
    service_watch::{ServiceChange, ServiceWatch},
    services::{Service, ServicePeer},
    serving::CallLimits,
};
pub(crate) use self::{
    offered::Offered,
    serving::{Serving, answering},
    sessions::Sessions,
};

/// The protocol's name on the network.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/rpc/1");

/// Calls to and from other nodes; [`Node::rpc`].
#[derive(Debug, Clone)]
pub struct Rpc {
    node: Node,
}

impl Rpc {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Answers calls with these services, until the node stops, and announces each by its name (`package.Service`): [`service`](Self::service) finds it.
    ///
    /// # Errors
    /// [`AlreadyOffered`], and nothing is served.
    pub fn serve(&self, router: Router) -> Result<(), AlreadyOffered> {
        let names: Vec<_> = router.services().map(str::to_owned).collect();
        let schemas = router.all_schemas();
        let offer = self.offer(names.clone(), schemas, Arc::new(router))?;
        offer.keep();
        for name in names {
            if let Err(error) = announced::announce_always(&self.node, &name) {
                tracing::warn!(service = name, %error, "not announced");
            }
        }
        Ok(())
    }

    /// Makes this node be found as one that offers a service of this name, such as `llama-70b`, for as long as what this returns is held. The name need not be
    /// that of a service in a schema: who looks for it knows what to call. It says where this node is, and the labels, to anybody who asks for the name.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn announce(&self, name: &str, labels: Labels) -> Result<Announced, ServiceError> {
        Announced::new(&self.node, name, labels)
    }

    /// Calls whoever offers a service of this name. Nothing is looked up before the first call.
    ///
    /// Anybody in the mesh may say that they offer it. Unless any of them will do, say whom to call with
    /// [`Service::only`] or [`Service::trusted`].
    ///
    /// # Errors
    /// [`ServiceError::Name`].
    pub fn service(&self, name: &str) -> Result<Service, ServiceError> {
        Service::new(&self.node, name)
    }

    /// Has a handler answer calls of services with these names, unannounced, which look as `schemas` says (an encoded `FileDescriptorSet`, or nothing), until what this
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
        let method_name = method.name.clone();
        let deadline = options
            .timeout
            .and_then(|time| Instant::now().checked_add(time));
        let attempts = async {
            let mut pauses = Pauses::new();
            let sessions = self.node.sessions();
            let retries = sessions.retries(self.peer, self.class);
            retries.called();
            for attempt in 1.. {
                let session = sessions.get(&self.node, self.peer, self.class).await?;
                let left = Options {
                    timeout: deadline
                        .map(|deadline| deadline.saturating_duration_since(Instant::now())),
                    ..options.clone()
                };
                match call(session, left).await {
                    Err(status)
                        if attempt < ATTEMPTS && may_repeat(&status, &method) && retries.take() =>
                    {
                        tracing::debug!(peer = %self.peer, method = %method.name, %status, "again");
                        sleep(pauses.next()).await;
                    }
                    ended => return ended,
                }
            }
            unreachable!("the last attempt returns")
        };
        let (service, name) = names(&method_name);
        let peer = self.peer;
        let span = tracing::debug_span!("call", service, method = name, %peer);
        let attempts = attempts.instrument(span);
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

/// The service and the method in a method's full name, `package.Service/Method`.
fn names(method: &str) -> (&str, &str) {
    method.split_once('/').unwrap_or((method, ""))
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
