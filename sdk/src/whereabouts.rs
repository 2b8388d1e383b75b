//! Where nodes are: what this one says of itself, finding a peer by its id alone, and finding relays.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use prost::Message;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use weft_dht::{Dht, DhtError, Record};
use weft_net::{Heard, MAX_PLACES, Multiaddr, Network, PeerId, first_places};
use weft_proto::wire;

use crate::discovery::{Discovery, Round};

/// How long a node's statement of where it is holds.
const TTL: Duration = Duration::from_secs(2 * 3600);

/// How often it is said again.
const REFRESH: Duration = Duration::from_secs(40 * 60);

/// A change is waited for this long: several often come together.
const SETTLE: Duration = Duration::from_millis(500);

/// At least this long between two statements.
const PAUSE: Duration = Duration::from_secs(10);

/// Relays state themselves under one of this many keys, so that no node holds all of them.
const SHARDS: u8 = 16;

/// The first and the longest pause between two looks of a node that lacks relays: each look is up to sixteen look-ups, and a mesh may have no relay.
const LOOK: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(600));

/// In a mesh smaller than this, every node that comes may be the first relay.
const SMALL: usize = 20;

/// Relays that are connected to at a time, to find out which are near.
const TRY: usize = 4;

/// How often it is looked whether strangers reach this node, if nothing tells.
const REACHED: Duration = Duration::from_secs(15);

/// How long leaving may take, and how many statements are taken back at a time.
const LEAVE: Duration = Duration::from_secs(2);
const LEAVING: usize = 32;

fn peer_key(peer: &PeerId) -> Vec<u8> {
    format!("peer/{peer}").into_bytes()
}

fn relay_key(shard: u8) -> Vec<u8> {
    format!("relay/{shard}").into_bytes()
}

fn shard_of(peer: &PeerId) -> u8 {
    peer.to_bytes().last().map_or(0, |last| last % SHARDS)
}

/// Addresses as claims and tickets hold them: those of the first sixteen places, the most useful ones. A host and port
/// for both transports is one place.
pub(crate) fn encode(addresses: &[Multiaddr]) -> Vec<Bytes> {
    let addresses = first_places(addresses.iter().cloned(), MAX_PLACES).into_iter();
    addresses.map(|address| address.to_vec().into()).collect()
}

/// Reads the addresses of a ticket, which the user has given; what is no address is left out.
pub(crate) fn decode_given(addresses: &[Bytes]) -> Vec<Multiaddr> {
    let addresses = addresses
        .iter()
        .take(2 * MAX_PLACES)
        .filter_map(|bytes| Multiaddr::try_from(bytes.to_vec()).ok());
    first_places(addresses, MAX_PLACES)
}

/// Reads addresses that somebody has stated, in a record or a message; what is no address is left out.
pub(crate) fn decode(addresses: &[Bytes]) -> Heard {
    Heard::new(decode_given(addresses))
}

/// Where a record's claim says that its publisher is.
pub(crate) fn addresses_of(record: &Record) -> Heard {
    let claim = record.value().map(wire::PeerClaim::decode);
    match claim {
        Some(Ok(claim)) => decode(&claim.addresses),
        _ => Heard::default(),
    }
}

/// Where `peer` says that it is.
///
/// # Errors
/// [`DhtError::Stopped`].
pub(crate) async fn find(dht: &Dht, peer: &PeerId) -> Result<Heard, DhtError> {
    // Only its own statement counts, so the first few are not enough if others have stated something there.
    let records = dht.get(&peer_key(peer)).await?;
    let own = records.iter().filter(|record| record.publisher() == *peer);
    let mut found = Heard::default();
    for record in own {
        found.extend(addresses_of(record));
    }
    Ok(found)
}

/// Says where this node is, whenever that changes, and from time to time. Ends with the network.
pub(crate) async fn tell(dht: Dht, network: Network) {
    let mut addresses = network.watch_addresses();
    let mut meetings = dht.meetings();
    let own = network.local_peer();
    let mut said_relay = false;
    loop {
        sleep(SETTLE).await;
        addresses.mark_unchanged();
        meetings.mark_unchanged();
        let own_addresses = network.addresses();
        let claim = wire::PeerClaim {
            addresses: encode(&own_addresses.for_strangers),
        };
        let value = claim.encode_to_vec();
        let is_relay = own_addresses.is_relay;
        let relay_key = relay_key(shard_of(&own));
        let told = async {
            let took = dht.publish(&peer_key(&own), &[], &value, TTL).await?;
            if is_relay {
                said_relay = true;
                dht.publish(&relay_key, &[], &value, TTL).await?;
            } else if said_relay {
                dht.withdraw(&relay_key, &[], TTL).await?;
                said_relay = false;
            }
            Ok::<_, DhtError>(took)
        };
        let took = told.await.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot say where this node is");
            0
        });
        // Whoever has told nobody does not make the first one it meets wait.
        let pause = if took == 0 { SETTLE } else { PAUSE };
        let again = Instant::now() + pause;
        tokio::select! {
            changed = addresses.changed() => if changed.is_err() { return },
            met = meetings.changed() => if met.is_err() { return },
            () = sleep(REFRESH) => {}
        }
        sleep_until(again).await;
    }
}

/// Tells the DHT whether strangers reach this node: only then does it serve them. Ends with the network.
pub(crate) async fn say_whether_reached(dht: Dht, network: Network) {
    let mut addresses = network.watch_addresses();
    loop {
        addresses.mark_unchanged();
        let Some(known) = network.reachability().await else {
            return;
        };
        if dht.set_reachable(!known.public.is_empty()).await.is_err() {
            return;
        }
        tokio::select! {
            changed = addresses.changed() => if changed.is_err() { return },
            () = sleep(REACHED) => {}
        }
    }
}

/// Takes back where this node is and what it has, for it is about to stop: whoever looks for that is not to try in vain. Two seconds at most.
pub(crate) async fn leave(dht: &Dht) {
    if *dht.nodes().borrow() == 0 {
        return;
    }
    let all = async {
        let mut records = Vec::new();
        for prefix in [&b"peer/"[..], b"relay/", b"provider/"] {
            records.extend(dht.own(prefix).await?);
        }
        records.retain(|record| record.value().is_some());
        let withdrawals = stream::iter(records).for_each_concurrent(LEAVING, |record| async move {
            let left = record.remaining();
            // Who does not hear of it forgets by itself.
            let _ = dht.withdraw(record.key(), record.subkey(), left).await;
        });
        withdrawals.await;
        Ok::<_, DhtError>(())
    };
    let _ = timeout(LEAVE, all).await;
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
                    if *dht.nodes().borrow() <= SMALL {
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
    weft_dht::place(&relay_key(shard_of(relay)))
}

/// Connects to a few relays that the mesh knows.
///
/// # Errors
/// [`DhtError::Stopped`].
async fn try_relays(discovery: &Discovery, shard: &mut u8) -> Result<Round, DhtError> {
    let mut all = Round::default();
    for _ in 0..SHARDS {
        let key = relay_key(*shard);
        // Next time, the relays that are listed elsewhere.
        *shard = (*shard + 1) % SHARDS;
        let round = discovery.find(&key, TTL, TRY - all.reached).await?;
        all.reached += round.reached;
        all.tried += round.tried;
        if all.reached >= TRY || all.tried >= TRY * 4 {
            break;
        }
    }
    Ok(all)
}
