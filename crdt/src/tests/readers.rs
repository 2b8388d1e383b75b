//! The readers of a document, and the information for peers that may no longer read it.

use std::time::Duration;

use prost::Message;
use serde_json::{Value, json};
use weft_proto::wire::{self, document_message::Kind};

use super::{World, key};
use crate::{DocumentId, NewDocument, Output, Readers, Rights};

/// Nodes of a world in every order of their keys: the owner, a node that loses read access, a node that may read
/// from then on, and a stranger.
const CASTS: [[usize; 4]; 4] = [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]];

fn only(world: &mut World, owner: usize, id: DocumentId, readers: &[usize]) {
    let readers = readers.iter().map(|at| key(*at as u8)).collect();
    let rights = Rights {
        readers: Some(Readers::Named(readers)),
        ..Rights::default()
    };
    world.node(owner).decide(id, rights).unwrap();
    world.flush(owner).unwrap();
    world.settle();
}

fn readers(world: &mut World, at: usize, id: DocumentId) -> Option<Readers> {
    let details = world.node(at).info(id).unwrap().details;
    details.map(|details| details.readers)
}

fn hold(world: &mut World, at: usize, id: DocumentId) {
    world.node(at).hold(id).unwrap();
    world.flush(at).unwrap();
    world.settle();
}

/// Checks that the stranger has nothing of the document, whichever nodes it is connected to.
fn assert_gets_nothing(world: &mut World, stranger: usize, id: DocumentId) {
    hold(world, stranger, id);
    for _ in 0..3 {
        world.pass(Duration::from_secs(100));
        world.settle();
    }
    assert_eq!(world.node(stranger).info(id).unwrap().details, None);
    assert_eq!(world.get(stranger, id), Value::Null);
}

#[test]
fn a_node_that_is_shut_out_learns_of_it_and_sends_its_data_to_no_other_node() {
    for [owner, old, new, stranger] in CASTS {
        let mut world = World::connected(4, 1);
        let id = world.create(owner, NewDocument::default());
        hold(&mut world, old, id);
        hold(&mut world, new, id);
        world.edit(owner, id, "/before", 1);
        world.settle();
        only(&mut world, owner, id, &[new]);
        world.edit(owner, id, "/after", 1);
        world.settle();
        assert_eq!(world.get(new, id), json!({"before": 1, "after": 1}));
        assert_eq!(world.get(old, id), json!({"before": 1}));
        let named = Some(Readers::Named(vec![key(new as u8)]));
        assert_eq!(readers(&mut world, old, id), named);
        assert_gets_nothing(&mut world, stranger, id);
        world.restart(old);
        world.settle();
        assert_eq!(readers(&mut world, old, id), named);
        assert_gets_nothing(&mut world, stranger, id);
        world.assert_no_offence();
    }
}

#[test]
fn a_node_that_was_away_when_it_was_shut_out_learns_of_it_from_the_owner() {
    for [owner, old, new, stranger] in CASTS {
        for others in [0, 20] {
            let mut world = World::connected(4, 1);
            for _ in 0..others {
                // Other documents that the two share have no influence.
                let other = world.create(owner, NewDocument::default());
                hold(&mut world, old, other);
            }
            let id = world.create(owner, NewDocument::default());
            hold(&mut world, old, id);
            world.edit(owner, id, "/before", 1);
            world.settle();
            (0..4).for_each(|at| world.disconnect(old, at));
            only(&mut world, owner, id, &[new]);
            world.edit(owner, id, "/after", 1);
            assert_eq!(readers(&mut world, old, id), Some(Readers::Everybody));
            world.connect(old, owner);
            world.settle();
            let named = Some(Readers::Named(vec![key(new as u8)]));
            assert_eq!(readers(&mut world, old, id), named, "{owner} {others}");
            assert_eq!(world.get(old, id), json!({"before": 1}));
            world.disconnect(old, owner);
            world.connect(old, stranger);
            assert_gets_nothing(&mut world, stranger, id);
            world.assert_no_offence();
        }
    }
}

