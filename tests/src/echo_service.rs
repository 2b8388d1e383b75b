//! The example service in Python.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, ChildStdout, Stdio},
};

use crate::{Home, python};

/// `examples/python/serve_echo.py`, which runs beside a node. It is ended by its id on drop.
#[derive(Debug)]
pub struct EchoService {
    child: Child,
    /// Kept open. The service's output fits into the pipe.
    _stdout: BufReader<ChildStdout>,
}

impl EchoService {
    /// The method that the service offers.
    pub const METHOD: &str = "example.echo.v1.Echo/Say";

    /// Starts the service, and waits until it serves.
    pub fn start(home: &Home) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/python/serve_echo.py");
        let mut child = python()
            .arg(script)
            .arg(home.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the service can be started");
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().expect("its output is captured"));
        stdout.read_line(&mut line).expect("its output can be read");
        let service = Self {
            child,
            _stdout: stdout,
        };
        assert_eq!(line, "ready\n");
        service
    }
}

impl Drop for EchoService {
    fn drop(&mut self) {
        // Fails if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
