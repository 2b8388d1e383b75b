//! AutoNAT v2 (<https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md>): asks servers whether they reach
//! this node at an address, and answers such questions for other nodes.
//!
//! libp2p's own server dials any address that it is asked to dial, even a private one, as often as it is asked; its
//! client never asks again. This server dials only public addresses, within rates in total, per peer and per network.
//! This client repeats its questions ([`Verdicts`]).
//!
//! This module has the exchanges and the bookkeeping. The driver dials.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt, io,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use weft_proto::wire::{
    AutonatDataRequest, AutonatDataResponse, AutonatDialBack, AutonatDialBackResponse,
    AutonatDialRequest, AutonatDialResponse, AutonatDialStatus, AutonatMessage,
    autonat_dial_response::Status, autonat_message::Msg,
};

use crate::{
    AutonatLimits, Transport,
    address::{is_public, network, socket},
    exchange::{self, ExchangeError, within},
    policy::gate::dialed::Dialed,
};

/// The protocol from a client to a server.
pub(crate) const DIAL_REQUEST: StreamProtocol =
    StreamProtocol::new("/libp2p/autonat/2/dial-request");

/// The protocol from a server to a client, on the connection that the server has dialed.
pub(crate) const DIAL_BACK: StreamProtocol = StreamProtocol::new("/libp2p/autonat/2/dial-back");

/// Largest message, in bytes.
const MAX_MESSAGE: usize = 8 * 1024;

/// Time that the remote end may take for a message.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time that a whole exchange may take at the client; it includes the server's dial.
const EXCHANGE: Duration = Duration::from_secs(30);

/// Time that a server may take to dial.
pub(crate) const DIAL: Duration = Duration::from_secs(10);

/// Most addresses read from a request.
const MAX_ADDRESSES: usize = 16;

/// Bytes that a client has to send before the server dials an address at which it does not see the client. They are
/// more than the dial sends there, so that no client can use this node to amplify traffic to a third party. The amount
/// is drawn between these two.
const DATA: (u64, u64) = (30_000, 100_000);

/// Most bytes that a client sends on demand: a little more than a server may ask for.
const MAX_DATA: u64 = 120_000;

/// Bytes of this data in one message.
const DATA_CHUNK: usize = 4096;

/// The reason that an exchange had no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AutonatError {
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the server refused the request")]
    Refused,
    #[error("the peer broke the protocol")]
    Malformed,
}

async fn next<S>(stream: &mut S) -> Result<Msg, AutonatError>
where
    S: AsyncRead + Unpin,
{
    let message: AutonatMessage = within(PATIENCE, exchange::receive(stream, MAX_MESSAGE)).await?;
    message.msg.ok_or(AutonatError::Malformed)
}

async fn say<S>(stream: &mut S, msg: Msg) -> Result<(), AutonatError>
where
    S: AsyncWrite + Unpin,
{
    let message = AutonatMessage { msg: Some(msg) };
    Ok(within(PATIENCE, exchange::send(stream, &message, MAX_MESSAGE)).await?)
}

/// Asks a server whether it reaches `address`. A result of `true` is the server's claim; it counts only if the server's
/// dial has arrived ([`answer`]).
pub(crate) async fn ask<S>(
    mut stream: S,
    address: &Multiaddr,
    nonce: u64,
) -> Result<bool, AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let request = AutonatDialRequest {
            addrs: vec![Bytes::from(address.to_vec())],
            nonce,
        };
        say(&mut stream, Msg::DialRequest(request)).await?;
        let mut asked = false;
        loop {
            let message = exchange::receive::<AutonatMessage, _>(&mut stream, MAX_MESSAGE);
            match within(PATIENCE + DIAL, message).await?.msg {
                Some(Msg::DataRequest(wanted)) if !asked && wanted.num_bytes <= MAX_DATA => {
                    asked = true;
                    send_data(&mut stream, wanted.num_bytes).await?;
                }
                Some(Msg::DialResponse(response)) => {
                    return match (response.status(), response.dial_status()) {
                        (Status::Ok, AutonatDialStatus::Ok) => Ok(true),
                        (
                            Status::Ok,
                            AutonatDialStatus::DialError | AutonatDialStatus::DialBackError,
                        ) => Ok(false),
                        (Status::Ok, AutonatDialStatus::Unused) => Err(AutonatError::Malformed),
                        _ => Err(AutonatError::Refused),
                    };
                }
                _ => return Err(AutonatError::Malformed),
            }
        }
    };
    within(EXCHANGE, exchange).await
}

