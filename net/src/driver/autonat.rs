//! AutoNAT as the driver deals with it: which of our addresses to ask about, whom, and dialing for others.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::IpAddr,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    swarm::{ConnectionId, NetworkBehaviour},
};
use tokio::{sync::oneshot, time::timeout};

use super::{Driver, How, Outcome, accept, dialing::Dial, opened};
use crate::{
    AutonatLimits, Class, Filtering, Heard, Incoming, PathKind, Place, Shares, Stream, Transport,
    address::{is_public, of_socket, socket},
    exchange::within,
    nat::autonat::{
        self, AutonatError, Back, Bounds, DIAL, DIAL_BACK, DIAL_REQUEST, DialQuestion, Inbound,
        Verdict, Verdicts, Wanted,
    },
    policy::gate::heard,
    span,
    streams::Protocols,
};

/// An address at which a stranger has come in is not given up for this long, whatever servers say: two of them may lie.
const PROVEN: Duration = Duration::from_secs(600);

/// How long it is taken for granted that UDP gets through, once it has.
const UDP: Duration = Duration::from_secs(600);

/// Between two tries whether UDP gets through.
const UDP_AGAIN: Duration = Duration::from_secs(60);

/// How long a request may take until the address in it is dialed, with all that is sent in advance.
const REQUEST: Duration = Duration::from_secs(30);

/// Requests to be dialed that are refused with a message at a time; what is beyond is reset.
const MAX_REJECTIONS: usize = 64;

/// What the driver remembers of it.
pub(super) struct Autonat {
    pub(super) requests: Incoming,
    pub(super) backs: Incoming,
    pub(super) verdicts: Verdicts,
    /// What we have asked, by nonce.
    asked: HashMap<u64, Asked>,
    pub(super) bounds: Bounds,
    /// What we dial for others.
    probes: HashMap<ConnectionId, Probe>,
    /// Those that were given up. What comes of them is closed.
    given_up: HashSet<ConnectionId>,
    /// When UDP last got through, and when it was last tried.
    udp_through: Option<Instant>,
    udp_tried: Option<Instant>,
    udp_blocked: bool,
    /// Requests to be dialed that are being refused.
    rejections: Shares,
}

/// What a server was asked.
struct Asked {
    server: PeerId,
    question: DialQuestion,
    /// Its dial has come: how, and from which IP address.
    came: Option<(Back, IpAddr)>,
}

/// A dial for somebody else.
struct Probe {
    stream: Stream,
    wanted: Wanted,
    since: Instant,
}

/// What a server said.
#[derive(Debug)]
pub(super) struct Told {
    address: Multiaddr,
    place: IpAddr,
    nonce: u64,
    result: Result<bool, AutonatError>,
}

impl Autonat {
    pub(super) fn new(protocols: &Protocols, limits: AutonatLimits) -> Self {
        Self {
            requests: accept(protocols, DIAL_REQUEST),
            backs: accept(protocols, DIAL_BACK),
            verdicts: Verdicts::default(),
            asked: HashMap::new(),
            bounds: Bounds::new(limits),
            probes: HashMap::new(),
            given_up: HashSet::new(),
            udp_through: None,
            udp_tried: None,
            udp_blocked: false,
            rejections: Shares::new(MAX_REJECTIONS, 1),
        }
    }

    /// Whether UDP gets out; `None`: it has not been tried.
    pub(super) fn has_udp(&self) -> Option<bool> {
        match (self.udp_through, self.udp_blocked) {
            (Some(_), false) => Some(true),
            (_, true) => Some(false),
            (None, false) => None,
        }
    }

    /// A connection over UDP was opened to or from another machine.
    pub(super) fn udp_got_through(&mut self, now: Instant) {
        self.udp_through = Some(now);
        self.udp_blocked = false;
    }

    /// Nothing came back over UDP from a machine that answers over TCP.
    pub(super) fn udp_got_lost(&mut self, now: Instant) {
        let lately = self
            .udp_through
            .is_some_and(|at| now.duration_since(at) < UDP);
        if !lately {
            self.udp_blocked = true;
        }
    }
}

