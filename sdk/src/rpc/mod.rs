//! Calls between nodes: offering services, and calling peers by PeerId or by the name of a service.
//!
//! Calls to one peer share a session: one stream for each peer and class of traffic. It is opened with the first
//! call, and again when it is lost or a better path opens.
//!
//! A call that fails because its session was lost is repeated if the peer had not seen it. If the peer may have seen
//! it, it is repeated only if its schema permits that (`option idempotency_level`).
//!
//! Generated clients work on a [`Peer`] or a [`Service`].

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

use self::retries::{MAX_ATTEMPTS, Pauses};
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

/// Makes calls to other nodes and offers services to them; see [`Node::rpc`].
#[derive(Debug, Clone)]
pub struct Rpc {
    node: Node,
}

impl Rpc {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Offers the services of a router until the node stops. Announces each by its full name (`package.Service`), so
    /// that [`service`](Self::service) finds it on other nodes.
    ///
    /// # Errors
    /// [`AlreadyOffered`] if this node offers one of the services already. Then none is offered.
    pub fn serve(&self, router: Router) -> Result<(), AlreadyOffered> {
        let names: Vec<_> = router.services().map(str::to_owned).collect();
        let schemas = router.all_schemas();
        let offer = self.offer(names.clone(), schemas, Arc::new(router))?;
        offer.keep();
        for name in names {
            if let Err(error) = announced::announce_always(&self.node, &name) {
                tracing::warn!(service = name, %error, "cannot announce service");
            }
        }
        Ok(())
    }

    /// Announces that this node offers a service of this name, such as `llama-70b`, until the returned value is
    /// dropped.
    ///
    /// The name need not be that of a service in a schema; callers have to know the methods. The announcement is
    /// public: anybody who looks up the name gets this node's addresses and the labels.
    ///
    /// # Errors
    /// [`ServiceError`] if the name or the labels break a limit.
    pub fn announce(&self, name: &str, labels: Labels) -> Result<Announced, ServiceError> {
        Announced::new(&self.node, name, labels)
    }

    /// Returns a client that calls any peer which offers a service of this name. Nothing is looked up before the
    /// first call.
    ///
    /// Any node of the mesh may claim to offer a service. Unless any provider will do, restrict the choice with
    /// [`Service::only`] or [`Service::trusted`].
    ///
    /// # Errors
    /// [`ServiceError::Name`] if the name is empty or longer than [`MAX_NAME`].
    pub fn service(&self, name: &str) -> Result<Service, ServiceError> {
        Service::new(&self.node, name)
    }

    /// Offers services with a handler until the returned value is dropped. The services are not announced;
    /// [`announce`](Self::announce) does that.
    ///
    /// `names` are the full names of the services. `schemas` is an encoded `FileDescriptorSet` that describes them
    /// for callers that ask, or empty.
    ///
    /// # Errors
    /// [`AlreadyOffered`] if this node offers one of the services already. Then none is offered.
    pub fn offer(
        &self,
        names: Vec<String>,
        schemas: Bytes,
        handler: Arc<dyn Handler>,
    ) -> Result<Offer, AlreadyOffered> {
        self.node.offered().add(names, schemas, handler)
    }

    /// Returns a client that calls this peer, at whatever address it is. Nothing is opened before the first call.
    pub fn peer(&self, peer: PeerId) -> Peer {
        Peer {
            node: self.node.clone(),
            peer,
            class: Class::Interactive,
        }
    }
}

/// Returns the caller of a call between nodes. A handler's context has the caller as text.
///
/// # Errors
/// [`Code::Internal`] if the call does not come from another node.
pub fn caller(context: &Context) -> Result<PeerId, Status> {
    let peer = context.peer.parse();
    peer.map_err(|_| Status::new(Code::Internal, "the caller has no PeerId"))
}

/// Calls one peer; see [`Rpc::peer`]. A client for generated code. Cheap to clone.
///
/// # Errors
/// Calls fail with a [`Status`]. Its code is [`Code::Unavailable`] if the peer cannot be reached, and
/// [`Code::DeadlineExceeded`] if the deadline passes first.
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
    /// Makes calls that transfer much data, on a session of their own, so that they delay no other calls.
    #[must_use]
    pub fn bulk(mut self) -> Self {
        self.class = Class::Bulk;
        self
    }

    /// Returns the peer.
    pub fn id(&self) -> PeerId {
        self.peer
    }

    /// Makes a call, and repeats it within the limits on attempts, retries and time.
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
                        if attempt < MAX_ATTEMPTS
                            && may_repeat(&status, &method)
                            && retries.take() =>
                    {
                        tracing::debug!(peer = %self.peer, method = %method.name, %status, "repeating a call");
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
                    "the deadline of the call has passed",
                ))
            }),
        }
    }
}

/// Splits a method's full name, `package.Service/Method`, into the service and the method.
fn names(method: &str) -> (&str, &str) {
    method.split_once('/').unwrap_or((method, ""))
}

/// Returns true if a failed call can be repeated without the risk that it takes effect twice.
fn may_repeat(status: &Status, method: &Method) -> bool {
    status.code == Code::Unavailable
        && match status.seen {
            Some(Seen::No) => true,
            Some(Seen::Perhaps | Seen::Yes) => method.idempotent,
            // The handler itself returned this status.
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
    fn a_call_that_may_have_taken_effect_is_repeated_only_if_idempotent() {
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
