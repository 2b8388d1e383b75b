//! Peers to stay connected to, from `--bootstrap` and `--relay`: when to dial them, and why the last attempt failed.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    multiaddr::Protocol,
    swarm::{DialError, NetworkBehaviour},
};

use super::{
    Config, Driver, SpawnError,
    dial_error::{attempt_error, dial_error},
    dialing::Dial,
};
use crate::{BootstrapPeer, ConnectError, address::own::by_quic, split_peer_id};

/// The first and the longest pause between attempts to reach a bootstrap node.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Time after which a TCP address that has not led to a connection is tried by QUIC as well. A path may drop large
/// packets and also the messages that report it. Then TCP connects, but its first TLS message never arrives; QUIC's
/// packets stay small until larger ones have been seen to arrive. Three seconds are the second retransmission of a lost
/// SYN.
const BY_QUIC: Duration = Duration::from_secs(3);

/// A peer to stay connected to.
#[derive(Debug)]
pub(super) struct Bootstrap {
    pub(super) peer: PeerId,
    /// The given address, without `/p2p`.
    address: Multiaddr,
    next: Instant,
    pause: Duration,
    /// Time at which an address given for TCP is tried by QUIC.
    quic: Option<Instant>,
    /// The reason that the last attempt at this address failed; `None` after a success.
    error: Option<String>,
    /// Failures since the address last led to a connection.
    failures: u32,
}

impl Bootstrap {
    pub(super) fn new(peer: PeerId, address: Multiaddr) -> Self {
        Self {
            peer,
            address,
            next: Instant::now(),
            pause: RETRY.0,
            quic: None,
            error: None,
            failures: 0,
        }
    }

    /// Returns the peers that the configuration names.
    ///
    /// # Errors
    ///
    /// Returns [`SpawnError::Bootstrap`] for an address that does not name its peer.
    pub(super) fn all(config: &Config) -> Result<Vec<Self>, SpawnError> {
        let named = config.bootstrap.iter().chain(&config.relays);
        named
            .map(|address| match split_peer_id(address.clone()) {
                (address, Some(peer)) => Ok(Self::new(peer, address)),
                (address, None) => Err(SpawnError::Bootstrap(address)),
            })
            .collect()
    }

    /// Returns true if this is the bootstrap address `address` of `peer`.
    fn is(&self, peer: PeerId, address: &Multiaddr) -> bool {
        self.peer == peer && self.address == *address
    }

    /// Schedules a dial at once, and further ones after short pauses.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        self.rest();
        self.next = now;
    }

    /// Resets the pause, after the peer has kept a connection for long.
    pub(super) fn rest(&mut self) {
        self.pause = RETRY.0;
    }

    /// Records that an attempt at this address has led to a connection.
    fn reached(&mut self) {
        self.error = None;
        self.failures = 0;
    }

    /// Records that an attempt at this address has failed. Returns true for the first failure since a success, which is
    /// worth a line in the log.
    fn failed(&mut self, error: String) -> bool {
        self.error = Some(error);
        self.failures = self.failures.saturating_add(1);
        self.failures == 1
    }

    /// Returns the address to dial now, if any. `also`: the other given addresses of this peer.
    fn due(&mut self, also: &[Multiaddr], now: Instant) -> Option<Multiaddr> {
        if self.quic.is_some_and(|at| at <= now) {
            self.quic = None;
            let other = by_quic(&self.address).filter(|other| !also.contains(other));
            if other.is_some() {
                return other;
            }
        }
        if self.next > now {
            return None;
        }
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(RETRY.1);
        self.quic.get_or_insert(now + BY_QUIC);
        Some(self.address.clone())
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Dials bootstrap addresses that are due and whose peers are not connected.
    pub(super) fn reach_bootstrap(&mut self) {
        let now = Instant::now();
        let given: Vec<_> = self
            .bootstrap
            .iter()
            .map(|b| (b.peer, b.address.clone()))
            .collect();
        let mut due = Vec::new();
        for bootstrap in &mut self.bootstrap {
            if self.peers.contains_key(&bootstrap.peer) {
                bootstrap.quic = None;
                continue;
            }
            let also = given.iter().filter(|(peer, _)| *peer == bootstrap.peer);
            let also: Vec<_> = also.map(|(_, address)| address.clone()).collect();
            let address = bootstrap.due(&also, now);
            due.extend(address.map(|address| (bootstrap.peer, address)));
        }
        for (peer, address) in due {
            if let Err(reason) = self.dial_given(peer, address.clone()) {
                self.bootstrap_failed(peer, &address, &reason);
            }
        }
    }

    /// Records the error of a failed dial for each bootstrap address in it that was tried.
    pub(super) fn bootstrap_dial_failed(&mut self, dial: &Dial, error: &DialError) {
        let failed = failed(dial, error);
        let Some(name) = &dial.name else {
            for (address, reason) in failed {
                self.bootstrap_failed(dial.peer, &address, &reason);
            }
            return;
        };
        // The bootstrap address is the name, not the addresses that it resolved to.
        let each = failed
            .iter()
            .map(|(address, reason)| format!("{address}: {reason}"));
        let reason = each.collect::<Vec<_>>().join("; ");
        if !reason.is_empty() {
            self.bootstrap_failed(dial.peer, name, &reason);
        }
    }

    /// Records that a dial has led to a connection at `address`.
    pub(super) fn bootstrap_reached(&mut self, dial: &Dial, address: &Multiaddr) {
        let given = dial.name.clone();
        let given = given.unwrap_or_else(|| split_peer_id(address.clone()).0);
        for bootstrap in &mut self.bootstrap {
            if bootstrap.is(dial.peer, &given) {
                bootstrap.reached();
            }
        }
    }

    /// Records that an attempt to reach `peer` at `address`, as it was given, has failed.
    pub(super) fn bootstrap_failed(&mut self, peer: PeerId, address: &Multiaddr, reason: &str) {
        for bootstrap in &mut self.bootstrap {
            if bootstrap.is(peer, address) && bootstrap.failed(reason.to_owned()) {
                let address = bootstrap.address.clone().with(Protocol::P2p(peer));
                tracing::warn!(
                    "cannot reach bootstrap address {address}: {reason}; it is tried again"
                );
            }
        }
    }

    /// Returns true if this address of a peer is a guess: a bootstrap address tried by QUIC, at which the peer has not
    /// said that it listens. A failure there does not show that UDP is blocked.
    pub(super) fn is_guess(&self, peer: PeerId, address: &Multiaddr) -> bool {
        let mut of_peer = self.bootstrap.iter().filter(|b| b.peer == peer);
        let said = self.peers.get(&peer).and_then(|peer| peer.quic.as_ref());
        said != Some(address) && of_peer.any(|b| by_quic(&b.address).as_ref() == Some(address))
    }

    /// Returns the state of each bootstrap peer.
    pub(super) fn bootstrap_peers(&self) -> Vec<BootstrapPeer> {
        let all = self.bootstrap.iter();
        all.map(|bootstrap| {
            let connected = self.peers.contains_key(&bootstrap.peer);
            BootstrapPeer {
                peer: bootstrap.peer,
                address: bootstrap.address.clone(),
                connected,
                error: bootstrap.error.clone(),
                failures: bootstrap.failures,
            }
        })
        .collect()
    }
}

