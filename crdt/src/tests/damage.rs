//! Damaged or unreadable data on disk, and its effect on other documents.

use std::time::Duration;

use prost::Message;
use serde_json::json;
use weft_proto::wire::{self, document_message::Kind};

use super::{Disk, World, at, identity, key as key_of, put};
use crate::{DocumentId, Documents, Error, NewDocument, Path, Replica, StoreError, store::key};

/// Damages the rows on disk whose number `bends` selects.
fn bend(replica: &mut Replica, prefix: &[u8], bends: impl Fn(usize) -> bool) {
    let rows = replica.store().scan(prefix, &[], usize::MAX).unwrap();
    assert!(!rows.is_empty());
    for (number, (key, mut value)) in rows.into_iter().enumerate() {
        if bends(number) {
            let last = value.len() - 1;
            value[last] ^= 0x55;
            value[last / 2] ^= 0x55;
            replica.store().put(key, value);
        }
    }
    replica.store().flush().unwrap();
}

fn open(disk: &Disk, entropy: u8) -> Replica {
    Replica::open(disk.open().unwrap(), identity(0), [entropy; 32]).unwrap()
}

/// Creates a replica with two documents of some changes each.
fn two_documents(disk: &Disk) -> (Replica, [DocumentId; 2]) {
    let mut replica = open(disk, 1);
    let ids = [0; 2].map(|_| replica.create(NewDocument::default()).unwrap());
    for id in ids {
        for number in 0..9 {
            let text = "x".repeat(400_000);
            let edit = put(&format!("/{number}"), json!(text));
            replica.commit(id, &[edit], None, 0).unwrap();
        }
    }
    replica.finish_round().unwrap();
    (replica, ids)
}

/// Returns the message of a peer that requests all of a document.
fn want(replica: &mut Replica, id: DocumentId) -> Vec<u8> {
    let (document, _) = replica.present(&id).unwrap();
    let sessions = document.heads().into_keys();
    let sessions = sessions.map(|session| wire::SessionHead {
        session: session.0.to_vec().into(),
        count: 0,
        chain: session.0.to_vec().into(),
    });
    let want = wire::Want {
        document: id.0.to_vec().into(),
        sessions: sessions.collect(),
        ..wire::Want::default()
    };
    wire::DocumentMessage {
        kind: Some(Kind::Want(want)),
    }
    .encode_to_vec()
}

fn is_damaged(failed: &Error, id: DocumentId) -> bool {
    matches!(failed, Error::Store(StoreError::Document { document, .. }) if *document == id)
}

#[tokio::test]
async fn a_commit_that_was_acknowledged_is_kept_when_another_document_turns_out_to_be_damaged() {
    let disk = Disk::default();
    let (mut replica, [x, y]) = two_documents(&disk);
    let want = want(&mut replica, x);
    bend(&mut replica, &key::log(&x), |number| number == 2);
    drop(replica);
    let (documents, _out) = Documents::start(open(&disk, 2)).unwrap();
    let peer = key_of(7);
    documents.connected(peer).await;
    // All of these are pending when the replica continues, so they are one batch.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (blocked, commit, received, also) = tokio::join!(
        documents.with(move |_| Ok(wait.recv())),
        documents.with(move |replica| replica.commit(y, &[put("/new", json!(1))], None, 0)),
        documents.received(peer, want.into()),
        async {
            let also =
                documents.with(move |replica| replica.commit(x, &[put("/new", json!(1))], None, 0));
            go.send(()).unwrap();
            also.await
        }
    );
    blocked.unwrap().unwrap();
    // The peer gets no answer, and the caller that changed the damaged document gets the error.
    received.unwrap();
    assert!(is_damaged(&also.unwrap_err(), x));
    commit.unwrap();
    drop(documents);
    let mut replica = open(&disk, 3);
    assert_eq!(replica.get(y, &at("/new")).unwrap(), Some(json!(1)));
    let failed = replica.get(x, &Path::default()).unwrap_err();
    assert!(is_damaged(&failed, x), "{failed}");
}

