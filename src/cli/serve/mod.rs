//! `kling-proxy serve`: puts the parts together, runs them, and ends them in order.
//!
//! Requests are served by a few threads with a runtime each, which share nothing that locks: a
//! connection, its requests and the connections that they use upstream stay on one thread. This
//! thread keeps what is not a request: signals, the admin listener, the sandbox, changed files.

mod watch;

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch as latch};
use tokio::task::JoinSet;

use super::signal::{self, Signals};
use super::{Exit, Failure, SettingsArgs, find_credential, say};
use crate::client_token::ClientTokens;
use crate::clock::{Clock, SystemClock};
use crate::credentials::{Found, Places};
use crate::error::chain;
use crate::layer::guard::Rules;
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use crate::sandbox::{self, Sandbox};
use crate::secret::Secret;
use crate::server::{self, Limits};
use crate::settings::{Problem, Settings};
use crate::stack::Shared;
use crate::token::{Credential, Tokens};
use crate::upstream::{Origin, client_config};
use crate::{admin, secret_file, telemetry};

/// More would not make the Kling API faster, and each keeps connections of its own.
const MOST_THREADS: usize = 4;
/// The admin listener's own bound: probes and scrapers are few.
const ADMIN_CONNECTIONS: usize = 64;

/// Everything that is set up before the first request.
struct Proxy {
    shared: Shared,
    limits: Limits,
    listeners: Vec<TcpListener>,
    admin: Option<TcpListener>,
    sandbox: Option<(TcpListener, Sandbox)>,
    credentials: Option<Places>,
    delay: Duration,
}

pub(super) fn run(
    with_sandbox: bool,
    args: &SettingsArgs,
    environment: Vec<(OsString, OsString)>,
) -> Result<(), Failure> {
    let (settings, _) = args.load(&environment)?;
    telemetry::init(settings.log.format, settings.log.filter.clone());
    if settings.listen.unsafe_allow_remote && settings.access.client_tokens_file.is_none() {
        tracing::warn!("listen.unsafe_allow_remote: whoever can connect can spend your key");
    }
    raise_descriptor_limit();
    hide_memory();
    let proxy = Proxy::set_up(settings, with_sandbox, environment)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime
        .map_err(|error| Failure::because(Exit::Failed, &error))?
        .block_on(proxy.run())
}

// === impl Proxy ===

impl Proxy {
    fn set_up(
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

    async fn run(self) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::because(Exit::Failed, &error);
        let Self {
            shared,
            limits,
            listeners,
            admin,
            sandbox,
            credentials,
            delay,
        } = self;
        let Shared {
            tokens,
            lifecycle,
            metrics,
            ..
        } = shared.clone();
        let mut signals = Signals::new().map_err(failed)?;
        let hang_up = signal::hang_up().map_err(failed)?;
        tokens
            .bearer()
            .map_err(|error| Failure::because(Exit::Settings, &error))?;
        announce(&listeners, &shared.origin, admin.as_ref(), sandbox.as_ref()).map_err(failed)?;

        let (stop, stopped) = latch::channel(false);
        let mut threads = start_threads(&listeners, &shared, &limits, &stopped).map_err(failed)?;
        drop(listeners);
        // These serve until the last request has ended, so nobody tells them to stop.
        let (_serving, never) = latch::channel(false);
        let mut others = JoinSet::new();
        let own = |connections| Limits {
            connections: Arc::new(Semaphore::new(connections)),
            ..limits.clone()
        };
        if let Some((listener, sandbox)) = sandbox {
            let limits = own(Semaphore::MAX_PERMITS);
            others.spawn(server::run(vec![listener], sandbox, limits, never.clone()));
        }
        if let Some(listener) = admin {
            let router = admin::router(Arc::clone(&lifecycle), metrics);
            others.spawn(server::run(
                vec![listener],
                router,
                own(ADMIN_CONNECTIONS),
                never,
            ));
        }
        tokio::spawn(watch::credentials(credentials, tokens, hang_up));
        lifecycle.enter(Phase::Ready);

        tokio::select! {
            () = signals.next() => {}
            ended = threads.recv() => return Err(died(ended)),
            Some(ended) = others.join_next() => return Err(died(ended.ok())),
        }
        tracing::info!("shutting down");
        tokio::select! {
            ended = end(&lifecycle, delay, &stop, threads) => ended,
            () = signals.next() => {
                Err(Failure::new(Exit::Failed, "stopped at once by a second signal"))
            }
        }
    }
}

