//! Tests of relays and hole punching on loopback. No NAT is in the way there, so they check that every step is taken;
//! the NAT lab tests the rest.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{sleep, timeout},
};
use weft_net::{
    Class, LimitUse, Multiaddr, Network, PathKind, PeerId, PeerInfo, RelayServer, is_superseded,
    multiaddr::Protocol,
};

use crate::common::{ECHO, PATIENCE, config, echo, spawn};

async fn relay() -> Network {
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.relay_server = RelayServer::Always;
    spawn(config).await
}

async fn address(network: &Network) -> Multiaddr {
    let address = network.addresses().all.remove(0);
    address.with(Protocol::P2p(network.local_peer()))
}

async fn client(listen: &str, relays: &[&Network]) -> Network {
    let mut config = config(&[listen]);
    for relay in relays {
        config.relays.push(address(relay).await);
    }
    spawn(config).await
}

fn is_circuit(address: &Multiaddr) -> bool {
    address.iter().any(|part| part == Protocol::P2pCircuit)
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "timed out waiting for {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn holds(network: &Network, relay: PeerId) {
    until("a reservation", || async {
        let held = network.reachability().await.unwrap().relays;
        held.contains(&relay).then_some(())
    })
    .await;
}

/// Returns the addresses of `network` that lead through a relay.
async fn circuits(network: &Network) -> Vec<Multiaddr> {
    until("an address through a relay", || async {
        let mut all = network.addresses().all;
        all.retain(is_circuit);
        (!all.is_empty()).then_some(all)
    })
    .await
}

async fn peer(network: &Network, peer: PeerId) -> Option<PeerInfo> {
    network.peers().await.into_iter().find(|p| p.peer == peer)
}

#[tokio::test]
async fn a_relayed_path_works_at_once_and_becomes_a_direct_one() {
    // Both at once, because most of the time is spent waiting.
    tokio::join!(
        becomes_direct("/ip4/127.0.0.1/tcp/0"),
        becomes_direct("/ip4/127.0.0.1/udp/0/quic-v1"),
    );
}

async fn becomes_direct(listen: &str) {
    let relay = relay().await;
    let (one, two) = (
        client(listen, &[&relay]).await,
        client(listen, &[&relay]).await,
    );
    echo(&two);
    holds(&two, relay.local_peer()).await;
    let (one_id, two_id) = (one.local_peer(), two.local_peer());
    let path = one.connect(two_id, circuits(&two).await).await.unwrap();
    assert_eq!(path.kind, PathKind::Relayed);
    assert_eq!(path.relay(), Some(relay.local_peer()));

    let mut stream = one.open(two_id, ECHO, Class::Interactive).await.unwrap();
    assert_eq!(stream.path().kind, PathKind::Relayed);
    stream.write_all(b"relayed").await.unwrap();
    let mut back = [0; 7];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"relayed");

    let direct = until("a direct path", || async {
        let info = peer(&one, two_id).await?;
        (info.path.kind < PathKind::Relayed).then_some(info)
    })
    .await;
    assert!(direct.direct_after.is_some());
    until("a direct path at the other end", || async {
        let info = peer(&two, one_id).await?;
        (info.path.kind < PathKind::Relayed).then_some(())
    })
    .await;

    // The old stream continues while it lives. A stream that wants to yield is told, and new streams take the direct
    // path.
    stream.write_all(b"relayed").await.unwrap();
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(one.ping(two_id).await.unwrap().1.kind, PathKind::Loopback);
    sleep(Duration::from_secs(7)).await;
    assert!(
        peer(&one, two_id).await.unwrap().connections >= 2,
        "closed while in use"
    );
    stream.yield_to_better_path();
    let error = stream.read_exact(&mut back).await.unwrap_err();
    assert!(is_superseded(&error), "{error}");
    drop(stream);
    until("one connection", || async {
        let here = peer(&one, two_id).await?.connections;
        let there = peer(&two, one_id).await?.connections;
        (here == 1 && there == 1).then_some(())
    })
    .await;
    assert_eq!(one.ping(two_id).await.unwrap().1.kind, PathKind::Loopback);
}

