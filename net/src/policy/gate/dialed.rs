//! The record of addresses to which this node has sent packets lately. Packets from these addresses do not prove that
//! this node is reachable, because a NAT or a firewall lets answers through.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Time for which a NAT or firewall may remember outgoing packets. Open TCP connections are remembered for an hour and
/// more, but those belong to this node.
const MEMORY: Duration = Duration::from_secs(600);

/// Most addresses remembered; beyond it the oldest is dropped. The gate admits 512 unproven destinations per minute, so
/// an attacker cannot displace an address within [`MEMORY`] by naming others.
const MAX: usize = 8192;

/// Most ports remembered per address; beyond it all ports count as dialed. A node listens on three.
const MAX_PORTS: usize = 16;

/// The time at which this node last sent to one address, and the ports to which it sent.
#[derive(Debug)]
struct Sent {
    last: Instant,
    ports: HashSet<u16>,
    /// True if all ports count as dialed.
    all: bool,
}

/// Remembers the sockets to which this node has sent packets. Clones share one state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dialed(Arc<Mutex<HashMap<IpAddr, Sent>>>);

impl Dialed {
    /// Records that packets are sent to this socket.
    pub(crate) fn note(&self, at: SocketAddr, now: Instant) {
        self.remember(at.ip(), Some(at.port()), now);
    }

    /// Records that packets are sent to many ports of this address.
    pub(crate) fn note_all_ports(&self, ip: IpAddr, now: Instant) {
        self.remember(ip, None, now);
    }

    fn remember(&self, ip: IpAddr, port: Option<u16>, now: Instant) {
        let ip = ip.to_canonical();
        let mut all = self.lock();
        if all.len() >= MAX && !all.contains_key(&ip) {
            all.retain(|_, sent| now.duration_since(sent.last) < MEMORY);
        }
        if all.len() >= MAX
            && !all.contains_key(&ip)
            && let Some(oldest) = all.iter().min_by_key(|(_, sent)| sent.last)
        {
            let oldest = *oldest.0;
            all.remove(&oldest);
        }
        let sent = all.entry(ip).or_insert_with(|| Sent {
            last: now,
            ports: HashSet::new(),
            all: false,
        });
        if now.duration_since(sent.last) >= MEMORY {
            sent.ports.clear();
            sent.all = false;
        }
        sent.last = now;
        match port {
            Some(port) if sent.ports.len() < MAX_PORTS => drop(sent.ports.insert(port)),
            Some(port) if sent.ports.contains(&port) => {}
            _ => sent.all = true,
        }
    }

    /// Returns true if packets were sent to this address lately.
    pub(crate) fn contains(&self, ip: IpAddr, now: Instant) -> bool {
        let all = self.lock();
        let sent = all.get(&ip.to_canonical());
        sent.is_some_and(|sent| now.duration_since(sent.last) < MEMORY)
    }

    /// Returns true if packets were sent to this port of this address lately.
    pub(crate) fn contains_socket(&self, at: SocketAddr, now: Instant) -> bool {
        let all = self.lock();
        let sent = all.get(&at.ip().to_canonical());
        sent.is_some_and(|sent| {
            now.duration_since(sent.last) < MEMORY && (sent.all || sent.ports.contains(&at.port()))
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, Sent>> {
        self.0
            .lock()
            .expect("nothing panics while holding the lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialed_addresses_are_remembered_for_a_limited_time() {
        let dialed = Dialed::default();
        let now = Instant::now();
        let at = |ip: IpAddr| SocketAddr::new(ip, 9338);
        let one: IpAddr = [1, 1, 1, 1].into();
        dialed.note(at(one), now);
        assert!(dialed.contains(one, now));
        assert!(dialed.contains_socket(at(one), now));
        assert!(!dialed.contains_socket(SocketAddr::new(one, 1), now));
        assert!(!dialed.contains([2, 2, 2, 2].into(), now));
        assert!(!dialed.contains(one, now + MEMORY));
        for n in 0..2 * MAX as u32 {
            dialed.note(at(IpAddr::V4(n.into())), now + Duration::from_secs(1));
        }
        assert_eq!(dialed.lock().len(), MAX);
        assert!(!dialed.contains(one, now));
    }

    #[test]
    fn all_ports_count_as_dialed_after_many_were_tried() {
        let (dialed, now) = (Dialed::default(), Instant::now());
        let (one, two): (IpAddr, IpAddr) = ([1, 1, 1, 1].into(), [2, 2, 2, 2].into());
        for port in 1..=MAX_PORTS as u16 + 1 {
            dialed.note(SocketAddr::new(one, port), now);
        }
        dialed.note_all_ports(two, now);
        for ip in [one, two] {
            assert!(dialed.contains_socket(SocketAddr::new(ip, 4000), now));
        }
        // After a long silence a NAT has forgotten the ports.
        let later = now + MEMORY;
        dialed.note(SocketAddr::new(one, 1), later);
        assert!(!dialed.contains_socket(SocketAddr::new(one, 2), later));
    }
}
