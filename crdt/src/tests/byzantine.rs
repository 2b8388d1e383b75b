//! A hostile peer, who is also a writer.

use std::iter;

use automerge::{
    ActorId, Automerge, Change, ExpandedChange, ROOT, ScalarValue,
    legacy::{ObjectId, OpId, OpType},
    transaction::{CommitOptions, Transactable},
};
use bytes::Bytes;
use prost::Message;
use serde_json::json;
use weft_proto::wire::{self, document_message::Kind};

use super::{World, at, identity, key, mutants, put};
use crate::{
    ChangeId, DocumentId, Edit, Event, Identity, Key, NewDocument, Path, Rights,
    content::{
        batch::{Batch, View},
        guard::{self, Memory},
        value,
    },
    id::{Chain, EpochId, SessionId},
    log::{
        envelope::{Envelope, Header, Proof, Run},
        epoch::{Epoch, Terms},
        genesis::Readers,
    },
    refusal::Refusal,
};

/// Number of the liar's key. It is not a node of the world.
const LIAR: u8 = 50;

/// Returns the key of the liar, who should be among the writers.
pub(super) fn liar() -> Key {
    key(LIAR)
}

/// A writer that signs arbitrary data.
pub(super) struct Liar {
    identity: Identity,
    document: DocumentId,
    run: Run,
    session: SessionId,
    doc: Automerge,
    index: u64,
    chain: Chain,
}

impl Liar {
    fn new(document: DocumentId, nonce: u8) -> Self {
        let identity = identity(LIAR);
        let run = Run {
            author: identity.key(),
            nonce: [nonce; 16],
            epoch: EpochId(document.0),
        };
        let session = run.session(&document);
        let doc = Automerge::new().with_actor(ActorId::from(session.actor()));
        Self {
            identity,
            document,
            run,
            session,
            doc,
            index: 0,
            chain: session.chain(),
        }
    }

    /// Creates a liar that knows the document as a node has it.
    pub(super) fn knowing(world: &mut World, at: usize, document: DocumentId, nonce: u8) -> Self {
        let mut this = Self::new(document, nonce);
        let (known, _) = world.node(at).document(&document).unwrap().unwrap();
        this.doc = known.automerge().clone();
        this.doc.set_actor(ActorId::from(this.session.actor()));
        this
    }

    pub(super) fn change(&mut self, edits: &[Edit]) -> Change {
        let mut tx = self.doc.transaction();
        edits
            .iter()
            .for_each(|edit| value::apply(&mut tx, edit).unwrap());
        let (hash, _) = tx.commit_with(CommitOptions::default().with_time(0));
        automerge::ReadDoc::get_change_by_hash(&self.doc, &hash.unwrap()).unwrap()
    }

    fn sign(&self, index: u64, previous: Chain, change: &[u8], id: ChangeId) -> Envelope {
        let header = Header::sign(
            &self.identity,
            &self.document,
            self.run,
            index,
            previous,
            id,
        );
        Envelope {
            header,
            change: Bytes::copy_from_slice(change),
        }
    }

    /// Signs arbitrary bytes as the next change.
    fn next(&mut self, change: &[u8], id: ChangeId) -> Envelope {
        let envelope = self.sign(self.index, self.chain, change, id);
        self.index += 1;
        self.chain = envelope.header.chain();
        envelope
    }

    fn commit(&mut self, edits: &[Edit]) -> Envelope {
        let change = self.change(edits);
        self.next(change.raw_bytes(), ChangeId(change.hash().0))
    }

    /// Signs a change whose operations are modified before it is encoded again.
    pub(super) fn bent(&mut self, edits: &[Edit], bend: impl Fn(&mut ExpandedChange)) -> Envelope {
        let mut expanded = self.change(edits).decode();
        bend(&mut expanded);
        let change = Change::from(expanded);
        self.next(change.raw_bytes(), ChangeId(change.hash().0))
    }
}

