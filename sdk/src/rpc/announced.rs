//! Being found as a provider of a service: its name, its labels, and the record that states them.

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

/// Bytes of a service's name.
pub const MAX_NAME: usize = 256;

/// Labels of one announcement, and bytes of a label's name and of its value.
pub const MAX_LABELS: usize = 16;
pub(super) const MAX_LABEL: usize = 64;
const MAX_LABEL_VALUE: usize = 256;

/// What tells a service's offer from others of the same name: a model, its layers, the load.
pub type Labels = BTreeMap<String, String>;

/// A service that cannot be announced or looked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ServiceError {
    /// Its name is empty or too long.
    #[error("a service's name has 1 to {MAX_NAME} bytes, and this has {0}")]
    Name(usize),
    /// There are too many labels.
    #[error("a service has at most {MAX_LABELS} labels, and these are {0}")]
    TooManyLabels(usize),
    /// A label is too long, or has no name.
    #[error(
        "a label's name has 1 to {MAX_LABEL} bytes and its value at most {MAX_LABEL_VALUE}, and {0:?} is another"
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
    // A name may be longer than a key.
    let mut hasher = blake3::Hasher::new_derive_key("weft service v1");
    hasher.update(name.as_bytes());
    format!("service/{}", hasher.finalize()).into_bytes()
}

/// The record of a service that this node offers.
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

/// Makes this node be found as one that offers a service, without labels, for as long as it runs.
pub(super) fn announce_always(node: &Node, name: &str) -> Result<(), ServiceError> {
    check(name)?;
    let (id, value) = record(name, Arc::default());
    node.advertiser().register(id, value, Terms::PRESENCE);
    Ok(())
}

/// This node is found as one that offers a service, for as long as this is held.
#[derive(Debug, Clone)]
#[must_use = "what is dropped is announced no more"]
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
        let presence = node.advertiser().be_present(id, value, Terms::PRESENCE);
        Ok(Self {
            labels,
            presence: Arc::new(presence),
        })
    }

    /// States other labels from now on. Others know within twenty seconds.
    ///
    /// # Errors
    /// [`ServiceError`], and the labels stay as they are.
    pub fn set_labels(&self, labels: Labels) -> Result<(), ServiceError> {
        check_labels(&labels)?;
        let before = std::mem::replace(&mut *lock(&self.labels), labels);
        if before != *lock(&self.labels) {
            self.presence.renew();
        }
        Ok(())
    }
}