#[test]
fn a_disk_fault_is_reported_to_every_caller_whose_work_it_rolled_back() {
    let disk = Disk::default();
    let (mut replica, [x, y]) = two_documents(&disk);
    let want = want(&mut replica, x);
    drop(replica);
    let mut replica = open(&disk, 2);
    replica.connected(key_of(7));
    replica.finish_round().unwrap();
    while replica.poll().is_some() {}
    replica
        .commit(y, &[put("/new", json!(1))], None, 0)
        .unwrap();
    disk.fail_reads(true);
    assert!(replica.receive(key_of(7), &want).is_err());
    disk.fail_reads(false);
    // The operation that met the fault may drop the error; the flush does not.
    assert!(replica.finish_round().is_err());
    assert!(replica.poll().is_none());
    assert_eq!(replica.get(y, &at("/new")).unwrap(), None);
    // An unreadable document is left alone for a while, and does not affect the others.
    assert!(replica.info(x).unwrap().damage.is_some());
    disk.fail_reads(true);
    replica.receive(key_of(7), &want).unwrap();
    disk.fail_reads(false);
    replica
        .commit(y, &[put("/new", json!(2))], None, 0)
        .unwrap();
    replica.finish_round().unwrap();
    assert_eq!(replica.get(y, &at("/new")).unwrap(), Some(json!(2)));
    // Then it is tried again.
    replica.tick(Duration::from_secs(120), 0);
    replica.receive(key_of(7), &want).unwrap();
    replica.finish_round().unwrap();
    assert!(replica.get(x, &at("/8")).unwrap().is_some());
    assert_eq!(replica.info(x).unwrap().damage, None);
}

#[test]
fn an_operation_that_a_fault_interrupts_leaves_nothing_half_done() {
    let disk = Disk::default();
    let (replica, [x, _]) = two_documents(&disk);
    drop(replica);
    let mut replica = open(&disk, 2);
    disk.fail_reads(true);
    replica.remove(x).unwrap_err();
    disk.fail_reads(false);
    replica.finish_round().unwrap_err();
    assert!(replica.get(x, &at("/8")).unwrap().is_some());
}

/// Creates three nodes that share two documents, and lets `bends` damage the first one at node 1.
fn damaged(bends: impl Fn(&mut Replica, DocumentId)) -> (World, DocumentId, DocumentId) {
    let mut world = World::connected(3, 5);
    let (x, y) = (world.shared(&[0, 1, 2]), world.shared(&[0, 1, 2]));
    for step in 0..30 {
        world.edit(step % 3, x, &format!("/{step}"), step);
        world.settle();
    }
    world
        .node(0)
        .decide(
            x,
            crate::Rights {
                readers: Some(crate::Readers::Named(Vec::new())),
                ..crate::Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    let whole = world.assert_same(&[0, 1, 2], x);
    bends(world.node(1), x);
    world.restart(1);
    world.settle();
    // The document is neither read nor sent; the others are unaffected.
    let failed = world.node(1).get(x, &Path::default());
    if let Err(error) = failed {
        assert!(is_damaged(&error, x), "{error}");
        world.flush(1).unwrap();
        assert!(world.node(1).info(x).unwrap().damage.is_some());
        let failed = world.commit(1, x, &[put("/lost", json!(1))]).unwrap_err();
        assert!(is_damaged(&failed, x), "{failed}");
    } else {
        world.flush(1).unwrap();
    }
    world.edit(1, y, "/y", 1);
    world.edit(2, x, "/later", 1);
    world.settle();
    world.pass(Duration::from_secs(100));
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2], y), json!({"y": 1}));
    world.assert_no_offence();
    // After it is opened again, it has the same content as on the other nodes.
    world.node(1).hold(x).unwrap();
    world.flush(1).unwrap();
    world.settle();
    world.pass(Duration::from_secs(100));
    world.settle();
    let again = world.assert_same(&[0, 1, 2], x);
    assert_eq!(again["later"], json!(1));
    for (position, value) in whole.as_object().unwrap() {
        assert_eq!(&again[position], value);
    }
    world.edit(1, x, "/written", 1);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2], x)["written"], json!(1));
    world.assert_no_offence();
    (world, x, y)
}

#[test]
fn a_damaged_document_is_opened_again_and_gets_lost_data_from_peers() {
    damaged(|replica, x| bend(replica, &key::log(&x), |number| number % 7 == 3));
}

#[test]
fn damage_to_a_decision_or_the_genesis_affects_only_that_document() {
    damaged(|replica, x| bend(replica, &key::epochs(&x), |_| true));
    damaged(|replica, x| bend(replica, &key::document(&x), |_| true));
}

#[test]
fn the_readable_part_of_a_damaged_document_is_kept_without_any_peer() {
    let disk = Disk::default();
    let (mut replica, [x, _]) = two_documents(&disk);
    bend(&mut replica, &key::log(&x), |number| number == 3);
    drop(replica);
    let mut replica = open(&disk, 2);
    replica.get(x, &Path::default()).unwrap_err();
    replica.finish_round().unwrap();
    replica.hold(x).unwrap();
    replica.finish_round().unwrap();
    let content = replica.get(x, &Path::default()).unwrap().unwrap();
    let kept: Vec<_> = content.as_object().unwrap().keys().cloned().collect();
    assert_eq!(kept, ["0", "1", "2"]);
    replica.commit(x, &[put("/3", json!(3))], None, 0).unwrap();
    replica.finish_round().unwrap();
    drop(replica);
    let mut replica = open(&disk, 3);
    assert_eq!(replica.get(x, &at("/3")).unwrap(), Some(json!(3)));
    replica.assert_loads(x);
}

