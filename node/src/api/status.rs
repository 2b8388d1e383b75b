//! Errors of the node as gRPC's.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use weft::{
    ConnectError, DiskError, DocumentError, DocumentStoreError, EditError, Error, ExportError,
    FindError, HfCacheError, HomeError, IndexError, LockError, OpenError, PingError,
    SelectionError, SpawnError, TopicError,
};

/// Whose reasons these are, in `google.rpc.ErrorInfo`.
const DOMAIN: &str = "weft";

/// The status for an error: a code, the message, and an `ErrorInfo` whose reason programs can rely on.
pub(crate) fn status(error: &Error) -> Status {
    let mut metadata = HashMap::new();
    let (code, reason) = match error {
        Error::NoSuchName { .. } => (Code::NotFound, "NO_SUCH_NAME"),
        Error::NoSuchModel(_) => (Code::NotFound, "NO_SUCH_MODEL"),
        Error::NoSuchFile { .. } => (Code::NotFound, "NO_SUCH_FILE"),
        Error::Selection(SelectionError::NoMatch { .. }) => (Code::NotFound, "NO_MATCH"),
        Error::Selection(_) | Error::FilePattern(_) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Result(_) => (Code::DataLoss, "INVALID_CONTENT"),
        Error::NoProvider { .. } => (Code::Unavailable, "NO_PROVIDER"),
        Error::Disconnected(_) => (Code::Unavailable, "DISCONNECTED"),
        Error::SeveralPublishers { publishers, .. } => {
            let list: Vec<String> = publishers
                .iter()
                .map(|(peer, _)| peer.to_string())
                .collect();
            metadata.insert("publishers".to_owned(), list.join(","));
            (Code::FailedPrecondition, "SEVERAL_PUBLISHERS")
        }
        Error::TargetExists { .. } => (Code::AlreadyExists, "TARGET_EXISTS"),
        Error::DiskFull { .. } | Error::Disk(DiskError::Full) => {
            (Code::ResourceExhausted, "DISK_FULL")
        }
        Error::QuotaExceeded { .. } => (Code::ResourceExhausted, "QUOTA_EXCEEDED"),
        Error::Tagged { .. } => (Code::FailedPrecondition, "TAGGED"),
        Error::OtherNames { .. } => (Code::FailedPrecondition, "OTHER_NAMES"),
        Error::NoSuchTag(_) => (Code::NotFound, "NO_SUCH_TAG"),
        Error::Tag(_) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Busy(_) => (Code::Aborted, "BUSY"),
        Error::HfCache(error) => of_hf_cache(error),
        Error::Index(IndexError::Names(_)) => (Code::InvalidArgument, "UNPORTABLE_NAMES"),
        Error::Index(IndexError::NothingLeft { .. }) => (Code::InvalidArgument, "NOTHING_TO_ADD"),
        Error::Index(IndexError::Strict(_)) => (Code::InvalidArgument, "UNREADABLE_FILES"),
        Error::Index(IndexError::Changed(_)) => (Code::Aborted, "CHANGED"),
        Error::Record(_)
        | Error::Index(_)
        | Error::Name(_)
        | Error::Target(_)
        | Error::Address(_) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Home(HomeError::InUse(_)) => (Code::FailedPrecondition, "HOME_IN_USE"),
        Error::Home(_) => (Code::FailedPrecondition, "HOME"),
        Error::InvalidContent { .. } => (Code::DataLoss, "INVALID_CONTENT"),
        Error::Network(SpawnError::Bootstrap(_)) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Network(_) => (Code::Internal, "NETWORK"),
        Error::Connect(ConnectError::Stopped)
        | Error::Ping(PingError::Open(OpenError::Stopped)) => (Code::Unavailable, "STOPPED"),
        Error::Connect(_) | Error::Ping(_) => (Code::Unavailable, "UNREACHABLE"),
        Error::Topic(TopicError::Name(_) | TopicError::TooLarge(_)) => {
            (Code::InvalidArgument, "INVALID_INPUT")
        }
        Error::Topic(TopicError::TooMany) => (Code::ResourceExhausted, "TOO_MANY_TOPICS"),
        Error::Topic(TopicError::Busy) => (Code::ResourceExhausted, "BUSY"),
        Error::Topic(_) => (Code::Internal, "TOPIC"),
        Error::Document(error) => of_document(error),
        Error::NotWriter { .. } | Error::NotOwner { .. } => (Code::PermissionDenied, "NOT_ALLOWED"),
        Error::NotListed { .. } => (Code::NotFound, "NOT_LISTED"),
        Error::Followed(_) => (Code::FailedPrecondition, "FOLLOWED"),
        Error::NotFollowed(_) => (Code::NotFound, "NOT_FOLLOWED"),
        Error::NotPublisher { .. } => (Code::PermissionDenied, "NOT_PUBLISHER"),
        Error::NotAdministrator { .. } => (Code::PermissionDenied, "NOT_ADMINISTRATOR"),
        Error::NotRegistry(_) | Error::Pattern(_) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Value(_) | Error::NoKey(_) => (Code::InvalidArgument, "INVALID_INPUT"),
        Error::Stopped => (Code::Unavailable, "STOPPED"),
        _ => (Code::Internal, "STORE"),
    };
    let (code, reason) = of_system(error).unwrap_or((code, reason));
    let mut message = error.to_string();
    if let Error::SeveralPublishers { publishers, .. } = error {
        for (peer, model) in publishers {
            message.push_str(&format!("\n  {peer} says it is {model}"));
        }
    }
    let details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// The reason for an error of the system on a file, wherever it was met: what to do about it is the same everywhere.
fn of_system(error: &Error) -> Option<(Code, &'static str)> {
    use std::io::ErrorKind;

    let places = matches!(
        error,
        Error::Home(HomeError::Io { .. }) | Error::Store(_) | Error::Index(_) | Error::HfCache(_)
    );
    let mut cause: Option<&(dyn std::error::Error + 'static)> = places.then_some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<std::io::Error>() {
            return match error.kind() {
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    Some((Code::FailedPrecondition, "PERMISSION"))
                }
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                    Some((Code::ResourceExhausted, "DISK_FULL"))
                }
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

fn of_hf_cache(error: &HfCacheError) -> (Code, &'static str) {
    match error {
        HfCacheError::Name(_) | HfCacheError::NoRepo | HfCacheError::Selection => {
            (Code::InvalidArgument, "INVALID_INPUT")
        }
        HfCacheError::Find(FindError::Name(_)) => (Code::InvalidArgument, "INVALID_INPUT"),
        HfCacheError::Find(
            FindError::NoSuchRepo { .. }
            | FindError::NoSuchRevision { .. }
            | FindError::NoFiles { .. },
        ) => (Code::NotFound, "NOT_IN_CACHE"),
        HfCacheError::Export(ExportError::Conflict { .. }) => {
            (Code::AlreadyExists, "TARGET_EXISTS")
        }
        HfCacheError::Export(ExportError::Lock(LockError::Held { .. })) => (Code::Aborted, "BUSY"),
        _ => (Code::FailedPrecondition, "HF_CACHE"),
    }
}

fn of_document(error: &DocumentError) -> (Code, &'static str) {
    match error {
        DocumentError::Unknown(_) => (Code::NotFound, "NO_SUCH_DOCUMENT"),
        DocumentError::NotYet(_) => (Code::FailedPrecondition, "NOT_ARRIVED"),
        DocumentError::NotWriter { .. } | DocumentError::NotOwner { .. } => {
            (Code::PermissionDenied, "NOT_ALLOWED")
        }
        DocumentError::Edit(EditError::NotFound(_)) => (Code::NotFound, "NOTHING_THERE"),
        DocumentError::Store(DocumentStoreError::Document { .. }) => {
            (Code::DataLoss, "DOCUMENT_DAMAGED")
        }
        DocumentError::Store(DocumentStoreError::Full) => (Code::ResourceExhausted, "DISK_FULL"),
        DocumentError::Store(_) => (Code::Internal, "STORE"),
        DocumentError::TooLarge { .. } => (Code::ResourceExhausted, "TOO_LARGE"),
        DocumentError::ImportIncomplete(_) => (Code::DataLoss, "IMPORT_INCOMPLETE"),
        DocumentError::Stopped => (Code::Unavailable, "STOPPED"),
        _ => (Code::InvalidArgument, "INVALID_INPUT"),
    }
}

/// A failure of this side that has no name of its own: with a reason, so that no client takes it for a lost connection.
pub(crate) fn failed(message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info("STORE", DOMAIN, HashMap::new());
    Status::with_error_details(Code::Internal, message, details)
}

/// Refuses what a client sent.
pub(crate) fn invalid(message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info("INVALID_INPUT", DOMAIN, HashMap::new());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_of_the_system_has_a_reason_of_its_own_wherever_it_was_met() {
        for (kind, reason) in [
            (io::ErrorKind::PermissionDenied, "PERMISSION"),
            (io::ErrorKind::ReadOnlyFilesystem, "PERMISSION"),
            (io::ErrorKind::StorageFull, "DISK_FULL"),
            (io::ErrorKind::QuotaExceeded, "DISK_FULL"),
            (io::ErrorKind::InvalidData, "HOME"),
        ] {
            let error = Error::Home(HomeError::Io {
                action: "cannot write",
                path: "/home/x".into(),
                source: kind.into(),
            });
            let details = status(&error).get_details_error_info();
            assert_eq!(details.unwrap().reason, reason);
        }
    }
}
