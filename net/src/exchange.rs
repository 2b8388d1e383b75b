//! Exchanges of messages over a stream, each with a timeout. The protocols of this crate share them.

use std::{io, time::Duration};

use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    time::timeout,
};
use weft_proto::frame::{self, FrameError};

/// The reason that an exchange of messages failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    TimedOut,
    #[error("the peer closed the stream before its answer")]
    Ended,
}

/// Sends a message of at most `limit` bytes, and flushes all that was written before it.
pub(crate) async fn send<M, S>(
    stream: &mut S,
    message: &M,
    limit: usize,
) -> Result<(), ExchangeError>
where
    M: Message,
    S: AsyncWrite + Unpin,
{
    frame::write(stream, message, limit).await?;
    stream.flush().await?;
    Ok(())
}

/// Receives a message of at most `limit` bytes. The end of the stream is an error, because a message is expected.
pub(crate) async fn receive<M, S>(stream: &mut S, limit: usize) -> Result<M, ExchangeError>
where
    M: Message + Default,
    S: AsyncRead + Unpin,
{
    let message = frame::read(stream, limit).await?;
    message.ok_or(ExchangeError::Ended)
}

/// Ends an exchange that takes longer than `patience`.
pub(crate) async fn within<T, E>(
    patience: Duration,
    exchange: impl Future<Output = Result<T, E>>,
) -> Result<T, E>
where
    E: From<ExchangeError>,
{
    let result = timeout(patience, exchange).await;
    result.unwrap_or_else(|_| Err(ExchangeError::TimedOut.into()))
}
