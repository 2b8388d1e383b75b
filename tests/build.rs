//! Generates the services that the tests and benchmarks call, and the benchmark's service for tonic as well.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    weft_proto::build::compile(&["test.proto", "bench.proto"], &["schema"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("tonic");
    fs::create_dir_all(&out)?;
    let descriptors = protox::compile(["bench.proto"], ["schema"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(true)
        .out_dir(out)
        .compile_fds(descriptors)?;
    Ok(())
}
