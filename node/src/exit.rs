//! Failures of a command: the message, the hint and the exit code.
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

/// The message of a failed command, and the exit code of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    /// The name of a [`Reason`]; of a gRPC code, if another node answered a call with it; or of a reason that only
    /// another version of the node knows.
    pub(crate) reason: String,
    pub(crate) message: String,
    /// The next step for the user.
    pub(crate) hint: Option<String>,
}

impl Failure {
    /// Creates a failure with the exit code and the hint of its reason.
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

    /// Creates the failure of a call that another node answered with an error. The reason is gRPC's name of the code.
    pub(crate) fn answered(code: rpc::Code, message: &str) -> Self {
        Self {
            code: FAILED,
            reason: code.name().to_owned(),
            message: format!("{code}: {message}"),
            hint: None,
        }
    }

    /// Creates the failure of a stream that the node ended before the client did. `left` of `count` events are missing.
    pub(crate) fn ended(count: Option<u64>, left: u64) -> Self {
        let text = match count {
            Some(count) => format!(
                "the node ended the stream after {} of {count}",
                count - left
            ),
            None => "the node ended the stream".to_owned(),
        };
        Self::new(Reason::Stopped, text)
            .hint("The node is stopping, or has restarted: check `weft status`, and run the command again.")
    }

    /// Creates a failure that prints nothing, because the printed result explains it.
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

    /// Prints the failure to standard error as text, or with `--json` to standard output as an object. If standard
    /// output `is_content`, such as the bytes of a file, the object goes to standard error too.
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
        // The text may quote a peer, and a peer's text must not start a line; `err!` escapes the rest.
        let indented = |text: &str| text.replace('\n', "\n  ");
        err!("weft: {}", indented(&self.message));
        if let Some(hint) = &self.hint {
            err!("  {}", indented(hint));
        }
    }
}

/// Joins the lines of a text that is wrapped for a terminal.
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

/// Explains a status without a reason. Every error of the node itself has a reason, so the connection has failed.
fn without_reason(status: &Status) -> Failure {
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal => {
            // The transport's message is about HTTP/2 frames, which does not help the user.
            tracing::debug!(%status, "the connection to the node was lost");
            Failure::new(Reason::NotRunning, "the connection to the node was lost")
        }
        Code::Unauthenticated => Failure::other(status.message()).hint(
            "The node creates a new token at each start: read the home's api/token again, and check --home.",
        ),
        Code::Unimplemented => Failure::other(status.message()).hint(
            "The running node has another version than this program: stop the node, and start it with this program.",
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
    fn a_status_without_a_reason_means_a_lost_connection_and_an_unknown_reason_is_kept() {
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
