//! Relays: what this node says if it is one, and finding some while it lacks reservations.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use weft_dht::DhtError;
use weft_net::PeerId;

use crate::discovery::{
    advertise::SMALL_MESH,
    find::{Discovery, Round},
    whereabouts::HERE,
};

/// Relays state themselves under one of this many keys, so that no node holds all of them.
const SHARDS: u8 = 16;

/// The first and the longest pause between two looks of a node that lacks relays: each look is up to sixteen look-ups,
/// and a mesh may have no relay.
const LOOK: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));

/// Relays that are connected to at a time, to find out which are near.
const TRY: usize = 4;

/// The key under which a relay states where it is.
pub(crate) fn relay_key(relay: &PeerId) -> Vec<u8> {
    key_of(shard_of(relay))
}

fn key_of(shard: u8) -> Vec<u8> {
    format!("relay/{shard}").into_bytes()
}

fn shard_of(peer: &PeerId) -> u8 {
    peer.to_bytes().last().map_or(0, |last| last % SHARDS)
}

/// Connects to relays that the mesh knows while this node lacks some; reservations on them are the network's affair.
/// Ends with the network.
pub(crate) async fn find_relays(discovery: Discovery) {
    let (dht, network) = (discovery.dht(), discovery.network());
    // Before that there is nobody to ask.
    if dht.nodes().wait_for(|nodes| *nodes > 0).await.is_err() {
        return;
    }
    let mut addresses = network.watch_addresses();
    let mut meetings = dht.meetings();
    let mut pause = LOOK.0;
    // Everybody begins elsewhere.
    let mut shard = shard_of(&network.local_peer());
    loop {
        addresses.mark_unchanged();
        meetings.mark_unchanged();
        let Some(known) = network.reachability().await else {
            return;
        };
        // A reservation is what a relay's record promises.
        for relay in known.relays {
            discovery.proved(&relay_subject(&relay), [relay]);
        }
        if known.lacks_relays {
            let Ok(round) = try_relays(&discovery, &mut shard).await else {
                return;
            };
            pause = match round.reached {
                0 => (pause * 2).min(LOOK.1),
                _ => LOOK.0,
            };
        } else {
            pause = LOOK.0;
        }
        let (soonest, latest) = (Instant::now() + LOOK.0, Instant::now() + pause);
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
                met = meetings.changed() => {
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

/// The place of the DHT key under which a relay states itself.
fn relay_subject(relay: &PeerId) -> [u8; 32] {
    weft_dht::place(&relay_key(relay))
}

/// Connects to a few relays that the mesh knows.
///
/// # Errors
/// [`DhtError::Stopped`].
async fn try_relays(discovery: &Discovery, shard: &mut u8) -> Result<Round, DhtError> {
    let mut all = Round::default();
    for _ in 0..SHARDS {
        let key = key_of(*shard);
        // Next time, the relays that are listed elsewhere.
        *shard = (*shard + 1) % SHARDS;
        let round = discovery.find(&key, HERE.ttl, TRY - all.reached).await?;
        all.reached += round.reached;
        all.tried += round.tried;
        if all.reached >= TRY || all.tried >= TRY * 4 {
            break;
        }
    }
    Ok(all)
}
