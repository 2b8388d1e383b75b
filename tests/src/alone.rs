//! Tests that must not share the machine with others.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The turn of a test that runs alone; see [`alone`].
#[derive(Debug)]
#[must_use = "the turn ends when this is dropped"]
pub struct Alone {
    _turn: MutexGuard<'static, ()>,
}

/// Waits until no other test of this program holds this, and holds it for the caller until it is dropped.
///
/// A test that measures a time or a rate takes it first of all. It keeps out only tests that take it too. Such tests are
/// in the program `timed`, where all do, and cargo runs one program after another: so nothing runs beside them.
pub fn alone() -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    // Poisoned by a test that failed, of which nothing is left.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Alone { _turn }
}
