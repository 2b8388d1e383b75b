//! Signing keys, and the check of signatures.

use std::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::id::Key;

/// The key pair of a replica, which signs everything that the replica writes.
#[derive(Clone)]
pub struct Identity(SigningKey);

impl Identity {
    /// Creates an identity from the 32 secret bytes of an Ed25519 key.
    pub fn from_secret(secret: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&secret))
    }

    /// Returns the public key.
    pub fn key(&self) -> Key {
        Key(self.0.verifying_key().to_bytes())
    }

    /// Signs `bytes` for the purpose that `domain` names, so that the signature is valid for no other.
    pub(crate) fn sign(&self, domain: &[u8], bytes: &[u8]) -> Vec<u8> {
        self.0.sign(&[domain, bytes].concat()).to_bytes().to_vec()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.key())
    }
}

/// Returns true if `key` signed `bytes` for `domain`. The check is strict, so that all verifiers agree: it allows no
/// small-order keys and no malleable signatures.
pub(crate) fn verify(key: &Key, domain: &[u8], bytes: &[u8], signature: &[u8]) -> bool {
    let (Ok(key), Ok(signature)) = (
        VerifyingKey::from_bytes(&key.0),
        Signature::from_slice(signature),
    ) else {
        return false;
    };
    key.verify_strict(&[domain, bytes].concat(), &signature)
        .is_ok()
}
