//! `weft connect`, `weft ping`, `weft doctor`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;
use weft::{Multiaddr, PeerId, split_peer_id};
use weft_proto::api;

use super::{clock_json, clock_warning};
use crate::{
    cli::{Connect, Ping},
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::output::{self, out},
};

/// Time between two checks whether the connection has become direct.
const LOOK: Duration = Duration::from_millis(20);

/// Time between two pings.
const INTERVAL: Duration = Duration::from_secs(1);

/// Returns the JSON form of a connected peer.
pub(super) fn peer_json(peer: &api::Peer) -> Value {
    json!({
        "peer_id": peer.peer_id,
        "address": peer.address,
        "path": peer.path,
        "transport": peer.transport,
        "rtt_micros": peer.rtt_micros,
        "relay": if peer.relay.is_empty() { None } else { Some(&peer.relay) },
        "direct_after_millis": peer.direct_after_millis,
        "agent": peer.agent,
        "connections": peer.connections,
        "paths": peer.paths.iter().map(path_json).collect::<Vec<_>>(),
    })
}

fn path_json(path: &api::PeerPath) -> Value {
    json!({
        "address": path.address,
        "path": path.path,
        "transport": path.transport,
        "rtt_micros": path.rtt_micros,
        "loss": path.loss,
        "streams": path.streams,
        "bytes_received": path.bytes_received,
        "bytes_sent": path.bytes_sent,
        "receive_rate": path.receive_rate,
        "send_rate": path.send_rate,
        "relay": if path.relay.is_empty() { None } else { Some(&path.relay) },
        "age_seconds": path.age_seconds,
    })
}

/// Parses the PeerId or the addresses of one peer.
fn any_of(peers: &[String]) -> Result<api::ConnectRequest, Failure> {
    let mut all = peers.iter().map(|peer| request(peer));
    let mut first = all.next().unwrap_or_else(|| {
        Err(Failure::usage(
            "no peer is given: give a PeerId, or an address that ends in /p2p/<PeerId>",
        ))
    })?;
    for other in all {
        let other = other?;
        if other.peer_id != first.peer_id {
            return Err(Failure::usage(format!(
                "the addresses belong to two peers, {} and {}: give addresses of one peer",
                first.peer_id, other.peer_id
            )));
        }
        first.addresses.extend(other.addresses);
    }
    Ok(first)
}

/// Parses a PeerId, or an address that ends in one.
pub(super) fn request(peer: &str) -> Result<api::ConnectRequest, Failure> {
    if let Ok(peer) = peer.parse::<PeerId>() {
        return Ok(api::ConnectRequest {
            peer_id: peer.to_string(),
            addresses: Vec::new(),
        });
    }
    let malformed = || {
        Failure::usage(format!(
            "{peer} is neither a PeerId nor an address that ends in /p2p/<PeerId>"
        ))
        .hint("`weft status` on that node shows its PeerId and its addresses.")
    };
    let address: Multiaddr = peer.parse().map_err(|_| malformed())?;
    let (address, id) = split_peer_id(address);
    Ok(api::ConnectRequest {
        peer_id: id.ok_or_else(malformed)?.to_string(),
        addresses: vec![address.to_string()],
    })
}

async fn open(client: &Client, request: api::ConnectRequest) -> Result<api::Peer, Failure> {
    let response = client.node().connect(request).await?.into_inner();
    let missing = || Failure::other("the node's answer has no path");
    response.peer.ok_or_else(missing)
}

