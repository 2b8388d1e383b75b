//! The local content of a blob, open for reading with its tree. Every byte is checked against the blob's hash before it
//! is returned: damage on disk is found here, and not by the receiver.

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Hash,
    bitfield::Bitfield,
    index::Location,
    store::partial,
    tree::{Mismatch, PARENT, Step, Tree, Verifier},
};

/// A blob, whole or in part, open for reading.
#[derive(Debug)]
pub struct Source {
    hash: Hash,
    tree: Tree,
    content: Content,
    outboard: Option<File>,
}

#[derive(Debug)]
enum Content {
    Whole {
        location: Location,
        file: File,
    },
    /// A file in which some groups are damaged.
    Damaged {
        location: Location,
        good: Bitfield,
        file: File,
    },
    /// A part file that is being written.
    Arriving(Arc<partial::Content>),
    /// A part file that an earlier run left.
    Left {
        part: PathBuf,
        have: Bitfield,
        file: File,
    },
}

/// The reason why a part of a blob cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The disk failed.
    #[error("cannot read content from disk: {0}")]
    Io(#[from] io::Error),
    /// The file has changed since it was recorded.
    #[error("the file changed while it was read")]
    Changed,
    /// The content does not match its hash.
    #[error("content on disk is damaged: {0}")]
    Damaged(#[from] Mismatch),
}

impl Source {
    pub(crate) fn whole(
        hash: Hash,
        tree: Tree,
        location: Location,
        file: File,
        outboard: Option<File>,
    ) -> Self {
        Self {
            hash,
            tree,
            content: Content::Whole { location, file },
            outboard,
        }
    }

    pub(crate) fn damaged(
        hash: Hash,
        tree: Tree,
        (location, good): (Location, Bitfield),
        file: File,
        outboard: Option<File>,
    ) -> Self {
        let content = Content::Damaged {
            location,
            good,
            file,
        };
        Self {
            hash,
            tree,
            content,
            outboard,
        }
    }

    pub(crate) fn arriving(content: Arc<partial::Content>, outboard: Option<File>) -> Self {
        Self {
            hash: content.hash(),
            tree: content.tree(),
            content: Content::Arriving(content),
            outboard,
        }
    }

    pub(crate) fn left(
        hash: Hash,
        tree: Tree,
        (part, have): (PathBuf, Bitfield),
        file: File,
        outboard: Option<File>,
    ) -> Self {
        Self {
            hash,
            tree,
            content: Content::Left { part, have, file },
            outboard,
        }
    }

    /// Returns the blob's hash.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Returns the blob's tree.
    pub fn tree(&self) -> Tree {
        self.tree
    }

    /// Returns true if the source is the whole blob.
    pub fn is_whole(&self) -> bool {
        matches!(self.content, Content::Whole { .. })
    }

    /// Returns true if the source is a file in which some groups are known to be damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        matches!(self.content, Content::Damaged { .. })
    }

    /// Returns the content received so far, if the blob is being written.
    pub(crate) fn arriving_content(&self) -> Option<&partial::Content> {
        match &self.content {
            Content::Arriving(content) => Some(content),
            _ => None,
        }
    }

    /// Returns the file of a whole or damaged blob; `None` for a part file.
    pub fn location(&self) -> Option<&Location> {
        match &self.content {
            Content::Whole { location, .. } | Content::Damaged { location, .. } => Some(location),
            _ => None,
        }
    }

    /// Returns the path of the part file, if the source is one.
    pub(crate) fn part(&self) -> Option<&Path> {
        match &self.content {
            Content::Whole { .. } | Content::Damaged { .. } => None,
            Content::Arriving(partial) => Some(partial.part()),
            Content::Left { part, .. } => Some(part),
        }
    }

    /// Returns true if all of `groups` are here.
    pub fn has(&self, groups: Range<u64>) -> bool {
        match &self.content {
            Content::Whole { .. } => true,
            Content::Arriving(partial) => partial.has(groups),
            Content::Left { have, .. } | Content::Damaged { good: have, .. } => {
                have.has_all(groups)
            }
        }
    }

    /// Returns the groups that are here now.
    pub fn have(&self) -> Bitfield {
        match &self.content {
            Content::Whole { .. } => Bitfield::full(self.tree.groups()),
            Content::Arriving(partial) => partial.have(),
            Content::Left { have, .. } | Content::Damaged { good: have, .. } => have.clone(),
        }
    }

    /// Returns a slice that covers `groups`, to be read piece by piece. With `proofs_only`, it has parents without
    /// content.
    pub fn slice(&self, groups: Range<u64>, proofs_only: bool) -> Slice {
        Slice {
            verifier: Verifier::new(self.tree, self.hash, groups),
            proofs_only,
        }
    }

    /// Reads all of `groups` without proofs, for local use. Every group is checked.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_groups(&self, groups: Range<u64>) -> Result<Vec<u8>, ReadError> {
        let mut content = Vec::new();
        self.read_with_parents(groups, &mut content, &mut Vec::new())?;
        Ok(content)
    }

    /// Appends the content of `groups` to `content`, and the parents that cover them, by index in the outboard, to
    /// `parents`.
    pub(crate) fn read_with_parents(
        &self,
        groups: Range<u64>,
        content: &mut Vec<u8>,
        parents: &mut Vec<(u64, [u8; PARENT])>,
    ) -> Result<(), ReadError> {
        let mut verifier = Verifier::new(self.tree, self.hash, groups);
        while let Some(step) = verifier.step() {
            match step {
                Step::Parent { index } => {
                    let parent = self.parent(index)?;
                    verifier.parent(&parent)?;
                    parents.push((index, parent));
                }
                Step::Group { index, size } => {
                    let at = content.len();
                    content.resize(at + size, 0);
                    self.read(&mut content[at..], self.tree.group_bytes(index).start)?;
                    verifier.group(&content[at..])?;
                }
            }
        }
        self.check_unchanged()
    }

    fn parent(&self, index: u64) -> io::Result<[u8; PARENT]> {
        let outboard = self
            .outboard
            .as_ref()
            .ok_or_else(|| io::Error::other("the blob has a single chunk group and no parents"))?;
        let mut parent = [0; PARENT];
        outboard.read_exact_at(&mut parent, index * PARENT as u64)?;
        Ok(parent)
    }

    /// Reads bytes without checking them; the caller checks them.
    pub(crate) fn read_unchecked(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buffer, offset)
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.content {
            Content::Whole { file, .. }
            | Content::Damaged { file, .. }
            | Content::Left { file, .. } => file.read_exact_at(buffer, offset),
            Content::Arriving(partial) => partial.read(buffer, offset),
        }
    }

    fn check_unchanged(&self) -> Result<(), ReadError> {
        match &self.content {
            Content::Whole { location, file } | Content::Damaged { location, file, .. } => {
                match Location::of(&location.path, file)? {
                    now if now == *location => Ok(()),
                    _ => Err(ReadError::Changed),
                }
            }
            _ => Ok(()),
        }
    }

    /// Returns the path of the file or part file, for messages.
    pub fn path(&self) -> Option<&Path> {
        let location = self.location().map(|location| location.path.as_path());
        location.or_else(|| self.part())
    }
}