async fn send_data<S>(stream: &mut S, bytes: u64) -> Result<(), AutonatError>
where
    S: AsyncWrite + Unpin,
{
    let mut left = bytes;
    while left > 0 {
        let n = left.min(DATA_CHUNK as u64);
        let data = Bytes::from(vec![0; n as usize]);
        say(stream, Msg::DataResponse(AutonatDataResponse { data })).await?;
        left -= n;
    }
    Ok(())
}

/// An address that a client asks the server to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) address: Multiaddr,
    index: u32,
    pub(crate) nonce: u64,
    /// True if the server does not see the client at this address, so that the client has to send data first.
    needs_data: bool,
}

/// Runs the server's part until it dials: reads the request, and the data that the client has to send first. `from` is
/// the IP address of the client; `mine` are the IP addresses of this node, as seen by itself and by other peers.
/// Returns `Ok(None)` if the request was refused; the client has been told.
pub(crate) async fn receive<S>(
    stream: &mut S,
    from: IpAddr,
    mine: &HashSet<IpAddr>,
) -> Result<Option<Wanted>, AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Msg::DialRequest(request) = next(stream).await? else {
        return Err(AutonatError::Malformed);
    };
    let Some(wanted) = choose(&request, from, mine) else {
        let refusal = AutonatDialResponse {
            status: Status::DialRefused.into(),
            ..AutonatDialResponse::default()
        };
        say(stream, Msg::DialResponse(refusal)).await?;
        return Ok(None);
    };
    if wanted.needs_data {
        let mut random = [0; 8];
        let filled = getrandom::fill(&mut random).map_err(io::Error::other);
        filled.map_err(ExchangeError::from)?;
        let num_bytes = DATA.0 + u64::from_le_bytes(random) % (DATA.1 - DATA.0);
        let request = AutonatDataRequest {
            addr_idx: wanted.index,
            num_bytes,
        };
        say(stream, Msg::DataRequest(request)).await?;
        let mut left = num_bytes;
        while left > 0 {
            let Msg::DataResponse(response) = next(stream).await? else {
                return Err(AutonatError::Malformed);
            };
            // An empty message would make the server wait without end.
            if response.data.is_empty() || response.data.len() > DATA_CHUNK {
                return Err(AutonatError::Malformed);
            }
            left = left.saturating_sub(response.data.len() as u64);
        }
    }
    Ok(Some(wanted))
}

/// Returns the first address that may be dialed. It is public, and at none of this node's own IP addresses: a dial
/// within a network does not show whether the address is reachable from outside.
fn choose(request: &AutonatDialRequest, from: IpAddr, mine: &HashSet<IpAddr>) -> Option<Wanted> {
    let addresses = request.addrs.iter().take(MAX_ADDRESSES).enumerate();
    addresses
        .filter_map(|(index, bytes)| {
            let address = Multiaddr::try_from(bytes.to_vec()).ok()?;
            let address = crate::split_peer_id(address).0;
            let ip = socket(&address)?.0.ip().to_canonical();
            (is_public(&ip) && !mine.contains(&ip)).then_some(Wanted {
                address,
                index: index as u32,
                nonce: request.nonce,
                needs_data: ip != from.to_canonical(),
            })
        })
        .next()
}

/// Sends the server's answer after the dial. `dialed`: a connection was opened; `nonce_sent`: the nonce was delivered
/// as well.
pub(crate) async fn respond<S>(
    stream: &mut S,
    wanted: &Wanted,
    dialed: bool,
    nonce_sent: bool,
) -> Result<(), AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let status = match (dialed, nonce_sent) {
        (true, true) => AutonatDialStatus::Ok,
        (true, false) => AutonatDialStatus::DialBackError,
        (false, _) => AutonatDialStatus::DialError,
    };
    let response = AutonatDialResponse {
        status: Status::Ok.into(),
        addr_idx: wanted.index,
        dial_status: status.into(),
    };
    say(stream, Msg::DialResponse(response)).await?;
    stream.shutdown().await.map_err(ExchangeError::from)?;
    Ok(())
}

