//! Remembers the results of recent lookups: the nodes near a key, which are near its neighbors as well.
//!
//! A publisher that renews ten thousand records in the order of their positions does not need a lookup for each. One
//! lookup finds the nodes of a region of the key space.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use libp2p::{PeerId, kad::KBucketKey};

use crate::lookup::{Candidate, WIDTH};

/// Time for which a result is used.
const FRESH: Duration = Duration::from_secs(600);

/// Most regions that are remembered.
const MAX_REGIONS: usize = 64;

/// Number of nodes near a key that must be known for certain to skip the lookup.
const SURE: usize = WIDTH / 2;

#[derive(Debug)]
struct Region {
    key: KBucketKey<Vec<u8>>,
    nodes: Vec<(KBucketKey<PeerId>, Candidate)>,
    found: Instant,
}

impl Region {
    /// Returns true if this region contains the nodes nearest to `target`.
    ///
    /// All nodes nearer to the region's key than the farthest known one are known. Therefore all nodes that share more
    /// leading bits with the key than the farthest node are known. A target that shares these bits too has the same
    /// nearest nodes.
    fn covers(&self, target: &KBucketKey<Vec<u8>>) -> bool {
        // In a mesh this small, the lookup has found all nodes.
        if self.nodes.len() < WIDTH {
            return true;
        }
        let distances = self.nodes.iter().map(|(node, _)| self.key.distance(node));
        let distances: Vec<_> = distances.map(|distance| distance.ilog2()).collect();
        let farthest = distances.iter().max().copied().flatten();
        let sure = distances.iter().filter(|bits| **bits < farthest).count();
        sure >= SURE && self.key.distance(target).ilog2() < farthest
    }
}

/// The regions of the key space that are known.
#[derive(Debug, Default)]
pub(crate) struct Regions(VecDeque<Region>);

impl Regions {
    /// Adds the result of a lookup for `key`.
    pub(crate) fn learn(&mut self, key: &[u8], nodes: &[Candidate], now: Instant) {
        self.0.retain(|region| now < region.found + FRESH);
        if self.0.len() >= MAX_REGIONS {
            self.0.pop_front();
        }
        self.0.push_back(Region {
            key: KBucketKey::new(key.to_vec()),
            nodes: nodes
                .iter()
                .map(|node| (node.peer.into(), node.clone()))
                .collect(),
            found: now,
        });
    }

    /// Returns the nodes near `key`, nearest first, if they are known.
    pub(crate) fn near(&self, key: &[u8], now: Instant) -> Option<Vec<Candidate>> {
        let target = KBucketKey::new(key.to_vec());
        let fresh = self.0.iter().rev().filter(|r| now < r.found + FRESH);
        let region = fresh
            .filter(|region| !region.nodes.is_empty())
            .find(|r| r.covers(&target))?;
        let mut nodes = region.nodes.clone();
        nodes.sort_by_key(|(node, _)| target.distance(node));
        Some(nodes.into_iter().map(|(_, node)| node).collect())
    }

    /// Notes a newly met node: regions in which it is one of the nearest are outdated.
    pub(crate) fn met(&mut self, peer: PeerId) {
        let node = KBucketKey::from(peer);
        self.0.retain(|region| {
            let distances = region
                .nodes
                .iter()
                .map(|(other, _)| region.key.distance(other));
            let is_far = distances.max() < Some(region.key.distance(&node));
            let is_known = region.nodes.iter().any(|(_, known)| known.peer == peer);
            is_known || (region.nodes.len() >= WIDTH && is_far)
        });
    }

    /// Notes a node that is gone or refuses records.
    pub(crate) fn forget(&mut self, peer: PeerId) {
        // Other nodes are then the nearest.
        let is_of_it = |region: &Region| region.nodes.iter().any(|(_, node)| node.peer == peer);
        self.0.retain(|region| !is_of_it(region));
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    #[test]
    fn records_of_neighboring_keys_are_stored_at_the_nodes_that_a_lookup_finds() {
        let key = |n: u16| {
            let mut secret = [0; 32];
            secret[..2].copy_from_slice(&n.to_le_bytes());
            Keypair::ed25519_from_bytes(secret).unwrap().public()
        };
        let nodes = (0..1000).map(|n| Candidate {
            peer: key(n).to_peer_id(),
            addresses: Vec::new(),
            networks: Vec::new(),
            redial: false,
            suspect: false,
        });
        let nodes: Vec<_> = nodes.collect();
        let nearest = |key: &[u8]| -> Vec<Candidate> {
            let target = KBucketKey::new(key.to_vec());
            let mut nodes = nodes.clone();
            nodes.sort_by_key(|node| target.distance(&KBucketKey::from(node.peer)));
            nodes.truncate(WIDTH);
            nodes
        };
        let now = Instant::now();
        let mut regions = Regions::default();
        let mut keys: Vec<_> = (0..2000).map(|n| format!("key {n}").into_bytes()).collect();
        keys.sort_by_key(|key| crate::key_position(key));
        let (mut looked_up, mut least) = (0, WIDTH);
        for key in keys {
            match regions.near(&key, now) {
                Some(near) => {
                    let right = nearest(&key);
                    let is_right = |node: &&Candidate| right.iter().any(|r| r.peer == node.peer);
                    let common = near.iter().filter(is_right).count();
                    least = least.min(common);
                }
                None => {
                    looked_up += 1;
                    regions.learn(&key, &nearest(&key), now);
                }
            }
        }
        assert!(least >= SURE, "{least}");
        assert!(looked_up <= 250, "{looked_up}");
        // A region is forgotten after a time, or when one of its nodes is gone.
        let key = b"key 1";
        regions.learn(key, &nearest(key), now);
        assert!(regions.near(key, now).is_some());
        assert!(regions.near(key, now + FRESH).is_none());
        let before = regions.0.len();
        regions.forget(nearest(key)[3].peer);
        assert!(regions.0.len() < before);
        // In a small mesh all nodes are known, until another one joins.
        regions.0.clear();
        regions.learn(key, &nodes[..5], now);
        assert_eq!(regions.near(b"another", now).unwrap().len(), 5);
        regions.met(nodes[4].peer);
        assert!(regions.near(b"another", now).is_some());
        regions.met(nodes[5].peer);
        assert!(regions.near(b"another", now).is_none());
        // In a large mesh, a new node matters only near the key.
        let near = nearest(key);
        regions.learn(key, &near, now);
        let far = nodes
            .iter()
            .find(|node| near.iter().all(|n| n.peer != node.peer));
        regions.met(far.unwrap().peer);
        assert_eq!(regions.0.len(), 1);
    }
}