pub(super) async fn connect(
    client: &Client,
    options: Connect,
    as_json: bool,
) -> Result<(), Failure> {
    let request = any_of(&options.peer)?;
    let wait = options.wait_direct.map(Duration::try_from_secs_f64);
    let wait = wait
        .transpose()
        .map_err(|error| Failure::usage(format!("--wait-direct: {error}")))?;
    let begin = Instant::now();
    let first = open(client, request.clone()).await?;
    let connected = begin.elapsed();
    let mut peer = first.clone();
    while let Some(wait) = wait
        && peer.path == "relayed"
    {
        if begin.elapsed() >= wait {
            break;
        }
        sleep(LOOK).await;
        peer = open(client, request.clone()).await?;
    }
    let direct = (peer.path != "relayed").then(|| begin.elapsed().as_millis() as u64);
    if as_json {
        let mut value = peer_json(&peer);
        value["first_path"] = json!(first.path);
        value["connected_millis"] = json!(connected.as_millis() as u64);
        value["direct_millis"] = json!(direct);
        out!("{value}");
    } else {
        let first_address = &first.address;
        out!(
            "connected in {} ms: {} over {} at {first_address}",
            connected.as_millis(),
            first.path,
            first.transport
        );
        if let (Some(direct), "relayed") = (direct, first.path.as_str()) {
            out!(
                "after {direct} ms: {} over {} at {}",
                peer.path,
                peer.transport,
                peer.address
            );
        }
    }
    if wait.is_some() && direct.is_none() {
        return Err(Failure::new(
            Reason::Unreachable,
            format!("the connection to {} is still relayed", peer.peer_id),
        )
        .hint("The relayed connection works. `weft doctor` on both machines shows why there is no direct one."));
    }
    Ok(())
}

pub(super) async fn ping(client: &Client, options: Ping, as_json: bool) -> Result<(), Failure> {
    let request = request(&options.peer)?;
    let peer_id = open(client, request).await?.peer_id;
    for n in 0..options.count {
        if n > 0 {
            sleep(INTERVAL).await;
        }
        let request = api::PingRequest {
            peer_id: peer_id.clone(),
        };
        let pong = client.node().ping(request).await?.into_inner();
        if as_json {
            out!(
                "{}",
                json!({
                    "peer_id": peer_id,
                    "rtt_micros": pong.rtt_micros,
                    "path": pong.path,
                    "transport": pong.transport,
                })
            );
        } else {
            let rtt = pong.rtt_micros as f64 / 1e3;
            out!(
                "{peer_id}: {rtt:.2} ms, {} over {}",
                pong.path,
                pong.transport
            );
        }
    }
    Ok(())
}

pub(super) async fn doctor(client: &Client, as_json: bool) -> Result<(), Failure> {
    let known = client
        .node()
        .doctor(api::DoctorRequest {})
        .await?
        .into_inner();
    let advice = advice(&known);
    if as_json {
        out!("{}", doctor_json(&known, &advice));
        return Ok(());
    }
    show_addresses(&known);
    show_nat(&known);
    show_relays(&known);
    if !advice.is_empty() {
        out!();
    }
    for line in advice {
        out!("{line}");
    }
    Ok(())
}

fn doctor_json(known: &api::DoctorResponse, advice: &[String]) -> Value {
    let relayed = known.relay_use.unwrap_or_default();
    let verified = known.verified_addresses.iter();
    let verified = verified.map(|v| json!({ "address": v.address, "verdict": v.verdict }));
    json!({
        "public_addresses": known.public_addresses,
        "verified_addresses": verified.collect::<Vec<_>>(),
        "mapped_addresses": known.mapped_addresses,
        "observed_addresses": known.observed_addresses,
        "tcp_mapping": known.tcp_mapping,
        "quic_mapping": known.quic_mapping,
        "tcp_filtering": known.tcp_filtering,
        "quic_filtering": known.quic_filtering,
        "udp": known.udp,
        "ipv6": known.ipv6,
        "relays": known.relays,
        "lacks_relays": known.lacks_relays,
        "port_mapping": known.port_mapping,
        "tcp_port": known.tcp_port,
        "quic_port": known.quic_port,
        "bootstrap": known.bootstrap.iter().map(bootstrap_json).collect::<Vec<_>>(),
        "is_relay": known.is_relay,
        "relay_use": {
            "reservations": relayed.reservations,
            "circuits": relayed.circuits,
            "bytes": relayed.bytes,
            "refused": relayed.refused,
        },
        "clock": clock_json(known.clock.as_ref()),
        "advice": advice,
    })
}

/// Prints a list after its name, or the text `none` if the list is empty.
fn show_list(name: &str, all: &[String], none: &str) {
    if all.is_empty() {
        out!("{name}  {none}");
    }
    for (i, one) in all.iter().enumerate() {
        let name = if i == 0 { name } else { "           " };
        out!("{name}  {one}");
    }
}

