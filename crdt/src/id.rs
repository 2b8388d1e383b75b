//! Identifiers: hashes or keys of 32 bytes, written as hexadecimal digits.

use std::{fmt, str::FromStr};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// Reads an identifier from bytes, if there are 32 of them.
            pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let mut bytes = [0; 32];
                if text.len() != 64 || !text.is_ascii() {
                    return Err(ParseIdError(text.to_owned()));
                }
                for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
                    let digits = &text[at..at + 2];
                    *byte = match u8::from_str_radix(digits, 16) {
                        Ok(byte) if !digits.starts_with('+') => byte,
                        _ => return Err(ParseIdError(text.to_owned())),
                    };
                }
                Ok(Self(bytes))
            }
        }
    };
}

id! {
    /// The id of a document: the BLAKE3 hash of its genesis, which its owner signs.
    DocumentId
}

id! {
    /// A run of an author's program that writes a document. The id is a hash of the author's key, the document, the
    /// epoch in which the session began, and a nonce that is new at every start. A restored backup thus never continues
    /// an old sequence.
    SessionId
}

id! {
    /// The Ed25519 public key of an author, owner or peer.
    Key
}

id! {
    /// The hash of an epoch, or the document's id before the first epoch.
    EpochId
}

id! {
    /// The hash of a chain of envelopes: of all changes of a session up to one.
    Chain
}

id! {
    /// The Automerge hash of a change (SHA-256).
    ChangeId
}

id! {
    /// A digest that is equal on two replicas exactly if they have the same data of a document.
    Digest
}

/// The reason for which a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: an id has 64 hexadecimal digits")]
pub struct ParseIdError(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_as_hex_and_read_back() {
        let mut bytes = [0; 32];
        bytes[31] = 0xab;
        let text = format!("{}ab", "00".repeat(31));
        assert_eq!(DocumentId(bytes).to_string(), text);
        assert_eq!(text.parse(), Ok(SessionId(bytes)));
        for bad in ["", "ab", &"+1".repeat(32), &"é".repeat(32), &"0".repeat(65)] {
            bad.parse::<DocumentId>().expect_err(bad);
        }
    }
}
