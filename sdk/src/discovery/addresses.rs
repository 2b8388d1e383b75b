//! Addresses in records, tickets and messages: their encoding, and whether they are trusted.

use bytes::Bytes;
use prost::Message;
use weft_dht::Record;
use weft_net::{Heard, MAX_ENDPOINTS, Multiaddr, first_endpoints};
use weft_proto::wire;

/// Encodes addresses for records and tickets: those of the first sixteen endpoints, the most useful ones. A host
/// and port that serve both transports are one endpoint.
pub(crate) fn encode(addresses: &[Multiaddr]) -> Vec<Bytes> {
    let addresses = first_endpoints(addresses.iter().cloned(), MAX_ENDPOINTS).into_iter();
    addresses.map(|address| address.to_vec().into()).collect()
}

/// Decodes the addresses of a ticket, which the user has given. Malformed addresses are left out.
pub(crate) fn decode_given(addresses: &[Bytes]) -> Vec<Multiaddr> {
    let addresses = addresses
        .iter()
        .take(2 * MAX_ENDPOINTS)
        .filter_map(|bytes| Multiaddr::try_from(bytes.to_vec()).ok());
    first_endpoints(addresses, MAX_ENDPOINTS)
}

/// Decodes the unverified addresses of a record or a message. Malformed addresses are left out.
pub(crate) fn decode(addresses: &[Bytes]) -> Heard {
    Heard::new(decode_given(addresses))
}

/// Returns the unverified addresses that a publisher claims in its record.
pub(crate) fn addresses_of(record: &Record) -> Heard {
    let claim = record.value().map(wire::PeerClaim::decode);
    match claim {
        Some(Ok(claim)) => decode(&claim.addresses),
        _ => Heard::default(),
    }
}
