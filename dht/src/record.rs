//! A publisher's signed statement.

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

/// The longest a record may live from now on. What is still true must be said again.
pub const MAX_TTL: Duration = Duration::from_secs(48 * 3600);

/// The most by which a publisher's clock may be ahead of this node's: a machine without NTP is minutes off after some
/// weeks.
pub const MAX_SKEW: Duration = Duration::from_secs(600);

/// The first bytes of the protobuf encoding of an Ed25519 public key; the 32 bytes of the key follow.
const ED25519: [u8; 4] = [8, 1, 18, 32];

/// Size of the protobuf encoding of an Ed25519 public key, in bytes.
const PUBLISHER: usize = ED25519.len() + 32;

/// Size of an Ed25519 signature, in bytes.
const SIGNATURE: usize = 64;

/// The most bytes that one statement takes in a set. Beside the fields there are tags, lengths and numbers: 64 bytes
/// are more than these take.
pub(crate) const MAX_SIZE: usize = MAX_KEY + MAX_SUBKEY + MAX_VALUE + PUBLISHER + SIGNATURE + 64;

/// What the signature covers begins with this, so that it can be taken for nothing else.
const DOMAIN: &[u8] = b"weft record v1\0";

/// A statement whose signature has been checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    wire: wire::SignedRecord,
    publisher: PeerId,
}

/// Why a record is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A field is longer than allowed.
    #[error("the record's {field} has {size} bytes; the limit is {limit}")]
    TooLong {
        /// Which field.
        field: &'static str,
        /// Its size in bytes.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// It stands under no key.
    #[error("the record has no key")]
    NoKey,
    /// It is to live for less than a second.
    #[error("a record lives for one second at least, and 48 hours at most")]
    TooBrief,
    /// Its time is over.
    #[error("the record has expired")]
    Expired,
    /// It claims to live longer than allowed.
    #[error("the record claims to live longer than 48 hours")]
    TooLongLived,
    /// The publisher's key is not an Ed25519 key.
    #[error("the record's publisher is no Ed25519 key")]
    Publisher,
    /// The signature is wrong.
    #[error("the record's signature is wrong")]
    Signature,
    /// It is stored or returned under another key than its own.
    #[error("the record belongs to another key")]
    WrongKey,
    /// Signing failed.
    #[error("the record cannot be signed: {0}")]
    Sign(String),
    /// This machine's clock shows a time before 1970, in which no record can hold.
    #[error(
        "this machine's clock shows a year before 1970, so every record has expired; set the clock, then try again"
    )]
    Clock,
}

impl RecordError {
    /// Returns true if no node that follows the protocol sends such a statement, whatever its clock shows.
    pub(crate) fn is_offence(&self) -> bool {
        !matches!(self, Self::Expired | Self::TooLongLived)
    }
}

/// Now, in milliseconds since 1970; 0 if the clock shows an earlier time.
pub(crate) fn now() -> u64 {
    millis(SystemTime::now())
}

impl Record {
    /// Signs a statement that holds for `ttl` from now; without a value it takes back an earlier one.
    ///
    /// # Errors
    /// [`RecordError`] if a field or the time to live is over its limit.
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

    /// Signs a statement that holds for some time from a moment on.
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

    /// Checks what a stranger sent as being stored under `key`.
    ///
    /// # Errors
    /// [`RecordError`] with the first rule that is broken; the cheap ones are checked first.
    pub fn verify(wire: wire::SignedRecord, key: &[u8]) -> Result<Self, RecordError> {
        check_claims(&wire, key, now())?;
        Self::check_signature(wire)
    }

    /// Checks the signature only, which costs some fifty microseconds; the rest is for [`check_claims`].
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

    /// A statement that was checked here before, and has been on our own disk since: sizes are checked, signature and
    /// time are not.
    pub(crate) fn checked_before(wire: wire::SignedRecord) -> Result<Self, RecordError> {
        check_sizes(&wire)?;
        let public = PublicKey::try_decode_protobuf(&wire.publisher);
        let public = public.map_err(|_| RecordError::Publisher)?;
        Ok(Self {
            publisher: public.to_peer_id(),
            wire,
        })
    }

    /// Who states it.
    pub fn publisher(&self) -> PeerId {
        self.publisher
    }

    /// The key it stands under.
    pub fn key(&self) -> &[u8] {
        &self.wire.key
    }

    /// Which of the publisher's statements under the key.
    pub fn subkey(&self) -> &[u8] {
        &self.wire.subkey
    }

    /// What is stated; `None` if an earlier statement is taken back.
    pub fn value(&self) -> Option<&[u8]> {
        (!self.wire.removed).then_some(&self.wire.value)
    }

    /// Higher than that of the publisher's earlier statements under key and subkey.
    pub fn sequence(&self) -> u64 {
        self.wire.sequence
    }

    /// How long it still holds; zero once it has expired.
    pub fn remaining(&self) -> Duration {
        let until = UNIX_EPOCH + Duration::from_millis(self.wire.expires_at);
        until
            .duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO)
    }

    /// When it expires, in milliseconds since 1970.
    pub(crate) fn expires_at(&self) -> u64 {
        self.wire.expires_at
    }

    /// Returns true if the record belongs to `publisher` and has this subkey. The key is not compared.
    pub(crate) fn is_about(&self, publisher: &PeerId, subkey: &[u8]) -> bool {
        self.publisher == *publisher && self.wire.subkey == subkey
    }

    /// Whether this is to replace `other`, which is about the same thing. Equal sequences are ordered by signature, so that all nodes
    /// keep the same one.
    pub(crate) fn supersedes(&self, other: &Self) -> bool {
        (self.wire.sequence, &self.wire.signature) > (other.wire.sequence, &other.wire.signature)
    }

    /// Bytes it takes in a set: a tag and a length of at most three bytes, and the statement.
    pub(crate) fn size(&self) -> usize {
        size_of(&self.wire)
    }

    pub(crate) fn as_wire(&self) -> &wire::SignedRecord {
        &self.wire
    }
}

/// Bytes that a statement takes in a set.
pub(crate) fn size_of(wire: &wire::SignedRecord) -> usize {
    use prost::Message;
    wire.encoded_len() + 4
}

/// Checks everything of a statement but its signature: the sizes, the key under which it was sent, and its time.
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

/// Returns the peer that a statement names as its publisher; nothing is proven by that. `None` if it names no Ed25519
/// key.
pub(crate) fn claimed_publisher(wire: &wire::SignedRecord) -> Option<PeerId> {
    if wire.publisher.len() != PUBLISHER || !wire.publisher.starts_with(&ED25519) {
        return None;
    }
    // So short a key is its own hash: the multihash is "identity", a length, and the key.
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

/// The domain, then each field: variable ones behind their length, numbers little-endian.
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
        // Bytes moved from one field to the next.
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
