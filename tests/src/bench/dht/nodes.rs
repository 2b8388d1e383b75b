//! The benchmark's view of a node of either side, on any platform.

use std::{collections::HashMap, net::Ipv4Addr, time::Duration};

use libp2p::{
    PeerId, StreamProtocol,
    identity::Keypair,
    kad::{self, GetProvidersOk, GetRecordOk, QueryId, QueryResult, Quorum, store::MemoryStore},
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use weft_dht::Dht;

use crate::Random;

/// Longest wait for an operation: longer than a lookup.
const PATIENCE: Duration = Duration::from_secs(60);

/// Lifetime of records: longer than the benchmark.
const TTL: Duration = Duration::from_secs(4 * 3600);

/// Most operations of a stock node that may wait.
pub(super) const ASKS: usize = 64;

/// An operation of a stock node.
pub(super) enum Ask {
    Put(Vec<u8>, oneshot::Sender<bool>),
    Get(Vec<u8>, oneshot::Sender<bool>),
    Provide(Vec<u8>, oneshot::Sender<bool>),
    Find(Vec<u8>, oneshot::Sender<bool>),
    Nodes(oneshot::Sender<usize>),
    Members(oneshot::Sender<Vec<PeerId>>),
}

/// A handle to a node.
#[derive(Clone)]
pub(super) enum Handle {
    Ours(Box<Dht>),
    Stock(mpsc::Sender<Ask>),
}

/// Returns the address of the node with this number. Each node is in a network of its own.
pub(super) fn place(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(0x1400_0001 + 256 * n as u32)
}

/// Returns a key pair that depends only on the random numbers.
pub(super) fn keys(random: &mut Random) -> Keypair {
    let secret = std::array::from_fn::<u8, 32, _>(|_| random.below(256) as u8);
    Keypair::ed25519_from_bytes(secret).expect("any 32 bytes are a key")
}

/// libp2p-kad with its defaults, as a server that does not refresh its routing table periodically.
pub(super) fn stock(peer: PeerId) -> kad::Behaviour<MemoryStore> {
    let mut config = kad::Config::new(StreamProtocol::new("/weft/kad/1"));
    // Neither side refreshes while it is measured.
    config.set_periodic_bootstrap_interval(None);
    let mut kad = kad::Behaviour::with_config(peer, MemoryStore::new(peer), config);
    kad.set_mode(Some(kad::Mode::Server));
    kad
}

/// Pending queries of a stock node, with the receivers of their results.
#[derive(Default)]
pub(super) struct Queries(HashMap<QueryId, oneshot::Sender<bool>>);

impl Queries {
    pub(super) fn ask(&mut self, kad: &mut kad::Behaviour<MemoryStore>, ask: Ask) {
        match ask {
            Ask::Put(key, reply) => {
                let record = kad::Record::new(key, vec![7; 100]);
                // If the node's own store is full, the query has failed: the reply is dropped.
                if let Ok(id) = kad.put_record(record, Quorum::One) {
                    self.0.insert(id, reply);
                }
            }
            Ask::Get(key, reply) => {
                let id = kad.get_record(kad::RecordKey::new(&key));
                self.0.insert(id, reply);
            }
            Ask::Provide(key, reply) => {
                if let Ok(id) = kad.start_providing(kad::RecordKey::new(&key)) {
                    self.0.insert(id, reply);
                }
            }
            Ask::Find(key, reply) => {
                let id = kad.get_providers(kad::RecordKey::new(&key));
                self.0.insert(id, reply);
            }
            Ask::Nodes(reply) => {
                let nodes = kad.kbuckets().map(|bucket| bucket.num_entries()).sum();
                let _ = reply.send(nodes);
            }
            Ask::Members(reply) => {
                let mut members = Vec::new();
                for bucket in kad.kbuckets() {
                    members.extend(bucket.iter().map(|e| *e.node.key.preimage()));
                }
                let _ = reply.send(members);
            }
        }
    }

    pub(super) fn on_event(&mut self, kad: &mut kad::Behaviour<MemoryStore>, event: kad::Event) {
        let kad::Event::OutboundQueryProgressed {
            id, result, step, ..
        } = event
        else {
            return;
        };
        let done =
            match result {
                QueryResult::GetRecord(Ok(GetRecordOk::FoundRecord(_))) => Some(true),
                QueryResult::PutRecord(result) => Some(result.is_ok()),
                QueryResult::StartProviding(result) => Some(result.is_ok()),
                QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders {
                    providers, ..
                })) if !providers.is_empty() => Some(true),
                _ if step.last => Some(false),
                _ => None,
            };
        if let Some(done) = done
            && let Some(reply) = self.0.remove(&id)
        {
            // The receiver may have stopped waiting.
            let _ = reply.send(done);
            if let Some(mut query) = kad.query_mut(&id) {
                query.finish();
            }
        }
    }
}