impl<E> Driver<E>
where
    E: NetworkBehaviour<ToSwarm = Infallible>,
{
    /// Our addresses on public networks.
    fn own_public(&self) -> Vec<Multiaddr> {
        let own = self
            .swarm
            .listeners()
            .filter(|address| socket(address).is_some_and(|(at, _)| is_public(&at.ip())));
        own.map(|address| crate::split_peer_id(address.clone()).0)
            .collect()
    }

    fn own_ips(&self) -> HashSet<IpAddr> {
        let own = self.swarm.listeners().filter_map(socket);
        own.map(|(at, _)| at.ip().to_canonical()).collect()
    }

    /// Where a NAT shows us, one address a transport. Whether others get in there tells how it filters.
    fn shown_by_nat(&self) -> Vec<Multiaddr> {
        let own = self.own_ips();
        let shown = [Transport::Tcp, Transport::Quic]
            .into_iter()
            .filter_map(|t| {
                let seen = self.addressing.reach.candidates(t).into_iter();
                let mut seen = seen.filter(|at| is_public(&at.ip()) && !own.contains(&at.ip()));
                Some(of_socket(seen.next()?, t))
            });
        shown.collect()
    }

    /// Addresses that a NAT shows, and at which strangers do get in.
    pub(super) fn open_at_nat(&self) -> impl Iterator<Item = Multiaddr> {
        let shown = self.shown_by_nat().into_iter();
        shown.filter(|address| self.autonat.verdicts.of(address) == Some(Verdict::Reached))
    }

    /// How the NAT or firewall before us filters what comes to the port of `transport`.
    pub(super) fn filtering(&self, transport: Transport) -> Filtering {
        let of = |address: &Multiaddr| {
            let right = socket(address).is_some_and(|(at, t)| t == transport && at.is_ipv4());
            self.autonat.verdicts.of(address).filter(|_| right)
        };
        let addresses = self.shown_by_nat().into_iter().chain(self.own_public());
        match addresses.filter_map(|address| of(&address)).next() {
            Some(Verdict::Reached) => Filtering::EndpointIndependent,
            Some(Verdict::ByContacts) => Filtering::AddressDependent,
            Some(Verdict::Unreachable) => Filtering::AddressAndPortDependent,
            None => Filtering::Unknown,
        }
    }

    /// Asks about the addresses that are due.
    pub(super) fn verify_addresses(&mut self) {
        let now = Instant::now();
        let mut candidates: Vec<_> = self.addressing.configured.iter().cloned().collect();
        candidates.sort_by_key(Multiaddr::to_vec);
        candidates.retain(|address| socket(address).is_some());
        candidates.extend(self.own_public());
        candidates.extend(self.ports.forwarded().map(|(t, at)| of_socket(at, t)));
        candidates.extend(self.shown_by_nat());
        let due = self.autonat.verdicts.due(&candidates, now);
        if due.is_empty() {
            return;
        }
        let servers = self.autonat_servers();
        if servers.is_empty() {
            return;
        }
        for address in due {
            let tried = self.autonat.verdicts.tried(&address);
            let v4 = socket(&address).is_some_and(|(at, _)| at.is_ipv4());
            let fitting = servers
                .iter()
                // One that is reached by IPv4 may have no IPv6, and the reverse.
                .filter(|(_, place)| place.is_ipv4() == v4 && !tried.covers(place));
            // Best one that we have never sent to: what it finds, any stranger would.
            let best =
                fitting.min_by_key(|(_, place)| self.addressing.dialed.contains(*place, now));
            match best {
                Some((server, place)) => self.ask_server(*server, *place, address),
                None => self.autonat.verdicts.put_off(&address, now),
            }
        }
    }

    /// Peers in other places that answer, and where they are. Another order each time.
    fn autonat_servers(&self) -> Vec<(PeerId, IpAddr)> {
        let (own, seen) = (self.own_ips(), self.addressing.reach.seen_at());
        let servers = self.peers.iter().filter(|(_, peer)| peer.autonat);
        // A map's order is no order.
        servers
            .filter_map(|(id, peer)| {
                let direct = peer.connections.values();
                let mut direct = direct.filter(|c| c.path.kind == PathKind::Direct);
                let ip = socket(&direct.next()?.path.address)?.0.ip().to_canonical();
                let elsewhere = is_public(&ip) && !own.contains(&ip) && !seen.contains(&ip);
                elsewhere.then_some((*id, ip))
            })
            .collect()
    }

    fn ask_server(&mut self, server: PeerId, place: IpAddr, address: Multiaddr) {
        let mut nonce = [0; 8];
        if getrandom::fill(&mut nonce).is_err() {
            return self.autonat.verdicts.put_off(&address, Instant::now());
        }
        let nonce = u64::from_le_bytes(nonce);
        let Some(question) = self.question(&address) else {
            return self.autonat.verdicts.put_off(&address, Instant::now());
        };
        let asked = Asked {
            server,
            question,
            came: None,
        };
        self.autonat.asked.insert(nonce, asked);
        self.autonat.verdicts.ask(&address);
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open(server, DIAL_REQUEST, Class::Control, reply);
        let outcomes = self.outcomes.clone();
        span::spawn(server, async move {
            let result = match opened(answer).await {
                Ok(stream) => autonat::ask(stream, &address, nonce).await,
                Err(error) => Err(error.into()),
            };
            let told = Told {
                address,
                place,
                nonce,
                result,
            };
            // The network may have stopped.
            let _ = outcomes.send(Outcome::Told(told)).await;
        });
    }

    /// Builds the question about `address` from this node's current addresses and port mappings.
    fn question(&self, address: &Multiaddr) -> Option<DialQuestion> {
        let (at, transport) = socket(address)?;
        let own = self.own_ips().contains(&at.ip().to_canonical());
        let mut mapped = self.ports.forwarded();
        // A gateway forwards a mapped port for everybody, and an address of our own has no NAT before it.
        let open = own || mapped.any(|(t, mapped)| t == transport && mapped == at);
        Some(DialQuestion {
            at,
            transport,
            own,
            open,
            since: Instant::now(),
        })
    }

    /// A server has opened a stream on a connection that it has dialed for us.
    pub(super) fn on_called_back(&mut self, mut stream: Stream) {
        let server = stream.peer();
        if !self
            .autonat
            .asked
            .values()
            .any(|asked| asked.server == server)
        {
            // Dropped, and so reset: nobody has asked.
            return;
        }
        let outcomes = self.outcomes.clone();
        span::spawn(server, async move {
            if let Ok(nonce) = autonat::answer(&mut stream).await {
                // The network may have stopped.
                let _ = outcomes.send(Outcome::CalledBack { stream, nonce }).await;
            }
        });
    }

    pub(super) fn on_nonce(&mut self, stream: Stream, nonce: u64) {
        let now = Instant::now();
        let server = stream.peer();
        let Some(asked) = self.autonat.asked.get_mut(&nonce) else {
            return;
        };
        if asked.server != server {
            return;
        }
        // The server knows the nonce from the request, so it can send it on any connection and on a lane; that alone
        // proves nothing.
        let connections = self.peers.get(&server).map(|peer| &peer.connections);
        let connection = stream
            .connection()
            .and_then(|id| connections?.get(&id))
            .and_then(|c| {
                let (local, transport) = c.local?;
                let (from, _) = socket(&c.path.address)?;
                Some(Inbound {
                    local,
                    from,
                    transport,
                    since: c.since,
                })
            });
        let chosen = self.bootstrap.iter().any(|b| b.peer == server);
        let back = connection.as_ref().and_then(|connection| {
            let question = &asked.question;
            let back = question.answered_by(connection, &self.addressing.dialed, chosen, now)?;
            Some((back, connection.from.ip()))
        });
        if back.is_none() {
            tracing::debug!(peer = %server, ?connection, question = ?asked.question, "no dial-back");
            return;
        }
        asked.came = back;
        // How it takes it is its affair.
        span::spawn(server, autonat::acknowledge(stream));
    }

    pub(super) fn on_told(&mut self, told: Told) {
        let now = Instant::now();
        let Told {
            address,
            place,
            nonce,
            result,
        } = told;
        let asked = self.autonat.asked.remove(&nonce);
        let came = asked.and_then(|asked| asked.came);
        let own = socket(&address)
            .is_some_and(|(at, _)| self.own_ips().contains(&at.ip().to_canonical()));
        let reached = match (result, came) {
            (Ok(_), Some(came)) => Some(came),
            (Ok(false), None) => None,
            (Ok(true), None) => {
                tracing::debug!(%address, %place, "a server claims to have reached us and has not");
                return self.autonat.verdicts.put_off(&address, now);
            }
            (Err(error), _) => {
                tracing::debug!(%address, %place, %error, "a server does not say whether it reaches us");
                return self.autonat.verdicts.put_off(&address, now);
            }
        };
        if !self.autonat.verdicts.told(&address, place, reached, now) {
            return;
        }
        let verdict = self.autonat.verdicts.of(&address);
        tracing::info!(%address, ?verdict, "whether others reach this node here");
        if own {
            match verdict {
                Some(Verdict::Reached) => {
                    self.addressing.public.entry(address).or_insert(now);
                }
                Some(Verdict::Unreachable) => {
                    let lately = |at: &Instant| now.duration_since(*at) < PROVEN;
                    if !self.addressing.public.get(&address).is_some_and(lately) {
                        self.addressing.public.remove(&address);
                    }
                }
                Some(Verdict::ByContacts) | None => {}
            }
        }
        self.update_relay_server();
        self.tell_addresses();
    }

    /// Somebody asks to be dialed.
    pub(super) fn on_dial_request(&mut self, mut stream: Stream) {
        let (peer, now) = (stream.peer(), Instant::now());
        let from = match stream.path().kind {
            PathKind::Direct => socket(&stream.path().address).map(|(at, _)| at.ip()),
            _ => None,
        };
        let from = from.filter(is_public);
        let Some(from) = from.filter(|from| self.autonat.bounds.begin(peer, *from, now)) else {
            // Dropped, and so reset, if too many are being refused.
            let place = Place::of(stream.path());
            if let Ok(permit) = self.autonat.rejections.take(peer, place) {
                span::spawn(peer, async move {
                    let _permit = permit;
                    // The peer may take it or not, but not for ever.
                    let _ = timeout(REQUEST, autonat::reject(&mut stream)).await;
                });
            }
            return;
        };
        let mut mine = self.addressing.reach.seen_at();
        mine.extend(self.own_ips());
        let outcomes = self.outcomes.clone();
        span::spawn(peer, async move {
            let received = within(REQUEST, autonat::receive(&mut stream, from, &mine));
            let wanted = match received.await {
                Ok(wanted) => wanted,
                Err(error) => {
                    tracing::debug!(%peer, %error, "a request to be dialed came to nothing");
                    None
                }
            };
            // The network may have stopped.
            let _ = outcomes.send(Outcome::ToDial { stream, wanted }).await;
        });
    }

    pub(super) fn on_to_dial(&mut self, stream: Stream, wanted: Option<Wanted>) {
        let Some(wanted) = wanted else {
            return self.autonat.bounds.ended();
        };
        let how = How {
            always: true,
            // From the port that it knows, its NAT might let us in.
            new_port: true,
            set_aside: true,
            ..How::default()
        };
        let stated = heard(Heard::new([wanted.address.clone()])).collect();
        let admitted = self.admit(stream.peer(), stated, how);
        if admitted.is_empty() {
            // Not to be taken for an address that cannot be reached.
            self.autonat.bounds.ended();
            let mut stream = stream;
            // The peer may ignore the rejection.
            span::spawn(
                stream.peer(),
                async move { autonat::reject(&mut stream).await },
            );
            return;
        }
        let probe = Probe {
            stream,
            wanted,
            since: Instant::now(),
        };
        match self.dial_admitted(&admitted, how) {
            Ok(id) => drop(self.autonat.probes.insert(id, probe)),
            Err(error) => {
                tracing::debug!(%error, "cannot dial for a peer");
                self.probe_failed(probe);
            }
        }
    }

    /// Whether a connection that has opened, or has not, was dialed for somebody else.
    pub(super) fn on_probe(&mut self, id: ConnectionId, connected: bool) -> bool {
        if self.autonat.given_up.remove(&id) {
            if connected {
                self.swarm.close_connection(id);
            }
            return true;
        }
        let Some(mut probe) = self.autonat.probes.remove(&id) else {
            return false;
        };
        if !connected {
            self.probe_failed(probe);
            return true;
        }
        let (reply, answer) = oneshot::channel();
        let streams = &mut self.swarm.behaviour_mut().streams;
        streams.open_on(probe.stream.peer(), id, DIAL_BACK, reply);
        let outcomes = self.outcomes.clone();
        span::spawn_on(probe.stream.peer(), id, async move {
            let told = match answer.await {
                Ok(Ok(back)) => autonat::call(back, probe.wanted.nonce).await.is_ok(),
                _ => false,
            };
            // How it takes it is its affair.
            let _ = autonat::respond(&mut probe.stream, &probe.wanted, true, told).await;
            // The network may have stopped.
            let _ = outcomes.send(Outcome::Probed(id)).await;
        });
        true
    }

    fn probe_failed(&mut self, mut probe: Probe) {
        self.autonat.bounds.ended();
        span::spawn(probe.stream.peer(), async move {
            // How it takes it is its affair.
            let _ = autonat::respond(&mut probe.stream, &probe.wanted, false, false).await;
        });
    }

    pub(super) fn on_probed(&mut self, id: ConnectionId) {
        self.autonat.bounds.ended();
        self.swarm.close_connection(id);
    }

    /// Dials that take too long are answered without waiting for their end.
    pub(super) fn expire_probes(&mut self) {
        let now = Instant::now();
        let late = self
            .autonat
            .probes
            .extract_if(|_, probe| now.duration_since(probe.since) >= DIAL);
        for (id, probe) in late.collect::<Vec<_>>() {
            self.autonat.given_up.insert(id);
            self.probe_failed(probe);
        }
    }

    /// Dials one peer by QUIC that is connected by TCP, to find out whether UDP gets through, if that is not known.
    pub(super) fn try_udp(&mut self) {
        let now = Instant::now();
        let tried = self.autonat.udp_tried;
        let known = self.autonat.has_udp() == Some(true);
        if known || tried.is_some_and(|at| now.duration_since(at) < UDP_AGAIN) {
            return;
        }
        let target = self.peers.iter().find_map(|(id, peer)| {
            let over_tcp = peer
                .connections
                .values()
                .any(|c| c.dialed && !c.punched && c.path.kind == PathKind::Direct);
            let quic = peer.quic.as_ref().filter(|_| over_tcp)?;
            Some((*id, quic.clone()))
        });
        let Some((peer, address)) = target else {
            return;
        };
        self.autonat.udp_tried = Some(now);
        let how = How {
            always: true,
            ..How::default()
        };
        let stated = heard(Heard::new([address])).collect();
        let admitted = self.admit(peer, stated, how);
        if admitted.is_empty() {
            return;
        }
        if let Ok(id) = self.dial_admitted(&admitted, how) {
            let addresses = admitted.addresses().to_vec();
            self.dialing.dials.insert(
                id,
                Dial {
                    peer,
                    addresses,
                    name: None,
                },
            );
        }
    }
}

#[cfg(test)]
mod tests;
