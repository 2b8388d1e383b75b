//! How the program ends: what it says when it fails, and the code it ends with.
//!
//! The table of reasons, with their exit codes and hints, is in [`reason`](crate::reason).

use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use weft_proto::rpc;

use crate::{
    reason::{FAILED, Reason},
    terminal::output::{err, out},
};

/// The message of a failed command, and the code that the program ends with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// The name of a [`Reason`], of gRPC's code if another node has answered a call with it, or of a reason that only
    /// another version of the node knows.
    pub(crate) reason: String,
    pub(crate) message: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
}

impl Failure {
    /// Makes a failure with the exit code and the hint of its reason.
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            code: reason.exit_code(),
            reason: reason.name().to_owned(),
            message: message.into(),
            hint: reason.hint().map(str::to_owned),
        }
    }

    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(Reason::Other, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Reason::Usage, message)
    }

    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(Reason::Interrupted, message)
    }

    /// A call that another node has answered with a failure: the reason is gRPC's name of the code.
    pub(crate) fn answered(code: rpc::Code, message: &str) -> Self {
        Self {
            code: FAILED,
            reason: code.name().to_owned(),
            message: format!("{code}: {message}"),
            hint: None,
        }
    }

    /// The node has ended a stream that goes on until the client leaves it; `left` of `count` events have not come.
    pub(crate) fn ended(count: Option<u64>, left: u64) -> Self {
        let text = match count {
            Some(count) => format!(
                "the node ended the stream after {} of {count}",
                count - left
            ),
            None => "the node ended the stream".to_owned(),
        };
        Self::new(Reason::Stopped, text)
            .hint("It is stopping, or has restarted: check `weft status`, and run this again.")
    }

    /// Nothing is left to say: the result that was printed says it.
    pub(crate) fn silent(reason: Reason) -> Self {
        Self::new(reason, "")
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    fn json(&self) -> serde_json::Value {
        json!({ "error": {
            "reason": self.reason,
            "message": self.message,
            "hint": self.hint.as_deref().map(one_line),
            "code": self.code,
        }})
    }

    /// Prints the failure: for people on standard error, with `--json` as an object on standard output, or on standard
    /// error if standard output `is_content`, such as the bytes of a file.
    pub(crate) fn print(&self, json: bool, is_content: bool) {
        if self.message.is_empty() {
            return;
        }
        if json {
            let error = self.json();
            match is_content {
                true => err!("{error}"),
                false => out!("{error}"),
            }
            return;
        }
        // It may quote a peer, whose text does not start a line; `err!` escapes the rest.
        let indented = |text: &str| text.replace('\n', "\n  ");
        err!("weft: {}", indented(&self.message));
        if let Some(hint) = &self.hint {
            err!("  {}", indented(hint));
        }
    }
}

/// Joins the lines of a text that is wrapped for people: a program that shows it wraps it as it likes.
fn one_line(text: &str) -> String {
    text.lines().map(str::trim).collect::<Vec<_>>().join(" ")
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let Some(details) = status.get_details_error_info() else {
            return without_reason(&status);
        };
        match Reason::of_status(&details.reason, status.code()) {
            Some(reason) => Self::new(reason, status.message()),
            None => Self {
                code: FAILED,
                reason: details.reason,
                message: status.message().to_owned(),
                hint: None,
            },
        }
    }
}

/// Explains a status without a reason. Every error of the node itself has one, so this is the connection's.
fn without_reason(status: &Status) -> Failure {
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal => {
            // The transport's own words are about its frames.
            tracing::debug!(%status, "the connection to the node was lost");
            Failure::new(Reason::NotRunning, "the connection to the node was lost")
        }
        Code::Unauthenticated => Failure::other(status.message()).hint(
            "The node makes a new token at each start: read the home's api/token again, and check that --home is right.",
        ),
        Code::Unimplemented => Failure::other(status.message()).hint(
            "The running node is of another version than this program. Restart it with this one.",
        ),
        _ => Failure::other(status.message()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, reason: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, "weft", HashMap::new());
        Status::with_error_details(code, "it failed", details)
    }

    #[test]
    fn a_hint_is_one_line_in_json() {
        for (code, reason) in [
            (Code::Unavailable, "DISCONNECTED"),
            (Code::ResourceExhausted, "DISK_FULL"),
            (Code::NotFound, "NO_MATCH"),
        ] {
            let failure = Failure::from(status(code, reason));
            assert!(
                failure
                    .hint
                    .as_ref()
                    .is_some_and(|hint| hint.contains('\n'))
            );
            let json = failure.json();
            let hint = json["error"]["hint"].as_str().unwrap_or_default();
            assert!(!hint.is_empty() && !hint.contains('\n') && !hint.contains("  "));
        }
    }

    #[test]
    fn a_status_without_a_reason_is_the_connections_and_one_with_an_unknown_reason_the_nodes() {
        let lost = Failure::from(Status::unavailable("h2 protocol error"));
        assert_eq!((lost.code, lost.reason.as_str()), (6, "NOT_RUNNING"));
        let token = Failure::from(Status::unauthenticated("the token is wrong"));
        assert_eq!((token.code, token.reason.as_str()), (1, "OTHER"));
        assert!(token.hint.is_some());
        for reason in ["OTHER", "NEWER"] {
            let failure = Failure::from(status(Code::Internal, reason));
            assert_eq!((failure.code, failure.reason.as_str()), (1, reason));
            assert_eq!(failure.message, "it failed");
        }
    }
}
