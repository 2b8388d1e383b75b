//! The paths at which an export writes.

use std::path::{Path, PathBuf};

use super::{Commit, Etag, NameError, RepoId, Revision};
use crate::{Manifest, manifest::File};

/// The paths of one model in one cache. Computing them does not access the disk.
#[derive(Debug, Clone)]
pub struct Layout {
    pub(super) cache: PathBuf,
    folder_name: String,
    revision: Option<Revision>,
    pub(super) commit: Commit,
}

/// The path for the content of one file.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// The file in the manifest.
    pub file: &'a File,
    /// The blob's path, for a file in Git LFS: a download may write there. `None` for a small file, of at most
    /// [`LFS_SIZE`](super::LFS_SIZE) bytes, whose blob is named by its content. Such a file is first written to another
    /// folder, and an [`Export`](super::Export) brings it here.
    pub blob: Option<PathBuf>,
}

impl Layout {
    /// Makes the layout of `repo` at `revision` in `cache`; the revision leads to `commit`. If no commit is known, pass
    /// [`Commit::of_model`].
    ///
    /// # Errors
    /// [`NameError`] if the revision looks like a commit and is not `commit`: huggingface_hub would not look for a ref
    /// of that name.
    pub fn new(
        cache: &Path,
        repo: &RepoId,
        revision: Revision,
        commit: Commit,
    ) -> Result<Self, NameError> {
        let revision = match revision.commit() {
            None => Some(revision),
            Some(named) if named == commit => None,
            Some(_) => {
                return Err(NameError {
                    text: revision.as_str().to_owned(),
                    what: "a name for this commit",
                    reason: "it is the id of another commit",
                });
            }
        };
        Ok(Self {
            cache: cache.to_owned(),
            folder_name: repo.folder_name(),
            revision,
            commit,
        })
    }

    /// Returns the repository's folder.
    pub fn folder(&self) -> PathBuf {
        self.cache.join(&self.folder_name)
    }

    /// Returns the folder of the repository's locks.
    pub(super) fn locks(&self) -> PathBuf {
        self.cache.join(".locks").join(&self.folder_name)
    }

    /// Returns the folder of the blobs.
    pub fn blobs(&self) -> PathBuf {
        self.folder().join("blobs")
    }

    /// Returns the folder that holds the model's files, as links.
    pub fn snapshot(&self) -> PathBuf {
        self.folder()
            .join("snapshots")
            .join(self.commit.to_string())
    }

    /// Returns the ref, the file that contains the revision's commit; `None` if the revision is the commit itself.
    pub fn reference(&self) -> Option<PathBuf> {
        let revision = self.revision.as_ref()?;
        Some(self.folder().join("refs").join(revision.as_str()))
    }

    /// Returns the path of the blob that is named `etag`.
    pub fn blob(&self, etag: &Etag) -> PathBuf {
        self.blobs().join(etag.to_string())
    }

    /// Returns the paths for the content of the manifest's files, in their order.
    pub fn places<'a>(&self, manifest: &'a Manifest) -> Vec<Place<'a>> {
        let blobs = self.blobs();
        manifest
            .files()
            .iter()
            .map(|file| Place {
                file,
                blob: Etag::known(file).map(|etag| blobs.join(etag.to_string())),
            })
            .collect()
    }
}

/// Returns the target of the link at `path` in a snapshot: one `..` for each folder of the path, and two for the
/// snapshot's own.
pub(super) fn link(path: &str, etag: &Etag) -> PathBuf {
    let depth = path.matches('/').count();
    format!("{}blobs/{etag}", "../".repeat(depth + 2)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hash;

    #[test]
    fn links_climb_as_deep_as_the_path_is() {
        let etag = Etag::git_blob(b"");
        for (path, up) in [
            ("a", "../../"),
            ("a/b", "../../../"),
            ("a/b/c", "../../../../"),
        ] {
            let expected = format!("{up}blobs/{etag}");
            assert_eq!(link(path, &etag), Path::new(&expected));
        }
    }

    #[test]
    fn a_commit_leads_to_itself_only() {
        let commit = Commit::of_model(&Hash::of(b"1"));
        let other = Commit::of_model(&Hash::of(b"2"));
        let layout = |revision: &str| {
            Layout::new(
                Path::new("/c"),
                &"a/b".parse().unwrap(),
                revision.parse().unwrap(),
                commit,
            )
        };
        assert_eq!(
            layout("refs/pr/1").unwrap().reference(),
            Some("/c/models--a--b/refs/refs/pr/1".into())
        );
        assert_eq!(layout(&commit.to_string()).unwrap().reference(), None);
        assert!(layout(&other.to_string()).is_err());
    }
}
