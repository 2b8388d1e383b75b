//! Relaying others' connections, within stated limits (circuit relay v2).
//!
//! libp2p's relay limits the number of circuits and the bytes of each. What a machine on the internet has to bound is what all of them take
//! together and what one peer takes: rates and bytes a day are limited as well.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use libp2p::{Multiaddr, PeerId, core::SignedEnvelope, identity::Keypair, multiaddr::Protocol};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use weft_proto::{
    frame,
    wire::{
        CircuitLimit, CircuitReservation, CircuitStatus, HopMessage, ReservationVoucher,
        hop_message::Type as Hop,
    },
};

use crate::{
    LimitUse, OpenError, PathKind, Stream,
    address::{site, socket_within},
    circuit::{self, CircuitError, MAX_MESSAGE},
};

/// Requests being answered at a time, and of one peer.
const MAX_REQUESTS: usize = 256;
const MAX_REQUESTS_PER_PEER: usize = 8;

/// How long a client may take to say what it wants, and a destination to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes copied at a time.
const CHUNK: usize = 64 * 1024;

/// Bytes that may pass at once before a rate holds them back, in time at that rate.
const BURST: Duration = Duration::from_millis(250);

/// A circuit through which nothing passes for this long is ended: both ends of a living one ping each other.
const SILENT: Duration = Duration::from_secs(600);

/// Addresses named in a reservation.
const MAX_ADDRESSES: usize = 16;

/// Peers whose bytes are counted.
const MAX_COUNTED: usize = 16_384;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// What serving as a relay may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayLimits {
    /// Peers that may hold a reservation. Each keeps a connection open.
    pub reservations: usize,
    /// How long a reservation holds without being renewed.
    pub reservation_duration: Duration,
    /// Relayed connections at a time, in all.
    pub circuits: usize,
    /// Relayed connections at a time, of one peer.
    pub circuits_per_peer: usize,
    /// How long a relayed connection may last.
    pub circuit_duration: Duration,
    /// Bytes that may pass through a relayed connection each way. 0: no limit.
    pub circuit_bytes: u64,
    /// Bytes a second, of all relayed connections together. 0: no limit.
    pub rate: u64,
    /// Bytes a second, of all relayed connections of one peer. 0: no limit.
    pub rate_per_peer: u64,
    /// Bytes a day, of all relayed connections together. 0: no limit.
    pub daily_bytes: u64,
    /// Bytes a day, of all relayed connections of one peer. 0: no limit.
    pub daily_bytes_per_peer: u64,
}

impl Default for RelayLimits {
    /// Room for a model to move.
    fn default() -> Self {
        Self {
            reservations: 512,
            reservation_duration: Duration::from_secs(3600),
            circuits: 256,
            circuits_per_peer: 16,
            circuit_duration: Duration::from_secs(12 * 3600),
            circuit_bytes: 64 << 30,
            rate: 128 << 20,
            rate_per_peer: 64 << 20,
            daily_bytes: 4 << 40,
            daily_bytes_per_peer: 512 << 30,
        }
    }
}

/// What serving as a relay comes to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayUse {
    /// Reservations held here.
    pub reservations: usize,
    /// Relayed connections open.
    pub circuits: usize,
    /// Bytes relayed since the start, both ways.
    pub bytes: u64,
    /// Requests refused since the start, for whatever reason.
    pub refused: u64,
}

/// What was refused because of a limit.
#[derive(Debug, Default)]
struct Refused {
    reservations: u64,
    circuits: u64,
    circuits_per_network: u64,
    circuits_per_peer: u64,
    bytes: u64,
    bytes_per_peer: u64,
}

/// What the server needs of the driver.
#[derive(Debug)]
pub(crate) enum Need {
    /// The connection to this peer is to be kept: it holds a reservation.
    Keep(PeerId),
    /// A stream of the stop protocol over a direct connection.
    Open(PeerId, oneshot::Sender<Result<Stream, OpenError>>),
}

