//! From a target to a manifest: finds the model of a name, id or ticket, and gets its manifest from this node's store
//! or from a provider.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::sleep;
use weft_blobs::{
    TransferError, arrivals::Arrivals, selection::Selected, transfer::fetch_manifest,
};
use weft_net::{Multiaddr, PeerId, Stream};

use super::resolve::resolve;
use crate::{
    Error, Hash, Manifest, ModelName, Node, Selection, Target,
    operation::blocking,
    swarm::{
        providers::{KnownProviders, Providers},
        watch,
    },
};

/// Time for which a manifest may arrive slowly before another provider is asked for it too: several round trips over
/// a relay, and still short for a waiting user.
const MANIFEST_PATIENCE: Duration = Duration::from_secs(3);

/// Fewer bytes than this in that time are slow: a chunk group a second, at which the manifest of a model of some
/// hundred tensors takes seconds. At higher rates, a second request would only share the same line.
const MANIFEST_LEAST: u64 = 192 * 1024;

/// The most providers that are asked for one manifest at a time. Each may cost the manifest's size, and one of three
/// sends it unless the first two are hostile.
const MAX_MANIFESTS: usize = 3;

/// The most parts of one commit whose manifests are read: a manifest may be 64 MiB.
const MAX_PARTS: usize = 8;

/// The longest wait for the manifests of further parts of a commit once one is here. A connected provider answers
/// within a few round trips.
const PARTS_PATIENCE: Duration = Duration::from_secs(5);

/// The model of a target, and the peers that are certain to have it.
pub(crate) struct Found {
    pub(crate) name: Option<ModelName>,
    pub(crate) id: Hash,
    /// The publisher of the name.
    pub(crate) publisher: Option<PeerId>,
    pub(crate) given: Vec<(PeerId, Vec<Multiaddr>)>,
    /// All parts of a commit, each with a publisher, if the name leads to several parts of one commit; otherwise
    /// empty.
    pub(super) parts: Vec<(Hash, PeerId)>,
}

impl Found {
    pub(crate) async fn new(
        node: &Node,
        target: Target,
        publisher: Option<PeerId>,
    ) -> Result<Self, Error> {
        let mut found = Self {
            name: None,
            id: Hash::of(&[]),
            publisher: None,
            given: Vec::new(),
            parts: Vec::new(),
        };
        match target {
            Target::Name(name) => {
                let meaning = resolve(node, &name, publisher).await?;
                found.name = Some(name);
                found.id = meaning.model;
                found.publisher = meaning.publisher;
                found.parts = meaning.parts;
            }
            Target::Id(id) => found.id = id,
            Target::Ticket(ticket) => (found.id, found.given) = (ticket.model, ticket.peers),
        }
        found.ask_publisher(node).await;
        Ok(found)
    }

    /// Adds the publisher to the given providers if it is connected, because it most likely has the model.
    async fn ask_publisher(&mut self, node: &Node) {
        if let Some(publisher) = self.publisher {
            let peers = node.network().peers().await;
            if peers.iter().any(|one| one.peer == publisher) {
                self.given.push((publisher, Vec::new()));
            }
        }
    }

    /// Chooses among the parts of a commit: the part with the most wanted bytes, by `bytes`; of several, the largest
    /// part. The parts have to agree on the files that they share; otherwise their publishers mean different models.
    /// Parts that disagree with this node's own are ignored.
    ///
    /// An unreachable publisher is not waited for long if another part is here.
    pub(crate) async fn choose(
        mut self,
        node: &Node,
        bytes: impl Fn(&Manifest) -> u64,
    ) -> Result<Self, Error> {
        if self.parts.len() < 2 {
            return Ok(self);
        }
        let mut fetches: FuturesUnordered<_> = self
            .parts
            .iter()
            .take(MAX_PARTS)
            .map(|(id, publisher)| async move {
                let mut part = Self {
                    name: None,
                    id: *id,
                    publisher: Some(*publisher),
                    given: Vec::new(),
                    parts: Vec::new(),
                };
                part.ask_publisher(node).await;
                let fetched = part.manifest(node, || ()).await;
                (*id, *publisher, fetched.map(|(manifest, _)| manifest))
            })
            .collect();
        let mut here = Vec::new();
        let mut failed = None;
        let mut patience = std::pin::pin!(sleep(PARTS_PATIENCE));
        loop {
            tokio::select! {
                next = fetches.next() => match next {
                    Some((id, publisher, Ok(manifest))) => here.push((id, publisher, manifest)),
                    Some((_, _, Err(error))) => failed = Some(error),
                    None => break,
                },
                () = &mut patience, if !here.is_empty() => break,
            }
        }
        drop(fetches);
        // This node's own part counts for more than others'.
        let own = here
            .iter()
            .find(|(_, publisher, _)| *publisher == node.peer_id());
        if let Some((_, _, own)) = own.cloned() {
            here.retain(|(_, _, manifest)| agree(&[&own, manifest]));
        }
        let manifests: Vec<&Manifest> = here.iter().map(|(_, _, manifest)| &**manifest).collect();
        if !agree(&manifests) {
            return Err(Error::SeveralPublishers {
                name: self.name.expect("parts are those of a name"),
                publishers: here.iter().map(|(id, peer, _)| (*peer, *id)).collect(),
            });
        }
        let best = here.iter().max_by_key(|(id, _, manifest)| {
            (bytes(manifest), manifest.size(), std::cmp::Reverse(*id))
        });
        let Some((id, publisher, _)) = best else {
            return Err(failed.expect("each part was fetched or failed"));
        };
        (self.id, self.publisher) = (*id, Some(*publisher));
        self.given = Vec::new();
        self.ask_publisher(node).await;
        Ok(self)
    }

