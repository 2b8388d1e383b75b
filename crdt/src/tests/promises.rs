//! The guarantees of documents among honest peers.

use std::time::Duration;

use serde_json::json;

use super::{Disk, Node, World, at, identity, key, put};
use crate::{
    DocumentId, Edit, EditError, Error, Event, NewDocument, Path, Readers, Replica, Rights,
    StoreError,
};

#[test]
fn changes_of_one_node_are_read_by_the_others() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/a", 1);
    world.edit(1, id, "/b", json!({"c": [1, 2]}));
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1, 2], id),
        json!({"a": 1, "b": {"c": [1, 2]}})
    );
    world.assert_no_offence();
}

#[test]
fn a_change_takes_one_message_to_each_peer() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/a", 1);
    assert_eq!(world.flying.len(), 1);
    assert!(world.deliver());
    assert_eq!(world.get(1, id), json!({"a": 1}));
    // There is no answer.
    assert_eq!(world.flying.len(), 0);
}

#[test]
fn counters_add_up_and_lists_keep_all() {
    let mut world = World::new(3, 1);
    world.connect(0, 1);
    world.connect(1, 2);
    let id = world.shared(&[0, 1, 2]);
    world
        .commit(0, id, &[Edit::Increment(at("/n"), 1), put("/l", json!([]))])
        .unwrap();
    world.settle();
    world.disconnect(0, 1);
    world.disconnect(1, 2);
    for node in 0..3 {
        let edits = [
            Edit::Increment(at("/n"), 10),
            Edit::Insert(at("/l/0"), json!(node)),
        ];
        world.commit(node, id, &edits).unwrap();
    }
    world.connect(0, 1);
    world.connect(1, 2);
    world.settle();
    let content = world.assert_same(&[0, 1, 2], id);
    assert_eq!(content["n"], 31);
    assert_eq!(content["l"].as_array().unwrap().len(), 3);
    world.assert_no_offence();
}

#[test]
fn a_document_that_is_opened_first_arrives_once_a_peer_has_it() {
    let mut world = World::new(2, 1);
    let id = world.create(0, NewDocument::default());
    world.edit(0, id, "/a", 1);
    assert!(matches!(
        world.node(1).get(id, &Path::default()),
        Err(Error::Unknown(_))
    ));
    assert!(!world.node(1).hold(id).unwrap());
    world.flush(1).unwrap();
    assert!(matches!(
        world.node(1).get(id, &Path::default()),
        Err(Error::NotYet(_))
    ));
    // Also after a restart.
    world.restart(1);
    world.connect(0, 1);
    world.settle();
    assert_eq!(world.get(1, id), json!({"a": 1}));
    assert!(world.saw(1, |event| *event == Event::Arrived(id)));
}

#[test]
fn documents_that_a_node_does_not_hold_cost_it_nothing() {
    let mut world = World::new(2, 1);
    for number in 0..50 {
        let id = world.create(0, NewDocument::default());
        world.edit(0, id, "/n", number);
    }
    world.connect(0, 1);
    world.settle();
    assert!(world.node(1).list().unwrap().is_empty());
    assert!(world.sent.1 < 100, "{} bytes", world.sent.1);
    let bytes = world.sent.1;
    let id = world.create(0, NewDocument::default());
    world.edit(0, id, "/n", 1);
    world.settle();
    // The peer learns only that the document exists.
    assert!(world.sent.1 - bytes < 100, "{} bytes", world.sent.1 - bytes);
}

