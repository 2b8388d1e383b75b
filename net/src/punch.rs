//! Opening a direct connection where both sides are behind NATs: the exchange over the relayed one, and when to try again.
//!
//! The idea is DCUtR's: over the relayed connection both sides learn where the other may be reached, agree on an instant, and dial at once, so
//! that each one's packets open its own NAT for the other's. It differs in what is dialled: the raw observations of [`Reach`](crate::reach),
//! the addresses of our interfaces if they are public, and, if both sides turn out to share a public address, their private ones too; TCP and QUIC
//! together; an ordinary dial is part of every attempt, so that a side that is reachable is reached whichever side began.

use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::{Multiaddr, StreamProtocol, core::Endpoint};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use weft_proto::{
    frame::{self, FrameError},
    wire::{PunchAnswer, PunchGo, PunchOffer},
};

use crate::{
    Transport,
    address::{is_public, socket},
};

/// The protocol's name.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/punch/1");

/// Bytes in a message.
const MAX_MESSAGE: usize = 4096;

/// Addresses in a message.
pub(crate) const MAX_ADDRESSES: usize = 16;

/// How long the other side may take for a message.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long an attempt takes to show: from the exchange to a connection.
const ATTEMPT: Duration = Duration::from_secs(3);

/// The first and the longest pause between attempts.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Where this side may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Candidates {
    /// For everyone.
    pub(crate) public: Vec<Multiaddr>,
    /// For those behind the same NAT.
    pub(crate) private: Vec<Multiaddr>,
    /// The IP addresses that others see us at. Private ones if the relay is on our own network.
    pub(crate) seen_at: HashSet<IpAddr>,
}

/// What an exchange came to: what to dial, in which role, and when.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) addresses: Vec<Multiaddr>,
    /// The role on TCP.
    pub(crate) role: Endpoint,
    pub(crate) wait: Duration,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PunchError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    TimedOut,
    #[error("the other side hung up")]
    Ended,
    #[error("the other side names no address that can be dialled from here")]
    NoAddress,
}

/// The side that dialled the relayed connection.
pub(crate) async fn initiate<S>(mut stream: S, mine: &Candidates) -> Result<Plan, PunchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let begin = Instant::now();
        let offer = PunchOffer {
            addresses: encode(&mine.public),
        };
        frame::write(&mut stream, &offer, MAX_MESSAGE).await?;
        stream.flush().await?;
        let answer: Option<PunchAnswer> = frame::read(&mut stream, MAX_MESSAGE).await?;
        let round_trip = begin.elapsed();
        let theirs = decode(&answer.ok_or(PunchError::Ended)?.addresses);
        let neighbours = share_address(mine, &theirs);
        let go = PunchGo {
            addresses: match neighbours {
                true => encode(&mine.private),
                false => Vec::new(),
            },
        };
        frame::write(&mut stream, &go, MAX_MESSAGE).await?;
        stream.flush().await?;
        Ok(Plan {
            addresses: dialable(theirs, neighbours)?,
            role: Endpoint::Dialer,
            wait: round_trip / 2,
        })
    };
    timeout(PATIENCE, exchange)
        .await
        .map_err(|_| PunchError::TimedOut)?
}

/// The other side.
pub(crate) async fn respond<S>(mut stream: S, mine: &Candidates) -> Result<Plan, PunchError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = async {
        let offer: Option<PunchOffer> = frame::read(&mut stream, MAX_MESSAGE).await?;
        let mut theirs = decode(&offer.ok_or(PunchError::Ended)?.addresses);
        let neighbours = share_address(mine, &theirs);
        let mut addresses = mine.public.clone();
        if neighbours {
            addresses.extend(mine.private.iter().cloned());
        }
        let answer = PunchAnswer {
            addresses: encode(&addresses),
        };
        frame::write(&mut stream, &answer, MAX_MESSAGE).await?;
        stream.flush().await?;
        let go: Option<PunchGo> = frame::read(&mut stream, MAX_MESSAGE).await?;
        theirs.extend(decode(&go.ok_or(PunchError::Ended)?.addresses));
        Ok(Plan {
            addresses: dialable(theirs, neighbours)?,
            role: Endpoint::Listener,
            wait: Duration::ZERO,
        })
    };
    timeout(PATIENCE, exchange)
        .await
        .map_err(|_| PunchError::TimedOut)?
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

/// Whether the other side is seen where we are: behind the same NAT, or on the same machine.
fn share_address(mine: &Candidates, theirs: &[Multiaddr]) -> bool {
    theirs
        .iter()
        .filter_map(socket)
        .any(|(address, _)| mine.seen_at.contains(&address.ip().to_canonical()))
}

/// What of the other side's addresses leads to it from here. A stranger's private addresses would lead to a neighbour of ours.
fn dialable(theirs: Vec<Multiaddr>, neighbours: bool) -> Result<Vec<Multiaddr>, PunchError> {
    let mut seen = HashSet::new();
    let all: Vec<_> = theirs
        .into_iter()
        .filter(|address| socket(address).is_some_and(|(at, _)| neighbours || is_public(&at.ip())))
        .filter(|address| seen.insert(address.clone()))
        .take(MAX_ADDRESSES)
        .collect();
    if all.is_empty() {
        return Err(PunchError::NoAddress);
    }
    Ok(all)
}

