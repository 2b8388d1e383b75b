//! Limits of a session, and budgets of memory for several sessions.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{frame::VERSION, session::lock};
use crate::wire::RpcHello;

/// The limits that every side accepts at least. They hold until the other side's `RpcHello` has arrived.
pub(super) const LEAST: Limits = Limits {
    max_message: 64 * 1024,
    max_attachments: 64 * 1024,
    max_metadata: 4096,
    max_calls: 16,
    window: 128 * 1024,
    max_buffered: usize::MAX,
    patience: PATIENCE,
    idle: IDLE,
};

/// Largest control message, in bytes: an `RpcHello`, an `RpcRequest` without metadata, an `RpcStatus` and so on.
pub(super) const MAX_CONTROL: u64 = 16 * 1024;

/// Most attachments of a message.
pub(super) const MAX_ATTACHMENTS: usize = 64;

/// Most dimensions of an attachment.
pub(super) const MAX_RANK: usize = 16;

/// Largest text and details of a status, in bytes. A longer text is truncated; longer details are left out.
pub(super) const MAX_TEXT: usize = 2048;
pub(super) const MAX_DETAILS: usize = 8192;

/// The default of [`Limits::patience`]. A frame of 64 KiB takes this long at 1.1 KB/s, which is also the slowest rate
/// of a transfer. A message of any size takes an hour at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// The default of [`Limits::idle`]. Callers end a session two to four minutes after its last call, so they end it
/// first.
const IDLE: Duration = Duration::from_secs(300);

/// The limits of one side of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest message in bytes, without attachments. At least 64 KiB.
    pub max_message: usize,
    /// Largest total size of the attachments of a message, in bytes. At least 64 KiB.
    pub max_attachments: usize,
    /// Largest metadata of a call in bytes: names, values and 64 bytes for each entry. At least 4 KiB.
    pub max_metadata: usize,
    /// Most calls that the other side may have open. At least 16.
    pub max_calls: usize,
    /// Most bytes that the other side may send on a call before they are read. At least 128 KiB.
    pub window: u32,
    /// Most unread bytes of all calls of the session together. A call that needs more fails.
    pub max_buffered: usize,
    /// Time in which an incomplete message must make progress: at least one frame, and a 64th of its received bytes.
    /// Otherwise the call fails and the received part is dropped, after twice this time at the latest. Time in which
    /// the sender has no credit does not count. One minute by default.
    pub patience: Duration,
    /// Time without calls after which the called side ends the session. Rounded up to a multiple of `patience`. Five
    /// minutes by default.
    pub idle: Duration,
}

/// Number of shares in a [`Budget`]. A budget is used up only by at least this many names, if each holds one share.
const SHARES: usize = 8;

/// Number of shares that must stay free when a name holds more than one share. So a single name can hold the largest
/// message, and three other names still have their shares.
const SPARE_SHARES: usize = 3;

/// A limit on the bytes that one session, or several sessions together, may hold. Clones share the limit.
///
/// Bytes that are held [under a name](Self::of) also count towards the share of that name, an eighth of the budget. A
/// name may hold more than its share only while three eighths of the budget stay free.
#[derive(Debug, Clone)]
pub struct Budget {
    whole: Arc<Whole>,
    /// The shares of the names under which bytes are held.
    shares: Arc<[Arc<Share>]>,
}

#[derive(Debug)]
struct Whole {
    used: AtomicUsize,
    most: usize,
    refused: AtomicU64,
    refused_shares: AtomicU64,
    shares: Mutex<HashMap<String, Weak<Share>>>,
}

#[derive(Debug, Default)]
struct Share {
    used: AtomicUsize,
}

/// Number of refusals of a [`Budget`], by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Refusals because the whole budget was used up.
    pub whole: u64,
    /// Refusals because the share of a name was used up.
    pub share: u64,
}

/// The reason why bytes cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    /// The whole budget, of this many bytes, is used up.
    #[error("the limit of {0} unread bytes for all calls is reached")]
    Whole(usize),
    /// The share of a name, of this many bytes, is used up.
    #[error("the limit of {0} unread bytes for this peer or its network group is reached")]
    Share(usize),
}

