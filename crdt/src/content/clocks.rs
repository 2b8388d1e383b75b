//! Decides whether one change is an ancestor of another, without a walk over all concurrent changes.
//!
//! The changes of an actor build on each other, which the guard enforces. A clock therefore identifies the ancestors of
//! a change: it says how many changes of each actor are among them. The clock of a change follows from those of its
//! dependencies. Clocks are kept for the most recent dependencies. They are determined by hashes and thus never out of
//! date.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use automerge::{ActorId, ChangeHash};

use crate::content::batch::View;

/// Most entries of all clocks that are kept for a document: about 5 MB. Two branches of any length need one clock each.
/// A document with 4,096 active sessions has room for 16 clocks, and walks its history again for the others.
const MAX_ENTRIES: usize = 65_536;

/// For each actor, the number of its first changes that are ancestors.
#[derive(Debug, Clone, Default)]
pub(crate) struct Clock(HashMap<ActorId, u64>);

impl Clock {
    fn add(&mut self, actor: &ActorId, seq: u64) {
        match self.0.get_mut(actor) {
            Some(known) => *known = seq.max(*known),
            None => _ = self.0.insert(actor.clone(), seq),
        }
    }

    fn merge(&mut self, other: &Self) {
        for (actor, seq) in &other.0 {
            self.add(actor, *seq);
        }
    }

    /// Returns true if a change of the document is an ancestor; false if it is not in the document.
    pub(crate) fn has(&self, view: &View<'_>, change: &ChangeHash) -> bool {
        view.node(change)
            .is_some_and(|node| self.0.get(&node.actor).is_some_and(|seq| *seq >= node.seq))
    }
}

/// The clocks that are kept.
#[derive(Debug, Clone)]
pub(crate) struct Clocks {
    /// Clocks that include the change itself.
    kept: HashMap<ChangeHash, Arc<Clock>>,
    turns: VecDeque<ChangeHash>,
    entries: usize,
    max_entries: usize,
}

impl Default for Clocks {
    fn default() -> Self {
        Self {
            kept: HashMap::new(),
            turns: VecDeque::new(),
            entries: 0,
            max_entries: MAX_ENTRIES,
        }
    }
}

impl Clocks {
    /// Returns the clock of a change with these dependencies, without the change itself.
    pub(crate) fn of(&mut self, view: &View<'_>, deps: &[ChangeHash]) -> Arc<Clock> {
        match deps {
            [one] => self.with(view, one),
            deps => {
                let mut clock = Clock::default();
                for dep in deps {
                    clock.merge(&self.with(view, dep));
                }
                Arc::new(clock)
            }
        }
    }

    /// Returns the clock of a change of the document, including the change itself.
    fn with(&mut self, view: &View<'_>, change: &ChangeHash) -> Arc<Clock> {
        if let Some(clock) = self.kept.get(change) {
            return Arc::clone(clock);
        }
        let mut clock = Clock::default();
        // Walk back to the changes whose clocks are kept: one step, if the clock of the previous change was computed.
        let (mut open, mut seen) = (vec![*change], HashSet::new());
        while let Some(change) = open.pop() {
            if let Some(known) = self.kept.get(&change) {
                clock.merge(known);
            } else if seen.insert(change)
                && let Some(node) = view.node(&change)
            {
                clock.add(&node.actor, node.seq);
                open.extend(node.deps);
            }
        }
        let clock = Arc::new(clock);
        self.keep(*change, Arc::clone(&clock));
        clock
    }

    fn keep(&mut self, change: ChangeHash, clock: Arc<Clock>) {
        self.entries += clock.0.len();
        self.kept.insert(change, clock);
        self.turns.push_back(change);
        while self.entries > self.max_entries
            && let Some(oldest) = self.turns.pop_front()
        {
            let clock = self.kept.remove(&oldest);
            self.entries -= clock.map_or(0, |clock| clock.0.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use automerge::{Automerge, ROOT, transaction::Transactable};

    use super::*;
    use crate::content::batch::Batch;

    #[test]
    fn a_clock_identifies_the_same_ancestors_as_a_walk_over_the_graph() {
        for seed in 0..30 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut docs: Vec<Automerge> = (0..5)
                .map(|actor| Automerge::new().with_actor(ActorId::from([actor; 16])))
                .collect();
            let mut heads = Vec::new();
            for step in 0..60 {
                let at = random.usize(..docs.len());
                if random.u8(..3) == 0 {
                    let mut other = docs[random.usize(..5)].clone();
                    docs[at].merge(&mut other).unwrap();
                }
                let mut tx = docs[at].transaction();
                tx.put(ROOT, "key", step).unwrap();
                tx.commit();
                heads.push(docs[at].get_heads());
            }
            let mut all = Automerge::new();
            for doc in &mut docs {
                all.merge(doc).unwrap();
            }
            let changes: Vec<_> = all
                .get_changes_meta(&[])
                .iter()
                .map(|meta| meta.hash)
                .collect();
            let view = View {
                doc: &all,
                batch: &Batch::default(),
            };
            let mut clocks = Clocks {
                max_entries: [0, 8, 40, MAX_ENTRIES][seed as usize % 4],
                ..Clocks::default()
            };
            for deps in heads {
                let others: BTreeSet<_> = all
                    .get_changes_meta(&deps)
                    .iter()
                    .map(|meta| meta.hash)
                    .collect();
                let clock = clocks.of(&view, &deps);
                for change in &changes {
                    assert_eq!(clock.has(&view, change), !others.contains(change), "{seed}");
                }
                assert!(clocks.entries <= clocks.max_entries);
                assert_eq!(clocks.kept.len(), clocks.turns.len());
            }
        }
    }
}
