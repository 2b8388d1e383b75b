//! Errors of dials, in words that help a user.

use std::io;

use libp2p::{PeerId, TransportError, swarm::DialError};

use super::ConnectError;

/// Turns the error of a dial into words that help a user.
pub(super) fn dial_error(peer: PeerId, error: &DialError) -> ConnectError {
    let reason = match error {
        DialError::NoAddresses => return ConnectError::NoAddress(peer),
        DialError::Transport(attempts) => attempts
            .iter()
            .map(|(address, error)| format!("{address}: {}", attempt_error(error)))
            .collect::<Vec<_>>()
            .join("; "),
        DialError::WrongPeerId { obtained, .. } => {
            format!("another node answers at this address: {obtained}")
        }
        DialError::LocalPeerId { .. } => "the address is this node's own".to_owned(),
        DialError::Denied { cause } => match std::error::Error::source(cause) {
            Some(source) => source.to_string(),
            None => cause.to_string(),
        },
        error => error.to_string(),
    };
    ConnectError::Failed { peer, reason }
}

/// Returns the reason that one address did not lead to a connection.
pub(super) fn attempt_error(error: &TransportError<io::Error>) -> String {
    match error {
        TransportError::Other(error) => innermost(error),
        TransportError::MultiaddrNotSupported(_) => "not an address this node can dial".to_owned(),
    }
}

/// Returns the cause at the end of the chain; the errors above it add nothing.
fn innermost(error: &io::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    loop {
        let below = match cause.downcast_ref::<io::Error>() {
            Some(io) => io.get_ref().map(|inner| inner as &dyn std::error::Error),
            None => cause.source(),
        };
        match below {
            Some(below) => cause = below,
            None => return plain(&cause.to_string()),
        }
    }
}

/// Replaces a library's text for a connection that the remote side closed early.
fn plain(text: &str) -> String {
    let closed = [
        "close_notify",
        "Protocol negotiation failed",
        "unexpected end of file",
    ];
    if closed.iter().any(|part| text.contains(part)) {
        return "the peer closed the connection before the end of the handshake; it may have reached \
                a limit, block this node, or not be a Weft node"
            .to_owned();
    }
    // Links into a library's documentation do not help users.
    match text.split_once(": https://") {
        Some((text, _)) => text.to_owned(),
        None => text.to_owned(),
    }
}