#[test]
fn a_listing_loads_no_document_and_files_of_earlier_versions_are_listed() {
    let disk = Disk::default();
    let (mut replica, ids) = two_documents(&disk);
    replica.compact(ids[1]).unwrap();
    replica.finish_round().unwrap();
    let known = replica.list().unwrap();
    assert_eq!(known.len(), 2);
    drop(replica);
    let mut replica = open(&disk, 2);
    assert_eq!(replica.list().unwrap(), known);
    assert_eq!(replica.loaded(), 0);
    // Earlier versions stored no figures, and saves without their sessions.
    for id in ids {
        let doc = replica.present(&id).unwrap().0.automerge().save();
        replica.store().put(key::save(&id), doc);
        replica.store().delete(key::figures(&id));
    }
    replica.store().flush().unwrap();
    drop(replica);
    let mut replica = open(&disk, 3);
    assert_eq!(replica.list().unwrap(), known);
    replica.finish_round().unwrap();
    ids.iter().for_each(|id| replica.assert_loads(*id));
    drop(replica);
    // Once created, the figures are on disk.
    let mut replica = open(&disk, 4);
    assert_eq!(replica.list().unwrap(), known);
    assert_eq!(replica.loaded(), 0);
    // They match the document's current state.
    replica
        .commit(ids[0], &[put("/new", json!(1))], None, 0)
        .unwrap();
    let changes = |replica: &mut Replica| {
        let info = replica.info(ids[0]).unwrap();
        info.details.unwrap().changes
    };
    assert_eq!(changes(&mut replica), 10);
    replica.finish_round().unwrap();
    drop(replica);
    assert_eq!(changes(&mut open(&disk, 5)), 10);
}

#[test]
fn loading_reads_only_the_log_after_the_last_save() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    for step in 0..700 {
        let node = usize::from(step % 10 == 0);
        world.edit(node, id, &format!("/{}", step % 50), step);
        if step % 5 == 0 {
            world.settle();
        }
    }
    world.settle();
    let (whole, known) = (
        world.assert_same(&[0, 1], id),
        world.node(0).info(id).unwrap(),
    );
    // Log rows that the save covers are not read, so damage to them is noticed only when a peer requests them.
    bend(world.node(0), &key::log(&id), |number| number == 1);
    world.restart(0);
    assert_eq!(world.get(0, id), whole);
    assert_eq!(world.node(0).info(id).unwrap(), known);
    world.edit(0, id, "/again", 1);
    world.settle();
    world.assert_same(&[0, 1], id);
    // Without the save, all of the log is read.
    let save = key::save(&id);
    world.node(0).store().delete(save);
    world.node(0).store().flush().unwrap();
    world.restart(0);
    let failed = world.node(0).get(id, &Path::default()).unwrap_err();
    assert!(is_damaged(&failed, id), "{failed}");
}

#[test]
fn a_save_that_does_not_match_the_log_is_ignored() {
    let disk = Disk::default();
    let (mut replica, [x, y]) = two_documents(&disk);
    for id in [x, y] {
        for number in 0..20 {
            let edit = put(&format!("/more{number}"), json!(number));
            replica.commit(id, &[edit], None, 0).unwrap();
        }
        let (document, store) = replica.present(&id).unwrap();
        document.save(store, true);
    }
    replica.finish_round().unwrap();
    let whole = replica.get(x, &Path::default()).unwrap();
    // The save of another document, which is valid on its own.
    let other = replica.store().get(&key::save(&y)).unwrap().unwrap();
    replica.store().put(key::save(&x), other);
    replica.store().flush().unwrap();
    drop(replica);
    let mut replica = open(&disk, 2);
    assert_eq!(replica.get(x, &Path::default()).unwrap(), whole);
    replica.assert_loads(x);
}

#[test]
fn documents_in_memory_are_limited_by_bytes_and_continue_their_session() {
    let mut world = World::connected(2, 1);
    world.node(0).keep_loaded(1 << 20);
    let ids: Vec<_> = (0..12).map(|_| world.shared(&[0, 1])).collect();
    for round in 0..4 {
        for id in &ids {
            let text = "x".repeat(50_000);
            world.edit(0, *id, &format!("/{round}"), text);
            world.settle();
        }
    }
    let loaded = world.node(0).loaded();
    assert!((1..10).contains(&loaded), "{loaded}");
    for id in ids {
        world.assert_same(&[0, 1], id);
        let sessions = world.node(0).present(&id).unwrap().0.heads().len();
        assert_eq!(sessions, 1, "unloading begins no session");
    }
}
