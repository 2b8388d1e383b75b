//! Concurrent calls with protobuf messages over any byte stream: the protocol `/weft/rpc/1`.
//!
//! A [`Session`] is one side of a stream. The side that opened the stream makes calls; the other side answers them with
//! a [`Handler`]. A call is unary, or streams messages in one or both directions. Messages can have [`Attachment`]s:
//! bytes that are not copied into the protobuf message. Every call has its own credit, so that a slow receiver delays
//! no other call, and ends with a gRPC [`Status`].
//!
//! - [`Limits`] bounds the memory that a peer can use, whatever it sends.
//! - A violation of the protocol ends the session, with an error that names the violation.
//! - Dropping a call cancels it on the other side, and drops the handler's future there.
//! - A call that fails because the session ended reports whether the other side has seen it.
//!
//! The module neither opens streams nor makes a failed call again on another stream.

mod call;
mod drive;
mod frame;
mod incoming;
mod limits;
mod message;
mod outbox;
mod serve;
mod session;
mod status;
mod typed;

/// The method of a service that every node has. Called with an empty message, it returns the schemas of the node's
/// services as an encoded `FileDescriptorSet`.
pub const SCHEMAS: &str = "weft.rpc.v1.Schemas/Get";

pub use self::{
    call::{Receiver, Sender},
    drive::SessionError,
    frame::Violation,
    limits::{Budget, Held, Limits, Refused},
    message::{Attachment, Message, Metadata},
    serve::{Context, Handler},
    session::{Options, Session},
    status::{Code, Seen, Status},
    typed::{
        Answer, Attached, Caller, Client, Ended, Messages, Method, Respond, Router, Service, Sink,
        Streams,
    },
};
