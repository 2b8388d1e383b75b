//! The peers to stay connected to, `--bootstrap` and `--relay`: when to dial them, and why that failed last.

use std::{
    convert::Infallible,
    time::{Duration, Instant},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol, swarm::NetworkBehaviour};

use super::{Dial, Driver};
use crate::{
    BootstrapPeer, ConnectError, address::starts_with_name, gate::Source, own::by_quic,
    split_peer_id,
};

/// The first and the longest pause between attempts to reach a bootstrap node.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Time after which a TCP address that has not led to a connection is tried by QUIC as well. If the path drops large
/// packets and the messages that say so, TCP connects and its first TLS message never arrives; QUIC's packets are small
/// until larger ones have been seen to arrive. Three seconds are the second retransmission of a lost SYN.
const BY_QUIC: Duration = Duration::from_secs(3);

/// A peer to stay connected to.
#[derive(Debug)]
pub(super) struct Bootstrap {
    pub(super) peer: PeerId,
    /// Without the peer.
    address: Multiaddr,
    next: Instant,
    pause: Duration,
    /// When to try by QUIC what was given for TCP.
    quic: Option<Instant>,
    /// Why the last attempt failed; `None` once it has succeeded.
    error: Option<String>,
    /// Failures since the last connection.
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

    /// Returns true if `dialled` is this address, or may be where this name leads.
    fn leads_to(&self, dialled: &Multiaddr) -> bool {
        let udp = |address: &Multiaddr| address.iter().any(|part| matches!(part, Protocol::Udp(_)));
        let any = matches!(self.address.iter().next(), Some(Protocol::Dnsaddr(_)));
        let named = starts_with_name(&self.address) && !starts_with_name(dialled);
        *dialled == self.address || (named && (any || udp(dialled) == udp(&self.address)))
    }

    /// It is dialled at once, and soon again.
    pub(super) fn begin_anew(&mut self, now: Instant) {
        self.rest();
        self.next = now;
    }

    /// It kept a connection for long: the next pause is the first.
    pub(super) fn rest(&mut self) {
        self.pause = RETRY.0;
    }

    fn connected(&mut self) {
        self.quic = None;
        self.error = None;
        self.failures = 0;
    }

    /// An attempt has failed. Returns true for the first since it was last connected, which is worth a line in the log.
    fn failed(&mut self, error: String) -> bool {
        self.error = Some(error);
        self.failures = self.failures.saturating_add(1);
        self.failures == 1
    }

    /// The address to dial now, if any. `also`: what else was given for this peer.
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
    /// Dials those that are not connected, where that is due.
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
                bootstrap.connected();
                continue;
            }
            let also = given.iter().filter(|(peer, _)| *peer == bootstrap.peer);
            let also: Vec<_> = also.map(|(_, address)| address.clone()).collect();
            let address = bootstrap.due(&also, now);
            due.extend(address.map(|address| (bootstrap.peer, address)));
        }
        for (peer, address) in due {
            if let Err(error) = self.dial(peer, vec![(Source::Given, address.clone())]) {
                self.bootstrap_failed(peer, &[address], &error);
            }
        }
    }

    /// A dial has failed; notes it if it was one of a bootstrap address.
    pub(super) fn bootstrap_dial_failed(&mut self, dial: &Dial, error: &ConnectError) {
        let dialled: Vec<_> = dial
            .addresses
            .iter()
            .map(|(_, address)| split_peer_id(address.clone()).0)
            .collect();
        self.bootstrap_failed(dial.peer, &dialled, error);
    }

    /// No connection to `peer` came about at these addresses, of which names are looked up.
    pub(super) fn bootstrap_failed(
        &mut self,
        peer: PeerId,
        dialled: &[Multiaddr],
        error: &ConnectError,
    ) {
        if self.peers.contains_key(&peer) {
            return;
        }
        for bootstrap in self.bootstrap.iter_mut().filter(|b| b.peer == peer) {
            if !dialled.iter().any(|dialled| bootstrap.leads_to(dialled)) {
                continue;
            }
            let address = bootstrap.address.clone().with(Protocol::P2p(peer));
            let text = error_text(error);
            // The address is named beside.
            let own = [format!("{address}: "), format!("{}: ", bootstrap.address)];
            let rest = own.iter().find_map(|own| text.strip_prefix(own));
            let reason = rest.unwrap_or(&text).to_owned();
            if bootstrap.failed(reason.clone()) {
                tracing::warn!(
                    "cannot reach bootstrap address {address}: {reason}; it is tried again"
                );
            }
        }
    }

    /// Returns true if this address of a peer is only guessed: the place of a bootstrap address by QUIC, of which the
    /// peer has not said that it listens there. That it does not answer says nothing of UDP.
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
                error: bootstrap.error.clone().filter(|_| !connected),
                failures: if connected { 0 } else { bootstrap.failures },
            }
        })
        .collect()
    }
}

fn error_text(error: &ConnectError) -> String {
    match error {
        ConnectError::Failed { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tcp_address_that_leads_nowhere_is_tried_by_quic_as_well() {
        let tcp: Multiaddr = "/ip4/1.1.1.1/tcp/5".parse().unwrap();
        let quic: Multiaddr = "/ip4/1.1.1.1/udp/5/quic-v1".parse().unwrap();
        let mut bootstrap = Bootstrap::new(PeerId::random(), tcp.clone());
        let now = bootstrap.next;
        let only = [tcp.clone()];
        assert_eq!(bootstrap.due(&only, now), Some(tcp.clone()));
        // One that answers in time is not dialled twice.
        assert_eq!(bootstrap.due(&only, now), None);
        assert_eq!(bootstrap.due(&only, now + RETRY.0), Some(tcp.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), Some(quic.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), Some(tcp.clone()));
        assert_eq!(bootstrap.due(&only, now + BY_QUIC), None);
        // Not if it was given by itself.
        let mut bootstrap = Bootstrap::new(PeerId::random(), tcp.clone());
        let (now, both) = (bootstrap.next, [tcp.clone(), quic]);
        for at in [now, now + RETRY.0, now + BY_QUIC] {
            assert_eq!(bootstrap.due(&both, at), Some(tcp.clone()));
        }
        assert_eq!(bootstrap.due(&both, now + BY_QUIC), None);
    }

    #[test]
    fn only_the_first_failure_is_logged_until_there_was_a_connection() {
        let address = "/ip4/1.1.1.1/tcp/5".parse().unwrap();
        let mut bootstrap = Bootstrap::new(PeerId::random(), address);
        assert!(bootstrap.failed("refused".to_owned()));
        assert!(!bootstrap.failed("refused".to_owned()));
        bootstrap.connected();
        assert!(bootstrap.error.is_none());
        assert!(bootstrap.failed("refused".to_owned()));
    }
}
