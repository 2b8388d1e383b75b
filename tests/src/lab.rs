//! Networks with NATs and firewalls, made of network namespaces, with real nodes in them.
//!
//! A cell is a pair of sides and two public relays that both know. All networks are IPv4, except for [`Side::Ipv6`]. As
//! home routers do, a router does not answer unsolicited packets from outside.
//!
//! The NATs are `patchbay`'s. Its full-cone and address-restricted NATs have these properties for UDP only.

use std::{
    fmt,
    fs::File,
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::Signal;

use patchbay::{
    Device, IpSupport, Lab, Nat, NatConfig, NatFiltering, NatMapping, NodeId, Router, RouterBuilder,
};
use serde_json::Value;

use crate::{Daemon, Home};

mod conditions;
mod flood;
mod gateway;
mod siege;
mod unverified;
mod wire;

use gateway::Gateway;
pub use siege::{Besieged, besiege};
pub use unverified::{Attacked, Sent, attack};
use wire::Part;
pub use wire::{Distance, Measured, be_a_part};

/// Number of relays that both nodes know. A node needs the observations of two to tell the kind of its NAT.
const RELAYS: usize = 2;

/// The network before one end of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// No NAT: a public address.
    Public,
    /// A home router: endpoint-independent mapping, address- and port-dependent filtering.
    Home,
    /// A NAT that accepts packets from any address, once the port has sent any.
    FullCone,
    /// A NAT that accepts packets from the addresses that the port has sent to.
    AddressRestricted,
    /// A NAT that uses another port for every destination.
    Symmetric,
    /// A home router behind a carrier's NAT with endpoint-independent mapping.
    Cgnat,
    /// A home router behind a carrier's symmetric NAT.
    CgnatSymmetric,
    /// A home router that lets no UDP out.
    UdpBlocked,
    /// A home router that lets out only TCP to port 443.
    Only443,
    /// A home router that forwards ports on request (PCP, NAT-PMP, UPnP).
    PortMapping,
    /// IPv6 only, with a firewall that accepts only solicited packets.
    Ipv6,
}

impl Side {
    /// All sides.
    pub const ALL: [Self; 11] = [
        Self::Public,
        Self::Home,
        Self::FullCone,
        Self::AddressRestricted,
        Self::Symmetric,
        Self::Cgnat,
        Self::CgnatSymmetric,
        Self::UdpBlocked,
        Self::Only443,
        Self::PortMapping,
        Self::Ipv6,
    ];

    /// Returns true if the NAT of this side uses another port for every peer.
    pub fn is_symmetric(self) -> bool {
        matches!(self, Self::Symmetric | Self::CgnatSymmetric)
    }

    fn has_udp(self) -> bool {
        !matches!(self, Self::UdpBlocked | Self::Only443)
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Public => "public",
            Self::Home => "home",
            Self::FullCone => "full_cone",
            Self::AddressRestricted => "address_restricted",
            Self::Symmetric => "symmetric",
            Self::Cgnat => "cgnat",
            Self::CgnatSymmetric => "cgnat_symmetric",
            Self::UdpBlocked => "udp_blocked",
            Self::Only443 => "only_443",
            Self::PortMapping => "port_mapping",
            Self::Ipv6 => "ipv6",
        })
    }
}

/// Returns true if a direct path between two sides can exist.
pub fn is_possible(one: Side, other: Side) -> bool {
    let pair = [one, other];
    if pair.contains(&Side::Ipv6) {
        return one == other;
    }
    if pair.contains(&Side::Only443) {
        // Only port 443 can be reached from there, and none of the sides listens on it.
        return false;
    }
    if !one.has_udp() || !other.has_udp() {
        // On TCP, every mapping here except the symmetric ones can be punched.
        let reachable = pair.contains(&Side::Public) || pair.contains(&Side::PortMapping);
        return reachable || !pair.iter().any(|side| side.is_symmetric());
    }
    !(one.is_symmetric() && other.is_symmetric())
}

