use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{AsyncReadExt, AsyncWriteExt, future::poll_fn};
use libp2p::core::Endpoint as Role;
use tokio::sync::watch;

use super::*;
use crate::{
    Limits,
    policy::{connection_manager::ConnectionManager, limits::Memory},
};

fn pending(all: u32) -> Pending {
    let manager = ConnectionManager::new(&Limits::default(), Memory::new(None));
    Pending::new(all, manager)
}

fn transport() -> (PeerId, Sockets, Quic) {
    counted(pending(256))
}

fn counted(pending: Pending) -> (PeerId, Sockets, Quic) {
    of(&Keypair::generate_ed25519(), pending)
}

fn of(key: &Keypair, pending: Pending) -> (PeerId, Sockets, Quic) {
    let sockets = Sockets::default();
    let tls = Tls::new(key).unwrap();
    let quic = Quic::new(key, &tls, sockets.clone(), pending).unwrap();
    (key.public().to_peer_id(), sockets, quic)
}

async fn next(quic: &mut Quic) -> Event {
    poll_fn(|cx| Pin::new(&mut *quic).poll(cx)).await
}

async fn listen(quic: &mut Quic) -> Multiaddr {
    let address = "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap();
    quic.listen_on(ListenerId::next(), address).unwrap();
    match next(quic).await {
        TransportEvent::NewAddress { listen_addr, .. } => listen_addr,
        event => panic!("{event:?}"),
    }
}

fn options(port_use: PortUse) -> DialOpts {
    DialOpts {
        role: Role::Dialer,
        port_use,
    }
}

async fn accept(quic: &mut Quic) -> (SocketAddr, io::Result<(PeerId, Connection)>) {
    match next(quic).await {
        TransportEvent::Incoming {
            upgrade,
            send_back_addr,
            ..
        } => (super::quic(&send_back_addr).unwrap(), upgrade.await),
        event => panic!("{event:?}"),
    }
}

/// Opens a connection. Returns both ends, the dialer's first, each with the peer that it saw.
async fn connected(near: &mut Quic, far: &mut Quic) -> [(PeerId, Connection); 2] {
    let address = listen(far).await;
    let dial = near.dial(address, options(PortUse::Reuse)).unwrap();
    let (dialed, (_, accepted)) = tokio::join!(dial, accept(far));
    [dialed.unwrap(), accepted.unwrap()]
}

async fn outbound(connection: &mut Connection) -> Stream {
    let opened = poll_fn(|cx| Pin::new(&mut *connection).poll_outbound(cx));
    opened.await.unwrap()
}

async fn inbound(connection: &mut Connection) -> Stream {
    let opened = poll_fn(|cx| Pin::new(&mut *connection).poll_inbound(cx));
    opened.await.unwrap()
}

#[tokio::test]
async fn bytes_pass_and_both_sides_know_their_peer() {
    let (one, _, mut near) = transport();
    let (other, _, mut far) = transport();
    let [(seen, mut near), (seen_by_far, mut far)] = connected(&mut near, &mut far).await;
    assert_eq!((seen, seen_by_far), (other, one));
    let send = async {
        let mut stream = outbound(&mut near).await;
        stream.write_all(b"weft").await.unwrap();
        stream.close().await.unwrap();
        stream.close().await.unwrap();
        stream
    };
    let receive = async {
        let mut stream = inbound(&mut far).await;
        let mut got = Vec::new();
        stream.read_to_end(&mut got).await.unwrap();
        got
    };
    let (_stream, got) = tokio::join!(send, receive);
    assert_eq!(got, b"weft");
}

#[tokio::test]
async fn a_dial_uses_the_right_socket() {
    let (_, sockets, mut near) = transport();
    let (_, _, mut far) = transport();
    let near_at = quic(&listen(&mut near).await).unwrap();
    let address = listen(&mut far).await;
    let dial = near.dial(address.clone(), options(PortUse::Reuse)).unwrap();
    let (_, (from, _)) = tokio::join!(dial, accept(&mut far));
    assert_eq!(from, near_at);
    let dial = near.dial(address.clone(), options(PortUse::New)).unwrap();
    let (_, (from, _)) = tokio::join!(dial, accept(&mut far));
    assert_ne!(from, near_at);
    let found = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let found_at = found.local_addr().unwrap();
    sockets.prepare(quic(&address).unwrap(), found);
    let dial = near.dial(address, options(PortUse::Reuse)).unwrap();
    let (_, (from, _)) = tokio::join!(dial, accept(&mut far));
    assert_eq!(from, found_at);
}

