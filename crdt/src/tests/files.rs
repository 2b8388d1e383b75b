//! The guarantees of exported files: they are imported completely, in any order, and changes that are not imported are
//! reported.

use bytes::Bytes;
use prost::Message;
use serde_json::json;
use weft_proto::wire;

use super::{
    Disk, Node, World,
    arrival::{GIVER, history},
    identity, key,
};
use crate::{DocumentId, Error, Imported, Rights};

const MAGIC: &[u8] = b"weft document 1\n";

fn parts(file: &[u8]) -> Vec<wire::Give> {
    let mut rest = file.strip_prefix(MAGIC).unwrap();
    let mut parts = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk() {
        let (part, after) = after.split_at(u64::from_be_bytes(*length) as usize);
        parts.push(wire::Give::decode(part).unwrap());
        rest = after;
    }
    parts
}

fn file(parts: &[wire::Give]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    for part in parts {
        file.extend((part.encoded_len() as u64).to_be_bytes());
        file.extend(part.encode_to_vec());
    }
    file
}

/// Returns a file with one of its envelopes changed.
fn bent(content: &[u8], number: usize, bend: impl Fn(&mut Vec<wire::Envelope>, usize)) -> Vec<u8> {
    let mut parts = parts(content);
    let mut left = number;
    for part in &mut parts {
        if left < part.envelopes.len() {
            bend(&mut part.envelopes, left);
            return file(&parts);
        }
        left -= part.envelopes.len();
    }
    panic!("the file has fewer than {number} envelopes");
}

/// Adds a node that holds no documents.
fn stranger(world: &mut World) -> usize {
    world
        .nodes
        .push(Node::new(identity(90), Disk::default(), 0));
    world.nodes.len() - 1
}

fn incomplete(failed: Result<Imported, Error>) -> Imported {
    match failed {
        Err(Error::ImportIncomplete(imported)) => *imported,
        other => panic!("{other:?}"),
    }
}

fn changes(world: &mut World, at: usize, id: DocumentId) -> u64 {
    world.node(at).info(id).unwrap().details.unwrap().changes
}

/// Creates a document that two nodes write in turns, each in several sessions.
fn turns(world: &mut World, changes: usize) -> DocumentId {
    let id = world.shared_by(&[0, 1]);
    for number in 0..changes {
        let at = number % 2;
        if number % 50 > 47 {
            world.restart(at);
        }
        world.edit(at, id, &format!("/{number}"), "x".repeat(200));
        world.connect(0, 1);
        world.settle();
        world.disconnect(0, 1);
    }
    id
}

#[test]
fn a_file_is_imported_completely_in_any_order_of_its_envelopes() {
    for case in 0..6 {
        let mut play = history(case, case % 2 == 1);
        let id = play.id;
        for by_session in [false, true] {
            play.world.node(GIVER).set_by_session(by_session);
            play.world.node(GIVER).set_piece(3 << 10);
            let file = play.world.node(GIVER).export(id).unwrap();
            let to = stranger(&mut play.world);
            let imported = play.world.node(to).import(&file).unwrap();
            play.world.flush(to).unwrap();
            assert!(imported.is_whole(), "case {case}: {imported}");
            assert_eq!(
                (imported.counted, imported.refused.void),
                (imported.changes, 0)
            );
            play.world.assert_same(&[GIVER, to], id);
            play.world.restart(to);
            play.world.assert_same(&[GIVER, to], id);
        }
    }
}

/// The file has more changes than may wait if peers send them.
#[test]
fn an_old_file_of_many_changes_is_imported_at_once() {
    let mut world = World::new(3, 1);
    let id = turns(&mut world, 800);
    world.node(0).set_by_session(true);
    let file = world.node(0).export(id).unwrap();
    let imported = world.node(2).import(&file).unwrap();
    world.flush(2).unwrap();
    assert_eq!((imported.changes, imported.counted), (800, 800));
    world.assert_same(&[0, 2], id);
}

#[test]
fn an_export_is_in_causal_order() {
    let mut world = World::new(2, 1);
    let id = turns(&mut world, 100);
    world.node(0).set_piece(2 << 10);
    let file = world.node(0).export(id).unwrap();
    let mut known = std::collections::BTreeSet::new();
    let envelopes = parts(&file).into_iter().flat_map(|part| part.envelopes);
    for envelope in envelopes {
        for dep in crate::log::chunk::dependencies(&envelope.change) {
            assert!(
                known.contains(&dep),
                "a change comes before one of its dependencies"
            );
        }
        known.insert(crate::ChangeId::read(&envelope.header.unwrap().change).unwrap());
    }
    assert_eq!(known.len(), 100);
}