/// Adds bytes to a counter if the sum fits. Returns true if it did.
fn add(used: &AtomicUsize, bytes: usize, fits: impl Fn(usize) -> bool) -> bool {
    let more = |used: usize| used.checked_add(bytes).filter(|used| fits(*used));
    let taken = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
    taken.is_ok()
}

impl Budget {
    /// Creates a budget of `bytes` bytes.
    pub fn new(bytes: usize) -> Self {
        let whole = Whole {
            used: AtomicUsize::new(0),
            most: bytes,
            refused: AtomicU64::new(0),
            refused_shares: AtomicU64::new(0),
            shares: Mutex::default(),
        };
        Self {
            whole: Arc::new(whole),
            shares: Arc::new([]),
        }
    }

    /// Returns this budget for a user with these names, such as those of a peer and of its network group. All bytes
    /// held under the same name count towards one share.
    #[must_use]
    pub fn of(&self, names: impl IntoIterator<Item = String>) -> Self {
        let mut known = lock(&self.whole.shares);
        known.retain(|_, share| share.strong_count() > 0);
        let shares = names.into_iter().map(|name| {
            let share = known.entry(name).or_default();
            share.upgrade().unwrap_or_else(|| {
                let new = Arc::new(Share::default());
                *share = Arc::downgrade(&new);
                new
            })
        });
        let shares = shares.collect();
        drop(known);
        Self {
            whole: Arc::clone(&self.whole),
            shares,
        }
    }

    /// Returns the number of bytes held now.
    pub fn used(&self) -> usize {
        self.whole.used.load(Ordering::Relaxed)
    }

    /// Returns the most bytes held now under one name.
    pub fn used_by_one(&self) -> usize {
        let shares = lock(&self.whole.shares);
        let shares = shares.values().filter_map(Weak::upgrade);
        let used = shares.map(|share| share.used.load(Ordering::Relaxed));
        used.max().unwrap_or_default()
    }

    /// Returns the size of a share, in bytes.
    pub fn share(&self) -> usize {
        self.whole.most / SHARES
    }

    /// Returns the number of refusals so far.
    pub fn refused(&self) -> Refused {
        Refused {
            whole: self.whole.refused.load(Ordering::Relaxed),
            share: self.whole.refused_shares.load(Ordering::Relaxed),
        }
    }

    /// Returns the size of the budget, in bytes.
    pub fn size(&self) -> usize {
        self.whole.most
    }

    /// Holds bytes until the returned value is dropped. Returns `None` if not enough are left.
    pub fn hold(&self, bytes: usize) -> Option<Held> {
        let held = || Held {
            budget: self.clone(),
            bytes,
        };
        self.take(bytes).is_ok().then(held)
    }

    /// Takes bytes, to be returned with [`give`](Self::give). Counts a refusal.
    pub(super) fn take(&self, bytes: usize) -> Result<(), Full> {
        let taken = self.try_take(bytes);
        match taken {
            Ok(()) => {}
            Err(Full::Whole(_)) => drop(self.whole.refused.fetch_add(1, Ordering::Relaxed)),
            Err(Full::Share(_)) => drop(self.whole.refused_shares.fetch_add(1, Ordering::Relaxed)),
        }
        taken
    }

    fn try_take(&self, bytes: usize) -> Result<(), Full> {
        let (whole, share) = (&*self.whole, self.share());
        if !add(&whole.used, bytes, |used| used <= whole.most) {
            return Err(Full::Whole(whole.most));
        }
        let free = whole.most - whole.used.load(Ordering::Acquire).min(whole.most);
        let is_roomy = free >= share * SPARE_SHARES;
        for (n, one) in self.shares.iter().enumerate() {
            if !add(&one.used, bytes, |used| used <= share || is_roomy) {
                let taken = &self.shares[..n];
                let counts = taken.iter().map(|one| &one.used).chain([&whole.used]);
                for used in counts {
                    used.fetch_sub(bytes, Ordering::AcqRel);
                }
                return Err(Full::Share(share));
            }
        }
        Ok(())
    }