#[tokio::test]
async fn a_relay_that_goes_away_is_replaced_and_used_again_when_it_is_back() {
    let (first, second, third) = (relay().await, relay().await, relay().await);
    let node = client("/ip4/127.0.0.1/tcp/0", &[&first, &second, &third]).await;
    let held = until("two reservations", || async {
        let held = node.reachability().await.unwrap().relays;
        (held.len() == 2).then_some(held)
    })
    .await;
    let (lost, spare): (Vec<_>, Vec<_>) = [&first, &second, &third]
        .into_iter()
        .partition(|relay| held.contains(&relay.local_peer()));
    lost[0].stop().await;
    let begin = Instant::now();
    holds(&node, spare[0].local_peer()).await;
    // A node whose own check is the only sign that a relay is lost knows it nine seconds after its start.
    assert!(
        begin.elapsed() < Duration::from_secs(8),
        "{:?}",
        begin.elapsed()
    );
    assert!(
        !node
            .reachability()
            .await
            .unwrap()
            .relays
            .contains(&lost[0].local_peer())
    );
    // The node is reached through the new relay.
    let other = client("/ip4/127.0.0.1/tcp/0", &[]).await;
    let through: Vec<_> = circuits(&node)
        .await
        .into_iter()
        .filter(|a| a.iter().any(|p| p == Protocol::P2p(spare[0].local_peer())))
        .collect();
    assert_eq!(through.len(), 1);
    let path = other.connect(node.local_peer(), through).await.unwrap();
    assert_eq!(path.relay(), Some(spare[0].local_peer()));
}

#[tokio::test]
async fn a_reservation_is_renewed_before_it_ends() {
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.relay_server = RelayServer::Always;
    config.relay_limits.reservation_duration = Duration::from_secs(12);
    let relay = spawn(config).await;
    let node = client("/ip4/127.0.0.1/tcp/0", &[&relay]).await;
    holds(&node, relay.local_peer()).await;
    // The node has its own address too, for peers on this machine.
    assert!(!node.addresses().all.iter().all(is_circuit));
    sleep(Duration::from_secs(14)).await;
    until("a reservation that is renewed", || async {
        let used = relay.reachability().await.unwrap().relay_use;
        (used.reservations == 1).then_some(())
    })
    .await;
    sleep(Duration::from_secs(2)).await;
    let used = relay.reachability().await.unwrap().relay_use;
    assert_eq!(used.reservations, 1, "{used:?}");
    let other = client("/ip4/127.0.0.1/tcp/0", &[]).await;
    let through = circuits(&node).await;
    let path = other.connect(node.local_peer(), through).await.unwrap();
    assert_eq!(path.kind, PathKind::Relayed);
    assert_eq!(relay.reachability().await.unwrap().relay_use.circuits, 1);
}

#[tokio::test]
async fn a_relay_keeps_to_its_limits() {
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.relay_server = RelayServer::Always;
    config.relay_limits.circuit_bytes = 1 << 20;
    config.relay_limits.reservations = 1;
    let relay = spawn(config).await;
    let two = {
        let mut config = self::config(&["/ip4/127.0.0.1/tcp/0"]);
        config.relays.push(address(&relay).await);
        config.hole_punching = false;
        spawn(config).await
    };
    holds(&two, relay.local_peer()).await;
    let three = client("/ip4/127.0.0.1/tcp/0", &[&relay]).await;
    until("a connection to the relay", || async {
        peer(&three, relay.local_peer()).await
    })
    .await;
    until("its reservation to be refused", || async {
        let limits = relay.limits().await;
        let mut rows = limits.iter();
        let refused =
            |row: &&LimitUse| row.name.starts_with("relay_reservations") && row.refused > 0;
        rows.any(|row| refused(&row)).then_some(())
    })
    .await;
    assert!(three.reachability().await.unwrap().relays.is_empty());

    echo(&two);
    three
        .connect(two.local_peer(), circuits(&two).await)
        .await
        .unwrap();
    let mut stream = three
        .open(two.local_peer(), ECHO, Class::Bulk)
        .await
        .unwrap();
    assert_eq!(stream.path().kind, PathKind::Relayed);
    let moved = async {
        let mut buffer = vec![0; 64 * 1024];
        for _ in 0..64 {
            stream.write_all(&buffer).await?;
            stream.read_exact(&mut buffer).await?;
        }
        std::io::Result::Ok(())
    };
    timeout(PATIENCE, moved).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_node_configured_never_to_relay_grants_no_reservation() {
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.relay_server = RelayServer::Never;
    let not_a_relay = spawn(config).await;
    let node = client("/ip4/127.0.0.1/tcp/0", &[&not_a_relay]).await;
    until("a connection", || async {
        peer(&node, not_a_relay.local_peer()).await
    })
    .await;
    sleep(Duration::from_secs(2)).await;
    assert!(node.reachability().await.unwrap().relays.is_empty());
    assert!(!not_a_relay.reachability().await.unwrap().is_relay);
}
