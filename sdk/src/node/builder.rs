//! How a node is started.

use std::path::PathBuf;

use weft_blobs::Store;
use weft_dht::{Dht, Disk};
use weft_net::{
    Access, Certificate, Config, Limits, Multiaddr, Network, RelayLimits, RelayServer, Rule,
};

use super::start::{Opened, Parts};
use crate::{
    Error, HomeError, Node, Rates, default_home, documents, home::Home, models::trust::Trusted,
    operation::blocking, registry::Followed, rpc::CallLimits,
};

/// What a node is to be; see [`Node::builder`].
#[derive(Debug, Clone, Default)]
pub struct Builder {
    home: Option<PathBuf>,
    listen: Option<Vec<Multiaddr>>,
    external: Vec<Multiaddr>,
    bootstrap: Vec<Multiaddr>,
    relays: Vec<Multiaddr>,
    relay_server: RelayServer,
    relay_limits: RelayLimits,
    no_hole_punching: bool,
    no_port_mapping: bool,
    no_mdns: bool,
    limits: Limits,
    call_limits: CallLimits,
    rates: Rates,
    quota: Option<Option<u64>>,
    access: Access,
    certificate: Option<Certificate>,
    ws_origins: Vec<String>,
    trusted_proxies: Vec<Rule>,
}

impl Builder {
    /// The folder that holds the node's identity and store; one node at a time. Default: [`default_home`].
    pub fn home(mut self, path: impl Into<PathBuf>) -> Self {
        self.home = Some(path.into());
        self
    }

    /// Where to listen, as in `/ip4/0.0.0.0/tcp/9338` or `/ip6/::/udp/9338/quic-v1`. An address that is taken is an error then. Default:
    /// TCP and QUIC on all interfaces, port 9338, or a free one if that is taken.
    pub fn listen(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.listen.get_or_insert_default().extend(addresses);
        self
    }

    /// Addresses that lead here from outside, such as a forwarded port's.
    pub fn external(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.external.extend(addresses);
        self
    }

    /// Nodes to join the mesh through; each ends in `/p2p/<PeerId>`. Unreachable ones are tried again, up to every minute.
    pub fn bootstrap(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.bootstrap.extend(addresses);
        self
    }

    /// Relays to hold places on, before those that are found; each ends in `/p2p/<PeerId>`. A node that is reached over IPv4 at TCP port 443, which every network lets out, uses none.
    pub fn relays(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.relays.extend(addresses);
        self
    }

    /// Whether to relay for others. Default: once strangers have reached this node.
    pub fn relay_server(mut self, serve: RelayServer) -> Self {
        self.relay_server = serve;
        self
    }

    /// Sets the limits on relaying for others. Under [`RelayServer::Auto`], the default limits stand for small ones: a
    /// node that nobody asked to relay gives 1 MiB/s and 10 GiB a day.
    pub fn relay_limits(mut self, limits: RelayLimits) -> Self {
        self.relay_limits = limits;
        self
    }

    /// Whether to open direct connections beside relayed ones. Default: yes. Without it, connections through relays stay there.
    pub fn hole_punching(mut self, on: bool) -> Self {
        self.no_hole_punching = !on;
        self
    }

    /// Whether to ask the gateway of our network to forward our ports (PCP, NAT-PMP, UPnP). Default: yes.
    pub fn port_mapping(mut self, on: bool) -> Self {
        self.no_port_mapping = !on;
        self
    }

    /// Whether to find nodes on the local network by multicast DNS. Default: yes.
    pub fn mdns(mut self, on: bool) -> Self {
        self.no_mdns = !on;
        self
    }

    /// What strangers can make the node hold and do.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// What calls from others can make the node hold and do.
    pub fn call_limits(mut self, limits: CallLimits) -> Self {
        self.call_limits = limits;
        self
    }

    /// How fast content may come and go. Default: no limit. [`Node::set_rates`] changes it while the node runs.
    pub fn rates(mut self, rates: Rates) -> Self {
        self.rates = rates;
        self
    }

    /// How many bytes of fetched content may be in the home, from now on; `None` is no limit. [`Models::set_quota`](crate::Models::set_quota) changes it while the node runs.
    /// Default: what it was when the node ran last, and at first no limit.
    pub fn quota(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.quota = Some(bytes.into());
        self
    }

    /// Whom the node has to do with at all. Default: everybody. [`Node::set_access`] changes it while the node runs.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// A certificate for secure WebSocket, for browsers and proxies that check it. Default: one is made up, which other nodes take.
    pub fn certificate(mut self, certificate: Certificate) -> Self {
        self.certificate = Some(certificate);
        self
    }

    /// Origins of web pages that may connect by WebSocket, such as `https://example.org`; `*` allows any. Default: no
    /// web page may connect, because a page in a browser on this machine would be a peer from here.
    pub fn ws_origins(mut self, origins: Vec<String>) -> Self {
        self.ws_origins = origins;
        self
    }

    /// Networks of reverse proxies ([`Rule::Network`]). Each connection from there has to say where it really comes
    /// from, by the PROXY protocol or in `X-Forwarded-For`, and counts there in limits and lists; others are refused.
    /// Default: none.
    pub fn trusted_proxies(mut self, networks: Vec<Rule>) -> Self {
        self.trusted_proxies = networks;
        self
    }

    /// Starts the node; it listens when this returns.
    ///
    /// # Errors
    /// [`Error::Home`] if another process runs a node there, [`Error::Network`] if an address cannot be used, [`Error::Store`] if the
    /// store cannot be opened.
    pub async fn spawn(self) -> Result<Node, Error> {
        let path = match self.home {
            Some(path) => path,
            None => default_home()?,
        };
        let quota = self.quota;
        let (opened, disk) = blocking(move || {
            let home = Home::open(&path)?;
            let store = Store::open(&home.store())?;
            if let Some(quota) = quota {
                store.set_quota(quota)?;
            }
            let disk = Disk::open(&home.records())?;
            let trusted = Trusted::open(&home.trust())?;
            let followed = Followed::open(&home.registries())?;
            let secret = home.key().clone().try_into_ed25519();
            let secret = secret.map_err(|_| HomeError::BadKey(path))?.secret();
            let secret = secret
                .as_ref()
                .try_into()
                .expect("an Ed25519 secret has 32 bytes");
            let (documents, outgoing) = documents::start(&home.documents(), secret)?;
            let opened = Opened {
                home,
                store,
                trusted,
                followed,
                documents,
                outgoing,
            };
            Ok((opened, disk))
        })
        .await?;
        let (dht, behaviour) = Dht::on_disk(opened.home.key(), disk);
        let mut config = Config::new(opened.home.key().clone());
        config.listen = self.listen;
        config.external = self.external;
        config.bootstrap = self.bootstrap;
        config.relays = self.relays;
        config.relay_server = self.relay_server;
        config.relay_limits = self.relay_limits;
        config.hole_punching = !self.no_hole_punching;
        config.port_mapping = !self.no_port_mapping;
        config.mdns = !self.no_mdns;
        config.limits = self.limits;
        config.access = self.access;
        config.certificate = self.certificate;
        config.ws_origins = self.ws_origins;
        config.trusted_proxies = self.trusted_proxies;
        // Only a node that has somebody to wait for waits.
        let expects_peers =
            config.mdns || !config.bootstrap.is_empty() || !config.relays.is_empty();
        let network = Network::spawn(config, behaviour).await?;
        Ok(Node::start(Parts {
            opened,
            network,
            dht,
            expects_peers,
            calls: self.call_limits,
            rates: self.rates,
        }))
    }
}
