//! How a call ends: gRPC's status codes.

use std::fmt;

use bytes::Bytes;

/// gRPC's status codes, with their numbers (<https://grpc.io/docs/guides/status-codes/>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Code {
    /// It succeeded.
    Ok = 0,
    /// The caller gave up.
    Cancelled = 1,
    /// What happened is not known here.
    Unknown = 2,
    /// What was asked for makes no sense.
    InvalidArgument = 3,
    /// The caller's time is over. The call may have had its effect.
    DeadlineExceeded = 4,
    /// There is no such thing.
    NotFound = 5,
    /// It is there already.
    AlreadyExists = 6,
    /// The caller may not.
    PermissionDenied = 7,
    /// A limit is reached; the message names it.
    ResourceExhausted = 8,
    /// Not in this state.
    FailedPrecondition = 9,
    /// It was given up, often for another at the same time.
    Aborted = 10,
    /// Beyond the end.
    OutOfRange = 11,
    /// There is no such method.
    Unimplemented = 12,
    /// A broken promise of the other side's.
    Internal = 13,
    /// It cannot be reached now.
    Unavailable = 14,
    /// Data is lost.
    DataLoss = 15,
    /// Who is calling is not known.
    Unauthenticated = 16,
}

impl Code {
    /// The code with this number; [`Code::Unknown`] if there is none, as gRPC has it.
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

    /// Its name, as gRPC writes it.
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

/// Whether the other side had seen a call that failed for want of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It never left, or the other side said that it was not looked at: it can be made again without danger.
    No,
    /// It left, and nothing came back.
    Perhaps,
    /// Something came back.
    Yes,
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Status {
    /// What kind of failure.
    pub code: Code,
    /// For people.
    pub message: String,
    /// For programs: an encoded `google.rpc.Status`, or empty.
    pub details: Bytes,
    /// Of a call that failed with [`Code::Unavailable`] because the session ended.
    pub seen: Option<Seen>,
}

impl Status {
    /// A failure.
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