#[tokio::test]
async fn a_connection_follows_a_peer_whose_port_changes() {
    let (_, _, mut near) = transport();
    let (_, _, mut far) = transport();
    let [(_, mut here), (_, mut there)] = connected(&mut near, &mut far).await;
    let dialer = near.dialers[0].clone().unwrap();
    let moved = bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let moved_to = moved.local_addr().unwrap();
    dialer.rebind(moved).unwrap();
    let send = async {
        let mut stream = outbound(&mut here).await;
        stream.write_all(b"weft").await.unwrap();
        stream
    };
    let receive = async {
        let mut stream = inbound(&mut there).await;
        let mut got = [0; 4];
        stream.read_exact(&mut got).await.unwrap();
        stream
    };
    let _streams = tokio::join!(send, receive);
    match poll_fn(|cx| Pin::new(&mut there).poll(cx)).await.unwrap() {
        StreamMuxerEvent::AddressChange(address) => assert_eq!(quic(&address), Some(moved_to)),
    }
}

/// Passes packets between a client and `server`, which receives them from the first of two sockets. After a signal, it
/// sends the client's packets from the second socket: from an address at which the client does not receive. Returns the
/// address for the client, and counts the bytes that arrive at the second address.
async fn spoofer(server: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>, watch::Sender<bool>) {
    let bind =
        |ip: &'static str| async move { tokio::net::UdpSocket::bind((ip, 0)).await.unwrap() };
    let (near, own, spoofed) = (
        bind("127.0.0.1").await,
        bind("127.0.0.1").await,
        bind("127.0.0.2").await,
    );
    let at = near.local_addr().unwrap();
    let (spoof, lies) = watch::channel(false);
    let got = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&got);
    tokio::spawn(async move {
        let (mut one, mut two, mut three) = ([0; 2048], [0; 2048], [0; 2048]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((size, from)) = near.recv_from(&mut one) => {
                    client = Some(from);
                    let socket = if *lies.borrow() { &spoofed } else { &own };
                    socket.send_to(&one[..size], server).await.unwrap();
                }
                Ok((size, _)) = own.recv_from(&mut two) => if let Some(client) = client {
                    near.send_to(&two[..size], client).await.unwrap();
                },
                Ok((size, _)) = spoofed.recv_from(&mut three) => {
                    count.fetch_add(size, Ordering::Relaxed);
                }
            }
        }
    });
    (at, got, spoof)
}