/// One line a listener, with the port that it got.
fn announce(
    listeners: &[TcpListener],
    origin: &Origin,
    admin: Option<&TcpListener>,
    sandbox: Option<&(TcpListener, Sandbox)>,
) -> io::Result<()> {
    for listener in listeners {
        say(format_args!(
            "proxy    http://{} -> {origin}",
            listener.local_addr()?
        ));
    }
    if let Some(listener) = admin {
        say(format_args!("admin    http://{}", listener.local_addr()?));
    }
    if let Some((listener, _)) = sandbox {
        say(format_args!("sandbox  http://{}", listener.local_addr()?));
    }
    Ok(())
}

/// How a thread ended: how many connections it had to cut.
type Ended = io::Result<usize>;

/// Starts the threads that serve requests. The channel closes when all have ended.
fn start_threads(
    listeners: &[TcpListener],
    shared: &Shared,
    limits: &Limits,
    stopped: &latch::Receiver<bool>,
) -> io::Result<mpsc::UnboundedReceiver<Ended>> {
    let (sender, ended) = mpsc::unbounded_channel();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    for index in 0..cores.min(MOST_THREADS) {
        let listeners = listeners
            .iter()
            .map(TcpListener::try_clone)
            .collect::<io::Result<Vec<_>>>()?;
        let (shared, limits, stopped) = (shared.clone(), limits.clone(), stopped.clone());
        let sender = sender.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        thread::Builder::new()
            .name(format!("requests-{index}"))
            .spawn(move || {
                let serving = server::run(listeners, shared.stack(), limits, stopped);
                let ended = runtime.block_on(serving);
                // A name that is still being resolved must not keep the process.
                runtime.shutdown_background();
                // Nobody listens any more after a second signal.
                let _ = sender.send(ended);
            })?;
    }
    Ok(ended)
}

/// Ends in order: not ready but serving, then nothing new, then what is in flight.
async fn end(
    lifecycle: &Lifecycle,
    delay: Duration,
    stop: &latch::Sender<bool>,
    mut threads: mpsc::UnboundedReceiver<Ended>,
) -> Result<(), Failure> {
    lifecycle.enter(Phase::Stopping);
    tokio::time::sleep(delay).await;
    lifecycle.enter(Phase::Draining);
    stop.send_replace(true);
    let mut cut = 0;
    while let Some(ended) = threads.recv().await {
        cut += ended.map_err(|error| Failure::because(Exit::Failed, &error))?;
    }
    if cut > 0 {
        tracing::warn!(
            connections = cut,
            "shutdown.drain is over: connections were cut"
        );
    }
    tracing::info!("shut down");
    Ok(())
}

/// A thread or listener that ended although nobody told it to.
fn died(ended: Option<Ended>) -> Failure {
    match ended {
        Some(Err(error)) => Failure::because(Exit::Failed, &error),
        _ => Failure::new(Exit::Failed, "a listener ended unexpectedly"),
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

/// No core file, and no `/proc/PID/environ` or memory for other processes of the same user: both
/// hold keys.
fn hide_memory() {
    #[cfg(target_os = "linux")]
    if let Err(error) =
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
    {
        tracing::warn!(%error, "other processes of this user may read this one's memory");
    }
}

/// A connection takes a descriptor on each side; the usual soft limit of 1024 is below
/// `limits.connections`. Programs that do not use `select` may raise it to the hard limit.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    ) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}
