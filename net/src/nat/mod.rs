//! Reaching nodes behind NATs: what others see of this node, which of its addresses they reach, ports that the gateway
//! forwards, and hole punching with the search for a port.
//!
//! Exchanges and bookkeeping only; the driver decides when, and dials.

pub(crate) mod autonat;
pub(crate) mod port_mapping;
pub(crate) mod punch;
pub(crate) mod reach;
pub(crate) mod search;