/// Splits by transport: each is a dial of its own, so that neither waits for the other.
pub(crate) fn by_transport(addresses: &[Multiaddr]) -> [(Transport, Vec<Multiaddr>); 2] {
    [Transport::Quic, Transport::Tcp].map(|transport| {
        let matching = addresses
            .iter()
            .filter(|address| socket(address).is_some_and(|(_, t)| t == transport));
        (transport, matching.cloned().collect())
    })
}

/// When to try to punch to one peer.
#[derive(Debug)]
pub(crate) struct Schedule {
    next: Instant,
    pause: Duration,
    began: Option<Instant>,
    candidates: Candidates,
}

impl Schedule {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            next: now,
            pause: PAUSE.0,
            began: None,
            candidates: Candidates::default(),
        }
    }

    /// Whether to try now, with these candidates. New ones are a reason to begin anew.
    pub(crate) fn is_due(&mut self, candidates: &Candidates, now: Instant) -> bool {
        if candidates.public.is_empty() && candidates.private.is_empty() {
            return false;
        }
        if self.candidates != *candidates {
            self.candidates = candidates.clone();
            self.next = now;
            self.pause = PAUSE.0;
        }
        let running = self
            .began
            .is_some_and(|began| now < began + PATIENCE + ATTEMPT);
        !running && self.next <= now
    }

    pub(crate) fn begin(&mut self, now: Instant) {
        self.began = Some(now);
    }

    /// The exchange is over, and both sides dial, or it failed.
    pub(crate) fn exchanged(&mut self, dialling: bool, now: Instant) {
        self.began = None;
        let attempt = if dialling { ATTEMPT } else { Duration::ZERO };
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

    fn candidates(public: &[&str], private: &[&str]) -> Candidates {
        let public = addresses(public);
        let seen_at = public.iter().filter_map(socket).map(|(at, _)| at.ip());
        Candidates {
            seen_at: seen_at.collect(),
            private: addresses(private),
            public,
        }
    }

    async fn exchange(one: &Candidates, other: &Candidates) -> [Result<Plan, PunchError>; 2] {
        let (near, far) = duplex(1 << 16);
        tokio::join!(initiate(near, one), respond(far, other)).into()
    }

    #[tokio::test]
    async fn strangers_learn_public_addresses_only() {
        let one = candidates(
            &["/ip4/1.1.1.1/tcp/1", "/ip4/1.1.1.1/udp/1/quic-v1"],
            &["/ip4/10.0.0.1/tcp/1"],
        );
        let other = candidates(&["/ip4/2.2.2.2/tcp/2"], &["/ip4/10.0.0.2/tcp/2"]);
        let [at_one, at_other] = exchange(&one, &other).await.map(Result::unwrap);
        assert_eq!(at_one.addresses, other.public);
        assert_eq!(at_other.addresses, one.public);
        assert_eq!(at_one.role, Endpoint::Dialer);
        assert_eq!(at_other.role, Endpoint::Listener);
        let [(_, quic), (_, tcp)] = by_transport(&at_other.addresses);
        assert_eq!(quic, one.public[1..]);
        assert_eq!(tcp, one.public[..1]);
    }

    #[tokio::test]
    async fn those_behind_one_nat_learn_private_ones_too() {
        let one = candidates(&["/ip4/1.1.1.1/tcp/1"], &["/ip4/10.0.0.1/tcp/1"]);
        let other = candidates(&["/ip4/1.1.1.1/tcp/2"], &["/ip4/10.0.0.2/tcp/2"]);
        let [at_one, at_other] = exchange(&one, &other).await.map(Result::unwrap);
        assert_eq!(
            at_one.addresses,
            [other.public.clone(), other.private.clone()].concat()
        );
        assert_eq!(
            at_other.addresses,
            [one.public.clone(), one.private.clone()].concat()
        );
    }

    #[tokio::test]
    async fn addresses_that_lead_to_our_neighbours_are_not_dialled() {
        let one = candidates(&["/ip4/1.1.1.1/tcp/1"], &[]);
        // Claims private and loopback addresses as public ones.
        let liar = Candidates {
            public: addresses(&[
                "/ip4/10.0.0.7/tcp/1",
                "/ip4/127.0.0.1/tcp/22",
                "/ip6/fe80::1/tcp/1",
            ]),
            ..Candidates::default()
        };
        let [at_one, _] = exchange(&one, &liar).await;
        assert!(matches!(at_one, Err(PunchError::NoAddress)));
        let [_, at_other] = exchange(&liar, &one).await;
        assert!(matches!(at_other, Err(PunchError::NoAddress)));
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
    }

    #[test]
    fn attempts_are_paced_and_new_candidates_begin_anew() {
        let mut now = Instant::now();
        let mut schedule = Schedule::new(now);
        assert!(!schedule.is_due(&Candidates::default(), now));
        let mine = candidates(&["/ip4/1.1.1.1/tcp/1"], &[]);
        for pause in [1, 2, 4] {
            assert!(schedule.is_due(&mine, now));
            schedule.begin(now);
            assert!(!schedule.is_due(&mine, now));
            schedule.exchanged(true, now);
            now += ATTEMPT + Duration::from_secs(pause) - Duration::from_millis(1);
            assert!(!schedule.is_due(&mine, now));
            now += Duration::from_millis(1);
        }
        schedule.begin(now);
        schedule.exchanged(true, now);
        let other = candidates(&["/ip4/1.1.1.1/tcp/2"], &[]);
        assert!(!schedule.is_due(&mine, now));
        assert!(schedule.is_due(&other, now));
    }
}
