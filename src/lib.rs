//! A local authenticating reverse proxy for the Kling AI API.
//!
//! The path of a request, which `stack` puts together:
//!
//! ```text
//! client ──> server      accepts connections, bounds them, drains them
//!              │
//!            trace          one id, span, outcome and count for each request
//!            cors           lets pages of listed origins read the answers
//!            normalise      errors become one body; outside of here nothing fails
//!            drain          answers what a shutdown gives up
//!            guard          refuses before anything is spent
//!            original       drops the client's credentials; keeps the rest, to send it again
//!            detach         finishes a create that is being sent even if its client leaves
//!            retry          sends again what cannot have worked
//!            authenticate   adds the proxy's token, and the host of upstream
//!            upstream       sends; reads service codes; streams both ways
//!              │
//!              └──> https://api-singapore.klingai.com, or the embedded sandbox
//! ```
//!
//! `cli` reads the settings and hands each part its values; `admin` tells on a listener of its own
//! how it goes.

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]

pub mod admin;
pub mod auth;
pub mod cli;
pub mod clock;
pub mod environment;
pub mod error;
pub mod kling;
pub mod layer;
pub mod lifecycle;
pub mod reloadable;
pub mod request;
pub mod sandbox;
pub mod server;
pub mod settings;
pub mod stack;
pub mod telemetry;
pub mod upstream;