#[tokio::test]
async fn packets_from_a_forged_address_do_not_move_a_peer() {
    let (_, _, mut near) = transport();
    let (_, _, mut far) = transport();
    let server = quic(&listen(&mut far).await).unwrap();
    let (through, victim_got, spoof) = spoofer(server).await;
    let dial = near.dial(of_socket(through, Transport::Quic), options(PortUse::Reuse));
    let (dialed, (_, accepted)) = tokio::join!(dial.unwrap(), accept(&mut far));
    let ((_, mut here), (_, mut there)) = (dialed.unwrap(), accepted.unwrap());
    let before = there.remote;
    spoof.send(true).unwrap();
    let mut stream = outbound(&mut here).await;
    let attack = async {
        loop {
            stream.write_all(b"weft").await.unwrap();
            sleep(Duration::from_millis(20)).await;
        }
    };
    let watch = async {
        // Until the packets redirect the server.
        while victim_got.load(Ordering::Relaxed) == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        for _ in 0..50 {
            let event = poll_fn(|cx| Poll::Ready(Pin::new(&mut there).poll(cx))).await;
            assert!(event.is_pending(), "{event:?}");
            sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = attack => unreachable!("it goes on for ever"),
        () = watch => {}
    }
    assert_eq!(there.remote, before);
}

#[tokio::test]
async fn a_peer_stays_at_the_address_of_its_handshake_though_its_packets_move_at_once() {
    let (_, _, mut near) = transport();
    let (_, _, mut far) = transport();
    let server = quic(&listen(&mut far).await).unwrap();
    let (through, victim_got, spoof) = spoofer(server).await;
    let dial = near.dial(of_socket(through, Transport::Quic), options(PortUse::Reuse));
    let dial = tokio::spawn(dial.unwrap());
    let (upgrade, from) = match next(&mut far).await {
        TransportEvent::Incoming {
            upgrade,
            send_back_addr,
            ..
        } => (upgrade, quic(&send_back_addr).unwrap()),
        event => panic!("{event:?}"),
    };
    let (_, mut here) = dial.await.unwrap().unwrap();
    // Once this is acknowledged, the handshake is complete on the remote side.
    let mut stream = outbound(&mut here).await;
    stream.write_all(b"weft").await.unwrap();
    stream.send.finish().unwrap();
    stream.send.stopped().await.unwrap();
    spoof.send(true).unwrap();
    let mut stream = outbound(&mut here).await;
    let attack = async {
        loop {
            stream.write_all(b"weft").await.unwrap();
            sleep(Duration::from_millis(20)).await;
        }
    };
    let watch = async {
        // quinn accepts the new address before any code here has looked at the connection.
        while victim_got.load(Ordering::Relaxed) == 0 {
            sleep(Duration::from_millis(5)).await;
        }
        upgrade.await.unwrap().1
    };
    let there = tokio::select! {
        () = attack => unreachable!("it goes on for ever"),
        there = watch => there,
    };
    assert_eq!(there.remote, from);
}

/// Passes packets from clients, sent to the returned address, on from 127.0.0.2, and passes no answers back. For the
/// server, their source address is forged. Counts the bytes that come back.
async fn one_way(server: SocketAddr) -> (SocketAddr, Arc<AtomicUsize>) {
    let near = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let forged = tokio::net::UdpSocket::bind("127.0.0.2:0").await.unwrap();
    let at = near.local_addr().unwrap();
    let got = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&got);
    tokio::spawn(async move {
        let (mut one, mut two) = ([0; 2048], [0; 2048]);
        loop {
            tokio::select! {
                Ok((size, _)) = near.recv_from(&mut one) => {
                    forged.send_to(&one[..size], server).await.unwrap();
                }
                Ok((size, _)) = forged.recv_from(&mut two) => {
                    count.fetch_add(size, Ordering::Relaxed);
                }
            }
        }
    });
    (at, got)
}

