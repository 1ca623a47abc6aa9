//! Builds the parts of the proxy from its settings. Everything that can be wrong is found here, before
//! the first request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bytesize::ByteSize;
use tokio::sync::Semaphore;

use super::client_tokens;
use super::configuration::Configuration;
use super::listeners::{Listeners, bind};
use super::process::{EMBEDDED_SANDBOX, FAR_UPSTREAM, limit_connections};
use crate::auth::client_token::ClientTokens;
use crate::auth::credentials::{Found, Places};
use crate::auth::secret::Secret;
use crate::auth::token::Credential;
use crate::cli::{Exit, Failure, find_credential};
use crate::clock::{Clock, SystemClock};
use crate::error::chain;
use crate::layer::guard::rules::{Purpose, Rules};
use crate::sandbox::{self, Sandbox};
use crate::server::{ConnectionLimits, Listener};
use crate::settings::{AccessSettings, SettingProblem, Settings};
use crate::stack::{Parts, Shared};
use crate::tasks::place::{self, OpenedStore};
use crate::tasks::store::StoreError;
use crate::telemetry::metrics::Metrics;
use crate::upstream::{Network, Origin, client_config};

/// The parts of a proxy, before it serves its first request.
pub(in crate::cli) struct Proxy {
    pub(in crate::cli) shared: Shared,
    pub(super) limits: ConnectionLimits,
    pub(super) listeners: Listeners,
    pub(super) sandbox: Option<(Listener, Sandbox)>,
    pub(super) store: OpenedStore,
    pub(super) delay: Duration,
    pub(super) drain: Duration,
}

// === impl Proxy ===

impl Proxy {
    /// Checks settings, credential and files, and then opens the listeners, since a port that is taken
    /// must not hide what is wrong besides.
    pub(in crate::cli) fn set_up(
        configuration: &Configuration,
        open: impl FnOnce() -> Result<Listeners, Failure>,
    ) -> Result<Self, Failure> {
        let settings = &configuration.settings;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        // Meanwhile, because a file takes some milliseconds.
        let store =
            open_store(configuration).map_err(|error| Failure::because(Exit::Failed, &error))?;
        let credential = if configuration.sandboxed {
            tell_ignored(&configuration.places());
            sandbox_credential()
        } else {
            found(configuration)?
        };
        let rules = rules(
            &settings.access,
            settings.limits.request_body,
            settings.limits.in_flight,
            client_tokens(settings, &clock)?,
        );
        warn_of_clients(&rules);
        let tls = client_config(settings.upstream.ca_file.as_deref())
            .map_err(|error| Failure::because(Exit::Settings, &error))?;
        let metrics = Metrics::new().map_err(|error| Failure::because(Exit::Failed, &error))?;
        let metrics = Arc::new(metrics);

        let listeners = open()?;
        let (sandbox, origin) = if configuration.sandboxed {
            let mut options = settings.sandbox.clone();
            let hosts = &settings.access.allowed_hosts;
            options.public_url = options.public_url.or_else(|| listeners.public_url(hosts));
            let (listener, sandbox, origin) = embedded_sandbox(options, &clock)?;
            (Some((listener, sandbox)), origin)
        } else {
            (None, settings.upstream.origin.clone())
        };
        listeners.refuse_circle(&origin)?;

        let timeouts = settings.upstream.timeouts;
        let network = Network::new(
            &origin,
            settings.upstream.proxy.clone(),
            &tls,
            timeouts.idle,
        );
        let shared = Shared::new(Parts {
            credential,
            validity: settings.token,
            rules,
            errors: settings.errors,
            retry: settings.retry,
            replay: settings.replay,
            origin,
            sandboxed: configuration.sandboxed,
            admin: listeners.admin_url(),
            dial: Arc::new(network),
            timeouts,
            waiting: settings.state.waiting,
            clock,
            metrics,
        });
        shared
            .tokens
            .bearer()
            .map_err(|error| Failure::because(Exit::Settings, &error))?;
        let store = store
            .join()
            .map_err(|_| Failure::new(Exit::Failed, "the store cannot be opened"))?;
        let store = store.map_err(|error| {
            let problem = SettingProblem::new("state.url", chain(&error));
            Failure::new(Exit::Settings, problem.to_string())
        })?;
        if let Some(warning) = &store.warning {
            tracing::warn!("state.url: {warning}");
        }
        let limits = limits(settings, configuration.sandboxed);
        let (delay, drain) = (settings.shutdown.delay, settings.shutdown.drain);
        Ok(Self {
            shared,
            limits,
            listeners,
            sandbox,
            store,
            delay,
            drain,
        })
    }
}

