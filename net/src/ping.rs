//! Round trips, measured over a stream of our own.

use std::{
    io,
    time::{Duration, Instant},
};

use libp2p::StreamProtocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::{OpenError, Stream};

/// How long a ping may take.
pub(crate) const PING: Duration = Duration::from_secs(10);

/// Bytes that come back as they are. Not libp2p's ping: that has one stream a connection, and a second one would end it.
pub(crate) const PING_PROTOCOL: StreamProtocol = StreamProtocol::new("/weft/ping/1");

/// Bytes in a ping.
const PING_SIZE: usize = 32;

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

/// Sends 32 bytes and waits for them.
pub(crate) async fn echo(stream: &mut Stream) -> Result<Duration, PingError> {
    // Not a secret: it only tells this ping from others.
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos()
        .to_le_bytes();
    let mut sent = [0; PING_SIZE];
    sent[..16].copy_from_slice(&seed);
    let begin = Instant::now();
    stream.write_all(&sent).await?;
    stream.flush().await?;
    let mut back = [0; PING_SIZE];
    stream.read_exact(&mut back).await?;
    let rtt = begin.elapsed();
    if back != sent {
        return Err(PingError::Mismatch);
    }
    Ok(rtt)
}

/// Sends everything back, until the peer ends or falls silent.
pub(crate) async fn answer_pings(mut stream: Stream) -> io::Result<()> {
    let mut ping = [0; PING_SIZE];
    for _ in 0..MAX_PINGS {
        timeout(PING, stream.read_exact(&mut ping)).await??;
        timeout(PING, stream.write_all(&ping)).await??;
        timeout(PING, stream.flush()).await??;
    }
    Ok(())
}