/// The server. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    key: Keypair,
    limits: Arc<RelayLimits>,
    state: Arc<Mutex<State>>,
    requests: Arc<Semaphore>,
    needs: mpsc::Sender<Need>,
    /// Of all circuits together.
    rate: Arc<Rate>,
}

#[derive(Debug, Default)]
struct State {
    reservations: HashMap<PeerId, Instant>,
    peers: HashMap<PeerId, Counted>,
    /// Circuits that were asked for from a network.
    networks: HashMap<IpAddr, usize>,
    all: Day,
    used: RelayUse,
    refused: Refused,
}

#[derive(Debug)]
struct Counted {
    requests: usize,
    circuits: usize,
    day: Day,
    rate: Arc<Rate>,
}

/// Bytes since the day began.
#[derive(Debug, Default)]
struct Day {
    began: Option<Instant>,
    bytes: u64,
}

impl Day {
    /// Counts `bytes`, unless that would be more than `limit`.
    fn count(&mut self, bytes: u64, limit: u64, now: Instant) -> bool {
        if self.began.is_none_or(|began| now >= began + DAY) {
            *self = Self {
                began: Some(now),
                bytes: 0,
            };
        }
        if limit != 0 && self.bytes.saturating_add(bytes) > limit {
            return false;
        }
        self.bytes += bytes;
        true
    }
}

/// So many bytes a second, shared by those that wait in the order in which they came.
#[derive(Debug)]
struct Rate {
    per_second: u64,
    next: Mutex<Instant>,
}

impl Rate {
    fn new(per_second: u64) -> Self {
        Self {
            per_second,
            next: Mutex::new(Instant::now()),
        }
    }

    /// Takes the next `bytes`; when they may pass.
    fn take(&self, bytes: usize, now: Instant) -> Instant {
        if self.per_second == 0 {
            return now;
        }
        let cost = Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
        let mut next = lock(&self.next);
        *next = (*next).max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        *next
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while holding the lock")
}

/// A place among the circuits.
#[derive(Debug)]
struct Circuit {
    server: Server,
    ends: [PeerId; 2],
    /// Where it was asked for from.
    network: Option<IpAddr>,
    /// Bytes that have passed.
    moved: AtomicU64,
}

impl Drop for Circuit {
    fn drop(&mut self) {
        let mut state = lock(&self.server.state);
        state.used.circuits -= 1;
        if let Some(network) = self.network
            && let Some(circuits) = state.networks.get_mut(&network)
        {
            *circuits -= 1;
            if *circuits == 0 {
                state.networks.remove(&network);
            }
        }
        for end in self.ends {
            if let Some(counted) = state.peers.get_mut(&end) {
                counted.circuits -= 1;
            }
        }
    }
}

impl Server {
    /// With what it needs of the driver.
    pub(crate) fn new(key: Keypair, limits: RelayLimits) -> (Self, mpsc::Receiver<Need>) {
        let (needs, needed) = mpsc::channel(MAX_REQUESTS);
        let server = Self {
            key,
            state: Arc::default(),
            requests: Arc::new(Semaphore::new(MAX_REQUESTS)),
            needs,
            rate: Arc::new(Rate::new(limits.rate)),
            limits: Arc::new(limits),
        };
        (server, needed)
    }

