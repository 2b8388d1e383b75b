//! Twenty replicas under all faults except a liar, and one fault that looks like a liar: two machines that run from one
//! copied disk with one source of randomness. Each run follows from its seed. A failing one is printed, and `SEED=N
//! cargo test simulation` repeats it.

use std::{
    collections::BTreeMap,
    env,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use serde_json::{Value, json};

use super::{Disk, Faults, Node, World, at, identity, key, put};
use crate::{DocumentId, Edit, Error, Event, NewDocument, Readers, Rights};

const NODES: u8 = 20;

/// First of the nodes whose disks are restored from copies, so that acknowledged changes may be lost.
const STEADY: usize = 14;

/// The node that has the same key as the last one.
const TWIN: usize = 18;

struct Simulation {
    world: World,
    documents: Vec<DocumentId>,
    copies: BTreeMap<usize, Disk>,
    /// Acknowledged changes, by document and key: those of nodes whose disk is never restored and who are never
    /// revoked.
    acknowledged: Vec<(DocumentId, String)>,
    revoked: Vec<usize>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut world = World::new(NODES - 1, seed);
        // The twin has the same key, and the same randomness at its first start.
        world
            .nodes
            .push(Node::new(identity(TWIN as u8), Disk::default(), 0));
        let writers = |nodes: &[u8]| nodes.iter().map(|node| key(*node)).collect::<Vec<_>>();
        let all: Vec<u8> = (0..NODES - 1).collect();
        let documents = vec![
            world.create(
                0,
                NewDocument {
                    writers: writers(&all),
                    ..NewDocument::default()
                },
            ),
            world.create(
                1,
                NewDocument {
                    single_writer: true,
                    ..NewDocument::default()
                },
            ),
            world.create(
                2,
                NewDocument {
                    writers: writers(&[3, 4]),
                    readers: Readers::Named(writers(&[5, 6, 15])),
                    ..NewDocument::default()
                },
            ),
        ];
        for at in 0..usize::from(NODES) {
            for id in &documents {
                world.node(at).hold(*id).unwrap();
                world.flush(at).unwrap();
            }
        }
        world
            .commit(
                0,
                documents[0],
                &[put("/m", json!({})), put("/l", json!([]))],
            )
            .unwrap();
        let mut this = Self {
            world,
            documents,
            copies: BTreeMap::new(),
            acknowledged: Vec::new(),
            revoked: Vec::new(),
        };
        this.mesh();
        this
    }

    fn any(&mut self) -> usize {
        self.world.random.usize(..usize::from(NODES))
    }

    /// Creates about four links for each node, which connect all nodes.
    fn mesh(&mut self) {
        for at in 1..usize::from(NODES) {
            let other = self.world.random.usize(..at);
            self.world.connect(at, other);
        }
        for _ in 0..NODES {
            let (a, b) = (self.any(), self.any());
            if a != b {
                self.world.connect(a, b);
            }
        }
    }

    fn edit(&mut self, step: usize) {
        let at_node = self.any();
        let document = match self.world.random.u8(..10) {
            0..=6 => 0,
            7 | 8 => 1,
            _ => 2,
        };
        let id = self.documents[document];
        let name = format!("{at_node}-{step}");
        let random = self.world.random.u8(..6);
        let content = self.world.get(at_node, id);
        let length = content["l"].as_array().map_or(0, Vec::len);
        let edits = match random {
            0 => vec![Edit::Increment(at("/n"), 1)],
            1 if document == 0 && length > 0 => {
                let index = self.world.random.usize(..length);
                vec![Edit::Delete(at(&format!("/l/{index}")))]
            }
            2 if document == 0 && content["l"].is_array() => {
                let index = self.world.random.usize(..=length);
                vec![Edit::Insert(
                    at(&format!("/l/{index}")),
                    json!({ "by": at_node }),
                )]
            }
            3 => {
                let shared = self.world.random.u8(..8);
                vec![put(&format!("/s{shared}"), json!([at_node, step]))]
            }
            4 if content["m"].is_object() => vec![put(&format!("/m/{name}"), json!(step))],
            _ => vec![put(&format!("/{name}"), json!(step))],
        };
        match self.world.commit(at_node, id, &edits) {
            Ok(()) => {
                let mine = matches!(&edits[..], [Edit::Put(path, _)] if path.to_pointer() == format!("/{name}"));
                if mine && at_node < 10 {
                    self.acknowledged.push((id, name));
                }
            }
            Err(Error::NotWriter { .. } | Error::NotYet(_) | Error::Edit(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn step(&mut self, step: usize) {
        match self.world.random.u32(..1000) {
            0..=349 => self.edit(step),
            350..=379 => {
                let (a, b) = (self.any(), self.any());
                self.world.disconnect(a, b);
            }
            380..=419 => {
                let (a, b) = (self.any(), self.any());
                if a != b {
                    self.world.connect(a, b);
                }
            }
            420..=424 => {
                // All nodes on one side of a number lose those on the other side.
                let cut = self.any();
                for a in 0..cut {
                    (cut..usize::from(NODES)).for_each(|b| self.world.disconnect(a, b));
                }
            }
            425..=439 => {
                let node = self.any();
                self.world.restart(node);
            }
            440..=449 => {
                // Killed before its commit was on disk.
                let node = self.any();
                let id = self.documents[0];
                let _ = self
                    .world
                    .node(node)
                    .commit(id, &[put("/killed", json!(step))], None, 0);
                self.world.restart(node);
            }
            450..=459 => {
                let node = STEADY + self.world.random.usize(..usize::from(NODES) - STEADY - 2);
                match self.copies.remove(&node) {
                    None => _ = self.copies.insert(node, self.world.nodes[node].disk.copy()),
                    Some(copy) => self.world.restore(node, copy),
                }
            }
            460..=463 => {
                let (node, id) = [(0, 0), (1, 1), (2, 2)][self.world.random.usize(..3)];
                let _ = self.world.node(node).compact(self.documents[id]);
                self.world.flush(node).unwrap();
            }
            464..=466 => {
                let node = 10 + self.world.random.usize(..4);
                let rights = match self.revoked.iter().position(|one| *one == node) {
                    Some(position) => {
                        self.revoked.remove(position);
                        Rights {
                            add: vec![key(node as u8)],
                            ..Rights::default()
                        }
                    }
                    None => {
                        self.revoked.push(node);
                        Rights {
                            revoke: vec![key(node as u8)],
                            ..Rights::default()
                        }
                    }
                };
                self.world
                    .node(0)
                    .decide(self.documents[0], rights)
                    .unwrap();
                self.world.flush(0).unwrap();
            }
            467..=480 => {
                let time = Duration::from_secs(self.world.random.u64(..40));
                self.world.pass(time);
            }
            _ => {
                for _ in 0..self.world.random.usize(..40) {
                    self.world.deliver();
                }
            }
        }
    }

    /// Ends all faults: all nodes find each other, and no message is lost.
    fn heal(&mut self) {
        self.world.faults = Faults::default();
        self.mesh();
        // No node is linked to both twins, so each of them needs a node of its own.
        for at in 0..usize::from(NODES) {
            for other in 0..usize::from(NODES) {
                if self.world.linked(at).len() < 2 && at != other {
                    self.world.connect(at, other);
                }
            }
        }
        // A document with restricted readers is passed on only by its readers.
        for pair in [2, 3, 4, 5, 6, 15].windows(2) {
            self.world.connect(pair[0], pair[1]);
        }
        self.world.settle();
        for _ in 0..6 {
            self.world.pass(Duration::from_secs(61));
            self.world.settle();
        }
    }

    fn check(&mut self) {
        let all: Vec<usize> = (0..usize::from(NODES)).collect();
        let contents: Vec<Value> = [(0, all.clone()), (1, all), (2, vec![2, 3, 4, 5, 6, 15])]
            .into_iter()
            .map(|(document, nodes)| self.world.assert_same(&nodes, self.documents[document]))
            .collect();
        for at in [7, 16, TWIN] {
            assert_eq!(
                self.world.get(at, self.documents[2]),
                Value::Null,
                "node {at} may not read it"
            );
        }
        // A writer whose changes build on an equivocator's may lose those that it did not know to be void; they are
        // made again.
        for (id, name) in &self.acknowledged {
            let position = self.documents.iter().position(|other| other == id).unwrap();
            assert!(
                !contents[position][name].is_null(),
                "{name} was acknowledged"
            );
        }
        self.world.assert_no_offence();
    }
}

fn run(seed: u64) -> bool {
    let mut simulation = Simulation::new(seed);
    simulation.world.faults = Faults {
        drop: 8,
        repeat: 16,
        reorder: 64,
    };
    for step in 0..400 {
        simulation.step(step);
    }
    simulation.heal();
    simulation.check();
    let forked = |event: &Event| matches!(event, Event::Equivocated { .. });
    (0..usize::from(NODES)).any(|at| simulation.world.saw(at, forked))
}

#[test]
fn twenty_replicas_converge_whatever_happens() {
    if let Ok(seed) = env::var("SEED") {
        run(seed.parse().expect("SEED is a number"));
        return;
    }
    let seeds: u64 =
        env::var("SEEDS").map_or(20, |seeds| seeds.parse().expect("SEEDS is a number"));
    let (next, forked) = (AtomicU64::new(0), AtomicU64::new(0));
    // On all cores, because the seeds are independent.
    let play = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                return;
            }
            match std::panic::catch_unwind(|| run(seed)) {
                Ok(saw) => _ = forked.fetch_add(u64::from(saw), Ordering::Relaxed),
                Err(panic) => {
                    eprintln!("seed {seed} fails: SEED={seed} cargo test -p weft-crdt simulation");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        (1..cores).for_each(|_| _ = scope.spawn(play));
        play();
    });
    let forked = forked.into_inner();
    assert!(
        forked > 0 || seeds < 20,
        "the twins were detected in none of {seeds} runs"
    );
}

#[test]
fn a_seed_repeats_the_same_run() {
    let play = || {
        let mut simulation = Simulation::new(3);
        for step in 0..150 {
            simulation.step(step);
        }
        (
            simulation.world.sent,
            simulation.world.get(0, simulation.documents[0]),
        )
    };
    assert_eq!(play(), play());
}
