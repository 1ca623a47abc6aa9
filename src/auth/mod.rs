//! Credentials: the proxy's own credential for Kling, and the tokens of its clients.

pub mod client_share;
pub mod client_token;
pub mod credentials;
pub mod secret;
pub mod token;
pub mod trusted_file;
