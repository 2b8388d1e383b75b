//! Long work of the node, shown while it goes on.

use tonic::Streaming;

use crate::{
    exit::Failure,
    terminal::{output::Meter, stop::Stop},
};

/// What a stream of events says.
pub(super) trait Event {
    type Progress: Default;
    type Done;

    /// How far the work is, or what it came to; `None`: it says nothing that this program knows.
    fn event(self) -> Option<Result<Self::Progress, Self::Done>>;
}

/// What the work comes to; `show` is given each step, and `stopped` says how things are when a person has stopped it at
/// the last of them.
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
            Ok(None) => break Err(Failure::other("the node ended the call without a result")),
            Err(status) => break Err(status.into()),
        }
    };
    meter.finish();
    result
}