fn show_addresses(known: &api::DoctorResponse) {
    show_list(
        "reached at ",
        &known.public_addresses,
        "no peer outside has reached this node yet",
    );
    show_list(
        "seen at    ",
        &known.observed_addresses,
        "unknown: connect to a peer outside this network",
    );
    show_list(
        "forwarded  ",
        &known.mapped_addresses,
        match known.port_mapping {
            true => "none: the gateway of this network has mapped no port",
            false => "none: the gateway was not asked (--no-port-mapping)",
        },
    );
    let verified = known.verified_addresses.iter();
    let verified: Vec<_> = verified
        .map(|v| format!("{}: {}", v.address, verdict(&v.verdict)))
        .collect();
    show_list("probed     ", &verified, "no peer was asked yet");
}

fn show_nat(known: &api::DoctorResponse) {
    out!("NAT, TCP     {}", mapping(&known.tcp_mapping));
    out!("NAT, QUIC    {}", mapping(&known.quic_mapping));
    out!("lets in      TCP:  {}", filtering(&known.tcp_filtering));
    out!("             QUIC: {}", filtering(&known.quic_filtering));
    out!(
        "UDP          {}",
        match known.udp {
            Some(true) => "works",
            Some(false) => "blocked: peers answer over TCP, but not over QUIC",
            None => "unknown: no peer outside to try it with",
        }
    );
    out!(
        "IPv6         {}",
        if known.ipv6 {
            "yes"
        } else {
            "no public address"
        }
    );
}

fn show_relays(known: &api::DoctorResponse) {
    let relayed = known.relay_use.unwrap_or_default();
    let bootstrap = known.bootstrap.iter();
    let bootstrap: Vec<_> = bootstrap
        .map(|one| format!("{}: {}", one.address, bootstrap_state(one)))
        .collect();
    show_list("bootstrap  ", &bootstrap, "none given");
    show_list("relays     ", &known.relays, "none");
    if known.lacks_relays && !known.relays.is_empty() {
        out!("             (looking for more)");
    }
    if known.is_relay {
        out!(
            "is a relay   for {} peers; {} circuits now, {} relayed, {} requests refused",
            relayed.reservations,
            relayed.circuits,
            output::bytes(relayed.bytes),
            relayed.refused
        );
    } else {
        out!("is a relay   no");
    }
    out!(
        "clock        {}",
        match &known.clock {
            Some(clock) if clock.is_wrong => clock.text.as_str(),
            Some(_) => "agrees with the clocks of peers",
            None => "unknown: too few peers to compare with",
        }
    );
}

/// Returns suggestions to improve this node's reachability.
fn advice(known: &api::DoctorResponse) -> Vec<String> {
    let mut advice = Vec::new();
    let mut say = |text: &str| advice.push(text.to_owned());
    if let Some(warning) = clock_warning(known.clock.as_ref()) {
        say(&format!("Attention: {warning}."));
    }
    let direct = !known.public_addresses.is_empty() || !known.mapped_addresses.is_empty();
    for one in known.bootstrap.iter().filter(|one| !one.error.is_empty()) {
        say(&format!(
            "Cannot connect to the bootstrap address {}: {}. Check that its node is running, and that `weft status` on \
             that node shows this address and PeerId.",
            one.address, one.error
        ));
    }
    if !direct && known.relays.is_empty() {
        let relay = "give it a relay with --relay ADDR, or connect it to a node that relays";
        say(&match ports(known) {
            Some(ports) => format!(
                "Peers outside this network cannot reach this node. Forward {ports} to it and start it with --external \
                 ADDR, or {relay}."
            ),
            None => format!(
                "Other machines cannot reach this node, because it listens on loopback only. Start it with another \
                 --listen, or {relay}."
            ),
        });
    }
    let refused = known.verified_addresses.iter();
    for one in refused.filter(|v| v.verdict == "unreachable") {
        let whose = if known.mapped_addresses.contains(&one.address) {
            "although the gateway reports a port mapping for it"
        } else {
            "probably because of a firewall or a NAT"
        };
        let seen = known.observed_addresses.contains(&one.address);
        // An observed address that is unreachable is normal behind a NAT, and not worth a suggestion.
        if !seen {
            say(&format!(
                "Peers cannot connect to {}, {whose}. To be reachable there, allow incoming traffic to that port.",
                one.address
            ));
        }
    }
    if known.udp == Some(false) {
        say(
            "Outgoing UDP is blocked, so QUIC does not work, and hole punching works over TCP only. Allow outgoing UDP \
             if you can.",
        );
    }
    let symmetric = |mapping: &str| mapping == "endpoint-dependent";
    if symmetric(&known.quic_mapping) || symmetric(&known.tcp_mapping) {
        say(
            "This NAT uses another port for every peer. Peers behind the same kind of NAT are reachable through relays \
             only, unless a port is forwarded or IPv6 is available.",
        );
    }
    if known.quic_mapping == "unknown" && known.tcp_mapping == "unknown" && !known.ipv6 {
        say(
            "The kind of NAT is unknown until two peers in different networks have seen this node: give it bootstrap \
             nodes or relays outside this network with --bootstrap or --relay.",
        );
    }
    advice
}

