//! Standard input, read without keeping the program from hearing a signal.

use std::{io::Read, thread};

use tokio::sync::oneshot;

use crate::exit::Failure;

/// Reads standard input to its end, and at most `limit` bytes of it. Dropping the future lets go of it: the thread that
/// reads ends with the program.
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
        .map_err(|error| Failure::usage(format!("standard input is no UTF-8 text: {error}")))
}
