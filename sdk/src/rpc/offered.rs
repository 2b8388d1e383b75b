//! The services that this node offers. They can be added and removed while it runs.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use bytes::Bytes;
use tracing::Instrument;
use weft_proto::rpc::{Code, Context, Ended, Handler, Receiver, SCHEMAS, Sender, Status};

use super::names;

/// The error of offering a service that this node offers already. Holds the service's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this node offers the service {0} already")]
pub struct AlreadyOffered(pub String);

/// The offered services, by name.
#[derive(Clone, Default)]
pub(crate) struct Offered(Arc<RwLock<Entries>>);

#[derive(Default)]
struct Entries {
    by_name: BTreeMap<String, Entry>,
    /// Schemas of all services, rebuilt when they change: all callers get the same bytes.
    schemas: Bytes,
    /// True once the node has stopped.
    closed: bool,
}

impl Entries {
    fn changed(&mut self) {
        let parts: Vec<_> = self.by_name.values().map(|e| e.schemas.clone()).collect();
        self.schemas = parts.concat().into();
    }
}

#[derive(Clone)]
struct Entry {
    handler: Arc<dyn Handler>,
    schemas: Bytes,
}

impl fmt::Debug for Offered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.read().by_name.keys()).finish()
    }
}

impl Offered {
    fn read(&self) -> RwLockReadGuard<'_, Entries> {
        self.0
            .read()
            .expect("nothing panics while holding the lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, Entries> {
        self.0
            .write()
            .expect("nothing panics while holding the lock")
    }

    /// Returns true if a service of this name is offered.
    pub(super) fn has(&self, name: &str) -> bool {
        self.read().by_name.contains_key(name)
    }

    /// Drops all handlers, and those that are added later: the node stops, and a handler may hold a clone of it.
    pub(crate) fn close(&self) {
        let mut all = self.write();
        all.closed = true;
        let gone = std::mem::take(&mut all.by_name);
        all.changed();
        drop(all);
        // Dropped without the lock: a handler may own an [`Offer`], whose drop takes the lock.
        drop(gone);
    }

    pub(super) fn add(
        &self,
        names: Vec<String>,
        schemas: Bytes,
        handler: Arc<dyn Handler>,
    ) -> Result<Offer, AlreadyOffered> {
        let mut all = self.write();
        let own = SCHEMAS.split('/').next().unwrap_or_default();
        if let Some(name) = names
            .iter()
            .find(|name| all.by_name.contains_key(*name) || *name == own)
        {
            return Err(AlreadyOffered(name.clone()));
        }
        if all.closed {
            let (offered, names) = (self.clone(), Vec::new());
            return Ok(Offer { offered, names });
        }
        for (n, name) in names.iter().enumerate() {
            let entry = Entry {
                handler: Arc::clone(&handler),
                // The schemas are stored once, with the first name.
                schemas: if n == 0 {
                    schemas.clone()
                } else {
                    Bytes::new()
                },
            };
            all.by_name.insert(name.clone(), entry);
        }
        all.changed();
        drop(all);
        Ok(Offer {
            offered: self.clone(),
            names,
        })
    }
}

impl Handler for Offered {
    fn call(&self, context: Context, requests: Receiver, mut responses: Sender) -> Ended {
        if context.method == SCHEMAS {
            let schemas = self.read().schemas.clone();
            return Box::pin(async move { responses.send_last(schemas.into()).await });
        }
        let (service, _) = names(&context.method);
        let entry = self.read().by_name.get(service).cloned();
        match entry {
            Some(entry) => {
                let (service, method) = names(&context.method);
                let peer = &context.peer;
                let span = tracing::debug_span!("answer", service, method, %peer);
                let called = entry.handler.call(context, requests, responses);
                match span.is_disabled() {
                    true => called,
                    false => Box::pin(called.instrument(span)),
                }
            }
            None => {
                let text = format!("this node offers no service {service}");
                Box::pin(std::future::ready(Err(Status::new(
                    Code::Unimplemented,
                    text,
                ))))
            }
        }
    }
}

/// Services that are offered until this is dropped; returned by [`Rpc::offer`](super::Rpc::offer).
#[derive(Debug)]
#[must_use = "dropping it ends the offer"]
pub struct Offer {
    offered: Offered,
    names: Vec<String>,
}

impl Offer {
    /// Keeps the services offered until the node stops.
    pub(super) fn keep(mut self) {
        self.names.clear();
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        let mut all = self.offered.write();
        for name in &self.names {
            all.by_name.remove(name);
        }
        all.changed();
    }
}
