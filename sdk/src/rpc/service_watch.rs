//! Watching which peers offer a service.

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

/// What has changed of who offers a service.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServiceChange {
    /// Offers it now, or did so when the watch began.
    Joined {
        /// Who.
        peer: PeerId,
        /// What it says of its offer.
        labels: Labels,
    },
    /// Says something else of its offer.
    Changed {
        /// Who.
        peer: PeerId,
        /// What it says now.
        labels: Labels,
    },
    /// Offers it no more, or states other labels than those that are wanted.
    Left {
        /// Who.
        peer: PeerId,
    },
}

/// The changes of who offers a service; [`Service::watch`](super::Service::watch). Keeps no node from stopping.
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
    /// The next change; `None` once the node has stopped. May be dropped and called again.
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
