//! Maps errors of the SDK to reasons, and reasons to gRPC statuses and failures of the program.

use std::collections::HashMap;

use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt};
use weft::{
    ConnectError, DiskError, DocumentError, DocumentStoreError, EditError, Error, ExportError,
    FindError, HfCacheError, HomeError, IndexError, LockError, OpenError, PeerId, PingError,
    SelectionError, SpawnError, TopicError,
};

use crate::{exit::Failure, reason::Reason};

/// The domain of the reasons in `google.rpc.ErrorInfo`.
const DOMAIN: &str = "weft";

/// Returns the status of an error: a code, the message, and an `ErrorInfo` with the reason for programs.
pub(super) fn status(error: &Error) -> Status {
    let mut metadata = HashMap::new();
    if let Error::SeveralPublishers { publishers, .. } = error {
        let peers = publishers.iter().map(|(peer, _)| peer.to_string());
        let peers = peers.collect::<Vec<_>>().join(",");
        metadata.insert("publishers".to_owned(), peers);
    }
    with_reason(Reason::from(error), message(error), metadata)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(Reason::from(&error), message(&error))
    }
}

/// Returns the text of an error, with a line for each publisher that claims an ambiguous name.
fn message(error: &Error) -> String {
    let mut message = error.to_string();
    if let Error::SeveralPublishers { publishers, .. } = error {
        for (peer, model) in publishers {
            message.push_str(&format!("\n  {peer} publishes it as {model}"));
        }
    }
    message
}

/// Returns the status of a failure that is not an error of the SDK. The status has a reason; without one, clients would
/// report a lost connection.
pub(super) fn failed(reason: Reason, message: impl Into<String>) -> Status {
    with_reason(reason, message, HashMap::new())
}

/// Returns the status of a malformed request.
pub(super) fn invalid(message: impl Into<String>) -> Status {
    failed(Reason::InvalidInput, message)
}

/// Parses a PeerId in a request.
pub(super) fn peer_id(text: &str) -> Result<PeerId, Status> {
    text.parse()
        .map_err(|_| invalid(format!("not a PeerId: {text}")))
}

fn with_reason(
    reason: Reason,
    message: impl Into<String>,
    metadata: HashMap<String, String>,
) -> Status {
    let details = ErrorDetails::with_error_info(reason.name(), DOMAIN, metadata);
    Status::with_error_details(reason.grpc_code(), message, details)
}

impl From<&Error> for Reason {
    fn from(error: &Error) -> Self {
        if let Some(reason) = system_reason(error) {
            return reason;
        }
        match error {
            Error::NoSuchName { .. } => Self::NoSuchName,
            Error::NoSuchModel(_) => Self::NoSuchModel,
            Error::NoSuchFile { .. } => Self::NoSuchFile,
            Error::Selection(SelectionError::NoMatch { .. }) => Self::NoMatch,
            Error::NoProvider { .. } => Self::NoProvider,
            Error::Disconnected(_) => Self::Disconnected,
            Error::SeveralPublishers { .. } => Self::SeveralPublishers,
            Error::TargetExists { .. } => Self::TargetExists,
            Error::DiskFull { .. } | Error::Disk(DiskError::Full) => Self::DiskFull,
            Error::QuotaExceeded { .. } => Self::QuotaExceeded,
            Error::Tagged { .. } => Self::Tagged,
            Error::OtherNames { .. } => Self::OtherNames,
            Error::NoSuchTag(_) => Self::NoSuchTag,
            Error::Busy(_) => Self::Busy,
            Error::Result(_) | Error::InvalidContent { .. } => Self::InvalidContent,
            Error::HfCache(error) => hf_cache_reason(error),
            Error::Index(error) => index_reason(error),
            Error::Home(HomeError::InUse(_)) => Self::HomeInUse,
            Error::Home(_) => Self::Home,
            Error::Network(SpawnError::Bootstrap(_)) => Self::InvalidInput,
            Error::Network(_) => Self::Network,
            Error::Connect(ConnectError::Stopped)
            | Error::Ping(PingError::Open(OpenError::Stopped))
            | Error::Stopped => Self::Stopped,
            Error::Connect(_) | Error::Ping(_) => Self::Unreachable,
            Error::Topic(error) => topic_reason(error),
            Error::Document(error) => document_reason(error),
            Error::NotWriter { .. } | Error::NotOwner { .. } => Self::NotAllowed,
            Error::NotListed { .. } => Self::NotListed,
            Error::Followed(_) => Self::Followed,
            Error::NotFollowed(_) => Self::NotFollowed,
            Error::NotPublisher { .. } => Self::NotPublisher,
            Error::NotAdministrator { .. } => Self::NotAdministrator,
            Error::Address(_)
            | Error::FilePattern(_)
            | Error::Name(_)
            | Error::NoKey(_)
            | Error::NotRegistry(_)
            | Error::Pattern(_)
            | Error::Record(_)
            | Error::Selection(_)
            | Error::Tag(_)
            | Error::Target(_)
            | Error::Value(_) => Self::InvalidInput,
            Error::Store(_) | Error::Disk(_) => Self::Store,
            // A new error of the SDK, or an error without a reason of its own.
            _ => Self::Other,
        }
    }
}

