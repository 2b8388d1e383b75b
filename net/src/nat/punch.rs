//! Hole punching: the exchange over a relayed connection that opens a direct connection between two nodes behind NATs,
//! and the schedule of attempts.
//!
//! The idea is DCUtR's. Over the relayed connection both sides learn the other's addresses, agree on a moment, and dial
//! at once, so that each side's packets open its own NAT for the other side. It differs from DCUtR in what is dialed.
//! Candidates are the raw observations of [`Reach`](crate::nat::reach), and public addresses of this node's interfaces.
//! Private addresses are included only while no peer from outside this node's networks has been met. TCP and QUIC are
//! dialed together. An ordinary dial is part of every attempt, so that a reachable side is reached no matter which side
//! began.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::{Multiaddr, StreamProtocol, core::Endpoint};
use tokio::io::{AsyncRead, AsyncWrite};
use weft_proto::wire::{PunchAnswer, PunchGo, PunchOffer, UdpMapping};

use crate::{
    Transport,
    address::{is_public, socket},
    exchange::{self, ExchangeError, within},
    nat::search::{self, SearchToken},
};

/// Name of the protocol.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/punch/1");

/// Largest message, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Most addresses in a message.
pub(crate) const MAX_ADDRESSES: usize = 16;

/// Most IP addresses of one family that are dialed, and most ports at each for one transport.
const MAX_IPS: usize = 2;
const MAX_PORTS: usize = 3;

/// Time that the remote end may take for an exchange.
const PATIENCE: Duration = Duration::from_secs(5);

/// Time from the exchange within which an attempt has to lead to a connection.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(3);

/// Time that dialing has before a search begins.
pub(crate) const HEAD_START: Duration = Duration::from_millis(600);

/// Changed candidates restart the attempts. This happens at once for the first four changes, while the candidates
/// become known, and then at most once in this time. Behind a symmetric NAT every new peer sees a new port.
const RESETS: u32 = 4;
const RESET_AGAIN: Duration = Duration::from_secs(30);

/// The first and the longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The addresses at which this side may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Candidates {
    pub(crate) addresses: Vec<Multiaddr>,
    /// True while the mesh is within this node's own networks. Only then private addresses are sent and dialed,
    /// whatever the remote peer claims about its addresses. Two nodes behind one NAT find each other by mDNS.
    pub(crate) near: bool,
    /// The NAT's mapping of this node's QUIC port on IPv4.
    pub(crate) udp: UdpMapping,
}

impl Candidates {
    /// Returns true if both have the same addresses in any order, and the same mapping.
    fn is_like(&self, other: &Self) -> bool {
        let sorted = |all: &[Multiaddr]| {
            let mut all: Vec<_> = all.iter().map(Multiaddr::to_vec).collect();
            all.sort();
            all
        };
        let same = (self.near, self.udp) == (other.near, other.udp);
        same && sorted(&self.addresses) == sorted(&other.addresses)
    }
}

/// A search for a port, to be begun if dialing fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Search {
    /// Opens many ports, because the NAT of this side maps each destination to another port.
    OpenMany {
        targets: Vec<SocketAddr>,
        token: SearchToken,
    },
    /// Tries many ports of the remote side.
    TryMany {
        /// Address at which the remote side was last seen.
        target: SocketAddr,
        token: SearchToken,
    },
}

/// The result of an exchange: what to dial, in which role, and when.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) addresses: Vec<Multiaddr>,
    /// The role on TCP.
    pub(crate) role: Endpoint,
    pub(crate) wait: Duration,
    pub(crate) search: Option<Search>,
}

/// The reason that an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PunchError {
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the peer gave no address that can be dialed from here")]
    NoAddress,
}

/// Runs the exchange on the side that dialed the relayed connection.
pub(crate) async fn initiate<S>(mut stream: S, mine: &Candidates) -> Result<Plan, PunchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let begin = Instant::now();
        let token = search::token().map_err(ExchangeError::from)?;
        let offer = PunchOffer {
            addresses: encode(&mine.addresses),
            udp_mapping: mine.udp.into(),
            token: Bytes::copy_from_slice(&token),
        };
        exchange::send(&mut stream, &offer, MAX_MESSAGE).await?;
        let answer: PunchAnswer = exchange::receive(&mut stream, MAX_MESSAGE).await?;
        let round_trip = begin.elapsed();
        let theirs = decode(&answer.addresses);
        // The offer already held all addresses.
        let go = PunchGo::default();
        exchange::send(&mut stream, &go, MAX_MESSAGE).await?;
        let addresses = dialable(theirs, mine.near)?;
        Ok(Plan {
            search: search_for(mine.udp, answer.udp_mapping(), &addresses, token),
            addresses,
            role: Endpoint::Dialer,
            wait: round_trip / 2,
        })
    };
    within(PATIENCE, exchange).await
}

