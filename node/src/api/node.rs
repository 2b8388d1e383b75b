//! The service `Node`: identity, peers, reachability, limits, rates, access and trust.

use std::sync::Arc;

use tokio::sync::Mutex;
use tonic::{Request, Response, Status};
use weft::{
    Access, BootstrapPeer, LoweredLimits, Node, ParseRuleError, PathInfo, PeerInfo, Rates, Rule,
    split_peer_id,
};
use weft_proto::api::{self, node_server};

use super::status::{invalid, peer_id, status};

/// Most rules in a list. Each connection is checked against all of them.
const MAX_RULES: usize = 4096;

/// Implements the service.
#[derive(Debug, Clone)]
pub(super) struct NodeService {
    node: Node,
    /// The endpoints of the API, for the status.
    endpoints: Vec<String>,
    /// Serializes changes, so that concurrent changes do not undo each other.
    changing: Arc<Mutex<()>>,
}

impl NodeService {
    pub(super) fn new(node: Node, endpoints: Vec<String>) -> Self {
        Self {
            node,
            endpoints,
            changing: Arc::default(),
        }
    }
}

#[tonic::async_trait]
impl node_server::Node for NodeService {
    async fn status(
        &self,
        _: Request<api::StatusRequest>,
    ) -> Result<Response<api::StatusResponse>, Status> {
        let now = self.node.status().await.map_err(|error| status(&error))?;
        Ok(Response::new(api::StatusResponse {
            peer_id: now.peer_id.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            home: now.home.display().to_string(),
            addresses: now.addresses.iter().map(ToString::to_string).collect(),
            api: self.endpoints.clone(),
            uptime_seconds: now.uptime.as_secs(),
            peer_count: now.peers as u32,
            dht_nodes: now.dht_nodes as u32,
            dht_records: now.dht_records as u64,
            model_count: now.models as u32,
            model_bytes: now.model_bytes,
            bootstrap: now.bootstrap.into_iter().map(bootstrap).collect(),
            clock: self.node.clock().await.map(clock),
            disk_full: now.disk_full,
            lowered_limits: now.lowered_limits.map(lowered),
        }))
    }

    async fn peers(
        &self,
        _: Request<api::PeersRequest>,
    ) -> Result<Response<api::PeersResponse>, Status> {
        let peers = self.node.peers().await;
        let peers = peers.into_iter().map(peer).collect();
        Ok(Response::new(api::PeersResponse { peers }))
    }

    async fn connect(
        &self,
        request: Request<api::ConnectRequest>,
    ) -> Result<Response<api::ConnectResponse>, Status> {
        let request = request.into_inner();
        let id = peer_id(&request.peer_id)?;
        let mut addresses = Vec::new();
        for address in &request.addresses {
            let address = address
                .parse()
                .map_err(|error| status(&weft::Error::Address(error)))?;
            match split_peer_id(address) {
                (_, Some(other)) if other != id => {
                    return Err(invalid(format!(
                        "an address given for {id} is an address of {other}"
                    )));
                }
                (address, _) => addresses.push(address),
            }
        }
        let path = self.node.connect(id, addresses).await;
        let path = path.map_err(|error| status(&error))?;
        let known = self.node.peers().await.into_iter().find(|p| p.peer == id);
        // The peer may have disconnected again, but the path was open.
        let known = known.unwrap_or(PeerInfo {
            peer: id,
            path,
            rtt: None,
            agent: String::new(),
            connections: 0,
            paths: Vec::new(),
            direct_after: None,
        });
        Ok(Response::new(api::ConnectResponse {
            peer: Some(peer(known)),
        }))
    }

    async fn ping(
        &self,
        request: Request<api::PingRequest>,
    ) -> Result<Response<api::PingResponse>, Status> {
        let id = peer_id(&request.into_inner().peer_id)?;
        let (rtt, path) = self.node.ping(id).await.map_err(|error| status(&error))?;
        Ok(Response::new(api::PingResponse {
            rtt_micros: rtt.as_micros() as u64,
            path: path.kind.to_string(),
            transport: path.transport.to_string(),
        }))
    }