#[test]
fn an_incomplete_import_fails_and_reports_the_refused_changes_and_the_reasons() {
    let mut world = World::new(2, 1);
    let id = turns(&mut world, 60);
    let good = world.node(0).export(id).unwrap();
    let flip = |envelopes: &mut Vec<wire::Envelope>, at: usize| {
        let mut change = envelopes[at].change.to_vec();
        *change.last_mut().unwrap() ^= 1;
        envelopes[at].change = change.into();
    };
    let forge = |envelopes: &mut Vec<wire::Envelope>, at: usize| {
        let header = envelopes[at].header.as_mut().unwrap();
        let mut signature = header.signature.to_vec();
        signature[7] ^= 1;
        header.signature = signature.into();
    };
    let spoil = |envelopes: &mut Vec<wire::Envelope>, at: usize| {
        envelopes[at].header.as_mut().unwrap().author = Bytes::from_static(b"short");
    };
    let drop = |envelopes: &mut Vec<wire::Envelope>, at: usize| _ = envelopes.remove(at);
    let damaged = (60, 40, 1, 19);
    type Bend<'a> = &'a dyn Fn(&mut Vec<wire::Envelope>, usize);
    for (bend, expected, says) in [
        (&flip as Bend<'_>, damaged, "1 is damaged"),
        (&forge, damaged, "a signature is invalid"),
        (&spoil, damaged, "19 build on changes that are damaged"),
        (
            &drop,
            (59, 40, 0, 19),
            "neither in the file nor on this node",
        ),
    ] {
        let to = stranger(&mut world);
        let bad = bent(&good, 40, bend);
        let imported = incomplete(world.node(to).import(&bad));
        world.flush(to).unwrap();
        let refused = imported.refused;
        assert_eq!(
            (
                imported.changes,
                imported.counted,
                refused.damaged,
                refused.missing
            ),
            expected,
            "{imported}"
        );
        assert!(imported.to_string().contains(says), "{imported}");
        // The intact part of the file is kept, and the good file completes it.
        assert_eq!(changes(&mut world, to, id), 40);
        world.restart(to);
        assert!(world.node(to).import(&good).unwrap().is_whole());
        world.flush(to).unwrap();
        world.assert_same(&[0, to], id);
        // A document that was held before stays unchanged.
        let before = world.get(0, id);
        let _ = world.node(0).import(&bad);
        world.flush(0).unwrap();
        assert_eq!(world.get(0, id), before);
        world.node(0).assert_loads(id);
    }
    // Nor does it lose changes that the file lacks.
    world.edit(0, id, "/mine", 1);
    let bad = bent(&good, 40, flip);
    let _ = world.node(0).import(&bad);
    world.flush(0).unwrap();
    assert_eq!(world.get(0, id)["mine"], 1);
    world.restart(0);
    assert_eq!(changes(&mut world, 0, id), 61);
}

#[test]
fn a_truncated_file_yields_its_readable_part() {
    let mut world = World::new(3, 1);
    let id = turns(&mut world, 60);
    world.node(0).set_piece(2 << 10);
    let file = world.node(0).export(id).unwrap();
    let imported = incomplete(world.node(2).import(&file[..file.len() - 1]));
    assert_eq!(imported.faults, ["the file ends early"]);
    assert!(imported.counted > 40, "{imported}");
    assert_eq!(imported.counted, imported.changes);
    // Cut between two parts, each of which is sound.
    let to = stranger(&mut world);
    let mut some = parts(&file);
    some.pop().unwrap();
    let imported = incomplete(world.node(to).import(&super::files::file(&some)));
    assert_eq!(imported.faults, ["the file ends early"]);
    assert_eq!(imported.counted, imported.changes);
    // If no change is valid, the document is not held.
    let to = stranger(&mut world);
    let mut parts = parts(&file);
    parts.truncate(1);
    parts[0].envelopes.truncate(1);
    parts[0].envelopes[0].change = Bytes::from_static(b"nothing");
    incomplete(world.node(to).import(&super::files::file(&parts)));
    assert!(world.node(to).list().unwrap().is_empty());
}

#[test]
fn damage_to_an_author_or_to_a_change_does_not_make_the_change_void() {
    let mut world = World::new(3, 1);
    let id = turns(&mut world, 12);
    let file = world.node(0).export(id).unwrap();
    for bend in [
        |envelope: &mut wire::Envelope| {
            let header = envelope.header.as_mut().unwrap();
            header.author = Bytes::from(key(77).0.to_vec());
        },
        |envelope: &mut wire::Envelope| {
            let mut change = envelope.change.to_vec();
            *change.last_mut().unwrap() ^= 1;
            envelope.change = change.into();
        },
    ] {
        let to = stranger(&mut world);
        let bent = bent(&file, 4, |envelopes, at| bend(&mut envelopes[at]));
        let imported = incomplete(world.node(to).import(&bent));
        assert_eq!(imported.refused.void, 0, "{imported}");
        assert!(imported.refused.damaged >= 1, "{imported}");
    }
}

#[test]
fn void_changes_are_reported_and_are_no_error() {
    let mut world = World::new(3, 1);
    let id = world.shared_by(&[0, 1]);
    world.edit(1, id, "/known", 1);
    world.connect(0, 1);
    world.settle();
    world.disconnect(0, 1);
    for number in 0..5 {
        world.edit(1, id, &format!("/{number}"), number);
    }
    let file = world.node(1).export(id).unwrap();
    let revoke = Rights {
        revoke: vec![key(1)],
        ..Rights::default()
    };
    world.node(0).decide(id, revoke).unwrap();
    world.flush(0).unwrap();
    let imported = world.node(0).import(&file).unwrap();
    assert!(imported.is_whole());
    let expected = (6, 1, 5);
    assert_eq!(
        (imported.changes, imported.counted, imported.refused.void),
        expected,
        "{imported}"
    );
    assert_eq!(world.get(0, id), json!({"known": 1}));
    // After a compaction, earlier changes are contained in the base, or void.
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    let imported = world.node(0).import(&file).unwrap();
    assert_eq!(
        (imported.counted, imported.refused.void),
        (0, 6),
        "{imported}"
    );
    assert_eq!(world.get(0, id), json!({"known": 1}));
    // The reverse: the file has data that the importing node lacks.
    let file = world.node(0).export(id).unwrap();
    world.node(1).import(&file).unwrap();
    world.flush(1).unwrap();
    world.assert_same(&[0, 1], id);
}
