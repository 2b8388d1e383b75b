//! Being found under a key of the DHT for as long as something lasts: a topic that this node takes part in, a service
//! that it offers.

use std::time::Duration;

use super::{Advertiser, AtStop, Rank, RecordId, Terms, book::Token};

impl Terms {
    /// The terms of services and topics. A publisher that has crashed is looked for in vain for ten minutes at most.
    pub(crate) const PRESENCE: Self = Self {
        ttl: Duration::from_secs(10 * 60),
        rank: Rank::Presence,
        has_addresses: true,
        at_stop: AtStop::Withdraw,
    };
}

/// Keeps a record stated. Dropping it withdraws the record, unless another one keeps it.
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

    /// States the record again within a few seconds, because its value has changed.
    pub(crate) fn renew(&self) {
        self.advertiser.renew(self.id.clone());
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.advertiser.end(self.id.clone(), self.token);
    }
}
