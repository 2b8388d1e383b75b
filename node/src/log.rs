//! The log of the program: the filter that `$WEFT_LOG` sets, and a limit on repeated lines.
//!
//! Peers can cause some lines as often as they like: libp2p's crates warn about malformed messages. So each call site
//! writes at most [`BURST`] lines a minute, and the log says how many lines were left out.

use std::{
    collections::HashMap,
    io::IsTerminal,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Event, Level, Metadata, callsite::Identifier};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, Filter, SubscriberExt},
    util::SubscriberInitExt,
};

/// The filter if `$WEFT_LOG` is not set. Kademlia warns when it knows no peer, which is normal for the first node.
/// gossipsub logs an error for each malformed message of a peer.
const LOG: &str = "warn,libp2p_kad=error,libp2p_gossipsub=off";

/// Most lines of one call site within [`WINDOW`]: enough to see a fault begin and go on, and at most a megabyte a day.
const BURST: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);

/// The target of the lines that say how many lines were left out. These lines are not limited.
const TARGET: &str = "weft::log";

/// Installs the log on standard error, unless the embedding process has installed one.
pub(crate) fn init() {
    let (filter, invalid) = match std::env::var("WEFT_LOG") {
        Ok(directives) => match EnvFilter::try_new(&directives) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new(LOG), Some((directives, error))),
        },
        Err(_) => (EnvFilter::new(LOG), None),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .with_filter(Limit::default());
    // Fails only if the embedding process has already installed a subscriber.
    let _ = tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init();
    if let Some((directives, error)) = invalid {
        tracing::warn!(
            "WEFT_LOG={directives:?} is ignored: {error}; a valid value is WEFT_LOG=weft=debug,info"
        );
    }
}

/// A filter that limits the lines of each call site. Debug and trace lines are not limited: the user has enabled them.
#[derive(Debug, Default)]
struct Limit {
    /// Bounded by the number of call sites in the program.
    sites: Mutex<HashMap<Identifier, Site>>,
}

/// The lines of a call site in its current window.
#[derive(Debug, Clone, Copy)]
struct Site {
    began: Instant,
    lines: u32,
    left_out: u64,
}

/// The decision on one line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    /// Write the line, after a line that says how many were left out.
    WriteAfter(u64),
    LeaveOut,
}

impl Limit {
    fn count(&self, site: Identifier, now: Instant) -> Verdict {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = Site {
            began: now,
            lines: 0,
            left_out: 0,
        };
        let site = sites.entry(site).or_insert(fresh);
        let mut left_out = 0;
        if now.saturating_duration_since(site.began) >= WINDOW {
            left_out = site.left_out;
            *site = fresh;
        }
        if site.lines >= BURST {
            site.left_out += 1;
            return Verdict::LeaveOut;
        }
        site.lines += 1;
        match left_out {
            0 => Verdict::Write,
            left_out => Verdict::WriteAfter(left_out),
        }
    }
}

impl<S> Filter<S> for Limit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.target() == TARGET {
            return true;
        }
        match self.count(metadata.callsite(), Instant::now()) {
            Verdict::Write => true,
            Verdict::WriteAfter(left_out) => {
                tracing::warn!(
                    target: TARGET,
                    "{left_out} lines like the next one were left out: one source writes {BURST} a minute at most"
                );
                true
            }
            Verdict::LeaveOut => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_site_writes_ten_lines_a_minute_and_further_lines_are_counted() {
        // Without a subscriber, spans have no metadata.
        tracing::subscriber::with_default(tracing_subscriber::registry(), || {
            let a = tracing::span!(Level::WARN, "a");
            let b = tracing::span!(Level::WARN, "b");
            let (a, b) = (
                a.metadata().expect("enabled"),
                b.metadata().expect("enabled"),
            );
            check(&Limit::default(), a.callsite(), b.callsite());
        });
    }

    fn check(limit: &Limit, site: Identifier, other: Identifier) {
        let now = Instant::now();
        for _ in 0..BURST {
            assert_eq!(limit.count(site.clone(), now), Verdict::Write);
        }
        for _ in 0..7 {
            assert_eq!(limit.count(site.clone(), now), Verdict::LeaveOut);
        }
        assert_eq!(limit.count(other, now), Verdict::Write);
        let later = now + WINDOW;
        assert_eq!(limit.count(site.clone(), later), Verdict::WriteAfter(7));
        assert_eq!(limit.count(site, later), Verdict::Write);
    }
}
