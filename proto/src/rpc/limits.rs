//! What a side takes, and says that it takes.

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

/// What everybody takes, before their `RpcHello` has come.
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

/// Bytes of an `RpcHello`, an `RpcRequest` without metadata, an `RpcStatus` and the like.
pub(super) const MAX_CONTROL: u64 = 16 * 1024;

/// Attachments of a message.
pub(super) const MAX_ATTACHMENTS: usize = 64;

/// Dimensions of an attachment.
pub(super) const MAX_RANK: usize = 16;

/// Bytes of a status's text and of its details; what is longer is cut, or left out.
pub(super) const MAX_TEXT: usize = 2048;
pub(super) const MAX_DETAILS: usize = 8192;

/// A frame of 64 KiB takes so long at 1.1 KB/s, the slowest that a transfer may be too; a message of any size takes an
/// hour at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// Callers end a session two to four minutes after its last call.
const IDLE: Duration = Duration::from_secs(300);

/// What a side takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a message, without attachments. At least 64 KiB.
    pub max_message: usize,
    /// Bytes of all attachments of a message together. At least 64 KiB.
    pub max_attachments: usize,
    /// Bytes of metadata, names and values together, and 64 for each. At least 4 KiB.
    pub max_metadata: usize,
    /// Calls that the other side may have open. At least 16.
    pub max_calls: usize,
    /// Bytes that the other side may send on a call before somebody has taken them. At least 128 KiB.
    pub window: u32,
    /// Bytes of all calls together that are held and nobody has taken. A call that would need more fails.
    pub max_buffered: usize,
    /// Time in which a message that has begun has to go on: a frame at least, and a 64th of what has come of it.
    /// Otherwise the call fails and what came is dropped, after twice this time at the latest. Time in which the sender
    /// has no credit does not count. A minute by default.
    pub patience: Duration,
    /// Time after which the called side ends a session on which no call is open and none was made. Rounded up to a
    /// multiple of `patience`. Five minutes by default.
    pub idle: Duration,
}

/// A share is this part of a [`Budget`]. It takes so many of those who are named to use it up.
const SHARES: usize = 8;

/// More than a share may be held by one while so many other shares are free: one alone may send the largest message,
/// and three others still have theirs.
const SPARE_SHARES: usize = 3;

/// Bytes that may be held, of one session or of several together. Cheap to clone; all clones are one.
///
/// Bytes that are taken [in somebody's name](Self::of) also count against the share of that name, an eighth of the
/// budget. More than a share is given only while three eighths of the budget are free after it.
#[derive(Debug, Clone)]
pub struct Budget {
    whole: Arc<Whole>,
    /// Those in whose name it is taken.
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

/// The number of times that bytes of a [`Budget`] were refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Because the whole was used up.
    pub whole: u64,
    /// Because a share was.
    pub share: u64,
}

/// Why bytes cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    /// So many are held in all.
    #[error("{0} bytes wait here to be taken, and no more may")]
    Whole(usize),
    /// So many are held in the name of one.
    #[error(
        "{0} bytes of this peer or its network wait here to be taken, and there is no room for more"
    )]
    Share(usize),
}

/// Takes bytes if the result fits.
fn add(used: &AtomicUsize, bytes: usize, fits: impl Fn(usize) -> bool) -> bool {
    let more = |used: usize| used.checked_add(bytes).filter(|used| fits(*used));
    let taken = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
    taken.is_ok()
}

impl Budget {
    /// So many bytes.
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

    /// The same budget, for one who is known by these names, such as a peer's and its network's. Whatever is taken in
    /// the same name, by anybody, has one share.
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

    /// Bytes held now.
    pub fn used(&self) -> usize {
        self.whole.used.load(Ordering::Relaxed)
    }

    /// The most bytes that are held now in one name.
    pub fn used_by_one(&self) -> usize {
        let shares = lock(&self.whole.shares);
        let shares = shares.values().filter_map(Weak::upgrade);
        let used = shares.map(|share| share.used.load(Ordering::Relaxed));
        used.max().unwrap_or_default()
    }

    /// Bytes of a share.
    pub fn share(&self) -> usize {
        self.whole.most / SHARES
    }

    /// How often a call has failed because there were none left.
    pub fn refused(&self) -> Refused {
        Refused {
            whole: self.whole.refused.load(Ordering::Relaxed),
            share: self.whole.refused_shares.load(Ordering::Relaxed),
        }
    }

    /// Bytes that may be held.
    pub fn size(&self) -> usize {
        self.whole.most
    }

    /// Holds so many bytes until what this returns is dropped; `None` if there are not so many left.
    pub fn hold(&self, bytes: usize) -> Option<Held> {
        let held = || Held {
            budget: self.clone(),
            bytes,
        };
        self.take(bytes).is_ok().then(held)
    }

    /// Takes so many, if there are so many left.
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

/// Bytes of a [`Budget`], given back when dropped.
#[derive(Debug)]
#[must_use = "what is dropped is given back"]
pub struct Held {
    budget: Budget,
    bytes: usize,
}

impl Held {
    /// Number of bytes.
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

    pub(super) fn of(hello: &RpcHello) -> Self {
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
        // Alone it may have more than a share, but three shares are left.
        one.take(500).unwrap();
        assert_eq!(one.take(1), Err(Full::Share(100)));
        // The same name elsewhere is the same share.
        assert_eq!(named(&all, &["mallory"]).take(1), Err(Full::Share(100)));
        assert_eq!(
            named(&all, &["other", "192.0.2"]).take(1),
            Err(Full::Share(100))
        );
        for name in ["a", "b", "c"] {
            let other = named(&all, &[name]);
            other.take(100).unwrap();
            assert!(other.take(1).is_err());
            // It stays counted though nobody has the name's budget any more.
        }
        assert_eq!(named(&all, &["d"]).take(1), Err(Full::Whole(800)));
        let refused = all.refused();
        // The last of the three names met the whole, and so did "d".
        assert_eq!((all.used(), refused.whole, refused.share), (800, 2, 5));
    }

    #[test]
    fn what_is_refused_takes_nothing_and_what_is_given_back_counts_no_more() {
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