fn news(document: DocumentId, envelopes: &[Envelope]) -> Kind {
    Kind::News(wire::News {
        document: Bytes::copy_from_slice(&document.0),
        envelopes: envelopes.iter().map(Envelope::to_wire).collect(),
        ..wire::News::default()
    })
}

impl World {
    /// Sends a message of the liar to a node.
    fn lie(&mut self, to: usize, kind: Kind) {
        let message = wire::DocumentMessage { kind: Some(kind) }.encode_to_vec();
        self.lie_bytes(to, &message);
    }

    fn lie_bytes(&mut self, to: usize, message: &[u8]) {
        self.node(to).connected(key(LIAR));
        self.node(to).receive(key(LIAR), message).unwrap();
        self.flush(to).unwrap();
    }

    fn offences(&mut self, at: usize) -> Vec<String> {
        self.nodes[at]
            .offences
            .drain(..)
            .map(|(_, why)| why)
            .collect()
    }

    /// Checks that the node reports the liar for the envelope, and that its content does not change.
    fn refuses(&mut self, to: usize, document: DocumentId, envelope: &Envelope, why: &str) {
        let before = self.get(to, document);
        self.lie(to, news(document, std::slice::from_ref(envelope)));
        let blamed = self.offences(to);
        assert!(
            blamed.iter().any(|blame| blame.contains(why)),
            "{blamed:?} and not {why}"
        );
        assert_eq!(self.get(to, document), before);
        self.node(to).assert_loads(document);
    }
}

/// Creates connected nodes, and a document that the first one owns and the liar may write.
fn world(nodes: u8) -> (World, DocumentId) {
    let mut world = World::connected(nodes, 1);
    let writers = (1..nodes).map(key).chain([key(LIAR)]).collect();
    let id = world.create(
        0,
        NewDocument {
            writers,
            ..NewDocument::default()
        },
    );
    for node in 1..usize::from(nodes) {
        world.node(node).hold(id).unwrap();
        world.flush(node).unwrap();
    }
    world.settle();
    world.edit(0, id, "/m", json!({"x": 1}));
    world.settle();
    (world, id)
}

#[test]
fn a_forged_signature_is_an_offence() {
    let (mut world, id) = world(2);
    let mut envelope = Liar::knowing(&mut world, 0, id, 1).commit(&[put("/a", json!(1))]);
    envelope.header.signature[5] ^= 1;
    world.refuses(0, id, &envelope, "signature");
}

#[test]
fn no_writer_can_write_as_another() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    liar.run.author = key(0);
    liar.session = liar.run.session(&id);
    liar.doc.set_actor(ActorId::from(liar.session.actor()));
    liar.chain = liar.session.chain();
    let envelope = liar.commit(&[put("/a", json!(1))]);
    world.refuses(0, id, &envelope, "signature");
    // Nor with another session's actor.
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    liar.doc.set_actor(ActorId::from([9; 16]));
    let envelope = liar.commit(&[put("/a", json!(1))]);
    world.refuses(0, id, &envelope, "another actor");
}

#[test]
fn a_repeated_envelope_changes_nothing() {
    let (mut world, id) = world(2);
    let envelope = Liar::knowing(&mut world, 0, id, 1).commit(&[Edit::Increment(at("/n"), 1)]);
    for _ in 0..3 {
        world.lie(0, news(id, &[envelope.clone(), envelope.clone()]));
    }
    world.settle();
    assert_eq!(world.assert_same(&[0, 1], id)["n"], 1);
    assert!(world.offences(0).is_empty());
}

#[test]
fn an_envelope_is_valid_for_its_document_only() {
    let (mut world, id) = world(2);
    let other = world.create(
        0,
        NewDocument {
            writers: vec![key(LIAR)],
            ..NewDocument::default()
        },
    );
    let envelope = Liar::new(id, 1).commit(&[put("/a", json!(1))]);
    world.refuses(0, other, &envelope, "signature");
}

