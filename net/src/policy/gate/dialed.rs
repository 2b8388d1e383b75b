//! Addresses to which this node has sent packets lately. Packets from these addresses prove nothing about strangers,
//! because a NAT or a firewall lets answers through.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// How long a NAT or firewall may remember what was sent: an hour and more for an open TCP connection, but that is ours then.
const MEMORY: Duration = Duration::from_secs(600);

/// Addresses remembered; beyond, the oldest goes. The gate admits 512 unproven destinations a minute: nobody can wash
/// an address out by naming others within [`MEMORY`].
const MAX: usize = 8192;

/// Ports remembered of one address; beyond, all of them count. A node listens on three.
const MAX_PORTS: usize = 16;

/// The time at which this node last sent to one address, and the ports to which it has sent.
#[derive(Debug)]
struct Sent {
    last: Instant,
    ports: HashSet<u16>,
    /// To any port.
    all: bool,
}

/// Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dialed(Arc<Mutex<HashMap<IpAddr, Sent>>>);

impl Dialed {
    /// Something is sent to this socket.
    pub(crate) fn note(&self, at: SocketAddr, now: Instant) {
        self.remember(at.ip(), Some(at.port()), now);
    }

    /// Something is sent to many ports of this address.
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

    /// Returns true if something was sent to this address.
    pub(crate) fn contains(&self, ip: IpAddr, now: Instant) -> bool {
        let all = self.lock();
        let sent = all.get(&ip.to_canonical());
        sent.is_some_and(|sent| now.duration_since(sent.last) < MEMORY)
    }

    /// Returns true if something was sent to this port of this address.
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
    fn what_was_dialed_is_remembered_for_a_while_and_not_without_end() {
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
    fn an_address_of_which_many_ports_were_tried_counts_with_all_of_them() {
        let (dialed, now) = (Dialed::default(), Instant::now());
        let (one, two): (IpAddr, IpAddr) = ([1, 1, 1, 1].into(), [2, 2, 2, 2].into());
        for port in 1..=MAX_PORTS as u16 + 1 {
            dialed.note(SocketAddr::new(one, port), now);
        }
        dialed.note_all_ports(two, now);
        for ip in [one, two] {
            assert!(dialed.contains_socket(SocketAddr::new(ip, 4000), now));
        }
        // After a long silence a NAT has forgotten them.
        let later = now + MEMORY;
        dialed.note(SocketAddr::new(one, 1), later);
        assert!(!dialed.contains_socket(SocketAddr::new(one, 2), later));
    }
}
