//! Tests against an AutoNAT server that lies, between public addresses in a network namespace.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures::StreamExt;
use libp2p::{
    SwarmBuilder, identify,
    identity::Keypair,
    noise,
    swarm::{SwarmEvent, dial_opts::DialOpts, dial_opts::PeerCondition, dummy},
    tcp, yamux,
};
use tokio::{
    io::AsyncWriteExt,
    sync::mpsc,
    time::{sleep, timeout},
};
use weft_proto::{
    frame,
    wire::{
        AutonatDialBack, AutonatDialBackResponse, AutonatDialResponse, AutonatDialStatus,
        AutonatMessage, autonat_dial_response::Status, autonat_message::Msg,
    },
};

use super::*;
use crate::{
    Config, Network, Reachability,
    policy::limits::Memory,
    streams::{self, Protocols},
};

const MAX: usize = 8192;
const PATIENCE: Duration = Duration::from_secs(30);

/// Two addresses that count as public. Packets to one of them have the other as their source.
const ADDRESSES: &str = "ip link set lo up && ip addr add 11.0.1.1/32 dev lo && ip addr add 11.0.2.1/32 dev lo && \
     ip route replace local 11.0.1.1 dev lo table local src 11.0.2.1 && \
     ip route replace local 11.0.2.1 dev lo table local src 11.0.1.1 && exec \"$0\" \"$@\"";

/// Number of pings that the server received. Each namespace has one server.
static PINGS: AtomicUsize = AtomicUsize::new(0);

/// An environment variable that is set in the process inside the namespace.
const INSIDE: &str = "WEFT_TEST_INSIDE_NAMESPACE";

/// Runs the test named `name` of this module in a namespace. Returns true in the process inside it.
fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "sh", "-c", ADDRESSES])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("driver::autonat::tests::{name}")])
        .arg("--nocapture")
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{errors}");
    assert!(said.contains("1 passed"), "{said}");
    false
}

#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Server {
    identify: identify::Behaviour,
    streams: streams::Behaviour,
}

/// The way in which the server delivers the nonce.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    /// On the connection that carried the request.
    SameConnection,
    /// On a connection that the server opens for it.
    Dial,
}

/// Runs a server at 11.0.2.1 that answers one request and claims that its dial was successful. Returns its address, and
/// a handle to wait for the end of the exchange.
async fn server(way: Way) -> (Multiaddr, tokio::task::JoinHandle<()>) {
    let protocols = Protocols::default();
    let mut requests = protocols.accept(DIAL_REQUEST).unwrap();
    let mut pings = protocols.accept(crate::ping::PING_PROTOCOL).unwrap();
    tokio::spawn(async move {
        while let Some(stream) = pings.next().await {
            PINGS.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(crate::ping::answer_pings(stream));
        }
    });
    let mut swarm = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|key| Server {
            identify: identify::Behaviour::new(identify::Config::new(
                "/weft/1".to_owned(),
                key.public(),
            )),
            streams: streams::Behaviour::new(protocols.clone(), 8, Memory::new(None)),
        })
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
        .build();
    let own = *swarm.local_peer_id();
    let listen: Multiaddr = "/ip4/11.0.2.1/tcp/4001".parse().unwrap();
    swarm.listen_on(listen.clone()).unwrap();
    while !matches!(
        swarm.select_next_some().await,
        SwarmEvent::NewListenAddr { .. }
    ) {}
    let (wanted, mut wants) = mpsc::channel(1);
    let exchange = tokio::spawn(async move {
        let mut stream = requests.next().await.unwrap();
        let asked: AutonatMessage = frame::read(&mut stream, MAX).await.unwrap().unwrap();
        let Some(Msg::DialRequest(request)) = asked.msg else {
            panic!("{asked:?}");
        };
        let address = Multiaddr::try_from(request.addrs[0].to_vec()).unwrap();
        let (reply, answer) = oneshot::channel::<Result<Stream, crate::OpenError>>();
        wanted.send((stream.peer(), address, reply)).await.unwrap();
        let mut back: Stream = answer.await.unwrap().unwrap();
        let nonce = AutonatDialBack {
            nonce: request.nonce,
        };
        frame::write(&mut back, &nonce, MAX).await.unwrap();
        back.flush().await.unwrap();
        // A client acknowledges the nonce if it accepts the dial-back, and resets the stream otherwise.
        let _ = frame::read::<AutonatDialBackResponse, _>(&mut back, MAX).await;
        let response = AutonatDialResponse {
            status: Status::Ok.into(),
            addr_idx: 0,
            dial_status: AutonatDialStatus::Ok.into(),
        };
        let message = AutonatMessage {
            msg: Some(Msg::DialResponse(response)),
        };
        frame::write(&mut stream, &message, MAX).await.unwrap();
        stream.shutdown().await.unwrap();
        // Wait until the client has read the answer.
        let _ = frame::read::<AutonatMessage, _>(&mut stream, MAX).await;
    });
    tokio::spawn(async move {
        let mut dialing = None;
        loop {
            tokio::select! {
                event = swarm.select_next_some() => {
                    let SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } = event else {
                        continue;
                    };
                    if let Some(reply) = dialing.take_if(|_| endpoint.is_dialer()) {
                        let streams = &mut swarm.behaviour_mut().streams;
                        streams.open_on(peer_id, connection_id, DIAL_BACK, reply);
                    }
                }
                Some((peer, address, reply)) = wants.recv() => match way {
                    Way::SameConnection => {
                        let streams = &mut swarm.behaviour_mut().streams;
                        streams.open(peer, DIAL_BACK, Class::Control, reply);
                    }
                    Way::Dial => {
                        dialing = Some(reply);
                        let dial = DialOpts::peer_id(peer)
                            .condition(PeerCondition::Always)
                            .addresses(vec![address])
                            .allocate_new_port();
                        #[expect(clippy::disallowed_methods, reason = "a stock swarm has no gate")]
                        swarm.dial(dial.build()).unwrap();
                    }
                },
            }
        }
    });
    (listen.with_p2p(own).unwrap(), exchange)
}

