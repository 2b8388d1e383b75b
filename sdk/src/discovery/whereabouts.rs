//! The whereabouts of nodes: what this one states of itself, and finding a peer by its id alone.

use std::time::Duration;

use prost::Message;
use tokio::time::sleep;
use weft_dht::{Dht, DhtError};
use weft_net::{Heard, Network, PeerId};
use weft_proto::wire;

use crate::discovery::{
    addresses::addresses_of,
    advertise::{Advertiser, AtStop, Rank, RecordId, SETTLE, Terms, Value},
    relays::relay_key,
};

/// The terms of a node's record of where it is, and of a relay's.
pub(crate) const HERE: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Presence,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

/// How often it is looked whether strangers reach this node, if nothing tells.
const REACHED: Duration = Duration::from_secs(15);

fn peer_key(peer: &PeerId) -> Vec<u8> {
    format!("peer/{peer}").into_bytes()
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

/// States where this node is, and for as long as it relays, that it does. Ends with the network.
pub(crate) async fn tell(advertiser: Advertiser, network: Network) {
    let mut addresses = network.watch_addresses();
    let own = network.local_peer();
    let value = || Value::of(|addresses| wire::PeerClaim { addresses }.encode_to_vec());
    // The first addresses come one after the other.
    sleep(SETTLE).await;
    advertiser.register(RecordId::of(peer_key(&own)), value(), HERE);
    let mut said_relay = false;
    loop {
        addresses.mark_unchanged();
        let is_relay = network.addresses().is_relay;
        let before = std::mem::replace(&mut said_relay, is_relay);
        let relay = RecordId::of(relay_key(&own));
        match (before, is_relay) {
            (false, true) => advertiser.register(relay, value(), HERE),
            (true, false) => advertiser.remove(relay),
            _ => {}
        }
        if addresses.changed().await.is_err() {
            return;
        }
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
