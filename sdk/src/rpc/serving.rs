//! Answering calls from others, within limits.

use std::sync::Arc;

use weft_net::{Incoming, LimitUse, Place, Shares, Stream};
use weft_proto::rpc::{Budget, Handler, Limits, Session};

use super::Offered;
use crate::node::serve_all;

/// What calls from others can make a node hold and do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Sessions that others may have open, one for each of their streams.
    pub sessions: usize,
    /// Sessions that one peer may have open. A peer needs two, one for interactive calls and one for bulk, and for a moment a third when a better path opens.
    pub sessions_per_peer: usize,
    /// Bytes held for callers, of all sessions together: requests, what has come and waits to be taken by what answers, and answers of programs behind the
    /// gRPC API that wait for the caller. One peer, and one network, may have an eighth of it, and more only while three eighths are free.
    pub held: usize,
    /// What may come on each session.
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

/// What answers calls from others, and what that comes to.
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

    /// Every limit on calls from others, and what it comes to.
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

/// What has been used of a budget, in all and by the one that uses the most.
pub(super) fn usage(budget: &Budget, all: &'static str, of_one: &'static str) -> [LimitUse; 2] {
    let row = |name, used: usize, limit: usize, refused| LimitUse {
        name,
        used: used as u64,
        limit: Some(limit as u64),
        refused,
    };
    let refused = budget.refused();
    [
        row(all, budget.used(), budget.size(), refused.whole),
        row(of_one, budget.used_by_one(), budget.share(), refused.share),
    ]
}

/// A budget, in the name of who is at the other end of a stream and of the networks around it.
pub(super) fn of_stream(budget: &Budget, stream: &Stream) -> Budget {
    let networks = Place::of(stream.path()).networks();
    budget.of(networks.chain([stream.peer().to_string()]))
}

/// Answers calls until the network stops.
pub(crate) async fn serve_calls(incoming: Incoming, offered: Offered, serving: Serving) {
    let offered: Arc<dyn Handler> = Arc::new(offered);
    let (held, limits) = (serving.held.clone(), serving.limits.session);
    let serve = move |stream: Stream| {
        let peer = stream.peer();
        let (held, offered) = (of_stream(&held, &stream), Arc::clone(&offered));
        async move {
            let name = peer.to_string().into();
            let served = Session::serve_within(held, stream, limits, name, offered);
            if let Err(error) = served.await {
                tracing::debug!(%peer, %error, "a session of calls has ended");
            }
        }
    };
    serve_all(incoming, serving.served, serve).await;
}