/// Makes a node at 11.0.1.1 with the server as its bootstrap node.
async fn node(bootstrap: Multiaddr) -> Network {
    node_at("/ip4/11.0.1.1/tcp/4001", bootstrap).await
}

async fn node_at(listen: &str, bootstrap: Multiaddr) -> Network {
    let mut config = Config::new(Keypair::generate_ed25519());
    config.mdns = false;
    config.port_mapping = false;
    config.listen = Some(vec![listen.parse().unwrap()]);
    config.bootstrap = vec![bootstrap];
    Network::spawn(config, dummy::Behaviour).await.unwrap()
}

fn is_reached(known: &Reachability) -> bool {
    let mut verified = known.verified.iter();
    !known.public.is_empty() || known.is_relay || verified.any(|(_, v)| *v == Verdict::Reached)
}

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let done = timeout(PATIENCE, test).await;
        done.unwrap()
    })
}

#[test]
fn a_server_that_only_claims_to_have_dialed_makes_no_address_public() {
    if !inside("a_server_that_only_claims_to_have_dialed_makes_no_address_public") {
        return;
    }
    run(async {
        let (bootstrap, exchange) = server(Way::SameConnection).await;
        let node = node(bootstrap).await;
        exchange.await.unwrap();
        // The answer still passes the node's task.
        for _ in 0..20 {
            let known = node.reachability().await.unwrap();
            assert!(!is_reached(&known), "{known:?}");
            sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn a_server_that_dials_makes_the_address_public() {
    if !inside("a_server_that_dials_makes_the_address_public") {
        return;
    }
    run(async {
        let (bootstrap, exchange) = server(Way::Dial).await;
        let node = node(bootstrap).await;
        exchange.await.unwrap();
        while !is_reached(&node.reachability().await.unwrap()) {
            sleep(Duration::from_millis(50)).await;
        }
    });
}

/// Commands that create the interfaces and the address of a container.
const CONTAINER: &str = "ip link add v0 type veth peer name v1 && ip link set v0 up && ip link set v1 up && \
     ip addr add 172.18.0.1/16 dev v0";

#[test]
fn a_container_that_starts_costs_peers_nothing() {
    if !inside("a_container_that_starts_costs_peers_nothing") {
        return;
    }
    run(async {
        let (bootstrap, _) = server(Way::SameConnection).await;
        let node = node_at("/ip4/0.0.0.0/tcp/4002", bootstrap).await;
        while node.peers().await.is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
        // The stream that asks a new peer for its clock.
        while PINGS.load(Ordering::Relaxed) == 0 {
            sleep(Duration::from_millis(20)).await;
        }
        let started = Command::new("sh").args(["-c", CONTAINER]).status();
        assert!(started.unwrap().success());
        let listens = |address: &Multiaddr| address.to_string().contains("172.18.0.1");
        while !node.addresses().all.iter().any(listens) {
            sleep(Duration::from_millis(20)).await;
        }
        // Longer than the time for which changes are collected.
        sleep(Duration::from_millis(2500)).await;
        assert_eq!(PINGS.load(Ordering::Relaxed), 1);
        // The bridge comes last among the addresses.
        let all = node.addresses().all;
        assert!(all.last().is_some_and(listens), "{all:?}");
    });
}
