//! The relay server: relays connections of other peers within configured limits (circuit relay v2).
//!
//! libp2p's relay limits the number of circuits and the bytes of each. A machine on the internet also has to limit the
//! total of all circuits and the use by one peer, so rates and bytes per day are limited as well.

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
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
    sync::{mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use weft_proto::wire::{
    CircuitLimit, CircuitReservation, CircuitStatus, HopMessage, ReservationVoucher,
    hop_message::Type as Hop,
};

use crate::{
    LimitUse, NetworkGroup, OpenError, PathKind, Permit, RelayLimits, RelayUse, Shares, Stream,
    exchange::{self, ExchangeError, within},
    policy::shares::{ByScope, SITE, Scope, count},
    relay::accounts::{Counted, DAY, Day, Rate, lock},
    relay::circuit::{self, CircuitError, MAX_MESSAGE},
    span,
};

/// Most requests being answered at a time, in total and per peer.
const MAX_REQUESTS: usize = 256;
const MAX_REQUESTS_PER_PEER: usize = 8;

/// Time that a client has to send its request, and a destination to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes copied at a time.
const CHUNK: usize = 64 * 1024;

/// Time without traffic after which a circuit is ended. Both ends of a live circuit ping each other.
const SILENT: Duration = Duration::from_secs(600);

/// A circuit is idle if fewer bytes than this passed in each of its last two [`WINDOW`]s. Pings on an unused connection
/// are about 300 bytes each, four per minute.
const IDLE_BYTES: u64 = 16 * 1024;
const WINDOW: Duration = Duration::from_secs(30);

/// One source peer, and one source address, may hold one in this many of a destination's circuits. Otherwise one
/// machine could take all of them, and keep all other peers from a node that is reached only through relays.
const SOURCE_SHARE: usize = 4;

/// Most addresses named in a reservation.
const MAX_ADDRESSES: usize = 16;

/// Most peers whose bytes are counted.
const MAX_COUNTED: usize = 16_384;

/// Numbers of refusals, by limit.
#[derive(Debug, Default)]
struct Refused {
    reservations: u64,
    circuits: u64,
    circuits_per_network: u64,
    circuits_per_peer: u64,
    circuits_per_source: u64,
    replaced: u64,
    bytes: u64,
    bytes_per_peer: u64,
}

/// A request of the server to the driver.
#[derive(Debug)]
pub(crate) enum Need {
    /// Keep the connection to this peer, because it holds a reservation.
    Keep(PeerId),
    /// Open a stream of the stop protocol over a direct connection.
    Open(PeerId, oneshot::Sender<Result<Stream, OpenError>>),
}

/// The relay server. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    key: Keypair,
    limits: Arc<RelayLimits>,
    state: Arc<Mutex<State>>,
    requests: Shares,
    /// Limits reservations per network group of the peers that hold them.
    reserved: Shares,
    needs: mpsc::Sender<Need>,
    /// Rate of all circuits together.
    rate: Arc<Rate>,
}

#[derive(Debug, Default)]
struct State {
    reservations: HashMap<PeerId, Reservation>,
    peers: HashMap<PeerId, Counted>,
    /// Circuits by scope of the source's network group.
    networks: ByScope,
    circuits: HashMap<u64, Held>,
    next: u64,
    all: Day,
    used: RelayUse,
    refused: Refused,
}

#[derive(Debug)]
struct Reservation {
    until: Instant,
    _permit: Permit,
}

/// A circuit, as the server sees it.
#[derive(Debug)]
struct Held {
    ends: [PeerId; 2],
    /// Network group of the source.
    group: NetworkGroup,
    since: Instant,
    /// Beginning of the current window, bytes that passed in it, and bytes in the window before.
    window: (Instant, u64, u64),
    /// Dropped with this value, which ends the circuit.
    _held: oneshot::Sender<Infallible>,
}

/// The sources that share a part of a destination's circuits.
#[derive(Debug, Clone, Copy)]
enum CircuitSource {
    Peer(PeerId),
    Scope(Scope),
}