    /// Every limit, and what it comes to.
    pub(crate) fn limits(&self) -> Vec<LimitUse> {
        let state = lock(&self.state);
        let circuits = state.peers.values().map(|counted| counted.circuits);
        let per_peer = circuits.max().unwrap_or_default();
        let bytes = state.peers.values().map(|counted| counted.day.bytes);
        let bytes_per_peer = bytes.max().unwrap_or_default();
        let per_network = state.networks.values().copied().max().unwrap_or_default();
        let some = |limit: u64| (limit != 0).then_some(limit);
        let limit = |name, used, limit, refused| LimitUse {
            name,
            used,
            limit,
            refused,
        };
        let refused = &state.refused;
        vec![
            limit(
                "relay_reservations",
                state.reservations.len() as u64,
                Some(self.limits.reservations as u64),
                refused.reservations,
            ),
            limit(
                "relay_circuits",
                state.used.circuits as u64,
                Some(self.limits.circuits as u64),
                refused.circuits,
            ),
            limit(
                "relay_circuits_per_network",
                per_network as u64,
                Some(self.per_network() as u64),
                refused.circuits_per_network,
            ),
            limit(
                "relay_circuits_per_peer",
                per_peer as u64,
                Some(self.limits.circuits_per_peer as u64),
                refused.circuits_per_peer,
            ),
            limit(
                "relay_bytes_today",
                state.all.bytes,
                some(self.limits.daily_bytes),
                refused.bytes,
            ),
            limit(
                "relay_bytes_today_per_peer",
                bytes_per_peer,
                some(self.limits.daily_bytes_per_peer),
                refused.bytes_per_peer,
            ),
        ]
    }

    pub(crate) fn used(&self) -> RelayUse {
        let state = lock(&self.state);
        RelayUse {
            reservations: state.reservations.len(),
            ..state.used
        }
    }

    /// Whether `peer` holds a reservation.
    pub(crate) fn holds(&self, peer: &PeerId) -> bool {
        lock(&self.state).reservations.contains_key(peer)
    }

    /// There is no direct connection to the peer any more.
    pub(crate) fn disconnected(&self, peer: &PeerId) {
        lock(&self.state).reservations.remove(peer);
    }

    /// Reservations that were not renewed end; whose.
    pub(crate) fn expire(&self) -> Vec<PeerId> {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let expired = state.reservations.extract_if(|_, until| *until <= now);
        let expired: Vec<_> = expired.map(|(peer, _)| peer).collect();
        // Who has used up nothing worth remembering.
        state.peers.retain(|_, counted| {
            counted.requests > 0
                || counted.circuits > 0
                || counted.day.began.is_some_and(|began| now < began + DAY)
        });
        expired
    }

    /// Answers a request. `addresses`: where others reach us.
    pub(crate) fn serve(&self, stream: Stream, addresses: Vec<Multiaddr>) {
        let (server, client) = (self.clone(), stream.peer());
        // Dropped, and so reset, if there are too many.
        let Ok(place) = Arc::clone(&self.requests).try_acquire_owned() else {
            return;
        };
        if stream.path().kind == PathKind::Relayed || !self.begin(client) {
            return;
        }
        tokio::spawn(async move {
            let result = server.answer(stream, addresses).await;
            drop(place);
            match result {
                Ok(None) => {}
                Ok(Some((one, other, circuit))) => server.relay(one, other, circuit).await,
                Err(error) => {
                    tracing::debug!(%client, %error, "a request to relay came to nothing");
                }
            }
        });
    }

    /// Counts a request of `client`, unless it has too many under way.
    fn begin(&self, client: PeerId) -> bool {
        let mut state = lock(&self.state);
        match self.counted(&mut state, client) {
            Some(counted) if counted.requests < MAX_REQUESTS_PER_PEER => {
                counted.requests += 1;
                true
            }
            _ => false,
        }
    }

