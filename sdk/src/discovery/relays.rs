//! Relays: the keys of their records, and the search for relays while this node lacks reservations.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use weft_dht::DhtError;
use weft_net::PeerId;

use crate::discovery::{
    advertise::SMALL_MESH,
    find::{Discovery, Round},
    known_addresses::ADDRESS_TERMS,
};

/// Number of keys over which the records of relays are spread, so that no node stores all of them.
const SHARDS: u8 = 16;

/// The first and the longest pause between two searches of a node that lacks relays. Each search makes up to sixteen
/// lookups, and a mesh may have no relay.
const SEARCH_PAUSE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));

/// Number of relays that are connected to at a time, to find out which are near.
const WANTED_RELAYS: usize = 4;

/// Returns the key under which a relay publishes its addresses.
pub(crate) fn relay_key(relay: &PeerId) -> Vec<u8> {
    key_of(shard_of(relay))
}

fn key_of(shard: u8) -> Vec<u8> {
    format!("relay/{shard}").into_bytes()
}

fn shard_of(peer: &PeerId) -> u8 {
    peer.to_bytes().last().map_or(0, |last| last % SHARDS)
}

/// Connects to relays from the DHT while this node lacks some. The network makes the reservations. Ends with the
/// network.
pub(crate) async fn find_relays(discovery: Discovery) {
    let (dht, network) = (discovery.dht(), discovery.network());
    // Before that, there is no node to ask.
    if dht.nodes().wait_for(|nodes| *nodes > 0).await.is_err() {
        return;
    }
    let mut addresses = network.watch_addresses();
    let mut nodes_met = dht.nodes_met();
    let mut pause = SEARCH_PAUSE.0;
    // Each node begins with another key.
    let mut shard = shard_of(&network.local_peer());
    loop {
        addresses.mark_unchanged();
        nodes_met.mark_unchanged();
        let Some(known) = network.reachability().await else {
            return;
        };
        // A relay proves its record by a reservation.
        for relay in known.relays {
            discovery.proved(&relay_subject(&relay), [relay]);
        }
        if known.lacks_relays {
            let Ok(round) = try_relays(&discovery, &mut shard).await else {
                return;
            };
            pause = match round.reached {
                0 => (pause * 2).min(SEARCH_PAUSE.1),
                _ => SEARCH_PAUSE.0,
            };
        } else {
            pause = SEARCH_PAUSE.0;
        }
        let (soonest, latest) = (Instant::now() + SEARCH_PAUSE.0, Instant::now() + pause);
        loop {
            tokio::select! {
                // A reservation may have been lost.
                changed = addresses.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    discovery.start_over();
                    break;
                }
                met = nodes_met.changed() => {
                    if met.is_err() {
                        return;
                    }
                    if *dht.nodes().borrow() <= SMALL_MESH {
                        break;
                    }
                }
                () = sleep_until(latest) => break,
            }
        }
        sleep_until(soonest).await;
    }
}

/// Returns the position in the key space of a relay's record.
fn relay_subject(relay: &PeerId) -> [u8; 32] {
    weft_dht::key_position(&relay_key(relay))
}

/// Connects to a few relays from the DHT.
///
/// # Errors
/// [`DhtError::Stopped`] after the network has stopped.
async fn try_relays(discovery: &Discovery, shard: &mut u8) -> Result<Round, DhtError> {
    let mut all = Round::default();
    for _ in 0..SHARDS {
        let key = key_of(*shard);
        // The next search begins with the relays under another key.
        *shard = (*shard + 1) % SHARDS;
        let round = discovery
            .find(&key, ADDRESS_TERMS.ttl, WANTED_RELAYS - all.reached)
            .await?;
        all.reached += round.reached;
        all.tried += round.tried;
        if all.reached >= WANTED_RELAYS || all.tried >= WANTED_RELAYS * 4 {
            break;
        }
    }
    Ok(all)
}
