//! Announcing a service that this node offers: its name, its labels, and the record in the DHT.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use prost::Message;
use weft_proto::wire;

use super::services::lock;
use crate::{
    Node,
    discovery::advertise::{Presence, RecordId, Terms, Value},
};

/// Longest name of a service, in bytes.
pub const MAX_NAME: usize = 256;

/// The most labels of one announcement. A label's name has 1 to 64 bytes, and its value at most 256.
pub const MAX_LABELS: usize = 16;
pub(super) const MAX_LABEL: usize = 64;
const MAX_LABEL_VALUE: usize = 256;

/// Labels that describe a service's offer, such as a model, its layers or the load. They tell offers of the same name
/// apart.
pub type Labels = BTreeMap<String, String>;

/// The error of a service name or labels that break a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// The name is empty or too long. Holds its length in bytes.
    #[error("the name of a service has 1 to {MAX_NAME} bytes; this name has {0}")]
    Name(usize),
    /// There are too many labels. Holds their number.
    #[error("a service has at most {MAX_LABELS} labels; {0} were given")]
    TooManyLabels(usize),
    /// A label's name is empty or too long, or its value is too long. Holds the label's name.
    #[error(
        "label {0:?} breaks a limit: its name may have 1 to {MAX_LABEL} bytes and its value at most {MAX_LABEL_VALUE}"
    )]
    Label(String),
}

pub(super) fn check(name: &str) -> Result<(), ServiceError> {
    match name.len() {
        1..=MAX_NAME => Ok(()),
        length => Err(ServiceError::Name(length)),
    }
}

pub(super) fn check_labels(labels: &Labels) -> Result<(), ServiceError> {
    if labels.len() > MAX_LABELS {
        return Err(ServiceError::TooManyLabels(labels.len()));
    }
    let fits = |(name, value): &(&String, &String)| {
        (1..=MAX_LABEL).contains(&name.len()) && value.len() <= MAX_LABEL_VALUE
    };
    match labels.iter().find(|label| !fits(label)) {
        Some((name, _)) => {
            let shown = name.chars().take(MAX_LABEL).collect();
            Err(ServiceError::Label(shown))
        }
        None => Ok(()),
    }
}

pub(super) fn key(name: &str) -> Vec<u8> {
    // The name is hashed because it may be longer than a key.
    let mut hasher = blake3::Hasher::new_derive_key("weft service v1");
    hasher.update(name.as_bytes());
    format!("service/{}", hasher.finalize()).into_bytes()
}

/// Returns the record of a service that this node offers.
fn record(name: &str, labels: Arc<Mutex<Labels>>) -> (RecordId, Value) {
    let value = move |addresses: Vec<Bytes>| {
        let labels = lock(&labels);
        let labels = labels.iter().map(|(name, value)| wire::Label {
            name: name.clone(),
            value: value.clone(),
        });
        let labels = labels.collect();
        wire::ServiceClaim { addresses, labels }.encode_to_vec()
    };
    (RecordId::of(key(name)), Value::of(value))
}

/// Announces a service, without labels, for as long as the node runs.
pub(super) fn announce_always(node: &Node, name: &str) -> Result<(), ServiceError> {
    check(name)?;
    let (id, value) = record(name, Arc::default());
    node.advertiser().register(id, value, Terms::PRESENCE);
    Ok(())
}

/// The announcement of a service, in effect until its last clone is dropped; returned by
/// [`Rpc::announce`](super::Rpc::announce).
#[derive(Debug, Clone)]
#[must_use = "dropping it ends the announcement"]
pub struct Announced {
    labels: Arc<Mutex<Labels>>,
    presence: Arc<Presence>,
}

impl Announced {
    pub(super) fn new(node: &Node, name: &str, labels: Labels) -> Result<Self, ServiceError> {
        check(name)?;
        check_labels(&labels)?;
        let labels = Arc::new(Mutex::new(labels));
        let (id, value) = record(name, Arc::clone(&labels));
        let presence = node
            .advertiser()
            .register_while_held(id, value, Terms::PRESENCE);
        Ok(Self {
            labels,
            presence: Arc::new(presence),
        })
    }

    /// Replaces the labels. Other nodes know them within twenty seconds.
    ///
    /// # Errors
    /// [`ServiceError`] if the new labels break a limit. Then the labels stay as they are.
    pub fn set_labels(&self, labels: Labels) -> Result<(), ServiceError> {
        check_labels(&labels)?;
        let before = std::mem::replace(&mut *lock(&self.labels), labels);
        if before != *lock(&self.labels) {
            self.presence.renew();
        }
        Ok(())
    }
}