/// Runs the exchange on the side that accepted the relayed connection.
pub(crate) async fn respond<S>(mut stream: S, mine: &Candidates) -> Result<Plan, PunchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let offer: PunchOffer = exchange::receive(&mut stream, MAX_MESSAGE).await?;
        let mut theirs = decode(&offer.addresses);
        let answer = PunchAnswer {
            addresses: encode(&mine.addresses),
            udp_mapping: mine.udp.into(),
        };
        exchange::send(&mut stream, &answer, MAX_MESSAGE).await?;
        let go: PunchGo = exchange::receive(&mut stream, MAX_MESSAGE).await?;
        theirs.extend(decode(&go.addresses));
        let addresses = dialable(theirs, mine.near)?;
        // Without a token no search is possible.
        let token = SearchToken::try_from(offer.token.as_ref()).ok();
        Ok(Plan {
            search: token
                .and_then(|token| search_for(mine.udp, offer.udp_mapping(), &addresses, token)),
            addresses,
            role: Endpoint::Listener,
            wait: Duration::ZERO,
        })
    };
    within(PATIENCE, exchange).await
}

fn encode(addresses: &[Multiaddr]) -> Vec<Bytes> {
    addresses
        .iter()
        .take(MAX_ADDRESSES)
        .map(|address| address.to_vec().into())
        .collect()
}

/// Returns the addresses that are plain sockets.
fn decode(addresses: &[Bytes]) -> Vec<Multiaddr> {
    addresses
        .iter()
        .take(MAX_ADDRESSES)
        .filter_map(|bytes| Multiaddr::try_from(bytes.to_vec()).ok())
        .filter(|address| socket(address).is_some())
        .collect()
}

/// Returns those of the remote side's addresses that may lead to it from here. Private addresses could lead to a
/// neighbour of this node, and are dialed only in a mesh of its own networks. Public addresses could belong to a third
/// party, so their number is limited.
fn dialable(theirs: Vec<Multiaddr>, near: bool) -> Result<Vec<Multiaddr>, PunchError> {
    let mut seen = HashSet::new();
    let mut ips: HashMap<(bool, bool), HashSet<IpAddr>> = HashMap::new();
    let mut ports_at: HashMap<(IpAddr, Transport), usize> = HashMap::new();
    let mut within_limits = |address: &Multiaddr| {
        let Some((at, transport)) = socket(address) else {
            return false;
        };
        let kind = (at.is_ipv4(), is_public(&at.ip()));
        let ips = ips.entry(kind).or_default();
        // Private IP addresses are not limited here, because container bridges could displace the others. The address
        // gate limits them, after it has sorted out the ones that cannot lead to the peer.
        let most = match kind.1 {
            true => MAX_IPS,
            false => MAX_ADDRESSES,
        };
        if ips.len() >= most && !ips.contains(&at.ip()) {
            return false;
        }
        ips.insert(at.ip());
        let ports = ports_at.entry((at.ip(), transport)).or_default();
        *ports += 1;
        *ports <= MAX_PORTS
    };
    let all: Vec<_> = theirs
        .into_iter()
        .filter(|address| socket(address).is_some_and(|(at, _)| near || is_public(&at.ip())))
        .filter(|address| seen.insert(address.clone()))
        .filter(|address| within_limits(address))
        .take(MAX_ADDRESSES)
        .collect();
    if all.is_empty() {
        return Err(PunchError::NoAddress);
    }
    Ok(all)
}

/// Returns the search that can find the remote side from here, if any.
fn search_for(
    mine: UdpMapping,
    theirs: UdpMapping,
    addresses: &[Multiaddr],
    token: SearchToken,
) -> Option<Search> {
    let targets = addresses
        .iter()
        .filter_map(socket)
        .filter(|(at, t)| *t == Transport::Quic && at.is_ipv4() && is_public(&at.ip()));
    let targets: Vec<SocketAddr> = targets.map(|(at, _)| at).collect();
    let first = targets.first()?;
    match (mine, theirs) {
        (UdpMapping::EndpointDependent, UdpMapping::EndpointIndependent) => {
            Some(Search::OpenMany { targets, token })
        }
        (UdpMapping::EndpointIndependent, UdpMapping::EndpointDependent) => Some(Search::TryMany {
            target: *first,
            token,
        }),
        _ => None,
    }
}

/// Splits addresses by transport, and public from private ones. Each part is dialed by itself. So no part waits for
/// another, and none fails because another peer answers at a private address.
pub(crate) fn parts(addresses: &[Multiaddr]) -> Vec<(Transport, Vec<Multiaddr>)> {
    let kinds = [Transport::Quic, Transport::Tcp]
        .into_iter()
        .flat_map(|transport| [(transport, true), (transport, false)]);
    kinds
        .map(|(transport, public)| {
            let matching = addresses.iter().filter(|address| {
                socket(address)
                    .is_some_and(|(at, t)| t == transport && is_public(&at.ip()) == public)
            });
            (transport, matching.cloned().collect::<Vec<_>>())
        })
        .filter(|(_, addresses)| !addresses.is_empty())
        .collect()
}

