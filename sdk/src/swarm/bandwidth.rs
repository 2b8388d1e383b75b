//! Limits on the rates of content, in both directions: of the node, and for each peer.

use std::{collections::HashMap, sync::Mutex};

use weft_blobs::{rate::Limit, uplink::Uplink};
use weft_net::PeerId;

/// The most peers whose limits are kept. Above this, unused ones are forgotten.
const MAX_PEERS: usize = 1024;

/// Limits on the rates of content, in bytes per second. Zero means no limit, which is the default. See
/// [`Node::set_rates`](crate::Node::set_rates).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Content received from all peers together.
    pub download: u64,
    /// Content sent to all peers together.
    pub upload: u64,
    /// Content received from one peer.
    pub download_per_peer: u64,
    /// Content sent to one peer.
    pub upload_per_peer: u64,
}

#[derive(Debug)]
pub(crate) struct Bandwidth {
    rates: Mutex<Rates>,
    download: Limit,
    upload: Limit,
    uplink: Uplink,
    of_peers: Mutex<HashMap<(PeerId, bool), Limit>>,
}

impl Bandwidth {
    pub(crate) fn new(rates: Rates) -> Self {
        Self {
            rates: Mutex::new(rates),
            download: Limit::new(rates.download),
            upload: Limit::new(rates.upload),
            uplink: Uplink::default(),
            of_peers: Mutex::default(),
        }
    }

    pub(crate) fn rates(&self) -> Rates {
        *self
            .rates
            .lock()
            .expect("nothing panics while holding the lock")
    }

    /// Changes the limits, also for transfers under way.
    pub(crate) fn set(&self, rates: Rates) {
        *self
            .rates
            .lock()
            .expect("nothing panics while holding the lock") = rates;
        self.download.set(rates.download);
        self.upload.set(rates.upload);
        let of_peers = self
            .of_peers
            .lock()
            .expect("nothing panics while holding the lock");
        for ((_, up), limit) in of_peers.iter() {
            limit.set(match up {
                true => rates.upload_per_peer,
                false => rates.download_per_peer,
            });
        }
    }

    /// Returns the turns of the peers to which content is sent.
    pub(crate) fn uplink(&self) -> &Uplink {
        &self.uplink
    }

    /// Returns the limits on content from `peer`.
    pub(crate) fn download_of(&self, peer: PeerId) -> [Limit; 2] {
        [self.download.clone(), self.of_peer(peer, false)]
    }

    /// Returns the limits on content to `peer`.
    pub(crate) fn upload_of(&self, peer: PeerId) -> [Limit; 2] {
        [self.upload.clone(), self.of_peer(peer, true)]
    }

    fn of_peer(&self, peer: PeerId, up: bool) -> Limit {
        let rates = self.rates();
        let mut of_peers = self
            .of_peers
            .lock()
            .expect("nothing panics while holding the lock");
        if of_peers.len() >= MAX_PEERS {
            of_peers.retain(|_, limit| limit.is_used());
        }
        let limit = of_peers.entry((peer, up)).or_insert_with(|| {
            Limit::new(match up {
                true => rates.upload_per_peer,
                false => rates.download_per_peer,
            })
        });
        limit.clone()
    }
}
