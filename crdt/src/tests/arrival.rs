//! Documents of many sessions arrive from one peer in a limited number of pieces, for any session ids and any history.
//! Each run follows from a seed. A failing case is printed, and `CASE=N cargo test -p weft-crdt arrival` repeats it.

use std::{collections::BTreeSet, env, time::Duration};

use prost::Message;
use serde_json::json;
use weft_proto::wire::{self, document_message::Kind};

use super::{Node, World, identity, key, put};
use crate::{
    DocumentId, Edit, Error, NewDocument, Rights,
    store::key::{self as row, envelope},
};

/// Size of a piece in these tests, in bytes.
const PIECE: usize = 2 << 10;

/// The node that has everything and sends it.
pub(super) const GIVER: usize = 0;
/// The node that has a part and receives the rest.
pub(super) const RECEIVER: usize = 1;
/// The owner, and the number of writers; the owner is the first of them.
const OWNER: usize = 2;
const WRITERS: usize = 5;

/// The allowed number of pieces beyond the missing bytes divided by the size of a piece.
///
/// Every piece but the last of an exchange is full, and each begins with a change that can be applied, so the basic
/// value is 0. An interruption loses one piece in transit (1). If one node does not know the other's proofs and
/// decisions, the first piece is requested from counts that these then change (1). Another piece is in transit before
/// the giver knows the receiver's proofs and decisions (1). If sessions have shrunk at the giver meanwhile, the
/// receiver requests envelopes that no longer exist, and gets an empty piece (1); twice, if another round of comparing
/// follows (1).
const fn beyond(decided: bool, cut: bool) -> usize {
    (if decided { 4 } else { 0 }) + (if cut { 1 } else { 0 })
}

pub(super) struct Play {
    pub(super) world: World,
    pub(super) id: DocumentId,
    /// True if the history has epochs, compactions and forks.
    decided: bool,
    twins: Vec<usize>,
    revoked: bool,
}

impl Play {
    fn new(seed: u64, decided: bool) -> Self {
        let mut world = World::new((OWNER + WRITERS) as u8, seed);
        let writers = (OWNER..OWNER + WRITERS).map(|at| key(at as u8)).collect();
        let new = NewDocument {
            writers,
            ..NewDocument::default()
        };
        let id = world.create(OWNER, new);
        for at in 0..OWNER + WRITERS {
            world.node(at).hold(id).unwrap();
            world.flush(at).unwrap();
        }
        let mut this = Self {
            world,
            id,
            decided,
            twins: Vec::new(),
            revoked: false,
        };
        this.world.edit(OWNER, id, "/m", json!({}));
        for at in OWNER + 1..OWNER + WRITERS {
            this.sync(OWNER, at);
        }
        this
    }

    /// Connects two nodes until they have exchanged everything.
    fn sync(&mut self, a: usize, b: usize) {
        if a == b {
            return;
        }
        self.world.connect(a, b);
        self.world.settle();
        self.world.disconnect(a, b);
    }

    fn writer(&mut self) -> usize {
        OWNER + self.world.random.usize(..WRITERS)
    }

