//! A stranger that makes other nodes dial. In every message that carries addresses, it lists addresses of a third
//! party, of the nodes' own machines, and of their networks. The packets that the nodes then send are counted at their
//! source and at their destination.

use std::{
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use futures::StreamExt;
use libp2p::{Swarm, SwarmBuilder, identify, kad, swarm::SwarmEvent};
use patchbay::{Device, Lab, Nat};
use prost::Message;
use serde_json::Value;
use tokio::{
    io::AsyncWriteExt,
    time::{Instant, sleep, sleep_until, timeout},
};
use weft_dht::Dht;
use weft_net::{
    Class, Config, Multiaddr, Network, PeerId, RelayServer, Stream, StreamProtocol,
    identity::Keypair, multiaddr::Protocol, split_peer_id,
};
use weft_proto::{
    frame,
    wire::{
        AutonatDataResponse, AutonatDialRequest, AutonatMessage, CircuitReservation, CircuitStatus,
        HopMessage, LaneCall, PeerClaim, ProviderClaim, PunchAnswer, PunchGo, PunchOffer,
        ServiceClaim, SwarmMessage, SwarmPeer, UdpMapping, autonat_message::Msg,
        hop_message::Type as Hop,
    },
};

use super::{Host, LabError, forget_neighbours, shield, wire};

/// Ports that the stranger makes others dial. No other node uses them.
const PORTS: (u16, u16) = (4100, 4199);

/// Number of the stranger's identities.
const IDENTITIES: u8 = 8;

/// The model and service that the stranger claims to have.
const MODEL: [u8; 32] = [7; 32];
const NAME: &str = "a.service";

/// The counted packets.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sent {
    /// Packets that left for the node's own machine.
    pub loopback: u64,
    /// Packets that left for private or link-local addresses.
    pub private: u64,
    /// Packets of dials that arrived at the third party.
    pub third_party: u64,
    /// Packets of port searches that arrived at the third party.
    pub searches: u64,
}

/// The result of an attack.
#[derive(Debug)]
pub struct Attacked {
    /// Packets of the node with a public address.
    pub public: Sent,
    /// Packets of the node behind a home router.
    pub home: Sent,
    /// Duration of the attack.
    pub took: Duration,
    /// Private addresses that the node behind the home router has told the stranger.
    pub told: Vec<String>,
    /// The stranger's own report of what it did.
    pub done: String,
}

