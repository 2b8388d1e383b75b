//! Sessions for calls to other nodes: one for each peer and class.
//!
//! A session begins on a stream of any open connection. A session of interactive calls that is used more than a
//! little moves to a connection of its own (a lane) where one is possible, so that its calls share no multiplexer
//! with other traffic. An unused session is closed.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use weft_net::{BestPath, Class, LimitUse, OpenError, PeerId, Stream};
use weft_proto::rpc::{Budget, Code, Limits, Seen, Session, Status};

use super::{
    PROTOCOL,
    retries::Retries,
    serving::{of_stream, usage},
};
use crate::Node;

/// Number of calls on a shared connection before interactive calls move to a lane. A peer that is called now and then
/// needs none.
const CALLS_BEFORE_LANE: u64 = 16;

/// Time without a call after which a session is closed. It is closed after at least this time, and less than twice.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);

/// Number of remembered slots at which those without a session are forgotten.
const MAX_REMEMBERED: usize = 256;

/// The most bytes of answers that have arrived and wait for the caller, of all sessions together. One peer may have an
/// eighth of them, and more only while three eighths are free: an answer may be as large as 260 MiB.
const MAX_ANSWER_BYTES: usize = 512 << 20;

/// The sessions of a node, for calls to other nodes.
#[derive(Debug, Clone)]
pub(crate) struct Sessions {
    slots: Arc<Mutex<Slots>>,
    held: Budget,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            slots: Arc::default(),
            held: Budget::new(MAX_ANSWER_BYTES),
        }
    }
}

type Slots = HashMap<(PeerId, Class), Arc<Slot>>;

/// The session for one peer and class.
#[derive(Debug, Default)]
struct Slot {
    open: Mutex<Option<Open>>,
    /// Held by the task that opens a session.
    opening: tokio::sync::Mutex<()>,
    retries: Arc<Retries>,
}

#[derive(Debug)]
struct Open {
    session: Session,
    best: BestPath,
    /// Distinguishes this session from earlier and later ones of the slot.
    number: u64,
    calls: u64,
    /// True if the session has a lane, or if a lane has been requested.
    settled: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

impl Sessions {
    /// Returns the open session if it is usable and no better path is open; opens a new one otherwise.
    ///
    /// # Errors
    /// [`Code::Unavailable`] if the peer cannot be reached; [`Code::FailedPrecondition`] if the peer is this node.
    pub(super) async fn get(
        &self,
        node: &Node,
        peer: PeerId,
        class: Class,
    ) -> Result<Session, Status> {
        if peer == node.peer_id() {
            let text = format!("{peer} is this node; a node cannot call itself");
            return Err(Status::new(Code::FailedPrecondition, text));
        }
        let slot = self.slot(peer, class);
        if let Some(session) = slot.usable(node, peer, class, &self.held) {
            return Ok(session);
        }
        let _opening = slot.opening.lock().await;
        // Another task may have opened a session meanwhile.
        if let Some(session) = slot.usable(node, peer, class, &self.held) {
            return Ok(session);
        }
        let unreachable = |error: &dyn std::fmt::Display| Status {
            seen: Some(Seen::No),
            ..Status::new(Code::Unavailable, error.to_string())
        };
        let network = node.network();
        let opened = match network.open(peer, PROTOCOL, class).await {
            Err(OpenError::NotConnected(_)) => {
                let connected = node.connect(peer, Vec::new()).await;
                connected.map_err(|error| unreachable(&error))?;
                network.open(peer, PROTOCOL, class).await
            }
            opened => opened,
        };
        let stream = opened.map_err(|error| unreachable(&error))?;
        Ok(slot.fill(stream, class != Class::Interactive, &self.held))
    }

    /// Returns the remaining retries of calls to this peer.
    pub(super) fn retries(&self, peer: PeerId, class: Class) -> Arc<Retries> {
        Arc::clone(&self.slot(peer, class).retries)
    }

    /// Returns the limits on the bytes held for answers, with their use.
    pub(crate) fn limits(&self) -> [LimitUse; 2] {
        usage(
            &self.held,
            "answer_bytes_held",
            "answer_bytes_held_per_peer",
        )
    }

    /// Returns true if there is an open session.
    pub(super) fn has(&self, peer: PeerId, class: Class) -> bool {
        let slots = lock(&self.slots);
        let slot = slots.get(&(peer, class));
        slot.is_some_and(|slot| {
            lock(&slot.open)
                .as_ref()
                .is_some_and(|o| o.session.is_open())
        })
    }

    fn slot(&self, peer: PeerId, class: Class) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(&(peer, class)) {
            return Arc::clone(slot);
        }
        if slots.len() >= MAX_REMEMBERED {
            // A slot that another task refers to is in use.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || lock(&slot.open).is_some());
        }
        Arc::clone(slots.entry((peer, class)).or_default())
    }
}

impl Slot {
    fn usable(
        self: &Arc<Self>,
        node: &Node,
        peer: PeerId,
        class: Class,
        held: &Budget,
    ) -> Option<Session> {
        let mut slot = lock(&self.open);
        let open = slot.as_mut()?;
        if !open.session.is_open() || open.best.is_better_open() {
            return None;
        }
        open.calls += 1;
        if class == Class::Interactive && !open.settled && open.calls > CALLS_BEFORE_LANE {
            open.settled = true;
            let (slot, network) = (Arc::clone(self), node.network().clone());
            let held = held.clone();
            node.spawn(async move {
                // Without a lane, the session stays where it is.
                if let Ok(Some(lane)) = network.open_lane(peer, PROTOCOL).await {
                    slot.fill(lane, true, &held);
                }
            });
        }
        Some(open.session.clone())
    }

    /// Replaces the slot's session with one on this stream. The old session ends with its last call.
    fn fill(self: &Arc<Self>, stream: Stream, settled: bool, held: &Budget) -> Session {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (best, peer, lane) = (stream.best_path(), stream.peer(), stream.is_lane());
        tracing::debug!(%peer, lane, "opened a session for calls");
        let held = of_stream(held, &stream);
        let (session, driver) = Session::client_within(held, stream, Limits::default());
        *lock(&self.open) = Some(Open {
            session: session.clone(),
            best,
            number,
            calls: 1,
            settled,
        });
        let slot = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut driver = pin!(driver);
            let mut tick = interval(IDLE_TIMEOUT);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut calls = 0;
            loop {
                tokio::select! {
                    ended = &mut driver => {
                        if let Err(error) = ended {
                            tracing::debug!(%peer, %error, "session for calls ended");
                        }
                        break;
                    }
                    _ = tick.tick() => {
                        let Some(slot) = slot.upgrade() else { continue };
                        let mut open = lock(&slot.open);
                        if let Some(this) = open.as_ref().filter(|open| open.number == number) {
                            if this.calls == calls {
                                // The session ends with its last call.
                                *open = None;
                            } else {
                                calls = this.calls;
                            }
                        }
                    }
                }
            }
            // An empty slot can be forgotten.
            if let Some(slot) = slot.upgrade() {
                lock(&slot.open).take_if(|open| open.number == number);
            }
        });
        session
    }
}