#[test]
fn changes_of_a_key_without_write_access_are_ignored() {
    let (mut world, id) = world(2);
    let rights = Rights {
        revoke: vec![key(LIAR)],
        ..Rights::default()
    };
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    world.lie(0, news(id, &[liar.commit(&[put("/before", json!(1))])]));
    world.settle();
    world.node(0).decide(id, rights).unwrap();
    world.flush(0).unwrap();
    world.settle();
    // The same session continues, and another one claims to have begun before.
    let after = liar.commit(&[put("/after", json!(1))]);
    let backdated = Liar::knowing(&mut world, 0, id, 2).commit(&[put("/backdated", json!(1))]);
    for node in 0..2 {
        world.lie(node, news(id, &[after.clone(), backdated.clone()]));
    }
    world.settle();
    let content = world.assert_same(&[0, 1], id);
    assert_eq!(content, json!({"m": {"x": 1}, "before": 1}));
    let stranger = world.create(0, NewDocument::default());
    let envelope = Liar::new(stranger, 1).commit(&[put("/a", json!(1))]);
    world.lie(0, news(stranger, &[envelope]));
    assert_eq!(world.get(0, stranger), json!({}));
}

#[test]
fn equivocation_is_detected_and_all_nodes_drop_the_same_changes() {
    let (mut world, id) = world(5);
    world
        .commit(0, id, &[Edit::Increment(at("/n"), 1)])
        .unwrap();
    world.settle();
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let first = liar.commit(&[put("/l", json!("first"))]);
    for node in 0..2 {
        world.lie(node, news(id, std::slice::from_ref(&first)));
    }
    world.settle();
    // Two groups without contact receive different changes.
    for one in [0, 1] {
        (2..5).for_each(|other| world.disconnect(one, other));
    }
    let mut twin = Liar {
        identity: liar.identity.clone(),
        doc: liar.doc.clone(),
        ..liar
    };
    let story = |liar: &mut Liar, text: &str, length: usize| -> Vec<Envelope> {
        (0..length)
            .map(|n| liar.commit(&[put("/l", json!(format!("{text} {n}")))]))
            .collect()
    };
    let to_one = story(&mut liar, "one", 5);
    let to_other = story(&mut twin, "other", 3);
    world.lie(0, news(id, &to_one));
    world.lie(2, news(id, &to_other));
    world.settle();
    // Honest writers build on the changes that they see.
    world
        .commit(
            1,
            id,
            &[put("/honest one", json!(1)), Edit::Increment(at("/n"), 1)],
        )
        .unwrap();
    world
        .commit(
            3,
            id,
            &[put("/honest other", json!(1)), Edit::Increment(at("/n"), 1)],
        )
        .unwrap();
    world.settle();
    assert_eq!(
        (&world.get(1, id)["l"], &world.get(3, id)["l"]),
        (&json!("one 4"), &json!("other 2"))
    );
    world.connect(1, 3);
    world.settle();
    for _ in 0..3 {
        world.pass(std::time::Duration::from_secs(61));
        world.settle();
    }
    let content = world.assert_same(&[0, 1, 2, 3, 4], id);
    // Changes that all nodes received alike remain; changes that build on the liar's are made again.
    let expected = json!({"m": {"x": 1}, "l": "first", "honest one": 1, "honest other": 1, "n": 3});
    assert_eq!(content, expected);
    for node in 0..5 {
        let has_event = world.saw(node, |event| {
            matches!(event, Event::Equivocated { author, index: 1, .. } if *author == key(LIAR))
        });
        assert!(has_event, "node {node} has no event");
        assert!(world.offences(node).is_empty());
    }
    // The proof is permanent, and nodes that come later receive it.
    world.restart(4);
    world.settle();
    world.lie(4, news(id, &to_one));
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2, 3, 4], id), expected);
    // Honest writers continue, and so may the liar's key, in another session.
    world.edit(1, id, "/more", 1);
    let mut again = Liar::knowing(&mut world, 0, id, 7);
    let envelope = again.commit(&[put("/again", json!(1))]);
    world.lie(0, news(id, &[envelope]));
    world.settle();
    assert_eq!(world.assert_same(&[0, 1, 2, 3, 4], id)["again"], 1);
}

