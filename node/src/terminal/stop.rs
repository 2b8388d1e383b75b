//! The signals that ask the program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed.
//!
//! [`race`] runs the whole program against them, so no command can forget to listen. A command that has something to
//! finish or to say waits for the signal itself with [`Stop::wait`]; all others are dropped. The second signal ends
//! the program at once, whatever it is doing.

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

/// The state of this process; signals are sent to a process.
static STATE: OnceLock<State> = OnceLock::new();

#[derive(Debug)]
struct State {
    stopped: watch::Receiver<bool>,
    /// Commands that wait for the signal, or have been told of it.
    handlers: AtomicUsize,
}

/// Waits for a signal to stop.
#[derive(Debug)]
pub(crate) struct Stop(());

impl Stop {
    /// Returns a handle. The program watches for signals from the first one on.
    pub(crate) fn new() -> Result<Self, Failure> {
        if STATE.get().is_none() {
            let state = State {
                stopped: watch_signals().map_err(|error| {
                    Failure::other(format!("cannot watch for signals: {error}"))
                })?,
                handlers: AtomicUsize::new(0),
            };
            // Commands run one at a time, and so nobody else has set it.
            let _ = STATE.set(state);
        }
        Ok(Self(()))
    }

    /// Returns once a signal has come. The caller then ends in its own way and is not dropped.
    pub(crate) async fn wait(&mut self) {
        let Some(state) = STATE.get() else {
            return;
        };
        let mut handling = Handling::new(state);
        received(state).await;
        handling.is_told = true;
    }
}

/// Counts a command among the handlers while it waits, and for good once it was told.
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
    // Closed only when the runtime ends, and this with it.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Runs a command until it ends or a signal comes.
pub(crate) async fn race(
    command: impl Future<Output = Result<(), Failure>>,
) -> Result<(), Failure> {
    Stop::new()?;
    let Some(state) = STATE.get() else {
        return command.await;
    };
    tokio::pin!(command);
    tokio::select! {
        // First, so that a command that waits for the signal has heard of it.
        biased;
        result = &mut command => return result,
        () = received(state) => {}
    }
    if state.handlers.load(Ordering::SeqCst) > 0 {
        return command.await;
    }
    Err(Failure::interrupted("stopped"))
}

/// Watches for the signals in a task of its own. The second one ends the process.
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

/// Listens for a signal, unless the parent process has it ignored: `nohup weft up` outlives its terminal.
fn listen(kind: SignalKind) -> io::Result<Option<Signal>> {
    match is_ignored(kind) {
        true => Ok(None),
        false => signal(kind).map(Some),
    }
}

/// Returns true if a signal was ignored when the program started. Only Linux tells without unsafe code; elsewhere no
/// signal counts as ignored.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & (1 << (kind.as_raw_value() - 1)) != 0)
}
