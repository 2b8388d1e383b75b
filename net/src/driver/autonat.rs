//! The driver's part in AutoNAT: chooses addresses to ask about and servers to ask, and dials for other nodes.

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

use super::{DialMode, Driver, Outcome, accept, dialing::Dial, opened};
use crate::{
    AutonatLimits, Class, Filtering, Heard, Incoming, NetworkGroup, PathKind, Shares, Stream,
    Transport,
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

/// Time for which an address stays public after an unknown peer has connected at it, despite reports of servers: two of
/// them may lie.
const PROVEN: Duration = Duration::from_secs(600);

/// Time for which UDP is taken to get through after it did.
const UDP: Duration = Duration::from_secs(600);

/// Pause between two tests whether UDP gets through.
const UDP_AGAIN: Duration = Duration::from_secs(60);

/// Time that a request may take until its address is dialed, including the data that the client sends first.
const REQUEST: Duration = Duration::from_secs(30);

/// Most requests that are refused with a message at a time; further ones are reset.
const MAX_REJECTIONS: usize = 64;

/// The driver's state of AutoNAT.
pub(super) struct Autonat {
    pub(super) requests: Incoming,
    pub(super) backs: Incoming,
    pub(super) verdicts: Verdicts,
    /// Open questions of this node, by nonce.
    asked: HashMap<u64, Asked>,
    pub(super) bounds: Bounds,
    /// Dials that this node makes for other nodes.
    probes: HashMap<ConnectionId, Probe>,
    /// Dials that took too long. Connections that they still lead to are closed.
    given_up: HashSet<ConnectionId>,
    /// Times at which UDP last got through, and was last tested.
    udp_through: Option<Instant>,
    udp_tried: Option<Instant>,
    udp_blocked: bool,
    /// Requests that are being refused.
    rejections: Shares,
}

/// A question that a server was asked.
struct Asked {
    server: PeerId,
    question: DialQuestion,
    /// The dial-back that has arrived: its kind and its source IP address.
    came: Option<(Back, IpAddr)>,
}

/// A dial for another node.
struct Probe {
    stream: Stream,
    wanted: Wanted,
    since: Instant,
}

/// A server's answer.
#[derive(Debug)]
pub(super) struct Answer {
    address: Multiaddr,
    server_ip: IpAddr,
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

    /// Returns true if UDP gets out; `None` if it has not been tried.
    pub(super) fn has_udp(&self) -> Option<bool> {
        match (self.udp_through, self.udp_blocked) {
            (Some(_), false) => Some(true),
            (_, true) => Some(false),
            (None, false) => None,
        }
    }

    /// Records that a connection over UDP was opened to or from another machine.
    pub(super) fn udp_got_through(&mut self, now: Instant) {
        self.udp_through = Some(now);
        self.udp_blocked = false;
    }

    /// Records that a machine that answers over TCP did not answer over UDP.
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
    /// Returns this node's addresses on public networks.
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

    /// Returns the addresses at which a NAT shows this node, one per transport. Dial-backs to them show how the NAT
    /// filters.
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

    /// Returns the addresses shown by a NAT at which unknown peers get in.
    pub(super) fn open_at_nat(&self) -> impl Iterator<Item = Multiaddr> {
        let shown = self.shown_by_nat().into_iter();
        shown.filter(|address| self.autonat.verdicts.of(address) == Some(Verdict::Reached))
    }

    /// Returns how this node's NAT or firewall filters packets to the port of `transport`.
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

    /// Asks servers about the addresses that are due.
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
                // A server that is reached over IPv4 may have no IPv6, and the reverse.
                .filter(|(_, server_ip)| server_ip.is_ipv4() == v4 && !tried.covers(server_ip));
            // Prefer a server to which this node has never sent packets: its result holds for any unknown peer.
            let best = fitting
                .min_by_key(|(_, server_ip)| self.addressing.dialed.contains(*server_ip, now));
            match best {
                Some((server, server_ip)) => self.ask_server(*server, *server_ip, address),
                None => self.autonat.verdicts.put_off(&address, now),
            }
        }
    }

    /// Returns connected AutoNAT servers outside this node's networks, with their IP addresses, in a different order
    /// each time.
    fn autonat_servers(&self) -> Vec<(PeerId, IpAddr)> {
        let (own, seen) = (self.own_ips(), self.addressing.reach.seen_at());
        let servers = self.peers.iter().filter(|(_, peer)| peer.autonat);
        // The order of the map is random.
        servers
            .filter_map(|(id, peer)| {
                let direct = peer.connections.values();
                let mut direct = direct.filter(|c| c.path.kind == PathKind::Direct);
                let ip = socket(&direct.next()?.path.address)?.0.ip().to_canonical();
                let outside = is_public(&ip) && !own.contains(&ip) && !seen.contains(&ip);
                outside.then_some((*id, ip))
            })
            .collect()
    }

    fn ask_server(&mut self, server: PeerId, server_ip: IpAddr, address: Multiaddr) {
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
            let answer = Answer {
                address,
                server_ip,
                nonce,
                result,
            };
            // The network may have stopped.
            let _ = outcomes.send(Outcome::AutonatAnswer(answer)).await;
        });
    }

    /// Builds the question about `address` from this node's current addresses and port mappings.
    fn question(&self, address: &Multiaddr) -> Option<DialQuestion> {
        let (at, transport) = socket(address)?;
        let own = self.own_ips().contains(&at.ip().to_canonical());
        let mut mapped = self.ports.forwarded();
        // A gateway forwards a mapped port for all senders, and there is no NAT before an interface's public address.
        let open = own || mapped.any(|(t, mapped)| t == transport && mapped == at);
        Some(DialQuestion {
            at,
            transport,
            own,
            open,
            since: Instant::now(),
        })
    }

    /// Handles a stream that a server has opened to prove its dial-back.
    pub(super) fn on_called_back(&mut self, mut stream: Stream) {
        let server = stream.peer();
        if !self
            .autonat
            .asked
            .values()
            .any(|asked| asked.server == server)
        {
            // Dropped, and so reset, because this node asked no such server.
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
            tracing::debug!(peer = %server, ?connection, question = ?asked.question, "not a valid dial-back");
            return;
        }
        asked.came = back;
        // Errors of the server do not matter here.
        span::spawn(server, autonat::acknowledge(stream));
    }

    pub(super) fn on_answer(&mut self, answer: Answer) {
        let now = Instant::now();
        let Answer {
            address,
            server_ip,
            nonce,
            result,
        } = answer;
        let asked = self.autonat.asked.remove(&nonce);
        let came = asked.and_then(|asked| asked.came);
        let own = socket(&address)
            .is_some_and(|(at, _)| self.own_ips().contains(&at.ip().to_canonical()));
        let reached = match (result, came) {
            (Ok(_), Some(came)) => Some(came),
            (Ok(false), None) => None,
            (Ok(true), None) => {
                tracing::debug!(
                    %address,
                    place = %server_ip,
                    "a server claims to have reached this node, but no dial-back came"
                );
                return self.autonat.verdicts.put_off(&address, now);
            }
            (Err(error), _) => {
                tracing::debug!(%address, place = %server_ip, %error, "a server gave no result");
                return self.autonat.verdicts.put_off(&address, now);
            }
        };
        if !self
            .autonat
            .verdicts
            .record(&address, server_ip, reached, now)
        {
            return;
        }
        let verdict = self.autonat.verdicts.of(&address);
        tracing::info!(%address, ?verdict, "reachability of an address has changed");
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
        self.publish_addresses();
    }

    /// Handles a peer's request to be dialed.
    pub(super) fn on_dial_request(&mut self, mut stream: Stream) {
        let (peer, now) = (stream.peer(), Instant::now());
        let from = match stream.path().kind {
            PathKind::Direct => socket(&stream.path().address).map(|(at, _)| at.ip()),
            _ => None,
        };
        let from = from.filter(is_public);
        let Some(from) = from.filter(|from| self.autonat.bounds.begin(peer, *from, now)) else {
            // If too many requests are being refused, the stream is dropped, and so reset.
            let group = NetworkGroup::of(stream.path());
            if let Ok(permit) = self.autonat.rejections.take(peer, group) {
                span::spawn(peer, async move {
                    let _permit = permit;
                    // The peer may ignore the rejection, but must not hold the stream for ever.
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
                    tracing::debug!(%peer, %error, "cannot read a dial request");
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
        let mode = DialMode {
            always: true,
            // From the listening port, which the peer knows, the dial could pass the peer's NAT as an answer.
            new_port: true,
            set_aside: true,
            ..DialMode::default()
        };
        let unverified = heard(Heard::new([wanted.address.clone()])).collect();
        let admitted = self.admit(stream.peer(), unverified, mode);
        if admitted.is_empty() {
            // The rejection keeps the address from being taken for unreachable.
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
        match self.dial_admitted(&admitted, mode) {
            Ok(id) => drop(self.autonat.probes.insert(id, probe)),
            Err(error) => {
                tracing::debug!(%error, "cannot dial for a peer");
                self.probe_failed(probe);
            }
        }
    }

    /// Handles the result of a dial, if it was made for another node. Returns false if it was not.
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
            let nonce_sent = match answer.await {
                Ok(Ok(back)) => autonat::call(back, probe.wanted.nonce).await.is_ok(),
                _ => false,
            };
            // The peer may ignore the answer.
            let _ = autonat::respond(&mut probe.stream, &probe.wanted, true, nonce_sent).await;
            // The network may have stopped.
            let _ = outcomes.send(Outcome::Probed(id)).await;
        });
        true
    }

    fn probe_failed(&mut self, mut probe: Probe) {
        self.autonat.bounds.ended();
        span::spawn(probe.stream.peer(), async move {
            // The peer may ignore the answer.
            let _ = autonat::respond(&mut probe.stream, &probe.wanted, false, false).await;
        });
    }

    pub(super) fn on_probed(&mut self, id: ConnectionId) {
        self.autonat.bounds.ended();
        self.swarm.close_connection(id);
    }

    /// Answers requests whose dial takes too long, without waiting for its end.
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

    /// Tests whether UDP gets through, if that is not known: dials a peer by QUIC that is connected by TCP.
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
        let mode = DialMode {
            always: true,
            ..DialMode::default()
        };
        let unverified = heard(Heard::new([address])).collect();
        let admitted = self.admit(peer, unverified, mode);
        if admitted.is_empty() {
            return;
        }
        if let Ok(id) = self.dial_admitted(&admitted, mode) {
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
