//! Watching the path of a transfer, to distinguish a slow path, a dead path and a slow provider.

use std::{convert::Infallible, time::Duration};

use tokio::time::{Instant, sleep, timeout};
use weft_blobs::arrivals::Arrivals;
use weft_net::{PATH_TIMEOUT, PeerId};

use crate::Node;

/// Time without content after which the path is suspected: on a fast path, on a path that has carried nothing yet,
/// and on a path that carries less than [`SLOW_PATH`] bytes a second, which many streams may share.
pub(super) const SUSPICIOUS: Duration = Duration::from_secs(3);
const SUSPICIOUS_FIRST: Duration = Duration::from_secs(6);
const SUSPICIOUS_SLOW: Duration = Duration::from_secs(12);
const SLOW_PATH: f64 = 32.0 * 1024.0;

/// Time in which a suspected path has to carry anything: one that has carried nothing yet, and a slow one. In front
/// of a link of 20 kbit/s, a queue of 20 kB takes 8 s, and TCP sends a lost packet again after up to three round
/// trips. A connection that is closed meanwhile has to be opened again on the same link.
const ALIVE_FIRST: Duration = Duration::from_secs(45);
const ALIVE_SLOW: Duration = Duration::from_secs(60);

/// Longest round trip of a fast path. The provider on a slow path gets more time.
const FAST_ROUND_TRIP: Duration = Duration::from_secs(2);

/// Watches the path while content comes from `peer`. If none has arrived for a while, finds out whether the path is
/// slow, and has the network check the connection. If the connection is dead, the stream fails at once, and not after
/// the patience for a slow provider.
pub(crate) async fn watch(node: &Node, peer: PeerId, arrivals: &Arrivals) -> Infallible {
    let begun = Instant::now();
    let mut moved = arrivals.signs();
    let first = moved;
    let mut since = begun;
    loop {
        sleep(SUSPICIOUS).await;
        let now = arrivals.signs();
        if std::mem::replace(&mut moved, now) != now {
            since = Instant::now();
            continue;
        }
        // On a slow link, a lost packet alone costs seconds, and so does the first answer.
        let average = (now - first) as f64 / begun.elapsed().as_secs_f64();
        let was_fast = average >= SLOW_PATH;
        let (patience, alive) = match average {
            0.0 => (SUSPICIOUS_FIRST, ALIVE_FIRST),
            SLOW_PATH.. => (SUSPICIOUS, PATH_TIMEOUT),
            _ => (SUSPICIOUS_SLOW, ALIVE_SLOW),
        };
        if since.elapsed() < patience {
            continue;
        }
        let network = node.network();
        if was_fast {
            network.check(peer, alive).await;
        }
        match timeout(FAST_ROUND_TRIP, network.ping(peer)).await {
            // The path works, so the provider sends nothing.
            Ok(Ok(_)) => arrivals.set_slow(false),
            // The connection is being closed, or the peer does not answer pings.
            Ok(Err(_)) => {}
            Err(_) if was_fast => {}
            Err(_) => {
                arrivals.set_slow(true);
                network.check(peer, alive).await;
            }
        }
    }
}