#[test]
fn a_proof_of_nothing_is_an_offence() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let (one, other) = (
        liar.commit(&[put("/a", json!(1))]),
        liar.commit(&[put("/b", json!(1))]),
    );
    let tell = |one: &Header, other: &Header| {
        let proof = wire::Equivocation {
            one: Some(one.to_wire()),
            other: Some(other.to_wire()),
        };
        Kind::News(wire::News {
            document: Bytes::copy_from_slice(&id.0),
            proofs: vec![proof],
            ..wire::News::default()
        })
    };
    world.lie(0, tell(&one.header, &one.header));
    assert_eq!(world.offences(0), ["a proof proves nothing"]);
    world.lie(0, tell(&one.header, &other.header));
    assert_eq!(world.offences(0), ["a proof proves nothing"]);
    let mut forged = one.header.clone();
    forged.change = ChangeId([1; 32]);
    assert!(Proof::of(one.header.clone(), forged.clone()).is_some());
    world.lie(0, tell(&one.header, &forged));
    assert_eq!(world.offences(0), ["a signature is invalid"]);
}

#[test]
fn only_the_owner_signs_epochs() {
    let (mut world, id) = world(2);
    let (document, _) = world.node(0).document(&id).unwrap().unwrap();
    let genesis = document.genesis.clone();
    let terms = Terms {
        writers: vec![key(LIAR)],
        readers: Readers::Everybody,
        heads: Default::default(),
        base: Vec::new(),
    };
    let mut epoch = {
        let mut owned = genesis.clone();
        owned.owner = key(LIAR);
        Epoch::sign(&identity(LIAR), &owned, 1, genesis.epoch(), &terms).wire
    };
    let tell = |epoch: &wire::SignedEpoch| {
        Kind::News(wire::News {
            document: Bytes::copy_from_slice(&id.0),
            epochs: vec![epoch.clone()],
            ..wire::News::default()
        })
    };
    world.lie(0, tell(&epoch));
    assert_eq!(world.offences(0), ["a signature is invalid"]);
    epoch.epoch = Bytes::from_static(b"\xff\xff");
    world.lie(0, tell(&epoch));
    assert_eq!(world.offences(0), ["an epoch cannot be decoded"]);
}

#[test]
fn poisoned_changes_are_refused_by_all_replicas() {
    let (mut world, id) = world(3);
    let stranger = OpId(1_000, ActorId::from([3; 16]));
    type Bend = Box<dyn Fn(&mut ExpandedChange)>;
    let bends: Vec<(&str, Bend)> = vec![
        (
            "replaces a value that is not among its ancestors",
            Box::new({
                let stranger = stranger.clone();
                move |change| change.operations[0].pred = vec![stranger.clone()].into()
            }),
        ),
        (
            "an object that is not among its ancestors",
            Box::new({
                let stranger = stranger.clone();
                move |change| change.operations[0].obj = ObjectId::Id(stranger.clone())
            }),
        ),
        (
            "wrong numbers",
            Box::new(|change| change.start_op = 1.try_into().unwrap()),
        ),
        (
            "wrong numbers",
            Box::new(|change| change.start_op = 1_000_000.try_into().unwrap()),
        ),
        (
            "not allowed",
            Box::new(|change| {
                change.operations[0].action = OpType::Make(automerge::ObjType::Text);
            }),
        ),
        (
            "not allowed",
            Box::new(|change| change.operations[0].action = OpType::Increment(1)),
        ),
        (
            "changes nothing",
            Box::new(|change| change.operations.clear()),
        ),
        ("out of sequence", Box::new(|change| change.seq = 7)),
        (
            "key is empty",
            Box::new(|change| {
                change.operations[0].key = automerge::legacy::Key::Map("".into());
            }),
        ),
    ];
    for (number, (why, bend)) in bends.into_iter().enumerate() {
        let envelope =
            Liar::knowing(&mut world, 0, id, number as u8).bent(&[put("/a", json!(1))], bend);
        for node in 0..3 {
            world.refuses(node, id, &envelope, why);
        }
    }
    // The replicas continue as before.
    world.edit(2, id, "/b", 1);
    world.settle();
    assert_eq!(
        world.assert_same(&[0, 1, 2], id),
        json!({"m": {"x": 1}, "b": 1})
    );
}

