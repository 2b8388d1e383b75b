//! Tests of connections and their streams: limits, bootstrap, errors, other implementations.

use std::{io, time::Duration};

use libp2p::{StreamProtocol, Swarm, identity::Keypair, noise, swarm::dummy, tcp, yamux};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use weft_net::{
    Access, Class, ConnectError, Multiaddr, Network, OpenError, PathKind, Rule, SpawnError,
    Transport,
};

use crate::common::{ECHO, PATIENCE, config, echo, spawn};

async fn network(listen: &[&str]) -> Network {
    spawn(config(listen)).await
}

async fn round_trip(network: &Network, other: &Network, size: usize) {
    let mut stream = network
        .open(other.local_peer(), ECHO, Class::Bulk)
        .await
        .unwrap();
    assert_eq!(stream.peer(), other.local_peer());
    let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
    let (mut reader, mut writer) = tokio::io::split(&mut stream);
    let mut got = Vec::new();
    let (wrote, read) = tokio::join!(
        async {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        },
        reader.read_to_end(&mut got)
    );
    wrote.unwrap();
    read.unwrap();
    assert!(got == sent);
}

#[tokio::test]
async fn streams_carry_bytes_over_tcp_and_quic() {
    for (listen, transport) in [
        ("/ip4/127.0.0.1/tcp/0", Transport::Tcp),
        ("/ip4/127.0.0.1/udp/0/quic-v1", Transport::Quic),
    ] {
        let (one, two) = (network(&[]).await, network(&[listen]).await);
        echo(&two);
        let path = one
            .connect(two.local_peer(), two.addresses().all)
            .await
            .unwrap();
        assert_eq!((path.kind, path.transport), (PathKind::Loopback, transport));
        round_trip(&one, &two, 0).await;
        round_trip(&one, &two, 3 << 20).await;
        let peers = one.peers().await;
        assert_eq!(peers.len(), 1);
        assert_eq!(peers[0].peer, two.local_peer());
    }
}

