//! Follows the stream of events of a long operation of the node, and shows its progress.

use tonic::Streaming;

use crate::{
    exit::Failure,
    terminal::{output::Meter, stop::Stop},
};

/// An event of an operation: progress, or the result.
pub(super) trait Event {
    type Progress: Default;
    type Done;

    /// Returns the progress (`Ok`) or the result (`Err`); `None` for an event that this version does not know.
    fn event(self) -> Option<Result<Self::Progress, Self::Done>>;
}

/// Follows an operation until it ends, and returns its result. Calls `show` for each event of progress. If a signal
/// stops the command, returns the failure that `stopped` makes from the last progress.
pub(super) async fn follow<E: Event>(
    mut events: Streaming<E>,
    (meter, stop): (&mut Meter, &mut Stop),
    mut show: impl FnMut(&mut Meter, &E::Progress),
    stopped: impl FnOnce(&E::Progress) -> Failure,
) -> Result<E::Done, Failure> {
    let mut last = E::Progress::default();
    let result = loop {
        let message = tokio::select! {
            message = events.message() => message,
            () = stop.wait() => break Err(stopped(&last)),
        };
        match message.map(|message| message.and_then(Event::event)) {
            Ok(Some(Ok(progress))) => {
                show(meter, &progress);
                last = progress;
            }
            Ok(Some(Err(done))) => break Ok(done),
            Ok(None) => {
                break Err(Failure::other(
                    "the node ended the operation without a result",
                ));
            }
            Err(status) => break Err(status.into()),
        }
    };
    meter.finish();
    result
}
