//! Asks witnesses whether a peer is at the address it claims, before many packets are sent there.
//!
//! A search for a port (`search.rs`) sends up to 2,048 packets to an address that the remote peer names. The answers do
//! not prove the address, because the source of a packet can be forged. A TCP or QUIC connection does prove it, so the
//! question goes to peers that may have a connection with the remote peer:
//!
//! - witnesses that this node has chosen: bootstrap nodes, and relays that hold a reservation for it;
//! - the relay between the two peers. The remote peer may have chosen it, and may run it, so its answer only allows a
//!   small search.
//!
//! Without a witness there is no search. A witness answers yes or no for addresses that the asker names and has from
//! the peer itself. It never reveals a peer's address.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use libp2p::{PeerId, StreamProtocol};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use weft_proto::wire::{SeenAnswer, SeenQuestion};

use crate::{
    exchange::{self, ExchangeError, within},
    policy::gate::Effort,
};

/// Name of the protocol.
pub(crate) const PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/seen/1");

/// Largest message, in bytes. A PeerId has 38 to 42 bytes, an address four.
const MAX_MESSAGE: usize = 128;

/// Most addresses in a question: as many as a search sends to.
const MAX_IPS: usize = 2;

/// Time for a question and its answer: four round trips of 500 ms.
const PATIENCE: Duration = Duration::from_secs(2);

/// Most witnesses asked, besides the relay in between.
pub(crate) const MAX_WITNESSES: usize = 4;

/// Time for which a question counts after its answer. It keeps an asker from finding a peer by asking for all
/// addresses. With four questions at a time, an asker gets through 96 addresses per minute, and through all of IPv4 in
/// 85 years.
pub(crate) const SETTLES: Duration = Duration::from_secs(5);

/// Most questions that count at a time, in total and per peer. A node searches for four peers at a time.
pub(crate) const MAX_QUESTIONS: (usize, usize) = (128, 4);

#[derive(Debug, thiserror::Error)]
pub(crate) enum SeenError {
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    #[error("the question has no valid PeerId")]
    NoPeer,
}

/// A question: is this peer at these addresses?
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) peer: PeerId,
    pub(crate) ips: Vec<Ipv4Addr>,
}

/// The trust in a witness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Witness {
    /// This node has chosen the witness.
    Chosen,
    /// The witness is the relay in between, which the remote peer may have chosen.
    Between,
}

/// Sockets at whose IP addresses a witness sees the peer. Only this module makes the value, and the gate admits a
/// search only for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Confirmed {
    targets: Vec<SocketAddr>,
    effort: Effort,
}

impl Confirmed {
    pub(crate) fn targets(&self) -> &[SocketAddr] {
        &self.targets
    }

    pub(crate) fn effort(&self) -> Effort {
        self.effort
    }

    #[cfg(test)]
    pub(crate) fn in_test(targets: &[SocketAddr]) -> Self {
        Self {
            targets: targets.to_vec(),
            effort: Effort::Full,
        }
    }
}

fn ipv4(at: &SocketAddr) -> Option<Ipv4Addr> {
    match at {
        SocketAddr::V4(at) => Some(*at.ip()),
        SocketAddr::V6(_) => None,
    }
}

/// Makes the question for the targets of a search.
pub(crate) fn question(peer: PeerId, targets: &[SocketAddr]) -> Question {
    let mut ips = Vec::new();
    for ip in targets.iter().filter_map(ipv4) {
        if ips.len() < MAX_IPS && !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    Question { peer, ips }
}

/// Asks all witnesses at once and returns the targets that may be searched: those that a chosen witness confirms, or
/// else those that the relay in between confirms. Returns `None` if no witness confirms any.
pub(crate) async fn confirm<F>(
    targets: &[SocketAddr],
    witnesses: impl IntoIterator<Item = (Witness, F)>,
) -> Option<Confirmed>
where
    F: Future<Output = Option<Vec<Ipv4Addr>>>,
{
    let at = |ips: &[Ipv4Addr]| -> Vec<SocketAddr> {
        let there = |at: &&SocketAddr| ipv4(at).is_some_and(|ip| ips.contains(&ip));
        targets.iter().filter(there).copied().collect()
    };
    let asked = witnesses.into_iter();
    let mut asked: FuturesUnordered<_> = asked
        .map(|(witness, answer)| async move { (witness, answer.await) })
        .collect();
    let mut between = Vec::new();
    let chosen = timeout(PATIENCE, async {
        while let Some((witness, answer)) = asked.next().await {
            let targets = at(&answer.unwrap_or_default());
            match witness {
                Witness::Chosen if !targets.is_empty() => return Some(targets),
                Witness::Chosen => {}
                Witness::Between => between = targets,
            }
        }
        None
    });
    if let Some(targets) = chosen.await.ok().flatten() {
        let effort = Effort::Full;
        return Some(Confirmed { targets, effort });
    }
    (!between.is_empty()).then_some(Confirmed {
        targets: between,
        effort: Effort::Small,
    })
}

/// Asks a witness. Returns the addresses at which it sees the peer.
pub(crate) async fn ask<S>(mut stream: S, question: &Question) -> Result<Vec<Ipv4Addr>, SeenError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let asked = SeenQuestion {
        peer: question.peer.to_bytes().into(),
        ips: encode(&question.ips),
    };
    exchange::send(&mut stream, &asked, MAX_MESSAGE).await?;
    let answer: SeenAnswer = exchange::receive(&mut stream, MAX_MESSAGE).await?;
    let mut seen = decode(&answer.ips);
    seen.retain(|ip| question.ips.contains(ip));
    Ok(seen)
}

