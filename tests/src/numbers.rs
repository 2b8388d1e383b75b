//! The service of `schema/test.proto`, which has a method of each kind, and an implementation.

#[allow(
    missing_docs,
    missing_debug_implementations,
    dead_code,
    unreachable_pub,
    clippy::all
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/weft.test.v1.rs"));
}

use std::fmt;

pub use generated::{Number, Numbers, NumbersClient, NumbersServer};
use weft_proto::rpc::{Attached, Code, Context, Messages, Sink, Status};

/// Implements [`Numbers`] as the schema says, except `Echo`, which returns the result of this function. A countdown
/// from 13 fails at its end.
#[derive(Clone)]
pub struct Counting<E>(pub E);

impl<E> fmt::Debug for Counting<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counting").finish_non_exhaustive()
    }
}

impl<E, A> Numbers for Counting<E>
where
    E: Fn(Context, Attached<Number>) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Attached<Number>, Status>> + Send,
{
    async fn echo(
        &self,
        context: Context,
        request: Attached<Number>,
    ) -> Result<Attached<Number>, Status> {
        (self.0)(context, request).await
    }

    async fn countdown(
        &self,
        _: Context,
        request: Attached<Number>,
        mut responses: Sink<Number>,
    ) -> Result<(), Status> {
        for value in (0..request.message.value).rev() {
            responses.send(Number { value }).await?;
        }
        match request.message.value {
            13 => Err(Status::new(Code::FailedPrecondition, "not thirteen")),
            _ => Ok(()),
        }
    }

    async fn sum(
        &self,
        _: Context,
        mut requests: Messages<Number>,
    ) -> Result<Attached<Number>, Status> {
        let mut value = 0;
        while let Some(number) = requests.next().await? {
            value += number.message.value;
        }
        Ok(Number { value }.into())
    }

    async fn double(
        &self,
        _: Context,
        mut requests: Messages<Number>,
        mut responses: Sink<Number>,
    ) -> Result<(), Status> {
        while let Some(mut number) = requests.next().await? {
            number.message.value *= 2;
            number.attachments.reverse();
            responses.send(number).await?;
        }
        Ok(())
    }
}
