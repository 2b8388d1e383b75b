//! Length-delimited protobuf messages on a byte stream: an unsigned LEB128 length, then the message.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest accepted length prefix, in bytes: five bytes have 35 bits, enough for every limit in this project.
const MAX_PREFIX: usize = 5;

/// An error while reading or writing a message.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream failed, or ended inside a message.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
    /// The message is longer than the reader or writer allows.
    #[error("a message of {size} bytes is over the limit of {limit}")]
    TooLarge {
        /// The message's size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: usize,
    },
    /// The length prefix is not a canonical unsigned LEB128 number of at most five bytes.
    #[error("the length prefix is malformed")]
    Prefix,
    /// The bytes are not a message of the expected type.
    #[error("the message is malformed: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Reads one message of at most `limit` bytes. Returns `None` if the stream ended before the first byte.
///
/// # Errors
/// [`FrameError`]. The stream must not be used afterwards.
pub async fn read<M, R>(reader: &mut R, limit: usize) -> Result<Option<M>, FrameError>
where
    M: Message + Default,
    R: AsyncRead + Unpin,
{
    match read_bytes(reader, limit).await? {
        Some(body) => Ok(Some(M::decode(body.as_slice())?)),
        None => Ok(None),
    }
}

/// Reads the bytes of one message without decoding them. Otherwise the same as [`read()`].
///
/// # Errors
/// [`FrameError`]. The stream must not be used afterwards.
pub async fn read_bytes<R>(reader: &mut R, limit: usize) -> Result<Option<Vec<u8>>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let mut size: u64 = 0;
    for i in 0..MAX_PREFIX {
        let mut byte = [0u8; 1];
        if i == 0 {
            if reader.read(&mut byte).await? == 0 {
                return Ok(None);
            }
        } else {
            reader.read_exact(&mut byte).await?;
        }
        size |= u64::from(byte[0] & 0x7f) << (7 * i);
        if byte[0] & 0x80 == 0 {
            if byte[0] == 0 && i > 0 {
                return Err(FrameError::Prefix);
            }
            let length = usize::try_from(size)
                .ok()
                .filter(|n| *n <= limit)
                .ok_or(FrameError::TooLarge { size, limit })?;
            let mut body = vec![0; length];
            reader.read_exact(&mut body).await?;
            return Ok(Some(body));
        }
    }
    Err(FrameError::Prefix)
}

/// Writes one message of at most `limit` bytes. Does not flush.
///
/// # Errors
/// [`FrameError::TooLarge`] before anything is written, or [`FrameError::Io`].
pub async fn write<M, W>(writer: &mut W, message: &M, limit: usize) -> Result<(), FrameError>
where
    M: Message,
    W: AsyncWrite + Unpin,
{
    let size = message.encoded_len();
    if size > limit {
        return Err(FrameError::TooLarge {
            size: size as u64,
            limit,
        });
    }
    writer
        .write_all(&message.encode_length_delimited_to_vec())
        .await?;
    Ok(())
}

/// Writes a message that is already encoded. Does not flush.
///
/// # Errors
/// [`FrameError::TooLarge`] before anything is written, or [`FrameError::Io`].
pub async fn write_bytes<W>(writer: &mut W, message: &[u8], limit: usize) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin,
{
    if message.len() > limit {
        let size = message.len() as u64;
        return Err(FrameError::TooLarge { size, limit });
    }
    let mut framed = Vec::with_capacity(MAX_PREFIX + message.len());
    prost::encode_length_delimiter(message.len(), &mut framed)
        .expect("writing to a vector does not fail");
    framed.extend_from_slice(message);
    writer.write_all(&framed).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::BlobRequest;

    async fn read_bytes(mut bytes: &[u8], limit: usize) -> Result<Option<BlobRequest>, FrameError> {
        read(&mut bytes, limit).await
    }

    #[tokio::test]
    async fn a_written_message_reads_back() {
        let message = BlobRequest {
            hash: vec![7; 32].into(),
            size: Some(1 << 40),
            first_group: 3,
            groups: 256,
            cancel: None,
            proofs_only: false,
            ..Default::default()
        };
        let mut bytes = Vec::new();
        write(&mut bytes, &message, 1024).await.unwrap();
        write(&mut bytes, &BlobRequest::default(), 1024)
            .await
            .unwrap();
        let mut reader = bytes.as_slice();
        assert_eq!(read(&mut reader, 1024).await.unwrap(), Some(message));
        assert_eq!(
            read(&mut reader, 1024).await.unwrap(),
            Some(BlobRequest::default())
        );
        assert_eq!(
            read::<BlobRequest, _>(&mut reader, 1024).await.unwrap(),
            None
        );
    }

    #[tokio::test]
    async fn a_length_over_the_limit_is_refused_before_it_is_read() {
        let error = read_bytes(&[0xff, 0xff, 0xff, 0xff, 0x0f], 64)
            .await
            .unwrap_err();
        assert!(matches!(error, FrameError::TooLarge { limit: 64, .. }));
        let mut sink = Vec::new();
        let message = BlobRequest {
            hash: vec![0; 100].into(),
            ..Default::default()
        };
        assert!(matches!(
            write(&mut sink, &message, 64).await,
            Err(FrameError::TooLarge { .. })
        ));
        assert!(sink.is_empty());
    }

    #[tokio::test]
    async fn truncated_and_malformed_frames_are_errors() {
        assert!(matches!(
            read_bytes(&[0x80], 64).await,
            Err(FrameError::Io(_))
        ));
        assert!(matches!(
            read_bytes(&[0x05, 1, 2], 64).await,
            Err(FrameError::Io(_))
        ));
        assert!(matches!(
            read_bytes(&[0x80, 0x80, 0x80, 0x80, 0x80, 1], 64).await,
            Err(FrameError::Prefix)
        ));
        assert!(matches!(
            read_bytes(&[0x80, 0x00], 64).await,
            Err(FrameError::Prefix)
        ));
        assert!(matches!(
            read_bytes(&[0x02, 0xff, 0xff], 64).await,
            Err(FrameError::Decode(_))
        ));
    }
}