/// The result of connecting the two nodes of a cell.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Time from the request to the first path.
    pub connected: Duration,
    /// Time from the request to a path that is not relayed, if there was one in time.
    pub direct: Option<Duration>,
    /// The kind of the path at the end: `direct`, `lan` or `relayed`.
    pub path: String,
    /// The transport of that path: `tcp` or `quic`.
    pub transport: String,
}

/// The reason why a cell could not be tried, as a text.
#[derive(Debug)]
pub struct LabError(String);

impl fmt::Display for LabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<anyhow::Error> for LabError {
    fn from(error: anyhow::Error) -> Self {
        Self(format!("the network cannot be made: {error:#}"))
    }
}

/// Enters a user namespace in which networks can be made.
///
/// # Errors
/// If the kernel does not allow it. Must be called before the process has a second thread.
pub fn prepare() -> Result<(), LabError> {
    patchbay::init_userns()?;
    Ok(())
}

/// Two machines with nodes, and the public relays that both know.
pub struct Cell {
    lab: Lab,
    /// The routers that forward ports.
    gateways: Vec<Gateway>,
    /// The processes that delay and drop packets between the networks.
    _distance: Vec<Part>,
    relays: Vec<Host>,
    /// The machine that dials first.
    pub one: Host,
    /// The machine that holds reservations on relays.
    pub other: Host,
}

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cell")
            .field("lab", &self.lab.prefix())
            .finish_non_exhaustive()
    }
}

/// Lets `one` connect to `other` over this distance, and waits at most `wait` for a direct path.
///
/// # Errors
/// [`LabError`] if the network or a node did not start, or no path was found.
pub async fn try_cell(
    one: Side,
    other: Side,
    distance: Distance,
    wait: Duration,
) -> Result<Outcome, LabError> {
    let cell = Cell::new(one, other, distance, RELAYS).await?;
    cell.connect(wait)
}

/// Connects two machines behind one home router, as [`try_cell`] does. With `hairpin`, the router lets them reach each
/// other at its own public address.
///
/// # Errors
/// As for [`try_cell`].
pub async fn try_neighbours(hairpin: bool, wait: Duration) -> Result<Outcome, LabError> {
    let lab = Lab::new().await?;
    let nat = NatConfig::builder()
        .mapping(NatMapping::EndpointIndependent)
        .filtering(NatFiltering::AddressAndPortDependent)
        .hairpin(hairpin)
        .build()
        .map_err(anyhow::Error::from)?;
    let router = lab.add_router("nat").nat(nat).build().await?;
    shield(&router)?;
    let device = |name| lab.add_device(name).uplink(router.id()).build();
    let devices = [device("one").await?, device("other").await?];
    let cell = Cell::start(lab, devices, Distance::default(), &[&[][..]; RELAYS]).await?;
    cell.connect(wait)
}

impl Cell {
    /// Creates two machines behind these sides, and this many relays, at this distance from each other.
    ///
    /// # Errors
    /// [`LabError`] if the network or a node did not start.
    pub async fn new(
        one: Side,
        other: Side,
        distance: Distance,
        relays: usize,
    ) -> Result<Self, LabError> {
        Self::with_relays(one, other, distance, &vec![&[][..]; relays]).await
    }

    /// Creates a cell as [`new`](Self::new) does, with additional arguments for each of the relays.
    ///
    /// # Errors
    /// [`LabError`] if the network or a node did not start.
    pub async fn with_relays(
        one: Side,
        other: Side,
        distance: Distance,
        relays: &[&[&str]],
    ) -> Result<Self, LabError> {
        let lab = Lab::new().await?;
        let (one, gateway) = behind(&lab, "one", one, "11.0.0.0/24").await?;
        let mut gateways = Vec::from_iter(gateway);
        let (other, gateway) = behind(&lab, "other", other, "11.0.1.0/24").await?;
        gateways.extend(gateway);
        let mut cell = Self::start(lab, [one, other], distance, relays).await?;
        cell.gateways = gateways;
        Ok(cell)
    }