/// Returns only the reason of an error, because the address is logged beside it.
pub(super) fn text(error: &ConnectError) -> String {
    match error {
        ConnectError::Failed { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

/// Returns the addresses of a dial that have failed, without the peer, and the reason of each.
fn failed(dial: &Dial, error: &DialError) -> Vec<(Multiaddr, String)> {
    let short = |address: &Multiaddr| split_peer_id(address.clone()).0;
    let whole = || text(&dial_error(dial.peer, error));
    match error {
        DialError::Transport(attempts) => attempts
            .iter()
            .map(|(address, error)| (short(address), attempt_error(error)))
            .collect(),
        // The other addresses were not tried.
        DialError::WrongPeerId { address, .. } | DialError::LocalPeerId { address } => {
            vec![(short(address), whole())]
        }
        // There was no attempt, or this node aborted it.
        DialError::DialPeerConditionFalse(_) | DialError::Aborted => Vec::new(),
        DialError::NoAddresses | DialError::Denied { .. } => {
            let all = dial.addresses.iter();
            all.map(|(_, address)| (short(address), whole())).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::TransportError;

    use super::*;
    use crate::policy::gate::Source;

    #[test]
    fn a_tcp_address_that_does_not_answer_is_tried_by_quic_as_well() {
        let tcp: Multiaddr = "/ip4/1.1.1.1/tcp/5".parse().unwrap();
        let quic: Multiaddr = "/ip4/1.1.1.1/udp/5/quic-v1".parse().unwrap();
        let mut bootstrap = Bootstrap::new(PeerId::random(), tcp.clone());
        let now = bootstrap.next;
        let only = [tcp.clone()];
        assert_eq!(bootstrap.due(&only, now), Some(tcp.clone()));
        // An address that answers in time is not dialed twice.
        assert_eq!(bootstrap.due(&only, now), None);
        assert_eq!(bootstrap.due(&only, now + RETRY.0), Some(tcp.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), Some(quic.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), Some(tcp.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), None);
        // The QUIC address is not tried if it was given by itself.
        let mut bootstrap = Bootstrap::new(PeerId::random(), tcp.clone());
        let (now, both) = (bootstrap.next, [tcp.clone(), quic]);
        for at in [now, now + RETRY.0, now + BY_QUIC] {
            assert_eq!(bootstrap.due(&both, at), Some(tcp.clone()));
        }
        assert_eq!(bootstrap.due(&both, now + BY_QUIC), None);
    }

    #[test]
    fn each_tried_address_of_a_dial_fails_for_its_own_reason() {
        let at = |port: u16| -> Multiaddr { format!("/ip4/1.1.1.1/tcp/{port}").parse().unwrap() };
        let peer = PeerId::random();
        let dial = Dial {
            peer,
            addresses: vec![(Source::Given, at(1)), (Source::Given, at(2))],
            name: None,
        };
        let refused = |kind: std::io::ErrorKind| TransportError::Other(kind.into());
        let error = DialError::Transport(vec![
            (
                at(1).with(Protocol::P2p(peer)),
                refused(std::io::ErrorKind::ConnectionRefused),
            ),
            (at(2), refused(std::io::ErrorKind::TimedOut)),
        ]);
        let own = failed(&dial, &error);
        assert_eq!(own.len(), 2);
        assert_eq!(own[0], (at(1), "connection refused".to_owned()));
        assert_eq!(own[1], (at(2), "timed out".to_owned()));
        let error = DialError::WrongPeerId {
            obtained: PeerId::random(),
            address: at(2),
        };
        let own = failed(&dial, &error);
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].0, at(2));
        assert!(failed(&dial, &DialError::Aborted).is_empty());
    }

    #[test]
    fn only_the_first_failure_is_logged_until_there_was_a_connection() {
        let address = "/ip4/1.1.1.1/tcp/5".parse().unwrap();
        let mut bootstrap = Bootstrap::new(PeerId::random(), address);
        assert!(bootstrap.failed("refused".to_owned()));
        assert!(!bootstrap.failed("refused".to_owned()));
        bootstrap.reached();
        assert!(bootstrap.error.is_none());
        assert!(bootstrap.failed("refused".to_owned()));
    }
}
