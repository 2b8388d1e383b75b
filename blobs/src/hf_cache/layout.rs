//! Where an export puts things.

use std::path::{Path, PathBuf};

use super::{Commit, Etag, NameError, RepoId, Revision};
use crate::{Manifest, manifest::File};

/// The places of one model in one cache. Reading it touches no disk.
#[derive(Debug, Clone)]
pub struct Layout {
    pub(super) cache: PathBuf,
    folder_name: String,
    revision: Option<Revision>,
    pub(super) commit: Commit,
}

/// Where the content of one file goes.
#[derive(Debug, Clone)]
pub struct Place<'a> {
    /// The file in the manifest.
    pub file: &'a File,
    /// The blob's path, for a file in Git LFS: a download may write there. `None` for a small file, of at most
    /// [`LFS_SIZE`](super::LFS_SIZE) bytes, whose blob is called by its content: it goes elsewhere first, and an
    /// [`Export`](super::Export) brings it here.
    pub blob: Option<PathBuf>,
}

impl Layout {
    /// The places of `repo` at `revision` in `cache`, which is `commit`. Where no commit is known, it is
    /// [`Commit::of_model`].
    ///
    /// # Errors
    /// [`NameError`] if the revision looks like a commit and is another: huggingface_hub would not look for a ref of that name.
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
                    reason: "it is the id of another one",
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

    /// The repository's folder.
    pub fn folder(&self) -> PathBuf {
        self.cache.join(&self.folder_name)
    }

    /// The folder of its locks.
    pub(super) fn locks(&self) -> PathBuf {
        self.cache.join(".locks").join(&self.folder_name)
    }

    /// The folder of the blobs.
    pub fn blobs(&self) -> PathBuf {
        self.folder().join("blobs")
    }

    /// The folder that holds the model's files, as links.
    pub fn snapshot(&self) -> PathBuf {
        self.folder()
            .join("snapshots")
            .join(self.commit.to_string())
    }

    /// The file that says which commit the revision is; `None` if the revision is the commit itself.
    pub fn reference(&self) -> Option<PathBuf> {
        let revision = self.revision.as_ref()?;
        Some(self.folder().join("refs").join(revision.as_str()))
    }

    /// The blob called by `etag`.
    pub fn blob(&self, etag: &Etag) -> PathBuf {
        self.blobs().join(etag.to_string())
    }

    /// Where the content of each of the manifest's files goes, in their order.
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

/// What the link at `path` in a snapshot says: one `..` for each folder of the path, and two for the snapshot's own.
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
    fn a_commit_names_itself_and_no_other() {
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