#[test]
fn a_thousand_unchanged_documents_cost_little_on_reconnect() {
    let mut world = World::connected(2, 1);
    world.node(0).keep_loaded(4 << 20);
    let ids: Vec<_> = (0..1000)
        .map(|_| world.create(0, NewDocument::default()))
        .collect();
    for id in &ids {
        world.node(1).hold(*id).unwrap();
    }
    world.flush(1).unwrap();
    world.settle();
    world.restart(1);
    world.disconnect(0, 1);
    world.sent = (0, 0);
    world.connect(0, 1);
    world.settle();
    assert!(world.sent.1 < 1024, "{} bytes", world.sent.1);
    // One document that only one node has, and one that has changed.
    world.disconnect(0, 1);
    world.create(0, NewDocument::default());
    world.edit(0, ids[7], "/x", 1);
    world.sent = (0, 0);
    world.connect(0, 1);
    world.settle();
    assert_eq!(world.get(1, ids[7]), json!({"x": 1}));
    assert!(world.sent.1 < 8 << 10, "{} bytes", world.sent.1);
    // Few are kept in memory.
    assert!(
        world.node(0).loaded() <= 300,
        "{} documents in memory",
        world.node(0).loaded()
    );
}

#[test]
fn only_writers_write_and_only_the_owner_decides() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1]);
    let denied = world.commit(2, id, &[put("/a", json!(1))]).unwrap_err();
    assert!(
        matches!(denied, Error::NotWriter { owner, .. } if owner == key(0)),
        "{denied}"
    );
    let denied = world.node(1).decide(
        id,
        Rights {
            add: vec![key(2)],
            ..Rights::default()
        },
    );
    assert!(matches!(denied, Err(Error::NotOwner { .. })));
    assert!(matches!(
        world.node(1).compact(id),
        Err(Error::NotOwner { .. })
    ));
    world
        .node(0)
        .decide(
            id,
            Rights {
                add: vec![key(2)],
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.edit(2, id, "/a", 1);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2], id), json!({"a": 1}));
    assert!(world.saw(1, |event| *event == Event::Rights(id)));
}

#[test]
fn a_single_writer_document_has_one_writer_for_good() {
    let mut world = World::connected(2, 1);
    let new = || NewDocument {
        single_writer: true,
        ..NewDocument::default()
    };
    let refused = world.node(0).create(NewDocument {
        writers: vec![key(1)],
        ..new()
    });
    assert!(matches!(refused, Err(Error::SingleWriter(_))));
    let id = world.create(0, new());
    let refused = world.node(0).decide(
        id,
        Rights {
            add: vec![key(1)],
            ..Rights::default()
        },
    );
    assert!(matches!(refused, Err(Error::SingleWriter(_))));
    world.edit(0, id, "/a", 1);
}

#[test]
fn changes_of_a_revoked_writer_remain_and_no_new_ones_come() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1]);
    world.edit(1, id, "/before", 1);
    world.settle();
    world.disconnect(0, 1);
    world.disconnect(1, 2);
    world.edit(1, id, "/after", 1);
    world
        .node(0)
        .decide(
            id,
            Rights {
                revoke: vec![key(1)],
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.connect(0, 1);
    world.connect(1, 2);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2], id), json!({"before": 1}));
    assert!(matches!(
        world.commit(1, id, &[put("/x", json!(1))]),
        Err(Error::NotWriter { .. })
    ));
    // A writer who is added again can write again.
    world
        .node(0)
        .decide(
            id,
            Rights {
                add: vec![key(1)],
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.edit(1, id, "/again", 1);
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1, 2], id),
        json!({"before": 1, "again": 1})
    );
    world.assert_no_offence();
}

