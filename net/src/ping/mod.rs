//! Round trips, measured over a stream of our own.

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

/// How long a ping may take.
pub(crate) const PING: Duration = Duration::from_secs(10);

/// Bytes that come back as they are. Not libp2p's ping: that has one stream a connection, and a second one would end it.
pub(crate) const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/ping/1");

/// Bytes in a ping.
const PING_SIZE: usize = 32;

/// Asks for the peer's clock, before the eight bytes for it.
const ASKS_CLOCK: [u8; 8] = *b"weftclk?";

/// The offset of the clock in a ping.
const CLOCK_AT: usize = PING_SIZE - 8;

/// Pings that a stream may carry.
const MAX_PINGS: usize = 1024;

/// Why a ping came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PingError {
    /// No stream.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Something else came back than was sent.
    #[error("the peer answered with other bytes")]
    Mismatch,
    /// No answer.
    #[error("no answer within {} s", PING.as_secs())]
    TimedOut,
}

/// The result of a ping.
#[derive(Debug)]
pub(crate) struct Echo {
    pub(crate) rtt: Duration,
    /// The peer's clock half a round trip ago, if it says so.
    pub(crate) reading: Option<Reading>,
}

/// Sends 32 bytes and waits for them: 16 that tell this ping from others, eight that ask for the peer's clock, and
/// eight zeros in place of which the peer may send its clock, in milliseconds since 1970, little-endian. A peer of an
/// earlier version sends everything back as it is; one that asks for no clock gets everything back as it was.
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
    let reading = told(&sent, &back)?.map(|theirs| Reading {
        theirs,
        ours: clock + rtt / 2,
        at: begin + rtt / 2,
    });
    Ok(Echo { rtt, reading })
}

/// A ping that asks for the clock.
pub(crate) fn question(seed: [u8; 16]) -> [u8; PING_SIZE] {
    let mut ping = [0; PING_SIZE];
    ping[..16].copy_from_slice(&seed);
    ping[CLOCK_AT - ASKS_CLOCK.len()..CLOCK_AT].copy_from_slice(&ASKS_CLOCK);
    ping
}

/// The peer's clock in an answer to a ping, in milliseconds since 1970, if it says so.
pub(crate) fn told(
    sent: &[u8; PING_SIZE],
    back: &[u8; PING_SIZE],
) -> Result<Option<u64>, PingError> {
    if back[..CLOCK_AT] != sent[..CLOCK_AT] {
        return Err(PingError::Mismatch);
    }
    let theirs = back[CLOCK_AT..].first_chunk().copied();
    Ok(theirs.map(u64::from_le_bytes).filter(|millis| *millis != 0))
}

/// Sends everything back, with this machine's clock if that is asked for, until the peer ends or falls silent.
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

/// Puts the clock into an answer if the ping asks for it.
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
        // That of an earlier version: 16 bytes, and zeros. And any other.
        let mut old = [0; PING_SIZE];
        old[..16].fill(9);
        for ping in [old, [1; PING_SIZE]] {
            let mut answer = ping;
            add_clock(&mut answer, 1_800_000_000_000);
            assert_eq!(answer, ping);
        }
    }
}
