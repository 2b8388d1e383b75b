//! `weft cat`.

use std::{
    io::{ErrorKind, IsTerminal, Write},
    time::{Duration, Instant},
};

use weft::Target;
use weft_proto::api::ReadRequest;

use crate::{cli::Cat, client::Client, exit::Failure, terminal::output::Meter};

/// Time until progress is shown on standard error: short enough that the user does not wonder, and long enough that
/// reading content from this node's disk shows no progress.
const SILENT: Duration = Duration::from_millis(500);

pub(crate) async fn run(client: &Client, options: Cat) -> Result<(), Failure> {
    let target: Target = options
        .target
        .parse()
        .map_err(|error| Failure::usage(format!("{error}")))?;
    let request = ReadRequest {
        target: target.to_string(),
        path: options.path,
        offset: options.offset,
        length: options.length,
        publisher: options
            .publisher
            .map(|publisher| publisher.to_string())
            .unwrap_or_default(),
    };
    let mut output = std::io::stdout();
    let mut shown = Shown::new(output.is_terminal());
    let mut models = client.models();
    let reading = shown.until(models.read(request), "resolving").await?;
    let mut pieces = reading.into_inner();
    loop {
        let waits = match shown.done {
            0 => "waiting for a provider",
            _ => "waiting for more from a provider",
        };
        let Some(piece) = shown.until(pieces.message(), waits).await? else {
            break;
        };
        if piece.size > 0 {
            let rest = piece.size.saturating_sub(options.offset);
            shown.total = options.length.unwrap_or(u64::MAX).min(rest);
        }
        shown.arrived(piece.content.len());
        match output
            .write_all(&piece.content)
            .and_then(|()| output.flush())
        {
            Ok(()) => {}
            // The reader has closed the pipe, as `head` does.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => {
                return Err(Failure::other(format!(
                    "cannot write to standard output: {error}"
                )));
            }
        }
    }
    Ok(())
}

/// Progress on standard error while the content goes to standard output.
struct Shown {
    /// The progress meter; `None` until something has taken longer than [`SILENT`].
    meter: Option<Meter>,
    begun: Instant,
    /// True if standard output is a terminal. Then no bar is shown while content arrives, because they would overwrite
    /// each other.
    is_terminal: bool,
    done: u64,
    total: u64,
}

impl Shown {
    fn new(is_terminal: bool) -> Self {
        Self {
            meter: None,
            begun: Instant::now(),
            is_terminal,
            done: 0,
            total: 0,
        }
    }

    /// Waits for `work`. Shows `text` if it takes longer than [`SILENT`].
    async fn until<T>(&mut self, work: impl Future<Output = T>, text: &str) -> T {
        tokio::pin!(work);
        loop {
            tokio::select! {
                result = &mut work => return result,
                () = tokio::time::sleep(SILENT) => {
                    let meter = self.meter.get_or_insert_with(Meter::new);
                    meter.show(text, (self.done, self.total), true);
                }
            }
        }
    }

    /// Counts bytes that are about to be written.
    fn arrived(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        self.done += bytes as u64;
        if self.is_terminal {
            if let Some(meter) = self.meter.take() {
                meter.finish();
            }
        } else if self.begun.elapsed() > SILENT {
            let meter = self.meter.get_or_insert_with(Meter::new);
            meter.update("reading", self.done, self.total);
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(meter) = &self.meter {
            meter.finish();
        }
    }
}
