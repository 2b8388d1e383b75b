use libp2p::multiaddr::Protocol;

use super::*;

struct Door {
    behaviour: Behaviour,
    next: usize,
}

impl Door {
    fn new(limits: Limits) -> Self {
        let manager = ConnectionManager::new(&limits, Memory::new(None));
        Self {
            behaviour: Behaviour::new(manager),
            next: 0,
        }
    }

    fn open(&mut self, from: &str) -> Option<ConnectionId> {
        self.open_for(PeerId::random(), from)
    }

    fn open_for(&mut self, peer: PeerId, from: &str) -> Option<ConnectionId> {
        self.next += 1;
        let id = ConnectionId::new_unchecked(self.next);
        let local = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        let remote = format!("{from}/tcp/1").parse().unwrap();
        let group = NetworkGroup::of(&Path::inbound(&local, &remote));
        self.behaviour.0.admit(group).ok()?;
        let entered = self
            .behaviour
            .handle_established_inbound_connection(id, peer, &local, &remote);
        entered.ok().map(|_| id)
    }

    fn closed(&mut self) -> Vec<ConnectionId> {
        let mut state = self.behaviour.0.state();
        state.to_close.drain(..).map(|(_, id)| id).collect()
    }

    fn rate(&self, id: ConnectionId, worth: Worth) {
        self.behaviour.0.rate(id, worth);
    }
}

fn used(door: &Door, name: &str) -> (u64, u64) {
    let limits = door.behaviour.0.limits();
    let row = limits.into_iter().find(|row| row.name == name).unwrap();
    (row.used, row.refused)
}

fn limits(incoming: u32, per_address: u32) -> Limits {
    Limits {
        established_incoming: incoming,
        per_address,
        ..Limits::default()
    }
}

#[test]
fn one_address_is_held_to_its_limit_and_others_are_not() {
    let mut door = Door::new(limits(512, 2));
    let first = door.open("/ip4/1.1.1.1").unwrap();
    assert!(door.open("/ip4/1.1.1.1").is_some());
    assert!(door.open("/ip4/1.1.1.1").is_none());
    assert!(door.open("/ip4/1.1.1.2").is_some());
    assert_eq!(used(&door, "connections_per_address"), (2, 1));
    assert_eq!(used(&door, "connections"), (3, 0));
    door.behaviour.0.state().remove(first);
    door.behaviour.0.state().remove(first);
    assert!(door.open("/ip4/1.1.1.1").is_some());
    assert!(door.open("/ip4/1.1.1.1").is_none());
    // One IPv6 site has an unlimited number of addresses.
    assert!(door.open("/ip6/2001:db8:0:1::1").is_some());
    assert!(door.open("/ip6/2001:db8:0:1::2").is_some());
    assert!(door.open("/ip6/2001:db8:0:1::3").is_none());
    assert!(door.open("/ip6/2001:db8:0:2::3").is_some());
}

#[test]
fn a_network_is_held_to_twice_the_limit_of_an_address() {
    let mut door = Door::new(limits(512, 4));
    let v4 = (0..100).filter_map(|n| door.open(&format!("/ip4/1.1.1.{n}")));
    assert_eq!(v4.count(), 8);
    let line = (0..100).filter_map(|n| door.open(&format!("/ip6/2001:db8:0:1{n:02}::1")));
    assert_eq!(line.count(), 6);
    let site = (0..100).filter_map(|n| door.open(&format!("/ip6/2001:db8:1:{n}00::1")));
    assert_eq!(site.count(), 8);
}

#[test]
fn a_site_of_private_addresses_and_this_machine_have_room_but_not_all_of_it() {
    let mut door = Door::new(limits(512, 4));
    for n in 0..100 {
        assert!(door.open(&format!("/ip4/10.1.1.{n}")).is_some());
    }
    for near in ["/ip4/127.0.0.1", "/ip4/192.168.1.1"] {
        let near = (0..100).filter_map(|_| door.open(near));
        assert_eq!(near.count(), 24);
    }
}