    async fn doctor(
        &self,
        _: Request<api::DoctorRequest>,
    ) -> Result<Response<api::DoctorResponse>, Status> {
        let known = self.node.doctor().await.map_err(|error| status(&error))?;
        let text =
            |addresses: &[weft::Multiaddr]| addresses.iter().map(ToString::to_string).collect();
        Ok(Response::new(api::DoctorResponse {
            port_mapping: known.port_mapping,
            tcp_port: known.tcp_port.map(u32::from),
            quic_port: known.quic_port.map(u32::from),
            bootstrap: self
                .node
                .bootstrap()
                .await
                .into_iter()
                .map(bootstrap)
                .collect(),
            public_addresses: text(&known.public),
            mapped_addresses: text(&known.mapped),
            observed_addresses: text(&known.observed),
            tcp_mapping: known.tcp_mapping.to_string(),
            quic_mapping: known.quic_mapping.to_string(),
            tcp_filtering: known.tcp_filtering.to_string(),
            quic_filtering: known.quic_filtering.to_string(),
            udp: known.udp,
            ipv6: known.ipv6,
            verified_addresses: known
                .verified
                .iter()
                .map(|(address, verdict)| api::VerifiedAddress {
                    address: address.to_string(),
                    verdict: verdict.to_string(),
                })
                .collect(),
            relays: known.relays.iter().map(ToString::to_string).collect(),
            is_relay: known.is_relay,
            lacks_relays: known.lacks_relays,
            relay_use: Some(api::RelayUse {
                reservations: known.relay_use.reservations as u64,
                circuits: known.relay_use.circuits as u64,
                bytes: known.relay_use.bytes,
                refused: known.relay_use.refused,
            }),
            clock: self.node.clock().await.map(clock),
        }))
    }

    async fn limits(
        &self,
        _: Request<api::LimitsRequest>,
    ) -> Result<Response<api::LimitsResponse>, Status> {
        let limits = self.node.limits().await.map_err(|error| status(&error))?;
        let limits = limits.into_iter().map(|limit| api::LimitUse {
            name: limit.name.to_owned(),
            used: limit.used,
            limit: limit.limit,
            refused: limit.refused,
        });
        Ok(Response::new(api::LimitsResponse {
            limits: limits.collect(),
        }))
    }

    async fn rates(
        &self,
        _: Request<api::RatesRequest>,
    ) -> Result<Response<api::RatesResponse>, Status> {
        Ok(Response::new(rates_response(self.node.rates())))
    }

    async fn change_rates(
        &self,
        request: Request<api::ChangeRatesRequest>,
    ) -> Result<Response<api::RatesResponse>, Status> {
        let request = request.into_inner();
        let _one = self.changing.lock().await;
        let now = self.node.rates();
        self.node.set_rates(Rates {
            download: request.download_rate.unwrap_or(now.download),
            upload: request.upload_rate.unwrap_or(now.upload),
            download_per_peer: request
                .download_rate_per_peer
                .unwrap_or(now.download_per_peer),
            upload_per_peer: request.upload_rate_per_peer.unwrap_or(now.upload_per_peer),
        });
        Ok(Response::new(rates_response(self.node.rates())))
    }

    async fn access(
        &self,
        _: Request<api::AccessRequest>,
    ) -> Result<Response<api::AccessResponse>, Status> {
        let access = self.node.access().await.map_err(|error| status(&error))?;
        Ok(Response::new(access_response(&access)))
    }

    async fn change_access(
        &self,
        request: Request<api::ChangeAccessRequest>,
    ) -> Result<Response<api::AccessResponse>, Status> {
        let request = request.into_inner();
        let rules = |all: &[String]| -> Result<Vec<Rule>, Status> {
            let rules = all.iter().map(|text| text.parse());
            rules
                .collect::<Result<_, ParseRuleError>>()
                .map_err(|error| invalid(error.to_string()))
        };
        let (allow, block) = (rules(&request.allow)?, rules(&request.block)?);
        let remove = rules(&request.remove)?;
        let _one_at_a_time = self.changing.lock().await;
        let mut access = self.node.access().await.map_err(|error| status(&error))?;
        for (list, new) in [(&mut access.allow, allow), (&mut access.block, block)] {
            list.retain(|rule| !remove.contains(rule));
            for rule in new {
                if !list.contains(&rule) {
                    list.push(rule);
                }
            }
            if list.len() > MAX_RULES {
                return Err(invalid(format!(
                    "a list can have at most {MAX_RULES} rules"
                )));
            }
        }
        self.node.set_access(access.clone()).await;
        Ok(Response::new(access_response(&access)))
    }

