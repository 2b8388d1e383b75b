//! Fitting the limits to the files that this process may open: each TCP connection, lane and search socket is one.
//!
//! A process that runs out of descriptors accepts nobody, opens no file of its store and resolves no name. Limits that
//! promise more connections than there are descriptors would let strangers bring it there.

use std::fmt;

use rustix::process::{Resource, getrlimit};

use crate::{LimitUse, Limits, nat::search};

/// Descriptors that are left to listeners, the store, the API, DNS and the log.
const RESERVE: u64 = 64;

/// The part of the rest that connections may take. The other half is for files of models that are being fetched and
/// served, and for the program around the node.
const PART: u64 = 2;

/// Sockets that a dial opens at a time. It tries up to 16 addresses, of which those for QUIC share a socket; most peers
/// state two or three.
const OF_A_DIAL: u64 = 2;

/// The least that a limit becomes. Below, a node is of no use; then it fails with an error that names the cause.
const LEAST: u64 = 8;

/// Limits that were lowered because this process may not open as many files as they need.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoweredLimits {
    /// Files that this process may open (`ulimit -n`).
    pub open_files: u64,
    /// The number that would do for the limits that were asked for.
    pub needed: u64,
    /// Connections in all, now.
    pub connections: u32,
    /// Connections opened by others, now.
    pub incoming: u32,
    /// Lanes, now.
    pub lanes: usize,
}

impl fmt::Display for LoweredLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "at most {} connections, {} of them opened by others, and {} lanes, because this process may open {} files; \
             for the limits that were asked for, allow it {} (`ulimit -n`, or LimitNOFILE= in a systemd unit)",
            self.connections, self.incoming, self.lanes, self.open_files, self.needed
        )
    }
}

/// The limits of a node as far as its descriptors go.
#[derive(Debug, Clone)]
pub(crate) struct Fitted {
    pub(crate) limits: Limits,
    /// Sockets that one search for a port may open.
    pub(crate) search_sockets: usize,
    pub(crate) lowered: Option<LoweredLimits>,
}

/// Returns the number of files that this process may open; `None`: any number.
fn allowed() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Fits limits to the files that this process may open now.
pub(crate) fn fit(limits: Limits) -> Fitted {
    fit_to(limits, allowed())
}

/// Descriptors that connections take if all limits are reached.
fn needed(limits: &Limits, search_sockets: usize) -> u64 {
    // Half of those in the handshake are TCP, and QUIC shares a socket.
    u64::from(limits.established)
        + u64::from(limits.pending_incoming.div_ceil(2))
        + u64::from(limits.pending_outgoing) * OF_A_DIAL
        + limits.lanes as u64
        + (search_sockets * search::MAX_OPEN_MANY) as u64
}

fn fit_to(limits: Limits, files: Option<u64>) -> Fitted {
    let needs = needed(&limits, search::SOCKETS);
    let share = files.map_or(u64::MAX, |files| files.saturating_sub(RESERVE) / PART);
    let whole = Fitted {
        limits,
        search_sockets: search::SOCKETS,
        lowered: None,
    };
    let Some(files) = files.filter(|_| needs > share) else {
        return whole;
    };
    let mut limits = whole.limits;
    let lower = |wanted: u64| {
        let part = (u128::from(wanted) * u128::from(share) / u128::from(needs)) as u64;
        part.max(LEAST.min(wanted))
    };
    // A lowered limit is below the given one: it fits.
    let lower_u32 = |wanted: u32| lower(wanted.into()) as u32;
    let lower_usize = |wanted: usize| lower(wanted as u64) as usize;
    limits.established = lower_u32(limits.established);
    limits.established_incoming = lower_u32(limits.established_incoming);
    limits.pending_incoming = lower_u32(limits.pending_incoming);
    limits.pending_outgoing = lower_u32(limits.pending_outgoing);
    limits.lanes = lower_usize(limits.lanes);
    let lowered = LoweredLimits {
        open_files: files,
        needed: needs.saturating_mul(PART).saturating_add(RESERVE),
        connections: limits.established,
        incoming: limits.established_incoming,
        lanes: limits.lanes,
    };
    Fitted {
        search_sockets: lower_usize(search::SOCKETS),
        limits,
        lowered: Some(lowered),
    }
}

/// The row of `weft limits`. Its use is 0 where the system does not tell.
pub(crate) fn usage() -> LimitUse {
    // The listing itself is one of them.
    let open = std::fs::read_dir("/dev/fd").map_or(0, |all| all.count().saturating_sub(1));
    LimitUse {
        name: "open_files",
        used: open as u64,
        limit: allowed(),
        refused: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_promise_no_more_connections_than_the_process_may_open_files() {
        for files in [256, 512, 1024, 2048, 4096] {
            let fitted = fit_to(Limits::default(), Some(files));
            let takes = needed(&fitted.limits, fitted.search_sockets);
            assert!(takes <= (files - RESERVE) / 2, "{files}: {takes}");
            let lowered = fitted.lowered.unwrap();
            assert_eq!(lowered.connections, fitted.limits.established);
            assert!(fitted.limits.established_incoming < fitted.limits.established);
            assert!(fitted.limits.established > 4 * fitted.limits.lanes as u32 - 4);
            // The advice helps.
            let raised = fit_to(Limits::default(), Some(lowered.needed));
            assert_eq!(raised.lowered, None);
        }
    }

    #[test]
    fn limits_for_which_there_are_files_stay_as_they_are() {
        for files in [None, Some(65_536), Some(5000)] {
            let fitted = fit_to(Limits::default(), files);
            assert_eq!(fitted.lowered, None);
            assert_eq!(fitted.limits.established, Limits::default().established);
            assert_eq!(fitted.search_sockets, search::SOCKETS);
        }
        // A limit that is low already is not raised.
        let few = Limits {
            lanes: 0,
            pending_outgoing: 3,
            ..Limits::default()
        };
        let fitted = fit_to(few, Some(128));
        assert_eq!(
            (fitted.limits.lanes, fitted.limits.pending_outgoing),
            (0, 3)
        );
    }

    #[test]
    fn open_files_are_counted_against_what_the_process_may_open() {
        let before = usage();
        assert!(before.limit.is_none_or(|limit| before.used <= limit));
        assert!(before.used > 0);
    }
}