#[test]
fn a_private_document_is_sent_only_to_its_named_readers() {
    let mut world = World::connected(4, 1);
    let readers = Readers::Named(vec![key(2)]);
    let id = world.create(
        0,
        NewDocument {
            writers: vec![key(1)],
            readers,
            ..NewDocument::default()
        },
    );
    world.edit(0, id, "/secret", 1);
    for node in 1..4 {
        world.node(node).hold(id).unwrap();
        world.flush(node).unwrap();
    }
    world.settle();
    world.pass(Duration::from_secs(100));
    world.settle();
    assert_eq!(world.get(1, id), json!({"secret": 1}));
    assert_eq!(world.get(2, id), json!({"secret": 1}));
    assert_eq!(world.get(3, id), json!(null));
    // Readers can be added.
    let readers = Some(Readers::Named(vec![key(2), key(3)]));
    world
        .node(0)
        .decide(
            id,
            Rights {
                readers,
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    for _ in 0..3 {
        world.settle();
        world.disconnect(0, 3);
        world.connect(0, 3);
    }
    world.settle();
    assert_eq!(world.get(3, id), json!({"secret": 1}));
    world.assert_no_offence();
}

#[test]
fn flushed_changes_survive_and_unflushed_ones_were_never_sent() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/kept", 1);
    world.settle();
    world
        .node(0)
        .commit(id, &[put("/lost", json!(1))], None, 0)
        .unwrap();
    assert!(world.node(0).poll().is_none());
    world.restart(0);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1], id), json!({"kept": 1}));
    world.edit(0, id, "/more", 1);
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1], id),
        json!({"kept": 1, "more": 1})
    );
}

#[test]
fn a_restored_old_copy_writes_again() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1, 2]);
    world.edit(1, id, "/a", 1);
    let copy = world.nodes[1].disk.copy();
    world.edit(1, id, "/a", 2);
    world.edit(1, id, "/b", 2);
    world.settle();
    world.restore(1, copy);
    world.edit(1, id, "/c", 3);
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1, 2], id),
        json!({"a": 2, "b": 2, "c": 3})
    );
    world.assert_no_offence();
    for node in 0..3 {
        assert!(!world.saw(node, |event| matches!(event, Event::Equivocated { .. })));
    }
}

#[test]
fn an_owner_restored_from_a_copy_decides_again_and_all_agree() {
    let mut world = World::connected(4, 1);
    let id = world.shared(&[0]);
    let copy = world.nodes[0].disk.copy();
    world
        .node(0)
        .decide(
            id,
            Rights {
                add: vec![key(1)],
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.edit(1, id, "/one", 1);
    world.settle();
    (1..4).for_each(|other| world.disconnect(0, other));
    world.restore(0, copy);
    world
        .node(0)
        .decide(
            id,
            Rights {
                add: vec![key(2)],
                ..Rights::default()
            },
        )
        .unwrap();
    world.flush(0).unwrap();
    world.connect(0, 3);
    world.settle();
    world.connect(0, 1);
    world.connect(0, 2);
    for _ in 0..5 {
        world.pass(Duration::from_secs(61));
        world.settle();
    }
    world.assert_same(&[0, 1, 2, 3], id);
    let writers = world.node(3).info(id).unwrap().details.unwrap().writers;
    assert_eq!(writers.len(), 1, "one of the two decisions is in force");
    world.assert_no_offence();
}

#[test]
fn compaction_drops_the_history_and_keeps_the_content() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1, 2]);
    for number in 0..200 {
        world.edit(number % 3, id, "/n", number as u64);
    }
    world
        .commit(
            0,
            id,
            &[
                put("/l", json!([1, {"x": [2]}])),
                Edit::Increment(at("/c"), 5),
            ],
        )
        .unwrap();
    world.settle();
    assert!(world.node(1).history(id, 1000).unwrap().len() > 200);
    let content = world.assert_same(&[0, 1, 2], id);
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2], id), content);
    assert!(world.node(1).history(id, 1000).unwrap().len() < 5);
    assert_eq!(world.node(1).info(id).unwrap().details.unwrap().changes, 0);
    assert!(world.saw(2, |event| *event == Event::Compacted(id)));
    // Edits continue, counters included, also for a node that connects later.
    world
        .commit(1, id, &[Edit::Increment(at("/c"), 1)])
        .unwrap();
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.restart(2);
    world.settle();
    world.edit(2, id, "/late", 1);
    world.settle();
    let content = world.assert_same(&[0, 1, 2], id);
    assert_eq!((&content["c"], &content["late"]), (&json!(6), &json!(1)));
    world.nodes.push(Node::new(identity(9), Disk::default(), 0));
    world.node(3).hold(id).unwrap();
    world.connect(3, 2);
    world.settle();
    world.assert_same(&[0, 1, 2, 3], id);
    world.assert_no_offence();
}