    async fn start(
        lab: Lab,
        devices: [Device; 2],
        distance: Distance,
        relays: &[&[&str]],
    ) -> Result<Self, LabError> {
        let mut servers = Vec::new();
        for n in 0..relays.len() {
            let internet = lab.add_router(&format!("internet{n}"));
            let internet = internet.ip_support(IpSupport::DualStack).build().await?;
            let server = lab.add_device(&format!("relay{n}"));
            servers.push(server.uplink(internet.id()).build().await?);
        }
        forget_neighbours(&lab)?;
        let apart = wire::set(&lab, distance)?;
        let listen = [
            "/ip4/0.0.0.0/tcp/443",
            "/ip4/0.0.0.0/udp/443/quic-v1",
            "/ip6/::/tcp/443",
            "/ip6/::/udp/443/quic-v1",
        ];
        let mut arguments = vec!["--json", "relay"];
        for address in listen {
            arguments.extend_from_slice(&["--listen", address]);
        }
        let relays = servers
            .into_iter()
            .zip(relays)
            .map(|(server, more)| Host::start(server, &[&arguments[..], more].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let addresses: Vec<String> = relays.iter().flat_map(Host::addresses).collect();
        let [one, other] = devices;
        let one = Host::join(one, &addresses)?;
        let other = Host::join(other, &addresses)?;
        other.wait_until_reachable(relays.len().min(2))?;
        Ok(Self {
            lab,
            gateways: Vec::new(),
            _distance: apart,
            relays,
            one,
            other,
        })
    }

    /// Lets the first machine connect to the second, and waits at most `wait` for a direct path.
    ///
    /// # Errors
    /// [`LabError`] if no path was found.
    pub fn connect(&self, wait: Duration) -> Result<Outcome, LabError> {
        let addresses = self.other.addresses();
        let seconds = wait.as_secs_f64().to_string();
        let mut arguments = vec!["--json", "connect", "--wait-direct", &seconds];
        arguments.extend(addresses.iter().map(String::as_str));
        let finished = self.one.home.run(&arguments);
        // If the path is still relayed after the wait, the command prints the path and then fails.
        let value = finished
            .stdout
            .lines()
            .next()
            .and_then(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|value| value["path"].is_string());
        let Some(value) = value else {
            return Err(LabError(format!("no path: {finished:?}{}", self.logs())));
        };
        let millis = |name: &str| value[name].as_u64().map(Duration::from_millis);
        let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        let outcome = Outcome {
            connected: millis("connected_millis").unwrap_or_default(),
            direct: millis("direct_millis"),
            path: text("path"),
            transport: text("transport"),
        };
        if std::env::var_os("WEFT_LAB_LOG").is_some() {
            eprintln!("{outcome:?}{}", self.logs());
        }
        Ok(outcome)
    }

    /// Lets the second machine connect to the first at the same time as the first to the second.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect).
    pub fn connect_both(&self, wait: Duration) -> Result<Outcome, LabError> {
        self.one.wait_until_reachable(self.relays.len().min(2))?;
        let addresses = self.one.addresses();
        let mut arguments = vec!["connect"];
        arguments.extend(addresses.iter().map(String::as_str));
        let other = self.other.home.start(&arguments);
        let outcome = self.connect(wait);
        let finished = other.finish();
        if !finished.status.success() {
            return Err(LabError(format!("no path back: {finished:?}")));
        }
        outcome
    }

    /// Measures the path from the first machine, which must have IPv4 and UDP, to the first relay.
    ///
    /// # Errors
    /// [`LabError`] if no packet returns.
    pub fn measure(&self) -> Result<Measured, LabError> {
        wire::between(&self.one.device, &self.relays[0].device)
    }

    /// Returns the relay with this id.
    pub fn relay(&mut self, peer: &str) -> Option<&mut Host> {
        self.relays.iter_mut().find(|relay| relay.peer_id() == peer)
    }

    /// Returns all relays.
    pub fn relays(&mut self) -> &mut [Host] {
        &mut self.relays
    }

    /// Clears all mappings of the NAT before one of the machines, `one` or `other`, and maps every port to this port
    /// from now on.
    ///
    /// # Errors
    /// [`LabError`] if there is no such NAT, or `conntrack` fails.
    pub async fn rebind(&self, whose: &str, port: u16) -> Result<(), LabError> {
        let name = format!("{whose}nat");
        let router = self.lab.router_by_name(&name);
        let router = router.ok_or_else(|| LabError(format!("no NAT called {name}")))?;
        let ip = router.uplink_ip();
        let ip = ip.ok_or_else(|| LabError(format!("{name} has no address")))?;
        for protocol in ["udp", "tcp"] {
            nft(
                &router,
                &format!(
                    "insert rule ip nat postrouting oifname \"ix\" meta l4proto {protocol} \
                     snat to {ip}:{port}"
                ),
            )?;
        }
        router.flush_nat_state().await?;
        Ok(())
    }

    /// Limits the router before `one` or `other` to this many megabytes a second. Packets over the limit are dropped.
    ///
    /// # Errors
    /// [`LabError`] if there is no such router, or `nft` fails.
    pub fn slow_down(&self, whose: &str, megabytes: u32) -> Result<(), LabError> {
        let mut routers = ["nat", "net"].into_iter();
        let router = routers.find_map(|kind| self.lab.router_by_name(&format!("{whose}{kind}")));
        let router = router.ok_or_else(|| LabError(format!("no router before {whose}")))?;
        nft(
            &router,
            &format!(
                "table inet slow {{ chain forward {{ type filter hook forward priority -5; \
                 limit rate over {megabytes} mbytes/second burst 2 mbytes drop; }}; }}"
            ),
        )
    }

    /// Moves a machine to a network of its own behind another home router. Its own address and the address that others
    /// see change.
    ///
    /// # Errors
    /// [`LabError`] if the network cannot be made.
    pub async fn move_away(&self, host: &Host) -> Result<(), LabError> {
        let name = format!("{}new", host.device.name());
        let router = self
            .lab
            .add_router(&name)
            .nat(Nat::Moderate)
            .build()
            .await?;
        shield(&router)?;
        let interface = host.device.default_iface();
        let interface = interface.ok_or_else(|| LabError("no interface".to_owned()))?;
        interface.replug(router.id()).await?;
        forget_neighbours(&self.lab)
    }

    /// Floods a relay from this many machines, each with its own address.
    ///
    /// # Errors
    /// [`LabError`] if a machine cannot be made, or the relay has no address.
    pub async fn flood(
        &self,
        relay: usize,
        machines: usize,
        seconds: u64,
    ) -> Result<Vec<std::process::Child>, LabError> {
        let router = self.lab.add_router("attackers").build().await?;
        let target = self.relays[relay].addresses();
        let target = target
            .iter()
            .find(|address| address.contains("/ip4/") && address.contains("/tcp/"));
        let target = target.ok_or_else(|| LabError("the relay has no address".to_owned()))?;
        let mut floods = Vec::new();
        for n in 0..machines {
            let device = self.lab.add_device(&format!("attacker{n}"));
            let device = device.uplink(router.id()).build().await?;
            forget_neighbours(&self.lab)?;
            let arguments = [wire::FLOOD.to_owned(), target.clone(), seconds.to_string()];
            floods.push(device.spawn_command_sync(wire::this_program(&arguments)?)?);
        }
        Ok(floods)
    }

    /// Returns the logs of both nodes.
    pub fn logs(&self) -> String {
        format!("\none: {}\nother: {}", self.one.log(), self.other.log())
    }
}

/// A machine with a node.
pub struct Host {
    device: Device,
    /// The node's home. Commands reach the node from any namespace of this machine, through its socket.
    pub home: Home,
    daemon: Option<Daemon>,
    arguments: Vec<String>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("device", &self.device.name())
            .finish_non_exhaustive()
    }
}

impl Host {
    fn start(device: Device, arguments: &[&str]) -> Result<Self, LabError> {
        let mut host = Self {
            device,
            home: Home::new(),
            daemon: None,
            arguments: arguments.iter().copied().map(str::to_owned).collect(),
        };
        host.start_again()?;
        Ok(host)
    }

