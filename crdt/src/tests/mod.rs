//! Simulated replicas: links that drop, repeat and reorder messages, disks that can be copied and restored, and
//! crashes. Every run follows from a seed.

mod arrival;
mod batches;
mod byzantine;
mod convergence;
mod damage;
mod files;
mod mutants;
mod promises;
mod readers;
mod simulation;

use std::{collections::BTreeSet, ops::Deref, sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use weft_disk::testing;

use crate::{
    DocumentId, Edit, Error, Event, Identity, Key, NewDocument, Output, Path, Replica, Store,
    StoreError,
};

/// A disk in memory that outlives the replicas on it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk(testing::Disk);

impl Deref for Disk {
    type Target = testing::Disk;

    fn deref(&self) -> &testing::Disk {
        &self.0
    }
}

impl Disk {
    pub(crate) fn copy(&self) -> Self {
        Self(self.0.copy())
    }

    pub(crate) fn lose_power(&self, random: &mut fastrand::Rng) -> Self {
        Self(self.0.lose_power(&mut |below| random.usize(..below)))
    }

    pub(crate) fn open(&self) -> Result<Store, StoreError> {
        let disk = self.0.clone();
        Store::open_with(Arc::new(move || {
            let mut builder = redb::Builder::new();
            builder.set_cache_size(1 << 20);
            builder.create_with_backend(disk.clone())
        }))
    }
}

pub(crate) fn identity(number: u8) -> Identity {
    Identity::from_secret([number + 1; 32])
}

pub(crate) fn key(number: u8) -> Key {
    identity(number).key()
}

pub(crate) fn at(path: &str) -> Path {
    Path::parse(path).unwrap()
}

pub(crate) fn put(path: &str, value: Value) -> Edit {
    Edit::Put(at(path), value)
}

pub(crate) struct Node {
    replica: Option<Replica>,
    disk: Disk,
    identity: Identity,
    starts: u8,
    events: Vec<Event>,
    offences: Vec<(Key, String)>,
}

impl Node {
    fn new(identity: Identity, disk: Disk, starts: u8) -> Self {
        let mut this = Self {
            replica: None,
            disk,
            identity,
            starts,
            events: Vec::new(),
            offences: Vec::new(),
        };
        this.start();
        this
    }

    fn start(&mut self) {
        self.starts += 1;
        let mut entropy = self.identity.key().0;
        entropy[31] ^= self.starts;
        self.replica = None;
        let store = self.disk.open().expect("the disk can be opened");
        self.replica =
            Some(Replica::open(store, self.identity.clone(), entropy).expect("documents are read"));
    }

    pub(crate) fn replica(&mut self) -> &mut Replica {
        self.replica.as_mut().expect("it runs")
    }
}

/// Probabilities of link faults, in 256ths.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    drop: u8,
    repeat: u8,
    reorder: u8,
}

pub(crate) struct World {
    nodes: Vec<Node>,
    links: BTreeSet<(usize, usize)>,
    flying: Vec<(usize, usize, Bytes)>,
    faults: Faults,
    random: fastrand::Rng,
    now: Duration,
    sent: (usize, usize),
}

impl World {
    pub(crate) fn new(nodes: u8, seed: u64) -> Self {
        let node = |number| Node::new(identity(number), Disk::default(), 0);
        Self {
            nodes: (0..nodes).map(node).collect(),
            links: BTreeSet::new(),
            flying: Vec::new(),
            faults: Faults::default(),
            random: fastrand::Rng::with_seed(seed),
            now: Duration::ZERO,
            sent: (0, 0),
        }
    }

    /// Creates nodes that are all connected to each other.
    pub(crate) fn connected(nodes: u8, seed: u64) -> Self {
        let mut this = Self::new(nodes, seed);
        for a in 0..this.nodes.len() {
            (0..a).for_each(|b| this.connect(a, b));
        }
        this
    }

    pub(crate) fn node(&mut self, at: usize) -> &mut Replica {
        self.nodes[at].replica()
    }