    fn edit(&mut self, at: usize, step: usize) {
        let length = self.world.random.usize(50..400);
        let edits = [
            put(&format!("/m/{at}-{step}"), json!("x".repeat(length))),
            Edit::Increment(super::at("/n"), 1),
        ];
        match self.world.commit(at, self.id, &edits) {
            Ok(()) | Err(Error::NotWriter { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    /// Makes a writer continue on two machines, which sign different changes for one position.
    fn fork(&mut self) {
        let at = OWNER + 1 + self.world.random.usize(..WRITERS - 1);
        let (disk, starts) = (
            self.world.nodes[at].disk.copy(),
            self.world.nodes[at].starts,
        );
        self.world.restore(at, disk.copy());
        let identity = identity(at as u8);
        self.world.nodes.push(Node::new(identity, disk, starts));
        let twin = self.world.nodes.len() - 1;
        self.twins.push(twin);
        for step in 0..3 {
            self.edit(at, 100_000 + twin * 10 + step);
            self.edit(twin, 200_000 + twin * 10 + step);
        }
        let (other, another) = (self.writer(), self.writer());
        self.sync(at, other);
        self.sync(twin, another);
    }

    fn step(&mut self, step: usize, receives_until: usize) {
        let at = self.writer();
        match self.world.random.u32(..100) {
            0..=59 => self.edit(at, step),
            60..=74 => self.world.restart(at),
            75..=91 => {
                let other = self.writer();
                self.sync(at, other);
            }
            92..=95 if step < receives_until => self.sync(at, RECEIVER),
            96 if self.decided && step > 150 && self.twins.len() < 2 => self.fork(),
            97 if self.decided && step < 80 => {
                let _ = self.world.node(OWNER).compact(self.id);
                self.world.flush(OWNER).unwrap();
            }
            98 | 99 if self.decided => {
                let peer = vec![key((OWNER + WRITERS - 1) as u8)];
                let rights = match self.revoked {
                    true => Rights {
                        add: peer,
                        ..Rights::default()
                    },
                    false => Rights {
                        revoke: peer,
                        ..Rights::default()
                    },
                };
                self.revoked = !self.revoked;
                self.world.node(OWNER).decide(self.id, rights).unwrap();
                self.world.flush(OWNER).unwrap();
            }
            _ => {}
        }
    }

    /// Returns a copy of a node that also knows another node's proofs and decisions, but none of its envelopes.
    fn informed(&mut self, at: usize, by: usize) -> Node {
        let disk = self.world.nodes[at].disk.copy();
        let mut node = Node::new(identity(at as u8), disk, 100);
        let Some((document, store)) = self.world.node(by).document(&self.id).unwrap() else {
            return node;
        };
        let (epochs, genesis) = (document.epochs.clone(), document.genesis.clone());
        let base: Vec<_> = store
            .scan(&row::base(&self.id), &[], usize::MAX)
            .unwrap()
            .into_iter()
            .map(|(_, change)| change.into())
            .collect();
        let proofs: Vec<_> = document
            .forks()
            .keys()
            .map(|session| document.proof(session).unwrap().clone())
            .collect();
        if node.replica().document(&self.id).unwrap().is_none() {
            node.replica().hold(self.id).unwrap();
            node.replica().arrived(genesis.clone()).unwrap();
        }
        let (document, store) = node.replica().document(&self.id).unwrap().unwrap();
        let known: Vec<_> = document.epochs.iter().map(|epoch| epoch.id).collect();
        let epochs = epochs.iter().filter(|epoch| !known.contains(&epoch.id));
        let epochs: Vec<_> = epochs.cloned().collect();
        let base = match epochs.iter().any(|epoch| epoch.is_compaction()) {
            true => base,
            false => Vec::new(),
        };
        if !epochs.is_empty() {
            document.take_epochs(store, epochs, &base).unwrap();
        }
        for proof in proofs {
            document.take_proof(store, &proof).unwrap();
        }
        node
    }

    /// Returns the bytes that the receiver lacks: envelopes, decisions, base and proofs.
    fn missing_bytes(&mut self) -> usize {
        let mut receiver = self.informed(RECEIVER, GIVER);
        let mut giver = self.informed(GIVER, RECEIVER);
        let id = self.id;
        let (ours, _) = receiver.replica().document(&id).unwrap().unwrap();
        let (theirs, store) = giver.replica().document(&id).unwrap().unwrap();
        let mut bytes = 0;
        for (session, head) in theirs.heads() {
            let count = ours.count(&session);
            for index in count..head.count {
                bytes += store
                    .get(&envelope(&id, &session, index))
                    .unwrap()
                    .unwrap()
                    .len();
            }
        }
        let here = match self.world.node(RECEIVER).document(&id).unwrap() {
            Some((document, _)) => {
                let compaction = document.epochs.compaction().map(|epoch| epoch.id);
                (document.epochs.count(), compaction)
            }
            None => (0, None),
        };
        let new = theirs.epochs.iter().filter(|epoch| epoch.number > here.0);
        bytes += new.map(|epoch| epoch.wire.encoded_len()).sum::<usize>();
        if theirs.epochs.compaction().map(|epoch| epoch.id) != here.1 {
            let base = store.scan(&row::base(&id), &[], usize::MAX).unwrap();
            bytes += base.iter().map(|(_, change)| change.len()).sum::<usize>();
        }
        let proofs = theirs.forks();
        let proofs = proofs.keys().filter_map(|session| theirs.proof(session));
        bytes
            + proofs
                .map(|proof| proof.to_wire().encoded_len())
                .sum::<usize>()
    }

    fn same(&mut self) -> bool {
        let id = self.id;
        let digests = [GIVER, RECEIVER].map(|at| {
            let details = self.world.node(at).info(id).unwrap().details;
            details.map(|details| details.digest)
        });
        digests[0] == digests[1] && digests[0].is_some()
    }

    /// Connects the receiver to the giver. Returns the number of pieces received, over all connections.
    fn receive(&mut self, cut_after: Option<usize>) -> usize {
        for at in [GIVER, RECEIVER] {
            self.world.node(at).set_piece(PIECE);
        }
        let mut pieces = 0;
        let mut cut_after = cut_after;
        self.world.connect(GIVER, RECEIVER);
        for round in 0..3 {
            let mut flown = 0;
            while let Some((_, to, message)) = self.world.flying.first() {
                let message = wire::DocumentMessage::decode(&message[..]).unwrap();
                if *to == RECEIVER && matches!(message.kind, Some(Kind::Give(_))) {
                    pieces += 1;
                    if cut_after.is_some_and(|after| pieces > after) {
                        cut_after = None;
                        self.world.disconnect(GIVER, RECEIVER);
                        self.world.connect(GIVER, RECEIVER);
                        continue;
                    }
                }
                self.world.deliver();
                flown += 1;
                assert!(flown < 20_000, "messages are exchanged without end");
            }
            if self.same() {
                return pieces;
            }
            assert!(
                self.decided && round < 2,
                "not the same after {pieces} pieces and {round} rounds"
            );
            self.world.pass(Duration::from_secs(61));
        }
        pieces
    }
}

/// Creates a document with a random history. The giver has all of it, and the receiver has a prefix.
pub(super) fn history(seed: u64, decided: bool) -> Play {
    let mut play = Play::new(seed, decided);
    let receives_until = play.world.random.usize(..300);
    for step in 0..play.world.random.usize(350..450) {
        play.step(step, receives_until);
    }
    let knows_twins = play.world.random.bool();
    let twins: Vec<_> = play.twins.clone();
    for _ in 0..2 {
        for at in OWNER..OWNER + WRITERS {
            play.sync(at, GIVER);
        }
        for twin in twins.iter().filter(|_| knows_twins) {
            play.sync(*twin, GIVER);
        }
    }
    if decided && !knows_twins && play.world.random.bool() {
        // Only the receiver knows the other branch and the changes that build on it.
        twins.iter().for_each(|twin| play.sync(*twin, RECEIVER));
    }
    play
}

/// Runs a case. Returns the missing bytes, the sessions, and the pieces.
fn play(case: u64) -> (usize, usize, usize) {
    let (decided, cut, by_session) = (case % 2 == 1, case / 2 % 2 == 1, case / 4 % 4 == 3);
    let mut play = history(case, decided);
    let bytes = play.missing_bytes();
    let sessions = {
        let (document, _) = play.world.node(GIVER).document(&play.id).unwrap().unwrap();
        document.heads().len()
    };
    if !decided {
        assert!(bytes >= 10 * PIECE, "only {bytes} bytes are missing");
    }
    play.world.node(GIVER).set_by_session(by_session);
    let cut_after = cut.then(|| play.world.random.usize(..(bytes / PIECE).max(1)));
    let pieces = play.receive(cut_after);
    let id = play.id;
    play.world.assert_same(&[GIVER, RECEIVER], id);
    play.world.assert_no_offence();
    let (document, _) = play.world.node(RECEIVER).document(&id).unwrap().unwrap();
    if !decided {
        assert_eq!(
            document.waiting().0,
            0,
            "an envelope waits without a reason"
        );
    }
    let full = bytes.div_ceil(PIECE);
    let bound = match by_session {
        // With a giver of an earlier version, each session may have to be tried, and the number of waiting envelopes is
        // limited.
        true => 2 * full + sessions,
        false => full + beyond(decided, cut),
    };
    assert!(
        pieces <= bound,
        "{pieces} pieces for {bytes} bytes of {sessions} sessions: more than {bound}"
    );
    (bytes, sessions, pieces)
}

#[test]
fn a_document_of_many_sessions_arrives_from_one_peer_in_a_bounded_number_of_pieces() {
    if let Ok(case) = env::var("CASE") {
        let (bytes, sessions, pieces) = play(case.parse().expect("CASE is a number"));
        println!(
            "{bytes} bytes of {sessions} sessions in {pieces} pieces: {} beyond",
            pieces as i64 - bytes.div_ceil(PIECE) as i64
        );
        return;
    }
    let cases = env::var("CASES").map_or(16, |cases| cases.parse().expect("CASES is a number"));
    for case in 0..cases {
        if let Err(panic) = std::panic::catch_unwind(|| play(case)) {
            eprintln!("case {case} fails: CASE={case} cargo test -p weft-crdt arrival");
            std::panic::resume_unwind(panic);
        }
    }
}

/// Two nodes write in turns. The giver acts like a version that sends session by session.
#[test]
fn requested_envelopes_may_use_all_of_their_room() {
    let mut world = World::new(4, 7);
    let id = world.shared_by(&[0, 1]);
    for number in 0..500 {
        let at = number % 2;
        world.edit(at, id, &format!("/{number}"), "x".repeat(100));
        world.connect(0, 1);
        world.settle();
        world.disconnect(0, 1);
    }
    world.node(0).set_by_session(true);
    world.node(0).set_piece(100 << 10);
    world.node(3).hold(id).unwrap();
    world.flush(3).unwrap();
    world.connect(0, 3);
    let (mut most, mut pieces) = (0, 0);
    while let Some((_, to, message)) = world.flying.first() {
        let message = wire::DocumentMessage::decode(&message[..]).unwrap();
        pieces += usize::from(*to == 3 && matches!(message.kind, Some(Kind::Give(_))));
        world.deliver();
        if let Some((document, _)) = world.node(3).document(&id).unwrap() {
            most = most.max(document.waiting().0);
        }
    }
    world.assert_same(&[0, 3], id);
    assert!(most > 150, "only {most} have waited");
    assert!(pieces < 8, "{pieces} pieces");
}

#[test]
fn a_document_is_complete_once_it_has_everything_that_its_holders_have() {
    let mut world = World::new(4, 3);
    let id = world.shared_by(&[0, 1]);
    for number in 0..40 {
        world.edit(0, id, &format!("/{number}"), "x".repeat(1000));
    }
    world.node(3).hold(id).unwrap();
    world.flush(3).unwrap();
    let comparing = world.node(3).compare(id).unwrap();
    let nobody = world.node(3).completeness(id).unwrap();
    assert!(
        nobody.holders.is_empty() && !nobody.is_whole(),
        "{nobody:?}"
    );
    world.node(0).set_piece(8 << 10);
    world.connect(0, 3);
    let mut seen = BTreeSet::new();
    while world.deliver() {
        let completeness = world.node(3).completeness(id).unwrap();
        if let [holder] = &completeness.holders[..]
            && holder.answered
        {
            seen.insert(holder.missing);
            let is_here = completeness.changes == 40;
            assert_eq!(completeness.is_whole(), is_here, "{completeness:?}");
            assert_eq!((holder.peer, holder.changes), (key(0), 40));
        }
    }
    assert!(seen.len() >= 4, "it came at once: {seen:?}");
    // A second holder has more, so the document is incomplete until that has arrived too.
    world.edit(1, id, "/of another", 1);
    world.connect(1, 3);
    let mut was_missing = false;
    while world.deliver() {
        let completeness = world.node(3).completeness(id).unwrap();
        was_missing |= !completeness.is_whole();
    }
    assert!(was_missing);
    let whole = world.node(3).completeness(id).unwrap();
    assert!(whole.is_whole() && whole.holders.len() == 2, "{whole:?}");
    assert_eq!(whole.changes, 41);
    // Changes that a compaction removes are not missing.
    world.node(0).compact(id).unwrap();
    world.flush(0).unwrap();
    for _ in 0..3 {
        world.settle();
        world.pass(Duration::from_secs(2));
        let _ = world.node(3).completeness(id).unwrap();
        world.flush(3).unwrap();
    }
    world.settle();
    let whole = world.node(3).completeness(id).unwrap();
    assert!(whole.is_whole(), "{whole:?}");
    // Holders that have disconnected do not count.
    world.disconnect(0, 3);
    world.disconnect(1, 3);
    assert!(!world.node(3).completeness(id).unwrap().is_whole());
    drop(comparing);
    let unknown = DocumentId([9; 32]);
    assert!(matches!(
        world.node(3).compare(unknown),
        Err(Error::Unknown(_))
    ));
}