/// Lets a stranger attack a node with a public address and one behind a home router, for this many seconds.
///
/// # Errors
/// [`LabError`] if the network or a node did not start.
pub async fn attack(seconds: u64) -> Result<Attacked, LabError> {
    let lab = Lab::new().await?;
    let public = |name: &'static str| {
        let lab = &lab;
        async move {
            let router = lab.add_router(&format!("{name}net")).build().await?;
            let device = lab.add_device(name).uplink(router.id()).build().await?;
            Ok::<Device, LabError>(device)
        }
    };
    let (server, bystander, stranger) = (
        public("server").await?,
        public("bystander").await?,
        public("stranger").await?,
    );
    let nat = lab.add_router("homenat").nat(Nat::Moderate).build().await?;
    shield(&nat)?;
    let home = lab.add_device("home").uplink(nat.id()).build().await?;
    let printer = lab.add_device("printer").uplink(nat.id()).build().await?;
    forget_neighbours(&lab)?;
    let ip = |device: &Device| device.ip().ok_or_else(|| LabError("no address".to_owned()));
    let seen = [
        ip(&server)?,
        nat.uplink_ip()
            .ok_or_else(|| LabError("no address".to_owned()))?,
    ];
    let ips = [ip(&bystander)?, ip(&printer)?, ip(&home)?];
    for device in [&server, &home] {
        on(device, OUT)?;
    }
    let arrives: String = ["server", "home"]
        .iter()
        .zip(seen)
        .map(|(name, from)| {
            format!(
                "ip saddr {from} udp length 25 counter name {name}_searches drop; \
                 ip saddr {from} th dport {}-{} counter name {name} drop; ",
                PORTS.0, PORTS.1
            )
        })
        .collect();
    on(
        &bystander,
        &format!(
            "table inet watch {{ counter server {{}}; counter home {{}}; counter server_searches {{}}; \
             counter home_searches {{}}; chain input {{ type filter hook input priority 0; {arrives} }}; }}"
        ),
    )?;
    let listen = ["/ip4/0.0.0.0/tcp/443", "/ip4/0.0.0.0/udp/443/quic-v1"];
    let mut arguments = vec!["--json", "relay"];
    for address in &listen {
        arguments.extend_from_slice(&["--listen", *address]);
    }
    let server_device = server;
    let server = Host::start(server_device, &arguments)?;
    let home_device = home;
    let home = Host::join(home_device, &server.addresses())?;
    home.wait_until_reachable(1)?;
    let relayed = home.addresses();
    let relayed = relayed
        .iter()
        .find(|address| address.contains("/p2p-circuit") && address.contains("/tcp/"));
    let relayed = relayed.ok_or_else(|| LabError("the node at home has no relay".to_owned()))?;
    let at = server.addresses();
    let at = at.iter().find(|address| address.contains("/tcp/"));
    let at = at.ok_or_else(|| LabError("the server has no address".to_owned()))?;
    let begin = Instant::now();
    let mut arguments = vec![wire::UNVERIFIED.to_owned(), at.clone(), relayed.clone()];
    arguments.extend(ips.iter().map(ToString::to_string));
    arguments.push(seen[1].to_string());
    arguments.push(ip(&stranger)?.to_string());
    arguments.push(seconds.to_string());
    let document = home.home.json(&["doc", "create"]);
    let document = document["id"].as_str().unwrap_or_default().to_owned();
    arguments.push(document.clone());
    let mut command = wire::this_program(&arguments)?;
    command.stdout(Stdio::piped());
    let attack = stranger.spawn_command_sync(command)?;
    // Commands that users run meanwhile.
    let model = blake3_hex();
    let end = begin + Duration::from_secs(seconds);
    while Instant::now() + Duration::from_secs(6) < end {
        let mut running = Vec::new();
        for host in [&home, &server] {
            let commands: [&[&str]; 5] = [
                &["get", &model, "--to", "/nonexistent"],
                &["providers", &model],
                &["call", NAME, "a.service/Method", "--timeout", "2"],
                &["topic", "publish", NAME, "hello"],
                &["doc", "open", &document, "--wait", "1s"],
            ];
            for command in commands {
                // None of these commands has to succeed, and none does.
                running.push(host.home.start(command));
            }
        }
        sleep(Duration::from_secs(5)).await;
    }
    let output = attack.wait_with_output().map_err(anyhow::Error::from)?;
    let took = begin.elapsed();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (told, done): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with("told "));
    let there = counters(&bystander)?;
    let sent = |host: &Host, name: &str| -> Result<Sent, LabError> {
        let here = counters(&host.device)?;
        let count = |all: &[(String, u64)], name: &str| {
            all.iter()
                .find(|(one, _)| one == name)
                .map_or(0, |(_, n)| *n)
        };
        Ok(Sent {
            loopback: count(&here, "loopback"),
            private: count(&here, "private"),
            third_party: count(&there, name),
            searches: count(&there, &format!("{name}_searches")),
        })
    };
    Ok(Attacked {
        public: sent(&server, "server")?,
        home: sent(&home, "home")?,
        took,
        told: told.into_iter().map(str::to_owned).collect(),
        done: done.join("\n"),
    })
}

/// Counts packets that leave for destinations that no node has a reason to reach.
const OUT: &str = "table inet watch { counter loopback {}; counter private {}; \
    chain output { type filter hook output priority 0; \
    ip daddr 127.0.0.0/8 th dport 4100-4199 counter name loopback; \
    ip6 daddr ::1 th dport 4100-4199 counter name loopback; \
    ip daddr { 10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 169.254.0.0/16, 100.64.0.0/10 } \
    th dport 4100-4199 counter name private; \
    ip6 daddr { fe80::/10, fc00::/7 } th dport 4100-4199 counter name private; }; }";

fn on(device: &Device, rules: &str) -> Result<(), LabError> {
    let mut command = Command::new("nft");
    command.arg(rules);
    super::succeeded(device.spawn_command_sync(command)?)
}

fn counters(device: &Device) -> Result<Vec<(String, u64)>, LabError> {
    let mut command = Command::new("nft");
    command
        .args(["-j", "list", "counters"])
        .stdout(Stdio::piped());
    let child: Child = device.spawn_command_sync(command)?;
    let output = child.wait_with_output().map_err(anyhow::Error::from)?;
    let value: Value = serde_json::from_slice(&output.stdout).map_err(anyhow::Error::from)?;
    let all = value["nftables"].as_array().into_iter().flatten();
    let all = all.filter_map(|one| {
        let counter = &one["counter"];
        let name = counter["name"].as_str()?.to_owned();
        Some((name, counter["packets"].as_u64()?))
    });
    Ok(all.collect())
}

