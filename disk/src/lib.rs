//! A redb database that outlives faults of its disk.
//!
//! redb refuses every transaction after a read or a write of the disk that failed, until the database is closed and
//! opened again. A [`Database`] does that: the next transaction after a fault opens it again, so that a disk that was
//! full and has room again, or was away and is back, needs no restart of the node.
//!
//! It promises: a transaction that [`Database::write`] acknowledges survives a crash and a loss of power; a file that
//! is gone is not made anew, because an empty database would be taken for what it held; a fault that lasts costs one
//! attempt a second to open the database, or sixteen where it opens and cannot be read, however many ask. It leaves
//! out: tables and rows, which belong to the callers, and repair of damaged files, which is reported
//! ([`Error::Damaged`]) and decided by the caller.

mod database;
mod error;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use self::{
    database::{Database, Options, Outcome},
    error::{Error, Failure, Fault, is_full},
};
