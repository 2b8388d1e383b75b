//! The models and names that this node advertises.

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

/// The terms of a provider's record. A provider that is gone is tried in vain for two hours at most.
const PROVIDER: Terms = Terms {
    ttl: Duration::from_secs(2 * 3600),
    rank: Rank::Content,
    has_addresses: true,
    at_stop: AtStop::Withdraw,
};

/// The terms of a name, which means its model for a day without its publisher.
const NAME: Terms = Terms {
    ttl: Duration::from_secs(24 * 3600),
    has_addresses: false,
    at_stop: AtStop::Keep,
    ..PROVIDER
};

/// States and withdraws models and names.
#[derive(Debug, Clone)]
pub(crate) struct Announcer {
    advertiser: Advertiser,
    store: Store,
}

impl Announcer {
    pub(crate) fn new(advertiser: Advertiser, store: Store) -> Self {
        Self { advertiser, store }
    }

    /// States that this node has a model, or which parts of it, and the names it publishes the model by; how many nodes
    /// took the record that fewest took.
    pub(crate) async fn announce(&self, model: &Model) -> Result<usize, Error> {
        // It may have been removed since the caller looked.
        let (store, id) = (self.store.clone(), model.id);
        let model = blocking(move || Ok(store.model(&id)?)).await?;
        let (provider, value) = self.provider(model.id);
        let mut took = self.advertiser.state(provider, value, PROVIDER).await?;
        for (name, _) in published(&model) {
            let (name, value) = self.name(model.id, name);
            took = took.min(self.advertiser.state(name, value, NAME).await?);
        }
        Ok(took)
    }

    /// Withdraws what [`announce`](Self::announce) stated.
    pub(crate) async fn withdraw(&self, model: &Model) -> Result<(), Error> {
        let provider = RecordId::of(provider_key(&model.id));
        self.advertiser.withdraw(provider, PROVIDER).await?;
        for (name, _) in published(model) {
            self.withdraw_name(&name).await?;
        }
        Ok(())
    }

    /// Withdraws that this node publishes a model by this name.
    pub(crate) async fn withdraw_name(&self, name: &ModelName) -> Result<(), Error> {
        let id = RecordId::of(name.record_key());
        self.advertiser.withdraw(id, NAME).await?;
        Ok(())
    }

    /// States every model that the store has.
    pub(crate) async fn announce_all(self) {
        let store = self.store.clone();
        let models = match blocking(move || Ok(store.models()?)).await {
            Ok(models) => models,
            Err(error) => {
                tracing::warn!(%error, "the models of the store are not announced");
                return;
            }
        };
        let providers = models.iter().map(|model| self.provider(model.id));
        self.advertiser.register_all(providers.collect(), PROVIDER);
        let names = models.iter().flat_map(|model| {
            let names = published(model);
            names.map(|(name, _)| self.name(model.id, name))
        });
        self.advertiser.register_all(names.collect(), NAME);
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

/// What there is to be said of a model; `None` if nothing of it can be served.
fn here(store: &Store, model: &Model) -> Result<Option<(ModelInfo, Manifest)>, Error> {
    let (info, manifest) = describe(store, model)?;
    let manifest = manifest.filter(|_| info.complete || info.shards != 0);
    Ok(manifest.map(|manifest| (info, manifest)))
}

/// The names that this node publishes the model by, each with the commit that it is published for, if for one.
fn published(model: &Model) -> impl Iterator<Item = (ModelName, Option<Commit>)> {
    // Names are checked before they are stored.
    model
        .names
        .iter()
        .filter(|name| name.published)
        .filter_map(|name| Some((name.name.parse().ok()?, name.commit)))
}