fn blake3_hex() -> String {
    weft::Hash::from_slice(&MODEL).map_or_else(String::new, |hash| hash.to_string())
}

/// The stranger, in its own namespace.
pub(super) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let [
        server,
        home,
        bystander,
        printer,
        private,
        nat,
        own,
        seconds,
        document,
    ] = arguments
    else {
        anyhow::bail!("nine arguments");
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let stranger = Stranger {
        server: server.parse()?,
        home: home.parse()?,
        bystander: bystander.parse()?,
        printer: printer.parse()?,
        private: private.parse()?,
        nat: nat.parse()?,
        own: own.parse()?,
        document: document.clone(),
        end: Instant::now() + Duration::from_secs(seconds.parse()?),
    };
    runtime.block_on(stranger.attack())
}

#[derive(Debug, Clone)]
struct Stranger {
    server: Multiaddr,
    home: Multiaddr,
    bystander: Ipv4Addr,
    printer: Ipv4Addr,
    private: Ipv4Addr,
    nat: Ipv4Addr,
    own: Ipv4Addr,
    document: String,
    end: Instant,
}

impl Stranger {
    /// Returns the addresses that others are to send to. They differ for each `n`.
    fn evil(&self, n: usize) -> Vec<Multiaddr> {
        let port = |step: usize| usize::from(PORTS.0) + (n * 5 + step) % 100;
        let relay = PeerId::random();
        let (bystander, printer, private) = (self.bystander, self.printer, self.private);
        let all = [
            format!("/ip4/{bystander}/tcp/{}", port(0)),
            format!("/ip4/{bystander}/udp/{}/quic-v1", port(1)),
            format!("/ip4/{bystander}/tcp/{}/ws", port(2)),
            format!("/ip4/{bystander}/udp/{}/quic-v1", port(3)),
            format!("/ip4/127.0.0.1/tcp/{}", port(0)),
            format!("/ip4/127.0.0.1/udp/{}/quic-v1", port(1)),
            format!("/ip4/{printer}/tcp/{}", port(2)),
            format!("/ip4/{printer}/udp/{}/quic-v1", port(3)),
            format!("/dns4/localhost/tcp/{}/ws", port(4)),
            format!("/dns4/localhost/tcp/{}", port(0)),
            format!("/ip4/{private}/tcp/{}", port(1)),
            format!("/ip4/169.254.169.254/tcp/{}/ws", port(2)),
            format!("/ip4/127.0.0.1/tcp/{}/tls/sni/intranet.corp/ws", port(3)),
            format!("/ip6/::1/tcp/{}", port(4)),
            format!("/ip4/127.0.0.1/tcp/{}/p2p/{relay}/p2p-circuit", port(0)),
            format!("/ip4/{bystander}/tcp/{}/p2p/{relay}/p2p-circuit", port(1)),
        ];
        all.iter().filter_map(|text| text.parse().ok()).collect()
    }

    fn bytes(&self, n: usize) -> Vec<Bytes> {
        let evil = self.evil(n);
        evil.iter().map(|address| address.to_vec().into()).collect()
    }

    async fn attack(self) -> anyhow::Result<()> {
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..IDENTITIES {
            tasks.spawn(self.clone().peer(n));
        }
        tasks.spawn(self.clone().routes());
        while let Some(one) = tasks.join_next().await {
            match one? {
                Ok(done) => println!("{done}"),
                Err(error) => println!("failed: {error:#}"),
            }
        }
        Ok(())
    }

