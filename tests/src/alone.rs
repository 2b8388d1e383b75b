//! Tests that must not share the machine with others.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The turn of a test that runs alone; see [`alone`].
#[derive(Debug)]
#[must_use = "the turn ends when this is dropped"]
pub struct Alone {
    _turn: MutexGuard<'static, ()>,
}

/// Waits until no other test of this program holds the turn, and holds it until the result is dropped.
///
/// A test that measures a time or a rate calls this first. It excludes only tests that call it too. Such tests are in
/// the program `timed`, where all tests do, and cargo runs one program after another, so nothing runs beside them.
pub fn alone() -> Alone {
    static TURN: Mutex<()> = Mutex::new(());
    // The mutex is poisoned by a failed test, which has left nothing behind.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    Alone { _turn }
}
