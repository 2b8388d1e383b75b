//! Addresses to which this node has sent packets lately. Packets from these addresses prove nothing about strangers,
//! because a NAT or a firewall lets answers through.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use libp2p::{
    Multiaddr, Transport, TransportError,
    core::transport::{DialOpts, ListenerId, TransportEvent},
};

use tokio::time::timeout;

use crate::{
    Transport as Kind,
    access::{KeptOut, Shared},
    address::any_socket,
    gate::Gate,
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
pub(crate) struct Dialled(Arc<Mutex<HashMap<IpAddr, Sent>>>);

impl Dialled {
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

/// Nothing has asked the gate whether this socket may be dialled.
#[derive(Debug, thiserror::Error)]
#[error("the gate holds no permit for this destination")]
pub(crate) struct NoPermit;

/// A transport that notes what it dials, and tells when each connection began. Below everything that takes addresses
/// apart, it sees where packets really go. It holds to the access lists, and refuses a destination for which the
/// [`Gate`] holds no permit: a dial that went around the gate ends here.
#[derive(Debug)]
pub(crate) struct Noted<T> {
    inner: T,
    dialled: Dialled,
    access: Shared,
    gate: Gate,
    /// The transport that it carries: a permit for TCP is not used up by QUIC, nor the reverse.
    kind: Kind,
}

impl<T> Noted<T> {
    /// `kind`: TCP or QUIC, whichever `inner` is.
    pub(crate) fn new(inner: T, kind: Kind, dialled: Dialled, access: Shared, gate: Gate) -> Self {
        Self {
            kind,
            inner,
            dialled,
            access,
            gate,
        }
    }
}

impl<T> Transport for Noted<T>
where
    T: Transport<Error = io::Error> + Unpin,
    T::Output: Send + 'static,
    T::Dial: Send + 'static,
    T::ListenerUpgrade: Send + 'static,
{
    type Output = (T::Output, Instant);
    type Error = io::Error;
    type ListenerUpgrade = BoxFuture<'static, Result<Self::Output, io::Error>>;
    type Dial = BoxFuture<'static, Result<Self::Output, io::Error>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.inner.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        options: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        // What has more parts than these may lead elsewhere than where it seems to.
        let Some((at, _)) = any_socket(&address).filter(|(_, kind)| *kind == self.kind) else {
            return Err(TransportError::MultiaddrNotSupported(address));
        };
        let ip = at.ip().to_canonical();
        if !self.access.get().admits(None, Some(&ip)) {
            return Err(TransportError::Other(io::Error::new(
                io::ErrorKind::PermissionDenied,
                KeptOut,
            )));
        }
        let begin = Instant::now();
        let udp = self.kind == Kind::Quic;
        let Some(permit) = self.gate.take_permit(at, udp, begin) else {
            tracing::warn!(%address, "refused: a dial that has not passed the gate");
            return Err(TransportError::Other(io::Error::new(
                io::ErrorKind::PermissionDenied,
                NoPermit,
            )));
        };
        let dial = self.inner.dial(address, options)?;
        self.dialled.note(at, begin);
        let dial = dial.map_ok(move |output| (output, begin));
        Ok(match permit.patience {
            None => dial.boxed(),
            // Nobody has shown to be there: not many packets into the void.
            Some(patience) => timeout(patience, dial)
                .map(|dialled| dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())))
                .boxed(),
        })
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Pin::new(&mut self.inner).poll(cx).map(|event| {
            event.map_upgrade(|upgrade| upgrade.map_ok(|output| (output, Instant::now())).boxed())
        })
    }
}

#[cfg(test)]
mod tests {
    use libp2p::{
        core::{Endpoint, transport::PortUse},
        tcp,
    };

    use super::*;

    /// Any future caller of the transport reaches nothing without the gate.
    #[tokio::test]
    async fn a_dial_that_goes_around_the_gate_reaches_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", at.port()).parse().unwrap();
        let gate = Gate::new(std::iter::empty());
        let tcp = tcp::tokio::Transport::new(tcp::Config::default());
        let mut noted = Noted::new(
            tcp,
            Kind::Tcp,
            Dialled::default(),
            Shared::default(),
            gate.clone(),
        );
        let options = DialOpts {
            role: Endpoint::Dialer,
            port_use: PortUse::New,
        };
        let Err(TransportError::Other(error)) = noted.dial(address.clone(), options) else {
            panic!("dialled without a permit");
        };
        assert!(error.get_ref().unwrap().is::<NoPermit>());
        let came = timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(came.is_err());
        gate.give(address.clone());
        noted.dial(address.clone(), options).unwrap().await.unwrap();
        // Each permit once.
        assert!(noted.dial(address, options).is_err());
    }

    #[test]
    fn what_was_dialled_is_remembered_for_a_while_and_not_without_end() {
        let dialled = Dialled::default();
        let now = Instant::now();
        let at = |ip: IpAddr| SocketAddr::new(ip, 9338);
        let one: IpAddr = [1, 1, 1, 1].into();
        dialled.note(at(one), now);
        assert!(dialled.contains(one, now));
        assert!(dialled.contains_socket(at(one), now));
        assert!(!dialled.contains_socket(SocketAddr::new(one, 1), now));
        assert!(!dialled.contains([2, 2, 2, 2].into(), now));
        assert!(!dialled.contains(one, now + MEMORY));
        for n in 0..2 * MAX as u32 {
            dialled.note(at(IpAddr::V4(n.into())), now + Duration::from_secs(1));
        }
        assert_eq!(dialled.lock().len(), MAX);
        assert!(!dialled.contains(one, now));
    }

    #[test]
    fn an_address_of_which_many_ports_were_tried_counts_with_all_of_them() {
        let (dialled, now) = (Dialled::default(), Instant::now());
        let (one, two): (IpAddr, IpAddr) = ([1, 1, 1, 1].into(), [2, 2, 2, 2].into());
        for port in 1..=MAX_PORTS as u16 + 1 {
            dialled.note(SocketAddr::new(one, port), now);
        }
        dialled.note_all_ports(two, now);
        for ip in [one, two] {
            assert!(dialled.contains_socket(SocketAddr::new(ip, 4000), now));
        }
        // After a long silence a NAT has forgotten them.
        let later = now + MEMORY;
        dialled.note(SocketAddr::new(one, 1), later);
        assert!(!dialled.contains_socket(SocketAddr::new(one, 2), later));
    }
}