#[test]
fn a_document_without_content_is_compacted_as_well() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    world.settle();
    world.edit(1, id, "/a", 1);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1], id), json!({"a": 1}));
}

#[test]
fn edits_that_a_compaction_missed_are_made_again() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1, 2]);
    world
        .commit(0, id, &[put("/m", json!({})), Edit::Increment(at("/c"), 1)])
        .unwrap();
    world.settle();
    world.disconnect(0, 1);
    world.disconnect(1, 2);
    world.edit(1, id, "/m/late", 1);
    world
        .commit(1, id, &[Edit::Increment(at("/c"), 10)])
        .unwrap();
    // The edits may come from several sessions.
    world.restart(1);
    world
        .commit(
            1,
            id,
            &[Edit::Increment(at("/c"), 100), put("/l", json!(["x"]))],
        )
        .unwrap();
    world.edit(0, id, "/m/early", 1);
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    world.connect(0, 1);
    world.connect(1, 2);
    world.settle();
    let content = world.assert_same(&[0, 1, 2], id);
    assert_eq!(
        content,
        json!({"m": {"early": 1, "late": 1}, "c": 111, "l": ["x"]})
    );
    assert!(world.saw(1, |event| matches!(event, Event::Carried { .. })));
    world.assert_no_offence();
}

#[test]
fn a_transaction_commits_whole_or_not_at_all() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    let edits = [put("/a", json!(1)), put("/x/y", json!(1))];
    let failed = world.commit(0, id, &edits).unwrap_err();
    assert!(
        matches!(failed, Error::Edit(EditError::NoContainer(_))),
        "{failed}"
    );
    assert_eq!(world.get(0, id), json!({}));
    world
        .commit(0, id, &[put("/a", json!(1)), put("/x", json!({"y": 1}))])
        .unwrap();
    assert_eq!(world.flying.len(), 1);
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1], id),
        json!({"a": 1, "x": {"y": 1}})
    );
    assert_eq!(world.node(1).history(id, 10).unwrap().len(), 1);
    // An empty commit is no commit.
    assert_eq!(world.node(0).commit(id, &[], None, 0).unwrap(), None);
}

#[test]
fn a_watch_reports_the_changed_paths() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/m", json!({"l": [1, 2], "x": 1}));
    world.settle();
    let mut watches: Vec<_> = (0..2)
        .map(|node| world.node(node).watch(id).unwrap())
        .collect();
    watches.push(world.node(0).watch(id).unwrap());
    let edits = [
        put("/m/x", json!(2)),
        Edit::Insert(at("/m/l/0"), json!(0)),
        put("/n", json!({"deep": {"er": 1}})),
    ];
    world.commit(0, id, &edits).unwrap();
    world.settle();
    let paths = vec![at("/m/l"), at("/m/x"), at("/n")];
    let changed = |paths: &Vec<Path>, local| Event::Changed {
        document: id,
        paths: paths.clone(),
        local,
    };
    assert_eq!(world.nodes[0].events.last(), Some(&changed(&paths, true)));
    assert_eq!(world.nodes[1].events.last(), Some(&changed(&paths, false)));
    // Drop one of two watches at the first node, and the only one at the second.
    watches.drain(..2);
    world.edit(0, id, "/n", 1);
    world.settle();
    let paths = vec![at("/n")];
    assert_eq!(world.nodes[0].events.last(), Some(&changed(&paths, true)));
    assert_eq!(
        world.nodes[1].events.last(),
        Some(&changed(&vec![], false)),
        "nobody watches"
    );
}

