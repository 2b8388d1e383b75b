//! Strangers that hold all connections of a node, half-open or open, and an honest node that tries to connect
//! meanwhile.

use std::{
    io::{ErrorKind, Read},
    net::{SocketAddr, TcpStream},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use libp2p::swarm::dummy;
use patchbay::{Device, Lab};
use rustix::process::getppid;
use serde_json::Value;
use weft_net::{Config, Network, identity::Keypair, split_peer_id};

use super::{Host, LabError, forget_neighbours, wire};

/// Sockets that each stranger keeps open: the limit on connections from one address.
const SOCKETS: usize = 64;

/// Number of strangers' addresses.
const STRANGERS: usize = 2;

/// Open connections that the attacked node accepts from others.
const INCOMING: usize = 16;

/// Longest time until a connection to a killed node is given up.
const GONE: Duration = Duration::from_secs(120);

/// The result of an attack.
#[derive(Debug)]
pub struct Besieged {
    /// True if the honest node was among the attacked node's peers while a stranger's identities held all open
    /// connections.
    pub came_in: bool,
    /// Exit code and message of each attempt of the honest node, by the address that it dialed.
    pub attempts: Vec<(String, i32, String)>,
    /// Rows of the attacked node's limits: name, use, and number of refusals.
    pub limits: Vec<(String, u64, u64)>,
}

impl Besieged {
    /// Returns the use of a limit, and the number of refusals because of it.
    pub fn limit(&self, name: &str) -> (u64, u64) {
        let row = self.limits.iter().find(|(row, ..)| row == name);
        row.map_or((0, 0), |(_, used, refused)| (*used, *refused))
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The process may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lets strangers at two addresses hold sockets to a public node, while an honest node connects to it.
///
/// # Errors
/// [`LabError`] if the network or a node did not start.
pub async fn besiege() -> Result<Besieged, LabError> {
    let lab = Lab::new().await?;
    let public = |name: String| {
        let lab = &lab;
        async move {
            let router = lab.add_router(&format!("{name}net")).build().await?;
            let device = lab.add_device(&name).uplink(router.id()).build().await?;
            Ok::<Device, LabError>(device)
        }
    };
    let (server, honest) = (
        public("server".to_owned()).await?,
        public("honest".to_owned()).await?,
    );
    let mut strangers = Vec::new();
    for n in 0..STRANGERS {
        strangers.push(public(format!("stranger{n}")).await?);
    }
    forget_neighbours(&lab)?;
    let ip = server
        .ip()
        .ok_or_else(|| LabError("no address".to_owned()))?;
    let listen = [
        "/ip4/0.0.0.0/tcp/9338".to_owned(),
        "/ip4/0.0.0.0/udp/9338/quic-v1".to_owned(),
    ];
    let incoming = INCOMING.to_string();
    let mut arguments = vec!["--json", "up", "--no-mdns", "--max-incoming", &incoming];
    for address in &listen {
        arguments.extend_from_slice(&["--listen", address]);
    }
    let server = Host::start(server, &arguments)?;
    let to = SocketAddr::new(ip.into(), 9338).to_string();
    let mut sieges = Vec::new();
    for stranger in &strangers {
        sieges.push(siege(stranger, &[wire::SILENT.to_owned(), to.clone()])?);
    }
    let mut attempts = Vec::new();
    let mut host = Host::start(honest, &["--json", "up", "--no-mdns"])?;
    for transport in ["tcp/9338", "udp/9338/quic-v1", "tcp/9338/ws"] {
        let address = format!("/ip4/{ip}/{transport}/p2p/{}", server.peer_id());
        let output = host.home.run(&["connect", &address]);
        attempts.push((
            transport.to_owned(),
            output.status.code().unwrap_or(-1),
            output.stderr,
        ));
        host.kill();
        host.start_again()?;
    }
    let limits = server.home.json(&["limits"]);
    drop(sieges);
    // A connection of the honest node that was killed before it answered a ping occupies a connection for twenty
    // seconds.
    let begin = Instant::now();
    let incoming = || {
        let limits = rows(&server.home.json(&["limits"]));
        let row = limits
            .iter()
            .find(|(name, ..)| name == "connections_incoming");
        row.map_or(0, |(_, used, _)| *used)
    };
    while incoming() > 0 {
        if begin.elapsed() > GONE {
            return Err(LabError("a killed node is still connected".to_owned()));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let at = format!("/ip4/{ip}/tcp/9338/p2p/{}", server.peer_id());
    let _identities = siege(&strangers[0], &[wire::IDENTITIES.to_owned(), at.clone()])?;
    let output = host.home.run(&["connect", &at]);
    let code = output.status.code().unwrap_or(-1);
    attempts.push(("full".to_owned(), code, output.stderr));
    let peers = server.home.json(&["peers"]).to_string();
    let came_in = peers.contains(host.peer_id());
    Ok(Besieged {
        came_in,
        attempts,
        limits: rows(&limits),
    })
}

/// The rows of `weft limits`: name, use, and number of refusals.
fn rows(limits: &Value) -> Vec<(String, u64, u64)> {
    let rows = limits["limits"].as_array().or_else(|| limits.as_array());
    let number = |row: &Value, name: &str| row[name].as_u64().unwrap_or_default();
    let rows = rows.into_iter().flatten().map(|row| {
        let name = row["name"].as_str().unwrap_or_default().to_owned();
        (name, number(row, "used"), number(row, "refused"))
    });
    rows.collect()
}

/// Starts a stranger, and waits until it holds as many sockets as it can get.
fn siege(stranger: &Device, arguments: &[String]) -> Result<Running, LabError> {
    let mut command = wire::this_program(arguments)?;
    command.stdout(Stdio::piped());
    let mut siege = Running(stranger.spawn_command_sync(command)?);
    let output = siege.0.stdout.as_mut();
    let output = output.ok_or_else(|| LabError("no output".to_owned()))?;
    let mut word = [0];
    output.read_exact(&mut word).map_err(anyhow::Error::from)?;
    Ok(siege)
}

/// A stranger with as many identities as the attacked node accepts connections.
pub(super) fn run_identities(arguments: &[String]) -> anyhow::Result<()> {
    let [to] = arguments else {
        anyhow::bail!("one argument: an address");
    };
    let (address, peer) = split_peer_id(to.parse()?);
    let peer = peer.context("an address with a peer")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut all = Vec::new();
        for _ in 0..INCOMING {
            let mut config = Config::new(Keypair::generate_ed25519());
            config.mdns = false;
            config.port_mapping = false;
            config.listen = Some(Vec::new());
            let network = Network::spawn(config, dummy::Behaviour).await?;
            // Handshakes of the silent sockets may still be open, and so may connections of the killed honest node. On
            // a busy machine both take longer than their timeouts.
            let begin = Instant::now();
            while let Err(error) = network.connect(peer, vec![address.clone()]).await {
                anyhow::ensure!(begin.elapsed() < Duration::from_secs(60), "{error}");
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
            all.push(network);
        }
        wire::say("ready");
        let parent = getppid();
        while getppid() == parent {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    })
}

/// A stranger in its own namespace: it holds sockets open, and replaces those that are closed.
pub(super) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let [to] = arguments else {
        anyhow::bail!("one argument: an address");
    };
    let to: SocketAddr = to.parse()?;
    let parent = getppid();
    let mut sockets: Vec<TcpStream> = Vec::new();
    let mut told = false;
    while getppid() == parent {
        sockets.retain_mut(|socket| {
            let mut byte = [0];
            match socket.read(&mut byte) {
                Ok(n) => n > 0,
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
        while sockets.len() < SOCKETS {
            let Ok(socket) = TcpStream::connect_timeout(&to, Duration::from_secs(1)) else {
                break;
            };
            socket.set_nonblocking(true)?;
            sockets.push(socket);
        }
        if !told {
            told = true;
            wire::say("ready");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
