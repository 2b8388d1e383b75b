//! Room for models that are being fetched: holds that prevent eviction, and eviction of other models.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use weft_blobs::{
    extract::result_path,
    selection::{Selected, Wanted},
    store::{self, Need, Room},
};

use crate::{Error, File, Hash, Manifest, Node, operation::blocking};

impl Node {
    /// Protects a model from garbage collection and eviction, even before its manifest is here.
    pub(crate) async fn hold(&self, model: Hash) -> Result<store::Hold, Error> {
        let store = self.store().clone();
        blocking(move || Ok(store.hold(model))).await
    }

    /// Reserves room for a model that is to be fetched into a folder, and evicts other models if needed.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`] if there cannot be enough room.
    pub(crate) async fn make_room(
        &self,
        manifest: &Arc<Manifest>,
        selected: &Option<Arc<Selected>>,
        folder: &Path,
    ) -> Result<Room, Error> {
        let published = self.listed_models().await?;
        let (store, home) = (self.store().clone(), self.home().to_owned());
        let (manifest, selected) = (Arc::clone(manifest), selected.clone());
        let folder = folder.to_owned();
        let (room, evicted) = blocking(move || {
            let folder = real(&folder);
            let need = |(index, file): (usize, &File)| {
                let chosen = selected.as_ref().map(|selected| selected.get(index));
                let (target, bytes) = match chosen {
                    Some(None) => return None,
                    Some(Some(chosen)) if chosen.wanted != Wanted::Whole => {
                        (store.own_copy_path(&file.blake3), chosen.bytes())
                    }
                    _ => (folder.join(&file.path), file.size),
                };
                Some(Need {
                    target,
                    hash: file.blake3,
                    bytes,
                })
            };
            let files = || manifest.files().iter().enumerate();
            let mut needs: Vec<_> = files().filter_map(need).collect();
            // Files made of tensors need room in addition to the tensors.
            for (index, file) in files() {
                if let Some(chosen) = selected.as_ref().and_then(|selected| selected.get(index))
                    && chosen.wanted != Wanted::Whole
                {
                    needs.push(Need {
                        target: folder.join(result_path(&file.path)),
                        hash: file.blake3,
                        bytes: chosen.bytes(),
                    });
                }
            }
            Ok(store.make_room(needs, &home, &published)?)
        })
        .await?;
        self.withdraw(evicted);
        Ok(room)
    }

    /// Reserves room in the node's store for further bytes of a model's file, and evicts other models if needed.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`] if there cannot be enough room.
    pub(crate) async fn make_more_room(
        &self,
        model: Hash,
        file: &File,
        bytes: u64,
    ) -> Result<Room, Error> {
        let published = self.listed_models().await?;
        let (store, home) = (self.store().clone(), self.home().to_owned());
        let (hash, size) = (file.blake3, file.size);
        let (room, evicted) = blocking(move || {
            // The file's own model must not be evicted to make room for it.
            let _hold = store.hold(model);
            let need = Need::more(&store, hash, size, bytes);
            Ok(store.make_room(vec![need], &home, &published)?)
        })
        .await?;
        self.withdraw(evicted);
        Ok(room)
    }

    /// Withdraws the records of evicted models, in the background: a record that is not withdrawn expires.
    fn withdraw(&self, evicted: Vec<store::Model>) {
        for model in evicted {
            let announcer = self.announcer().clone();
            self.spawn(async move {
                if let Err(error) = announcer.withdraw(&model).await {
                    tracing::debug!(
                        model = %model.id, %error,
                        "cannot withdraw the records of an evicted model; they will expire"
                    );
                }
            });
        }
    }

    /// Returns the models that this node lists in registries, which are never evicted.
    async fn listed_models(&self) -> Result<HashSet<Hash>, Error> {
        let store = self.store().clone();
        if blocking(move || Ok(store.quota()?)).await?.is_none() {
            return Ok(HashSet::new());
        }
        let own = self.peer_id();
        let listed = self.registries().listed("").await?.into_iter();
        let own = listed.filter(|one| one.publisher == own);
        Ok(own.map(|one| one.model).collect())
    }
}

/// Returns the path without symbolic links, for a folder that need not exist.
fn real(folder: &Path) -> PathBuf {
    for ancestor in folder.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), folder.strip_prefix(ancestor)) {
            return real.join(rest);
        }
    }
    folder.to_owned()
}