#[tokio::test]
async fn a_hundred_streams_at_once_all_arrive() {
    let (one, two) = (network(&[]).await, network(&["/ip4/127.0.0.1/tcp/0"]).await);
    echo(&two);
    one.connect(two.local_peer(), two.addresses().all)
        .await
        .unwrap();
    // In waves that stay below the limit of open streams per peer.
    for _ in 0..2 {
        let waves = (0..50).map(|_| round_trip(&one, &two, 10_000));
        timeout(PATIENCE, futures::future::join_all(waves))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_refused_dialer_is_told_of_limits_and_the_limit_counts_it() {
    for (listen, expected) in [
        ("/ip4/127.0.0.1/tcp/0", "a limit on connections is reached"),
        ("/ip4/127.0.0.1/udp/0/quic-v1", "refused"),
    ] {
        let mut config = config(&[listen]);
        // The limit for this machine is six times that of another address.
        config.limits.per_address = 1;
        let full = Network::spawn(config, dummy::Behaviour).await.unwrap();
        let mut inside = Vec::new();
        for _ in 0..6 {
            let one = network(&[]).await;
            one.connect(full.local_peer(), full.addresses().all)
                .await
                .unwrap();
            inside.push(one);
        }
        let late = network(&[]).await;
        let refused = late.connect(full.local_peer(), full.addresses().all).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        let limits = full.limits().await;
        let refused = |name| limits.iter().find(|row| row.name == name).unwrap().refused;
        assert!(refused("connections_per_address") > 0, "{limits:?}");
        assert_eq!(refused("connections"), 0, "{limits:?}");
        // No peer is locked out for ever.
        drop(inside.pop());
        let again = async {
            while late
                .connect(full.local_peer(), full.addresses().all)
                .await
                .is_err()
            {}
        };
        timeout(PATIENCE, again).await.unwrap();
    }
}

#[tokio::test]
async fn streams_over_the_limit_are_reset() {
    let (one, two) = (network(&[]).await, {
        let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
        config.limits.streams = 4;
        Network::spawn(config, dummy::Behaviour).await.unwrap()
    });
    let mut incoming = two.accept(ECHO).unwrap();
    one.connect(two.local_peer(), two.addresses().all)
        .await
        .unwrap();
    let mut opened = Vec::new();
    for _ in 0..8 {
        let mut stream = one
            .open(two.local_peer(), ECHO, Class::Control)
            .await
            .unwrap();
        // Only now the remote side learns of the stream.
        stream.write_all(b"x").await.unwrap();
        stream.flush().await.unwrap();
        opened.push(stream);
    }
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(timeout(PATIENCE, incoming.next()).await.unwrap().unwrap());
    }
    for stream in &mut opened[4..] {
        let mut byte = [0];
        assert!(
            timeout(PATIENCE, stream.read_exact(&mut byte))
                .await
                .unwrap()
                .is_err()
        );
    }
    // A slot that becomes free can be used again.
    held.pop();
    opened[3].shutdown().await.unwrap();
    let mut again = one
        .open(two.local_peer(), ECHO, Class::Control)
        .await
        .unwrap();
    again.write_all(b"x").await.unwrap();
    again.flush().await.unwrap();
    assert!(timeout(PATIENCE, incoming.next()).await.unwrap().is_some());
}

#[tokio::test]
async fn errors_name_their_cause() {
    let (one, two) = (network(&[]).await, network(&["/ip4/127.0.0.1/tcp/0"]).await);
    let stranger = Keypair::generate_ed25519().public().to_peer_id();
    let addresses = two.addresses().all;
    assert!(matches!(
        one.connect(stranger, vec![]).await,
        Err(ConnectError::NoAddress(_))
    ));
    // Another node has this address.
    let error = one.connect(stranger, addresses.clone()).await.unwrap_err();
    assert!(
        error.to_string().contains(&two.local_peer().to_string()),
        "{error}"
    );
    let nobody: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    let error = one
        .connect(two.local_peer(), vec![nobody])
        .await
        .unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(matches!(
        one.open(two.local_peer(), ECHO, Class::Bulk).await,
        Err(OpenError::NotConnected(_))
    ));
    one.connect(two.local_peer(), addresses).await.unwrap();
    for class in [Class::Interactive, Class::Bulk] {
        let mut stream = one.open(two.local_peer(), ECHO, class).await.unwrap();
        let error = stream.read_exact(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert!(error.to_string().contains("/weft/test/echo"), "{error}");
    }
    let _held = two.accept(ECHO).unwrap();
    assert!(two.accept(ECHO).is_err());
    two.stop().await;
    assert!(matches!(
        two.connect(one.local_peer(), vec![]).await,
        Err(ConnectError::Stopped)
    ));
}

#[tokio::test]
async fn an_address_where_another_node_answers_does_not_hide_a_good_one() {
    let listen = &["/ip4/127.0.0.1/tcp/0"][..];
    let (one, two, other) = (
        network(listen).await,
        network(listen).await,
        network(listen).await,
    );
    // The node's own address and another node's, before the right one.
    let mut addresses = one.addresses().all;
    addresses.extend(other.addresses().all);
    addresses.extend(two.addresses().all);
    for _ in 0..5 {
        one.connect(two.local_peer(), addresses.clone())
            .await
            .unwrap();
    }
    assert_eq!(one.peers().await[0].peer, two.local_peer());
}

#[tokio::test]
async fn a_port_in_use_is_an_error_when_asked_for() {
    let listen = [
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/127.0.0.1/udp/0/quic-v1",
        "/ip6/::1/tcp/0",
        "/ip6/::1/udp/0/quic-v1",
    ];
    let one = network(&listen).await;
    assert_eq!(one.addresses().all.len(), 4);
    for address in one.addresses().all {
        let error = Network::spawn(config(&[&address.to_string()]), dummy::Behaviour)
            .await
            .unwrap_err();
        assert!(matches!(error, SpawnError::Listen { .. }), "{error}");
    }
    let mut config = config(&[]);
    config.bootstrap = one.addresses().all;
    assert!(matches!(
        Network::spawn(config, dummy::Behaviour).await,
        Err(SpawnError::Bootstrap(_))
    ));
}

#[tokio::test]
async fn a_bootstrap_node_that_starts_later_is_reached() {
    let first = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let address = first.addresses().all.remove(0);
    let key = Keypair::generate_ed25519();
    let peer = key.public().to_peer_id();
    first.stop().await;
    let mut waiting = config(&[]);
    waiting.bootstrap = vec![format!("{address}/p2p/{peer}").parse().unwrap()];
    let waiting = Network::spawn(waiting, dummy::Behaviour).await.unwrap();
    let mut late = config(&[&address.to_string()]);
    late.key = key;
    // The first node's socket may take a moment to close.
    let _late = timeout(PATIENCE, async {
        loop {
            if let Ok(network) = Network::spawn(late.clone(), dummy::Behaviour).await {
                return network;
            }
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    timeout(PATIENCE, async {
        while waiting.peers().await.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

/// The path drops large packets: TCP connects, but TLS never gets an answer.
#[tokio::test]
async fn a_tcp_bootstrap_address_that_drops_everything_is_reached_by_quic() {
    let swallows = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = swallows.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok(one) = swallows.accept().await {
            kept.push(one);
        }
    });
    let other = network(&[&format!("/ip4/127.0.0.1/udp/{port}/quic-v1")]).await;
    let mut config = config(&["/ip4/127.0.0.1/udp/0/quic-v1"]);
    let peer = other.local_peer();
    config.bootstrap = vec![
        format!("/ip4/127.0.0.1/tcp/{port}/p2p/{peer}")
            .parse()
            .unwrap(),
    ];
    let us = Network::spawn(config, dummy::Behaviour).await.unwrap();
    timeout(PATIENCE, async {
        loop {
            let peers = us.peers().await;
            if let Some(found) = peers.iter().find(|found| found.peer == peer) {
                assert_eq!(found.path.transport, Transport::Quic);
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert!(us.bootstrap().await[0].connected);
}

#[tokio::test]
async fn a_failed_bootstrap_address_is_reported_with_the_reason() {
    let other = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let at = other.addresses().all.remove(0);
    // Bound, but not listening: dials are refused.
    let refuses = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = refuses.local_addr().unwrap().port();
    drop(refuses);
    let stranger = Keypair::generate_ed25519().public().to_peer_id();
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.bootstrap = [
        format!("{at}/p2p/{stranger}"),
        format!(
            "/ip4/127.0.0.1/tcp/{refused}/p2p/{}",
            libp2p::PeerId::random()
        ),
        format!(
            "/dns4/nowhere.invalid/tcp/1/p2p/{}",
            libp2p::PeerId::random()
        ),
        format!("{at}/p2p/{}", other.local_peer()),
    ]
    .map(|address| address.parse().unwrap())
    .to_vec();
    let us = Network::spawn(config, dummy::Behaviour).await.unwrap();
    let known = timeout(PATIENCE, async {
        loop {
            let known = us.bootstrap().await;
            if known[3].connected && known[..3].iter().all(|one| one.error.is_some()) {
                return known;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let known = known.await.unwrap();
    let error = |n: usize| known[n].error.clone().unwrap();
    assert!(
        error(0).contains(&other.local_peer().to_string()),
        "{}",
        error(0)
    );
    assert!(error(1).contains("refused"), "{}", error(1));
    assert!(error(2).contains("nowhere.invalid"), "{}", error(2));
    assert_eq!(known[3].error, None);
    assert!(
        known[..3]
            .iter()
            .all(|one| !one.connected && one.failures > 0)
    );
}

#[tokio::test]
async fn each_bootstrap_address_of_one_peer_has_its_own_result() {
    let other = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let peer = other.local_peer();
    let at = other.addresses().all.remove(0);
    // Bound, but not listening: dials are refused.
    let refuses = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = refuses.local_addr().unwrap().port();
    drop(refuses);
    let mut config = config(&["/ip4/127.0.0.1/tcp/0"]);
    config.bootstrap = [
        format!("/ip4/127.0.0.1/tcp/{refused}/p2p/{peer}"),
        format!("/dns4/nowhere.invalid/tcp/1/p2p/{peer}"),
        format!("{at}/p2p/{peer}"),
    ]
    .map(|address| address.parse().unwrap())
    .to_vec();
    let us = Network::spawn(config, dummy::Behaviour).await.unwrap();
    let known = timeout(PATIENCE, async {
        loop {
            let known = us.bootstrap().await;
            let failed = known[..2].iter().all(|one| one.error.is_some());
            if known[2].connected && failed {
                return known;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let known = known.await.unwrap();
    let error = |n: usize| known[n].error.clone().unwrap();
    assert!(error(0).contains("refused"), "{}", error(0));
    assert!(error(1).contains("nowhere.invalid"), "{}", error(1));
    assert!(!error(1).contains("refused"), "{}", error(1));
    assert_eq!((&known[2].error, known[2].failures), (&None, 0));
    // The peer is connected, no matter which of its addresses was used.
    assert!(known.iter().all(|one| one.connected));
}

#[tokio::test]
async fn a_witness_confirms_a_peer_s_address_and_reveals_no_other() {
    use weft_proto::{
        frame,
        wire::{SeenAnswer, SeenQuestion},
    };
    let seen = StreamProtocol::new("/weft/seen/1");
    let witness = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let at = witness.addresses().all;
    let (peer, asker) = (network(&[]).await, network(&[]).await);
    for one in [&peer, &asker] {
        one.connect(witness.local_peer(), at.clone()).await.unwrap();
    }
    let stranger = libp2p::PeerId::random();
    for (about, ips, expected) in [
        (
            peer.local_peer(),
            vec![[127, 0, 0, 1]],
            vec![[127, 0, 0, 1]],
        ),
        (peer.local_peer(), vec![[127, 0, 0, 2]], vec![]),
        (peer.local_peer(), vec![], vec![]),
        (stranger, vec![[127, 0, 0, 1]], vec![]),
    ] {
        let opened = asker.open(witness.local_peer(), seen.clone(), Class::Interactive);
        let mut stream = opened.await.unwrap();
        let question = SeenQuestion {
            peer: about.to_bytes().into(),
            ips: ips.iter().map(|ip: &[u8; 4]| ip.to_vec().into()).collect(),
        };
        frame::write(&mut stream, &question, 128).await.unwrap();
        tokio::io::AsyncWriteExt::flush(&mut stream).await.unwrap();
        let answer = timeout(PATIENCE, frame::read(&mut stream, 128))
            .await
            .unwrap();
        let answer: SeenAnswer = answer.unwrap().unwrap();
        let expected: Vec<_> = expected.iter().map(|ip: &[u8; 4]| ip.to_vec()).collect();
        assert_eq!(answer.ips, expected);
    }
}

#[tokio::test]
async fn dropping_the_last_handle_stops_the_network() {
    let (one, two) = (network(&[]).await, network(&["/ip4/127.0.0.1/tcp/0"]).await);
    let mut incoming = two.accept(ECHO).unwrap();
    one.connect(two.local_peer(), two.addresses().all)
        .await
        .unwrap();
    drop(two);
    assert!(timeout(PATIENCE, incoming.next()).await.unwrap().is_none());
    timeout(PATIENCE, async {
        while !one.peers().await.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn stock_libp2p_with_noise_and_yamux_connects() {
    use futures::StreamExt;
    let us = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let address = us.addresses().all.remove(0);
    let mut stock: Swarm<dummy::Behaviour> = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|_| dummy::Behaviour)
        .unwrap()
        .build();
    let peer = *stock.local_peer_id();
    #[expect(clippy::disallowed_methods, reason = "a stock swarm has no gate")]
    stock.dial(address).unwrap();
    timeout(PATIENCE, async {
        loop {
            tokio::select! {
                _ = stock.select_next_some() => {}
                peers = us.peers() => if peers.iter().any(|p| p.peer == peer) { return },
            }
        }
    })
    .await
    .unwrap();
}

/// A task that waits on a stream is woken when this side closes the connection, over every transport.
#[tokio::test]
async fn closing_a_connection_ends_its_streams_on_both_sides() {
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        let (one, two) = (network(&[]).await, network(&[listen]).await);
        let mut incoming = two.accept(ECHO).unwrap();
        one.connect(two.local_peer(), two.addresses().all)
            .await
            .unwrap();
        let peer = two.local_peer();
        let mut near = one.open(peer, ECHO, Class::Interactive).await.unwrap();
        near.write_all(b"weft").await.unwrap();
        near.flush().await.unwrap();
        let mut far = timeout(PATIENCE, incoming.next()).await.unwrap().unwrap();
        let mut got = [0; 4];
        far.read_exact(&mut got).await.unwrap();
        let (mut near, mut near_write) = tokio::io::split(near);
        let mut byte = [0];
        let reading = near.read(&mut byte);
        // More than any window, so that the writer waits for the remote side to read.
        let much = vec![0; 64 << 20];
        let writing = near_write.write_all(&much);
        let close = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            one.set_access(Access {
                block: vec![Rule::Peer(peer)],
                ..Access::default()
            })
            .await;
        };
        // Silence would end the streams over QUIC too, but later.
        let ended = timeout(Duration::from_secs(20), async {
            tokio::join!(reading, writing, close)
        });
        let (read, wrote, ()) = ended.await.unwrap_or_else(|_| panic!("{listen}: waits on"));
        // Not as if the remote side had ended its stream in order.
        assert!(read.is_err(), "{listen}: {read:?}");
        wrote.unwrap_err();
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, far.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "{listen}: the remote side still waits");
    }
}

#[tokio::test]
async fn a_name_is_dialed_at_the_addresses_it_resolves_to() {
    let two = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    echo(&two);
    let address = two.addresses().all.remove(0).to_string();
    let named: Multiaddr = address
        .replace("/ip4/127.0.0.1/", "/dns4/localhost/")
        .parse()
        .unwrap();
    let one = network(&[]).await;
    one.connect(two.local_peer(), vec![named.clone()])
        .await
        .unwrap();
    round_trip(&one, &two, 10).await;
    let path = &one.peers().await[0].path;
    assert_eq!(path.kind, PathKind::Loopback);
    assert!(path.address.to_string().starts_with(&address), "{path:?}");

    // The lists also apply to the addresses that it resolves to.
    let mut config = config(&[]);
    config.access.block = vec!["127.0.0.0/8".parse().unwrap()];
    let shut = Network::spawn(config, dummy::Behaviour).await.unwrap();
    for address in [named, address.parse().unwrap()] {
        let failed = shut.connect(two.local_peer(), vec![address]).await;
        let error = failed.unwrap_err().to_string();
        assert!(error.contains("allow and block lists"), "{error}");
    }
}

/// The lower transports split such addresses from the end, but all checks read them from the beginning.
#[tokio::test]
async fn an_address_that_hides_another_is_not_dialed() {
    let two = network(&["/ip4/127.0.0.1/tcp/0"]).await;
    let one = network(&[]).await;
    let address = two.addresses().all.remove(0);
    for hiding in [
        format!("/ip4/192.0.2.1{address}"),
        format!("/ip4/192.0.2.1/tcp/1{address}"),
        format!("/dns4/localhost{address}"),
        format!("{address}/x-parity-ws/%2Fadmin"),
    ] {
        let failed = one.connect(two.local_peer(), vec![hiding.parse().unwrap()]);
        let error = failed.await.unwrap_err().to_string();
        let unsupported = [
            "not an address this node can dial",
            "resolves to no address",
        ];
        assert!(
            unsupported.iter().any(|text| error.contains(text)),
            "{hiding}: {error}"
        );
    }
}
