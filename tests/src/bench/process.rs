//! The other process of a benchmark.

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use super::Failure;

/// The child process. It is ended on drop.
pub(super) struct Provider {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// The first line that it printed: how to reach it.
    pub(super) line: String,
}

impl Provider {
    /// Starts this program with other arguments, and waits for its first line.
    pub(super) fn start(arguments: &[&OsStr]) -> Result<Self, Failure> {
        Self::start_program(&std::env::current_exe()?, arguments)
    }

    /// Starts a program, and waits for its first line.
    pub(super) fn start_program(program: &Path, arguments: &[&OsStr]) -> Result<Self, Failure> {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Failure(format!("{}: {error}", program.display())))?;
        let stdout = child.stdout.take().expect("standard output is captured");
        let mut process = Self {
            child,
            stdout: BufReader::new(stdout),
            line: String::new(),
        };
        process.line = process.next_line()?;
        Ok(process)
    }

    /// Sends the process a line, and returns its answer.
    pub(super) fn ask(&mut self, line: &str) -> Result<String, Failure> {
        let input = self.child.stdin.as_mut();
        writeln!(input.expect("standard input is ours"), "{line}")?;
        self.next_line()
    }

    fn next_line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(1..) => Ok(line.trim().to_owned()),
            _ => Err(Failure("the other process has ended early".to_owned())),
        }
    }

    /// Returns the resources that the process has used until now.
    pub(super) fn usage(&self) -> Result<Usage, Failure> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", self.child.id()));
        let (stat, status) = (read("stat")?, read("status")?);
        // The program's name, in brackets, may contain spaces.
        let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
        let fields: Vec<f64> = fields
            .split_whitespace()
            .map(|field| field.parse().unwrap_or_default())
            .collect();
        let [user, system] = [11, 12].map(|n| fields.get(n).copied().unwrap_or_default());
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        Ok(Usage {
            cpu: (user + system) / TICKS,
            peak: peak.unwrap_or_default() * 1024.0,
        })
    }

    /// Resets the peak, so that it covers only what follows.
    pub(super) fn forget_peak(&self) -> Result<(), Failure> {
        Ok(fs::write(
            format!("/proc/{}/clear_refs", self.child.id()),
            "5",
        )?)
    }
}

/// Clock ticks a second of the times in `/proc`. Linux always shows programs hundredths of a second.
const TICKS: f64 = 100.0;

/// Resources used by a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usage {
    /// CPU time, in seconds.
    pub(super) cpu: f64,
    /// Peak resident memory, in bytes.
    pub(super) peak: f64,
}

impl Drop for Provider {
    fn drop(&mut self) {
        // The end of its input tells the process to stop; a second later it is killed.
        drop(self.child.stdin.take());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            if let Ok(Some(_)) = self.child.try_wait() {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        // Fails if the process has just ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the other process: prints how to reach it.
pub(super) fn announce(line: &str) -> Result<(), Failure> {
    println!("{line}");
    std::io::stdout().flush()?;
    Ok(())
}

/// In the other process: waits until it is told to begin.
pub(super) fn wait_for_line() -> Result<(), Failure> {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// In the other process: waits until it is no longer needed.
pub(super) fn wait_for_end_of_input() -> Result<(), Failure> {
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
