//! Answering calls of other nodes, within limits.

use std::sync::Arc;

use futures::{FutureExt, future::BoxFuture};
use weft_net::{LimitUse, NetworkGroup, Shares, Stream};
use weft_proto::rpc::{Budget, Handler, Limits, Session};

use super::Offered;

/// Limits on what callers on other nodes can make this node hold and do; see
/// [`Builder::call_limits`](crate::Builder::call_limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// The most sessions that callers may have open in all. Each is one stream. Default: 512.
    pub sessions: usize,
    /// The most sessions that one peer may have open. A peer needs two, for interactive and for bulk calls, and a
    /// third for a moment when a better path opens. Default: 8.
    pub sessions_per_peer: usize,
    /// The most bytes that are held for callers, of all sessions together. Default: 512 MiB.
    ///
    /// These are requests, messages that have arrived and wait for the handler, and answers of programs behind the
    /// gRPC API that wait for the caller. One peer and one network group may have an eighth of the bytes each, and
    /// more only while three eighths are free.
    pub held: usize,
    /// Limits of each session.
    pub session: Limits,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            sessions: 512,
            sessions_per_peer: 8,
            held: 512 << 20,
            session: Limits::default(),
        }
    }
}

/// Answers calls of other nodes, and counts them against the limits.
#[derive(Debug, Clone)]
pub(crate) struct Serving {
    limits: CallLimits,
    held: Budget,
    served: Shares,
}

impl Serving {
    pub(crate) fn new(limits: CallLimits) -> Self {
        Self {
            limits,
            held: Budget::new(limits.held),
            served: Shares::new(limits.sessions, limits.sessions_per_peer),
        }
    }

    /// Returns the sessions that callers have open.
    pub(crate) fn sessions(&self) -> &Shares {
        &self.served
    }

    /// Returns every limit on calls of other nodes, with its use.
    pub(crate) fn limits(&self) -> Vec<LimitUse> {
        let sessions = self.served.limits(
            "call_sessions",
            "call_sessions_per_place",
            "call_sessions_per_peer",
        );
        let held = usage(&self.held, "call_bytes_held", "call_bytes_held_per_peer");
        sessions.into_iter().chain(held).collect()
    }
}

/// Returns the use of a budget: in all, and by the peer or network group that uses the most.
pub(super) fn usage(budget: &Budget, all: &'static str, of_one: &'static str) -> [LimitUse; 2] {
    let refused = budget.refused();
    [
        LimitUse::of(all, budget.used(), budget.size(), refused.whole),
        LimitUse::of(of_one, budget.used_by_one(), budget.share(), refused.share),
    ]
}

/// Returns the part of a budget that counts for the peer of a stream and for the network groups around it.
pub(super) fn of_stream(budget: &Budget, stream: &Stream) -> Budget {
    let networks = NetworkGroup::of(stream.path()).networks();
    budget.of(networks.chain([stream.peer().to_string()]))
}

