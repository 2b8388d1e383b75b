//! Turns and priorities: one fetch of a model runs at a time, and transfers of high priority go first.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex as AsyncMutex, Notify, OwnedMutexGuard},
    time::Instant,
};

use crate::Hash;

/// Time without content after which a transfer no longer holds back those of lower priority.
const ACTIVE_TIME: Duration = Duration::from_secs(2);

/// The priority of a transfer among the transfers of a node. While content arrives for a transfer, those of lower
/// priority request none.
///
/// It is parsed from `low`, `normal` and `high`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// After all others.
    Low,
    /// The default of a fetch.
    #[default]
    Normal,
    /// Before all others. Readers have this priority.
    High,
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        })
    }
}

/// The error of parsing a priority.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a priority; choose low, normal or high")]
pub struct ParsePriorityError(String);

impl FromStr for Priority {
    type Err = ParsePriorityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "low" => Ok(Self::Low),
            "normal" => Ok(Self::Normal),
            "high" => Ok(Self::High),
            _ => Err(ParsePriorityError(text.chars().take(40).collect())),
        }
    }
}

/// The turns to fetch models: one for each model.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<Hash, Weak<Queue>>>);

#[derive(Debug, Default)]
struct Queue {
    turn: Arc<AsyncMutex<()>>,
    waiting: AtomicUsize,
    came: Notify,
}

/// The turn to fetch a model, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    queue: Arc<Queue>,
    _held: OwnedMutexGuard<()>,
}

impl Turns {
    fn queue(&self, model: Hash) -> Arc<Queue> {
        let mut queues = self
            .0
            .lock()
            .expect("nothing panics while holding the lock");
        queues.retain(|_, queue| queue.strong_count() > 0);
        if let Some(queue) = queues.get(&model).and_then(Weak::upgrade) {
            return queue;
        }
        let queue = Arc::default();
        queues.insert(model, Arc::downgrade(&queue));
        queue
    }

    /// Takes the turn of `model`, if it is free.
    pub(crate) fn try_take(&self, model: Hash) -> Option<Turn> {
        let queue = self.queue(model);
        let held = Arc::clone(&queue.turn).try_lock_owned().ok()?;
        Some(Turn { queue, _held: held })
    }

    /// Waits for the turn of `model`. If `pressing` is true, the present holder is told, so that it can give way.
    pub(crate) async fn take(&self, model: Hash, pressing: bool) -> Turn {
        let queue = self.queue(model);
        let _waiting = pressing.then(|| {
            queue.waiting.fetch_add(1, Ordering::AcqRel);
            queue.came.notify_waiters();
            Waiting(&queue)
        });
        let held = Arc::clone(&queue.turn).lock_owned().await;
        drop(_waiting);
        Turn { queue, _held: held }
    }
}

struct Waiting<'a>(&'a Queue);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Turn {
    /// Waits until a pressing caller waits for this turn.
    pub(crate) async fn is_wanted(&self) {
        loop {
            let came = self.queue.came.notified();
            tokio::pin!(came);
            came.as_mut().enable();
            if self.queue.waiting.load(Ordering::Acquire) > 0 {
                return;
            }
            came.await;
        }
    }
}

/// The transfers of a node, with their priorities. Cheap to clone; all clones share their state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranks(Arc<Mutex<RanksState>>);

#[derive(Debug, Default)]
struct RanksState {
    next: u64,
    ranks: BTreeMap<u64, (Priority, Option<Instant>)>,
}

/// A transfer's entry among the others, until it is dropped.
#[derive(Debug)]
pub(crate) struct Rank {
    ranks: Ranks,
    number: u64,
    priority: Priority,
}

impl Ranks {
    pub(crate) fn join(&self, priority: Priority) -> Rank {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.ranks.insert(number, (priority, None));
        drop(state);
        Rank {
            ranks: self.clone(),
            number,
            priority,
        }
    }

    fn state(&self) -> MutexGuard<'_, RanksState> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

impl Rank {
    /// Notes that content has arrived.
    pub(crate) fn note(&self) {
        if let Some((_, moved)) = self.ranks.state().ranks.get_mut(&self.number) {
            *moved = Some(Instant::now());
        }
    }

    /// Returns true if content arrives for a transfer of higher priority.
    pub(crate) fn is_outranked(&self) -> bool {
        let state = self.ranks.state();
        state.ranks.values().any(|(priority, moved)| {
            *priority > self.priority && moved.is_some_and(|moved| moved.elapsed() < ACTIVE_TIME)
        })
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.ranks.state().ranks.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_transfer_is_held_back_while_content_comes_for_one_of_higher_priority() {
        let ranks = Ranks::default();
        let low = ranks.join(Priority::Low);
        let normal = ranks.join(Priority::Normal);
        assert!(!low.is_outranked());
        normal.note();
        assert!(low.is_outranked());
        assert!(!normal.is_outranked());
        low.note();
        assert!(!normal.is_outranked());
        tokio::time::advance(ACTIVE_TIME).await;
        assert!(!low.is_outranked());
        normal.note();
        drop(normal);
        assert!(!low.is_outranked());
    }

    #[tokio::test]
    async fn the_holder_of_a_turn_is_told_of_a_pressing_caller() {
        let turns = Arc::new(Turns::default());
        let model = Hash::of(b"");
        let held = turns.try_take(model).unwrap();
        assert!(turns.try_take(model).is_none());
        let pressing = tokio::spawn({
            let turns = Arc::clone(&turns);
            async move { turns.take(model, true).await }
        });
        held.is_wanted().await;
        drop(held);
        drop(pressing.await.unwrap());
        assert!(turns.try_take(model).is_some());
    }
}
