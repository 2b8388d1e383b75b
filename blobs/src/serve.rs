//! The provider's side of a transfer.

use std::{io, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use weft_proto::{
    frame::{self, FrameError},
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

use crate::{Hash, Store, StoreError, store::BlobReader, tree::Walk};

/// The transfer protocol's name.
pub const PROTOCOL: &str = "/weft/blobs/1";

/// The most groups in one request: 16 MiB, so that a request is soon answered and work can move to another provider.
pub const MAX_GROUPS: u64 = 256;

/// The longest request or response message, in bytes. A request takes 60.
pub(crate) const MAX_MESSAGE: usize = 128;

/// How long a stream may stand idle, or a peer may take none of what is sent, before it is closed.
const IDLE: Duration = Duration::from_secs(60);

/// Bytes read from disk at a time. Two such buffers a stream are all the memory a requester can make a provider spend.
const READ: usize = 1 << 20;

/// Why serving a stream ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The stream failed or broke the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The requester asked for something that makes no sense.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// The requester was idle, or took nothing, for a minute.
    #[error("the peer was idle for {} s", IDLE.as_secs())]
    Idle,
    /// A read failed when its response had begun.
    #[error("cannot read what is being sent: {0}")]
    Read(io::Error),
}

impl From<io::Error> for ServeError {
    fn from(error: io::Error) -> Self {
        Self::Frame(error.into())
    }
}

/// Answers requests on `stream` until the peer closes it; how many bytes of slices were sent.
///
/// # Errors
/// [`ServeError`]; the stream is to be dropped.
pub async fn serve<S>(store: Store, mut stream: S) -> Result<u64, ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut sent = 0;
    let mut current: Option<(Hash, Arc<BlobReader>)> = None;
    loop {
        let request = patient(frame::read(&mut stream, MAX_MESSAGE)).await?;
        let Some(request): Option<BlobRequest> = request else {
            patient(stream.shutdown()).await?;
            return Ok(sent);
        };
        let Some(hash) = Hash::from_slice(&request.hash) else {
            return refuse(&mut stream, "the hash is not 32 bytes").await;
        };
        if current.as_ref().is_none_or(|(open, _)| *open != hash) {
            current = match open(&store, hash).await {
                Ok(found) => found.map(|reader| (hash, Arc::new(reader))),
                Err(error) => {
                    tracing::warn!(%hash, %error, "a blob cannot be opened");
                    answer(&mut stream, Status::Internal, 0).await?;
                    current = None;
                    continue;
                }
            };
        }
        let Some((_, reader)) = &current else {
            answer(&mut stream, Status::NotFound, 0).await?;
            continue;
        };
        let tree = reader.tree();
        let range = match request.size {
            None => 0..tree.groups(),
            Some(size) if size != tree.size() => {
                answer(&mut stream, Status::NotFound, 0).await?;
                continue;
            }
            Some(_) => {
                let end = request.first_group.saturating_add(request.groups);
                if request.groups == 0 || request.groups > MAX_GROUPS || end > tree.groups() {
                    return refuse(&mut stream, "the range is empty, too long or out of bounds")
                        .await;
                }
                request.first_group..end
            }
        };
        answer(&mut stream, Status::Ok, tree.size()).await?;
        sent += send_slice(&mut stream, reader, Walk::new(tree, range)).await?;
    }
}

async fn open(store: &Store, hash: Hash) -> Result<Option<BlobReader>, StoreError> {
    let store = store.clone();
    spawn_blocking(move || store.blob(&hash))
        .await
        .expect("opening a blob does not panic")
}

/// Reads the next piece while the last one is being sent.
async fn send_slice<S>(
    stream: &mut S,
    reader: &Arc<BlobReader>,
    walk: Walk,
) -> Result<u64, ServeError>
where
    S: AsyncWrite + Unpin,
{
    let read = |mut walk: Walk, mut buffer: Vec<u8>| -> JoinHandle<io::Result<_>> {
        let reader = Arc::clone(reader);
        spawn_blocking(move || {
            buffer.clear();
            let ended = reader.read_slice(&mut walk, &mut buffer, READ)?;
            Ok((walk, buffer, ended))
        })
    };
    let mut sent = 0;
    let mut next = read(walk, Vec::with_capacity(READ + READ / 8));
    let mut spare = Vec::new();
    loop {
        let (walk, buffer, ended) = next
            .await
            .expect("reading does not panic")
            .map_err(ServeError::Read)?;
        let more = (!ended).then(|| read(walk, std::mem::take(&mut spare)));
        send(stream, &buffer).await?;
        sent += buffer.len() as u64;
        spare = buffer;
        match more {
            Some(more) => next = more,
            None => {
                patient(stream.flush()).await?;
                return Ok(sent);
            }
        }
    }
}

/// Writes all of `bytes`, however slowly, as long as the peer takes some of them now and then.
async fn send<S>(stream: &mut S, mut bytes: &[u8]) -> Result<(), ServeError>
where
    S: AsyncWrite + Unpin,
{
    while !bytes.is_empty() {
        let n = patient(stream.write(bytes)).await?;
        if n == 0 {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        bytes = &bytes[n..];
    }
    Ok(())
}

/// Waits for the peer, but not for ever.
async fn patient<T, E>(work: impl Future<Output = Result<T, E>>) -> Result<T, ServeError>
where
    ServeError: From<E>,
{
    let done = timeout(IDLE, work).await.map_err(|_| ServeError::Idle)?;
    Ok(done?)
}

async fn answer<S>(stream: &mut S, status: Status, size: u64) -> Result<(), ServeError>
where
    S: AsyncWrite + Unpin,
{
    let response = BlobResponse {
        status: status.into(),
        size,
    };
    patient(frame::write(stream, &response, MAX_MESSAGE)).await?;
    patient(stream.flush()).await
}

async fn refuse<S, T>(stream: &mut S, why: &'static str) -> Result<T, ServeError>
where
    S: AsyncWrite + Unpin,
{
    answer(stream, Status::BadRequest, 0).await?;
    patient(stream.shutdown()).await?;
    Err(ServeError::BadRequest(why))
}
