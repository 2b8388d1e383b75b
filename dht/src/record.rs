//! A publisher's signed record: its encoding, its limits and its checks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libp2p::{
    PeerId,
    identity::{KeyType, Keypair, PublicKey},
};
use weft_proto::wire;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 512;

/// The longest subkey, in bytes.
pub const MAX_SUBKEY: usize = 256;

/// The longest value, in bytes.
pub const MAX_VALUE: usize = 4096;

/// The longest lifetime of a record from now on. A record that still holds must be renewed before it expires.
pub const MAX_TTL: Duration = Duration::from_secs(48 * 3600);

/// The most by which a publisher's clock may be ahead of this node's. A machine without NTP is minutes off after some
/// weeks.
pub const MAX_SKEW: Duration = Duration::from_secs(600);

/// The first bytes of the protobuf encoding of an Ed25519 public key; the 32 bytes of the key follow.
const ED25519: [u8; 4] = [8, 1, 18, 32];

/// Size of the protobuf encoding of an Ed25519 public key, in bytes.
const PUBLISHER: usize = ED25519.len() + 32;

/// Size of an Ed25519 signature, in bytes.
const SIGNATURE: usize = 64;

/// The most bytes that one record takes in a set. Tags, lengths and numbers take less than the 64 bytes that are added
/// to the fields.
pub(crate) const MAX_SIZE: usize = MAX_KEY + MAX_SUBKEY + MAX_VALUE + PUBLISHER + SIGNATURE + 64;

/// First bytes of the signed data, so that the signature is valid for nothing else.
const DOMAIN: &[u8] = b"weft record v1\0";

/// A record whose signature was checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    wire: wire::SignedRecord,
    publisher: PeerId,
}

/// The reason for which a record is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A field is longer than allowed.
    #[error("the record's {field} has {size} bytes; the limit is {limit}")]
    TooLong {
        /// The name of the field.
        field: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The key is empty.
    #[error("the record has no key")]
    NoKey,
    /// The record would live for less than a second.
    #[error("a record must live for at least one second and at most 48 hours")]
    TooBrief,
    /// The record has expired.
    #[error("the record has expired")]
    Expired,
    /// The record claims to live longer than allowed.
    #[error("the record claims to live longer than 48 hours")]
    TooLongLived,
    /// The publisher's key is not an Ed25519 key.
    #[error("the record's publisher is not an Ed25519 key")]
    Publisher,
    /// The signature is invalid.
    #[error("the record's signature is invalid")]
    Signature,
    /// The record is stored or returned under a key that is not its own.
    #[error("the record belongs to another key")]
    WrongKey,
    /// Signing failed.
    #[error("the record cannot be signed: {0}")]
    Sign(String),
    /// This machine's clock shows a time before 1970, at which no record is valid.
    #[error(
        "this machine's clock shows a year before 1970, so every record has expired; set the clock, then try again"
    )]
    Clock,
}

impl RecordError {
    /// Returns true if no node that follows the protocol sends such a record, even with a wrong clock.
    pub(crate) fn is_offence(&self) -> bool {
        !matches!(self, Self::Expired | Self::TooLongLived)
    }
}

/// Returns the current time in milliseconds since 1970, or 0 if the clock shows an earlier time.
pub(crate) fn now() -> u64 {
    millis(SystemTime::now())
}

impl Record {
    /// Signs a record that holds for `ttl` from now. Without a value, the record withdraws an earlier one.
    ///
    /// # Errors
    /// Returns [`RecordError`] if a field or the time to live is over its limit.
    pub fn sign(
        keys: &Keypair,
        key: &[u8],
        subkey: &[u8],
        value: Option<&[u8]>,
        sequence: u64,
        ttl: Duration,
    ) -> Result<Self, RecordError> {
        Self::sign_at(
            keys,
            (key, subkey),
            value,
            sequence,
            (SystemTime::now(), ttl),
        )
    }

    /// Signs a record that holds for a time from the given moment on.
    pub(crate) fn sign_at(
        keys: &Keypair,
        (key, subkey): (&[u8], &[u8]),
        value: Option<&[u8]>,
        sequence: u64,
        (now, ttl): (SystemTime, Duration),
    ) -> Result<Self, RecordError> {
        if ttl > MAX_TTL {
            return Err(RecordError::TooLongLived);
        }
        if now < UNIX_EPOCH {
            return Err(RecordError::Clock);
        }
        let mut wire = wire::SignedRecord {
            key: key.to_vec().into(),
            subkey: subkey.to_vec().into(),
            value: value.unwrap_or_default().to_vec().into(),
            sequence,
            expires_at: millis(now + ttl),
            removed: value.is_none(),
            publisher: keys.public().encode_protobuf().into(),
            signature: Default::default(),
        };
        check_sizes(&wire)?;
        wire.signature = keys
            .sign(&signed_bytes(&wire))
            .map_err(|error| RecordError::Sign(error.to_string()))?
            .into();
        Ok(Self {
            wire,
            publisher: keys.public().to_peer_id(),
        })
    }