/// Reads a question.
pub(crate) async fn receive<S>(stream: &mut S) -> Result<Question, SeenError>
where
    S: AsyncRead + Unpin,
{
    let question: SeenQuestion = within(PATIENCE, exchange::receive(stream, MAX_MESSAGE)).await?;
    Ok(Question {
        peer: PeerId::from_bytes(&question.peer).map_err(|_| SeenError::NoPeer)?,
        ips: decode(&question.ips),
    })
}

/// Answers a question with `seen`, the addresses in it at which the peer is seen.
pub(crate) async fn answer<S>(stream: &mut S, seen: &[Ipv4Addr]) -> Result<(), SeenError>
where
    S: AsyncWrite + Unpin,
{
    let answer = SeenAnswer { ips: encode(seen) };
    let sent = within(PATIENCE, async {
        exchange::send(stream, &answer, MAX_MESSAGE).await?;
        stream.shutdown().await?;
        Ok::<_, ExchangeError>(())
    });
    Ok(sent.await?)
}

fn encode(ips: &[Ipv4Addr]) -> Vec<Bytes> {
    let ips = ips.iter().take(MAX_IPS);
    ips.map(|ip| Bytes::copy_from_slice(&ip.octets())).collect()
}

fn decode(ips: &[Bytes]) -> Vec<Ipv4Addr> {
    let ips = ips.iter().take(MAX_IPS);
    ips.filter_map(|bytes| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.as_ref()).ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::future::{Pending, Ready, pending, ready};

    use futures::future::Either;

    use super::*;

    type Says = Either<Ready<Option<Vec<Ipv4Addr>>>, Pending<Option<Vec<Ipv4Addr>>>>;

    fn says(ips: &[&str]) -> Says {
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        Either::Left(ready(Some(ips)))
    }

    fn silent() -> Says {
        Either::Right(pending())
    }

    fn targets() -> [SocketAddr; 2] {
        ["198.51.100.7:5", "203.0.113.9:6"].map(|at| at.parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn no_search_goes_to_an_address_at_which_no_witness_sees_the_peer() {
        let confirm = |witnesses: Vec<(Witness, Says)>| async move {
            let confirmed = confirm(&targets(), witnesses).await?;
            Some((confirmed.targets, confirmed.effort))
        };
        assert_eq!(confirm(Vec::new()).await, None);
        assert_eq!(confirm(vec![(Witness::Chosen, silent())]).await, None);
        let other = vec![
            (Witness::Chosen, says(&[])),
            (Witness::Chosen, says(&["192.0.2.1"])),
            (Witness::Between, Either::Left(ready(None))),
        ];
        assert_eq!(confirm(other).await, None);
        // One confirmation is enough, and silent witnesses do not delay it for ever.
        let there = vec![
            (Witness::Chosen, silent()),
            (Witness::Chosen, says(&[])),
            (Witness::Chosen, says(&["203.0.113.9"])),
        ];
        let expected = (vec![targets()[1]], Effort::Full);
        assert_eq!(confirm(there).await, Some(expected));
    }

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_the_peer_has_chosen_confirms_a_small_search_only() {
        let relay = (Witness::Between, says(&["198.51.100.7", "203.0.113.9"]));
        let confirmed = confirm(&targets(), vec![relay, (Witness::Chosen, silent())]).await;
        let confirmed = confirmed.unwrap();
        assert_eq!(confirmed.effort(), Effort::Small);
        // A witness that this node has chosen overrules the relay.
        let relay = (Witness::Between, says(&["198.51.100.7", "203.0.113.9"]));
        let ours = (Witness::Chosen, says(&["203.0.113.9"]));
        let confirmed = confirm(&targets(), vec![relay, ours]).await.unwrap();
        assert_eq!(
            (confirmed.targets.len(), confirmed.effort),
            (1, Effort::Full)
        );
    }

    #[tokio::test]
    async fn an_answer_contains_only_addresses_of_the_question() {
        let question = question(PeerId::random(), &targets());
        let (near, mut far) = tokio::io::duplex(1024);
        let witness = async {
            let asked = receive(&mut far).await.unwrap();
            let more = [asked.ips[1], Ipv4Addr::new(8, 8, 8, 8)];
            answer(&mut far, &more).await.unwrap();
            asked
        };
        let (seen, asked) = tokio::join!(ask(near, &question), witness);
        assert_eq!(asked, question);
        assert_eq!(seen.unwrap(), [Ipv4Addr::new(203, 0, 113, 9)]);
    }
}