#[test]
fn a_change_of_another_encoder_is_refused_and_the_sender_is_not_at_fault() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let edits: Vec<_> = (0..20).map(|at| put(&format!("/{at}"), json!(1))).collect();
    let honest = liar.change(&edits);
    let (document, _) = world.node(0).document(&id).unwrap().unwrap();
    let doc = document.automerge().clone();
    // Different bytes for the same operations.
    let mut random = fastrand::Rng::with_seed(1);
    let is_foreign = |bytes: &[u8]| {
        let checked = guard::decode(bytes, liar.session.actor(), 1).ok()?;
        let batch = Batch::default();
        let view = View {
            doc: &doc,
            batch: &batch,
        };
        let refusal = guard::check(view, checked.clone(), None, &mut Memory::default()).err()?;
        let is_same = checked.change.decode().operations == honest.decode().operations;
        (refusal == Refusal::Foreign && is_same).then_some(checked.id)
    };
    let foreign = (0..5_000_000).find_map(|_| {
        let mut body = mutants::body(honest.raw_bytes()).to_vec();
        mutants::mutate(&mut body, &mut random);
        let bytes = mutants::chunk(&body);
        is_foreign(&bytes).map(|id| (bytes, id))
    });
    let (bytes, change) = foreign.expect("one of the mutants");
    let envelope = liar.next(&bytes, change);
    let before = world.get(0, id);
    world.lie(0, news(id, &[envelope]));
    world.assert_no_offence();
    assert_eq!(world.get(0, id), before);
    world.edit(1, id, "/b", 1);
    world.settle();
    world.assert_same(&[0, 1], id);
}

/// A refusal must not depend on other data of the replica. The change refers to an operation that is present, but not
/// among its ancestors.
#[test]
fn a_change_may_refer_only_to_its_ancestors() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    world.edit(0, id, "/late", 1);
    world.settle();
    let (known, _) = world.node(0).document(&id).unwrap().unwrap();
    let late = known.automerge().get_changes(&[]).pop().unwrap();
    let id_of_late = OpId(late.start_op().get(), late.actor_id().clone());
    let envelope = liar.bent(&[put("/late", json!(2))], |change| {
        change.operations[0].pred = vec![id_of_late.clone()].into();
    });
    world.refuses(0, id, &envelope, "not among its ancestors");
    world.refuses(1, id, &envelope, "not among its ancestors");
}

#[test]
fn nesting_is_limited_across_many_changes() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let mut parent = ROOT;
    let mut refused = None;
    for depth in 0..60 {
        let mut tx = liar.doc.transaction();
        parent = tx
            .put_object(&parent, "d", automerge::ObjType::Map)
            .unwrap();
        let (hash, _) = tx.commit_with(CommitOptions::default().with_time(0));
        let change = automerge::ReadDoc::get_change_by_hash(&liar.doc, &hash.unwrap()).unwrap();
        let envelope = liar.next(change.raw_bytes(), ChangeId(change.hash().0));
        world.lie(0, news(id, &[envelope]));
        if world
            .offences(0)
            .iter()
            .any(|why| why.contains("too deeply"))
        {
            refused = Some(depth);
            break;
        }
    }
    assert_eq!(refused, Some(crate::MAX_DEPTH + 1));
    world.settle();
    world.assert_same(&[0, 1], id);
}

