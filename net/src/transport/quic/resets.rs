//! Stateless resets (RFC 9000, 10.3). After a restart, a packet of an earlier run is answered with a reset that the
//! peer accepts, so the peer learns at once that its connection is gone.
//!
//! quinn answers only if it recognizes the connection id as its own. So the key that signs resets and the key that
//! marks connection ids both stay the same after a restart. The keys differ from socket to socket. Otherwise an
//! observer that sees a packet of a connection could make another socket of this node reset that connection.
//!
//! quinn's own generator is not used with a fixed key: its ids have three random bytes, so that a peer could collect
//! the reset tokens of all ids, and its hash reveals the key. Here an id has eight random bytes and four of a keyed
//! BLAKE3 hash: no id is used twice, and only the node can tell its ids from others.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use libp2p::identity::Keypair;
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig, crypto::CryptoError};
use quinn_proto::{InvalidCid, RandomConnectionIdGenerator};

/// Derives the keys for resets from a node's identity.
pub(super) struct Resets(Option<[u8; 32]>);

impl Resets {
    pub(super) fn new(key: &Keypair) -> Self {
        Self(key.derive_secret(b"weft quic stateless reset"))
    }

    /// Returns the configuration of the endpoint whose socket is bound at this address. It is the same in every run, if
    /// the identity has a secret.
    pub(super) fn endpoint(&self, bound: SocketAddr) -> EndpointConfig {
        let Some(secret) = self.0 else {
            return EndpointConfig::default();
        };
        let ids = derive(&secret, "connection ids", bound);
        let resets = ResetKey(derive(&secret, "resets", bound));
        let mut config = EndpointConfig::new(Arc::new(resets));
        config.cid_generator(move || Box::new(MarkedIds::new(ids)));
        config
    }
}

fn derive(secret: &[u8; 32], purpose: &str, bound: SocketAddr) -> [u8; 32] {
    let context = format!("{purpose} {bound}");
    *blake3::keyed_hash(secret, context.as_bytes()).as_bytes()
}

/// Random bytes of a connection id, and bytes that mark it.
const NONCE: usize = 8;
const MARK: usize = 4;

/// Generates connection ids that this node recognizes after a restart.
struct MarkedIds {
    key: [u8; 32],
    nonces: RandomConnectionIdGenerator,
}

impl MarkedIds {
    fn new(key: [u8; 32]) -> Self {
        let nonces = RandomConnectionIdGenerator::new(NONCE);
        Self { key, nonces }
    }

    fn mark(&self, nonce: &[u8]) -> [u8; MARK] {
        let [a, b, c, d, ..] = *blake3::keyed_hash(&self.key, nonce).as_bytes();
        [a, b, c, d]
    }
}

impl ConnectionIdGenerator for MarkedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let nonce = self.nonces.generate_cid();
        ConnectionId::new(&[&nonce[..], &self.mark(&nonce)].concat())
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        match id.split_at_checked(NONCE) {
            Some((nonce, mark)) if mark == self.mark(nonce) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        NONCE + MARK
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Signs stateless resets.
struct ResetKey([u8; 32]);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        let hash = blake3::keyed_hash(&self.0, data);
        signature.copy_from_slice(hash.as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let hash = blake3::keyed_hash(&self.0, data);
        // The comparison takes constant time.
        match <[u8; blake3::OUT_LEN]>::try_from(signature) {
            Ok(signature) if hash == signature => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_ids_are_recognized_after_a_restart_and_at_no_other_socket() {
        let generator = |bound: &str| {
            let bound = bound.parse().unwrap();
            MarkedIds::new(derive(&[7; 32], "connection ids", bound))
        };
        let id = generator("0.0.0.0:9338").generate_cid();
        assert_eq!(id.len(), NONCE + MARK);
        assert_ne!(id, generator("0.0.0.0:9338").generate_cid());
        assert!(generator("0.0.0.0:9338").validate(&id).is_ok());
        assert!(generator("0.0.0.0:9339").validate(&id).is_err());
        assert!(generator("[::]:9338").validate(&id).is_err());
        for wrong in [&id[..NONCE], &[0; NONCE + MARK], &[&id[..], &[0]].concat()] {
            let wrong = ConnectionId::new(wrong);
            assert!(generator("0.0.0.0:9338").validate(&wrong).is_err());
        }
    }
}
