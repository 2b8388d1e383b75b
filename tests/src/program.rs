//! The program `weft`, run as a user runs it.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest wait for a program. Generous, because the machine may be busy building.
const PATIENCE: Duration = Duration::from_secs(60);

/// Returns the path of the program under test: `$WEFT_BIN`, or the program built into the same folder as this test.
fn program() -> PathBuf {
    if let Some(path) = env::var_os("WEFT_BIN") {
        return path.into();
    }
    let test = env::current_exe().expect("a test has a path");
    let folder = test
        .ancestors()
        .find(|path| path.join(".cargo-lock").exists())
        .expect("a test is in cargo's target folder");
    let path = folder.join("weft");
    assert!(
        path.exists(),
        "{} does not exist: run tests/run, or cargo build -p weft-node first",
        path.display()
    );
    path
}

/// A node's home in a temporary folder, which is deleted on drop.
#[derive(Debug)]
pub struct Home {
    folder: tempfile::TempDir,
    name: String,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// Creates an empty home.
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().expect("a temporary folder can be made"),
            name: "home".to_owned(),
        }
    }

    /// Creates an empty home with a long path.
    pub fn with_long_path() -> Self {
        Self {
            name: "d".repeat(120),
            ..Self::new()
        }
    }

    /// Returns the folder for `--home`.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// Returns a path beside the home, for models.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the program with this home and these arguments, its output captured.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command
            .env_remove("WEFT_HOME")
            .env(
                "WEFT_LOG",
                env::var("WEFT_LOG").unwrap_or_else(|_| "warn,libp2p_kad=error".to_owned()),
            )
            .arg("--home")
            .arg(self.path())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        self.start(arguments).finish()
    }

    /// Runs the program with `--json` and returns its output. Panics if it fails.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend_from_slice(arguments);
        let finished = self.run(&all);
        assert!(
            finished.status.success(),
            "weft {arguments:?}: {finished:#?}"
        );
        finished.json()
    }

    /// Starts the program.
    pub fn start(&self, arguments: &[&str]) -> Running {
        Running::spawn(self.command(arguments))
    }

    /// Starts the program through `spawn`, for example in another network namespace, and waits until its node is up.
    ///
    /// # Errors
    /// The error of `spawn`.
    pub fn up_in<E>(
        &self,
        arguments: &[&str],
        spawn: impl FnOnce(Command) -> Result<Child, E>,
    ) -> Result<Daemon, E> {
        Ok(Daemon::wait_for_child(spawn(self.command(arguments))?))
    }

    /// Starts a node that listens on loopback only and looks for no peers, unless `arguments` say otherwise.
    pub fn up(&self, arguments: &[&str]) -> Daemon {
        let mut all = vec!["--json", "up", "--no-mdns"];
        if !arguments.contains(&"--listen") {
            all.extend_from_slice(&["--listen", "/ip4/127.0.0.1/tcp/0"]);
        }
        all.extend_from_slice(arguments);
        Daemon::wait_for(self.command(&all))
    }

    /// Starts a node as [`up`](Self::up) does, in a mount namespace of its own. There, the folder `at` is an empty disk
    /// with these options of `mount`, such as `size=40m` or `ro`.
    pub fn up_on_disk(&self, at: &Path, options: &str) -> Daemon {
        let inner = self.command(&[
            "--json",
            "up",
            "--no-mdns",
            "--listen",
            "/ip4/127.0.0.1/tcp/0",
        ]);
        let mut outer = Command::new("unshare");
        outer
            .args(["--map-root-user", "--mount", "sh", "-c"])
            .arg("mount -t tmpfs -o \"$1\" tmpfs \"$0\" && shift && exec \"$@\"")
            .arg(at)
            .arg(options)
            .arg(inner.get_program())
            .args(inner.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Daemon::wait_for(outer)
    }
}

/// A running program. It is killed on drop.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Returns the exit code, or `None` if a signal ended the program.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Returns the last line of standard output, as JSON.
    pub fn json(&self) -> Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

impl Running {
    /// Starts a command with its standard output and standard error captured.
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the program can be started");
        let stdout = child.stdout.take().expect("standard output is captured");
        let stderr = child.stderr.take().expect("standard error is captured");
        Self {
            child,
            stdout: Output::of(stdout),
            stderr: Output::of(stderr),
        }
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    /// Waits for a line of standard output that contains `part`, after the line that was waited for before.
    ///
    /// # Panics
    /// If the program ends without such a line, or none is printed within a minute.
    pub fn wait_for_line(&mut self, part: &str) {
        self.stdout.wait_for_line(part);
    }