    pub(crate) fn connect(&mut self, a: usize, b: usize) {
        // A key identifies a peer, so two nodes with one key can be connected neither to each other nor to the same
        // third node.
        let keys = (self.nodes[a].identity.key(), self.nodes[b].identity.key());
        let has = |of: usize, key: Key| {
            self.linked(of)
                .iter()
                .any(|peer| self.nodes[*peer].identity.key() == key)
        };
        if keys.0 == keys.1
            || has(a, keys.1)
            || has(b, keys.0)
            || !self.links.insert((a.min(b), a.max(b)))
        {
            return;
        }
        for (one, other) in [(a, keys.1), (b, keys.0)] {
            self.node(one).connected(other);
            self.flush(one).unwrap();
        }
    }

    pub(crate) fn disconnect(&mut self, a: usize, b: usize) {
        if !self.links.remove(&(a.min(b), a.max(b))) {
            return;
        }
        self.flying
            .retain(|(from, to, _)| (*from.min(to), *from.max(to)) != (a.min(b), a.max(b)));
        for (one, other) in [(a, b), (b, a)] {
            let key = self.nodes[other].identity.key();
            self.node(one).disconnected(&key);
            self.flush(one).unwrap();
        }
    }

    fn linked(&self, at: usize) -> Vec<usize> {
        let other = |(a, b): &(usize, usize)| match at {
            at if *a == at => Some(*b),
            at if *b == at => Some(*a),
            _ => None,
        };
        self.links.iter().filter_map(other).collect()
    }

    /// Kills a node and starts it again. Unflushed changes and messages in transit are lost.
    pub(crate) fn restart(&mut self, at: usize) {
        let peers = self.linked(at);
        for peer in &peers {
            self.links.remove(&(at.min(*peer), at.max(*peer)));
            let key = self.nodes[at].identity.key();
            self.node(*peer).disconnected(&key);
            self.flush(*peer).unwrap();
        }
        self.flying.retain(|(from, to, _)| *from != at && *to != at);
        self.nodes[at].start();
        peers.into_iter().for_each(|peer| self.connect(at, peer));
    }

    /// Continues a node from a disk that was copied before.
    pub(crate) fn restore(&mut self, at: usize, disk: Disk) {
        self.nodes[at].disk = disk;
        self.restart(at);
    }

    /// Writes a node's changes to disk, and puts its messages on the links.
    pub(crate) fn flush(&mut self, at: usize) -> Result<(), StoreError> {
        let has_forked = |event: &Event| matches!(event, Event::Equivocated { .. });
        if self.nodes[at].events.iter().any(has_forked) {
            // Machines that were copies of each other use their own randomness from here on.
            let mut entropy = [0; 32];
            self.random.fill(&mut entropy);
            self.node(at).stir(entropy);
        }
        let flushed = self.node(at).finish_round();
        while let Some(output) = self.node(at).poll() {
            match output {
                Output::Send { peer, message } => {
                    assert!(
                        message.len() <= crate::MAX_MESSAGE_BYTES,
                        "a message is too long"
                    );
                    let to = self
                        .linked(at)
                        .into_iter()
                        .find(|to| self.nodes[*to].identity.key() == peer);
                    if let Some(to) = to {
                        self.sent = (self.sent.0 + 1, self.sent.1 + message.len());
                        self.flying.push((at, to, message));
                    }
                }
                Output::Event(event) => self.nodes[at].events.push(event),
                Output::Offence { peer, why } => self.nodes[at].offences.push((peer, why)),
            }
        }
        flushed
    }

    /// Delivers one message. Returns false if there was none.
    pub(crate) fn deliver(&mut self) -> bool {
        if self.flying.is_empty() {
            return false;
        }
        let chance = |random: &mut fastrand::Rng, of: u8| random.u8(..) < of;
        let position = match chance(&mut self.random, self.faults.reorder) {
            true => self.random.usize(..self.flying.len()),
            false => 0,
        };
        let (from, to, message) = match chance(&mut self.random, self.faults.repeat) {
            true => self.flying[position].clone(),
            false => self.flying.remove(position),
        };
        if chance(&mut self.random, self.faults.drop) {
            return true;
        }
        let key = self.nodes[from].identity.key();
        self.node(to).receive(key, &message).unwrap();
        self.flush(to).unwrap();
        true
    }

