//! Announcing this node's models and model names in the DHT.

use std::time::Duration;

use prost::Message;
use weft_blobs::{Hash, Manifest, Store, hf_cache::Commit, store::Model};
use weft_proto::wire;

use crate::{
    Error, ModelInfo, ModelName,
    discovery::advertise::{Advertiser, AtStop, Rank, RecordId, Terms, Value},
    models::{describe, manifest_size},
    operation::blocking,
    swarm::providers::provider_key,
};

/// Terms of a provider's record. Peers try a provider that has crashed for two hours at most.
const PROVIDER_TERMS: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Content,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

/// Terms of a name claim. It leads to its model for a day after the publisher has stopped.
const NAME_TERMS: Terms = Terms {
    ttl: Duration::from_secs(24 * 3600),
    has_addresses: false,
    at_stop: AtStop::Keep,
    ..PROVIDER_TERMS
};

/// Publishes and withdraws the records of models and names.
#[derive(Debug, Clone)]
pub(crate) struct Announcer {
    advertiser: Advertiser,
    store: Store,
}

impl Announcer {
    pub(crate) fn new(advertiser: Advertiser, store: Store) -> Self {
        Self { advertiser, store }
    }

    /// Publishes the records of a model: that this node provides it or some of its parts, and the names under which
    /// this node publishes it. Returns the number of nodes that stored the record which the fewest nodes stored.
    pub(crate) async fn announce(&self, model: &Model) -> Result<usize, Error> {
        // The model may have been removed since the caller looked.
        let (store, id) = (self.store.clone(), model.id);
        let model = blocking(move || Ok(store.model(&id)?)).await?;
        let (provider, value) = self.provider(model.id);
        let mut took = self
            .advertiser
            .publish(provider, value, PROVIDER_TERMS)
            .await?;
        for (name, _) in published(&model) {
            let (name, value) = self.name(model.id, name);
            took = took.min(self.advertiser.publish(name, value, NAME_TERMS).await?);
        }
        Ok(took)
    }

    /// Withdraws the records that [`announce`](Self::announce) published.
    pub(crate) async fn withdraw(&self, model: &Model) -> Result<(), Error> {
        let provider = RecordId::of(provider_key(&model.id));
        self.advertiser.withdraw(provider, PROVIDER_TERMS).await?;
        for (name, _) in published(model) {
            self.withdraw_name(&name).await?;
        }
        Ok(())
    }

    /// Withdraws this node's claim of a name.
    pub(crate) async fn withdraw_name(&self, name: &ModelName) -> Result<(), Error> {
        let id = RecordId::of(name.record_key());
        self.advertiser.withdraw(id, NAME_TERMS).await?;
        Ok(())
    }

    /// Publishes the records of all models in the store.
    pub(crate) async fn announce_all(self) {
        let store = self.store.clone();
        let models = match blocking(move || Ok(store.models()?)).await {
            Ok(models) => models,
            Err(error) => {
                tracing::warn!(%error, "cannot list the models of the store to announce them");
                return;
            }
        };
        let providers = models.iter().map(|model| self.provider(model.id));
        self.advertiser
            .register_all(providers.collect(), PROVIDER_TERMS);
        let names = models.iter().flat_map(|model| {
            let names = published(model);
            names.map(|(name, _)| self.name(model.id, name))
        });
        self.advertiser.register_all(names.collect(), NAME_TERMS);
    }

    fn provider(&self, id: Hash) -> (RecordId, Value) {
        let store = self.store.clone();
        let value = Value::looked_up(move |addresses| {
            let store = store.clone();
            blocking(move || {
                let Some((info, _)) = here(&store, &store.model(&id)?)? else {
                    return Ok(None);
                };
                let claim = wire::ProviderClaim {
                    addresses,
                    shards: if info.complete { 0 } else { info.shards },
                };
                Ok(Some(claim.encode_to_vec()))
            })
        });
        (RecordId::of(provider_key(&id)), value)
    }

    fn name(&self, id: Hash, name: ModelName) -> (RecordId, Value) {
        let (key, store) = (name.record_key(), self.store.clone());
        let value = Value::looked_up(move |_| {
            let (store, name) = (store.clone(), name.clone());
            blocking(move || {
                let model = store.model(&id)?;
                let commit = published(&model).find(|(known, _)| *known == name);
                let (Some((_, commit)), Some((_, manifest))) = (commit, here(&store, &model)?)
                else {
                    return Ok(None);
                };
                let claim = wire::NameClaim {
                    manifest: id.as_bytes().to_vec().into(),
                    manifest_size: manifest_size(&manifest),
                    commit: commit
                        .map_or_else(Vec::new, |one| one.as_bytes().to_vec())
                        .into(),
                };
                Ok(Some(claim.encode_to_vec()))
            })
        });
        (RecordId::of(key), value)
    }
}

/// Returns the model's state and manifest; `None` if nothing of it can be served.
fn here(store: &Store, model: &Model) -> Result<Option<(ModelInfo, Manifest)>, Error> {
    let (info, manifest) = describe(store, model)?;
    let manifest = manifest.filter(|_| info.complete || info.shards != 0);
    Ok(manifest.map(|manifest| (info, manifest)))
}

/// Returns the names under which this node publishes the model. Each has the commit of the hub that it is published
/// for, if any.
fn published(model: &Model) -> impl Iterator<Item = (ModelName, Option<Commit>)> {
    // Names are checked before they are stored.
    model
        .names
        .iter()
        .filter(|name| name.published)
        .filter_map(|name| Some((name.name.parse().ok()?, name.commit)))
}
