//! Targets, which identify a model: a name, an id or a ticket.

use std::{fmt, str::FromStr};

use data_encoding::BASE32_NOPAD;
use prost::Message;
use weft_net::{Multiaddr, PeerId};
use weft_proto::wire;

use crate::{
    Hash, ModelName, ParseNameError,
    discovery::addresses::{decode_given, encode},
};

/// Prefix of a ticket.
const SCHEME: &str = "weft:";

/// Version of the format: the first encoded byte.
const VERSION: u8 = 1;

/// Bytes of the checksum at the end. It distinguishes a truncated or mistyped ticket from one whose peers are gone.
const CHECKSUM: usize = 4;

/// The most peers that are read from a ticket.
const MAX_PEERS: usize = 16;

/// Identifies a model; for [`Models::get`](crate::Models::get) and [`Models::open`](crate::Models::open).
///
/// It is parsed from text: `org/name` or `org/name@revision`, an id of 64 hex digits, or a ticket that begins with
/// `weft:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A model name, resolved through registries and the records of publishers.
    Name(ModelName),
    /// A model id; providers are found in the DHT.
    Id(Hash),
    /// A ticket with the model's id and addresses of peers. Works without the DHT.
    Ticket(Ticket),
}

/// The error of parsing a target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseTargetError {
    /// The text looks like a name, and is malformed.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// The text begins like a ticket, and is damaged.
    #[error("the ticket is damaged: {0}; copy the whole ticket again")]
    Ticket(&'static str),
    /// The text has none of the forms of a target.
    #[error("{0:?} is neither a name (org/name), an id (64 hex digits) nor a ticket (weft:...)")]
    Other(String),
}

/// A model id and addresses of peers that provide the model, as a text that begins with `weft:`. A ticket works
/// without the DHT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Id of the model.
    pub model: Hash,
    /// The providers, each with its addresses.
    pub peers: Vec<(PeerId, Vec<Multiaddr>)>,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = wire::Ticket {
            manifest: self.model.as_bytes().to_vec().into(),
            peers: self
                .peers
                .iter()
                .map(|(peer, addresses)| wire::TicketPeer {
                    peer: peer.to_bytes().into(),
                    addresses: encode(addresses),
                })
                .collect(),
        };
        let mut bytes = vec![VERSION];
        bytes.extend_from_slice(&message.encode_to_vec());
        bytes.extend_from_slice(&checksum(&bytes));
        f.write_str(SCHEME)?;
        f.write_str(&BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let hash = Hash::of(bytes);
    let mut checksum = [0; CHECKSUM];
    checksum.copy_from_slice(&hash.as_bytes()[..CHECKSUM]);
    checksum
}

impl FromStr for Ticket {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, ParseTargetError> {
        let damaged = ParseTargetError::Ticket;
        let encoded = text
            .strip_prefix(SCHEME)
            .ok_or(damaged("it does not begin with weft:"))?;
        let bytes = BASE32_NOPAD
            .decode(encoded.to_ascii_uppercase().as_bytes())
            .map_err(|_| damaged("it is not base32"))?;
        let (body, check) = bytes
            .split_last_chunk::<CHECKSUM>()
            .ok_or(damaged("it is too short"))?;
        if checksum(body) != *check {
            return Err(damaged("its checksum is wrong"));
        }
        let message = match body {
            [VERSION, message @ ..] => wire::Ticket::decode(message)
                .map_err(|_| damaged("its content cannot be decoded"))?,
            _ => return Err(damaged("its version is not supported")),
        };
        let peers = message
            .peers
            .into_iter()
            .take(MAX_PEERS)
            .map(|peer| {
                let id = PeerId::from_bytes(&peer.peer).ok()?;
                let addresses = decode_given(&peer.addresses);
                Some((id, addresses))
            })
            .collect::<Option<_>>()
            .ok_or(damaged("a peer in it is malformed"))?;
        Ok(Self {
            model: Hash::from_slice(&message.manifest).ok_or(damaged("it contains no model id"))?,
            peers,
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Id(id) => id.fmt(f),
            Self::Ticket(ticket) => ticket.fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Self, ParseTargetError> {
        let text = text.trim();
        if text.starts_with(SCHEME) {
            return text.parse().map(Self::Ticket);
        }
        if let Ok(id) = text.parse() {
            return Ok(Self::Id(id));
        }
        if text.contains('/') {
            return Ok(Self::Name(text.parse()?));
        }
        Err(ParseTargetError::Other(text.chars().take(200).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            model: Hash::of(b"m"),
            peers: vec![(
                PeerId::random(),
                vec![
                    "/ip4/192.0.2.1/tcp/9338".parse().unwrap(),
                    "/ip6/2001:db8::1/udp/9338/quic-v1".parse().unwrap(),
                ],
            )],
        }
    }

    #[test]
    fn names_ids_and_tickets_are_told_apart() {
        let ticket = ticket();
        assert_eq!(
            ticket.to_string().parse(),
            Ok(Target::Ticket(ticket.clone()))
        );
        let shouted = ticket.to_string().replace("weft:", "").to_uppercase();
        assert_eq!(format!("weft:{shouted}").parse(), Ok(ticket.clone()));
        assert_eq!(
            ticket.model.to_string().parse(),
            Ok(Target::Id(ticket.model))
        );
        assert!(matches!("a/b".parse(), Ok(Target::Name(_))));
    }

    #[test]
    fn damage_is_noticed() {
        let text = ticket().to_string();
        for at in 5..text.len() {
            assert!(text[..at].parse::<Target>().is_err(), "cut at {at}");
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'a' { b'b' } else { b'a' };
            let changed = String::from_utf8(bytes).unwrap();
            // The last digit has unused bits, so a changed digit may give the same ticket.
            if changed.parse::<Target>().is_ok() {
                assert_eq!(changed.parse::<Ticket>(), text.parse());
            }
        }
        for bad in ["", "weft:", "weft:!", "llama", &"g".repeat(64), "a/b/c"] {
            assert!(bad.parse::<Target>().is_err(), "{bad:?}");
        }
    }
}