#[test]
fn a_node_that_is_shut_out_learns_of_it_also_after_a_compaction() {
    for [owner, old, new, stranger] in CASTS {
        let mut world = World::connected(4, 1);
        let id = world.create(owner, NewDocument::default());
        hold(&mut world, old, id);
        world.edit(owner, id, "/before", 1);
        world.settle();
        (0..4).for_each(|at| world.disconnect(old, at));
        only(&mut world, owner, id, &[new]);
        world.edit(owner, id, "/secret", 1);
        world.node(owner).compact(id).unwrap();
        world.flush(owner).unwrap();
        world.connect(old, owner);
        world.settle();
        let named = Some(Readers::Named(vec![key(new as u8)]));
        assert_eq!(readers(&mut world, old, id), named);
        assert_eq!(world.get(old, id), json!({"before": 1}));
        world.disconnect(old, owner);
        world.restart(old);
        assert_eq!(readers(&mut world, old, id), named);
        world.connect(old, stranger);
        assert_gets_nothing(&mut world, stranger, id);
        // Once it may read again, it gets all of the document.
        world.connect(old, owner);
        world.settle();
        only(&mut world, owner, id, &[old]);
        world.pass(Duration::from_secs(100));
        world.settle();
        world.assert_same(&[owner, old], id);
        world.assert_no_offence();
    }
}

#[test]
fn a_writer_that_is_revoked_and_shut_out_learns_of_it() {
    for [owner, old, new, _] in CASTS {
        let mut world = World::connected(4, 1);
        let new_document = NewDocument {
            writers: vec![key(old as u8)],
            readers: Readers::Named(Vec::new()),
            ..NewDocument::default()
        };
        let id = world.create(owner, new_document);
        hold(&mut world, old, id);
        world.edit(old, id, "/mine", 1);
        world.settle();
        (0..4).for_each(|at| world.disconnect(old, at));
        let rights = Rights {
            revoke: vec![key(old as u8)],
            readers: Some(Readers::Named(vec![key(new as u8)])),
            ..Rights::default()
        };
        world.node(owner).decide(id, rights).unwrap();
        world.flush(owner).unwrap();
        world.connect(old, owner);
        world.settle();
        let named = Some(Readers::Named(vec![key(new as u8)]));
        assert_eq!(readers(&mut world, old, id), named);
        world.assert_no_offence();
    }
}

#[test]
fn a_peer_that_never_had_a_part_of_a_document_does_not_learn_its_readers() {
    let mut world = World::connected(3, 1);
    let id = world.create(0, NewDocument::default());
    world.edit(0, id, "/secret", 1);
    only(&mut world, 0, id, &[1]);
    let stranger = key(7);
    world.node(0).connected(stranger);
    let document = bytes::Bytes::copy_from_slice(&id.0);
    let head = wire::SessionHead {
        session: vec![1; 32].into(),
        count: 1,
        chain: vec![1; 32].into(),
    };
    let says = [
        Kind::Summary(wire::Summary {
            document: document.clone(),
            answer: true,
            genesis: true,
            epochs: 1,
            epoch: document.clone(),
            sessions: vec![head],
            ..wire::Summary::default()
        }),
        Kind::Want(wire::Want {
            document: document.clone(),
            genesis: true,
            epochs: 1,
            ..wire::Want::default()
        }),
        Kind::News(wire::News {
            document: document.clone(),
            ..wire::News::default()
        }),
        Kind::Interest(wire::Interest {
            holds: document.clone(),
            ..wire::Interest::default()
        }),
    ];
    for kind in says {
        let message = wire::DocumentMessage { kind: Some(kind) }.encode_to_vec();
        world.node(0).receive(stranger, &message).unwrap();
        world.node(0).finish_round().unwrap();
        while let Some(output) = world.node(0).poll() {
            let Output::Send { peer, message } = output else {
                continue;
            };
            assert_eq!(peer, stranger);
            match wire::DocumentMessage::decode(message).unwrap().kind {
                // The stranger is asked for its summary, and gets no information.
                Some(Kind::Summary(summary)) => {
                    assert!(!summary.genesis && summary.sessions.is_empty());
                    assert_eq!((summary.epochs, summary.epoch.len()), (0, 0));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
