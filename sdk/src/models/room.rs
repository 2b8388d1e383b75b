//! Room for models that are being fetched: holds on what must not go, and eviction of what may.

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
    /// Keeps a model, whose manifest may still be to come, from being collected or evicted.
    pub(crate) async fn hold(&self, model: Hash) -> Result<store::Hold, Error> {
        let store = self.store().clone();
        blocking(move || Ok(store.hold(model))).await
    }

    /// Sets room aside for a model that is to be fetched into a folder, evicting others if need be.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`] if there cannot be enough.
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
                        (store.owned_path(&file.blake3), chosen.bytes())
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
            // What is made of tensors is there a second time.
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

    /// Sets room aside for so many bytes more of a file of a model, in the node's store, evicting others if need be.
    ///
    /// # Errors
    /// [`Error::QuotaExceeded`] if there cannot be enough.
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
            // What is here of it does not go to make room for more.
            let _hold = store.hold(model);
            let need = Need::more(&store, hash, size, bytes);
            Ok(store.make_room(vec![need], &home, &published)?)
        })
        .await?;
        self.withdraw(evicted);
        Ok(room)
    }

    /// Tells the mesh what has been evicted. Nobody waits for that: what is not withdrawn ends by itself.
    fn withdraw(&self, evicted: Vec<store::Model>) {
        for model in evicted {
            let announcer = self.announcer().clone();
            self.spawn(async move {
                if let Err(error) = announcer.withdraw(&model).await {
                    tracing::debug!(model = %model.id, %error, "an evicted model is not withdrawn; it ends by itself");
                }
            });
        }
    }

    /// The models that this node lists in registries: they stay.
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

/// The path without links, of a folder that need not be there yet.
fn real(folder: &Path) -> PathBuf {
    for ancestor in folder.ancestors() {
        if let (Ok(real), Ok(rest)) = (ancestor.canonicalize(), folder.strip_prefix(ancestor)) {
            return real.join(rest);
        }
    }
    folder.to_owned()
}
