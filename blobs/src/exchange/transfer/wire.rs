//! Messages on a stream to a provider, with their time limits; and fetching a manifest, for which one stream is enough.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    time::{Instant, timeout},
};
use weft_proto::{
    frame,
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

use super::TransferError;
use crate::{
    Hash,
    arrivals::Arrivals,
    manifest::MAX_MANIFEST,
    serve::MAX_MESSAGE,
    tree::{PARENT, Step, Tree, Verifier},
};

/// The fewest bytes that have to arrive in the time that a provider may be silent, which is 20 s or more: three bytes a
/// second. Any usable link brings more, even shared by a hundred streams. A provider that sends one byte a second does
/// not hold up a receiver.
const LEAST: usize = 64;

/// The longest time for a chunk group, however many of its bytes have arrived. It means 110 bytes a second: the share
/// of one of eight streams on a link of 7 kbit/s. This limit bounds what a provider gains by sending a byte now and
/// then.
pub(super) const SLOWEST: Duration = Duration::from_secs(600);

/// The longest time for which a provider may keep a request in its queue, however often it shows that it is alive.
pub const QUEUED: Duration = Duration::from_secs(600);

/// Fetches a whole manifest over `stream`, and checks it against its id. Adds the bytes that arrive to `arrivals`.
///
/// # Errors
/// [`TransferError`].
pub async fn fetch_manifest<S>(
    stream: S,
    id: Hash,
    arrivals: &Arrivals,
) -> Result<Vec<u8>, TransferError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut reader, mut writer) = tokio::io::split(stream);
    let request = BlobRequest {
        hash: id.as_bytes().to_vec().into(),
        ..Default::default()
    };
    send(&mut writer, &request, arrivals).await?;
    flush(&mut writer, arrivals).await?;
    let size = match response(&mut reader, arrivals).await? {
        Answer::Size(size) => size,
        Answer::Unreadable => return Err(TransferError::Unreadable(id)),
        _ => return Err(TransferError::Missing(id)),
    };
    if size > MAX_MANIFEST {
        return Err(TransferError::Protocol("the manifest is over the limit"));
    }
    let tree = Tree::new(size);
    let mut verifier = Verifier::new(tree, id, 0..tree.groups());
    let corrupt = |source| TransferError::Corrupt { hash: id, source };
    // The buffer grows only with verified content, whatever size the provider claims.
    let mut bytes = Vec::new();
    while let Some(step) = verifier.step() {
        match step {
            Step::Parent { .. } => {
                let mut parent = [0; PARENT];
                read_exact(&mut reader, &mut parent, arrivals).await?;
                verifier.parent(&parent).map_err(corrupt)?;
            }
            Step::Group { size, .. } => {
                let at = bytes.len();
                bytes.resize(at + size, 0);
                read_exact(&mut reader, &mut bytes[at..], arrivals).await?;
                verifier.group(&bytes[at..]).map_err(corrupt)?;
            }
        }
    }
    // The manifest is here and verified, so a failure to close the stream does not matter.
    if !matches!(arrivals.within(writer.shutdown()).await, Some(Ok(()))) {
        tracing::debug!("cannot close a stream to a provider");
    }
    Ok(bytes)
}

pub(super) async fn send<S>(
    writer: &mut WriteHalf<S>,
    request: &BlobRequest,
    arrivals: &Arrivals,
) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    let sent = arrivals.within(frame::write(writer, request, MAX_MESSAGE));
    sent.await
        .ok_or_else(|| TransferError::stalled(arrivals))??;
    Ok(())
}

pub(super) async fn flush<S>(
    writer: &mut WriteHalf<S>,
    arrivals: &Arrivals,
) -> Result<(), TransferError>
where
    S: AsyncWrite,
{
    let flushed = arrivals.within(writer.flush());
    flushed
        .await
        .ok_or_else(|| TransferError::stalled(arrivals))??;
    Ok(())
}

/// The header of an answer.
pub(super) enum Answer {
    /// The slice follows; its blob has this size.
    Size(u64),
    Cancelled,
    Missing,
    /// The provider found its copy damaged, or cannot read it.
    Unreadable,
    /// The request waits in the provider's queue; the answer follows later.
    Waits,
}

pub(super) async fn response<S>(
    reader: &mut ReadHalf<S>,
    arrivals: &Arrivals,
) -> Result<Answer, TransferError>
where
    S: AsyncRead,
{
    let response = arrivals.within(frame::read(reader, MAX_MESSAGE)).await;
    let response: Option<BlobResponse> =
        response.ok_or_else(|| TransferError::stalled(arrivals))??;
    let Some(response) = response else {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    };
    match response.status() {
        Status::Ok => Ok(Answer::Size(response.size)),
        Status::NotFound => Ok(Answer::Missing),
        Status::Cancelled => Ok(Answer::Cancelled),
        Status::Internal => Ok(Answer::Unreadable),
        Status::Waiting => Ok(Answer::Waits),
        Status::BadRequest | Status::Unspecified => {
            Err(TransferError::Protocol("it refused a valid request"))
        }
    }
}

/// Fills `buffer`, and counts the bytes.
async fn read_exact<S>(
    reader: &mut ReadHalf<S>,
    buffer: &mut [u8],
    arrivals: &Arrivals,
) -> Result<(), TransferError>
where
    S: AsyncRead,
{
    let slowest = Instant::now() + SLOWEST;
    let mut filled = 0;
    let mut pace = Pace::default();
    while filled < buffer.len() {
        let begun = Instant::now();
        let left = slowest.saturating_duration_since(begun);
        let n = read_some(reader, &mut buffer[filled..], left, arrivals).await?;
        pace.came(n, begun.elapsed(), arrivals.patience())?;
        filled += n;
    }
    Ok(())
}

/// Distinguishes a slow link from a provider that sends very little.
#[derive(Debug, Default)]
pub(super) struct Pace {
    bytes: usize,
    waited: Duration,
}

impl Pace {
    /// Counts bytes, and the time waited for them. Delays by this node's own rate limits are not included.
    pub(super) fn came(
        &mut self,
        bytes: usize,
        waited: Duration,
        patience: Duration,
    ) -> Result<(), TransferError> {
        self.bytes += bytes;
        self.waited += waited;
        if self.waited < patience {
            return Ok(());
        }
        match std::mem::take(self).bytes < LEAST {
            true => Err(TransferError::Stalled(patience.as_secs())),
            false => Ok(()),
        }
    }
}

/// Reads at least one byte, within the time that the provider may be silent and within `left`, the rest of [`SLOWEST`].
/// Counts the bytes.
pub(super) async fn read_some<S>(
    reader: &mut ReadHalf<S>,
    buffer: &mut [u8],
    left: Duration,
    arrivals: &Arrivals,
) -> Result<usize, TransferError>
where
    S: AsyncRead,
{
    match timeout(left, arrivals.within(reader.read(buffer))).await {
        Ok(Some(Ok(0))) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        Ok(Some(Ok(n))) => {
            arrivals.add(n as u64);
            Ok(n)
        }
        Ok(Some(Err(error))) => Err(error.into()),
        Ok(None) => Err(TransferError::stalled(arrivals)),
        Err(_) => Err(TransferError::TooSlow),
    }
}
