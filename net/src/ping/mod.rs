//! Round-trip times, measured over a stream of Weft's own protocol.

pub(crate) mod clock;

use std::{
    io,
    time::{Duration, Instant, SystemTime},
};

use libp2p::StreamProtocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{
    OpenError, Stream,
    ping::clock::{Reading, now_millis},
};

/// Time that a ping may take.
pub(crate) const PING: Duration = Duration::from_secs(10);

/// The protocol for pings, whose bytes come back unchanged. libp2p's ping is not used, because it has one stream per
/// connection, and a second stream would end it.
pub(crate) const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/ping/1");

/// Size of a ping, in bytes.
const PING_SIZE: usize = 32;

/// The bytes that ask for the peer's clock; eight bytes for the clock follow.
const ASKS_CLOCK: [u8; 8] = *b"weftclk?";

/// Offset of the clock in a ping.
const CLOCK_AT: usize = PING_SIZE - 8;

/// Most pings that a stream may carry.
const MAX_PINGS: usize = 1024;

/// The reason that a ping failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PingError {
    /// No stream could be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The answer differs from the ping.
    #[error("the answer differs from the ping")]
    Mismatch,
    /// No answer came in time.
    #[error("no answer within {} s", PING.as_secs())]
    TimedOut,
}

/// The result of a ping.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) rtt: Duration,
    /// The peer's clock half a round trip ago, if the peer reports it.
    pub(crate) reading: Option<Reading>,
}

/// Sends a ping of 32 bytes and waits for the answer. The ping has 16 bytes that identify it, eight that ask for the
/// peer's clock, and eight zeros. The peer may replace the zeros by its clock, in milliseconds since 1970,
/// little-endian. A peer of an older version sends all bytes back unchanged, and a ping that does not ask for the clock
/// comes back unchanged.
pub(crate) async fn echo(stream: &mut Stream) -> Result<Echo, PingError> {
    // Not a secret.
    let seed = SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos()
        .to_le_bytes();
    let sent = question(seed);
    let (begin, clock) = (Instant::now(), SystemTime::now());
    stream.write_all(&sent).await?;
    stream.flush().await?;
    let mut back = [0; PING_SIZE];
    stream.read_exact(&mut back).await?;
    let rtt = begin.elapsed();
    let reading = clock_in(&sent, &back)?.map(|theirs| Reading {
        theirs,
        ours: clock + rtt / 2,
        at: begin + rtt / 2,
    });
    Ok(Echo { rtt, reading })
}

/// Makes a ping that asks for the clock.
pub(crate) fn question(seed: [u8; 16]) -> [u8; PING_SIZE] {
    let mut ping = [0; PING_SIZE];
    ping[..16].copy_from_slice(&seed);
    ping[CLOCK_AT - ASKS_CLOCK.len()..CLOCK_AT].copy_from_slice(&ASKS_CLOCK);
    ping
}

/// Returns the peer's clock from the answer to a ping, in milliseconds since 1970, if the peer reports it.
pub(crate) fn clock_in(
    sent: &[u8; PING_SIZE],
    back: &[u8; PING_SIZE],
) -> Result<Option<u64>, PingError> {
    if back[..CLOCK_AT] != sent[..CLOCK_AT] {
        return Err(PingError::Mismatch);
    }
    let theirs = back[CLOCK_AT..].first_chunk().copied();
    Ok(theirs.map(u64::from_le_bytes).filter(|millis| *millis != 0))
}

/// Answers pings, with this machine's clock if asked for, until the peer ends the stream or stops sending.
pub(crate) async fn answer_pings(mut stream: Stream) -> io::Result<()> {
    let mut ping = [0; PING_SIZE];
    for _ in 0..MAX_PINGS {
        timeout(PING, stream.read_exact(&mut ping)).await??;
        add_clock(&mut ping, now_millis());
        timeout(PING, stream.write_all(&ping)).await??;
        timeout(PING, stream.flush()).await??;
    }
    Ok(())
}

/// Writes the clock into an answer if the ping asks for it.
pub(crate) fn add_clock(ping: &mut [u8; PING_SIZE], millis: u64) {
    if ping[CLOCK_AT - ASKS_CLOCK.len()..CLOCK_AT] == ASKS_CLOCK && ping[CLOCK_AT..] == [0; 8] {
        ping[CLOCK_AT..].copy_from_slice(&millis.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_ping_that_asks_for_the_clock_comes_back_with_it() {
        let mut asks = [7; PING_SIZE];
        asks[CLOCK_AT - ASKS_CLOCK.len()..CLOCK_AT].copy_from_slice(&ASKS_CLOCK);
        asks[CLOCK_AT..].fill(0);
        let mut answer = asks;
        add_clock(&mut answer, 1_800_000_000_000);
        assert_eq!(answer[..CLOCK_AT], asks[..CLOCK_AT]);
        assert_eq!(answer[CLOCK_AT..], 1_800_000_000_000_u64.to_le_bytes());
        // A ping of an older version: 16 bytes, and zeros. Then any other bytes.
        let mut old = [0; PING_SIZE];
        old[..16].fill(9);
        for ping in [old, [1; PING_SIZE]] {
            let mut answer = ping;
            add_clock(&mut answer, 1_800_000_000_000);
            assert_eq!(answer, ping);
        }
    }
}
