//! Puts the parts together: everything that can be wrong is found here, before the first request.

use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::cli::{Exit, Failure, find_credential};
use crate::client_token::ClientTokens;
use crate::clock::{Clock, SystemClock};
use crate::credentials::{Found, Places};
use crate::error::chain;
use crate::layer::guard::Rules;
use crate::metrics::Metrics;
use crate::sandbox::{self, Sandbox};
use crate::secret::Secret;
use crate::secret_file;
use crate::server::{self, Limits};
use crate::settings::{Problem, Settings};
use crate::stack::Shared;
use crate::token::{Credential, Tokens};
use crate::upstream::{Origin, client_config};

/// Everything that is set up before the first request.
pub(super) struct Proxy {
    pub(super) shared: Shared,
    pub(super) limits: Limits,
    pub(super) listeners: Vec<TcpListener>,
    pub(super) admin: Option<TcpListener>,
    pub(super) sandbox: Option<(TcpListener, Sandbox)>,
    pub(super) credentials: Option<Places>,
    pub(super) delay: Duration,
}

// === impl Proxy ===

impl Proxy {
    pub(super) fn set_up(
        settings: Settings,
        with_sandbox: bool,
        environment: Vec<(OsString, OsString)>,
    ) -> Result<Self, Failure> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let places = Places {
            environment,
            configured: settings.credentials.clone(),
        };
        let (credential, credentials) = if with_sandbox {
            (sandbox_credential(), None)
        } else {
            found(places)?
        };
        let rules = rules(&settings, &clock)?;
        let tls = client_config(settings.upstream.ca_file.as_deref())
            .map_err(|error| Failure::because(Exit::Settings, &error))?;
        let metrics = Metrics::new().map_err(|error| Failure::because(Exit::Failed, &error))?;
        let metrics = Arc::new(metrics);

        let listeners = settings.listen.addresses.iter().copied().map(bind);
        let listeners = listeners.collect::<Result<Vec<_>, _>>()?;
        let admin = settings.admin.map(bind).transpose()?;
        let (sandbox, origin) = if with_sandbox {
            let (listener, sandbox, origin) = embedded_sandbox(settings.sandbox, &clock)?;
            (Some((listener, sandbox)), origin)
        } else {
            (None, settings.upstream.origin)
        };
        refuse_circle(&origin, listeners.iter().chain(&admin))?;

        let tokens = Tokens::new(
            credential,
            settings.token,
            Arc::clone(&clock),
            Arc::clone(&metrics),
        );
        let shared = Shared {
            rules: Arc::new(rules),
            normalise: settings.errors,
            tokens: Arc::new(tokens),
            origin,
            tls,
            timeouts: settings.upstream.timeouts,
            clock,
            lifecycle: Arc::default(),
            metrics,
        };
        let connections = usize::try_from(settings.limits.connections).unwrap_or(usize::MAX);
        let limits = Limits {
            connections: Arc::new(Semaphore::new(connections.min(Semaphore::MAX_PERMITS))),
            header_timeout: settings.limits.header_timeout,
            idle: settings.upstream.timeouts.idle,
            drain: settings.shutdown.drain,
        };
        let delay = settings.shutdown.delay;
        Ok(Self {
            shared,
            limits,
            listeners,
            admin,
            sandbox,
            credentials,
            delay,
        })
    }
}

fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    server::bind(address)
        .map_err(|error| Failure::new(Exit::Failed, format!("cannot listen on {address}: {error}")))
}

/// The credential, and the places to look again if it came from a file.
fn found(places: Places) -> Result<(Credential, Option<Places>), Failure> {
    let Found {
        credential,
        source,
        from_file,
        warnings,
    } = find_credential(&places)?;
    tracing::info!(kind = credential.kind(), source, "credential");
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok((credential, from_file.then_some(places)))
}

fn sandbox_credential() -> Credential {
    let [access_key, secret_key] =
        [sandbox::ACCESS_KEY, sandbox::SECRET_KEY].map(|key| Secret::from(key.to_owned()));
    Credential::Pair {
        access_key,
        secret_key,
    }
}

fn embedded_sandbox(
    options: sandbox::Options,
    clock: &Arc<dyn Clock>,
) -> Result<(TcpListener, Sandbox, Origin), Failure> {
    let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let address = listener
        .local_addr()
        .map_err(|error| Failure::because(Exit::Failed, &error))?;
    let origin = format!("http://{address}").parse();
    let origin = origin.map_err(|error| Failure::because(Exit::Failed, &error))?;
    Ok((
        listener,
        Sandbox::new(options, address, Arc::clone(clock)),
        origin,
    ))
}

fn rules(settings: &Settings, clock: &Arc<dyn Clock>) -> Result<Rules, Failure> {
    let wrong = |reason: String| {
        let problem = Problem::new("access.client_tokens_file", reason);
        Failure::new(Exit::Settings, problem.to_string())
    };
    let read = |path: &PathBuf| {
        let unreadable =
            |error| wrong(format!("cannot read {}: {}", path.display(), chain(&error)));
        let file = secret_file::read(path).map_err(unreadable)?;
        if file.exposed {
            let path = path.display();
            tracing::warn!("access.client_tokens_file: every user can read {path}: chmod 600");
        }
        ClientTokens::parse(&file.text, Arc::clone(clock)).map_err(|error| wrong(chain(&error)))
    };
    Ok(Rules {
        allowed_hosts: settings.access.allowed_hosts.clone(),
        allowed_origins: settings.access.allowed_origins.as_slice().into(),
        allowed_methods: settings.access.allowed_methods.clone(),
        allowed_paths: settings.access.allowed_paths.clone(),
        client_tokens: settings
            .access
            .client_tokens_file
            .as_ref()
            .map(read)
            .transpose()?,
        request_body: settings.limits.request_body,
        in_flight: settings.limits.in_flight,
    })
}

/// A proxy whose upstream is itself would answer no request and fill up; if it were the admin
/// listener, that would be reachable through the data listener.
fn refuse_circle<'a>(
    origin: &Origin,
    mut listeners: impl Iterator<Item = &'a TcpListener>,
) -> Result<(), Failure> {
    let own = |listener: &TcpListener| {
        listener
            .local_addr()
            .is_ok_and(|own| origin.loopback_port() == Some(own.port()))
    };
    if listeners.any(own) {
        let problem = Problem::new("upstream.url", format!("{origin} is this proxy itself"));
        return Err(Failure::new(Exit::Settings, problem.to_string()));
    }
    Ok(())
}
