//! Fuzzes indices of sharded models. A reduced index is a valid index.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use weft_blobs::{Selection, selection::Selected, shards};
use weft_fuzz::{World, seed};

struct Known {
    world: World,
    selected: Selected,
}

static KNOWN: LazyLock<Known> = LazyLock::new(|| {
    let world = World::new();
    let selection = Selection {
        tensors: vec!["a".parse().expect("a pattern")],
        ..Selection::default()
    };
    let selected = selection
        .select(&world.manifest)
        .expect("there is a tensor");
    Known { world, selected }
});

const FIRST: &[u8] = concat!(
    r#"{"metadata":{"total_size":12},"#,
    r#""weight_map":{"a":"model.safetensors","b":"model.safetensors"}}"#
)
.as_bytes();

fn begin() {
    seed(&[FIRST]);
}

fn check(bytes: &[u8]) {
    let parsed = shards::shards(bytes);
    let reduced = shards::reduce(
        bytes,
        "model.safetensors.index.json",
        &KNOWN.world.manifest,
        &KNOWN.selected,
    );
    // Both functions accept the same indices.
    assert_eq!(parsed.is_ok(), reduced.is_ok());
    if let Ok(Some(reduced)) = reduced {
        let of_reduced = shards::shards(&reduced).expect("a reduced index is an index");
        assert_eq!(of_reduced.len(), 1);
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));
