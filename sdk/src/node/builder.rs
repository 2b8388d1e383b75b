//! Configuring and starting a node.

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

/// Configures and starts a node; made by [`Node::builder`].
///
/// All settings are optional. [`spawn`](Self::spawn) starts the node.
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
    /// Sets the folder that holds the node's key, store and databases. One node at a time can use a home. Default:
    /// [`default_home`].
    pub fn home(mut self, path: impl Into<PathBuf>) -> Self {
        self.home = Some(path.into());
        self
    }

    /// Adds addresses to listen on, such as `/ip4/0.0.0.0/tcp/9338` or `/ip6/::/udp/9338/quic-v1`. If one of them is
    /// in use, [`spawn`](Self::spawn) fails. Default: TCP and QUIC on all interfaces, on port 9338, or on a free port
    /// if 9338 is in use.
    pub fn listen(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.listen.get_or_insert_default().extend(addresses);
        self
    }

    /// Adds external addresses at which peers reach this node, such as that of a forwarded port. Default: none.
    pub fn external(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.external.extend(addresses);
        self
    }

    /// Adds nodes to join the mesh through; each address ends in `/p2p/<PeerId>`. An unreachable node is tried again,
    /// with a backoff of up to one minute. Default: none.
    pub fn bootstrap(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.bootstrap.extend(addresses);
        self
    }

    /// Adds relays on which the node holds reservations, before it uses relays that it discovers; each address ends
    /// in `/p2p/<PeerId>`. Default: none.
    ///
    /// A node that peers reach over IPv4 on TCP port 443 uses no relay, because every network lets that port out.
    pub fn relays(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.relays.extend(addresses);
        self
    }

    /// Sets whether this node relays connections for others. Default: it begins once peers outside its own networks
    /// have reached it.
    pub fn relay_server(mut self, serve: RelayServer) -> Self {
        self.relay_server = serve;
        self
    }

    /// Sets the limits on relaying for others. Under [`RelayServer::Auto`], the default limits mean small ones, 1
    /// MiB/s and 10 GiB a day, because the node's owner did not ask it to relay.
    pub fn relay_limits(mut self, limits: RelayLimits) -> Self {
        self.relay_limits = limits;
        self
    }

    /// Sets whether to open direct connections in place of relayed ones by hole punching. Default: yes. Without hole
    /// punching, a relayed connection stays relayed.
    pub fn hole_punching(mut self, on: bool) -> Self {
        self.no_hole_punching = !on;
        self
    }

    /// Sets whether to ask the local gateway to forward the node's ports (PCP, NAT-PMP or UPnP). Default: yes.
    pub fn port_mapping(mut self, on: bool) -> Self {
        self.no_port_mapping = !on;
        self
    }

    /// Sets whether to find nodes on the local network by multicast DNS. Default: yes.
    pub fn mdns(mut self, on: bool) -> Self {
        self.no_mdns = !on;
        self
    }

    /// Sets the limits on what peers can make the node hold and do. Default: [`Limits::default`].
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the limits on what callers can make the node hold and do. Default: [`CallLimits::default`].
    pub fn call_limits(mut self, limits: CallLimits) -> Self {
        self.call_limits = limits;
        self
    }

    /// Sets the limits on the rates of content, in bytes per second. Default: no limit. [`Node::set_rates`] changes
    /// them while the node runs.
    pub fn rates(mut self, rates: Rates) -> Self {
        self.rates = rates;
        self
    }

    /// Sets the quota: the most bytes of fetched content that the home may hold. `None` means no limit. Default: the
    /// quota of the node's last run; no limit on its first run.
    ///
    /// The quota is stored in the home. [`Models::set_quota`](crate::Models::set_quota) changes it while the node
    /// runs.
    pub fn quota(mut self, bytes: impl Into<Option<u64>>) -> Self {
        self.quota = Some(bytes.into());
        self
    }

    /// Sets the allow and block lists, which decide which peers and networks the node exchanges anything with.
    /// Default: all peers are allowed. [`Node::set_access`] changes the lists while the node runs.
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Sets the TLS certificate for secure WebSocket, for browsers and proxies that verify it. Default: a self-signed
    /// certificate, which other nodes accept.
    pub fn certificate(mut self, certificate: Certificate) -> Self {
        self.certificate = Some(certificate);
        self
    }

    /// Sets the origins of web pages that may connect by WebSocket, such as `https://example.org`; `*` allows any.
    /// Default: no web page may connect, because a page in a browser on this machine would count as a local peer.
    pub fn ws_origins(mut self, origins: Vec<String>) -> Self {
        self.ws_origins = origins;
        self
    }

    /// Sets the networks of trusted reverse proxies ([`Rule::Network`]). Default: none.
    ///
    /// Each connection from such a network has to give its real source, by the PROXY protocol or in
    /// `X-Forwarded-For`. Limits and access lists apply to that source. A connection that gives no source is refused.
    pub fn trusted_proxies(mut self, networks: Vec<Rule>) -> Self {
        self.trusted_proxies = networks;
        self
    }

    /// Starts the node. The node listens when this returns. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Home`] if the home cannot be used, for example because another process runs a node there;
    /// [`Error::Network`] if an address cannot be used; [`Error::Store`] if the store cannot be opened;
    /// [`Error::Disk`] if the stored records cannot be opened; [`Error::Document`] if the documents cannot be opened.
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
        // Only a node that expects peers waits for them.
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
