//! A redb database that survives faults of its disk.
//!
//! After a failed read or write, redb refuses every transaction until the database is closed and opened again. A
//! [`Database`] does that: the next transaction after a fault reopens it. A disk that was full or unavailable for a
//! while thus needs no restart of the node.
//!
//! The crate guarantees:
//!
//! - A transaction that [`Database::write`] acknowledges survives a crash and a power loss.
//! - A missing file is not created again, because an empty database would look like the lost one.
//! - A lasting fault costs one attempt per second to open the database, or sixteen if it opens but cannot be read,
//!   however many callers there are.
//!
//! Tables and rows belong to the callers. Damage to a file is reported as [`Error::Damaged`], and the caller decides
//! about repair.

mod database;
mod error;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use self::{
    database::{Database, Options, Outcome},
    error::{Error, Failure, Fault, is_full},
};
