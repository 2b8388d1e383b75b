//! The result of importing an exported document.

use std::fmt;

use crate::id::DocumentId;

/// Most faults that are listed.
const MAX_FAULTS: usize = 8;

/// Changes of a file that are not valid, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Refused {
    /// Changes that are valid on no replica with the same knowledge: the owner has since revoked their author or
    /// compacted the document, or their author has equivocated. The file is not at fault.
    pub void: u64,
    /// Changes that are damaged, or whose signature is.
    pub damaged: u64,
    /// Changes that build on damaged changes, or on changes that are neither in the file nor on this replica.
    pub missing: u64,
    /// Changes for which the document has no room.
    pub full: u64,
}

/// The result of [`Replica::import`](crate::Replica::import).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Imported {
    /// The imported document.
    pub document: DocumentId,
    /// Number of changes in the file; duplicates count once.
    pub changes: u64,
    /// Number of these changes that are valid on this replica now, including those that were before.
    pub counted: u64,
    /// The other changes, by reason.
    pub refused: Refused,
    /// Faults in the rest of the file, or in the first damaged change; at most eight.
    pub faults: Vec<String>,
}

impl Imported {
    /// Returns true if every change of the file is valid on this replica or void everywhere.
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
            "{} of the file's {} changes are valid",
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
                "builds on a change that is damaged, or neither in the file nor on this node",
                "build on changes that are damaged, or neither in the file nor on this node",
            ),
            (
                full,
                "does not fit into the document",
                "do not fit into the document",
            ),
            (
                void,
                "is void (its author was revoked or has equivocated, or the document was compacted)",
                "are void (their author was revoked or has equivocated, or the document was compacted)",
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
