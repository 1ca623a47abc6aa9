//! Types that the layers pass on with each request, and the rules for the headers of requests and responses.

pub mod accept_encoding;
pub mod context;
pub mod headers;
pub mod id;
pub mod pace;
pub mod pending_create;
pub mod preference;
pub mod replay_body;
pub mod replayable;