/// Returns the reason for a system error on a file. The reason does not depend on the operation, because the remedy is
/// always the same.
fn system_reason(error: &Error) -> Option<Reason> {
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
                    Some(Reason::Permission)
                }
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Some(Reason::DiskFull),
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

fn index_reason(error: &IndexError) -> Reason {
    match error {
        IndexError::Names(_) => Reason::UnportableNames,
        IndexError::NothingLeft { .. } => Reason::NothingToAdd,
        IndexError::Strict(_) => Reason::UnreadableFiles,
        IndexError::Changed(_) => Reason::Changed,
        _ => Reason::InvalidInput,
    }
}

fn hf_cache_reason(error: &HfCacheError) -> Reason {
    match error {
        HfCacheError::Name(_) | HfCacheError::NoRepo | HfCacheError::Selection => {
            Reason::InvalidInput
        }
        HfCacheError::Find(FindError::Name(_)) => Reason::InvalidInput,
        HfCacheError::Find(
            FindError::NoSuchRepo { .. }
            | FindError::NoSuchRevision { .. }
            | FindError::NoFiles { .. },
        ) => Reason::NotInCache,
        HfCacheError::Export(ExportError::Conflict { .. }) => Reason::TargetExists,
        HfCacheError::Export(ExportError::Lock(LockError::Held { .. })) => Reason::Busy,
        _ => Reason::HfCache,
    }
}

fn topic_reason(error: &TopicError) -> Reason {
    match error {
        TopicError::Name(_) | TopicError::TooLarge(_) => Reason::InvalidInput,
        TopicError::TooMany => Reason::TooManyTopics,
        TopicError::Busy => Reason::TopicBusy,
        _ => Reason::Topic,
    }
}

fn document_reason(error: &DocumentError) -> Reason {
    match error {
        DocumentError::Unknown(_) => Reason::NoSuchDocument,
        DocumentError::NotYet(_) => Reason::NotArrived,
        DocumentError::NotWriter { .. } | DocumentError::NotOwner { .. } => Reason::NotAllowed,
        DocumentError::Edit(EditError::NotFound(_)) => Reason::NothingThere,
        DocumentError::Store(DocumentStoreError::Document { .. }) => Reason::DocumentDamaged,
        DocumentError::Store(DocumentStoreError::Full) => Reason::DiskFull,
        DocumentError::Store(_) => Reason::Store,
        DocumentError::TooLarge { .. } => Reason::TooLarge,
        DocumentError::ImportIncomplete(_) => Reason::ImportIncomplete,
        DocumentError::Stopped => Reason::Stopped,
        _ => Reason::InvalidInput,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_system_error_has_the_same_reason_in_every_operation() {
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
