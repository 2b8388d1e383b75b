//! Fuzzes availability messages of peers. Any message is processed in bounded time.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use prost::Message;
use weft_blobs::{Transfer, availability, plan::Progress};
use weft_fuzz::{World, seed};
use weft_proto::wire::{Have, HaveFile, SwarmMessage, SwarmPeer};

static WORLD: LazyLock<World> = LazyLock::new(World::new);

fn first() -> Vec<u8> {
    let file = |file, whole, runs| HaveFile { file, whole, runs };
    SwarmMessage {
        manifest: vec![7; 32].into(),
        have: Some(Have {
            complete: false,
            files: vec![file(0, true, Vec::new()), file(1, false, vec![0, 2, 1, 1])],
        }),
        peers: vec![SwarmPeer {
            peer: vec![1; 38].into(),
            addresses: vec![vec![4, 127, 0, 0, 1, 6, 0, 1].into()],
        }],
        unknown: false,
    }
    .encode_to_vec()
}

fn begin() {
    seed(&[&first()]);
}

fn check(bytes: &[u8]) {
    if let Ok(SwarmMessage {
        have: Some(have), ..
    }) = SwarmMessage::decode(bytes)
    {
        let transfer = Transfer::new(
            &WORLD.store,
            &WORLD.manifest,
            Arc::new(Progress::default()),
            1,
        );
        availability::hear(&transfer.join(false, None), &have);
    }
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));
