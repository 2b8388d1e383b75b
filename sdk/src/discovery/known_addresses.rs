//! The known addresses of nodes: publishing those of this node, and finding those of a peer by its id alone.

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

/// Terms of the records of a node's addresses, and of a relay's.
pub(crate) const ADDRESS_TERMS: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Presence,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

/// Interval at which reachability is checked if no change is reported.
const REACHABILITY_INTERVAL: Duration = Duration::from_secs(15);

fn peer_key(peer: &PeerId) -> Vec<u8> {
    format!("peer/{peer}").into_bytes()
}

/// Returns the addresses that `peer` claims in its record. They are unverified.
///
/// # Errors
/// [`DhtError::Stopped`] after the network has stopped.
pub(crate) async fn find(dht: &Dht, peer: &PeerId) -> Result<Heard, DhtError> {
    // Only the peer's own record counts. All records are read, because other nodes may have published some under the
    // key.
    let records = dht.get(&peer_key(peer)).await?;
    let own = records.iter().filter(|record| record.publisher() == *peer);
    let mut found = Heard::default();
    for record in own {
        found.extend(addresses_of(record));
    }
    Ok(found)
}

/// Publishes this node's addresses, and a relay's record for as long as this node relays. Ends with the network.
pub(crate) async fn advertise(advertiser: Advertiser, network: Network) {
    let mut addresses = network.watch_addresses();
    let own = network.local_peer();
    let value = || Value::of(|addresses| wire::PeerClaim { addresses }.encode_to_vec());
    // The first addresses arrive one after the other.
    sleep(SETTLE).await;
    advertiser.register(RecordId::of(peer_key(&own)), value(), ADDRESS_TERMS);
    let mut was_relay = false;
    loop {
        addresses.mark_unchanged();
        let is_relay = network.addresses().is_relay;
        let before = std::mem::replace(&mut was_relay, is_relay);
        let relay = RecordId::of(relay_key(&own));
        match (before, is_relay) {
            (false, true) => advertiser.register(relay, value(), ADDRESS_TERMS),
            (true, false) => advertiser.remove(relay),
            _ => {}
        }
        if addresses.changed().await.is_err() {
            return;
        }
    }
}

/// Reports to the DHT whether peers outside reach this node, because it acts as a server only then. Ends with the
/// network.
pub(crate) async fn report_reachability(dht: Dht, network: Network) {
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
            () = sleep(REACHABILITY_INTERVAL) => {}
        }
    }
}