    async fn trust(
        &self,
        _: Request<api::TrustRequest>,
    ) -> Result<Response<api::TrustResponse>, Status> {
        Ok(trust_response(&self.node.trust().list()))
    }

    async fn change_trust(
        &self,
        request: Request<api::ChangeTrustRequest>,
    ) -> Result<Response<api::TrustResponse>, Status> {
        let request = request.into_inner();
        let peers = |all: &[String]| -> Result<Vec<_>, Status> {
            all.iter().map(|text| peer_id(text)).collect()
        };
        let (add, remove) = (peers(&request.add)?, peers(&request.remove)?);
        let changed = self.node.trust().change(add, remove).await;
        Ok(trust_response(&changed.map_err(|error| status(&error))?))
    }
}

fn bootstrap(one: BootstrapPeer) -> api::BootstrapPeer {
    api::BootstrapPeer {
        peer_id: one.peer.to_string(),
        address: format!("{}/p2p/{}", one.address, one.peer),
        connected: one.connected,
        error: one.error.unwrap_or_default(),
        failures: one.failures,
    }
}

fn lowered(one: LoweredLimits) -> api::LoweredLimits {
    api::LoweredLimits {
        open_files: one.open_files,
        needed: one.needed,
        connections: one.connections,
        incoming: one.incoming,
        lanes: one.lanes as u64,
        text: one.to_string(),
    }
}

fn clock(difference: weft::ClockDifference) -> api::ClockDifference {
    api::ClockDifference {
        difference_seconds: difference.seconds(),
        peer_count: difference.peers as u32,
        is_wrong: difference.is_wrong(),
        text: difference.to_string(),
    }
}

fn trust_response(peers: &[weft::PeerId]) -> Response<api::TrustResponse> {
    let peers = peers.iter().map(ToString::to_string).collect();
    Response::new(api::TrustResponse { peers })
}

fn access_response(access: &Access) -> api::AccessResponse {
    let text = |rules: &[Rule]| rules.iter().map(ToString::to_string).collect();
    api::AccessResponse {
        allow: text(&access.allow),
        block: text(&access.block),
    }
}

fn peer(peer: PeerInfo) -> api::Peer {
    api::Peer {
        peer_id: peer.peer.to_string(),
        address: peer.path.address.to_string(),
        path: peer.path.kind.to_string(),
        transport: peer.path.transport.to_string(),
        rtt_micros: peer.rtt.map(|rtt| rtt.as_micros() as u64),
        relay: peer
            .path
            .relay()
            .map(|relay| relay.to_string())
            .unwrap_or_default(),
        direct_after_millis: peer.direct_after.map(|after| after.as_millis() as u64),
        agent: peer.agent,
        connections: peer.connections as u32,
        paths: peer.paths.into_iter().map(path).collect(),
    }
}

fn path(info: PathInfo) -> api::PeerPath {
    api::PeerPath {
        address: info.path.address.to_string(),
        path: info.path.kind.to_string(),
        transport: info.path.transport.to_string(),
        rtt_micros: info.rtt.map(|rtt| rtt.as_micros() as u64),
        loss: info.loss,
        streams: info.streams as u32,
        bytes_received: info.moved.0,
        bytes_sent: info.moved.1,
        receive_rate: info.rate.0,
        send_rate: info.rate.1,
        relay: info
            .path
            .relay()
            .map(|relay| relay.to_string())
            .unwrap_or_default(),
        age_seconds: info.age.as_secs(),
    }
}

fn rates_response(rates: Rates) -> api::RatesResponse {
    api::RatesResponse {
        download_rate: rates.download,
        upload_rate: rates.upload,
        download_rate_per_peer: rates.download_per_peer,
        upload_rate_per_peer: rates.upload_per_peer,
    }
}