/// Refuses a request, at the server, because a limit is reached.
pub(crate) async fn reject<S>(stream: &mut S) -> Result<(), AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let response = AutonatDialResponse {
        status: Status::RequestRejected.into(),
        ..AutonatDialResponse::default()
    };
    say(stream, Msg::DialResponse(response)).await?;
    stream.shutdown().await.map_err(ExchangeError::from)?;
    Ok(())
}

/// Sends the nonce, at the server, on the connection that it has dialed. It proves that the dial came from this server.
pub(crate) async fn call<S>(mut stream: S, nonce: u64) -> Result<(), AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        exchange::send(&mut stream, &AutonatDialBack { nonce }, MAX_MESSAGE).await?;
        let answer = exchange::receive::<AutonatDialBackResponse, _>(&mut stream, MAX_MESSAGE);
        answer.await.map(drop)
    };
    Ok(within(PATIENCE, exchange).await?)
}

/// Reads the nonce, at the client, from a connection that a server dialed. If it is a nonce of this client,
/// [`acknowledge`] follows.
pub(crate) async fn answer<S>(stream: &mut S) -> Result<u64, AutonatError>
where
    S: AsyncRead + Unpin,
{
    let message: AutonatDialBack = within(PATIENCE, exchange::receive(stream, MAX_MESSAGE)).await?;
    Ok(message.nonce)
}

/// Confirms to the server that the nonce was this client's.
pub(crate) async fn acknowledge<S>(mut stream: S) -> Result<(), AutonatError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let answer = AutonatDialBackResponse::default();
        exchange::send(&mut stream, &answer, MAX_MESSAGE).await?;
        stream.shutdown().await?;
        Ok::<_, ExchangeError>(())
    };
    Ok(within(PATIENCE, exchange).await?)
}

/// Limits on dials for clients.
#[derive(Debug)]
pub(crate) struct Bounds {
    limits: AutonatLimits,
    /// Clients served in the last minute, with their network and the time.
    served: VecDeque<(PeerId, IpAddr, Instant)>,
    under_way: usize,
    refused: u64,
}

const MINUTE: Duration = Duration::from_secs(60);

impl Bounds {
    pub(crate) fn new(limits: AutonatLimits) -> Self {
        Self {
            limits,
            served: VecDeque::new(),
            under_way: 0,
            refused: 0,
        }
    }

    /// Returns true if `peer`, at the IP address `from`, may be served; then [`ended`](Self::ended) must follow.
    pub(crate) fn begin(&mut self, peer: PeerId, from: IpAddr, now: Instant) -> bool {
        while self
            .served
            .front()
            .is_some_and(|(.., at)| now.duration_since(*at) >= MINUTE)
        {
            self.served.pop_front();
        }
        let from = network(from);
        let of_peer = self.served.iter().filter(|(other, ..)| *other == peer);
        let of_network = self.served.iter().filter(|(_, other, _)| *other == from);
        let allowed = self.under_way < self.limits.concurrent
            && self.served.len() < self.limits.per_minute
            && of_peer.count() < self.limits.per_minute_per_peer
            && of_network.count() < self.limits.per_minute_per_network;
        if allowed {
            self.served.push_back((peer, from, now));
            self.under_way += 1;
        } else {
            self.refused += 1;
        }
        allowed
    }

    /// Returns the numbers of requests served in the last minute, under way now, and refused since the start.
    pub(crate) fn used(&self, now: Instant) -> (usize, usize, u64) {
        let lately = self
            .served
            .iter()
            .filter(|(.., at)| now.duration_since(*at) < MINUTE);
        (lately.count(), self.under_way, self.refused)
    }

    pub(crate) fn limits(&self) -> AutonatLimits {
        self.limits
    }

    pub(crate) fn ended(&mut self) {
        self.under_way -= 1;
    }
}

