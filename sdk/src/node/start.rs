//! Starting a node: assembles its parts and starts its background tasks.

use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::{runtime::Handle, task::JoinSet};
use weft_blobs::Store;
use weft_crdt::Documents;
use weft_dht::Dht;
use weft_net::{Incoming, Network, StreamProtocol};

use super::{
    Inner, Node,
    admission::{Admission, serve_all, serve_transfer},
};
use crate::{
    discovery::{advertise::Advertiser, find::Discovery, known_addresses, relays, remembered},
    documents::{self, Driver},
    home::Home,
    models::{
        announce::Announcer, leases::Leases, reader::Reading, resolve::Resolved, trust::Trusted,
    },
    records,
    registry::{self, Followed},
    rpc::{self, CallLimits, Offered, Serving, Sessions, services},
    swarm::{
        self, Exchanger, Hub,
        bandwidth::{Bandwidth, Rates},
        providers::BLOBS,
        turns::{Ranks, Turns},
    },
};

/// The parts of a node. Everything that can fail to open is open.
pub(super) struct Parts {
    pub(super) opened: Opened,
    pub(super) network: Network,
    pub(super) dht: Dht,
    /// True if peers are expected soon after the start.
    pub(super) expects_peers: bool,
    pub(super) calls: CallLimits,
    pub(super) rates: Rates,
}

/// The opened contents of a node's home.
pub(super) struct Opened {
    pub(super) home: Home,
    pub(super) store: Store,
    pub(super) trusted: Trusted,
    pub(super) followed: Followed,
    pub(super) documents: Documents,
    /// Messages that documents send to peers.
    pub(super) outgoing: documents::Outgoing,
}

impl Node {
    /// Assembles the node and starts its background tasks. Needs a Tokio runtime.
    pub(super) fn start(parts: Parts) -> Self {
        let Parts {
            opened,
            network,
            dht,
            expects_peers,
            calls,
            rates,
        } = parts;
        let mut tasks = JoinSet::new();
        let (advertiser, keep) = Advertiser::new(dht.clone(), network.clone());
        tasks.spawn(keep);
        let announcer = Announcer::new(advertiser.clone(), opened.store.clone());
        let discovery = Discovery::new(dht.clone(), network.clone());
        let (driver, driving) =
            Driver::new(opened.documents, discovery.clone(), advertiser.clone());
        let known = remembered::read(&opened.home.peers());
        let node = Self {
            inner: Arc::new(Inner {
                network,
                dht,
                store: opened.store,
                advertiser,
                announcer,
                sessions: Sessions::default(),
                offered: Offered::default(),
                serving: Serving::new(calls),
                discovery,
                topics: Mutex::default(),
                services: services::KnownServices::default(),
                resolved: Resolved::default(),
                runtime: Handle::current(),
                admission: Admission::default(),
                hub: Hub::default(),
                bandwidth: Arc::new(Bandwidth::new(rates)),
                turns: Turns::default(),
                ranks: Ranks::default(),
                reading: Reading::default(),
                driver,
                trusted: opened.trusted,
                followed: Arc::new(opened.followed),
                started: Instant::now(),
                expects_peers: expects_peers || !known.is_empty(),
                leases: Leases::default(),
                tasks: Mutex::default(),
                home: opened.home,
            }),
        };
        node.inner.answer(&mut tasks, driving.listener);
        let driver = Arc::clone(&node.inner.driver);
        tasks.spawn(documents::drive(driver, opened.outgoing, driving.called));
        tasks.spawn(driving.find_holders);
        tasks.spawn(remembered::find_back(
            node.inner.dht.clone(),
            node.inner.network.clone(),
            known,
        ));
        node.inner.keep_up(&mut tasks);
        *node
            .inner
            .tasks
            .lock()
            .expect("nothing panics while holding the lock") = tasks;
        node
    }
}

impl Inner {
    /// Answers the streams that peers open. None of these tasks holds a clone of the node.
    fn answer(&self, tasks: &mut JoinSet<()>, listener: documents::Listener) {
        let (store, bandwidth) = (self.store.clone(), Arc::clone(&self.bandwidth));
        let transfer = move |stream| serve_transfer(store.clone(), Arc::clone(&bandwidth), stream);
        let transfers = self.admission.transfers.clone();
        tasks.spawn(serve_all(self.incoming(BLOBS), transfers, transfer));
        let exchanger = Exchanger {
            hub: self.hub.clone(),
            network: self.network.clone(),
            store: self.store.clone(),
        };
        let exchange = move |stream| exchanger.clone().accept(stream);
        let exchanges = self.admission.exchanges.clone();
        tasks.spawn(serve_all(
            self.incoming(swarm::PROTOCOL),
            exchanges,
            exchange,
        ));
        let listen = move |stream| listener.clone().listen(stream);
        let documents = self.admission.documents.clone();
        tasks.spawn(serve_all(
            self.incoming(documents::PROTOCOL),
            documents,
            listen,
        ));
        let call = rpc::answering(self.offered.clone(), &self.serving);
        let sessions = self.serving.sessions().clone();
        tasks.spawn(serve_all(self.incoming(rpc::PROTOCOL), sessions, call));
    }

    fn incoming(&self, protocol: StreamProtocol) -> Incoming {
        self.network
            .accept(protocol)
            .expect("a new network accepts nothing yet")
    }

    /// Starts the tasks that renew records, find relays and remember peers. None of them holds a clone of the node.
    fn keep_up(&self, tasks: &mut JoinSet<()>) {
        let (dht, network) = (&self.dht, &self.network);
        tasks.spawn(documents::advertise_held(Arc::clone(&self.driver)));
        tasks.spawn(registry::keep_up(
            Arc::clone(&self.followed),
            Arc::clone(&self.driver),
        ));
        tasks.spawn(self.announcer.clone().announce_all());
        tasks.spawn(records::renew(dht.clone(), self.advertiser.clone()));
        let of_disk = self.store.clone();
        let free = move || of_disk.free().ok();
        tasks.spawn(self.home.reserve().clone().keep_up(free));
        tasks.spawn(remembered::remember(dht.clone(), self.home.peers()));
        tasks.spawn(known_addresses::report_reachability(
            dht.clone(),
            network.clone(),
        ));
        tasks.spawn(known_addresses::advertise(
            self.advertiser.clone(),
            network.clone(),
        ));
        tasks.spawn(relays::find_relays(self.discovery.clone()));
    }
}
