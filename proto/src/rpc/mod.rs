//! Calls by protobuf over any byte stream, many at a time: `/weft/rpc/1`.
//!
//! A [`Session`] is one side of a stream. The side that opened the stream calls; the other answers with a [`Handler`].
//! Calls are unary or stream in either direction or both; messages carry [`Attachment`]s, bytes that never pass through
//! protobuf. Every call has its own credit, so that one whose receiver is slow holds up no other, and ends with a gRPC
//! [`Status`].
//!
//! It promises: what a peer can make us hold is bounded by [`Limits`], whatever it sends; a violation ends the session
//! with an error that names it; a call that is dropped is cancelled at the other side, and its handler's future
//! dropped; a call that fails for want of a connection says whether the other side had seen it.
//!
//! It leaves out: where streams come from, and making a call again on another one.

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

/// The service that every node has: its one method, called with an empty message, answers with what the services there
/// look like, as an encoded `FileDescriptorSet`.
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
