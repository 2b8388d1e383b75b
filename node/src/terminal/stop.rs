//! The signals that ask the program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.
//!
//! [`race`] runs the whole command until it ends or a signal arrives, so every command stops on a signal. A command
//! that must finish or print something waits for the signal itself with [`Stop::wait`]; all other commands are dropped.
//! The second signal ends the process at once.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use crate::{exit::Failure, reason::INTERRUPTED, terminal::output::err};

/// The state of this process. It is global because signals are sent to a process.
static STATE: OnceLock<State> = OnceLock::new();

#[derive(Debug)]
struct State {
    stopped: watch::Receiver<bool>,
    /// Number of commands that wait for the signal, or have received it.
    handlers: AtomicUsize,
}

/// A handle to wait for a signal to stop.
#[derive(Debug)]
pub(crate) struct Stop(());

impl Stop {
    /// Returns a handle. The first call installs the signal handlers.
    pub(crate) fn new() -> Result<Self, Failure> {
        if STATE.get().is_none() {
            let state = State {
                stopped: watch_signals().map_err(|error| {
                    Failure::other(format!("cannot watch for signals: {error}"))
                })?,
                handlers: AtomicUsize::new(0),
            };
            // One command runs at a time, so the state has not been set meanwhile.
            let _ = STATE.set(state);
        }
        Ok(Self(()))
    }

    /// Waits for a signal. The caller then ends by itself and is not dropped.
    pub(crate) async fn wait(&mut self) {
        let Some(state) = STATE.get() else {
            return;
        };
        let mut handling = Handling::new(state);
        received(state).await;
        handling.is_told = true;
    }
}

/// Counts a command as a handler while it waits, and permanently once it has received the signal.
struct Handling {
    state: &'static State,
    is_told: bool,
}

impl Handling {
    fn new(state: &'static State) -> Self {
        state.handlers.fetch_add(1, Ordering::SeqCst);
        Self {
            state,
            is_told: false,
        }
    }
}

impl Drop for Handling {
    fn drop(&mut self) {
        if !self.is_told {
            self.state.handlers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

async fn received(state: &State) {
    let mut stopped = state.stopped.clone();
    // The channel is closed only when the runtime ends, which also ends this task.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Runs a command until it ends or a signal arrives.
pub(crate) async fn race(
    command: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    Stop::new()?;
    let Some(state) = STATE.get() else {
        return command.await;
    };
    tokio::pin!(command);
    tokio::select! {
        // The command is polled first, so that one that waits for the signal receives it before the check below.
        biased;
        result = &mut command => return result,
        () = received(state) => {}
    }
    if state.handlers.load(Ordering::SeqCst) > 0 {
        return command.await;
    }
    Err(Failure::interrupted("stopped"))
}

/// Watches for the signals in a separate task. The second signal ends the process.
fn watch_signals() -> io::Result<watch::Receiver<bool>> {
    let (tell, stopped) = watch::channel(false);
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = next(&mut interrupt) => {}
                () = next(&mut terminate) => {}
                () = next(&mut hangup) => {}
            }
            if tell.send_replace(true) {
                err!("stopped at once, by a second signal");
                std::process::exit(INTERRUPTED.into());
            }
        }
    });
    Ok(stopped)
}

async fn next(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Listens for a signal, unless the parent process set it to be ignored: `nohup weft up` outlives its terminal.
fn listen(kind: SignalKind) -> io::Result<Option<Signal>> {
    match is_ignored(kind) {
        true => Ok(None),
        false => signal(kind).map(Some),
    }
}

/// Returns true if a signal was ignored when the program started. Only Linux reports this without unsafe code; on other
/// systems this returns false.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (kind.as_raw_value() - 1)) != 0)
}