    pub(super) fn give(&self, bytes: usize) {
        let shares = self.shares.iter().map(|one| &one.used);
        for used in shares.chain([&self.whole.used]) {
            used.fetch_sub(bytes, Ordering::AcqRel);
        }
    }
}

/// Bytes held in a [`Budget`]. Dropping it returns them.
#[derive(Debug)]
#[must_use = "dropping it returns the bytes"]
pub struct Held {
    budget: Budget,
    bytes: usize,
}

impl Held {
    /// Returns the number of bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.give(self.bytes);
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_attachments: 256 << 20,
            max_metadata: 16 * 1024,
            max_calls: 1024,
            window: 4 << 20,
            max_buffered: 512 << 20,
            patience: PATIENCE,
            idle: IDLE,
        }
    }
}

impl Limits {
    pub(super) fn at_least(self) -> Self {
        Self {
            max_message: self.max_message.max(LEAST.max_message),
            max_attachments: self.max_attachments.max(LEAST.max_attachments),
            max_metadata: self.max_metadata.max(LEAST.max_metadata),
            max_calls: self.max_calls.clamp(LEAST.max_calls, 1 << 20),
            window: self.window.max(LEAST.window),
            max_buffered: self.max_buffered,
            patience: self.patience.max(Duration::from_millis(1)),
            idle: self.idle,
        }
    }

    pub(super) fn hello(&self) -> RpcHello {
        RpcHello {
            versions: vec![VERSION],
            max_message: self.max_message as u64,
            max_attachments: self.max_attachments as u64,
            max_metadata: self.max_metadata as u64,
            max_calls: self.max_calls as u32,
            window: self.window,
        }
    }

    pub(super) fn from_hello(hello: &RpcHello) -> Self {
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        Self {
            max_message: size(hello.max_message),
            max_attachments: size(hello.max_attachments),
            max_metadata: size(hello.max_metadata),
            max_calls: hello.max_calls as usize,
            window: hello.window,
            max_buffered: usize::MAX,
            patience: PATIENCE,
            idle: IDLE,
        }
        .at_least()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(budget: &Budget, names: &[&str]) -> Budget {
        budget.of(names.iter().map(|&name| name.to_owned()))
    }

    #[test]
    fn one_name_never_uses_up_a_budget() {
        let all = Budget::new(800);
        let one = named(&all, &["mallory", "192.0.2"]);
        // A single name may hold more than a share, but three shares stay free.
        one.take(500).unwrap();
        assert_eq!(one.take(1), Err(Full::Share(100)));
        // Another user of the same name has the same share.
        assert_eq!(named(&all, &["mallory"]).take(1), Err(Full::Share(100)));
        assert_eq!(
            named(&all, &["other", "192.0.2"]).take(1),
            Err(Full::Share(100))
        );
        for name in ["a", "b", "c"] {
            let other = named(&all, &[name]);
            other.take(100).unwrap();
            assert!(other.take(1).is_err());
            // The bytes stay counted although the name's budget is dropped.
        }
        assert_eq!(named(&all, &["d"]).take(1), Err(Full::Whole(800)));
        let refused = all.refused();
        // The last of the three names, and "d", were refused by the whole budget.
        assert_eq!((all.used(), refused.whole, refused.share), (800, 2, 5));
    }

    #[test]
    fn refused_bytes_take_nothing_and_returned_bytes_no_longer_count() {
        let all = Budget::new(800);
        let one = named(&all, &["peer", "network"]);
        let held = one.hold(90).unwrap();
        let neighbour = named(&all, &["neighbour", "network"]);
        let most = all.hold(500).unwrap();
        assert!(neighbour.hold(20).is_none());
        assert_eq!((all.used(), all.used_by_one()), (590, 90));
        drop(held);
        assert_eq!(neighbour.hold(20).map(|held| held.bytes()), Some(20));
        drop(most);
        assert_eq!((all.used(), all.used_by_one()), (0, 0));
        drop((one, neighbour));
        let _ = named(&all, &[]);
        assert!(lock(&all.whole.shares).is_empty());
    }
}
