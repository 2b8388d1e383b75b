//! Generates the Rust types from `schema/`, with no system `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=schema");
    let files = [
        "weft/api/v1/api.proto",
        "weft/wire/v1/autonat.proto",
        "weft/wire/v1/blobs.proto",
        "weft/wire/v1/circuit.proto",
        "weft/wire/v1/document.proto",
        "weft/wire/v1/lane.proto",
        "weft/wire/v1/manifest.proto",
        "weft/wire/v1/punch.proto",
        "weft/wire/v1/record.proto",
        "weft/wire/v1/rpc.proto",
        "weft/wire/v1/seen.proto",
    ];
    let descriptors = protox::compile(files, ["schema"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let grpc = env::var_os("CARGO_FEATURE_GRPC").is_some();
    tonic_prost_build::configure()
        .build_client(grpc)
        .build_server(grpc)
        .build_transport(false)
        .bytes(".weft.wire")
        .compile_fds(descriptors)?;
    Ok(())
}