impl CircuitSource {
    fn has(self, held: &Held) -> bool {
        match self {
            Self::Peer(peer) => held.ends[0] == peer,
            Self::Scope(scope) => held.group.scopes().any(|(other, _)| other == scope),
        }
    }
}

impl Held {
    fn passed(&mut self, bytes: u64, now: Instant) {
        self.advance_window(now);
        self.window.1 += bytes;
    }

    fn advance_window(&mut self, now: Instant) {
        let (began, bytes, _) = self.window;
        let age = now.duration_since(began);
        if age >= 2 * WINDOW {
            self.window = (now, 0, 0);
        } else if age >= WINDOW {
            self.window = (began + WINDOW, 0, bytes);
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        let (began, bytes, before) = self.window;
        let recent = match now.duration_since(began) {
            age if age >= 2 * WINDOW => 0,
            age if age >= WINDOW => bytes,
            _ => bytes.max(before),
        };
        now.duration_since(self.since) >= 2 * WINDOW && recent < IDLE_BYTES
    }
}

/// A circuit that counts until this value is dropped.
#[derive(Debug)]
struct Circuit {
    server: Server,
    id: u64,
    ends: [PeerId; 2],
    /// Resolves when the circuit has to make room for another.
    replaced: oneshot::Receiver<Infallible>,
    /// Bytes that have passed.
    moved: AtomicU64,
}

impl Drop for Circuit {
    fn drop(&mut self) {
        lock(&self.server.state).end(self.id);
    }
}

impl State {
    /// Ends a circuit and releases its counts.
    fn end(&mut self, id: u64) {
        let Some(held) = self.circuits.remove(&id) else {
            return;
        };
        self.used.circuits -= 1;
        self.networks.remove(held.group);
        for end in held.ends {
            if let Some(counted) = self.peers.get_mut(&end) {
                counted.circuits -= 1;
            }
        }
    }

    /// Returns the circuit of those `among` that has to make room for one from `group`. This is the one that has been
    /// idle longest. If none is idle, it is the oldest circuit of the network group that has most, if that is more than
    /// the newcomer's group would have.
    fn to_replace(
        &self,
        among: impl Fn(&Held) -> bool,
        group: NetworkGroup,
        now: Instant,
    ) -> Option<u64> {
        let candidates = || self.circuits.iter().filter(|(_, held)| among(held));
        let idle = candidates().filter(|(_, held)| held.is_idle(now));
        if let Some((id, _)) = idle.min_by_key(|(_, held)| (held.window.0, held.since)) {
            return Some(*id);
        }
        let mut of_group: HashMap<NetworkGroup, usize> = HashMap::new();
        for (_, held) in candidates() {
            *of_group.entry(held.group).or_default() += 1;
        }
        let newcomer = count(&of_group, &group) + 1;
        candidates()
            .map(|(id, held)| (of_group[&held.group], std::cmp::Reverse(held.since), *id))
            .filter(|(of_group, ..)| *of_group > newcomer)
            .max()
            .map(|(.., id)| id)
    }
}

impl Server {
    /// Makes the server, and the driver's end of its channel.
    pub(crate) fn new(key: Keypair, limits: RelayLimits) -> (Self, mpsc::Receiver<Need>) {
        let (needs, needed) = mpsc::channel(MAX_REQUESTS);
        let server = Self {
            key,
            state: Arc::default(),
            requests: Shares::new(MAX_REQUESTS, MAX_REQUESTS_PER_PEER),
            reserved: Shares::new(limits.reservations, 1),
            needs,
            rate: Arc::new(Rate::new(limits.rate)),
            limits: Arc::new(limits),
        };
        (server, needed)
    }