    fn counted<'a>(&self, state: &'a mut State, peer: PeerId) -> Option<&'a mut Counted> {
        if state.peers.len() >= MAX_COUNTED && !state.peers.contains_key(&peer) {
            // Whoever comes with many identities must not lock out the rest: the one that has moved least is forgotten.
            let idle = state.peers.iter();
            let idle = idle.filter(|(_, counted)| counted.requests == 0 && counted.circuits == 0);
            let least = *idle.min_by_key(|(_, counted)| counted.day.bytes)?.0;
            state.peers.remove(&least);
        }
        Some(state.peers.entry(peer).or_insert_with(|| Counted {
            requests: 0,
            circuits: 0,
            day: Day::default(),
            rate: Arc::new(Rate::new(self.limits.rate_per_peer)),
        }))
    }

    /// One site is not to have all circuits, however many peers it is.
    fn per_network(&self) -> usize {
        (self.limits.circuits / 4).max(self.limits.circuits_per_peer)
    }

    async fn answer(
        &self,
        mut stream: Stream,
        addresses: Vec<Multiaddr>,
    ) -> Result<Option<(Stream, Stream, Circuit)>, CircuitError> {
        let client = stream.peer();
        let network = socket_within(&stream.path().address)
            .filter(|at| !at.ip().is_loopback())
            .map(|at| site(at.ip()));
        let answered = timeout(3 * PATIENCE, async {
            let request = timeout(PATIENCE, frame::read(&mut stream, MAX_MESSAGE)).await;
            let request: Option<HopMessage> = request.map_err(|_| CircuitError::TimedOut)??;
            let request = request.ok_or(CircuitError::Ended)?;
            match request.r#type {
                Some(kind) if kind == Hop::Reserve as i32 => {
                    let answer = match self.reserve(client, addresses).await {
                        Ok(answer) => answer,
                        Err(status) => self.refusal(status),
                    };
                    reply(&mut stream, &answer).await?;
                    Ok(None)
                }
                Some(kind) if kind == Hop::Connect as i32 => {
                    let destination = request.peer.as_ref().and_then(circuit::peer_id);
                    let connected = match destination {
                        Some(destination) => self.connect(client, network, destination).await,
                        None => Err(CircuitStatus::MalformedMessage),
                    };
                    match connected {
                        Ok((other, circuit)) => {
                            let answer = HopMessage {
                                limit: self.limit(),
                                ..status(CircuitStatus::Ok)
                            };
                            reply(&mut stream, &answer).await?;
                            Ok(Some((other, circuit)))
                        }
                        Err(status) => {
                            reply(&mut stream, &self.refusal(status)).await?;
                            Ok(None)
                        }
                    }
                }
                _ => {
                    let refusal = self.refusal(CircuitStatus::UnexpectedMessage);
                    reply(&mut stream, &refusal).await?;
                    Ok(None)
                }
            }
        })
        .await;
        if let Some(counted) = lock(&self.state).peers.get_mut(&client) {
            counted.requests -= 1;
        }
        match answered {
            Ok(Ok(Some((other, circuit)))) => Ok(Some((stream, other, circuit))),
            Ok(Ok(None)) => {
                // Whether it still listens makes no difference.
                let _ = stream.shutdown().await;
                Ok(None)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(CircuitError::TimedOut),
        }
    }

    fn refusal(&self, reason: CircuitStatus) -> HopMessage {
        lock(&self.state).used.refused += 1;
        status(reason)
    }

    /// What a circuit is limited to, as clients are told.
    fn limit(&self) -> Option<CircuitLimit> {
        Some(CircuitLimit {
            duration: u32::try_from(self.limits.circuit_duration.as_secs()).ok(),
            data: (self.limits.circuit_bytes != 0).then_some(self.limits.circuit_bytes),
        })
    }

    async fn reserve(
        &self,
        client: PeerId,
        addresses: Vec<Multiaddr>,
    ) -> Result<HopMessage, CircuitStatus> {
        let holds = self.limits.reservation_duration;
        {
            let mut state = lock(&self.state);
            let full = state.reservations.len() >= self.limits.reservations;
            if full && !state.reservations.contains_key(&client) {
                state.refused.reservations += 1;
                return Err(CircuitStatus::ReservationRefused);
            }
            state.reservations.insert(client, Instant::now() + holds);
        }
        // The network may have stopped.
        let _ = self.needs.send(Need::Keep(client)).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let expire = (now.unwrap_or_default() + holds).as_secs();
        let relay = self.key.public().to_peer_id();
        let voucher = ReservationVoucher {
            relay: relay.to_bytes().into(),
            peer: client.to_bytes().into(),
            expiration: expire,
        };
        let voucher = SignedEnvelope::new(
            &self.key,
            "libp2p-relay-rsvp".to_owned(),
            vec![0x03, 0x02],
            voucher.encode_to_vec(),
        );
        let voucher = voucher.ok().map(|v| v.into_protobuf_encoding().into());
        let addresses = addresses.into_iter().take(MAX_ADDRESSES);
        Ok(HopMessage {
            reservation: Some(CircuitReservation {
                expire: Some(expire),
                addrs: addresses
                    .map(|address| Bytes::from(address.with(Protocol::P2p(relay)).to_vec()))
                    .collect(),
                voucher,
            }),
            limit: self.limit(),
            ..status(CircuitStatus::Ok)
        })
    }

    async fn connect(
        &self,
        source: PeerId,
        network: Option<IpAddr>,
        destination: PeerId,
    ) -> Result<(Stream, Circuit), CircuitStatus> {
        let circuit = self.circuit(source, network, destination)?;
        let (reply, answer) = oneshot::channel();
        let need = Need::Open(destination, reply);
        let asked = self.needs.send(need).await;
        asked.map_err(|_| CircuitStatus::ConnectionFailed)?;
        let Ok(Ok(mut stream)) = answer.await else {
            return Err(CircuitStatus::ConnectionFailed);
        };
        match circuit::offer(&mut stream, source, self.limit()).await {
            Ok(()) => Ok((stream, circuit)),
            Err(error) => {
                tracing::debug!(%source, %destination, %error, "a circuit did not come about");
                Err(CircuitStatus::ConnectionFailed)
            }
        }
    }

    /// Takes a place for a circuit.
    fn circuit(
        &self,
        source: PeerId,
        network: Option<IpAddr>,
        destination: PeerId,
    ) -> Result<Circuit, CircuitStatus> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        if !state.reservations.contains_key(&destination) {
            return Err(CircuitStatus::NoReservation);
        }
        if source == destination {
            return Err(CircuitStatus::PermissionDenied);
        }
        if state.used.circuits >= self.limits.circuits {
            state.refused.circuits += 1;
            return Err(CircuitStatus::ResourceLimitExceeded);
        }
        let from_there = network.and_then(|network| state.networks.get(&network));
        if from_there.is_some_and(|circuits| *circuits >= self.per_network()) {
            state.refused.circuits_per_network += 1;
            return Err(CircuitStatus::ResourceLimitExceeded);
        }
        for end in [source, destination] {
            let counted = self.counted(state, end);
            if counted.is_none_or(|c| c.circuits >= self.limits.circuits_per_peer) {
                state.refused.circuits_per_peer += 1;
                return Err(CircuitStatus::ResourceLimitExceeded);
            }
        }
        for end in [source, destination] {
            if let Some(counted) = self.counted(state, end) {
                counted.circuits += 1;
            }
        }
        if let Some(network) = network {
            *state.networks.entry(network).or_default() += 1;
        }
        state.used.circuits += 1;
        Ok(Circuit {
            server: self.clone(),
            ends: [source, destination],
            network,
            moved: AtomicU64::new(0),
        })
    }

    /// Passes bytes both ways, until both sides have ended, one fails, or a limit is reached.
    async fn relay(&self, one: Stream, other: Stream, circuit: Circuit) {
        let rates: Vec<_> = {
            let state = lock(&self.state);
            let counted = circuit.ends.iter().filter_map(|end| state.peers.get(end));
            let rates = counted.map(|counted| Arc::clone(&counted.rate));
            rates.chain([Arc::clone(&self.rate)]).collect()
        };
        let (read_one, write_one) = split(one);
        let (read_other, write_other) = split(other);
        let both = async {
            tokio::try_join!(
                self.pump(read_one, write_other, &circuit, &rates),
                self.pump(read_other, write_one, &circuit, &rates),
            )
        };
        let [source, destination] = circuit.ends;
        tokio::select! {
            ended = timeout(self.limits.circuit_duration, both) => match ended {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(%source, %destination, %error, "a circuit failed"),
                Err(_) => tracing::debug!(%source, %destination, "a circuit's time is over"),
            },
            () = falls_silent(&circuit.moved) => {
                tracing::debug!(%source, %destination, "nothing has passed through a circuit for long");
            }
        }
    }

    async fn pump<R, W>(
        &self,
        mut from: R,
        mut to: W,
        circuit: &Circuit,
        rates: &[Arc<Rate>],
    ) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = vec![0; CHUNK];
        let mut moved = 0u64;
        loop {
            let size = from.read(&mut buffer).await?;
            if size == 0 {
                return to.shutdown().await;
            }
            moved += size as u64;
            circuit.moved.fetch_add(size as u64, Ordering::Relaxed);
            let over = self.limits.circuit_bytes != 0 && moved > self.limits.circuit_bytes;
            if over || !self.count(circuit, size as u64) {
                return Err(io::Error::other("the limit of bytes is reached"));
            }
            let now = Instant::now();
            let free = rates.iter().map(|rate| rate.take(size, now)).max();
            if let Some(free) = free.filter(|free| *free > now) {
                sleep_until(free).await;
            }
            to.write_all(&buffer[..size]).await?;
            to.flush().await?;
        }
    }

    /// Counts bytes against the limits of the day.
    fn count(&self, circuit: &Circuit, bytes: u64) -> bool {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.used.bytes += bytes;
        let mut within = state.all.count(bytes, self.limits.daily_bytes, now);
        if !within {
            state.refused.bytes += 1;
        }
        for end in circuit.ends {
            if let Some(counted) = state.peers.get_mut(&end) {
                let limit = self.limits.daily_bytes_per_peer;
                if !counted.day.count(bytes, limit, now) {
                    state.refused.bytes_per_peer += 1;
                    within = false;
                }
            }
        }
        within
    }
}