    /// Checks a record that a peer has sent under `key`.
    ///
    /// # Errors
    /// Returns the first rule that is broken; cheap rules are checked first.
    pub fn verify(wire: wire::SignedRecord, key: &[u8]) -> Result<Self, RecordError> {
        check_claims(&wire, key, now())?;
        Self::check_signature(wire)
    }

    /// Checks only the signature, which takes some fifty microseconds; [`check_claims`] checks the rest.
    pub(crate) fn check_signature(wire: wire::SignedRecord) -> Result<Self, RecordError> {
        let public = PublicKey::try_decode_protobuf(&wire.publisher)
            .ok()
            .filter(|key| key.key_type() == KeyType::Ed25519)
            .ok_or(RecordError::Publisher)?;
        if !public.verify(&signed_bytes(&wire), &wire.signature) {
            return Err(RecordError::Signature);
        }
        Ok(Self {
            publisher: public.to_peer_id(),
            wire,
        })
    }

    /// Decodes a record that was checked on this node before and comes from its own disk. Checks the sizes, but neither
    /// signature nor expiry.
    pub(crate) fn checked_before(wire: wire::SignedRecord) -> Result<Self, RecordError> {
        check_sizes(&wire)?;
        let public = PublicKey::try_decode_protobuf(&wire.publisher);
        let public = public.map_err(|_| RecordError::Publisher)?;
        Ok(Self {
            publisher: public.to_peer_id(),
            wire,
        })
    }

    /// Returns the publisher that signed the record.
    pub fn publisher(&self) -> PeerId {
        self.publisher
    }

    /// Returns the key under which the record is stored.
    pub fn key(&self) -> &[u8] {
        &self.wire.key
    }

    /// Returns the subkey, which distinguishes the publisher's records under one key.
    pub fn subkey(&self) -> &[u8] {
        &self.wire.subkey
    }

    /// Returns the value; `None` if the record withdraws an earlier one.
    pub fn value(&self) -> Option<&[u8]> {
        (!self.wire.removed).then_some(&self.wire.value)
    }

    /// Returns the sequence number, which is higher than in the publisher's earlier records under this key and subkey.
    pub fn sequence(&self) -> u64 {
        self.wire.sequence
    }

    /// Returns the time until the record expires; zero once it has expired.
    pub fn remaining(&self) -> Duration {
        let until = UNIX_EPOCH + Duration::from_millis(self.wire.expires_at);
        until
            .duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO)
    }

    /// Returns the expiry, in milliseconds since 1970.
    pub(crate) fn expires_at(&self) -> u64 {
        self.wire.expires_at
    }

    /// Returns true if the record belongs to `publisher` and has this subkey. The key is not compared.
    pub(crate) fn is_about(&self, publisher: &PeerId, subkey: &[u8]) -> bool {
        self.publisher == *publisher && self.wire.subkey == subkey
    }

    /// Returns true if this record replaces `other`, which has the same key, publisher and subkey. Equal sequence
    /// numbers are ordered by signature, so that all nodes keep the same record.
    pub(crate) fn supersedes(&self, other: &Self) -> bool {
        (self.wire.sequence, &self.wire.signature) > (other.wire.sequence, &other.wire.signature)
    }

    /// Returns the bytes that the record takes in a set: a tag, a length of at most three bytes, and the record.
    pub(crate) fn size(&self) -> usize {
        size_of(&self.wire)
    }

    pub(crate) fn as_wire(&self) -> &wire::SignedRecord {
        &self.wire
    }
}

/// Returns the bytes that a record takes in a set.
pub(crate) fn size_of(wire: &wire::SignedRecord) -> usize {
    use prost::Message;
    wire.encoded_len() + 4
}

/// Checks everything in a record except its signature: the sizes, the key under which it was sent, and the expiry.
pub(crate) fn check_claims(
    wire: &wire::SignedRecord,
    key: &[u8],
    now: u64,
) -> Result<(), RecordError> {
    check_sizes(wire)?;
    if wire.key != key {
        return Err(RecordError::WrongKey);
    }
    if wire.expires_at <= now {
        return Err(RecordError::Expired);
    }
    let most = (MAX_TTL + MAX_SKEW).as_millis() as u64;
    if wire.expires_at > now.saturating_add(most) {
        return Err(RecordError::TooLongLived);
    }
    Ok(())
}

/// Returns the peer that a record names as its publisher, or `None` if it names no Ed25519 key. The name is unverified.
pub(crate) fn claimed_publisher(wire: &wire::SignedRecord) -> Option<PeerId> {
    if wire.publisher.len() != PUBLISHER || !wire.publisher.starts_with(&ED25519) {
        return None;
    }
    // A key this short is its own hash: the multihash is "identity", a length, and the key.
    let mut hash = vec![0, PUBLISHER as u8];
    hash.extend_from_slice(&wire.publisher);
    PeerId::from_bytes(&hash).ok()
}