/// Returns a function that answers the calls on a stream that a peer has opened.
pub(crate) fn answering(
    offered: Offered,
    serving: &Serving,
) -> impl Fn(Stream) -> BoxFuture<'static, ()> + use<> {
    let offered: Arc<dyn Handler> = Arc::new(offered);
    let (held, limits) = (serving.held.clone(), serving.limits.session);
    move |stream: Stream| {
        let peer = stream.peer();
        let (held, offered) = (of_stream(&held, &stream), Arc::clone(&offered));
        let answer = async move {
            let name = peer.to_string().into();
            let served = Session::serve_within(held, stream, limits, name, offered);
            if let Err(error) = served.await {
                tracing::debug!(%peer, %error, "session for calls ended");
            }
        };
        answer.boxed()
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use bytes::Bytes;
    use tokio::time::{Instant, sleep, timeout};
    use weft_net::Class;
    use weft_proto::rpc::{
        Caller, Code, Context, Ended, Message, Method, Options, Receiver, Sender, Status,
    };

    use super::*;
    use crate::{Node, rpc::PROTOCOL};

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A test service: `Hold` reads nothing, `Echo` returns its request. It may hold a node.
    struct Service {
        _node: Option<Node>,
    }

    impl Handler for Service {
        fn call(&self, context: Context, mut requests: Receiver, mut responses: Sender) -> Ended {
            Box::pin(async move {
                match context.method.as_str() {
                    "test.Test/Hold" => std::future::pending().await,
                    "test.Test/Echo" => {
                        let message = requests.next().await?.unwrap_or_default();
                        responses.send_last(message).await
                    }
                    other => Err(Status::new(Code::Unimplemented, other)),
                }
            })
        }
    }

    fn service(node: Option<Node>) -> Arc<dyn Handler> {
        Arc::new(Service { _node: node })
    }

    async fn start(home: &Path, limits: CallLimits) -> Result<Node, crate::Error> {
        let node = Node::builder()
            .home(home)
            .mdns(false)
            .port_mapping(false)
            .listen(["/ip4/127.0.0.1/tcp/0".parse().unwrap()])
            .call_limits(limits);
        node.spawn().await
    }

    fn message(size: usize) -> Message {
        Bytes::from(vec![7; size]).into()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_peer_with_many_sessions_leaves_memory_for_the_calls_of_others() {
        const MIB: usize = 1 << 20;
        let homes = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let few = CallLimits {
            held: 16 * MIB,
            ..CallLimits::default()
        };
        let victim = start(homes[0].path(), few).await.unwrap();
        let names = vec!["test.Test".to_owned()];
        let offered = victim.rpc().offer(names, Bytes::new(), service(None));
        let _offered = offered.unwrap();
        let (peer, at) = (victim.peer_id(), victim.network().addresses().all);
        let attacker = start(homes[1].path(), CallLimits::default()).await.unwrap();
        let honest = start(homes[2].path(), CallLimits::default()).await.unwrap();
        for node in [&attacker, &honest] {
            node.connect(peer, at.clone()).await.unwrap();
        }
        // Four times the limit, in messages that the handler does not read.
        let mut held = Vec::new();
        for n in 0..24 {
            if n % 3 == 0 {
                let opened = attacker.network().open(peer, PROTOCOL, Class::Bulk);
                let (session, driver) = Session::client(opened.await.unwrap(), Limits::default());
                tokio::spawn(driver);
                held.push((session, Vec::new()));
            }
            let (session, calls) = held.last_mut().unwrap();
            let call = session.call("test.Test/Hold", Options::default()).await;
            let (mut sender, receiver) = call.unwrap();
            let sending = tokio::spawn(async move {
                // The message may be refused.
                let _ = sender.send(message(3 * MIB)).await;
                sender
            });
            calls.push((receiver, sending));
        }
        let row = async |name: &str| {
            let limits = victim.limits().await.unwrap();
            limits.into_iter().find(|row| row.name == name).unwrap()
        };
        let begin = Instant::now();
        while row("call_bytes_held_per_peer").await.refused == 0 {
            assert!(begin.elapsed() < PATIENCE, "nothing was refused");
            sleep(Duration::from_millis(20)).await;
        }
        let used = row("call_bytes_held").await.used as usize;
        assert!(used <= 10 * MIB, "{used}");
        for _ in 0..5 {
            let method = Method {
                name: "test.Test/Echo".into(),
                idempotent: false,
            };
            let called = honest.rpc().peer(peer);
            let sent = message(MIB + MIB / 2);
            let answered = called.unary(method, sent, Options::default());
            let answer = timeout(PATIENCE, answered).await.unwrap().unwrap();
            assert_eq!(answer, message(MIB + MIB / 2));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_handler_that_holds_its_node_lets_go_of_the_home_at_shutdown() {
        let home = tempfile::tempdir().unwrap();
        let node = start(home.path(), CallLimits::default()).await.unwrap();
        let names = vec!["test.Test".to_owned()];
        let handler = service(Some(node.clone()));
        let offered = node.rpc().offer(names, Bytes::new(), handler).unwrap();
        node.shutdown().await;
        drop(node);
        let begin = Instant::now();
        let again = loop {
            match start(home.path(), CallLimits::default()).await {
                Ok(node) => break node,
                Err(error) => assert!(begin.elapsed() < PATIENCE, "{error}"),
            }
            sleep(Duration::from_millis(20)).await;
        };
        again.shutdown().await;
        drop(offered);
    }
}
