//! A local authenticating reverse proxy for the Kling AI API.
//!
//! # The path of a request
//!
//! [`stack`] puts the layers together:
//!
//! ```text
//! client ──> server      accepts connections, limits them, drains them
//!              │
//!            trace          gives each request one id, span, outcome and count
//!            cors           lets pages of listed origins read the responses
//!            normalise      turns every error into one JSON body; nothing outside of it fails
//!            drain          answers what a shutdown gives up
//!            guard          refuses what may not pass, before anything is spent
//!            local          answers requests for the proxy itself, such as `/`
//!            replayable     drops the client's credentials; keeps the rest, to send it again
//!            wait           holds answers back until their task has ended, if the client asks for it
//!            observe        reads what polls and lists say of tasks
//!            detach         records creates; finishes a create that is being sent even if its client disconnects
//!            recover        looks a create up whose answer was lost
//!            retry          retries only requests that had no effect upstream
//!            authenticate   adds the proxy's token, and the host of upstream
//!            upstream       sends; reads service codes; streams both ways
//!              │
//!              └──> https://api-singapore.klingai.com, or the embedded sandbox
//! ```
//!
//! # The folders
//!
//! | folder or file | holds |
//! | --- | --- |
//! | [`cli`] | the commands: `serve`, `check`, `run` and the others |
//! | [`settings`] | the settings, from the file, the environment and flags |
//! | [`stack`] | the order of the layers |
//! | [`server`] | listeners, TLS, connections, threads |
//! | [`layer`] | the layers |
//! | [`request`] | the types that pass from layer to layer, and which headers pass |
//! | [`upstream`] | connections to Kling, over HTTP/1.1 and HTTP/2 |
//! | [`auth`] | the proxy's credentials, and the tokens of its clients |
//! | [`kling`] | facts about Kling's API: service codes, JSON, paths |
//! | [`error`] | all ways in which a request can fail |
//! | [`tasks`] | the memory of all creates and their tasks |
//! | [`telemetry`] | log lines and metrics |
//! | [`style`] | the colours of text for people |
//! | [`watcher`] | asks Kling for running tasks that no client asks for |
//! | [`admin`] | health, metrics and control, on a listener of their own |
//! | [`sandbox`] | an imitation of Kling's API, for trying and testing |
//!
//! `docs/ARCHITECTURE.md` says which of them may import which, and which thread owns what.
//!
//! # Embedding
//!
//! The crate is a program. Its one entry point is [`cli::run`]:
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     kling_proxy::cli::run()
//! }
//! ```

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used))]
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "the front page describes the private folders too"
)]

mod admin;
mod auth;
pub mod cli;
mod clock;
mod environment;
mod error;
mod kling;
mod layer;
mod lifecycle;
mod reloadable;
mod request;
mod sandbox;
mod server;
mod settings;
mod stack;
mod style;
mod tasks;
mod telemetry;
mod upstream;
mod watcher;

/// Items for the project's own benches, fuzz targets and simulation. They may change at any time.
#[doc(hidden)]
pub mod internals {
    pub use crate::auth::client_token::ClientTokens;
    pub use crate::auth::secret::Secret;
    pub use crate::auth::token::{Credential, Tokens, Validity};
    pub use crate::clock::{Clock, SystemClock};
    pub use crate::environment::Environment;
    pub use crate::error::{Answer, Error};
    pub use crate::kling::envelope::{self, Envelope, Peek};
    pub use crate::kling::service_code;
    pub use crate::layer::authenticate::AuthenticateLayer;
    pub use crate::layer::cors::CorsLayer;
    pub use crate::layer::guard::rules::{Purpose, Rules};
    pub use crate::layer::guard::{Destination, GuardLayer};
    pub use crate::layer::normalise::{
        ErrorBodyFormat, ErrorFormat, NormaliseLayer, StatusMapping,
    };
    pub use crate::layer::trace::TraceLayer;
    pub use crate::lifecycle::Phase;
    pub use crate::reloadable::Reloadable;
    pub use crate::request::context::ProxyRequest;
    pub use crate::request::headers::{strip_request, strip_response};
    pub use crate::request::replay_body::{ReplayBudget, ReplayLimits};
    pub use crate::request::replayable::{Attempt, ReplayableRequest};
    pub use crate::server::{ConnectionLimits, Listener, Stop, Worker, run as serve};
    pub use crate::settings::{Flags, SettingProblem, SettingRow, Settings};
    pub use crate::stack::{Parts, Shared};
    pub use crate::tasks::sqlite::Sqlite;
    pub use crate::tasks::state::TaskState;
    pub use crate::tasks::store::{ListQuery, Store};
    pub use crate::telemetry::metrics::Metrics;
    pub use crate::telemetry::{LogFormat, init as init_log};
    pub use crate::upstream::{
        Dial, Dialing, Network, NoHttp1, Transport, Versions, client_config,
    };
}