#[test]
fn a_document_with_a_nonce_has_an_id_that_others_can_compute_before_it_is_created() {
    let mut world = World::connected(2, 1);
    let new = NewDocument {
        single_writer: true,
        label: "catalogue".to_owned(),
        nonce: Some([7; 16]),
        ..NewDocument::default()
    };
    let id = new.id_by(&key(0)).unwrap().unwrap();
    assert_ne!(new.id_by(&key(1)).unwrap(), Some(id));
    world.node(1).hold(id).unwrap();
    assert_eq!(world.create(0, new.clone()), id);
    world.edit(0, id, "/a", 1);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1], id), json!({"a": 1}));
    // Creating it again leaves it unchanged. An owner who holds a document that has not arrived can create it without
    // waiting for peers.
    assert_eq!(world.create(0, new.clone()), id);
    assert_eq!(world.assert_same(&[0, 1], id), json!({"a": 1}));
    let of_other = new.id_by(&key(1)).unwrap().unwrap();
    world.node(1).hold(of_other).unwrap();
    assert_eq!(world.create(1, new.clone()), of_other);
    world.edit(1, of_other, "/b", 1);
    let other = NewDocument { nonce: None, ..new };
    assert_eq!(other.id_by(&key(0)).unwrap(), None);
}

#[test]
fn the_history_lists_authors_times_and_messages() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world
        .node(0)
        .commit(id, &[put("/a", json!(1))], Some("first"), 7)
        .unwrap();
    world.flush(0).unwrap();
    world.settle();
    world
        .node(1)
        .commit(id, &[put("/a", json!(2))], None, 9)
        .unwrap();
    world.flush(1).unwrap();
    world.settle();
    let history = world.node(0).history(id, 10).unwrap();
    let of = |at: usize| {
        (
            history[at].author,
            history[at].time,
            history[at].message.as_deref(),
        )
    };
    assert_eq!(
        (of(0), of(1)),
        ((key(1), 9, None), (key(0), 7, Some("first")))
    );
    assert_eq!(history[0].builds_on, [history[1].id]);
    assert_eq!(world.node(0).history(id, 1).unwrap().len(), 1);
}

#[test]
fn a_removed_document_is_gone_and_can_be_opened_again() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/a", 1);
    world.settle();
    assert!(world.node(1).remove(id).unwrap());
    world.flush(1).unwrap();
    world.settle();
    assert!(!world.node(1).remove(id).unwrap());
    world.sent = (0, 0);
    world.edit(0, id, "/b", 2);
    world.settle();
    assert_eq!(
        world.sent.0, 0,
        "a peer that no longer holds it is sent nothing"
    );
    world.restart(1);
    world.settle();
    assert!(world.node(1).list().unwrap().is_empty());
    world.node(1).hold(id).unwrap();
    world.flush(1).unwrap();
    world.settle();
    assert_eq!(world.get(1, id), json!({"a": 1, "b": 2}));
}

#[test]
fn long_changes_and_long_logs_arrive() {
    let mut world = World::new(2, 1);
    let id = world.create(0, NewDocument::default());
    for number in 0..20 {
        world.edit(0, id, &format!("/{number}"), "x".repeat(100_000));
    }
    for number in 0..300 {
        world.edit(0, id, "/n", number);
    }
    world.node(1).hold(id).unwrap();
    world.flush(1).unwrap();
    world.connect(0, 1);
    world.settle();
    world.assert_same(&[0, 1], id);
    // A long change is announced to a connected peer, which fetches it.
    world.edit(0, id, "/long", "y".repeat(200_000));
    world.settle();
    world.assert_same(&[0, 1], id);
    let long = world
        .commit(0, id, &[put("/too long", json!("z".repeat(600_000)))])
        .unwrap_err();
    assert!(matches!(long, Error::Edit(EditError::TooMuch)), "{long}");
}