fn check_sizes(wire: &wire::SignedRecord) -> Result<(), RecordError> {
    for (field, size, limit) in [
        ("key", wire.key.len(), MAX_KEY),
        ("subkey", wire.subkey.len(), MAX_SUBKEY),
        ("value", wire.value.len(), MAX_VALUE),
        ("publisher", wire.publisher.len(), PUBLISHER),
        ("signature", wire.signature.len(), SIGNATURE),
    ] {
        if size > limit {
            return Err(RecordError::TooLong { field, size, limit });
        }
    }
    Ok(())
}

/// Returns the signed data: the domain, then each field. Fields of variable length follow their length; numbers are
/// little-endian.
fn signed_bytes(wire: &wire::SignedRecord) -> Vec<u8> {
    let mut bytes = DOMAIN.to_vec();
    for field in [&wire.key, &wire.subkey, &wire.value, &wire.publisher] {
        bytes.extend_from_slice(&(field.len() as u32).to_le_bytes());
        bytes.extend_from_slice(field);
    }
    bytes.extend_from_slice(&wire.sequence.to_le_bytes());
    bytes.extend_from_slice(&wire.expires_at.to_le_bytes());
    bytes.push(wire.removed.into());
    bytes
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_signed_record_verifies_under_its_key_only() {
        let keys = Keypair::generate_ed25519();
        let record = Record::sign(&keys, b"k", b"s", Some(b"v"), 7, HOUR).unwrap();
        let read = Record::verify(record.as_wire().clone(), b"k").unwrap();
        assert_eq!(read, record);
        assert_eq!(read.publisher(), keys.public().to_peer_id());
        assert_eq!(read.value(), Some(&b"v"[..]));
        assert!(read.remaining() > HOUR - Duration::from_secs(5));
        assert_eq!(
            Record::verify(record.as_wire().clone(), b"other"),
            Err(RecordError::WrongKey)
        );
    }

    #[test]
    fn the_publisher_that_a_record_names_is_read_without_a_check_of_its_key() {
        let keys = Keypair::generate_ed25519();
        let record = Record::sign(&keys, b"k", b"", Some(b"v"), 1, HOUR).unwrap();
        let mut wire = record.as_wire().clone();
        assert_eq!(claimed_publisher(&wire), Some(record.publisher()));
        wire.publisher = vec![8, 0, 18, 2, 1, 1].into();
        assert_eq!(claimed_publisher(&wire), None);
    }

    #[test]
    fn a_clock_before_1970_is_named_by_the_error() {
        let keys = Keypair::generate_ed25519();
        let early = UNIX_EPOCH - HOUR;
        let signed = Record::sign_at(&keys, (b"k", b""), Some(b"v"), 1, (early, HOUR));
        assert_eq!(signed, Err(RecordError::Clock));
    }

    #[test]
    fn every_changed_field_breaks_the_signature() {
        let keys = Keypair::generate_ed25519();
        let record = Record::sign(&keys, b"k", b"s", Some(b"v"), 7, HOUR).unwrap();
        let other = Keypair::generate_ed25519().public().encode_protobuf();
        let changes: [&dyn Fn(&mut wire::SignedRecord); 7] = [
            &|r| r.subkey = (&b"t"[..]).into(),
            &|r| r.value = (&b"w"[..]).into(),
            &|r| r.sequence += 1,
            &|r| r.expires_at += 1,
            &|r| r.removed = true,
            &|r| r.publisher = other.clone().into(),
            &|r| r.signature = vec![0; 64].into(),
        ];
        for change in changes {
            let mut wire = record.as_wire().clone();
            change(&mut wire);
            assert_eq!(Record::verify(wire, b"k"), Err(RecordError::Signature));
        }
        // Bytes that are moved from one field to the next.
        let mut wire = record.as_wire().clone();
        wire.subkey = (&b""[..]).into();
        wire.value = (&b"sv"[..]).into();
        assert_eq!(Record::verify(wire, b"k"), Err(RecordError::Signature));
    }

    #[test]
    fn over_long_over_lived_and_expired_records_are_refused() {
        let keys = Keypair::generate_ed25519();
        assert!(Record::sign(&keys, &[0; MAX_KEY + 1], b"", Some(b""), 0, HOUR).is_err());
        assert!(Record::sign(&keys, b"k", b"", Some(&[0; MAX_VALUE + 1]), 0, HOUR).is_err());
        assert!(Record::sign(&keys, b"k", b"", Some(b""), 0, MAX_TTL * 2).is_err());
        let expired = Record::sign(&keys, b"k", b"", Some(b""), 0, Duration::ZERO).unwrap();
        assert_eq!(
            Record::verify(expired.as_wire().clone(), b"k"),
            Err(RecordError::Expired)
        );
        let mut wire = expired.as_wire().clone();
        wire.expires_at = u64::MAX;
        assert_eq!(
            Record::verify(wire.clone(), b"k"),
            Err(RecordError::TooLongLived)
        );
        wire.publisher = vec![1; 36].into();
        wire.expires_at = millis(SystemTime::now() + HOUR);
        assert_eq!(Record::verify(wire, b"k"), Err(RecordError::Publisher));
    }
}
