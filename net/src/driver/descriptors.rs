//! Fits the limits to the number of files that this process may open: each TCP connection, lane and search socket is
//! one.
//!
//! A process that runs out of file descriptors accepts no connection, opens no file of its store and resolves no name.
//! If the limits allowed more connections than there are descriptors, unknown peers could bring it there.

use std::fmt;

use rustix::process::{Resource, getrlimit};

use crate::{LimitUse, Limits, nat::search};

/// Descriptors reserved for listeners, the store, the API, DNS and the log.
const RESERVE: u64 = 64;

/// Connections may take one in this many of the remaining descriptors. The other half is for model files that are
/// fetched and served, and for the program around the node.
const PART: u64 = 2;

/// Sockets that a dial opens at a time. It tries up to 16 addresses, of which those for QUIC share a socket; most peers
/// have two or three.
const OF_A_DIAL: u64 = 2;

/// Lowest value of a lowered limit. A node with less is of no use; it then fails with an error that names the cause.
const LEAST: u64 = 8;

/// Limits that were lowered because this process may not open as many files as they need.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoweredLimits {
    /// Number of files that this process may open (`ulimit -n`).
    pub open_files: u64,
    /// Number of files needed for the configured limits.
    pub needed: u64,
    /// Lowered limit on connections in total.
    pub connections: u32,
    /// Lowered limit on incoming connections.
    pub incoming: u32,
    /// Lowered limit on lanes.
    pub lanes: usize,
}

impl fmt::Display for LoweredLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "at most {} connections, {} of them incoming, and {} lanes, because this process may open {} files; \
             the configured limits need {} (set `ulimit -n`, or LimitNOFILE= in a systemd unit)",
            self.connections, self.incoming, self.lanes, self.open_files, self.needed
        )
    }
}

/// The limits of a node, fitted to its file descriptors.
#[derive(Debug, Clone)]
pub(crate) struct Fitted {
    pub(crate) limits: Limits,
    /// Most sockets that one search for a port may open.
    pub(crate) search_sockets: usize,
    pub(crate) lowered: Option<LoweredLimits>,
}

/// Returns the number of files that this process may open; `None`: any number.
fn allowed() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}

/// Fits limits to the number of files that this process may open now.
pub(crate) fn fit(limits: Limits) -> Fitted {
    fit_to(limits, allowed())
}

/// Returns the number of descriptors that connections take if all limits are reached.
fn needed(limits: &Limits, search_sockets: usize) -> u64 {
    // Half of the connections in the handshake are TCP, and QUIC shares a socket.
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
    // A lowered limit is below the given one, so it fits the type.
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

/// Returns the row of `weft limits`. Its use is 0 if the system does not report it.
pub(crate) fn usage() -> LimitUse {
    // The directory listing itself takes one descriptor.
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
    fn limits_need_no_more_files_than_the_process_may_open() {
        for files in [256, 512, 1024, 2048, 4096] {
            let fitted = fit_to(Limits::default(), Some(files));
            let takes = needed(&fitted.limits, fitted.search_sockets);
            assert!(takes <= (files - RESERVE) / 2, "{files}: {takes}");
            let lowered = fitted.lowered.unwrap();
            assert_eq!(lowered.connections, fitted.limits.established);
            assert!(fitted.limits.established_incoming < fitted.limits.established);
            assert!(fitted.limits.established > 4 * fitted.limits.lanes as u32 - 4);
            // With the number of files that the message names, no limit is lowered.
            let raised = fit_to(Limits::default(), Some(lowered.needed));
            assert_eq!(raised.lowered, None);
        }
    }

    #[test]
    fn limits_are_not_lowered_if_there_are_enough_files() {
        for files in [None, Some(65_536), Some(5000)] {
            let fitted = fit_to(Limits::default(), files);
            assert_eq!(fitted.lowered, None);
            assert_eq!(fitted.limits.established, Limits::default().established);
            assert_eq!(fitted.search_sockets, search::SOCKETS);
        }
        // A limit that is already low is not raised.
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