/// A question to a server: whether it reaches this node at an address.
#[derive(Debug, Clone)]
pub(crate) struct DialQuestion {
    pub(crate) at: SocketAddr,
    pub(crate) transport: Transport,
    /// True if the address is one of this node's interfaces.
    pub(crate) own: bool,
    /// True if there is no NAT before the address, or a gateway forwards it for all senders.
    pub(crate) open: bool,
    /// Time of the question.
    pub(crate) since: Instant,
}

/// A connection that a peer has opened to this node.
#[derive(Debug, Clone)]
pub(crate) struct Inbound {
    pub(crate) local: SocketAddr,
    pub(crate) from: SocketAddr,
    pub(crate) transport: Transport,
    /// Time at which it was opened.
    pub(crate) since: Instant,
}

/// The kind of dial-back that a server made, by its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Back {
    /// From an IP address to which this node has sent packets: a NAT or firewall may have taken the dial for an answer.
    Contact,
    /// From such an IP address, but from a port to which nothing was sent, and to an address with no NAT before it.
    Open,
    /// From an IP address to which this node has sent nothing, so any peer gets in. Or as in [`Open`](Self::Open), from
    /// a server that the user chose.
    Proven,
}

impl DialQuestion {
    /// Returns the kind of dial-back if the server made it by this connection. Returns `None` if the connection proves
    /// nothing: the server knows the nonce from the request, so it can send the nonce on any stream. `chosen`: the user
    /// named the server.
    pub(crate) fn answered_by(
        &self,
        connection: &Inbound,
        dialed: &Dialed,
        chosen: bool,
        now: Instant,
    ) -> Option<Back> {
        let (local, from) = (canonical(connection.local), canonical(connection.from));
        let at = canonical(self.at);
        let there = match self.own {
            true => local == at,
            // Behind a NAT the local port may differ. A NAT does not forward to a public address of this node.
            false => local.is_ipv4() == at.is_ipv4() && !is_public(&local.ip()),
        };
        let after = connection.since >= self.since;
        if !there || !after || connection.transport != self.transport || !is_public(&from.ip()) {
            return None;
        }
        Some(if !dialed.contains(from.ip(), now) {
            Back::Proven
        } else if self.open && !dialed.contains_socket(from, now) {
            match chosen {
                true => Back::Proven,
                false => Back::Open,
            }
        } else {
            Back::Contact
        })
    }
}

/// Returns the socket address with an IPv4-mapped IPv6 address replaced by the IPv4 address.
fn canonical(at: SocketAddr) -> SocketAddr {
    SocketAddr::new(at.ip().to_canonical(), at.port())
}

/// The reachability of one of this node's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// A peer to which this node has sent nothing has reached it. If there is no NAT before the address, dial-backs
    /// from ports to which nothing was sent count too: one by a server that the user chose, or two by servers in
    /// different networks.
    Reached,
    /// Only peers to which this node has sent packets reach it: a NAT or firewall lets their answers in.
    ByContacts,
    /// Two servers with different IP addresses failed to reach it.
    Unreachable,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reached => "reached",
            Self::ByContacts => "by-contacts",
            Self::Unreachable => "unreachable",
        })
    }
}

/// Pause before an address that was reached is checked again.
const AGAIN: Duration = Duration::from_secs(600);

/// The first and the longest pause before an address that was not reached is checked again.
const RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(1800));

/// Number of servers with different IP addresses that must have failed.
const IN_VAIN: usize = 2;

/// Number of networks from which servers must have come back, if each of them alone may have got in as a contact.
const OPEN: usize = 2;

/// Most addresses whose verdicts are kept.
const MAX_KNOWN: usize = 32;

#[derive(Debug)]
struct Known {
    verdict: Option<Verdict>,
    /// IP addresses of servers that have failed since the last success.
    in_vain: HashSet<IpAddr>,
    /// Networks from which contacts made a dial-back that a port-dependent firewall would not let in.
    open: HashSet<IpAddr>,
    next: Instant,
    pause: Duration,
    asking: bool,
}

/// Servers that need not be asked about an address again now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tried {
    in_vain: HashSet<IpAddr>,
    open: HashSet<IpAddr>,
}

impl Tried {
    /// Returns true if the server at this IP address need not be asked.
    pub(crate) fn covers(&self, ip: &IpAddr) -> bool {
        self.in_vain.contains(ip) || self.open.contains(&network(*ip))
    }
}