#[tokio::test]
async fn forged_first_packets_do_not_keep_their_address_from_connecting_by_tcp_or_quic() {
    // This machine may have 12: six times the limit of an address.
    let pending = pending(1024).with_per_site(2);
    let at = |pending: &Pending| {
        let group = NetworkGroup::of_ip([127, 0, 0, 2].into());
        pending.enter(Carrier::Tcp, group)
    };
    let (_, _, mut forger) = transport();
    let (_, _, mut far) = counted(pending.clone());
    let address = listen(&mut far).await;
    let (through, answered) = one_way(quic(&address).unwrap()).await;
    let forged: Vec<_> = (0..64)
        .map(|_| {
            let through = of_socket(through, Transport::Quic);
            let dial = forger.dial(through, options(PortUse::Reuse)).unwrap();
            tokio::spawn(dial)
        })
        .collect();
    let (upgraded, mut upgrades) = mpsc::channel(256);
    tokio::spawn(async move {
        loop {
            if let TransportEvent::Incoming {
                upgrade,
                send_back_addr,
                ..
            } = next(&mut far).await
            {
                let upgraded = upgraded.clone();
                tokio::spawn(async move {
                    let came = upgrade.await.map(|(peer, _)| (peer, send_back_addr));
                    let _ = upgraded.send(came).await;
                });
            }
        }
    });
    // Each of them is under way, or was answered.
    let handled = || {
        let limits = pending.limits();
        limits[0].used + limits.iter().map(|row| row.refused).sum::<u64>()
    };
    while handled() < 64 || answered.load(Ordering::Relaxed) == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    // By TCP, from the address that was forged.
    let ticket = at(&pending).unwrap();
    ticket.spoke();
    // By QUIC, from there as well.
    let (honest, sockets, mut near) = transport();
    let socket = bind("127.0.0.2:0".parse().unwrap()).unwrap();
    sockets.prepare(quic(&address).unwrap(), socket);
    near.dial(address, options(PortUse::Reuse))
        .unwrap()
        .await
        .unwrap();
    let (peer, from) = upgrades.recv().await.unwrap().unwrap();
    assert_eq!(peer, honest);
    assert_eq!(quic(&from).unwrap().ip(), IpAddr::from([127, 0, 0, 2]));
    forged.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_peer_whose_ip_address_changes_has_to_connect_anew() {
    let (_, _, mut near) = transport();
    let (_, _, mut far) = transport();
    let [(_, mut here), (_, mut there)] = connected(&mut near, &mut far).await;
    let dialer = near.dialers[0].clone().unwrap();
    dialer
        .rebind(bind("127.0.0.2:0".parse().unwrap()).unwrap())
        .unwrap();
    let mut stream = outbound(&mut here).await;
    stream.write_all(b"weft").await.unwrap();
    let mut far_stream = inbound(&mut there).await;
    far_stream.read_exact(&mut [0; 4]).await.unwrap();
    let event = poll_fn(|cx| Pin::new(&mut there).poll(cx)).await;
    assert_eq!(event.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn removing_a_listener_ends_it_with_an_event() {
    let (_, _, mut quic) = transport();
    let id = ListenerId::next();
    let address: Multiaddr = "/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap();
    quic.listen_on(id, address).unwrap();
    assert!(matches!(
        next(&mut quic).await,
        TransportEvent::NewAddress { .. }
    ));
    assert!(quic.remove_listener(id));
    assert!(!quic.remove_listener(id));
    assert!(matches!(
        next(&mut quic).await,
        TransportEvent::ListenerClosed { reason: Ok(()), .. }
    ));
    assert!(quic.sockets.listening([127, 0, 0, 1].into()).is_none());
}

/// Runs a node in a runtime of its own and drops the runtime. Peers are told no more than after `kill -9`. Returns the
/// listening address.
fn killed(
    key: &Keypair,
    listening: impl FnOnce(Multiaddr) + Send + 'static,
    connected: std::sync::mpsc::Receiver<()>,
) -> std::thread::JoinHandle<()> {
    let key = key.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let far = runtime.block_on(async {
            let (_, _, mut far) = of(&key, pending(256));
            listening(listen(&mut far).await);
            let accepted = accept(&mut far).await.1.unwrap();
            (far, accepted)
        });
        connected.recv().unwrap();
        // First what sends packets, so that nothing says goodbye; then the socket.
        drop(runtime);
        drop(far);
    })
}

#[tokio::test]
async fn peers_notice_at_once_that_a_node_was_killed_and_restarted() {
    let key = Keypair::generate_ed25519();
    let (_, _, mut near) = transport();
    let (listening, address) = tokio::sync::oneshot::channel();
    let (told, connected) = std::sync::mpsc::channel();
    let first = killed(&key, |at| listening.send(at).unwrap(), connected);
    let address = address.await.unwrap();
    let dial = near.dial(address.clone(), options(PortUse::Reuse)).unwrap();
    let (_, mut connection) = dial.await.unwrap();
    told.send(()).unwrap();
    first.join().unwrap();
    let (_, _, mut again) = of(&key, pending(256));
    again.listen_on(ListenerId::next(), address).unwrap();
    assert!(matches!(
        next(&mut again).await,
        TransportEvent::NewAddress { .. }
    ));
    let mut stream = outbound(&mut connection).await;
    stream.write_all(b"are you there").await.unwrap();
    stream.flush().await.unwrap();
    // Only a reset, or half a minute of silence, ends the connection.
    assert_eq!(connection.connection.closed().await, ConnectionError::Reset);
}
