//! Looking at what is here of models, on disks that may not answer.
//!
//! One thread a mount looks. The caller waits for the thread as long as it finds one file after another. When the
//! thread gets no further, the caller gets the result of the last look, and no other look begins there until the thread
//! returns.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use super::{Model, Presence, Store, StoreError};
use crate::{Hash, Manifest, files::mount_of};

/// The longest time for which a look may find no further file: a disk that spins up takes longer, and answers the next
/// time.
const PATIENCE: Duration = Duration::from_secs(2);

/// Models of which is remembered what was found.
const MAX_KNOWN: usize = 10_000;

#[derive(Debug, Default)]
pub(super) struct Looks(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    known: HashMap<Hash, Presence>,
    /// Mounts where a look has got stuck.
    stuck: HashSet<PathBuf>,
}

impl Looks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

pub(super) fn presence(
    store: &Store,
    model: &Model,
    manifest: &Manifest,
) -> Result<Presence, StoreError> {
    let mount = mount_of(&model.root);
    let last = |state: &State| {
        let known = state.known.get(&model.id).copied();
        Presence {
            answers: false,
            ..known.unwrap_or_default()
        }
    };
    {
        let state = store.inner.looks.state();
        if state.stuck.contains(&mount) {
            return Ok(last(&state));
        }
    }
    let looked = Arc::new(AtomicU64::new(0));
    let (sender, found) = channel();
    let look = {
        let (store, model, manifest) = (store.clone(), model.clone(), manifest.clone());
        let (looked, mount) = (Arc::clone(&looked), mount.clone());
        move || {
            let presence = store.look(&model, &manifest, &looked);
            let mut state = store.inner.looks.state();
            state.stuck.remove(&mount);
            if let Ok(presence) = &presence
                && (state.known.len() < MAX_KNOWN || state.known.contains_key(&model.id))
            {
                state.known.insert(model.id, *presence);
            }
            drop(state);
            // Before the answer: whoever hears it may want to open the store again.
            drop(store);
            // Nobody may wait for it any more.
            let _ = sender.send(presence);
        }
    };
    thread::Builder::new()
        .name("weft-look".to_owned())
        .spawn(look)
        .map_err(StoreError::io("cannot look at", &model.root))?;
    let mut before = 0;
    loop {
        match found.recv_timeout(PATIENCE) {
            Ok(presence) => return presence,
            Err(RecvTimeoutError::Disconnected) => return Err(StoreError::Cancelled),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = looked.load(Ordering::Relaxed);
        if std::mem::replace(&mut before, now) != now {
            continue;
        }
        let mut state = store.inner.looks.state();
        // It may have come back just now.
        if let Ok(presence) = found.try_recv() {
            return presence;
        }
        if state.stuck.insert(mount.clone()) {
            tracing::warn!(disk = %mount.display(), "a disk does not answer: what is shown of models there is what was last known");
        }
        return Ok(last(&state));
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Instant};

    use super::*;
    use crate::{
        files::blocked,
        index::{Progress, index},
    };

    #[test]
    fn what_a_disk_holds_that_does_not_answer_is_shown_as_it_was_and_others_go_on() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store")).unwrap();
        let add = |name: &str| {
            let folder = home.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("a"), name.repeat(100_000)).unwrap();
            let indexed = index(&folder, &Progress::default()).unwrap();
            let id = store.add(&indexed, None).unwrap();
            (store.model(&id).unwrap(), indexed.manifest)
        };
        let [dead, alive] = [add("d"), add("a")];
        let before = store.presence(&dead.0, &dead.1).unwrap();
        assert!(before.answers && before.complete);
        blocked::block(&dead.0.root);
        let first = store.presence(&dead.0, &dead.1).unwrap();
        assert!(!first.answers && first.complete);
        assert_eq!(first.bytes, before.bytes);
        // The next ones do not wait, and begin no thread.
        let begun = Instant::now();
        for _ in 0..100 {
            assert!(!store.presence(&dead.0, &dead.1).unwrap().answers);
        }
        assert!(begun.elapsed() < PATIENCE);
        assert!(store.presence(&alive.0, &alive.1).unwrap().answers);
        blocked::release(&dead.0.root);
        let begun = Instant::now();
        while !store.presence(&dead.0, &dead.1).unwrap().answers {
            assert!(begun.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(20));
        }
    }
}