    /// Returns all limits with their use.
    pub(crate) fn limits(&self) -> Vec<LimitUse> {
        let state = lock(&self.state);
        let circuits = state.peers.values().map(|counted| counted.circuits);
        let per_peer = circuits.max().unwrap_or_default();
        let bytes = state.peers.values().map(|counted| counted.day.bytes);
        let bytes_per_peer = bytes.max().unwrap_or_default();
        let mut pairs: HashMap<(NetworkGroup, PeerId), usize> = HashMap::new();
        for held in state.circuits.values() {
            *pairs.entry((held.group, held.ends[1])).or_default() += 1;
        }
        let per_source = pairs.values().copied().max().unwrap_or_default();
        let [_, of_address, _] = self.reserved.limits("", "", "");
        let requests = self.requests.limits("", "", "");
        let some = |limit: u64| (limit != 0).then_some(limit);
        // The bytes of a day may exceed `usize`.
        let of_day = |name, used, limit, refused| LimitUse {
            name,
            used,
            limit: some(limit),
            refused,
        };
        let refused = &state.refused;
        vec![
            LimitUse::of(
                "relay_reservations",
                state.reservations.len(),
                self.limits.reservations,
                refused.reservations,
            ),
            LimitUse {
                name: "relay_reservations_per_address",
                ..of_address
            },
            LimitUse::of(
                "relay_requests",
                self.requests.used(),
                self.requests.all(),
                requests.iter().map(|row| row.refused).sum(),
            ),
            LimitUse::refusals("relay_circuits_replaced", refused.replaced),
            LimitUse::of(
                "relay_circuits_per_source",
                per_source,
                self.per_source(),
                refused.circuits_per_source,
            ),
            LimitUse::of(
                "relay_circuits",
                state.used.circuits,
                self.limits.circuits,
                refused.circuits,
            ),
            LimitUse::of(
                "relay_circuits_per_network",
                state.networks.most_of_site(),
                self.per_network(),
                refused.circuits_per_network,
            ),
            LimitUse::of(
                "relay_circuits_per_peer",
                per_peer,
                self.limits.circuits_per_peer,
                refused.circuits_per_peer,
            ),
            of_day(
                "relay_bytes_today",
                state.all.bytes,
                self.limits.daily_bytes,
                refused.bytes,
            ),
            of_day(
                "relay_bytes_today_per_peer",
                bytes_per_peer,
                self.limits.daily_bytes_per_peer,
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

    /// Returns true if `peer` holds a reservation.
    pub(crate) fn holds(&self, peer: &PeerId) -> bool {
        lock(&self.state).reservations.contains_key(peer)
    }

    /// Ends the reservation of a peer without a direct connection.
    pub(crate) fn disconnected(&self, peer: &PeerId) {
        lock(&self.state).reservations.remove(peer);
    }

    /// Ends reservations that were not renewed, and returns their peers.
    pub(crate) fn expire(&self) -> Vec<PeerId> {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let reservations = &mut state.reservations;
        let expired = reservations.extract_if(|_, held| held.until <= now);
        let expired: Vec<_> = expired.map(|(peer, _)| peer).collect();
        // Forget peers without circuits whose day is over.
        state.peers.retain(|_, counted| {
            counted.circuits > 0 || counted.day.began.is_some_and(|began| now < began + DAY)
        });
        expired
    }

    /// Answers a request. `addresses` are the addresses at which peers reach this node.
    pub(crate) fn serve(&self, stream: Stream, addresses: Vec<Multiaddr>) {
        let (server, client) = (self.clone(), stream.peer());
        let group = NetworkGroup::of(stream.path());
        if stream.path().kind == PathKind::Relayed {
            return;
        }
        // If there are too many, the stream is dropped, and so reset.
        let Ok(permit) = self.requests.take(client, group) else {
            return;
        };
        span::spawn(client, async move {
            let result = server.answer(stream, addresses).await;
            drop(permit);
            match result {
                Ok(None) => {}
                Ok(Some((one, other, circuit))) => server.relay(one, other, circuit).await,
                Err(error) => {
                    tracing::debug!(%client, %error, "relay request failed");
                }
            }
        });
    }

    fn counted<'a>(&self, state: &'a mut State, peer: PeerId) -> Option<&'a mut Counted> {
        if state.peers.len() >= MAX_COUNTED && !state.peers.contains_key(&peer) {
            // One client with many identities must not lock out others, so the peer that has moved least is forgotten.
            let idle = state.peers.iter();
            let idle = idle.filter(|(_, counted)| counted.circuits == 0);
            let least = *idle.min_by_key(|(_, counted)| counted.day.bytes)?.0;
            state.peers.remove(&least);
        }
        Some(state.peers.entry(peer).or_insert_with(|| Counted {
            circuits: 0,
            day: Day::default(),
            rate: Arc::new(Rate::new(self.limits.rate_per_peer)),
        }))
    }

    /// Returns how many circuits one site may have, from any number of peers.
    fn per_network(&self) -> usize {
        (self.limits.circuits / 4).max(self.limits.circuits_per_peer)
    }

    /// Returns how many circuits to one destination one source peer, or one source address, may hold.
    fn per_source(&self) -> usize {
        (self.limits.circuits_per_peer / SOURCE_SHARE).max(1)
    }

    async fn answer(
        &self,
        mut stream: Stream,
        addresses: Vec<Multiaddr>,
    ) -> Result<Option<(Stream, Stream, Circuit)>, CircuitError> {
        let client = stream.peer();
        let group = NetworkGroup::of(stream.path());
        let answered = within(3 * PATIENCE, async {
            let request = exchange::receive(&mut stream, MAX_MESSAGE);
            let request: HopMessage = within(PATIENCE, request).await?;
            match request.r#type {
                Some(kind) if kind == Hop::Reserve as i32 => {
                    let answer = match self.reserve(client, group, addresses).await {
                        Ok(answer) => answer,
                        Err(status) => self.refusal(status),
                    };
                    reply(&mut stream, &answer).await?;
                    Ok(None)
                }
                Some(kind) if kind == Hop::Connect as i32 => {
                    let destination = request.peer.as_ref().and_then(circuit::peer_id);
                    let connected = match destination {
                        Some(destination) => self.connect(client, group, destination).await,
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
        match answered {
            Ok(Some((other, circuit))) => Ok(Some((stream, other, circuit))),
            Ok(None) => {
                // It does not matter if the client no longer listens.
                let _ = stream.shutdown().await;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn refusal(&self, reason: CircuitStatus) -> HopMessage {
        lock(&self.state).used.refused += 1;
        status(reason)
    }

    /// Returns the limits of a circuit, as clients are told.
    fn limit(&self) -> Option<CircuitLimit> {
        Some(CircuitLimit {
            duration: u32::try_from(self.limits.circuit_duration.as_secs()).ok(),
            data: (self.limits.circuit_bytes != 0).then_some(self.limits.circuit_bytes),
        })
    }

    async fn reserve(
        &self,
        client: PeerId,
        group: NetworkGroup,
        addresses: Vec<Multiaddr>,
    ) -> Result<HopMessage, CircuitStatus> {
        let holds = self.limits.reservation_duration;
        {
            let mut state = lock(&self.state);
            let until = Instant::now() + holds;
            match state.reservations.get_mut(&client) {
                Some(held) => held.until = until,
                None => match self.reserved.take(client, group) {
                    Ok(permit) => {
                        let held = Reservation {
                            until,
                            _permit: permit,
                        };
                        state.reservations.insert(client, held);
                    }
                    Err(full) => {
                        tracing::debug!(%client, %full, "reservation refused");
                        state.refused.reservations += 1;
                        return Err(CircuitStatus::ReservationRefused);
                    }
                },
            }
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
        group: NetworkGroup,
        destination: PeerId,
    ) -> Result<(Stream, Circuit), CircuitStatus> {
        let circuit = self.circuit(source, group, destination)?;
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
                tracing::debug!(%source, %destination, %error, "cannot open a circuit");
                Err(CircuitStatus::ConnectionFailed)
            }
        }
    }

    /// Counts a circuit. Another circuit may have to end to make room for it.
    fn circuit(
        &self,
        source: PeerId,
        group: NetworkGroup,
        destination: PeerId,
    ) -> Result<Circuit, CircuitStatus> {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let state = &mut *state;
        if !state.reservations.contains_key(&destination) {
            return Err(CircuitStatus::NoReservation);
        }
        if source == destination {
            return Err(CircuitStatus::PermissionDenied);
        }
        let full = CircuitStatus::ResourceLimitExceeded;
        let here = group.scopes();
        let full_there = here.clone().find(|(scope, part)| {
            let most = self.per_network().saturating_mul(*part) / SITE;
            state.networks.of(*scope) >= most
        });
        if full_there.is_some() {
            state.refused.circuits_per_network += 1;
            return Err(full);
        }
        if self
            .counted(state, source)
            .is_none_or(|c| c.circuits >= self.limits.circuits_per_peer)
        {
            state.refused.circuits_per_peer += 1;
            return Err(full);
        }
        // If the source has used its share of the destination's circuits, an idle circuit of its own makes room.
        let to_there = |held: &Held| held.ends[1] == destination;
        let most = self.per_source();
        let scopes = here.map(|(scope, part)| (CircuitSource::Scope(scope), most * part / SITE));
        for (of, most) in [(CircuitSource::Peer(source), most)]
            .into_iter()
            .chain(scopes)
        {
            let in_share = |held: &Held| to_there(held) && of.has(held);
            let held = state.circuits.values().filter(|held| in_share(held));
            if held.count() < most.min(self.limits.circuits_per_peer) {
                continue;
            }
            let idle = |held: &Held| in_share(held) && held.is_idle(now);
            let Some(oldest) = state.to_replace(idle, group, now) else {
                state.refused.circuits_per_source += 1;
                return Err(full);
            };
            state.refused.replaced += 1;
            state.end(oldest);
        }
        let of_destination = state.circuits.values().filter(|held| {
            let [one, other] = held.ends;
            one == destination || other == destination
        });
        if of_destination.count() >= self.limits.circuits_per_peer {
            let Some(other) = state.to_replace(to_there, group, now) else {
                state.refused.circuits_per_peer += 1;
                return Err(full);
            };
            state.refused.replaced += 1;
            state.end(other);
        }
        if state.used.circuits >= self.limits.circuits {
            let Some(other) = state.to_replace(|_| true, group, now) else {
                state.refused.circuits += 1;
                return Err(full);
            };
            state.refused.replaced += 1;
            state.end(other);
        }
        for end in [source, destination] {
            let counted = self.counted(state, end).ok_or(full)?;
            counted.circuits += 1;
        }
        state.networks.add(group);
        state.used.circuits += 1;
        let (held, replaced) = oneshot::channel();
        let id = state.next;
        state.next += 1;
        let ends = [source, destination];
        let held = Held {
            ends,
            group,
            since: now,
            window: (now, 0, 0),
            _held: held,
        };
        state.circuits.insert(id, held);
        Ok(Circuit {
            server: self.clone(),
            id,
            ends,
            replaced,
            moved: AtomicU64::new(0),
        })
    }

    /// Copies bytes both ways until both sides have ended, one fails, or a limit is reached.
    async fn relay(&self, one: Stream, other: Stream, mut circuit: Circuit) {
        let (_never, unused) = oneshot::channel();
        let replaced = std::mem::replace(&mut circuit.replaced, unused);
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
                Ok(Err(error)) => tracing::debug!(%source, %destination, %error, "circuit failed"),
                Err(_) => tracing::debug!(%source, %destination, "circuit ended: time limit reached"),
            },
            _ = replaced => {
                tracing::debug!(%source, %destination, "circuit ended to make room for another");
            }
            () = falls_silent(&circuit.moved) => {
                tracing::debug!(%source, %destination, "circuit ended: no traffic");
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
                return Err(io::Error::other("the byte limit is reached"));
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

    /// Counts bytes against the daily limits.
    fn count(&self, circuit: &Circuit, bytes: u64) -> bool {
        let now = Instant::now();
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.used.bytes += bytes;
        match state.circuits.get_mut(&circuit.id) {
            Some(held) => held.passed(bytes, now),
            // The circuit had to make room for another.
            None => return false,
        }
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

async fn reply(stream: &mut Stream, message: &HopMessage) -> Result<(), ExchangeError> {
    within(PATIENCE, exchange::send(stream, message, MAX_MESSAGE)).await
}

#[cfg(test)]
mod tests;
