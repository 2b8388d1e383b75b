//! Comparison of this node's clock with the clocks of peers; see [`crate::ping::clock`].

use std::{
    convert::Infallible,
    time::{Duration, Instant, SystemTime},
};

use libp2p::{Multiaddr, PeerId, swarm::NetworkBehaviour};
use tokio::{sync::oneshot, time::timeout};

use super::{Driver, Outcome};
use crate::{
    ping::{self, PING_PROTOCOL, clock::Reading},
    span,
};

/// Longest time that a peer may take to send its time. A slower answer is less exact.
const ANSWER: Duration = Duration::from_secs(5);

/// Most peers asked at a time, and so per second. Their answers decide whether others are asked at all.
const AT_A_TIME: usize = 4;

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Asks peers for their clocks, if they are due.
    pub(super) fn compare_clocks(&mut self) {
        let now = Instant::now();
        self.clocks.look(SystemTime::now(), now);
        let best = self.peers.iter().filter_map(|(id, peer)| {
            let best = peer.best()?;
            let named = peer.connections.iter();
            let connection =
                named.min_by_key(|(_, c)| (c.path.kind, c.rtt.unwrap_or(Duration::MAX)));
            Some((*id, *connection?.0, best.path.address.clone()))
        });
        let due: Vec<_> = best
            .filter(|(peer, _, address)| self.clocks.ask(*peer, address, now))
            .take(AT_A_TIME)
            .collect();
        for (peer, connection, address) in due {
            let (reply, answer) = oneshot::channel();
            let streams = &mut self.swarm.behaviour_mut().streams;
            streams.open_on(peer, connection, PING_PROTOCOL, reply);
            let outcomes = self.outcomes.clone();
            span::spawn_on(peer, connection, async move {
                let reading = timeout(ANSWER, async {
                    let mut stream = answer.await.ok()?.ok()?;
                    ping::echo(&mut stream).await.ok()?.reading
                });
                let clock = Outcome::Clock {
                    peer,
                    address,
                    // A peer that does not answer is not counted.
                    reading: reading.await.ok().flatten(),
                };
                // The network may have stopped.
                let _ = outcomes.send(clock).await;
            });
        }
    }

    pub(super) fn on_clock(&mut self, peer: PeerId, address: &Multiaddr, reading: Option<Reading>) {
        let Some(reading) = reading else { return };
        let (clock, now) = (SystemTime::now(), Instant::now());
        let wrong = |difference: Option<crate::ClockDifference>| {
            difference.filter(crate::ClockDifference::is_wrong)
        };
        let before = wrong(self.clocks.difference(clock, now));
        self.clocks.answered(peer, address, reading);
        if let Some(difference) =
            wrong(self.clocks.difference(clock, now)).filter(|_| before.is_none())
        {
            tracing::warn!(
                "{difference}: valid records of this node and of other nodes appear expired; set the clock"
            );
        }
    }
}
