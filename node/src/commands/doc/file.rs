//! `weft doc export` and `weft doc import`: documents as files.

use std::{
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use futures::stream;
use serde_json::json;
use weft::DocumentId;
use weft_proto::api;

use crate::{
    client::Client,
    exit::Failure,
    reason::Reason,
    terminal::{
        input,
        output::{self, err, out},
    },
};

/// Most bytes of an imported document in one message.
const CHUNK: usize = 256 << 10;

pub(super) async fn export(
    client: &Client,
    id: DocumentId,
    file: &Path,
    as_json: bool,
) -> Result<(), Failure> {
    let request = api::ExportDocumentRequest { id: id.to_string() };
    let failed = |error: std::io::Error| cannot_write(file, &error);
    let mut target = match file.to_str() {
        Some("-") => None,
        _ => Some(NewFile::create(file).map_err(failed)?),
    };
    let mut chunks = client.documents().export(request).await?.into_inner();
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await? {
        bytes += chunk.data.len();
        match &mut target {
            Some(target) => target.file.write_all(&chunk.data),
            None => std::io::stdout().write_all(&chunk.data),
        }
        .map_err(failed)?;
    }
    let Some(target) = target else {
        return std::io::stdout().flush().map_err(failed);
    };
    target.finish().map_err(failed)?;
    match as_json {
        true => out!("{}", json!({ "bytes": bytes })),
        false => out!("{} written", output::bytes(bytes as u64)),
    }
    Ok(())
}

fn cannot_write(file: &Path, error: &std::io::Error) -> Failure {
    let text = format!("{}: {error}", file.display());
    match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(
            Reason::TargetExists,
            format!("{} exists already", file.display()),
        )
        .hint("Nothing was written. Move that file away, or choose another name."),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Failure::new(Reason::DiskFull, text)
            .hint("The partial file was deleted. Free space, or choose a file on another disk."),
        _ => Failure::other(text),
    }
}

/// A file that is written under a temporary name beside it, and gets its name only when all its content is on disk.
struct NewFile {
    file: std::fs::File,
    beside: PathBuf,
    name: PathBuf,
}

impl NewFile {
    fn create(name: &Path) -> std::io::Result<Self> {
        if name.symlink_metadata().is_ok() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut beside = name.as_os_str().to_owned();
        beside.push(format!(".{}.part", std::process::id()));
        Ok(Self {
            file: std::fs::File::create_new(&beside)?,
            beside: beside.into(),
            name: name.to_owned(),
        })
    }

    /// Gives the file its name. Fails if a file of that name has been created meanwhile.
    fn finish(self) -> std::io::Result<()> {
        self.file.sync_all()?;
        match std::fs::hard_link(&self.beside, &self.name) {
            Ok(()) => {}
            // The file system has no hard links.
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                if self.name.symlink_metadata().is_ok() {
                    return Err(ErrorKind::AlreadyExists.into());
                }
                std::fs::rename(&self.beside, &self.name)?;
            }
            Err(error) => return Err(error),
        }
        let folder = match self.name.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        // Syncs the name to disk too. Only Unix opens folders as files.
        #[cfg(unix)]
        std::fs::File::open(folder)?.sync_all()?;
        #[cfg(not(unix))]
        let _ = folder;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.beside) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(%error, file = %self.beside.display(), "cannot remove the temporary file");
            }
            _ => {}
        }
    }
}

/// Imports a file into the node, and returns the document.
pub(super) async fn import(
    client: &Client,
    file: &Path,
    as_json: bool,
) -> Result<api::Document, Failure> {
    let failed = |error: std::io::Error| Failure::other(format!("{}: {error}", file.display()));
    let content = match file.to_str() {
        Some("-") => input::read(u64::MAX).await?,
        _ => std::fs::read(file).map_err(failed)?,
    };
    let chunks: Vec<_> = content
        .chunks(CHUNK)
        .map(|data| api::DocumentChunk {
            data: data.to_vec(),
        })
        .collect();
    let imported = client.documents().import(stream::iter(chunks)).await?;
    let document = imported.into_inner();
    let void = document.imported.map_or(0, |imported| imported.void);
    if void > 0 && !as_json {
        let void = output::count(void, "change");
        err!(
            "{void} of the file are void on every node: the author was revoked or has equivocated, or the document \
             was compacted"
        );
    }
    Ok(document)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_export_leaves_no_file_and_no_export_overwrites_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().join("document");
        let mut file = NewFile::create(&name).unwrap();
        file.file.write_all(b"a part").unwrap();
        drop(file);
        assert!(names(folder.path()).is_empty());
        let mut file = NewFile::create(&name).unwrap();
        file.file.write_all(b"all").unwrap();
        assert!(!name.exists());
        file.finish().unwrap();
        assert_eq!(names(folder.path()), ["document"]);
        assert_eq!(std::fs::read(&name).unwrap(), b"all");
        let exists = NewFile::create(&name).err().unwrap();
        assert_eq!(exists.kind(), ErrorKind::AlreadyExists);
        // A file that is created meanwhile.
        let name = folder.path().join("other");
        let file = NewFile::create(&name).unwrap();
        std::fs::write(&name, b"mine").unwrap();
        let exists = file.finish().err().unwrap();
        assert_eq!(exists.kind(), ErrorKind::AlreadyExists);
        assert_eq!(names(folder.path()), ["document", "other"]);
        assert_eq!(std::fs::read(&name).unwrap(), b"mine");
    }
}