/// The verdict on each address of this node, and the time to ask again. A state machine without I/O.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    known: HashMap<Multiaddr, Known>,
}

impl Verdicts {
    /// Returns the addresses among `candidates` to ask about now, and forgets all addresses not among them.
    pub(crate) fn due(&mut self, candidates: &[Multiaddr], now: Instant) -> Vec<Multiaddr> {
        self.known
            .retain(|address, known| known.asking || candidates.contains(address));
        for address in candidates.iter().take(MAX_KNOWN) {
            self.known.entry(address.clone()).or_insert_with(|| Known {
                verdict: None,
                in_vain: HashSet::new(),
                open: HashSet::new(),
                next: now,
                pause: RETRY.0,
                asking: false,
            });
        }
        let due = self
            .known
            .iter()
            .filter(|(_, k)| !k.asking && k.next <= now);
        due.map(|(address, _)| address.clone()).collect()
    }

    /// Returns the servers that need not be asked about `address` again now.
    pub(crate) fn tried(&self, address: &Multiaddr) -> Tried {
        let known = self.known.get(address);
        let known = known.map(|known| Tried {
            in_vain: known.in_vain.clone(),
            open: known.open.clone(),
        });
        known.unwrap_or_default()
    }

    /// Records that a server is being asked about `address`; [`record`](Self::record) must follow.
    pub(crate) fn ask(&mut self, address: &Multiaddr) {
        if let Some(known) = self.known.get_mut(address) {
            known.asking = true;
        }
    }

    /// Records the result of the server at IP address `server`: the kind of dial-back and its source, or `None` if the
    /// server failed to reach the address. Returns true if the verdict has changed.
    pub(crate) fn record(
        &mut self,
        address: &Multiaddr,
        server: IpAddr,
        reached: Option<(Back, IpAddr)>,
        now: Instant,
    ) -> bool {
        let Some(known) = self.known.get_mut(address) else {
            return false;
        };
        known.asking = false;
        let verdict = match reached {
            Some((back, from)) => {
                known.in_vain.clear();
                known.pause = RETRY.0;
                known.next = now + AGAIN;
                if back == Back::Open && known.verdict != Some(Verdict::Reached) {
                    known.open.insert(network(from));
                }
                // A dial-back from a contact does not contradict an earlier one from an unknown peer.
                let before = known.verdict == Some(Verdict::Reached);
                if before || back == Back::Proven || known.open.len() >= OPEN {
                    known.open.clear();
                    Some(Verdict::Reached)
                } else {
                    if back == Back::Open {
                        // Ask a server in another network soon.
                        known.next = now;
                    }
                    Some(Verdict::ByContacts)
                }
            }
            None => {
                known.in_vain.insert(server);
                if known.in_vain.len() < IN_VAIN {
                    // Ask another server soon.
                    known.next = now;
                    known.verdict
                } else {
                    known.in_vain.clear();
                    known.open.clear();
                    known.next = now + known.pause;
                    known.pause = (known.pause * 2).min(RETRY.1);
                    Some(Verdict::Unreachable)
                }
            }
        };
        std::mem::replace(&mut known.verdict, verdict) != verdict
    }

    /// Postpones the question: no server could be asked, or the server did not answer.
    pub(crate) fn put_off(&mut self, address: &Multiaddr, now: Instant) {
        if let Some(known) = self.known.get_mut(address) {
            known.asking = false;
            known.next = now + RETRY.0;
        }
    }

    /// Checks all addresses again soon, because the network has changed and verdicts may no longer hold.
    pub(crate) fn ask_again(&mut self, now: Instant) {
        for known in self.known.values_mut() {
            known.next = known.next.min(now);
            known.pause = RETRY.0;
        }
    }

    pub(crate) fn of(&self, address: &Multiaddr) -> Option<Verdict> {
        self.known.get(address).and_then(|known| known.verdict)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = (&Multiaddr, Verdict)> {
        let known = self.known.iter();
        known.filter_map(|(address, known)| Some((address, known.verdict?)))
    }
}

#[cfg(test)]
mod tests;
