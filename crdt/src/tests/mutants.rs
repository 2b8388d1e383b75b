//! Randomly modified changes with correct length and checksum. None may panic outside the guard, no accepted one may
//! leave a document that does not load, and the verdict must not depend on other data of the replica. `MUTANTS_SECONDS`
//! sets the duration.

use std::{
    env,
    time::{Duration, Instant},
};

use automerge::{ActorId, Automerge, Change, ReadDoc};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{at, put};
use crate::{
    Edit,
    content::{
        batch::{Batch, View},
        guard::{self, Memory},
        value,
    },
    refusal::Refusal,
};

const ACTOR: [u8; 16] = [7; 16];

fn leb(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let group = (value & 0x7f) as u8;
        value >>= 7;
        if value == 0 {
            bytes.push(group);
            return bytes;
        }
        bytes.push(group | 0x80);
    }
}

/// Returns a change chunk with this body.
pub(super) fn chunk(body: &[u8]) -> Vec<u8> {
    let rest = [&[1], &leb(body.len())[..], body].concat();
    let hash = Sha256::digest(&rest);
    [&[0x85, 0x6f, 0x4a, 0x83], &hash[..4], &rest].concat()
}

pub(super) fn body(chunk: &[u8]) -> &[u8] {
    let length = chunk[9..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
    &chunk[9 + length..]
}

fn edited(doc: &mut Automerge, edits: &[Edit]) -> Change {
    let mut tx = doc.transaction();
    edits
        .iter()
        .for_each(|edit| value::apply(&mut tx, edit).unwrap());
    let (hash, _) = tx.commit();
    doc.get_change_by_hash(&hash.unwrap()).unwrap()
}

/// Returns a document, a document with more data, and honest changes of one actor to the first, each with its sequence
/// number.
fn corpus() -> (Automerge, Automerge, Vec<Change>) {
    let mut doc = Automerge::new().with_actor(ActorId::from([1; 16]));
    edited(
        &mut doc,
        &[
            put("/m", json!({"a": 1, "b": {"c": [1, 2, 3, {"d": "text"}]}})),
            put("/l", json!([[1], [2], "three"])),
            Edit::Increment(at("/n"), 5),
        ],
    );
    let mut other = doc.fork().with_actor(ActorId::from([2; 16]));
    edited(
        &mut other,
        &[
            Edit::Delete(at("/l/1")),
            put("/m/a", json!(2)),
            Edit::Increment(at("/n"), 1),
        ],
    );
    doc.merge(&mut other).unwrap();
    edited(&mut doc, &[put("/after", json!(true))]);
    let mut more = doc.fork().with_actor(ActorId::from([3; 16]));
    for edit in [
        Edit::Delete(at("/m/b/c/0")),
        put("/m/a", json!("more")),
        Edit::Insert(at("/l/0"), json!([])),
        Edit::Delete(at("/m/b")),
    ] {
        edited(&mut more, &[edit]);
    }
    let stories: [&[Edit]; 6] = [
        &[put("/m/a", json!("mine"))],
        &[
            Edit::Insert(at("/l/1"), json!({"x": [1, 2]})),
            Edit::Delete(at("/l/0")),
        ],
        &[
            Edit::Increment(at("/n"), -3),
            put("/new", json!({"k": null, "f": 1.5})),
        ],
        &[
            Edit::Delete(at("/m/b/c/1")),
            put("/m/b/c/2/d", json!("other")),
        ],
        &[
            put("/u", json!(u64::MAX)),
            put("/t", json!("a long text that takes some bytes")),
        ],
        &[put("/l/-", json!([[[["deep"]]]])), Edit::Delete(at("/m"))],
    ];
    let changes = stories.iter().map(|edits| {
        let mut mine = doc.fork().with_actor(ActorId::from(ACTOR));
        edited(&mut mine, edits)
    });
    let changes = changes.collect();
    (doc, more, changes)
}

pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut fastrand::Rng) {
    for _ in 0..random.usize(1..5) {
        if bytes.is_empty() {
            return;
        }
        let position = random.usize(..bytes.len());
        match random.u8(..7) {
            0 => bytes[position] = random.u8(..),
            1 => bytes[position] ^= 1 << random.u8(..8),
            2 => bytes[position] = bytes[position].wrapping_add(1),
            3 => bytes[position] = bytes[position].wrapping_sub(1),
            4 => bytes.insert(position, random.u8(..)),
            5 => _ = bytes.remove(position),
            _ => {
                let from = random.usize(..bytes.len());
                bytes[position] = bytes[from];
            }
        }
    }
}

fn verdict(doc: &Automerge, bytes: &[u8]) -> Result<Automerge, Refusal> {
    let checked = guard::decode(bytes, ACTOR, 1)?;
    let mut copy = doc.clone();
    let mut batch = Batch::default();
    let (mut memory, doc) = (Memory::default(), &copy);
    let view = View { doc, batch: &batch };
    let pending = guard::check(view, checked, None, &mut memory)?;
    batch.add(doc, pending);
    guard::apply(&mut copy, &batch, &mut memory)?;
    Ok(copy)
}

fn sorted(doc: &Automerge) -> Vec<char> {
    let mut text: Vec<char> = format!("{:?}", doc.hydrate(None)).chars().collect();
    text.sort_unstable();
    text
}

fn assert_loads(doc: &Automerge, bytes: &[u8]) {
    let loaded = guard::catch_panic(|| {
        let loaded = Automerge::load(&doc.save()).ok()?;
        let same = loaded.get_heads() == doc.get_heads()
            && value::get(&loaded, &crate::Path::default()) == value::get(doc, &crate::Path::default())
            // Compare as text, in which NaN equals itself. Sort it, because maps have no order.
            && sorted(&loaded) == sorted(doc);
        same.then_some(())
    });
    assert_eq!(
        loaded,
        Ok(Some(())),
        "a change was accepted after which the document does not load: {bytes:?}"
    );
}

#[test]
fn no_mutant_gets_past_the_guard() {
    let seconds = env::var("MUTANTS_SECONDS").map_or(60, |seconds| {
        seconds.parse().expect("MUTANTS_SECONDS is a number")
    });
    let seed = env::var("SEED").map_or_else(
        |_| fastrand::u64(..),
        |seed| seed.parse().expect("SEED is a number"),
    );
    eprintln!("SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let (doc, more, changes) = corpus();
    for change in &changes {
        for doc in [&doc, &more] {
            let taken = verdict(doc, change.raw_bytes()).expect("an honest change is accepted");
            assert_loads(&taken, change.raw_bytes());
        }
    }
    let begin = Instant::now();
    let (mut mutants, mut taken) = (0u64, 0u64);
    while begin.elapsed() < Duration::from_secs(seconds) {
        let mut bytes = body(changes[random.usize(..changes.len())].raw_bytes()).to_vec();
        mutate(&mut bytes, &mut random);
        let bytes = chunk(&bytes);
        mutants += 1;
        let alone = verdict(&doc, &bytes);
        let with_more = verdict(&more, &bytes);
        assert_eq!(
            alone.is_ok(),
            with_more.is_ok(),
            "the verdict depends on other data: {alone:?} and {with_more:?} of {bytes:?}"
        );
        for doc in [alone, with_more].into_iter().flatten() {
            taken += 1;
            assert_loads(&doc, &bytes);
        }
    }
    eprintln!("{mutants} mutants, {} of them accepted", taken / 2);
    assert!(
        mutants > 1_000 * seconds.min(1) && taken > 0,
        "{mutants} mutants, {taken} accepted"
    );
}
