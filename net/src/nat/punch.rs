//! Opening a direct connection where both sides are behind NATs: the exchange over the relayed one, and when to try again.
//!
//! The idea is DCUtR's: over the relayed connection both sides learn where the other may be reached, agree on an instant, and dial at once, so
//! that each one's packets open its own NAT for the other's. It differs in what is dialed: the raw observations of [`Reach`](crate::nat::reach),
//! the addresses of our interfaces if they are public, and the private ones only while no peer from outside our own
//! networks has been met; TCP and QUIC
//! together; an ordinary dial is part of every attempt, so that a side that is reachable is reached whichever side began.

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

/// The protocol's name.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/punch/1");

/// Bytes in a message.
const MAX_MESSAGE: usize = 4096;

/// Addresses in a message.
pub(crate) const MAX_ADDRESSES: usize = 16;

/// Of these, IP addresses of one family that are dialed, and ports at one for each transport.
const MAX_PLACES: usize = 2;
const MAX_PORTS: usize = 3;

/// How long the other side may take for a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long an attempt takes to show: from the exchange to a connection.
pub(crate) const ATTEMPT: Duration = Duration::from_secs(3);

/// How long dialing has before a search begins.
pub(crate) const HEAD_START: Duration = Duration::from_millis(600);

/// Candidates that change make the attempts begin anew: this often at first, while they become known, and then once in this time. Behind a symmetric
/// NAT every new peer sees a new port.
const RESETS: u32 = 4;
const RESET_AGAIN: Duration = Duration::from_secs(30);

/// The first and the longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Where this side may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Candidates {
    pub(crate) addresses: Vec<Multiaddr>,
    /// The mesh is our own networks: private addresses are told and dialed. Outside, whatever the other side says of
    /// where it is, they are not: it may say what it likes. Two nodes behind one NAT find each other by mDNS.
    pub(crate) near: bool,
    /// How the NAT maps our QUIC port on IPv4.
    pub(crate) udp: UdpMapping,
}

impl Candidates {
    /// Returns true if the same is told, in any order.
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

/// A search for a port, to be begun if dialing does not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Search {
    /// By opening many ports, because ours are never the same.
    OpenMany {
        targets: Vec<SocketAddr>,
        token: SearchToken,
    },
    /// By trying many of the other side's.
    TryMany {
        /// Address at which the other side was last seen.
        target: SocketAddr,
        token: SearchToken,
    },
}

/// What an exchange came to: what to dial, in which role, and when.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) addresses: Vec<Multiaddr>,
    /// The role on TCP.
    pub(crate) role: Endpoint,
    pub(crate) wait: Duration,
    pub(crate) search: Option<Search>,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PunchError {
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the other side names no address that can be dialed from here")]
    NoAddress,
}

/// The side that dialed the relayed connection.
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
        // All that is told was told at once.
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

/// The other side.
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
        // Without a token there is nothing to search with.
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

/// The addresses among them that a socket can be opened to.
fn decode(addresses: &[Bytes]) -> Vec<Multiaddr> {
    addresses
        .iter()
        .take(MAX_ADDRESSES)
        .filter_map(|bytes| Multiaddr::try_from(bytes.to_vec()).ok())
        .filter(|address| socket(address).is_some())
        .collect()
}

/// What of the other side's addresses leads to it from here. A stranger's private addresses would lead to a neighbour of ours; and public ones may be somebody else's, so
/// there are not to be many.
fn dialable(theirs: Vec<Multiaddr>, near: bool) -> Result<Vec<Multiaddr>, PunchError> {
    let mut seen = HashSet::new();
    let mut places: HashMap<(bool, bool), HashSet<IpAddr>> = HashMap::new();
    let mut at_place: HashMap<(IpAddr, Transport), usize> = HashMap::new();
    let mut few = |address: &Multiaddr| {
        let Some((at, transport)) = socket(address) else {
            return false;
        };
        let kind = (at.is_ipv4(), is_public(&at.ip()));
        let places = places.entry(kind).or_default();
        // Of private ones the gate takes as many that can lead there: here, bridges of containers would hide the
        // others.
        let most = match kind.1 {
            true => MAX_PLACES,
            false => MAX_ADDRESSES,
        };
        if places.len() >= most && !places.contains(&at.ip()) {
            return false;
        }
        places.insert(at.ip());
        let ports = at_place.entry((at.ip(), transport)).or_default();
        *ports += 1;
        *ports <= MAX_PORTS
    };
    let all: Vec<_> = theirs
        .into_iter()
        .filter(|address| socket(address).is_some_and(|(at, _)| near || is_public(&at.ip())))
        .filter(|address| seen.insert(address.clone()))
        .filter(|address| few(address))
        .take(MAX_ADDRESSES)
        .collect();
    if all.is_empty() {
        return Err(PunchError::NoAddress);
    }
    Ok(all)
}

/// The search that leads from here to the other side, if one can.
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

/// Splits by transport, and private from public: each part is a dial of its own, so that none waits for another, and none ends because at a
/// private address somebody else answered.
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

/// When to try to punch to one peer.
#[derive(Debug)]
pub(crate) struct Schedule {
    next: Instant,
    pause: Duration,
    running: bool,
    /// When candidates that changed last made it begin anew, and how often they have.
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

    /// Whether to try now, with these candidates. New ones are a reason to begin anew.
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

    /// An exchange begins; [`exchanged`](Self::exchanged) must follow.
    pub(crate) fn begin(&mut self) {
        self.running = true;
    }

    /// Whether an exchange is under way.
    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    /// The exchange is over, and what follows takes as long as `attempt` to show.
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
    async fn both_sides_learn_what_the_other_tells() {
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
        // At 6.6.6.6 in truth.
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
    async fn bridges_of_containers_do_not_hide_the_address_on_a_network_of_ours() {
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
        // The gate takes two that can lead there.
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
    fn what_is_taken_from_a_peer_is_bounded() {
        let many: Vec<Multiaddr> = (1..100)
            .map(|port| format!("/ip4/1.1.1.1/tcp/{port}").parse().unwrap())
            .collect();
        assert_eq!(encode(&many).len(), MAX_ADDRESSES);
        let bytes: Vec<_> = many.iter().map(|a| a.to_vec().into()).collect();
        assert_eq!(decode(&bytes).len(), MAX_ADDRESSES);
        assert!(decode(&[vec![0xff; 9].into(), vec![].into()]).is_empty());
        assert_eq!(dialable(many, false).unwrap().len(), MAX_PORTS);
        let places = (1..100).map(|n| format!("/ip4/1.1.1.{n}/tcp/1").parse().unwrap());
        assert_eq!(dialable(places.collect(), false).unwrap().len(), MAX_PLACES);
    }

    #[test]
    fn attempts_are_paced_and_new_candidates_begin_anew() {
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
        // Somebody who tells of another port each time does not keep us at it.
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