    /// Delivers messages until none is in transit.
    pub(crate) fn settle(&mut self) {
        let bound = 100_000;
        for _ in 0..bound {
            if !self.deliver() {
                return;
            }
        }
        for (from, to, message) in self.flying.iter().take(12) {
            let message: weft_proto::wire::DocumentMessage =
                prost::Message::decode(&message[..]).unwrap();
            let mut text = format!("{message:?}");
            text.truncate(300);
            eprintln!("{from} to {to}: {text}");
        }
        panic!("messages are exchanged without end");
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        for at in 0..self.nodes.len() {
            let now = self.now;
            self.node(at).tick(now, now.as_secs() as i64);
            self.flush(at).unwrap();
        }
    }

    pub(crate) fn create(&mut self, at: usize, new: NewDocument) -> DocumentId {
        let id = self.node(at).create(new).unwrap();
        self.flush(at).unwrap();
        id
    }

    /// Creates a document at the first of these nodes, which all write it. All nodes hold it.
    pub(crate) fn shared(&mut self, writers: &[usize]) -> DocumentId {
        let keys = writers
            .iter()
            .map(|at| self.nodes[*at].identity.key())
            .collect();
        let id = self.create(
            writers[0],
            NewDocument {
                writers: keys,
                ..NewDocument::default()
            },
        );
        for at in 0..self.nodes.len() {
            self.node(at).hold(id).unwrap();
            self.flush(at).unwrap();
        }
        self.settle();
        id
    }

    /// Creates a document at the first of these nodes, which all write and hold it. Other nodes may read it.
    pub(crate) fn shared_by(&mut self, writers: &[usize]) -> DocumentId {
        let keys = writers
            .iter()
            .map(|at| self.nodes[*at].identity.key())
            .collect();
        let new = NewDocument {
            writers: keys,
            ..NewDocument::default()
        };
        let id = self.create(writers[0], new);
        for at in &writers[1..] {
            self.node(*at).hold(id).unwrap();
            self.flush(*at).unwrap();
            self.connect(writers[0], *at);
            self.settle();
            self.disconnect(writers[0], *at);
        }
        id
    }

    pub(crate) fn commit(
        &mut self,
        at: usize,
        id: DocumentId,
        edits: &[Edit],
    ) -> Result<(), Error> {
        let time = self.now.as_secs() as i64;
        self.node(at).commit(id, edits, None, time)?;
        Ok(self.flush(at)?)
    }

    pub(crate) fn edit(&mut self, at: usize, id: DocumentId, path: &str, value: impl Into<Value>) {
        self.commit(at, id, &[put(path, value.into())]).unwrap();
    }

    pub(crate) fn get(&mut self, at: usize, id: DocumentId) -> Value {
        match self.node(at).get(id, &Path::default()) {
            Ok(value) => value.unwrap(),
            Err(Error::NotYet(_) | Error::Unknown(_)) => json!(null),
            Err(error) => panic!("{error}"),
        }
    }

    /// Checks that all `nodes` have the same data, and that it loads.
    pub(crate) fn assert_same(&mut self, nodes: &[usize], id: DocumentId) -> Value {
        let content = self.get(nodes[0], id);
        let digest =
            |this: &mut Self, at: usize| this.node(at).info(id).unwrap().details.unwrap().digest;
        let first = digest(self, nodes[0]);
        for at in nodes {
            if digest(self, *at) != first {
                for at in [nodes[0], *at] {
                    let (document, _) = self.node(at).document(&id).unwrap().unwrap();
                    let epochs: Vec<_> = document
                        .epochs
                        .iter()
                        .map(|epoch| (epoch.number, epoch.id))
                        .collect();
                    eprintln!(
                        "{at} has {epochs:?} {:?} {:?} and waits for {:?}",
                        document.heads(),
                        document.forks(),
                        document.waiting()
                    );
                }
            }
            assert_eq!(
                digest(self, *at),
                first,
                "node {at} has other data than node {}",
                nodes[0]
            );
            assert_eq!(
                self.get(*at, id),
                content,
                "node {at} shows other content than node {}",
                nodes[0]
            );
            self.node(*at).assert_loads(id);
        }
        content
    }

    pub(crate) fn assert_no_offence(&self) {
        for (at, node) in self.nodes.iter().enumerate() {
            assert!(
                node.offences.is_empty(),
                "node {at} reports {:?}",
                node.offences
            );
        }
    }

    pub(crate) fn saw(&self, at: usize, event: impl Fn(&Event) -> bool) -> bool {
        self.nodes[at].events.iter().any(event)
    }
}
