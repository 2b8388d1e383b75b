//! The status with which a call ends, with gRPC's status codes.

use std::fmt;

use bytes::Bytes;

/// gRPC's status codes, with their numbers (<https://grpc.io/docs/guides/status-codes/>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Code {
    /// The call succeeded.
    Ok = 0,
    /// The caller cancelled the call.
    Cancelled = 1,
    /// The error is unknown.
    Unknown = 2,
    /// The request is invalid.
    InvalidArgument = 3,
    /// The deadline has passed. The call may have had its effect.
    DeadlineExceeded = 4,
    /// The requested thing does not exist.
    NotFound = 5,
    /// The thing to create already exists.
    AlreadyExists = 6,
    /// The caller is not allowed to make this call.
    PermissionDenied = 7,
    /// A limit is reached; the message names it.
    ResourceExhausted = 8,
    /// The call is not possible in the present state.
    FailedPrecondition = 9,
    /// The call was aborted, often because of a concurrent one.
    Aborted = 10,
    /// The request is beyond the valid range.
    OutOfRange = 11,
    /// There is no such method.
    Unimplemented = 12,
    /// The called side violated its own schema or protocol.
    Internal = 13,
    /// The called side is not reachable now.
    Unavailable = 14,
    /// Data is lost.
    DataLoss = 15,
    /// The caller is not authenticated.
    Unauthenticated = 16,
}

impl Code {
    /// Returns the code with this number; [`Code::Unknown`] for an unknown number, as in gRPC.
    pub fn from_number(number: u32) -> Self {
        use Code::*;
        const ALL: [Code; 17] = [
            Ok,
            Cancelled,
            Unknown,
            InvalidArgument,
            DeadlineExceeded,
            NotFound,
            AlreadyExists,
            PermissionDenied,
            ResourceExhausted,
            FailedPrecondition,
            Aborted,
            OutOfRange,
            Unimplemented,
            Internal,
            Unavailable,
            DataLoss,
            Unauthenticated,
        ];
        let known = usize::try_from(number).ok().and_then(|n| ALL.get(n));
        known.copied().unwrap_or(Unknown)
    }

    /// Returns the code's name in gRPC, such as `NOT_FOUND`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Cancelled => "CANCELLED",
            Self::Unknown => "UNKNOWN",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Aborted => "ABORTED",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
            Self::Unavailable => "UNAVAILABLE",
            Self::DataLoss => "DATA_LOSS",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Says if the other side has seen a call that failed because the session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The call was never sent, or the other side reported that it was not handled. It is safe to make it again.
    No,
    /// The call was sent, and nothing came back.
    Perhaps,
    /// The other side sent something for this call.
    Yes,
}

/// The reason for the failure of a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Status {
    /// The kind of failure.
    pub code: Code,
    /// The message for people.
    pub message: String,
    /// The details for programs: an encoded `google.rpc.Status`, or empty.
    pub details: Bytes,
    /// Set if the call failed with [`Code::Unavailable`] because the session ended.
    pub seen: Option<Seen>,
}

impl Status {
    /// Creates a failure.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: Bytes::new(),
            seen: None,
        }
    }

    pub(crate) fn lost(seen: Seen, why: &str) -> Self {
        Self {
            seen: Some(seen),
            ..Self::new(Code::Unavailable, format!("the session has ended: {why}"))
        }
    }
}
