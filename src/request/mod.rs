//! The types that travel through the layers, and rules for what a request carries.

pub mod accept_encoding;
pub mod context;
pub mod headers;
pub mod id;
pub mod pace;
pub mod pending_create;
pub mod replay_body;
pub mod replayable;
