//! Watching the providers of a service.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use weft_net::PeerId;

use super::{
    announced::Labels,
    choice::{ConditionsNow, offer},
};
use crate::discovery::watch::{Change, Watcher};

/// A change of the providers of a service; see [`Service::watch`](super::Service::watch).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServiceChange {
    /// A peer offers the service now, or did when the watch began.
    Joined {
        /// The provider.
        peer: PeerId,
        /// Labels of its offer.
        labels: Labels,
    },
    /// A provider has changed the labels of its offer.
    Changed {
        /// The provider.
        peer: PeerId,
        /// The new labels.
        labels: Labels,
    },
    /// A peer no longer offers the service, or its new labels do not match the wanted ones.
    Left {
        /// The peer.
        peer: PeerId,
    },
}

/// Changes of the providers of a service; see [`Service::watch`](super::Service::watch). A watch does not keep its
/// node running.
#[derive(Debug)]
pub struct ServiceWatch {
    pub(super) watcher: Watcher,
    pub(super) own: PeerId,
    pub(super) wanted: Labels,
    pub(super) only: Option<Arc<BTreeSet<PeerId>>>,
    pub(super) trusted: Option<BTreeSet<PeerId>>,
    pub(super) known: HashMap<PeerId, Labels>,
}

impl ServiceWatch {
    /// Waits for the next change. Returns `None` once the node has stopped. Cancel safe: if the future is dropped, no
    /// change is lost.
    pub async fn next(&mut self) -> Option<ServiceChange> {
        loop {
            let change = self.watcher.next().await?;
            if let Some(change) = self.learn(change) {
                return Some(change);
            }
        }
    }

    fn learn(&mut self, change: Change) -> Option<ServiceChange> {
        let (peer, labels) = match change {
            Change::Joined(record) | Change::Changed(record) => {
                if !record.subkey().is_empty() {
                    return None;
                }
                let offer = record.value().and_then(offer);
                (record.publisher(), offer.map(|(labels, _)| labels))
            }
            Change::Left { publisher, subkey } if subkey.is_empty() => (publisher, None),
            Change::Left { .. } => return None,
        };
        let wanted = ConditionsNow {
            labels: &self.wanted,
            only: self.only.as_deref(),
            trusted: None,
        };
        let is_trusted = self.trusted.as_ref().is_none_or(|all| all.contains(&peer));
        let labels = labels.filter(|labels| is_trusted && wanted.fits(&peer, labels));
        if peer == self.own {
            return None;
        }
        let Some(labels) = labels else {
            self.known.remove(&peer)?;
            return Some(ServiceChange::Left { peer });
        };
        match self.known.insert(peer, labels.clone()) {
            None => Some(ServiceChange::Joined { peer, labels }),
            Some(before) if before != labels => Some(ServiceChange::Changed { peer, labels }),
            Some(_) => None,
        }
    }
}