/// Returns the ports that a gateway has to forward to this node.
fn ports(known: &api::DoctorResponse) -> Option<String> {
    match (known.tcp_port, known.quic_port) {
        (Some(tcp), Some(quic)) if tcp == quic => Some(format!("TCP and UDP port {tcp}")),
        (Some(tcp), Some(quic)) => Some(format!("TCP port {tcp} and UDP port {quic}")),
        (Some(tcp), None) => Some(format!("TCP port {tcp}")),
        (None, Some(quic)) => Some(format!("UDP port {quic}")),
        (None, None) => None,
    }
}

/// Returns the JSON form of a bootstrap address and its state.
pub(super) fn bootstrap_json(one: &api::BootstrapPeer) -> Value {
    json!({
        "peer_id": one.peer_id,
        "address": one.address,
        "connected": one.connected,
        "error": if one.error.is_empty() { None } else { Some(&one.error) },
        "failures": one.failures,
    })
}

/// Describes the state of a bootstrap address in words.
pub(super) fn bootstrap_state(one: &api::BootstrapPeer) -> String {
    match (one.connected, one.error.as_str()) {
        (true, "") => "connected".to_owned(),
        (false, "") => "not reached yet".to_owned(),
        (connected, error) => format!(
            "failed {}: {error}{}",
            output::count(one.failures.into(), "time"),
            if connected {
                " (the peer is connected at another address)"
            } else {
                ""
            }
        ),
    }
}

/// Fails if the node is connected to no peer. A command calls this when it has found nothing, because the result may
/// exist on nodes that were not asked.
pub(super) async fn is_connected(client: &Client) -> Result<(), Failure> {
    let status = client
        .node()
        .status(api::StatusRequest {})
        .await?
        .into_inner();
    if status.peer_count > 0 {
        return Ok(());
    }
    let given = status.bootstrap.iter().filter_map(|one| {
        let (address, peer) = split_peer_id(one.address.parse().ok()?);
        Some(weft::BootstrapPeer {
            peer: peer?,
            address,
            connected: one.connected,
            error: (!one.error.is_empty()).then(|| one.error.clone()),
            failures: one.failures,
        })
    });
    Err(weft::Error::Disconnected(given.collect()).into())
}

fn mapping(mapping: &str) -> &str {
    match mapping {
        "unknown" => "unknown: two peers in different networks must have seen this node",
        "none" => "none",
        "endpoint-independent" => "the same port for every peer: hole punching works",
        "endpoint-dependent" => {
            "another port for every peer: hole punching needs a reachable peer, or one behind an easier NAT"
        }
        other => other,
    }
}

fn filtering(filtering: &str) -> &str {
    match filtering {
        "unknown" => "unknown: no peer has tried yet",
        "endpoint-independent" => "all peers",
        "address-dependent" => "peers at addresses to which this node has sent",
        "address-and-port-dependent" => "answers only",
        other => other,
    }
}

fn verdict(verdict: &str) -> &str {
    match verdict {
        "reached" => "reachable",
        "by-contacts" => "reachable only for peers to which this node has sent",
        "unreachable" => "unreachable: two peers could not connect",
        other => other,
    }
}