    /// Returns the manifest, from the store or from a provider, and what is known about the providers. Calls
    /// `answered` when a provider has answered.
    pub(crate) async fn manifest(
        &self,
        node: &Node,
        mut answered: impl FnMut(),
    ) -> Result<(Arc<Manifest>, KnownProviders), Error> {
        let id = self.id;
        let mut providers = Providers::new(node.clone(), id, self.given.clone());
        let store = node.store().clone();
        if let Some(manifest) = blocking(move || Ok(store.manifest(&id)?)).await? {
            return Ok((Arc::new(manifest), providers.into_known()));
        }
        let mut fetches = FuturesUnordered::new();
        let mut counts: Vec<Arc<Arrivals>> = Vec::new();
        let sum = |counts: &[Arc<Arrivals>]| counts.iter().map(|count| count.signs()).sum::<u64>();
        let (mut received, mut slow, mut exhausted) = (0, true, None);
        loop {
            if fetches.is_empty()
                && let Some(error) = exhausted.take()
            {
                return Err(error);
            }
            let more =
                fetches.is_empty() || slow && exhausted.is_none() && fetches.len() < MAX_MANIFESTS;
            tokio::select! {
                stream = providers.next(), if more => match stream {
                    Ok(stream) => {
                        answered();
                        slow = false;
                        received = sum(&counts);
                        let count = Arc::new(Arrivals::default());
                        counts.push(Arc::clone(&count));
                        fetches.push(fetch_watched(node, stream, id, count));
                    }
                    // Fetches under way may still succeed.
                    Err(error) => {
                        exhausted = Some(error);
                        if !fetches.is_empty() {
                            providers.look_again();
                        }
                    }
                },
                Some((peer, fetched)) = fetches.next() => match fetched {
                    Ok(bytes) => {
                        providers.succeeded(peer);
                        let store = node.store().clone();
                        let manifest = blocking(move || {
                            // The bytes match the id, so no other provider has a better manifest.
                            let manifest = Manifest::decode(&bytes)
                                .map_err(|reason| Error::InvalidContent { model: id, reason })?;
                            store.add_manifest(&bytes)?;
                            Ok(manifest)
                        });
                        return Ok((Arc::new(manifest.await?), providers.into_known()));
                    }
                    Err(TransferError::Store(error)) => return Err(error.into()),
                    Err(error) => {
                        providers.failed(peer, &error);
                        exhausted = None;
                    }
                },
                () = sleep(MANIFEST_PATIENCE), if !more => {
                    let now = sum(&counts);
                    slow = now - received < MANIFEST_LEAST;
                    received = now;
                    exhausted = None;
                }
            }
        }
    }
}

/// Returns the number of selected bytes in the files of a manifest.
pub(super) fn selected_bytes(
    manifest: &Manifest,
    selection: &Selection,
    paths: &Option<HashSet<String>>,
) -> u64 {
    match paths {
        Some(paths) => Selected::of_files(manifest, |path| paths.contains(path)).bytes(),
        None if selection.is_everything() => manifest.size(),
        None => selection
            .select(manifest)
            .map_or(0, |chosen| chosen.bytes()),
    }
}

/// Returns true if the manifests agree on all files that they share.
fn agree(manifests: &[&Manifest]) -> bool {
    let mut known: HashMap<&str, Hash> = HashMap::new();
    manifests
        .iter()
        .flat_map(|manifest| manifest.files())
        .all(|file| *known.entry(&file.path).or_insert(file.blake3) == file.blake3)
}

/// Fetches a manifest from a provider. Returns the provider and the result.
async fn fetch_watched(
    node: &Node,
    stream: Stream,
    id: Hash,
    arrivals: Arc<Arrivals>,
) -> (PeerId, Result<Vec<u8>, TransferError>) {
    let peer = stream.peer();
    let fetched = tokio::select! {
        fetched = fetch_manifest(stream, id, &arrivals) => fetched,
        never = watch(node, peer, &arrivals) => match never {},
    };
    (peer, fetched)
}

#[cfg(test)]
mod tests {
    use weft_blobs::manifest::File;

    use super::*;

    #[test]
    fn parts_of_a_commit_agree_if_no_file_has_two_contents() {
        let part = |files: &[(&str, u8)]| {
            let files = files.iter().map(|(path, content)| File {
                path: (*path).to_owned(),
                size: 1,
                blake3: Hash::of(&[*content]),
                sha256: [*content; 32],
                tensors: Vec::new(),
            });
            Manifest::new(files.collect()).unwrap()
        };
        let (q4, q8) = (
            part(&[("config", 1), ("q4", 4)]),
            part(&[("config", 1), ("q8", 8)]),
        );
        let forged = part(&[("config", 2), ("q8", 8)]);
        assert!(agree(&[&q4, &q8]));
        assert!(!agree(&[&q4, &q8, &forged]));
        let only = |pattern: &str| {
            let mut selection = Selection::default();
            selection.files.push(pattern.parse().unwrap());
            selection
        };
        let bytes = |manifest, pattern| selected_bytes(manifest, &only(pattern), &None);
        assert_eq!((bytes(&q4, "q8*"), bytes(&q8, "q8*")), (0, 1));
    }
}