#[test]
fn an_exported_document_is_imported_completely() {
    let mut world = World::new(2, 1);
    let id = world.create(
        0,
        NewDocument {
            writers: vec![key(1)],
            ..NewDocument::default()
        },
    );
    for number in 0..50 {
        world.edit(0, id, &format!("/{number}"), "x".repeat(20_000));
    }
    world.node(0).compact(id).unwrap();
    world.edit(0, id, "/more", 1);
    let file = world.node(0).export(id).unwrap();
    assert_eq!(world.node(1).import(&file).unwrap().document, id);
    world.flush(1).unwrap();
    world.assert_same(&[0, 1], id);
    world.edit(1, id, "/mine", 1);
    // Import it again, then content that is not a document, then half of a file.
    assert_eq!(world.node(1).import(&file).unwrap().document, id);
    assert_eq!(world.get(1, id)["mine"], 1);
    let mut other = World::new(1, 2);
    for bad in [&b"hello"[..], b"", &file[..20]] {
        assert!(matches!(other.node(0).import(bad), Err(Error::Import(_))));
    }
    let mut bent = file.clone();
    *bent.last_mut().unwrap() ^= 1;
    let Err(Error::ImportIncomplete(found)) = other.node(0).import(&bent) else {
        panic!("damaged content is accepted");
    };
    assert_eq!((found.counted, found.refused.damaged), (0, 1));
    assert!(other.node(0).list().unwrap().is_empty());
}

#[test]
fn a_full_disk_acknowledges_nothing_and_loses_nothing() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "/a", 1);
    world.settle();
    world.nodes[0].disk.fill(true);
    let failed = world.commit(0, id, &[put("/b", json!(1))]).unwrap_err();
    assert!(matches!(failed, Error::Store(StoreError::Full)), "{failed}");
    assert_eq!(world.flying.len(), 0);
    world.nodes[0].disk.fill(false);
    assert_eq!(world.get(0, id), json!({"a": 1}));
    world.edit(0, id, "/c", 1);
    world.settle();
    assert_eq!(world.assert_same(&[0, 1], id), json!({"a": 1, "c": 1}));
}

/// Makes commits on a disk that may fail at any write, and records the acknowledged ones.
fn work(
    disk: &Disk,
    owner: u8,
    acknowledged: &mut Vec<u64>,
    id: &mut Option<DocumentId>,
) -> Result<(), Error> {
    let mut replica = Replica::open(
        disk.open()?,
        identity(owner),
        [acknowledged.len() as u8 + 1; 32],
    )?;
    let document = match *id {
        Some(id) => id,
        None => {
            let made = replica.create(NewDocument::default())?;
            replica.finish_round()?;
            *id.insert(made)
        }
    };
    for number in 0..12 {
        replica.commit(
            document,
            &[put(&format!("/{number}"), json!(number))],
            None,
            0,
        )?;
        if number == 7 {
            replica.compact(document)?;
        }
        replica.finish_round()?;
        acknowledged.push(number);
    }
    Ok(())
}

#[test]
fn a_crash_at_any_write_loses_nothing_that_was_acknowledged() {
    let whole = Disk::default();
    work(&whole, 0, &mut Vec::new(), &mut None).unwrap();
    let operations = whole.operations();
    let mut random = fastrand::Rng::with_seed(7);
    for fails_in in 0..operations {
        let disk = Disk::default();
        disk.fail_in(Some(fails_in));
        let (mut acknowledged, mut id) = (Vec::new(), None);
        // The last operations are those of closing, which no caller waits for.
        let failed = work(&disk, 0, &mut acknowledged, &mut id).is_err();
        assert!(
            failed || fails_in + 16 > operations,
            "it was not interrupted at {fails_in} of {operations}"
        );
        // Once as if the program had been killed, and three times as if power had been lost.
        for attempt in 0..4 {
            let left = match attempt {
                0 => disk.copy(),
                _ => disk.lose_power(&mut random),
            };
            let Some(id) = id else {
                continue;
            };
            let store = left.open().expect("what is left can be opened");
            let mut replica = Replica::open(store, identity(0), [200; 32]).expect("and read");
            let content = replica
                .get(id, &Path::default())
                .expect("the document is there")
                .unwrap();
            for number in &acknowledged {
                assert_eq!(
                    content[&number.to_string()],
                    *number,
                    "interrupted at {fails_in}"
                );
            }
            replica.assert_loads(id);
            replica
                .commit(id, &[put("/again", json!(1))], None, 0)
                .unwrap();
            replica.finish_round().unwrap();
        }
    }
}