/// Opens the store of tasks on a thread of its own.
fn open_store(
    configuration: &Configuration,
) -> io::Result<JoinHandle<Result<OpenedStore, StoreError>>> {
    let url = configuration.settings.state.url.clone();
    let environment = configuration.environment.clone();
    thread::Builder::new()
        .name("store".to_owned())
        .spawn(move || place::open(&url, &environment))
}

/// Returns the limits of the listeners for requests, lowered if there are not enough file descriptors.
fn limits(settings: &Settings, sandboxed: bool) -> ConnectionLimits {
    let upstream = if sandboxed {
        EMBEDDED_SANDBOX
    } else {
        FAR_UPSTREAM
    };
    let connections = limit_connections(&settings.limits, upstream);
    ConnectionLimits {
        connections: Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS))),
        heads: Arc::default(),
        evictor: None,
        header_timeout: settings.limits.header_timeout,
        idle: settings.upstream.timeouts.idle,
    }
}

fn found(configuration: &Configuration) -> Result<Credential, Failure> {
    let Found {
        credential,
        source,
        warnings,
    } = find_credential(&configuration.places())
        .map_err(|error| Failure::without_credential(&error, configuration.trial))?;
    tracing::info!(kind = credential.kind(), source, "credential");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(credential)
}

/// Logs the places that have a credential, which the embedded sandbox does not use.
fn tell_ignored(places: &Places) {
    let ignored = places.occupied().join(", ");
    if !ignored.is_empty() {
        tracing::info!("the sandbox has keys of its own and ignores {ignored}");
    }
}

pub(in crate::cli) fn sandbox_credential() -> Credential {
    let [access_key, secret_key] =
        [sandbox::ACCESS_KEY, sandbox::SECRET_KEY].map(|key| Secret::from(key.to_owned()));
    Credential::Pair {
        access_key,
        secret_key,
    }
}

pub(in crate::cli) fn embedded_sandbox(
    options: sandbox::Options,
    clock: &Arc<dyn Clock>,
) -> Result<(Listener, Sandbox, Origin), Failure> {
    let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let address = listener
        .local_addr()
        .map_err(|error| Failure::because(Exit::Failed, &error))?;
    let origin = format!("http://{address}").parse();
    let origin = origin.map_err(|error| Failure::because(Exit::Failed, &error))?;
    Ok((
        Listener::Tcp(listener),
        Sandbox::new(options, address, Arc::clone(clock)),
        origin,
    ))
}

/// Reads the client tokens of `access.client_tokens_file`, if it is set.
pub(super) fn client_tokens(
    settings: &Settings,
    clock: &Arc<dyn Clock>,
) -> Result<Option<Arc<ClientTokens>>, Failure> {
    let path = settings.access.client_tokens_file.as_ref();
    let tokens = path.map(|path| client_tokens::read(path, clock).map(Arc::new));
    tokens.transpose().map_err(|error| {
        let problem = SettingProblem::new("access.client_tokens_file", chain(&error));
        Failure::new(Exit::Settings, problem.to_string())
    })
}

/// Returns the rules of `access.*`, `limits.request_body` and `limits.in_flight`, with these client tokens.
pub(super) fn rules(
    access: &AccessSettings,
    request_body: ByteSize,
    in_flight: u64,
    client_tokens: Option<Arc<ClientTokens>>,
) -> Rules {
    Rules {
        allowed_hosts: access.allowed_hosts.clone(),
        allowed_origins: access.allowed_origins.clone(),
        allowed_methods: access.allowed_methods.clone(),
        allowed_paths: access.allowed_paths.clone(),
        client_tokens,
        request_body,
        in_flight,
        purpose: Purpose::Serve,
    }
}

/// Logs the warning about the file of the client tokens, if there is one.
pub(super) fn warn_of_clients(rules: &Rules) {
    let tokens = rules.client_tokens.as_ref();
    if let Some(warning) = tokens.and_then(|tokens| tokens.warning.as_ref()) {
        tracing::warn!("access.client_tokens_file: {warning}");
    }
}