    /// Attacks with one identity: by records, identify, swarm messages and relay reservations; then by hole punching,
    /// AutoNAT and lanes.
    async fn peer(self, n: u8) -> anyhow::Result<String> {
        let key = Keypair::generate_ed25519();
        let own = key.public().to_peer_id();
        let mut config = Config::new(key.clone());
        config.mdns = false;
        config.port_mapping = false;
        config.hole_punching = false;
        config.relay_server = RelayServer::Never;
        config.bootstrap = vec![self.server.clone()];
        let port = 9400 + u16::from(n);
        config.listen = Some(vec![format!("/ip4/0.0.0.0/tcp/{port}").parse()?]);
        // Told by identify.
        config.external = self.evil(usize::from(n));
        let (dht, behaviour) = Dht::new(&key);
        let network = Network::spawn(config, behaviour).await?;
        self.answer(&network)?;
        dht.nodes().wait_for(|nodes| *nodes > 0).await?;
        let mut states = 0;
        let mut round = usize::from(n);
        let mut counts = [0; 3];
        while Instant::now() < self.end {
            let mut addresses = self.bytes(round);
            if n < 2 {
                // These records lead to the stranger, so that peers connect to it.
                let real: Multiaddr = format!("/ip4/{}/tcp/{port}", self.own).parse()?;
                addresses[0] = real.to_vec().into();
            }
            let claim = PeerClaim {
                addresses: addresses.clone(),
            };
            let peer = claim.encode_to_vec();
            let labels = Vec::new();
            let service = ServiceClaim {
                addresses: addresses.clone(),
                labels,
            };
            let provider = ProviderClaim {
                addresses,
                shards: 0,
            };
            let derived = |context: &str| {
                let mut hasher = blake3::Hasher::new_derive_key(context);
                hasher.update(NAME.as_bytes());
                hasher.finalize()
            };
            let mut all = vec![
                (format!("peer/{own}"), peer.clone()),
                (format!("document/{}", self.document), peer.clone()),
                (
                    format!("provider/{}", blake3_hex()),
                    provider.encode_to_vec(),
                ),
                (format!("topic/{}", derived("weft topic v1")), peer.clone()),
                (
                    format!("service/{}", derived("weft service v1")),
                    service.encode_to_vec(),
                ),
            ];
            all.extend((0..16).map(|shard| (format!("relay/{shard}"), peer.clone())));
            for (key, value) in all {
                let ttl = Duration::from_secs(600);
                let stated = dht.publish(key.as_bytes(), &[], &value, ttl).await;
                states += usize::from(stated.is_ok());
            }
            let asked = timeout(Duration::from_secs(10), async {
                [
                    self.punch(&network, round).await,
                    self.autonat(&network, round).await,
                    self.lane(&network).await,
                ]
            });
            if let Ok(all) = asked.await {
                for (count, one) in counts.iter_mut().zip(all) {
                    *count += usize::from(one.is_ok());
                }
            }
            round += usize::from(IDENTITIES);
            sleep(Duration::from_millis(500)).await;
        }
        network.stop().await;
        Ok(format!(
            "{own}: {states} records, {} punches, {} probes, {} lanes",
            counts[0], counts[1], counts[2]
        ))
    }

