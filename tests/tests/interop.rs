//! Interoperability with js-libp2p: connections, ping, identify, relays in both roles, and 64 MiB on a stream. Run by
//! `tests/nightly`, which installs js-libp2p.

#![allow(clippy::unwrap_used)]

use std::{
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::{sleep, timeout},
};
use weft_net::{
    Class, Config, Multiaddr, Network, PathKind, PeerId, RelayServer, Transport, split_peer_id,
};
use weft_tests::network::{self, ECHO, config, plain_network};

const SIZE: usize = 64 << 20;
const PATIENCE: Duration = Duration::from_secs(300);

/// A js-libp2p node in a process of its own.
struct Js {
    _child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    next: u64,
    peer: PeerId,
    addresses: Vec<Multiaddr>,
}

impl Js {
    async fn start(arguments: &[&str]) -> Self {
        let folder = std::env::var_os("WEFT_TEST_INTEROP");
        let folder = PathBuf::from(folder.expect("run tests/nightly, which installs js-libp2p"));
        let mut child = Command::new("node")
            .arg(folder.join("peer.mjs"))
            .args(arguments)
            .args(["--echo", ECHO.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = timeout(PATIENCE, answers.next_line()).await.unwrap();
        let ready: Value = serde_json::from_str(&ready.unwrap().unwrap()).unwrap();
        let addresses = ready["addresses"].as_array().unwrap().iter();
        Self {
            _child: child,
            commands,
            answers,
            next: 0,
            peer: ready["peer_id"].as_str().unwrap().parse().unwrap(),
            addresses: addresses
                .map(|address| address.as_str().unwrap().parse().unwrap())
                .collect(),
        }
    }

    /// Sends the node a command, and returns the result.
    async fn ask(&mut self, what: &str, mut request: Value) -> Value {
        self.next += 1;
        request["id"] = json!(self.next);
        request["do"] = json!(what);
        let line = format!("{request}\n");
        self.commands.write_all(line.as_bytes()).await.unwrap();
        let answer = timeout(PATIENCE, self.answers.next_line()).await.unwrap();
        let answer: Value = serde_json::from_str(&answer.unwrap().unwrap()).unwrap();
        assert_eq!(answer["id"], self.next);
        assert!(answer["error"].is_null(), "{what}: {answer}");
        answer["ok"].clone()
    }
}

async fn spawn(config: Config) -> Network {
    let network = plain_network(config).await;
    network::echo(&network);
    network
}

/// Returns the first address of `network` that `fits`, with its id.
async fn address(network: &Network, fits: impl Fn(&str) -> bool) -> String {
    let begin = Instant::now();
    loop {
        let all = network.addresses().all;
        if let Some(address) = all.iter().map(ToString::to_string).find(|a| fits(a)) {
            return format!("{address}/p2p/{}", network.local_peer());
        }
        assert!(begin.elapsed() < Duration::from_secs(30), "{all:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Sends 64 MiB over a stream, and compares the bytes that come back.
async fn echo(network: &Network, peer: PeerId, class: Class) -> PathKind {
    let stream = network.open(peer, ECHO, class).await.unwrap();
    let kind = stream.path().kind;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sent: Vec<u8> = (0..SIZE as u32)
        .map(|n| (n.wrapping_mul(n) >> 9) as u8)
        .collect();
    let mut got = Vec::new();
    let both = async {
        tokio::join!(
            async {
                writer.write_all(&sent).await?;
                writer.shutdown().await
            },
            reader.read_to_end(&mut got)
        )
    };
    let (wrote, read) = timeout(PATIENCE, both).await.unwrap();
    wrote.unwrap();
    read.unwrap();
    assert!(got == sent, "{} of {SIZE} bytes came back", got.len());
    kind
}

#[tokio::test]
async fn js_dials_and_pings_and_identifies_and_gets_64_mib_back() {
    for security in ["tls", "noise"] {
        let network = spawn(config(&["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/tcp/0/ws"])).await;
        for ws in [false, true] {
            let mut js = Js::start(&["--security", security]).await;
            let at = address(&network, |a| a.ends_with("/ws") == ws).await;
            let dialed = js.ask("dial", json!({ "address": at })).await;
            let id = network.local_peer().to_string();
            assert_eq!(dialed["peer_id"], id.as_str());
            assert_eq!(dialed["limited"], false);
            let pong = js.ask("ping", json!({ "peer_id": id })).await;
            assert!(pong["rtt_ms"].as_f64().unwrap() < 1000.0, "{pong}");
            let known = js.ask("identify", json!({ "peer_id": id })).await;
            assert!(known["agent"].as_str().unwrap().starts_with("weft/"));
            assert_eq!(known["protocol_version"], "/weft/1");
            let protocols = known["protocols"].as_array().unwrap();
            assert!(protocols.iter().any(|p| p == ECHO.as_ref()), "{known}");
            let back = json!({ "peer_id": id, "protocol": ECHO.as_ref(), "bytes": SIZE });
            assert_eq!(js.ask("echo", back).await["bytes"], SIZE);
            // The other direction, on the same connection.
            echo(&network, js.peer, Class::Interactive).await;
            js.ask("stop", json!({})).await;
        }
    }
}

#[tokio::test]
async fn js_is_dialed_and_gives_64_mib_back() {
    let listen = [
        "--listen",
        "/ip4/127.0.0.1/tcp/0",
        "--listen",
        "/ip4/127.0.0.1/tcp/0/ws",
    ];
    for security in ["tls", "noise"] {
        let js = Js::start(&[&listen[..], &["--security", security]].concat()).await;
        for transport in [Transport::Tcp, Transport::Ws] {
            let network = spawn(config(&[])).await;
            let ws = transport == Transport::Ws;
            let found = js
                .addresses
                .iter()
                .find(|a| a.to_string().contains("/ws/") == ws);
            let at = split_peer_id(found.unwrap().clone()).0;
            let path = network.connect(js.peer, vec![at]).await.unwrap();
            assert_eq!(path.transport, transport);
            // js-libp2p has no lanes, so bulk uses the shared connection.
            echo(&network, js.peer, Class::Bulk).await;
        }
    }
}

#[tokio::test]
async fn js_is_reached_through_our_relay() {
    let mut relay = config(&["/ip4/127.0.0.1/tcp/0"]);
    relay.relay_server = RelayServer::Always;
    let relay = spawn(relay).await;
    let mut js = Js::start(&[]).await;
    let at = address(&relay, |_| true).await;
    let reserved = js.ask("reserve", json!({ "address": at })).await;
    let through: Multiaddr = reserved["addresses"][0].as_str().unwrap().parse().unwrap();
    let network = spawn(config(&[])).await;
    let through = split_peer_id(through).0;
    let path = network.connect(js.peer, vec![through]).await.unwrap();
    assert_eq!(path.relay(), Some(relay.local_peer()));
    assert_eq!(
        echo(&network, js.peer, Class::Bulk).await,
        PathKind::Relayed
    );
    // The Weft node may hold a reservation there as well.
    let used = relay.reachability().await.unwrap().relay_use;
    assert!(used.reservations >= 1, "{used:?}");
}

#[tokio::test]
async fn we_are_reached_through_a_js_relay() {
    let relay = Js::start(&["--listen", "/ip4/127.0.0.1/tcp/0", "--relay-server"]).await;
    let mut behind = config(&[]);
    behind.relays = vec![relay.addresses[0].clone()];
    let network = spawn(behind).await;
    let at = address(&network, |a| a.contains("p2p-circuit")).await;
    let mut js = Js::start(&[]).await;
    let dialed = js.ask("dial", json!({ "address": at })).await;
    assert_eq!(dialed["limited"], true, "{dialed}");
    let id = network.local_peer().to_string();
    js.ask("ping", json!({ "peer_id": id })).await;
    let back = json!({ "peer_id": id, "protocol": ECHO.as_ref(), "bytes": SIZE });
    assert_eq!(js.ask("echo", back).await["bytes"], SIZE);
}
