//! What came of the import of an exported document.

use std::fmt;

use crate::id::DocumentId;

/// Faults that are told, of any number.
const MAX_FAULTS: usize = 8;

/// Changes of a file that do not count, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refused {
    /// They would count on no replica that knows what this one knows: the owner has revoked their author since, or
    /// begun the content anew, or their author has equivocated. No fault of the file.
    pub void: u64,
    /// The change or its signature is damaged.
    pub damaged: u64,
    /// They build on changes that are damaged, or neither in the file nor here.
    pub missing: u64,
    /// The document has no room for them.
    pub full: u64,
}

/// The result of an import; [`Replica::import`](crate::Replica::import).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// The document.
    pub document: DocumentId,
    /// Changes in the file, each counted once.
    pub changes: u64,
    /// Of these the changes that count here now, including those that did before.
    pub counted: u64,
    /// The others.
    pub refused: Refused,
    /// Faults in the rest of the file, or in the first damaged change; at most eight.
    pub faults: Vec<String>,
}

impl Imported {
    /// Returns true if all of the file counts here, or is void everywhere.
    pub fn is_whole(&self) -> bool {
        let Refused {
            void: _,
            damaged,
            missing,
            full,
        } = self.refused;
        damaged + missing + full == 0 && self.faults.is_empty()
    }

    pub(crate) fn fault(&mut self, fault: impl Into<String>) {
        let fault = fault.into();
        if self.faults.len() < MAX_FAULTS && !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
    }
}

impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of the file's {} changes count",
            self.counted, self.changes
        )?;
        let Refused {
            void,
            damaged,
            missing,
            full,
        } = self.refused;
        let mut separator = ": ";
        for (count, one, many) in [
            (damaged, "is damaged", "are damaged"),
            (
                missing,
                "builds on a change that is damaged, or neither in the file nor here",
                "build on changes that are damaged, or neither in the file nor here",
            ),
            (full, "has no room", "have no room"),
            (
                void,
                "is void (its author was revoked or has equivocated, or the content began anew)",
                "are void (their author was revoked or has equivocated, or the content began anew)",
            ),
        ] {
            if count > 0 {
                let says = if count == 1 { one } else { many };
                write!(f, "{separator}{count} {says}")?;
                separator = ", ";
            }
        }
        for fault in &self.faults {
            write!(f, "; {fault}")?;
        }
        Ok(())
    }
}
