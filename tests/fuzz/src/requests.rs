//! Fuzzes requests to a provider. The stream ends after any request, and the provider sends no more than requested.
#![no_main]

use std::{sync::LazyLock, time::Duration};

use libfuzzer_sys::fuzz_target;
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    runtime::Runtime,
    time::timeout,
};
use weft_blobs::serve::serve;
use weft_fuzz::{World, seed};
use weft_proto::wire::BlobRequest;

/// Shorter than libFuzzer's limit for one input.
const PATIENCE: Duration = Duration::from_secs(5);

static WORLD: LazyLock<World> = LazyLock::new(World::new);

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("a runtime")
});

/// Requests for each file, with and without content, and a cancelled one.
fn first() -> Vec<u8> {
    let mut bytes = Vec::new();
    for file in WORLD.manifest.files() {
        let request = BlobRequest {
            hash: file.blake3.as_bytes().to_vec().into(),
            size: Some(file.size),
            first_group: 0,
            groups: file.size.div_ceil(65_536),
            cancel: None,
            proofs_only: false,
            ..Default::default()
        };
        bytes.extend(request.encode_length_delimited_to_vec());
        let proofs = BlobRequest {
            proofs_only: true,
            ..request
        };
        bytes.extend(proofs.encode_length_delimited_to_vec());
    }
    let cancel = BlobRequest {
        cancel: Some(1),
        ..BlobRequest::default()
    };
    bytes.extend(cancel.encode_length_delimited_to_vec());
    bytes
}

fn begin() {
    seed(&[&first()]);
}

fn check(bytes: &[u8]) {
    RUNTIME.block_on(async {
        let (mut near, far) = duplex(1 << 20);
        let served = tokio::spawn(async { serve(WORLD.store.clone(), far, &[]).await });
        // The provider may have closed the stream by now.
        let _ = near.write_all(bytes).await;
        let _ = near.shutdown().await;
        let mut buffer = vec![0; 64 * 1024];
        let mut answered = 0;
        while let Ok(n @ 1..) = timeout(PATIENCE, near.read(&mut buffer))
            .await
            .expect("the provider continues or ends")
        {
            answered += n;
        }
        let _ = served.await.expect("the provider does not panic");
        // A request with content names it by its hash, and the answer is at most as large as the largest file.
        assert!(answered <= (bytes.len() / 34 + 1) * 310_000);
    });
}

fuzz_target!(init: begin(), |bytes: &[u8]| check(bytes));
