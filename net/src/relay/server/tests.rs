use super::*;

fn server(limits: RelayLimits) -> Server {
    Server::new(Keypair::generate_ed25519(), limits).0
}

/// Returns a public address in a network of its own.
fn at(network: u8) -> NetworkGroup {
    NetworkGroup::of_ip([11, 0, network, 1].into())
}

fn reserve(server: &Server, peer: PeerId) {
    let permit = Shares::new(1, 1).take(peer, at(0)).unwrap();
    let held = Reservation {
        until: Instant::now() + DAY,
        _permit: permit,
    };
    lock(&server.state).reservations.insert(peer, held);
}

/// Opens as many circuits as possible, from four identities at each of some addresses.
fn flood(server: &Server, destination: PeerId, networks: std::ops::Range<u8>) -> Vec<Circuit> {
    let mut open = Vec::new();
    for network in networks {
        for source in (0..4).map(|_| PeerId::random()) {
            let circuits = (0..8).map(|_| server.circuit(source, at(network), destination));
            open.extend(circuits.filter_map(Result::ok));
        }
    }
    open
}

#[tokio::test]
async fn one_machine_cannot_take_all_circuits_to_a_node() {
    let server = server(RelayLimits::default());
    let home = PeerId::random();
    reserve(&server, home);
    let attacker = flood(&server, home, 1..2);
    assert_eq!(attacker.len(), 4);
    let _honest = server.circuit(PeerId::random(), at(2), home).unwrap();
    assert!(lock(&server.state).refused.circuits_per_source > 0);
}

#[tokio::test(start_paused = true)]
async fn a_newcomer_replaces_an_idle_circuit_first_or_one_of_the_group_with_most() {
    let server = server(RelayLimits::default());
    let home = PeerId::random();
    reserve(&server, home);
    let attacker = flood(&server, home, 1..5);
    assert_eq!(attacker.len(), 16);
    let honest = server.circuit(PeerId::random(), at(9), home).unwrap();
    // The circuit moves bytes, as the attacker's circuits do not.
    for _ in 0..4 {
        tokio::time::advance(WINDOW / 2).await;
        assert!(server.count(&honest, IDLE_BYTES));
    }
    let _other = server.circuit(PeerId::random(), at(10), home).unwrap();
    assert!(lock(&server.state).circuits.contains_key(&honest.id));
    assert_eq!(server.used().circuits, 16);
    assert_eq!(lock(&server.state).refused.replaced, 2);
    drop(attacker);
    assert_eq!(server.used().circuits, 2);
    // A replaced circuit no longer counts.
    assert!(lock(&server.state).networks.counts().all(|used| used == 1));
}

#[tokio::test]
async fn one_address_cannot_take_all_reservations() {
    let server = server(RelayLimits {
        reservations: 96,
        ..RelayLimits::default()
    });
    let mut held = 0;
    for _ in 0..96 {
        let reserved = server.reserve(PeerId::random(), at(1), Vec::new()).await;
        held += usize::from(reserved.is_ok());
    }
    assert_eq!(held, 32);
    let home = PeerId::random();
    server.reserve(home, at(2), Vec::new()).await.unwrap();
    server.disconnected(&home);
    assert_eq!(server.reserved.used(), 32);
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
        server.circuit(b, at(2), a).unwrap_err(),
        CircuitStatus::NoReservation
    );
    let granted = server.reserve(a, at(1), none()).await.unwrap();
    let voucher = granted.reservation.unwrap().voucher.unwrap();
    let envelope = SignedEnvelope::from_protobuf_encoding(&voucher).unwrap();
    assert!(envelope.verify("libp2p-relay-rsvp".to_owned()));
    // A renewal does not need another reservation.
    server.reserve(a, at(1), none()).await.unwrap();
    let refused = server.reserve(b, at(2), none()).await.unwrap_err();
    assert_eq!(refused, CircuitStatus::ReservationRefused);
    let first = server.circuit(b, at(2), a).unwrap();
    let _second = server.circuit(c, at(3), a).unwrap();
    let refused = server.circuit(b, at(2), a).unwrap_err();
    assert_eq!(refused, CircuitStatus::ResourceLimitExceeded);
    drop(first);
    let _third = server.circuit(b, at(2), a).unwrap();
    assert_eq!(server.used().circuits, 2);
    server.disconnected(&a);
    assert_eq!(
        server.circuit(b, at(2), a).unwrap_err(),
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
    let here = NetworkGroup::of_ip("2001:db8::1".parse().unwrap());
    let neighbour = NetworkGroup::of_ip("2001:db8::2".parse().unwrap());
    let other_site = NetworkGroup::of_ip("2001:db8:0:1::1".parse().unwrap());
    let mut open = Vec::new();
    let mut circuit = |network| {
        let [one, other] = [PeerId::random(), PeerId::random()];
        reserve(&server, other);
        server.circuit(one, network, other).map(|c| open.push(c))
    };
    circuit(here).unwrap();
    circuit(neighbour).unwrap();
    let refused = circuit(here).unwrap_err();
    assert_eq!(refused, CircuitStatus::ResourceLimitExceeded);
    circuit(other_site).unwrap();
    assert_eq!(lock(&server.state).refused.circuits_per_network, 1);
    open.clear();
    assert!(lock(&server.state).networks.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_circuit_without_traffic_is_silent() {
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
async fn daily_bytes_are_limited_per_peer_and_in_total() {
    let server = server(RelayLimits {
        daily_bytes: 300,
        daily_bytes_per_peer: 200,
        ..RelayLimits::default()
    });
    let peers: Vec<_> = (0..4).map(|_| PeerId::random()).collect();
    for to in [peers[0], peers[2]] {
        server.reserve(to, at(9), Vec::new()).await.unwrap();
    }
    let circuit = server.circuit(peers[1], at(1), peers[0]).unwrap();
    assert!(server.count(&circuit, 200));
    assert!(!server.count(&circuit, 1));
    let other = server.circuit(peers[3], at(3), peers[2]).unwrap();
    assert!(server.count(&other, 99));
    assert!(!server.count(&other, 2));
}

#[tokio::test]
async fn peers_that_move_little_are_forgotten_first() {
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
async fn a_rate_delays_bytes() {
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
    server.reserve(peer, at(9), Vec::new()).await.unwrap();
    assert!(server.expire().is_empty());
    tokio::time::advance(Duration::from_secs(3601)).await;
    assert_eq!(server.expire(), [peer]);
}