    /// Answers the requests of the other side: swarm messages and reservations.
    fn answer(&self, network: &Network) -> anyhow::Result<()> {
        let mut swarm = network.accept(StreamProtocol::new("/weft/swarm/1"))?;
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(mut stream) = swarm.next().await {
                let this = this.clone();
                tokio::spawn(async move {
                    for round in 0..30 {
                        let peers = (0..32).map(|n| SwarmPeer {
                            peer: PeerId::random().to_bytes().into(),
                            addresses: this.bytes(32 * round + n),
                        });
                        let message = SwarmMessage {
                            manifest: MODEL.to_vec().into(),
                            peers: peers.collect(),
                            ..SwarmMessage::default()
                        };
                        frame::write(&mut stream, &message, 1 << 20).await?;
                        stream.flush().await?;
                        sleep(Duration::from_secs(1)).await;
                    }
                    Ok::<(), anyhow::Error>(())
                });
            }
        });
        let hop = StreamProtocol::new("/libp2p/circuit/relay/0.2.0/hop");
        let mut hops = network.accept(hop)?;
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(mut stream) = hops.next().await {
                let request = frame::read::<HopMessage, _>(&mut stream, 4096).await;
                let expire = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                let grant = HopMessage {
                    r#type: Some(Hop::Status.into()),
                    status: Some(CircuitStatus::Ok.into()),
                    reservation: Some(CircuitReservation {
                        expire: expire.ok().map(|now| now.as_secs() + 600),
                        addrs: this.bytes(3),
                        voucher: None,
                    }),
                    ..HopMessage::default()
                };
                if request.is_ok() {
                    // The other side may ignore the grant.
                    let _ = frame::write(&mut stream, &grant, 4096).await;
                    let _ = stream.flush().await;
                }
            }
        });
        Ok(())
    }

    async fn open(
        network: &Network,
        to: &Multiaddr,
        protocol: &'static str,
    ) -> anyhow::Result<Stream> {
        let (address, peer) = split_peer_id(to.clone());
        let peer = peer.context("no peer")?;
        network.connect(peer, vec![address]).await?;
        let protocol = StreamProtocol::new(protocol);
        Ok(network.open(peer, protocol, Class::Control).await?)
    }

    /// Claims to be where the node behind the home router is seen, and lets it search a port of a third party.
    async fn punch(&self, network: &Network, round: usize) -> anyhow::Result<()> {
        let mut stream = Self::open(network, &self.home, "/weft/punch/1").await?;
        let claimed: Multiaddr = format!("/ip4/{}/tcp/1", self.nat).parse()?;
        let mut addresses = self.bytes(round);
        addresses[0] = claimed.to_vec().into();
        let offer = PunchOffer {
            addresses,
            udp_mapping: UdpMapping::EndpointDependent.into(),
            token: Bytes::from_static(&[9; 16]),
        };
        frame::write(&mut stream, &offer, 4096).await?;
        stream.flush().await?;
        let answer: PunchAnswer = frame::read(&mut stream, 4096).await?.context("no answer")?;
        for address in &answer.addresses {
            let address = Multiaddr::try_from(address.to_vec())?;
            if let Some(Protocol::Ip4(ip)) = address.iter().next()
                && (ip.is_private() || ip.is_loopback())
            {
                println!("told {address}");
            }
        }
        let go = PunchGo {
            addresses: self.bytes(round + 1),
        };
        frame::write(&mut stream, &go, 4096).await?;
        stream.flush().await?;
        Ok(())
    }

    async fn autonat(&self, network: &Network, round: usize) -> anyhow::Result<()> {
        let mut stream =
            Self::open(network, &self.server, "/libp2p/autonat/2/dial-request").await?;
        let say = |msg| AutonatMessage { msg: Some(msg) };
        let request = AutonatDialRequest {
            addrs: self.bytes(round),
            nonce: round as u64,
        };
        frame::write(&mut stream, &say(Msg::DialRequest(request)), 1 << 16).await?;
        stream.flush().await?;
        let asked: AutonatMessage = frame::read(&mut stream, 1 << 16)
            .await?
            .context("no answer")?;
        let Some(Msg::DataRequest(wanted)) = asked.msg else {
            anyhow::bail!("no probe: {asked:?}");
        };
        for _ in 0..wanted.num_bytes.div_ceil(4096) {
            let data = Bytes::from(vec![0; 4096]);
            let data = AutonatDataResponse { data };
            frame::write(&mut stream, &say(Msg::DataResponse(data)), 1 << 16).await?;
        }
        stream.flush().await?;
        Ok(())
    }

    async fn lane(&self, network: &Network) -> anyhow::Result<()> {
        let mut stream = Self::open(network, &self.server, "/weft/lane-call/1").await?;
        let call = LaneCall {
            token: Bytes::from_static(&[5; 16]),
        };
        frame::write(&mut stream, &call, 64).await?;
        stream.flush().await?;
        Ok(())
    }

    /// libp2p's own identify and Kademlia, which pass on any address: also private ones, of this peer and of others.
    async fn routes(self) -> anyhow::Result<String> {
        #[derive(libp2p::swarm::NetworkBehaviour)]
        struct Both {
            identify: identify::Behaviour,
            kad: kad::Behaviour<kad::store::MemoryStore>,
        }
        let mut swarm: Swarm<Both> = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(
                libp2p::tcp::Config::default(),
                libp2p::noise::Config::new,
                libp2p::yamux::Config::default,
            )?
            .with_behaviour(|key| {
                let own = key.public().to_peer_id();
                let protocol = StreamProtocol::new("/weft/kad/1");
                let mut kad = kad::Behaviour::with_config(
                    own,
                    kad::store::MemoryStore::new(own),
                    kad::Config::new(protocol),
                );
                kad.set_mode(Some(kad::Mode::Server));
                let config = identify::Config::new("/weft/1".to_owned(), key.public());
                Both {
                    identify: identify::Behaviour::new(config),
                    kad,
                }
            })?
            .with_swarm_config(|config| {
                config.with_idle_connection_timeout(Duration::from_secs(600))
            })
            .build();
        let real: Multiaddr = format!("/ip4/{}/tcp/9450", self.own).parse()?;
        swarm.listen_on("/ip4/0.0.0.0/tcp/9450".parse()?)?;
        swarm.add_external_address(real);
        for address in self.evil(1) {
            swarm.add_external_address(address);
        }
        for n in 0..60 {
            for address in self.evil(n) {
                let peer = PeerId::random();
                swarm.behaviour_mut().kad.add_address(&peer, address);
            }
        }

        swarm.dial(self.server.clone())?;
        let mut events = 0;
        let end = sleep_until(self.end);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => break,
                event = swarm.select_next_some() => {
                    if matches!(event, SwarmEvent::Behaviour(_)) {
                        events += 1;
                    }
                }
            }
        }
        Ok(format!("Kademlia and identify: {events} events"))
    }
}
