//! Streams a part of a file to a client.

use std::{
    io::SeekFrom,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::Stream;
use tokio::io::{AsyncRead, AsyncSeekExt, ReadBuf};
use tonic::Status;
use weft::Reader;
use weft_proto::api::ReadResponse;

use super::status::{failed, invalid, status};
use crate::reason::Reason;

/// Most bytes of content in one message.
const PIECE: usize = 256 * 1024;

/// A stream of messages with a file's content. Reads a piece each time it is polled.
#[derive(Debug)]
pub(crate) struct Reading {
    reader: Reader,
    left: u64,
    begun: bool,
    buffer: Vec<u8>,
}

impl Reading {
    pub(super) async fn new(
        mut reader: Reader,
        offset: u64,
        length: Option<u64>,
    ) -> Result<Self, Status> {
        let size = reader.file().size;
        if offset > size {
            return Err(invalid(format!(
                "the offset {offset} is beyond the end of the file, which has {size} bytes"
            )));
        }
        reader
            .seek(SeekFrom::Start(offset))
            .await
            .map_err(|error| failed(Reason::Store, error.to_string()))?;
        Ok(Self {
            reader,
            left: length.unwrap_or(u64::MAX).min(size - offset),
            begun: false,
            buffer: vec![0; PIECE],
        })
    }
}

impl Stream for Reading {
    type Item = Result<ReadResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if !this.begun {
            this.begun = true;
            return Poll::Ready(Some(Ok(ReadResponse {
                size: this.reader.file().size,
                content: Vec::new(),
            })));
        }
        if this.left == 0 {
            return Poll::Ready(None);
        }
        let most = this.left.min(PIECE as u64) as usize;
        let mut buffer = ReadBuf::new(&mut this.buffer[..most]);
        let read = ready!(Pin::new(&mut this.reader).poll_read(cx, &mut buffer));
        let content = buffer.filled().to_vec();
        if let Err(error) = read {
            this.left = 0;
            return Poll::Ready(Some(Err(read_status(&error))));
        }
        this.left -= content.len() as u64;
        Poll::Ready(Some(Ok(ReadResponse { size: 0, content })))
    }
}

/// Returns the status of a failed read, from the first error of the SDK in the chain of sources.
fn read_status(error: &std::io::Error) -> Status {
    let mut cause: Option<&(dyn std::error::Error + 'static)> =
        error.get_ref().map(|inner| inner as _);
    while let Some(inner) = cause {
        if let Some(error) = inner.downcast_ref::<weft::Error>() {
            return status(error);
        }
        if let Some(error) = inner.downcast_ref::<std::sync::Arc<weft::Error>>() {
            return status(error);
        }
        cause = inner.source();
    }
    failed(Reason::Store, error.to_string())
}
