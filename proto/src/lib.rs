//! Schemas, framing and calls: the wire formats of Weft.
//!
//! The `.proto` schemas under `schema/` define the messages between nodes ([`wire`]) and between a node and local
//! programs ([`api`]). [`frame`] writes messages to a byte stream; [`rpc`] makes calls over one.
//!
//! Every decoder in this crate checks a limit before it allocates, and its error names the limit.
//!
//! The crate has no transport (streams come from `weft-net`) and does not interpret messages (`weft-dht` and
//! `weft-blobs` do).

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