#[test]
fn decompression_bombs_are_refused_before_they_are_decoded() {
    let (mut world, id) = world(2);
    let mut document = Automerge::new();
    let mut tx = document.transaction();
    tx.put(ROOT, "a", "x".repeat(100_000)).unwrap();
    tx.commit();
    let mut change = document.get_changes(&[]).pop().unwrap();
    let compressed = change.bytes().into_owned();
    assert!(compressed.len() < 2_000);
    let whole = document.save();
    let long = vec![0; 600_000];
    let chunks = [
        (&compressed[..], "not an uncompressed change"),
        (&whole, "not an uncompressed change"),
        (&long, "longer"),
        (b"\x85oJ\x83", "ends early"),
    ];
    for (number, (bytes, why)) in chunks.into_iter().enumerate() {
        let envelope =
            Liar::knowing(&mut world, 0, id, number as u8).next(bytes, ChangeId([1; 32]));
        world.refuses(0, id, &envelope, why);
    }
}

#[test]
fn a_flood_of_changes_without_dependencies_is_limited_and_other_peers_are_served() {
    let (mut world, id) = world(2);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let _never_sent = liar.commit(&[put("/0", json!(0))]);
    let orphans: Vec<_> = (1..3_000)
        .map(|n| liar.commit(&[put(&format!("/{n}"), json!("x".repeat(2_000)))]))
        .collect();
    for some in orphans.chunks(100) {
        world.lie(0, news(id, some));
    }
    let (document, _) = world.node(0).document(&id).unwrap().unwrap();
    let (count, bytes) = document.waiting();
    assert!(
        count <= 512 && bytes <= 4 << 20,
        "{count} wait, {bytes} bytes"
    );
    world.edit(1, id, "/served", 1);
    world.settle();
    assert_eq!(world.get(0, id)["served"], 1);
    // None of the waiting changes is on disk.
    world.restart(0);
    let (document, _) = world.node(0).document(&id).unwrap().unwrap();
    assert_eq!(document.waiting(), (0, 0));
}

#[test]
fn arbitrary_messages_do_no_harm() {
    let (mut world, id) = world(2);
    let mut random = fastrand::Rng::with_seed(1);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let honest: Vec<Vec<u8>> = [
        news(id, &[liar.commit(&[put("/a", json!(1))])]),
        Kind::Summary(wire::Summary {
            document: Bytes::copy_from_slice(&id.0),
            genesis: true,
            answer: true,
            epochs: 3,
            ..Default::default()
        }),
        Kind::Want(wire::Want {
            document: Bytes::copy_from_slice(&id.0),
            genesis: true,
            epochs: 1,
            ..Default::default()
        }),
        Kind::Buckets(wire::Buckets {
            digests: vec![1; 2048].into(),
            shared: false,
        }),
        Kind::Listing(wire::Listing {
            entries: [&id.0[..], &[0; 8]].concat().into(),
            answer: true,
            ..Default::default()
        }),
        Kind::Root(wire::Root {
            digest: vec![1; 32].into(),
            shared: false,
        }),
        Kind::Interest(wire::Interest {
            holds: Bytes::copy_from_slice(&id.0),
            drops: Bytes::new(),
        }),
    ]
    .into_iter()
    .map(|kind| wire::DocumentMessage { kind: Some(kind) }.encode_to_vec())
    .collect();
    for _ in 0..20_000 {
        let mut message = honest[random.usize(..honest.len())].clone();
        for _ in 0..random.usize(1..6) {
            let position = random.usize(..message.len());
            match random.u8(..4) {
                0 => message[position] = random.u8(..),
                1 => message[position] ^= 1 << random.u8(..8),
                2 => message.truncate(position.max(1)),
                _ => message.insert(position, random.u8(..)),
            }
        }
        world.lie_bytes(0, &message);
        world.flying.clear();
    }
    world.node(0).assert_loads(id);
    let garbage: Vec<u8> = iter::repeat_with(|| random.u8(..)).take(1_000).collect();
    world.lie_bytes(0, &garbage);
    assert!(!world.offences(0).is_empty());
}

