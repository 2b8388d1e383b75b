//! The local gRPC API: the functions of the SDK for programs in any language.

mod accept;
mod calls;
mod documents;
mod endpoint;
mod events;
mod models;
mod node;
mod read;
mod records;
mod registries;
mod status;
mod storage;
mod topics;

pub(crate) use self::{
    calls::CALL_ENDED,
    endpoint::{ApiFiles, ApiServer},
};
