//! The other process of a benchmark.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::Failure;

/// The child process, ended when dropped.
pub(super) struct Provider {
    child: Child,
    /// What it printed: how to reach it.
    pub(super) line: String,
}

impl Provider {
    /// Starts this program with other arguments, and waits for its first line.
    pub(super) fn start(arguments: &[&OsStr]) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().expect("standard output is captured");
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let provider = Self { child, line };
        match read {
            Ok(1..) => Ok(provider),
            _ => Err(Failure("the provider did not start".to_owned())),
        }
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        // The end of its input asks it to stop; a second later it is killed.
        drop(self.child.stdin.take());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        // Fails if it has just ended, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the other process: says how to reach it.
pub(super) fn announce(line: &str) -> Result<(), Failure> {
    println!("{line}");
    std::io::stdout().flush()?;
    Ok(())
}

/// In the other process: until it is not needed any more.
pub(super) fn wait_for_end_of_input() -> Result<(), Failure> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
