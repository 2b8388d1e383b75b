//! Long work that reports progress, and stops when it is dropped.

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, future::FusedFuture, stream::FusedStream};
use tokio::{
    task::{JoinError, JoinHandle},
    time::{Interval, MissedTickBehavior, interval},
};

use crate::Error;

/// Interval between progress reports: short enough for a smooth bar, long enough to cost nothing.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Work under way, such as a fetch.
///
/// As a [`Stream`], an operation yields progress ten times a second until the work ends. As a future, it yields the
/// result. Both can be used on the same operation: take progress from the stream until it ends, then await the
/// result.
///
/// The result is yielded once. Polled again after that, the stream has ended and the future stays pending.
///
/// # Cancellation
/// Dropping the operation stops the work. Content that was verified until then is kept.
///
/// # Panics
/// A panic of the work is resumed in the task that polls the operation.
pub struct Operation<P, T> {
    sample: Box<dyn Fn() -> P + Send + Sync>,
    task: JoinHandle<Result<T, Error>>,
    tick: Interval,
    /// The result, kept between the end of the stream and the poll of the future.
    result: Option<Result<T, Error>>,
    /// True once the task has been polled to its end; it must not be polled again.
    ended: bool,
}

impl<P, T> Operation<P, T>
where
    T: Send + 'static,
{
    /// Runs `work` in a task of its own; `sample` returns the current progress.
    pub(crate) fn spawn(
        sample: impl Fn() -> P + Send + Sync + 'static,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Self {
        let mut tick = interval(PROGRESS_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            sample: Box::new(sample),
            task: tokio::spawn(work),
            tick,
            result: None,
            ended: false,
        }
    }
}

impl<P, T> Operation<P, T> {
    /// Returns the current progress.
    pub fn progress(&self) -> P {
        (self.sample)()
    }

    fn finished(joined: Result<Result<T, Error>, JoinError>) -> Result<T, Error> {
        match joined {
            Ok(result) => result,
            // The runtime is shutting down: nothing else cancels the task while this operation exists.
            Err(error) if error.is_cancelled() => Err(Error::Stopped),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

impl<P, T: Unpin> Stream for Operation<P, T> {
    type Item = P;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<P>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(joined) = Pin::new(&mut self.task).poll(cx) {
            self.ended = true;
            self.result = Some(Self::finished(joined));
            return Poll::Ready(None);
        }
        self.tick.poll_tick(cx).map(|_| Some(self.progress()))
    }
}

impl<P, T: Unpin> Future for Operation<P, T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.result.take() {
            return Poll::Ready(result);
        }
        if self.ended {
            // The result has been taken.
            return Poll::Pending;
        }
        let joined = ready!(Pin::new(&mut self.task).poll(cx));
        self.ended = true;
        Poll::Ready(Self::finished(joined))
    }
}

impl<P, T: Unpin> FusedFuture for Operation<P, T> {
    fn is_terminated(&self) -> bool {
        self.ended && self.result.is_none()
    }
}

impl<P, T: Unpin> FusedStream for Operation<P, T> {
    fn is_terminated(&self) -> bool {
        self.ended
    }
}

impl<P, T> Drop for Operation<P, T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<P, T> fmt::Debug for Operation<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Operation").finish_non_exhaustive()
    }
}

/// Runs blocking work on a thread for such work.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(Error::Stopped),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};

    use super::*;

    #[tokio::test]
    async fn an_operation_that_is_polled_after_its_result_does_not_panic() {
        for by_stream in [true, false] {
            let mut operation = Operation::spawn(|| 1, async { Ok(7) });
            if by_stream {
                while operation.next().await.is_some() {}
            }
            assert_eq!((&mut operation).await.unwrap(), 7);
            assert!(FusedFuture::is_terminated(&operation));
            assert!((&mut operation).now_or_never().is_none());
            assert_eq!(operation.next().await, None);
            assert!((&mut operation).now_or_never().is_none());
        }
    }
}