#[test]
fn a_document_of_many_sessions_is_rebuilt_in_one_pass() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1]);
    // Each start of a program begins a session, and each session builds on the one before. Their ids are in random
    // order.
    for start in 0..60 {
        world.restart(0);
        world.settle();
        world.edit(0, id, &format!("/{start}"), start);
        world.settle();
    }
    // Changes that a third node has, and that the owner lacks when it revokes their author.
    world.disconnect(0, 1);
    world.disconnect(0, 2);
    for number in 0..5 {
        world.edit(1, id, "/late", number);
    }
    world.settle();
    let rights = Rights {
        revoke: vec![key(1)],
        ..Rights::default()
    };
    world.node(0).decide(id, rights).unwrap();
    world.flush(0).unwrap();
    world.connect(0, 2);
    world.settle();
    let content = world.assert_same(&[0, 2], id);
    assert_eq!(content.as_object().unwrap().len(), 60);
    let (document, _) = world.node(2).present(&id).unwrap();
    let (examined, changes) = (document.examined, document.log().0 as usize);
    assert!(
        (changes..=changes + 5).contains(&examined),
        "{examined} changes were examined for {changes} changes"
    );
}

#[test]
fn putting_the_whole_document_replaces_it_and_keeps_concurrent_additions() {
    let mut world = World::connected(2, 1);
    let id = world.shared(&[0, 1]);
    world.edit(0, id, "", json!({"a": 1, "b": 2}));
    world.settle();
    world.disconnect(0, 1);
    world.edit(1, id, "/c", 3);
    world.edit(0, id, "", json!({"only": 1}));
    assert_eq!(world.get(0, id), json!({"only": 1}));
    world.connect(0, 1);
    world.settle();
    let content = world.assert_same(&[0, 1], id);
    assert_eq!(content, json!({"only": 1, "c": 3}));
    world.edit(0, id, "", json!({}));
    assert_eq!(world.get(0, id), json!({}));
}

#[test]
fn compacted_content_reports_its_time_and_number_of_changes() {
    let mut world = World::connected(1, 1);
    let id = world.create(0, NewDocument::default());
    world.pass(Duration::from_secs(1_000_000));
    world.edit(0, id, "/a", 1);
    world.pass(Duration::from_secs(10));
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    let details = world.node(0).info(id).unwrap().details.unwrap();
    assert_eq!((details.changes, details.base_changes), (0, 1));
    let history = world.node(0).history(id, 10).unwrap();
    let times: Vec<_> = history.iter().map(|commit| commit.time).collect();
    assert_eq!(times, [1_000_010]);
}

#[test]
fn waiting_changes_are_dropped_when_a_decision_makes_them_void() {
    let mut world = World::connected(3, 1);
    let id = world.shared(&[0, 1]);
    // Node 2 receives the second change and not the first.
    world.edit(1, id, "/first", 1);
    world.flying.clear();
    world.edit(1, id, "/second", 1);
    world.flying.retain(|(_, to, _)| *to == 2);
    world.deliver();
    world.flying.clear();
    assert_eq!(world.node(2).present(&id).unwrap().0.waiting().0, 1);
    world.disconnect(0, 1);
    world.disconnect(1, 2);
    let rights = Rights {
        revoke: vec![key(1)],
        ..Rights::default()
    };
    world.node(0).decide(id, rights).unwrap();
    world.flush(0).unwrap();
    world.settle();
    assert_eq!(world.node(2).present(&id).unwrap().0.waiting().0, 0);
}
