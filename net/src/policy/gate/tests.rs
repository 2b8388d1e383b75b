//! Tests of the address gate's rules.

use super::{
    state::{MAX_IPS, MAX_NETWORKS, MAX_PORTS, PER_SOCKET, PERMIT},
    *,
};

fn address(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Makes a gate for a node with this given address, listening sockets and networks.
fn gate(given: Option<&str>, listening: &[&str], networks: &[&str]) -> Gate {
    let given: Vec<_> = given.into_iter().map(address).collect();
    let gate = Gate::new(given.iter());
    for network in networks {
        gate.network_changed(network.parse().unwrap(), true);
    }
    gate.listens_at(listening.iter().map(|text| at(text)));
    gate
}

/// Makes a gate for a node on a home network that knows the internet.
fn home() -> Gate {
    gate(
        Some("/ip4/11.0.1.1/tcp/443"),
        &["192.168.1.7:9338", "127.0.0.1:9338"],
        &["192.168.1.7/24", "127.0.0.1/8"],
    )
}

fn admitted(gate: &Gate, source: Source, text: &[&str], now: Instant) -> Vec<String> {
    let sources = text.iter().map(|text| (source, address(text))).collect();
    let evidence = Evidence::default();
    let admitted = gate.admit(PeerId::random(), sources, &evidence, now);
    admitted
        .addresses()
        .iter()
        .map(|(_, address)| address.to_string())
        .collect()
}

fn heard_one(gate: &Gate, text: &str) -> bool {
    !admitted(gate, Source::Heard, &[text], Instant::now()).is_empty()
}

#[test]
fn unverified_addresses_are_dialed_if_public_and_given_ones_always() {
    let relay = PeerId::random();
    let refused = [
        "/ip4/127.0.0.1/tcp/6379".to_owned(),
        "/ip4/127.9.9.9/udp/53/quic-v1".to_owned(),
        "/ip6/::1/tcp/22".to_owned(),
        "/ip4/0.0.0.0/tcp/22".to_owned(),
        "/ip4/0.0.0.7/tcp/22".to_owned(),
        "/ip6/::/tcp/22".to_owned(),
        "/ip4/192.168.1.1/tcp/80/ws".to_owned(),
        "/ip4/192.168.1.7/tcp/22".to_owned(),
        "/ip4/10.0.0.1/tcp/80".to_owned(),
        "/ip4/172.17.0.1/tcp/2375".to_owned(),
        "/ip4/100.64.0.1/tcp/80".to_owned(),
        "/ip4/169.254.169.254/tcp/80/ws".to_owned(),
        "/ip4/224.0.0.1/udp/5353/quic-v1".to_owned(),
        "/ip4/255.255.255.255/udp/9/quic-v1".to_owned(),
        "/ip4/240.0.0.1/tcp/1".to_owned(),
        "/ip6/fe80::1/tcp/1".to_owned(),
        "/ip6/fd00::1/tcp/1".to_owned(),
        "/ip6/fec0::1/tcp/1".to_owned(),
        "/ip6/ff02::fb/udp/5353/quic-v1".to_owned(),
        "/ip6/::ffff:127.0.0.1/tcp/22".to_owned(),
        "/ip6/::ffff:192.168.1.1/tcp/22".to_owned(),
        "/ip6/64:ff9b::7f00:1/tcp/22".to_owned(),
        "/ip6/2002:c0a8:101::1/tcp/22".to_owned(),
        "/ip4/11.0.2.1/tcp/0".to_owned(),
        "/ip4/127.0.0.1/tcp/443/tls/sni/intranet.corp/ws".to_owned(),
        format!("/ip4/192.168.1.1/tcp/80/p2p/{relay}/p2p-circuit"),
        format!("/ip4/127.0.0.1/tcp/80/ws/p2p/{relay}/p2p-circuit"),
        "/memory/7".to_owned(),
        "/unix/%2Frun%2Fdocker.sock".to_owned(),
    ];
    for text in &refused {
        assert!(!heard_one(&home(), text), "{text}");
        let given = admitted(&home(), Source::Given, &[text], Instant::now());
        assert_eq!(given.len(), 1, "{text}");
    }
    for text in [
        "/ip4/11.0.2.1/tcp/9338",
        "/ip4/11.0.2.1/udp/9338/quic-v1",
        "/ip4/11.0.2.1/tcp/443/tls/sni/relay.example/ws",
        "/ip6/2606:4700::1/tcp/1",
        &format!("/ip4/11.0.2.1/tcp/443/p2p/{relay}/p2p-circuit"),
    ] {
        assert!(heard_one(&home(), text), "{text}");
    }
    // A name is not dialed; the addresses that it resolves to are.
    assert!(!heard_one(&home(), "/dns4/localhost/tcp/8080/ws"));
}

#[test]
fn a_mesh_on_one_machine_stays_there_until_a_peer_from_outside_is_met() {
    let loopback = "/ip4/127.0.0.1/tcp/7";
    // The bootstrap node is on this machine, or this node listens only on loopback.
    let demo = gate(
        Some("/ip4/127.0.0.1/tcp/1"),
        &["10.0.0.5:9338"],
        &["10.0.0.5/24"],
    );
    let only_here = gate(None, &["127.0.0.1:9338"], &[]);
    for gate in [&demo, &only_here] {
        assert_eq!(gate.extent(), Extent::Machine);
        assert!(heard_one(gate, loopback));
    }
    assert!(heard_one(&demo, "/ip4/10.0.0.5/tcp/7"));
    // Without a given or loopback listening address, the mesh is not taken to be on one machine.
    for gate in [
        gate(None, &["10.0.0.5:9338"], &["10.0.0.5/24"]),
        gate(None, &[], &[]),
        gate(Some("/dns4/boot.example/tcp/1"), &["127.0.0.1:9338"], &[]),
        gate(Some("/ip4/11.0.1.1/tcp/1"), &["127.0.0.1:9338"], &[]),
        home(),
    ] {
        // Also if a peer connects from this machine, as peers behind a reverse proxy do.
        gate.met(&address(loopback), false);
        assert!(!heard_one(&gate, loopback));
    }
    only_here.met(&address(loopback), true);
    assert!(!heard_one(&only_here, loopback));
    demo.met(&address("/ip4/11.0.9.9/tcp/1"), false);
    assert!(!heard_one(&demo, loopback));
    assert!(!heard_one(&demo, "/ip4/10.0.0.5/tcp/7"));
    // The extent never shrinks.
    demo.met(&address(loopback), false);
    assert_eq!(demo.extent(), Extent::World);
}

#[test]
fn a_mesh_on_private_networks_dials_networks_of_its_interfaces_and_of_given_addresses() {
    let lan = gate(None, &["192.168.1.7:9338"], &["192.168.1.7/24"]);
    assert_eq!(lan.extent(), Extent::Lan);
    assert!(heard_one(&lan, "/ip4/192.168.1.9/tcp/7"));
    for foreign in [
        "/ip4/192.168.2.9/tcp/7",
        "/ip4/10.0.0.1/tcp/7",
        "/ip4/127.0.0.1/tcp/7",
    ] {
        assert!(!heard_one(&lan, foreign), "{foreign}");
    }
    // Routed networks, of which the user has given an address.
    let routed = gate(
        Some("/ip4/10.7.0.1/tcp/1"),
        &["10.9.0.7:9338"],
        &["10.9.0.7/24"],
    );
    assert!(heard_one(&routed, "/ip4/10.8.0.9/tcp/7"));
    assert!(!heard_one(&routed, "/ip4/192.168.2.9/tcp/7"));
    for gate in [&lan, &routed] {
        gate.met(&address("/ip4/11.0.9.9/udp/1/quic-v1"), false);
    }
    assert!(!heard_one(&lan, "/ip4/192.168.1.9/tcp/7"));
    assert!(!heard_one(&routed, "/ip4/10.8.0.9/tcp/7"));
}

#[test]
fn a_given_name_counts_by_the_addresses_it_resolves_to() {
    let boot = address("/dns4/boot.example/tcp/1");
    let gate = gate(
        Some("/dns4/boot.example/tcp/1"),
        &["10.0.0.5:9338"],
        &["10.0.0.5/24"],
    );
    assert_eq!(gate.extent(), Extent::World);
    gate.resolved(&boot, &[]);
    assert_eq!(gate.extent(), Extent::World);
    gate.resolved(&boot, &[address("/ip4/10.0.0.1/tcp/1")]);
    assert_eq!(gate.extent(), Extent::Lan);
}

#[test]
fn mdns_peers_are_dialed_at_announced_addresses_on_our_networks() {
    let (gate, now) = (home(), Instant::now());
    let mdns = |text| !admitted(&gate, Source::Mdns, &[text], now).is_empty();
    assert!(mdns("/ip4/192.168.1.9/tcp/9338"));
    assert!(!mdns("/ip4/192.168.2.9/tcp/9338"));
    assert!(!mdns("/ip4/127.0.0.1/tcp/9338"));
    assert!(!mdns("/ip4/11.0.2.1/tcp/9338"));
    // A peer is at an address if this node has dialed it there and is connected to it.
    let evidence = Evidence {
        dialed_at: vec![at("192.168.5.5:1"), at("127.0.0.1:5")],
        ..Evidence::default()
    };
    let lane = |text: &str| {
        let target = gate.admit_lane(PeerId::random(), &address(text), &evidence, now);
        target.is_some()
    };
    assert!(lane("/ip4/192.168.5.5/tcp/7"));
    assert!(lane("/ip4/127.0.0.1/tcp/5"));
    assert!(!lane("/ip4/127.0.0.1/tcp/6"));
    assert!(!lane("/ip4/192.168.5.6/tcp/7"));
}

#[test]
fn a_dial_goes_to_at_most_two_addresses_of_a_family_and_three_ports_at_each() {
    let gate = home();
    let many: Vec<String> = (1..=4)
        .flat_map(|ip| (1..=8).map(move |port| format!("/ip4/11.{ip}.2.1/tcp/{port}")))
        .collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let some = admitted(&gate, Source::Heard, &many, Instant::now());
    assert_eq!(some.len(), MAX_IPS * MAX_PORTS, "{some:?}");
}

/// Counts the attempts admitted at one address per minute, over `minutes` minutes. Each attempt fails; another peer
/// asks for one every second.
fn attempts(gate: &Gate, text: impl Fn(u64) -> String, minutes: u64) -> Vec<usize> {
    let begin = Instant::now();
    let mut by_minute = vec![0; minutes as usize];
    for second in 0..60 * minutes {
        let now = begin + Duration::from_secs(second);
        let all: Vec<_> = (0..6)
            .map(|n| (Source::Heard, address(&text(6 * second + n))))
            .collect();
        let one = gate.admit(PeerId::random(), all, &Evidence::default(), now);
        by_minute[second as usize / 60] += one.addresses().len();
        let id = ConnectionId::new_unchecked(second as usize);
        gate.began(id, &one);
        gate.failed(id, now);
    }
    by_minute
}

#[test]
fn a_third_party_is_dialed_twelve_times_a_minute_and_eighty_four_times_an_hour() {
    // The limit holds for any port, and for any source of the address.
    let ports = |n: u64| format!("/ip4/11.0.2.1/tcp/{}", 1 + n % 60_000);
    let hour = attempts(&home(), ports, 60);
    assert!(hour.iter().all(|minute| *minute <= PER_SITE), "{hour:?}");
    assert_eq!(hour.iter().sum::<usize>(), 6 * PER_SITE, "{hour:?}");
    let site = |n: u64| format!("/ip6/2606:4700::{:x}/tcp/1", 1 + n % 60_000);
    let hour = attempts(&home(), site, 60);
    assert!(hour.iter().sum::<usize>() <= 7 * PER_SITE, "{hour:?}");
    let network = |n: u64| format!("/ip4/11.0.2.{}/tcp/1", n % 256);
    let some = attempts(&home(), network, 3);
    assert!(some.iter().all(|minute| *minute <= PER_NETWORK), "{some:?}");
    let all = |n: u64| format!("/ip4/11.{}.{}.1/tcp/1", n / 200 % 200, n % 200);
    let some = attempts(&home(), all, 2);
    assert!(some.iter().all(|minute| *minute <= IN_ALL), "{some:?}");
}

#[test]
fn a_proven_destination_is_dialed_without_limit_until_a_dial_fails() {
    let (gate, now) = (home(), Instant::now());
    let one = ["/ip4/11.0.2.1/tcp/9338"];
    gate.proved(at("11.0.2.1:9338"), now);
    for _ in 0..5 * PER_SITE {
        assert_eq!(admitted(&gate, Source::Heard, &one, now).len(), 1);
    }
    // That does not prove another port at the same address.
    let other = ["/ip4/11.0.2.1/tcp/22"];
    let free = (0..100).filter(|_| !admitted(&gate, Source::Heard, &other, now).is_empty());
    assert_eq!(free.count(), PER_SITE);
    gate.proved(at("11.0.2.1:9338"), now);
    let unverified = vec![(Source::Heard, address(one[0]))];
    let failing = gate.admit(PeerId::random(), unverified, &Evidence::default(), now);
    let id = ConnectionId::new_unchecked(1);
    gate.began(id, &failing);
    gate.failed(id, now);
    let free = (0..100).filter(|_| !admitted(&gate, Source::Heard, &one, now).is_empty());
    assert_eq!(free.count(), PER_SITE);
}

#[test]
fn nodes_that_share_an_address_on_our_own_network_do_not_slow_each_other_down() {
    let demo = gate(Some("/ip4/127.0.0.1/tcp/1"), &["127.0.0.1:9338"], &[]);
    let now = Instant::now();
    for port in 1..200 {
        let one = format!("/ip4/127.0.0.1/tcp/{port}");
        for _ in 0..PER_SOCKET.min(10) {
            assert_eq!(admitted(&demo, Source::Heard, &[&one], now).len(), 1);
        }
    }
}

#[test]
fn searches_at_one_address_have_growing_pauses() {
    let gate = home();
    let begin = Instant::now();
    let target = [at("11.0.2.1:7"), at("11.0.2.1:9")];
    assert_eq!(
        gate.admit_search(&Confirmed::in_test(&target), begin).len(),
        2
    );
    assert!(
        gate.admit_search(&Confirmed::in_test(&[at("192.168.1.1:7")]), begin)
            .is_empty()
    );
    let day = (0..24 * 60).filter(|minute| {
        let now = begin + Duration::from_secs(60 * minute);
        !gate
            .admit_search(&Confirmed::in_test(&target[..1]), now)
            .is_empty()
    });
    assert!(day.count() <= 7);
}

#[test]
fn a_permit_is_good_for_one_socket_and_one_transport() {
    let (gate, now) = (home(), Instant::now());
    let (there, other) = (at("11.0.2.1:7"), at("11.0.2.1:8"));
    assert!(gate.take_permit(there, false, now).is_none());
    assert!(heard_one(&gate, "/ip4/11.0.2.1/tcp/7"));
    assert!(gate.take_permit(there, true, now).is_none());
    assert!(gate.take_permit(other, false, now).is_none());
    let permit = gate.take_permit(there, false, now).unwrap();
    assert_eq!(permit.patience, Some(PATIENCE));
    assert!(gate.take_permit(there, false, now).is_none());
    gate.give(address("/ip4/11.0.2.1/tcp/7"));
    let late = Instant::now() + PERMIT;
    assert!(gate.take_permit(there, false, late).is_none());
    gate.give(address("/ip4/11.0.2.1/tcp/7"));
    assert_eq!(gate.take_permit(there, false, now).unwrap().patience, None);
}

#[test]
fn the_gate_remembers_a_bounded_number_of_entries() {
    let (gate, begin) = (home(), Instant::now());
    for n in 0..40_000_u32 {
        let now = begin + Duration::from_millis(150 * u64::from(n));
        let [_, a, b, c] = n.to_be_bytes();
        let one = format!("/ip4/{}.{b}.{c}.1/tcp/1", 11 + a);
        admitted(&gate, Source::Heard, &[&one], now);
        gate.proved(SocketAddr::from(([12, a, b, c], 1)), now);
        gate.announced(PeerId::random(), &[], now);
        gate.admit_search(
            &Confirmed::in_test(&[SocketAddr::from(([13, a, b, c], 1))]),
            now,
        );
    }
    let end = begin + Duration::from_secs(6000);
    for row in gate.limits(end) {
        assert!(row.limit.is_none_or(|limit| row.used <= limit), "{row:?}");
    }
    let state = gate.state();
    assert!(state.by_network.len() <= MAX_NETWORKS);
}

#[test]
fn a_dial_under_way_keeps_off_another_by_the_same_transport_only() {
    let (gate, peer, now) = (home(), PeerId::random(), Instant::now());
    let admit = |text: &str| {
        let sources = vec![(Source::Heard, address(text))];
        gate.admit(peer, sources, &Evidence::default(), now)
    };
    let (tcp, quic) = ("/ip4/11.0.5.1/tcp/9338", "/ip4/11.0.5.1/udp/9338/quic-v1");
    let first = admit(tcp);
    assert!(!first.is_empty());
    let id = ConnectionId::new_unchecked(1);
    gate.began(id, &first);
    assert!(admit(tcp).is_empty());
    assert!(!admit(quic).is_empty());
    gate.failed(id, now);
    assert!(!admit(tcp).is_empty());
}

/// A peer lists the addresses of its container bridges first; this node has the same addresses.
#[test]
fn container_bridge_addresses_do_not_displace_a_working_address() {
    let mut networks = vec!["192.168.77.3/24".to_owned()];
    networks.extend((17..26).map(|n| format!("172.{n}.0.1/16")));
    let networks: Vec<_> = networks.iter().map(String::as_str).collect();
    let gate = gate(None, &["192.168.77.3:9338", "172.17.0.1:9338"], &networks);
    let bridges = (17..26).map(|n| format!("/ip4/172.{n}.0.1/tcp/4001"));
    let all = bridges.chain(["/ip4/192.168.77.2/tcp/4001".to_owned()]);
    let all: Vec<_> = all.map(|text| address(&text)).collect();
    let (peer, now) = (PeerId::random(), Instant::now());
    let unverified = heard(Heard::new(all.clone())).collect();
    let admitted = gate.admit(peer, unverified, &Evidence::default(), now);
    let first = admitted.addresses().first().map(|(_, one)| one.to_string());
    assert_eq!(first.as_deref(), Some("/ip4/192.168.77.2/tcp/4001"));
    // The same for addresses announced by mDNS.
    gate.announced(peer, &all, now);
    let found = gate.neighbour(&peer);
    assert_eq!(found[0].1, all[9]);
}

#[test]
fn targets_outside_the_swarm_are_recorded_as_dialed() {
    let gate = home();
    let (dialed, now) = (gate.dialed(), Instant::now());
    let lane = address("/ip4/7.7.7.7/tcp/443");
    let (peer, evidence) = (PeerId::random(), Evidence::default());
    assert!(gate.admit_lane(peer, &lane, &evidence, now).is_some());
    assert!(dialed.contains_socket(at("7.7.7.7:443"), now));
    assert_eq!(
        gate.admit_search(&Confirmed::in_test(&[at("8.8.8.8:5")]), now)
            .len(),
        1
    );
    // A search tries all ports.
    assert!(dialed.contains_socket(at("8.8.8.8:4000"), now));
    assert!(!dialed.contains("9.9.9.9".parse().unwrap(), now));
}

#[test]
fn a_probe_whose_source_may_be_forged_leads_to_one_dial_and_proves_nothing() {
    let (gate, now) = (Gate::new(std::iter::empty()), Instant::now());
    let (peer, from) = (PeerId::random(), at("8.8.8.8:5"));
    let admitted = gate.admit_found(peer, from, now);
    assert_eq!(admitted.addresses().len(), 1);
    let permit = gate.take_permit(from, true, now).unwrap();
    assert_eq!(permit.patience, Some(PATIENCE));
    assert!(gate.take_permit(from, true, now).is_none());
    assert!(!gate.state().is_proven(from, now));
    // An address on this node's own network is not dialed because of an unauthenticated packet.
    let private = at("192.168.1.1:7");
    assert!(gate.admit_found(peer, private, now).is_empty());
    assert!(gate.take_permit(private, true, now).is_none());
}
