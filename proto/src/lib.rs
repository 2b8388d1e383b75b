//! What goes on the wire.
//!
//! The `.proto` schemas under `schema/` are the contract between nodes ([`wire`]) and between a node and the programs
//! beside it ([`api`]); [`frame`] puts messages on a byte stream; [`rpc`] is calls over one.
//!
//! It promises: every decoder here bounds what it reads before it allocates, and refuses with an error that names the
//! limit.
//!
//! It leaves out: any transport (streams come from `weft-net`) and the meaning of messages (`weft-dht`, `weft-blobs`).

#[cfg(feature = "build")]
pub mod build;
pub mod frame;
pub mod rpc;

macro_rules! include_generated {
    ($package:literal) => {
        include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
    };
}

/// Messages between nodes.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod wire {
    include_generated!("weft.wire.v1");
}

/// The local gRPC API. With the feature `grpc`, also its client and server for `tonic`.
#[allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::all
)]
pub mod api {
    include_generated!("weft.api.v1");
}

/// The schemas as an encoded `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
