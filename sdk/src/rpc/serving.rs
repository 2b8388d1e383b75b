//! Answering calls from others, within limits.

use std::sync::Arc;

use weft_net::{Incoming, LimitUse, Stream};
use weft_proto::rpc::{Budget, Handler, Limits, Session};

use super::Offered;
use crate::node::{Served, serve_all};

/// What calls from others can make a node hold and do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallLimits {
    /// Sessions that others may have open, one for each of their streams.
    pub sessions: usize,
    /// Sessions that one peer may have open. A peer needs two, one for interactive calls and one for bulk, and for a moment a third when a better path opens.
    pub sessions_per_peer: usize,
    /// Bytes that have come and wait to be taken by what answers, of all sessions together.
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
    served: Served,
}

impl Serving {
    pub(crate) fn new(limits: CallLimits) -> Self {
        Self {
            limits,
            held: Budget::new(limits.held),
            served: Served::new(limits.sessions, limits.sessions_per_peer),
        }
    }

    /// Every limit on calls from others, and what it comes to.
    pub(crate) fn limits(&self) -> Vec<LimitUse> {
        let [sessions, of_one] = self.served.usage("call_sessions", "call_sessions_per_peer");
        let held = LimitUse {
            name: "call_bytes_held",
            used: self.held.used() as u64,
            limit: Some(self.limits.held as u64),
            refused: self.held.refused(),
        };
        vec![sessions, of_one, held]
    }
}

/// Answers calls until the network stops.
pub(crate) async fn serve_calls(incoming: Incoming, offered: Offered, serving: Serving) {
    let offered: Arc<dyn Handler> = Arc::new(offered);
    let (held, limits) = (serving.held.clone(), serving.limits.session);
    let serve = move |stream: Stream| {
        let peer = stream.peer();
        let (held, offered) = (held.clone(), Arc::clone(&offered));
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
