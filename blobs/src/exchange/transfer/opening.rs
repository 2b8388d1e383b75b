//! Opens part files in the order of the wants, as many as may be open.

use std::sync::{Arc, atomic::Ordering};

use tokio::task::spawn_blocking;

use super::shared::{Open, Shared, State};
use crate::{StoreError, bitfield::Bitfield, files, plan::Want, store::partial::Partial};

/// A want that is being opened.
struct Turn {
    /// Index of the blob.
    place: usize,
    want: Want,
    /// The part file of an earlier want of the same blob, if it is still open.
    left: Option<Arc<Partial>>,
}

/// Opens part files, as many as may be open.
pub(super) async fn open_some(shared: &Arc<Shared>) -> Result<(), StoreError> {
    if !shared.state().has_room() {
        return Ok(());
    }
    let shared = Arc::clone(shared);
    spawn_blocking(move || {
        while let Some(turn) = shared.next_want() {
            if !shared.open_want(turn)? {
                break;
            }
        }
        Ok(())
    })
    .await
    .expect("opening a part file does not panic")
}

impl State {
    /// Ends the opening of a want, and adds the groups that became urgent meanwhile.
    fn end_opening(&mut self, want: &mut Want) {
        if let (Some((_, more)), Some(groups)) = (self.opening.take(), &mut want.groups) {
            groups.extend(&more);
        }
    }
}

impl Shared {
    /// Takes the next want, if another part file may be opened.
    fn next_want(&self) -> Option<Turn> {
        let mut state = self.state();
        if !state.has_room() {
            return None;
        }
        let (place, want) = state.wants.pop_front()?;
        state.opening = Some((place, Bitfield::empty(want.tree.groups())));
        let left = state.parts.get(&place);
        let left = left.and_then(|(_, left)| left.upgrade());
        let left = left.filter(|left| left.target() == want.target && !left.is_finished());
        Some(Turn { place, want, left })
    }

    /// Opens the part file of a want, or puts the want back. Returns true if more may be opened now. Blocks.
    fn open_want(&self, turn: Turn) -> Result<bool, StoreError> {
        let Turn {
            place,
            mut want,
            left,
        } = turn;
        let opened = match left {
            Some(left) => Ok(Some(left)),
            None => self.open_part(&want),
        };
        match opened {
            Ok(Some(partial)) => {
                self.opened(place, want, partial);
                Ok(true)
            }
            Ok(None) => {
                self.mark_complete(place, &want);
                Ok(true)
            }
            // Another transfer fetches the same content for another model. This transfer finds the content when that
            // one ends.
            Err(StoreError::Busy(_)) if want.target == self.store.own_copy_path(&want.hash) => {
                let mut state = self.state();
                state.end_opening(&mut want);
                want.urgent = false;
                state.wants.push_back((place, want));
                Ok(false)
            }
            // There are too few file descriptors. As other files are completed, there will be more.
            Err(StoreError::Io { source, .. })
                if files::is_out_of_descriptors(&source)
                    && self.state().may_wait_for_descriptors() =>
            {
                let mut state = self.state();
                state.end_opening(&mut want);
                state.most_open = state.open.len().max(1);
                state.wants.push_front((place, want));
                Ok(false)
            }
            Err(error) => {
                self.state().opening = None;
                Err(error)
            }
        }
    }

    /// Records that the content of a want came from another source.
    fn mark_complete(&self, place: usize, want: &Want) {
        let mut state = self.state();
        state.opening = None;
        state.whole.insert(place as u64);
        let bytes = want.bytes() - want.had;
        self.progress.done.fetch_add(bytes, Ordering::Relaxed);
        drop(state);
        self.written.notify_waiters();
    }

    /// Records that the part file of a want is open, and adds its missing groups to the schedule.
    fn opened(&self, place: usize, mut want: Want, partial: Arc<Partial>) {
        let have = partial.have();
        // The part file may have vanished or grown since the plan counted its content.
        let bytes = want.wanted(have.clone()).bytes(&want.tree);
        let done = &self.progress.done;
        done.fetch_add(bytes.saturating_sub(want.had), Ordering::Relaxed);
        done.fetch_sub(want.had.saturating_sub(bytes), Ordering::Relaxed);
        let planned = match want.for_readers {
            true => Some(Bitfield::empty(want.tree.groups())),
            false => want.groups.clone(),
        };
        let mut state = self.state();
        state.end_opening(&mut want);
        let mut missing = match &want.groups {
            Some(groups) => groups.clone(),
            None => Bitfield::full(want.tree.groups()),
        };
        have.runs().for_each(|run| missing.remove_range(run));
        missing
            .runs()
            .for_each(|run| state.schedule.want(place, run));
        if let Some(local_copies) = &want.local_copies {
            let groups = local_copies.groups().clone();
            state.schedule.set_local(place, groups);
        }
        state.without = None;
        state.open.insert(
            place,
            Open {
                partial,
                wanted: want.groups,
                planned,
                local_copies: want.local_copies,
            },
        );
        drop(state);
        self.changed.notify_waiters();
        if missing.count() == 0 {
            self.settle_soon.notify_one();
        }
    }
}
