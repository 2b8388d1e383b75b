//! Parts shared by the system tests and benchmarks: the real program as a child process, slow networks, models.
//!
//! It promises: processes are ended by their id when a test ends, however it ends; all traffic stays on loopback or in
//! network namespaces of the test's own; nothing is skipped silently: if a test lacks something that it needs, the
//! error says how to get it.
//!
//! It leaves out: the tests themselves, in `tests/`, and the benchmarks, in the program `bench`.

mod alone;
pub mod bench;
pub mod content;
mod echo_service;
pub mod lab;
pub mod links;
mod mesh;
mod model;
pub mod network;
pub mod numbers;
mod program;
mod proxy;
mod random;

pub use self::{
    alone::{Alone, alone},
    echo_service::EchoService,
    mesh::{capped, contact, mesh, node, providers},
    model::{python, real_model, same_files},
    network::bare_network,
    program::{Daemon, Finished, Home, Running},
    proxy::Proxy,
    random::Random,
};