#[test]
fn each_request_is_answered_with_one_piece() {
    let (mut world, id) = world(2);
    for number in 0..40 {
        world.edit(0, id, &format!("/{number}"), "x".repeat(50_000));
    }
    world.settle();
    let (document, _) = world.node(0).document(&id).unwrap().unwrap();
    let sessions = crate::log::epoch::heads_to_wire(
        &document
            .heads()
            .into_iter()
            .map(|(id, head)| (id, crate::log::epoch::Head { count: 0, ..head }))
            .collect(),
    );
    let want = wire::Want {
        document: Bytes::copy_from_slice(&id.0),
        sessions,
        ..Default::default()
    };
    world.node(0).connected(key(LIAR));
    let message = wire::DocumentMessage {
        kind: Some(Kind::Want(want)),
    }
    .encode_to_vec();
    world.node(0).receive(key(LIAR), &message).unwrap();
    world.node(0).finish_round().unwrap();
    let mut answers = Vec::new();
    while let Some(output) = world.node(0).poll() {
        if let crate::Output::Send { peer, message } = output {
            assert_eq!(peer, key(LIAR));
            answers.push(message.len());
        }
    }
    // The answers are a list of the shared documents, and a piece.
    assert_eq!(answers.len(), 2, "{answers:?}");
    assert!(answers.iter().sum::<usize>() < 1 << 20, "{answers:?}");
}

#[test]
fn a_huge_index_does_no_harm() {
    let (mut world, id) = world(2);
    let liar = Liar::knowing(&mut world, 0, id, 1);
    for index in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let mut envelope = liar.sign(index, liar.chain, b"", ChangeId([1; 32]));
        world.lie(0, news(id, std::slice::from_ref(&envelope)));
        envelope.change = Bytes::from_static(b"x");
        world.lie(0, news(id, std::slice::from_ref(&envelope)));
        world.lie(
            0,
            Kind::Give(wire::Give {
                document: Bytes::copy_from_slice(&id.0),
                envelopes: vec![envelope.to_wire()],
                ..wire::Give::default()
            }),
        );
        world.flying.clear();
    }
    world.edit(1, id, "/served", 1);
    world.settle();
    assert_eq!(world.get(0, id)["served"], 1);
}

#[test]
fn messages_of_a_peer_that_is_not_connected_are_ignored() {
    let (mut world, id) = world(1);
    let envelope = Liar::knowing(&mut world, 0, id, 1).commit(&[put("/a", json!(1))]);
    let message = wire::DocumentMessage {
        kind: Some(news(id, &[envelope])),
    }
    .encode_to_vec();
    world.node(0).receive(Key([7; 32]), &message).unwrap();
    world.flush(0).unwrap();
    assert_eq!(
        world.node(0).get(id, &Path::default()).unwrap(),
        Some(json!({"m": {"x": 1}}))
    );
}

#[test]
fn scalars_that_json_lacks_are_still_readable() {
    let (mut world, id) = world(1);
    let mut liar = Liar::knowing(&mut world, 0, id, 1);
    let odd = [
        ScalarValue::Bytes(vec![1, 2]),
        ScalarValue::F64(f64::NAN),
        ScalarValue::Timestamp(5),
        ScalarValue::Unknown {
            type_code: 12,
            bytes: vec![9],
        },
    ];
    let mut tx = liar.doc.transaction();
    for (number, value) in odd.into_iter().enumerate() {
        tx.put(ROOT, number.to_string(), value).unwrap();
    }
    let (hash, _) = tx.commit_with(CommitOptions::default().with_time(0));
    let change = automerge::ReadDoc::get_change_by_hash(&liar.doc, &hash.unwrap()).unwrap();
    let envelope = liar.next(change.raw_bytes(), ChangeId(change.hash().0));
    world.lie(0, news(id, &[envelope]));
    assert_eq!(
        world.get(0, id),
        json!({"m": {"x": 1}, "0": "0102", "1": null, "2": 5, "3": null})
    );
}
