//! Limits on the rate of content: of the node, and of each peer, in both directions.

use std::{collections::HashMap, sync::Mutex};

use weft_blobs::{rate::Limit, uplink::Uplink};
use weft_net::PeerId;

/// Peers whose limits are kept; beyond that, those that nobody uses are forgotten.
const MAX_PEERS: usize = 1024;

/// How fast content may come and go, in bytes a second; zero is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// From all peers.
    pub download: u64,
    /// To all peers.
    pub upload: u64,
    /// From one peer.
    pub download_per_peer: u64,
    /// To one peer.
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

    /// Changes them, for what is under way as well.
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

    /// The turns of those to whom content goes.
    pub(crate) fn uplink(&self) -> &Uplink {
        &self.uplink
    }

    /// What holds for content from `peer`.
    pub(crate) fn download_of(&self, peer: PeerId) -> [Limit; 2] {
        [self.download.clone(), self.of_peer(peer, false)]
    }

    /// What holds for content to `peer`.
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