    /// Starts the node again after it was [killed](Self::kill), with the same home and arguments.
    ///
    /// # Errors
    /// [`LabError`] if the namespace is gone.
    pub fn start_again(&mut self) -> Result<(), LabError> {
        let (log, device) = (self.home.beside("log"), &self.device);
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let daemon = self.home.up_in(&arguments, |mut command: Command| {
            let log = File::options().create(true).append(true).open(&log);
            let log = log.map_err(anyhow::Error::from)?;
            if std::env::var_os("WEFT_LOG").is_none() {
                command.env(
                    "WEFT_LOG",
                    "warn,weft=debug,weft_net=debug,libp2p_kad=error",
                );
            }
            // A node that logs much must not wait for a reader.
            command.stderr(log);
            device.spawn_command_sync(command)
        })?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// Ends the node with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(daemon) = self.daemon.take() {
            daemon.kill();
        }
    }

    /// Sends the node a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(daemon) = &self.daemon {
            daemon.signal(signal);
        }
    }

    /// Returns the node's id, or an empty string while it does not run.
    pub fn peer_id(&self) -> &str {
        self.daemon.as_ref().map_or("", Daemon::peer_id)
    }

    /// Returns the node's resident memory, in bytes.
    ///
    /// # Errors
    /// [`LabError`] if the node does not run.
    pub fn resident(&self) -> Result<u64, LabError> {
        let pid = self.daemon.as_ref().map_or(0, Daemon::pid);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        let status = status.map_err(anyhow::Error::from)?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib * 1024)
            .ok_or_else(|| LabError(format!("no VmRSS in {status}")))
    }

    /// Disconnects the machine from its network, or connects it again.
    ///
    /// # Errors
    /// [`LabError`] if the interface cannot be changed.
    pub async fn link(&self, up: bool) -> Result<(), LabError> {
        let interface = self.device.default_iface();
        let interface = interface.ok_or_else(|| LabError("no interface".to_owned()))?;
        match up {
            true => interface.link_up().await?,
            false => interface.link_down().await?,
        }
        Ok(())
    }

    /// Starts a node that knows the relays at these addresses.
    fn join(device: Device, relays: &[String]) -> Result<Self, LabError> {
        let v6 = device.ip().is_none();
        let mut arguments = vec!["--json", "up", "--no-mdns"];
        for relay in relays {
            if relay.starts_with("/ip6") == v6 {
                arguments.extend_from_slice(&["--relay", relay]);
            }
        }
        Self::start(device, &arguments)
    }

    /// Waits until the node has reservations on this many relays. A node that can reach only port 443 cannot connect to
    /// the other node directly.
    fn wait_until_reachable(&self, relays: usize) -> Result<(), LabError> {
        let begin = Instant::now();
        loop {
            let known = self.home.json(&["doctor"]);
            let has = |what: &str, count| known[what].as_array().is_some_and(|a| a.len() >= count);
            if has("relays", relays) {
                return Ok(());
            }
            if begin.elapsed() > Duration::from_secs(20) {
                let name = self.device.name();
                return Err(LabError(format!(
                    "{name} holds no reservation on a relay: {known}\n{}",
                    self.log()
                )));
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    fn addresses(&self) -> Vec<String> {
        let status = self.home.json(&["status"]);
        let all = status["addresses"].as_array().into_iter().flatten();
        all.filter_map(|address| address.as_str().map(str::to_owned))
            .collect()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.home.beside("log")).unwrap_or_else(|error| error.to_string())
    }
}

/// Creates a machine behind the network of `side`.
async fn behind(
    lab: &Lab,
    name: &str,
    side: Side,
    provider: &str,
) -> Result<(Device, Option<Gateway>), LabError> {
    if side == Side::PortMapping {
        let (router, gateway) = gateway::build(lab, name, provider).await?;
        let device = lab.add_device(name).uplink(router.id()).build().await?;
        return Ok((device, Some(gateway)));
    }
    let home = |builder: RouterBuilder| builder.nat(Nat::Moderate);
    let router = |suffix: &str| lab.add_router(&format!("{name}{suffix}"));
    let carrier = |nat: Nat| async move {
        let carrier = router("carrier").nat(nat).build().await?;
        shield(&carrier)?;
        Ok::<NodeId, LabError>(carrier.id())
    };
    let router = match side {
        Side::Public => router("net"),
        Side::Home => home(router("nat")),
        Side::FullCone => router("nat").nat(Nat::Open),
        Side::AddressRestricted => {
            let nat = NatConfig::builder()
                .mapping(NatMapping::EndpointIndependent)
                .filtering(NatFiltering::AddressDependent)
                .build()
                .map_err(anyhow::Error::from)?;
            router("nat").nat(nat)
        }
        Side::Symmetric => router("nat").nat(Nat::Strict),
        Side::Cgnat => home(router("nat")).upstream(carrier(Nat::Moderate).await?),
        Side::CgnatSymmetric => home(router("nat")).upstream(carrier(Nat::Strict).await?),
        Side::UdpBlocked => home(router("nat")).firewall_custom(|f| f.block_udp()),
        Side::PortMapping => unreachable!("built above"),
        Side::Only443 => home(router("nat")).firewall_custom(|f| f.block_udp().allow_tcp(&[443])),
        Side::Ipv6 => router("net")
            .ip_support(IpSupport::V6Only)
            .firewall_custom(|f| f.block_inbound()),
    };
    let router = router.build().await?;
    if side != Side::Public {
        shield(&router)?;
    }
    let device = lab.add_device(name).uplink(router.id()).build().await?;
    Ok((device, None))
}

/// Clears the neighbor tables of all machines. A bridge takes the lowest hardware address of its ports, so each new
/// port may change it. Machines that know the old address send into the void until their entry expires.
fn forget_neighbours(lab: &Lab) -> Result<(), LabError> {
    let flush = || {
        let mut command = Command::new("ip");
        command.args(["neigh", "flush", "all"]);
        command
    };
    let in_routers = lab
        .routers()
        .into_iter()
        .map(|r| r.spawn_command_sync(flush()));
    let in_devices = lab
        .devices()
        .into_iter()
        .map(|d| d.spawn_command_sync(flush()));
    for child in in_routers.chain(in_devices) {
        succeeded(child?)?;
    }
    Ok(())
}

fn succeeded(mut child: std::process::Child) -> Result<(), LabError> {
    let status = child.wait().map_err(anyhow::Error::from)?;
    if status.success() {
        Ok(())
    } else {
        Err(LabError(format!(
            "a command failed in a namespace: {status}"
        )))
    }
}

/// Stops a router from answering unsolicited packets. Otherwise its kernel would refuse packets without a NAT mapping,
/// and the refusal would end the other side's attempt.
fn shield(router: &Router) -> Result<(), LabError> {
    nft(
        router,
        "table inet shield { chain input { type filter hook input priority 0; \
         meta l4proto { tcp, udp } ct state new drop; }; }",
    )
}

fn nft(router: &Router, rules: &str) -> Result<(), LabError> {
    let mut command = Command::new("nft");
    command.arg(rules);
    succeeded(router.spawn_command_sync(command)?)
}
