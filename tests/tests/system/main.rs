//! The program `weft` as users and other programs start it, on loopback or in network and mount namespaces of a test. A
//! module that also has nodes in this process is here if it starts the program as well.
//!
//! Each module is one subject. All of them are one program, because each program links all of Weft once more. Tests
//! that measure times are in `timed`.

#![allow(clippy::unwrap_used)]

mod adding;
mod bench_dht;
mod calls;
mod clock;
mod commands;
mod content_faults;
mod documents;
mod documents_whole;
mod faults;
mod folders;
mod grpc;
mod hf_cache;
mod hostile;
mod lan;
mod parts;
mod providers;
mod reach;
mod records;
mod registry;
mod services;
mod slow_links;
mod storage;
mod story;
mod topics;
