//! Fuzzes manifests. An accepted manifest is the same when encoded and decoded again, and a selection of it stays
//! within its files.
#![no_main]

use libfuzzer_sys::fuzz_target;
use weft_blobs::{Manifest, Selection, extract, selection::Wanted, shards};
use weft_fuzz::{World, safetensors, seed};

fn begin() {
    seed(&[&World::new().manifest.encode()]);
}

fn check(bytes: &[u8]) {
    let Ok(manifest) = Manifest::decode(bytes) else {
        return;
    };
    let again = Manifest::decode(&manifest.encode());
    assert_eq!(again.expect("an accepted manifest is accepted again"), manifest);
    let selection = Selection {
        files: vec!["**/*.bin".parse().expect("a pattern")],
        tensors: vec!["{a,b}*".parse().expect("a pattern")],
    };
    let Ok(selected) = selection.select(&manifest) else {
        return;
    };
    let header = safetensors();
    for one in selected.files() {
        let file = &manifest.files()[one.file];
        assert!(one.bytes() <= file.size);
        assert!(one.groups().iter().all(|groups| groups.start < groups.end));
        if let Wanted::Tensors { tensors, .. } = &one.wanted {
            let _ = extract::plan(file, tensors, &header);
        }
    }
    for index in shards::indices(&manifest, &selected) {
        let path = &manifest.files()[index].path;
        let _ = shards::reduce(br#"{"weight_map":{"a":"x"}}"#, path, &manifest, &selected);
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));