/// 64 identities at each of eight addresses, as an attacker with one machine and eight addresses could make.
#[test]
fn a_full_node_closes_the_least_useful_connection_of_the_place_with_most() {
    let mut door = Door::new(Limits::default());
    let honest = door.open("/ip4/9.9.9.9").unwrap();
    let mut attacker = Vec::new();
    for n in 0..8 {
        attacker.extend((0..64).filter_map(|_| door.open(&format!("/ip4/1.1.{n}.1"))));
    }
    assert_eq!(used(&door, "connections_incoming").0, 512);
    assert!(door.closed().is_empty());
    let now = Some(Instant::now());
    for id in &attacker[1..] {
        let worth = Worth {
            moved: now,
            ..Worth::default()
        };
        door.rate(*id, worth);
    }
    let newcomer = door.open("/ip4/8.8.8.8").unwrap();
    assert_eq!(door.closed(), [attacker[0]]);
    // The attacker cannot connect again while others hold fewer connections.
    assert!(door.open("/ip4/1.1.1.1").is_none());
    assert!(door.open("/ip4/7.7.7.7").is_some());
    let closed = door.closed();
    assert!(!closed.contains(&honest) && !closed.contains(&newcomer));
    assert_eq!(used(&door, "connections_incoming").0, 512);
}

#[test]
fn a_bootstrap_node_is_not_closed_for_a_newcomer() {
    let mut door = Door::new(limits(2, 64));
    let ids: Vec<_> = (0..2).filter_map(|_| door.open("/ip4/1.1.1.1")).collect();
    let needed = Worth {
        needed: true,
        ..Worth::default()
    };
    door.rate(ids[0], needed);
    assert!(door.open("/ip4/2.2.2.2").is_some());
    assert_eq!(door.closed(), [ids[1]]);
    let refused = door.open("/ip4/3.3.3.3");
    assert!(refused.is_none());
    assert_eq!(used(&door, "connections_incoming").1, 1);
}

#[test]
fn shedding_takes_the_place_that_costs_most_and_spares_the_newcomer() {
    let mut door = Door::new(Limits::default());
    let hoards: Vec<_> = (0..4).filter_map(|_| door.open("/ip4/1.1.1.1")).collect();
    for id in &hoards {
        let worth = Worth {
            // A reservation does not make a connection exempt.
            kept: true,
            streams: 32,
            moved: Some(Instant::now()),
            ..Worth::default()
        };
        door.rate(*id, worth);
    }
    let newcomer = door.open("/ip4/2.2.2.2").unwrap();
    assert_eq!(door.behaviour.0.shed(4), 4);
    let mut closed = door.closed();
    closed.sort();
    assert_eq!(closed, hoards);
    assert_eq!(door.behaviour.0.shed(4), 1);
    assert_eq!(door.closed(), [newcomer]);
}

#[test]
fn a_relay_is_one_place() {
    let mut manager = Behaviour::new(ConnectionManager::new(&limits(512, 2), Memory::new(None)));
    let relay = Multiaddr::empty().with(Protocol::P2p(PeerId::random()));
    let local = relay.with(Protocol::P2pCircuit);
    for n in 0..6 {
        let peer = PeerId::random();
        let remote = Multiaddr::empty().with(Protocol::P2p(peer));
        let id = ConnectionId::new_unchecked(n);
        let taken = manager.handle_established_inbound_connection(id, peer, &local, &remote);
        assert_eq!(taken.is_ok(), n < 4);
    }
}

#[test]
fn a_refusal_is_counted_in_the_row_of_its_limit() {
    let mut door = Door::new(Limits {
        per_peer: 1,
        established: 3,
        ..Limits::default()
    });
    let peer = PeerId::random();
    assert!(door.open_for(peer, "/ip4/1.1.1.1").is_some());
    assert!(door.open_for(peer, "/ip4/1.1.1.1").is_none());
    assert_eq!(used(&door, "connections_per_peer"), (1, 1));
    for n in 2..4 {
        assert!(door.open(&format!("/ip4/{n}.1.1.1")).is_some());
    }
    assert!(door.open("/ip4/4.1.1.1").is_none());
    assert_eq!(used(&door, "connections"), (3, 1));
    assert_eq!(used(&door, "connections_incoming"), (3, 0));
}

#[test]
fn a_connection_counts_where_its_other_end_is_now() {
    let mut door = Door::new(limits(512, 2));
    let id = door.open("/ip4/127.0.0.1").unwrap();
    for n in 0..3 {
        let id = match n {
            0 => id,
            _ => door.open("/ip4/127.0.0.1").unwrap(),
        };
        let path = Path::of(&"/ip4/1.1.1.1/tcp/1/ws".parse().unwrap());
        let limits = door.behaviour.0.limits;
        door.behaviour.0.state().moved(&limits, id, &path);
    }
    assert_eq!(used(&door, "connections_per_address"), (2, 1));
    assert_eq!(door.closed().len(), 1);
    assert_eq!(used(&door, "connections").0, 2);
}
