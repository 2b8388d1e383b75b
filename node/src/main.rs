//! The `weft` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    weft_node::run(std::env::args_os())
}
