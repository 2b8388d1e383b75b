//! The swarm that the driver builds: its behaviours and its transport.

use std::{convert::Infallible, num::NonZeroU8, time::Duration};

use libp2p::{
    Multiaddr, Swarm,
    core::upgrade::Version,
    identify, mdns,
    multiaddr::Protocol,
    ping,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
};

use super::{Config, SpawnError, budget::Budget, guarded::Guarded};
use crate::{
    policy::{access, connection_manager, gate::Gate},
    relay::circuit::Circuits,
    streams::{self, Protocols},
    topics,
    transport::{self, lane, quic::Sockets, tls::Tls, websocket::InboundRules},
};

/// Time after which an unused connection is closed. It is long enough that a mesh of a few nodes stays connected
/// between lookups.
const IDLE: Duration = Duration::from_secs(300);

/// Streams that a peer may be negotiating on a connection.
const MAX_NEGOTIATING: usize = 64;

/// Addresses of a peer dialed at a time, so that a dead address does not delay those after it.
const CONCURRENT_ADDRESSES: u8 = 16;

/// The behaviours of a node.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
pub(crate) struct Behaviour<E: NetworkBehaviour<ToSwarm = Infallible>> {
    pub(super) access: access::Behaviour,
    pub(super) connection_manager: connection_manager::Behaviour,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(super) streams: streams::Behaviour,
    pub(super) topics: topics::Behaviour,
    pub(super) extension: E,
}

impl<E: NetworkBehaviour<ToSwarm = Infallible>> Behaviour<E> {
    pub(super) fn new(
        config: &Config,
        budget: &Budget,
        access: access::Shared,
        protocols: Protocols,
        topics: topics::Behaviour,
        extension: E,
    ) -> Result<Self, SpawnError> {
        let local = config.key.public().to_peer_id();
        let mdns = match config.mdns {
            true => {
                let mdns = mdns::tokio::Behaviour::new(mdns::Config::default(), local);
                Some(mdns.map_err(SpawnError::Mdns)?)
            }
            false => None,
        };
        let identify = identify::Config::new("/weft/1".to_owned(), config.key.public())
            .with_agent_version(config.agent.clone())
            .with_push_listen_addr_updates(true)
            // Addresses for unknown peers are among the external addresses.
            .with_hide_listen_addrs(true)
            // With a cache, the other behaviours would learn an address only once, even if the peer reconnects.
            .with_cache_size(0);
        let streams =
            streams::Behaviour::new(protocols, budget.limits.streams, budget.memory.clone());
        Ok(Self {
            access: access::Behaviour::new(access),
            connection_manager: connection_manager::Behaviour::new(budget.connections.clone()),
            identify: identify::Behaviour::new(identify),
            ping: ping::Behaviour::default(),
            mdns: mdns.into(),
            streams,
            topics,
            extension,
        })
    }
}

/// Parts that the transport shares with the driver.
pub(super) struct SharedParts {
    pub(super) tls: Tls,
    pub(super) sockets: Sockets,
    pub(super) access: access::Shared,
    pub(super) gate: Gate,
    pub(super) circuits: Circuits,
    /// Receiver of incoming lanes; `None`: lanes are not accepted.
    pub(super) lanes: Option<lane::Arrivals>,
}

/// Makes the swarm. It listens only on circuits.
pub(super) fn build<E: NetworkBehaviour<ToSwarm = Infallible>>(
    config: &Config,
    budget: &Budget,
    shared: SharedParts,
    behaviour: Behaviour<E>,
) -> Result<Swarm<Guarded<E>>, SpawnError> {
    let parts = transport::Parts {
        key: &config.key,
        tls: shared.tls,
        certificate: config.certificate.as_ref(),
        sockets: shared.sockets,
        dialed: shared.gate.dialed(),
        access: shared.access.clone(),
        gate: shared.gate,
        rules: InboundRules {
            pending: budget.pending.clone(),
            access: shared.access,
            origins: config.ws_origins.clone().into(),
            proxies: config.trusted_proxies.clone().into(),
        },
        lanes: shared.lanes,
    };
    let swarm_config = libp2p::swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE)
        .with_dial_concurrency_factor(NonZeroU8::new(CONCURRENT_ADDRESSES).expect("not zero"))
        // A stream negotiates one protocol, so the dialer need not wait for the answer before using the stream.
        .with_substream_upgrade_protocol_override(Version::V1Lazy)
        .with_max_negotiating_inbound_streams(MAX_NEGOTIATING);
    let mut swarm = Swarm::new(
        transport::build(&parts, shared.circuits)?,
        Guarded::new(behaviour),
        config.key.public().to_peer_id(),
        swarm_config,
    );
    let on_circuits = Multiaddr::empty().with(Protocol::P2pCircuit);
    let circuits = swarm.listen_on(on_circuits);
    circuits.expect("the transport for circuits listens on them");
    Ok(swarm)
}
