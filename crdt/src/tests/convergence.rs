//! Convergence as a property: a few replicas with random edits, over links that drop, repeat and reorder messages. At
//! the end, all have the same data and content, and each one's save loads. `CASES` sets the number of cases; a failing
//! one is printed, and `CASE=N` repeats it.

use std::env;

use serde_json::{Value, json};

use super::{Faults, World, at, put};
use crate::{DocumentId, Edit, Error};

/// Returns a path that exists in this content, or is next to one that does.
fn position(world: &mut World, content: &Value) -> String {
    let mut path = String::new();
    let mut here = content;
    loop {
        let random = &mut world.random;
        let (part, next) = match here {
            Value::Object(map) if !map.is_empty() && random.u8(..4) > 0 => {
                let (key, value) = map
                    .iter()
                    .nth(random.usize(..map.len()))
                    .expect("the index is below the length");
                (key.clone(), Some(value))
            }
            Value::Array(list) if !list.is_empty() && random.u8(..4) > 0 => {
                let index = random.usize(..list.len());
                (index.to_string(), Some(&list[index]))
            }
            Value::Array(list) => (list.len().to_string(), None),
            _ => (format!("k{}", random.u8(..6)), None),
        };
        path = format!("{path}/{part}");
        match next {
            Some(next) if (next.is_object() || next.is_array()) && random.bool() => here = next,
            _ => return path,
        }
    }
}

fn edit(world: &mut World, node: usize, id: DocumentId) {
    let content = world.get(node, id);
    let mut edits = Vec::new();
    for _ in 0..world.random.usize(1..4) {
        let path = position(world, &content);
        let number = world.random.u8(..);
        edits.push(match world.random.u8(..10) {
            0 | 1 => Edit::Delete(at(&path)),
            2 => Edit::Increment(at(&path), i64::from(number) - 100),
            3 | 4 => Edit::Insert(at(&path), json!({ "by": node, "n": number })),
            5 => put(&path, json!([number, [], {}])),
            6 => put(&path, json!({ "a": { "b": number } })),
            7 => put(&path, json!(format!("text {number}"))),
            _ => put(&path, json!(number)),
        });
    }
    match world.commit(node, id, &edits) {
        // Edits of one commit may remove each other's position.
        Ok(()) | Err(Error::Edit(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

fn play(case: u64) {
    let nodes = 3 + (case % 4) as usize;
    let mut world = World::connected(nodes as u8, case);
    let all: Vec<usize> = (0..nodes).collect();
    let id = world.shared(&all);
    world.faults = Faults {
        drop: world.random.u8(..60),
        repeat: world.random.u8(..60),
        reorder: world.random.u8(..),
    };
    for _ in 0..80 {
        let node = world.random.usize(..nodes);
        edit(&mut world, node, id);
        for _ in 0..world.random.usize(..8) {
            world.deliver();
        }
    }
    world.faults = Faults::default();
    world.settle();
    for _ in 0..3 {
        world.pass(std::time::Duration::from_secs(61));
        world.settle();
    }
    world.assert_same(&all, id);
    let commits = world.node(0).history(id, usize::MAX).unwrap().len();
    assert!(commits > 20, "only {commits} of 80 commits fitted");
    for node in all {
        world.node(node).assert_loads(id);
    }
    world.assert_no_offence();
}

#[test]
fn replicas_with_the_same_data_show_the_same_content() {
    if let Ok(case) = env::var("CASE") {
        return play(case.parse().expect("CASE is a number"));
    }
    let cases = env::var("CASES").map_or(40, |cases| cases.parse().expect("CASES is a number"));
    for case in 0..cases {
        if let Err(panic) = std::panic::catch_unwind(|| play(case)) {
            eprintln!("case {case} fails: CASE={case} cargo test -p weft-crdt convergence");
            std::panic::resume_unwind(panic);
        }
    }
}
