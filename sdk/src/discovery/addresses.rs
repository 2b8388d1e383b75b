//! Addresses in records, tickets and messages: how they are encoded, and how far they are believed.

use bytes::Bytes;
use prost::Message;
use weft_dht::Record;
use weft_net::{Heard, MAX_PLACES, Multiaddr, first_places};
use weft_proto::wire;

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