/// A slice of a blob that is being read.
#[derive(Debug)]
pub struct Slice {
    verifier: Verifier,
    proofs_only: bool,
}

impl Slice {
    /// Reads elements of the slice from `source` into `buffer`, starting at offset `from`, until the end passes `limit`
    /// or the slice ends. Returns the end of the elements in the buffer, and whether the slice has ended. The buffer
    /// grows as needed and keeps its length for the next use.
    ///
    /// # Errors
    /// [`ReadError`]; do not read the slice further after an error.
    pub fn read(
        &mut self,
        source: &Source,
        buffer: &mut Vec<u8>,
        from: usize,
        limit: usize,
    ) -> Result<(usize, bool), ReadError> {
        let mut end = from;
        let mut ended = false;
        while end < limit {
            let Some(step) = self.step() else {
                ended = true;
                break;
            };
            let size = match step {
                Step::Parent { .. } => PARENT,
                Step::Group { size, .. } => size,
            };
            if buffer.len() < end + size {
                buffer.resize(end + size, 0);
            }
            let element = &mut buffer[end..end + size];
            match step {
                Step::Parent { index } => {
                    let parent = source.parent(index)?;
                    element.copy_from_slice(&parent);
                    self.verifier.parent(&parent)?;
                }
                Step::Group { index, .. } => {
                    source.read(element, source.tree.group_bytes(index).start)?;
                    self.verifier.group(element)?;
                }
            }
            end += size;
        }
        source.check_unchanged()?;
        Ok((end, ended || self.step().is_none()))
    }

    fn step(&mut self) -> Option<Step> {
        loop {
            match self.verifier.step()? {
                Step::Group { .. } if self.proofs_only => self.verifier.skip_group(),
                step => return Some(step),
            }
        }
    }
}