impl Handle {
    /// Runs an operation on a stock node.
    async fn ask<T>(
        asks: &mpsc::Sender<Ask>,
        ask: impl FnOnce(oneshot::Sender<T>) -> Ask,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        asks.send(ask(reply)).await.ok()?;
        answer.await.ok()
    }

    pub(super) async fn put(&self, key: Vec<u8>) -> bool {
        let put = async {
            match self {
                Self::Ours(dht) => {
                    let took = dht.publish(&key, b"", &[7; 100], TTL).await;
                    took.is_ok_and(|took| took > 0)
                }
                Self::Stock(asks) => {
                    Self::ask(asks, |reply| Ask::Put(key, reply)).await == Some(true)
                }
            }
        };
        timeout(PATIENCE, put).await == Ok(true)
    }

    pub(super) async fn get(&self, key: Vec<u8>) -> bool {
        let get = async {
            match self {
                Self::Ours(dht) => {
                    let records = dht.get_some(&key).await;
                    records.is_ok_and(|records| !records.is_empty())
                }
                Self::Stock(asks) => {
                    Self::ask(asks, |reply| Ask::Get(key, reply)).await == Some(true)
                }
            }
        };
        timeout(PATIENCE, get).await == Ok(true)
    }

    /// Advertises that the node has something, as one of many such things.
    pub(super) async fn provide(&self, key: Vec<u8>) -> bool {
        let provide = async {
            match self {
                Self::Ours(dht) => {
                    let took = dht.publish_near(&key, b"", &[7; 100], TTL).await;
                    took.is_ok_and(|took| took > 0)
                }
                Self::Stock(asks) => {
                    Self::ask(asks, |reply| Ask::Provide(key, reply)).await == Some(true)
                }
            }
        };
        timeout(PATIENCE, provide).await == Ok(true)
    }

    pub(super) async fn find(&self, key: Vec<u8>) -> bool {
        match self {
            Self::Ours(_) => self.get(key).await,
            Self::Stock(asks) => {
                let find = Self::ask(asks, |reply| Ask::Find(key, reply));
                timeout(PATIENCE, find).await == Ok(Some(true))
            }
        }
    }

    /// Returns the number of nodes in the routing table.
    pub(super) async fn nodes(&self) -> usize {
        match self {
            Self::Ours(dht) => *dht.nodes().borrow(),
            Self::Stock(asks) => Self::ask(asks, Ask::Nodes).await.unwrap_or(0),
        }
    }

    /// Returns the nodes in the routing table.
    pub(super) async fn members(&self) -> Vec<PeerId> {
        match self {
            Self::Ours(dht) => {
                let routes = dht.routes(usize::MAX).await.unwrap_or_default();
                let peers = routes.into_iter().map(weft_net::split_peer_id);
                let mut peers: Vec<_> = peers.filter_map(|(_, peer)| peer).collect();
                peers.sort();
                peers.dedup();
                peers
            }
            Self::Stock(asks) => Self::ask(asks, Ask::Members).await.unwrap_or_default(),
        }
    }
}
