//! What things are called: all of them are hashes or keys of 32 bytes, written as hex.

use std::{fmt, str::FromStr};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// From bytes, if there are 32 of them.
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
    /// A document's name: the BLAKE3 hash of its genesis, which its owner signs.
    DocumentId
}

id! {
    /// Who wrote an envelope, in which run of their program: a hash of the author's key, the document, the epoch in which the session began, and a nonce that is
    /// fresh at every start, so that a restored backup never continues an old sequence.
    SessionId
}

id! {
    /// An author's, owner's or peer's Ed25519 public key.
    Key
}

id! {
    /// The hash of an epoch; the document's id before the first.
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
    /// Equal on two replicas exactly if they hold the same of a document.
    Digest
}

/// A text is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no id: 64 hexadecimal digits are expected")]
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