    /// Waits for a line of standard error that contains `part`, as [`wait_for_line`](Self::wait_for_line) does.
    ///
    /// # Panics
    /// If the program ends without such a line, or none is printed within a minute.
    pub fn wait_for_error(&mut self, part: &str) {
        self.stderr.wait_for_line(part);
    }

    /// Waits for the end of the program.
    pub fn finish(mut self) -> Finished {
        let status = wait(&mut self.child);
        Finished {
            status,
            stdout: self.stdout.all(),
            stderr: self.stderr.all(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The output of a program, read continuously, because a full pipe would block the program.
#[derive(Debug)]
struct Output {
    lines: Receiver<String>,
    /// The lines read so far.
    text: String,
}

impl Output {
    fn of(from: impl Read + Send + 'static) -> Self {
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut from = BufReader::new(from);
            loop {
                let mut line = Vec::new();
                let read = from.read_until(b'\n', &mut line);
                // Lines read before an error are still returned.
                let line = String::from_utf8_lossy(&line).into_owned();
                if sender.send(line).is_err() || !matches!(read, Ok(1..)) {
                    return;
                }
            }
        });
        Self {
            lines,
            text: String::new(),
        }
    }

    fn wait_for_line(&mut self, part: &str) {
        let begin = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(begin.elapsed());
            let line = self.lines.recv_timeout(left);
            let line = line.unwrap_or_else(|error| panic!("{part}: {error}: {:?}", self.text));
            self.text.push_str(&line);
            if line.contains(part) {
                return;
            }
        }
    }

    /// Returns all output until the end.
    fn all(&mut self) -> String {
        self.text.extend(self.lines.iter());
        std::mem::take(&mut self.text)
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_child(child);
    kill_process(pid, signal).expect("a child that was not waited for can be signalled");
}

fn wait(child: &mut Child) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status;
        }
        if begin.elapsed() > 2 * PATIENCE {
            // Also ends the wait for its output.
            let _ = child.kill();
            panic!(
                "the program did not end within {} s",
                2 * PATIENCE.as_secs()
            );
        }
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// A node that is up. It is killed with SIGKILL on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// The JSON object that `weft up` printed.
    pub info: Value,
    stderr: Option<ChildStderr>,
    _stdout: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts a command that runs `weft --json up`, and waits until the node is up.
    pub fn wait_for(mut command: Command) -> Self {
        Self::wait_for_child(command.spawn().expect("the program can be started"))
    }

    /// Waits until a node is up that was started with its standard output captured.
    pub fn wait_for_child(mut child: Child) -> Self {
        let mut stderr = child.stderr.take();
        let mut stdout = BufReader::new(child.stdout.take().expect("standard output is captured"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("its output can be read");
        let info = serde_json::from_str(&line).unwrap_or_else(|error| {
            // The process may be running and silent.
            let _ = child.kill();
            let mut text = String::new();
            if let Some(stderr) = &mut stderr {
                let _ = stderr.read_to_string(&mut text);
            }
            panic!("the node did not come up: {error}: {line:?}: {text}")
        });
        Self {
            child,
            info,
            stderr,
            _stdout: stdout,
        }
    }

    /// Returns the node's id.
    pub fn peer_id(&self) -> &str {
        self.info["peer_id"].as_str().expect("up prints its id")
    }

    /// Returns the first address of the node, with its id.
    pub fn address(&self) -> &str {
        self.info["addresses"][0]
            .as_str()
            .expect("up prints its addresses")
    }

    /// Returns the TCP port that the node listens on.
    pub fn port(&self) -> u16 {
        let addresses = self.info["addresses"].as_array();
        let addresses = addresses.expect("up prints its addresses").iter();
        // Addresses of all transports are sorted by their use.
        let mut ports = addresses.filter_map(|address| {
            let rest = address.as_str()?.split("/tcp/").nth(1)?;
            rest.split('/').next()?.parse().ok()
        });
        ports
            .next()
            .unwrap_or_else(|| panic!("no TCP port in {}", self.info))
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends the node a signal.
    pub fn signal(&self, signal: Signal) {
        send(&self.child, signal);
    }

    /// Ends the node with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().expect("a running child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Ends the node with a signal that it handles. Returns its exit status and its standard error.
    pub fn stop(mut self, signal: Signal) -> (ExitStatus, String) {
        send(&self.child, signal);
        let status = wait(&mut self.child);
        let mut text = String::new();
        if let Some(mut stderr) = self.stderr.take() {
            stderr
                .read_to_string(&mut text)
                .expect("its output can be read");
        }
        (status, text)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
