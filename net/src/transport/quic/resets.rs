//! Stateless resets (RFC 9000, 10.3). After a restart, a packet of an earlier run is answered with a reset that the
//! peer accepts, so the peer learns at once that its connection is gone.
//!
//! quinn answers only if it recognizes the connection id as its own. So the key that signs resets and the key that
//! marks connection ids both stay the same after a restart. The keys differ from socket to socket. Otherwise an
//! observer that sees a packet of a connection could make another socket of this node reset that connection.

use std::{net::SocketAddr, sync::Arc};

use libp2p::identity::Keypair;
use quinn::{EndpointConfig, crypto::CryptoError};
use quinn_proto::HashedConnectionIdGenerator;

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
        let derive = |purpose: &str| {
            let mut hasher = blake3::Hasher::new_keyed(&secret);
            hasher.update(format!("{purpose} {bound}").as_bytes());
            *hasher.finalize().as_bytes()
        };
        let [a, b, c, d, e, f, g, h, ..] = derive("connection ids");
        let ids = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let mut config = EndpointConfig::new(Arc::new(ResetKey(derive("resets"))));
        config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
        config
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