/// Returns when the count has not changed for [`SILENT`].
async fn falls_silent(moved: &AtomicU64) {
    let mut before = moved.load(Ordering::Relaxed);
    loop {
        sleep(SILENT).await;
        let now = moved.load(Ordering::Relaxed);
        if std::mem::replace(&mut before, now) == now {
            return;
        }
    }
}

fn status(status: CircuitStatus) -> HopMessage {
    HopMessage {
        r#type: Some(Hop::Status.into()),
        status: Some(status.into()),
        ..HopMessage::default()
    }
}

async fn reply(stream: &mut Stream, message: &HopMessage) -> Result<(), CircuitError> {
    let write = async {
        frame::write(stream, message, MAX_MESSAGE).await?;
        stream.flush().await?;
        Ok(())
    };
    timeout(PATIENCE, write)
        .await
        .unwrap_or(Err(CircuitError::TimedOut))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(limits: RelayLimits) -> Server {
        Server::new(Keypair::generate_ed25519(), limits).0
    }

    #[tokio::test]
    async fn reservations_and_circuits_are_limited() {
        let server = server(RelayLimits {
            reservations: 1,
            circuits: 3,
            circuits_per_peer: 2,
            ..RelayLimits::default()
        });
        let (a, b, c) = (PeerId::random(), PeerId::random(), PeerId::random());
        let none = Vec::new;
        assert_eq!(
            server.circuit(b, None, a).unwrap_err(),
            CircuitStatus::NoReservation
        );
        let granted = server.reserve(a, none()).await.unwrap();
        let voucher = granted.reservation.unwrap().voucher.unwrap();
        let envelope = SignedEnvelope::from_protobuf_encoding(&voucher).unwrap();
        assert!(envelope.verify("libp2p-relay-rsvp".to_owned()));
        // A renewal needs no other place.
        server.reserve(a, none()).await.unwrap();
        let refused = server.reserve(b, none()).await.unwrap_err();
        assert_eq!(refused, CircuitStatus::ReservationRefused);
        let first = server.circuit(b, None, a).unwrap();
        let _second = server.circuit(c, None, a).unwrap();
        let refused = server.circuit(b, None, a).unwrap_err();
        assert_eq!(refused, CircuitStatus::ResourceLimitExceeded);
        drop(first);
        let _third = server.circuit(b, None, a).unwrap();
        assert_eq!(server.used().circuits, 2);
        server.disconnected(&a);
        assert_eq!(
            server.circuit(b, None, a).unwrap_err(),
            CircuitStatus::NoReservation
        );
        assert_eq!(server.used().reservations, 0);
    }

    #[tokio::test]
    async fn one_site_does_not_get_all_circuits() {
        let server = server(RelayLimits {
            circuits: 8,
            circuits_per_peer: 2,
            ..RelayLimits::default()
        });
        let here = Some(site("2001:db8::1".parse().unwrap()));
        let neighbour = Some(site("2001:db8::2".parse().unwrap()));
        let elsewhere = Some(site("2001:db8:0:1::1".parse().unwrap()));
        let mut open = Vec::new();
        let mut circuit = |network| {
            let [one, other] = [PeerId::random(), PeerId::random()];
            lock(&server.state)
                .reservations
                .insert(other, Instant::now());
            server.circuit(one, network, other).map(|c| open.push(c))
        };
        circuit(here).unwrap();
        circuit(neighbour).unwrap();
        assert_eq!(circuit(here), Err(CircuitStatus::ResourceLimitExceeded));
        circuit(elsewhere).unwrap();
        assert_eq!(lock(&server.state).refused.circuits_per_network, 1);
        open.clear();
        assert!(lock(&server.state).networks.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_circuit_through_which_nothing_passes_is_silent() {
        let moved = AtomicU64::new(0);
        let begin = Instant::now();
        let passing = async {
            for _ in 0..3 {
                sleep(SILENT / 2).await;
                moved.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::join!(passing, falls_silent(&moved));
        assert!(begin.elapsed() > 2 * SILENT && begin.elapsed() <= 3 * SILENT);
    }

    #[tokio::test]
    async fn bytes_of_a_day_are_limited_for_one_and_for_all() {
        let server = server(RelayLimits {
            daily_bytes: 300,
            daily_bytes_per_peer: 200,
            ..RelayLimits::default()
        });
        let peers: Vec<_> = (0..4).map(|_| PeerId::random()).collect();
        for to in [peers[0], peers[2]] {
            server.reserve(to, Vec::new()).await.unwrap();
        }
        let circuit = server.circuit(peers[1], None, peers[0]).unwrap();
        assert!(server.count(&circuit, 200));
        assert!(!server.count(&circuit, 1));
        let other = server.circuit(peers[3], None, peers[2]).unwrap();
        assert!(server.count(&other, 99));
        assert!(!server.count(&other, 2));
    }

    #[tokio::test]
    async fn those_who_move_little_are_forgotten_first() {
        let server = server(RelayLimits::default());
        let mut state = lock(&server.state);
        let heavy = PeerId::random();
        let counted = server.counted(&mut state, heavy).unwrap();
        assert!(counted.day.count(1 << 30, 0, Instant::now()));
        for _ in 0..MAX_COUNTED {
            assert!(server.counted(&mut state, PeerId::random()).is_some());
        }
        assert_eq!(state.peers.len(), MAX_COUNTED);
        assert_eq!(state.peers[&heavy].day.bytes, 1 << 30);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_holds_bytes_back() {
        let rate = Rate::new(1000);
        let begin = Instant::now();
        let mut at = begin;
        for _ in 0..10 {
            at = rate.take(500, begin);
        }
        let took = at - begin;
        assert!(
            took > Duration::from_millis(4500) && took <= Duration::from_secs(5),
            "{took:?}"
        );
        assert_eq!(Rate::new(0).take(1 << 40, begin), begin);
    }

    #[tokio::test(start_paused = true)]
    async fn reservations_that_are_not_renewed_end() {
        let server = server(RelayLimits::default());
        let peer = PeerId::random();
        server.reserve(peer, Vec::new()).await.unwrap();
        assert!(server.expire().is_empty());
        tokio::time::advance(Duration::from_secs(3601)).await;
        assert_eq!(server.expire(), [peer]);
    }
}