/// The schedule of hole punching with one peer.
#[derive(Debug)]
pub(crate) struct Schedule {
    next: Instant,
    pause: Duration,
    running: bool,
    /// Time of the last restart because of changed candidates.
    reset: Instant,
    resets: u32,
    candidates: Candidates,
}

impl Schedule {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            next: now,
            pause: PAUSE.0,
            running: false,
            reset: now,
            resets: 0,
            candidates: Candidates::default(),
        }
    }

    /// Returns true if an attempt is due with these candidates. Changed candidates restart the schedule.
    pub(crate) fn is_due(&mut self, candidates: &Candidates, now: Instant) -> bool {
        if candidates.addresses.is_empty() {
            return false;
        }
        let again = self.resets < RESETS || now >= self.reset + RESET_AGAIN;
        if !self.candidates.is_like(candidates) && again {
            self.candidates = candidates.clone();
            self.next = now;
            self.pause = PAUSE.0;
            self.reset = now;
            self.resets += 1;
        }
        !self.running && self.next <= now
    }

    /// Records that an exchange begins; [`exchanged`](Self::exchanged) must follow.
    pub(crate) fn begin(&mut self) {
        self.running = true;
    }

    /// Returns true while an exchange is under way.
    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// Records the end of an exchange; the attempt that follows takes up to `attempt`.
    pub(crate) fn exchanged(&mut self, attempt: Duration, now: Instant) {
        self.running = false;
        self.next = now + attempt + self.pause;
        self.pause = (self.pause * 2).min(PAUSE.1);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    fn addresses(all: &[&str]) -> Vec<Multiaddr> {
        all.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn candidates(all: &[&str]) -> Candidates {
        Candidates {
            addresses: addresses(all),
            near: false,
            udp: UdpMapping::Unspecified,
        }
    }

    async fn exchange(one: &Candidates, other: &Candidates) -> [Result<Plan, PunchError>; 2] {
        let (near, far) = duplex(1 << 16);
        tokio::join!(initiate(near, one), respond(far, other)).into()
    }

    #[tokio::test]
    async fn both_sides_learn_the_addresses_of_the_other() {
        let one = candidates(&["/ip4/1.1.1.1/tcp/1", "/ip4/1.1.1.1/udp/1/quic-v1"]);
        let other = candidates(&["/ip4/2.2.2.2/tcp/2"]);
        let [at_one, at_other] = exchange(&one, &other).await.map(Result::unwrap);
        assert_eq!(at_one.addresses, other.addresses);
        assert_eq!(at_other.addresses, one.addresses);
        assert_eq!(at_one.role, Endpoint::Dialer);
        assert_eq!(at_other.role, Endpoint::Listener);
        let expected = [
            (Transport::Quic, one.addresses[1..].to_vec()),
            (Transport::Tcp, one.addresses[..1].to_vec()),
        ];
        assert_eq!(parts(&at_other.addresses), expected);
    }

    #[tokio::test]
    async fn in_a_mesh_of_our_own_networks_private_addresses_are_dialed() {
        let near = |address: &str| Candidates {
            near: true,
            ..candidates(&[address])
        };
        let (one, other) = (near("/ip4/10.0.0.1/tcp/1"), near("/ip4/10.0.0.2/tcp/2"));
        let [at_one, at_other] = exchange(&one, &other).await.map(Result::unwrap);
        assert_eq!(at_one.addresses, other.addresses);
        assert_eq!(at_other.addresses, one.addresses);
    }

    #[tokio::test]
    async fn a_peer_that_claims_our_public_address_has_no_private_address_dialed() {
        // The peer is really at 6.6.6.6.
        let liar = candidates(&[
            "/ip4/1.1.1.1/tcp/1",
            "/ip4/127.0.0.1/tcp/6379",
            "/ip4/192.168.1.1/tcp/80",
        ]);
        let victim = candidates(&["/ip4/1.1.1.1/udp/9/quic-v1"]);
        let [_, at_victim] = exchange(&liar, &victim).await.map(Result::unwrap);
        assert_eq!(at_victim.addresses, addresses(&["/ip4/1.1.1.1/tcp/1"]));
        let [at_victim, _] = exchange(&victim, &liar).await.map(Result::unwrap);
        assert_eq!(at_victim.addresses, addresses(&["/ip4/1.1.1.1/tcp/1"]));
    }

    #[tokio::test]
    async fn container_bridges_do_not_displace_the_address_on_our_network() {
        let near = |all: &[&str]| Candidates {
            near: true,
            ..candidates(all)
        };
        let one = near(&["/ip4/192.168.77.3/tcp/1"]);
        let other = near(&[
            "/ip4/172.17.0.1/tcp/1",
            "/ip4/172.18.0.1/tcp/1",
            "/ip4/172.19.0.1/tcp/1",
            "/ip4/192.168.77.2/tcp/1",
        ]);
        let [at_one, _] = exchange(&one, &other).await.map(Result::unwrap);
        // The address gate admits two of them.
        assert_eq!(at_one.addresses, other.addresses);
    }

    #[tokio::test]
    async fn addresses_that_lead_to_our_neighbours_are_not_dialed() {
        let one = candidates(&["/ip4/1.1.1.1/tcp/1"]);
        let liar = candidates(&[
            "/ip4/10.0.0.7/tcp/1",
            "/ip4/127.0.0.1/tcp/22",
            "/ip6/fe80::1/tcp/1",
        ]);
        let [at_one, _] = exchange(&one, &liar).await;
        assert!(matches!(at_one, Err(PunchError::NoAddress)));
        let [_, at_other] = exchange(&liar, &one).await;
        assert!(matches!(at_other, Err(PunchError::NoAddress)));
    }

    #[tokio::test]
    async fn a_search_is_agreed_on_only_where_one_side_is_symmetric() {
        let side = |address: &str, udp| Candidates {
            udp,
            ..candidates(&[address])
        };
        let (hard, easy) = (
            UdpMapping::EndpointDependent,
            UdpMapping::EndpointIndependent,
        );
        let one = side("/ip4/1.1.1.1/udp/7/quic-v1", hard);
        let other = side("/ip4/2.2.2.2/udp/9/quic-v1", easy);
        for (at_hard, at_easy) in [exchange(&one, &other).await.map(Result::unwrap).into(), {
            let [a, b] = exchange(&other, &one).await.map(Result::unwrap);
            (b, a)
        }] {
            let Some(Search::OpenMany { targets, token }) = at_hard.search else {
                panic!("{at_hard:?}");
            };
            assert_eq!(targets, ["2.2.2.2:9".parse().unwrap()]);
            let expected = Search::TryMany {
                target: "1.1.1.1:7".parse().unwrap(),
                token,
            };
            assert_eq!(at_easy.search, Some(expected));
        }
        for (a, b) in [(hard, hard), (easy, easy), (hard, UdpMapping::Unspecified)] {
            let one = side("/ip4/1.1.1.1/udp/7/quic-v1", a);
            let other = side("/ip4/2.2.2.2/udp/9/quic-v1", b);
            let plans = exchange(&one, &other).await.map(Result::unwrap);
            assert!(plans.iter().all(|plan| plan.search.is_none()));
        }
    }

    #[test]
    fn the_number_of_addresses_taken_from_a_peer_is_bounded() {
        let many: Vec<Multiaddr> = (1..100)
            .map(|port| format!("/ip4/1.1.1.1/tcp/{port}").parse().unwrap())
            .collect();
        assert_eq!(encode(&many).len(), MAX_ADDRESSES);
        let bytes: Vec<_> = many.iter().map(|a| a.to_vec().into()).collect();
        assert_eq!(decode(&bytes).len(), MAX_ADDRESSES);
        assert!(decode(&[vec![0xff; 9].into(), vec![].into()]).is_empty());
        assert_eq!(dialable(many, false).unwrap().len(), MAX_PORTS);
        let ips = (1..100).map(|n| format!("/ip4/1.1.1.{n}/tcp/1").parse().unwrap());
        assert_eq!(dialable(ips.collect(), false).unwrap().len(), MAX_IPS);
    }

    #[test]
    fn attempts_have_growing_pauses_and_new_candidates_restart_them() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        assert!(!schedule.is_due(&Candidates::default(), now));
        let mine = candidates(&["/ip4/1.1.1.1/tcp/1"]);
        for pause in [1, 2, 4] {
            assert!(schedule.is_due(&mine, now));
            schedule.begin();
            assert!(!schedule.is_due(&mine, now));
            schedule.exchanged(ATTEMPT, now);
            now += ATTEMPT + Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(!schedule.is_due(&mine, now));
            now += Duration::from_millis(1);
        }
        schedule.begin();
        schedule.exchanged(ATTEMPT, now);
        assert!(!schedule.is_due(&mine, now));
        // A peer that reports another port each time does not keep this node punching.
        let other = |port: u32| candidates(&[&format!("/ip4/1.1.1.1/tcp/{port}")]);
        for port in 2..=RESETS {
            assert!(schedule.is_due(&other(port), now));
            schedule.begin();
            schedule.exchanged(ATTEMPT, now);
        }
        assert!(!schedule.is_due(&other(99), now));
        now += RESET_AGAIN;
        assert!(schedule.is_due(&other(100), now));
    }
}
