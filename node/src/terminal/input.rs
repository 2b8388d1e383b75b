//! Reads standard input in a thread, so that a signal can stop the program meanwhile.

use std::{io::Read, thread};

use tokio::sync::oneshot;

use crate::exit::Failure;

/// Reads standard input to its end, but at most `limit` bytes. If the future is dropped, the thread that reads goes on
/// until the program ends.
pub(crate) async fn read(limit: u64) -> Result<Vec<u8>, Failure> {
    let failed = |error: std::io::Error| Failure::other(format!("standard input: {error}"));
    let (sender, content) = oneshot::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = std::io::stdin().take(limit).read_to_end(&mut bytes);
        // The command may have been stopped.
        let _ = sender.send(read.map(|_| bytes));
    });
    let content = content
        .await
        .map_err(std::io::Error::other)
        .map_err(failed)?;
    content.map_err(failed)
}

/// Reads standard input as text, as [`read`] does.
pub(crate) async fn read_text(limit: u64) -> Result<String, Failure> {
    String::from_utf8(read(limit).await?)
        .map_err(|error| Failure::usage(format!("standard input is not UTF-8 text: {error}")))
}
