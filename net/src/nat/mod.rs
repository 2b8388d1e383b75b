//! Reaching nodes behind NATs: how other peers see this node, which of its addresses they reach, port mappings, and
//! hole punching with its search for a port.
//!
//! This module has exchanges and bookkeeping only; the driver decides when to use them, and dials.

pub(crate) mod autonat;
pub(crate) mod port_mapping;
pub(crate) mod punch;
pub(crate) mod reach;
pub(crate) mod search;
