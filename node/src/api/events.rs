//! Turns a long operation of the node into a stream of events for a client.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use tonic::Status;
use weft::Operation;

use super::status::status;

/// A stream of an operation's events: progress, then the result. Dropping the stream, as when the client disconnects,
/// stops the operation.
pub(crate) struct Events<P, T, E> {
    operation: Option<Operation<P, T>>,
    progress: fn(P) -> E,
    done: fn(T) -> E,
}

impl<P, T, E> Events<P, T, E> {
    pub(super) fn new(operation: Operation<P, T>, progress: fn(P) -> E, done: fn(T) -> E) -> Self {
        Self {
            operation: Some(operation),
            progress,
            done,
        }
    }
}

impl<P, T: Unpin, E> Stream for Events<P, T, E> {
    type Item = Result<E, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(operation) = &mut this.operation else {
            return Poll::Ready(None);
        };
        match Pin::new(&mut *operation).poll_next(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(progress)) => return Poll::Ready(Some(Ok((this.progress)(progress)))),
            Poll::Ready(None) => {}
        }
        match Pin::new(operation).poll(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(result) => {
                this.operation = None;
                let event = result.map(this.done);
                Poll::Ready(Some(event.map_err(|error| status(&error))))
            }
        }
    }
}
