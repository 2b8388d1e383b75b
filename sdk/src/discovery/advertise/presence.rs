//! Records that are published for as long as something lasts, such as a subscription to a topic or a service that
//! this node offers.

use std::time::Duration;

use super::{Advertiser, AtStop, Rank, RecordId, Terms, schedule::Token};

impl Terms {
    /// Terms of services and topics. Peers try a publisher that has crashed for ten minutes at most.
    pub(crate) const PRESENCE: Self = Self {
        ttl: Duration::from_secs(10 * 60),
        rank: Rank::Presence,
        has_addresses: true,
        at_stop: AtStop::Withdraw,
    };
}

/// Keeps a record published. Dropping it withdraws the record, unless there is another registration of it.
#[derive(Debug)]
pub(crate) struct Presence {
    advertiser: Advertiser,
    id: RecordId,
    token: Token,
}

impl Presence {
    pub(super) fn new(advertiser: Advertiser, id: RecordId, token: Token) -> Self {
        Self {
            advertiser,
            id,
            token,
        }
    }

    /// Publishes the record again within a few seconds, because its value has changed.
    pub(crate) fn renew(&self) {
        self.advertiser.renew(self.id.clone());
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.advertiser.end(self.id.clone(), self.token);
    }
}
